"""Tokenizers from what toolkits store: token lists, dictionaries, subword-nmt codes, SentencePiece models.

A converter reads its toolkit's list of tokens, in the order of their ids; makes a backend that cuts text as the
toolkit does (`whitespace_backend`, `character_backend`, `subword_nmt_backend`, `sentencepiece_backend`); makes each
side of it (`make_side`), and the pair (`RnnSeq2SeqTokenizer(source, target)`; one vocabulary for both sides goes in
twice, with `source_vocab_size=None`). Ids are the toolkit's.

Where text is cut into pieces, there can be pieces that the cutting knows and the toolkit's list does not: the toolkit
reads them as unknown. A backend cannot give two pieces one id, so these get ids of their own behind the toolkit's, and
`fit_vocabulary` (in `base`) gives the model rows for them that equal the unknown token's.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from .base import ConversionError, ConversionOptions

END_OF_WORD = "</w>"


@dataclass(frozen=True)
class SpecialTokens:
    """How a vocabulary spells its special tokens; `None` where it has none. Other names are not special."""

    pad: str | None = None
    bos: str | None = None
    eos: str | None = None
    unk: str | None = None


def read_tokens(path: Path, counts: bool = False) -> list[str]:
    """
    A token a line, in the order of ids; UTF-8. Lines end with a newline only: a token may hold other separators.

    Args:
        path: the file.
        counts: what follows the last space or tab of a line is a number, not a part of the token.
    """
    lines = path.read_bytes().decode("utf-8").split("\n")
    if lines[-1] == "":
        lines.pop()
    tokens = []
    for number, line in enumerate(lines, start=1):
        line = line.removesuffix("\r")
        if counts:
            token, separator, count = _cut_last(line)
            if not separator or not count.isdecimal():
                raise ConversionError(f"{path}, line {number}: expected a token and its count, got {line!r}.")
            line = token
        tokens.append(line)
    return tokens


def _cut_last(line: str) -> tuple[str, str, str]:
    place = max(line.rfind(" "), line.rfind("\t"))
    return (line[:place], line[place], line[place + 1 :]) if place >= 0 else (line, "", "")


def read_dictionary(path: Path) -> list[str]:
    """
    A `.json`, `.yml` or `.yaml` mapping from token to id -> tokens in the order of ids. YAML is read without types (a
    token `yes` is no truth value).
    """
    if path.suffix == ".json":
        entries = json.loads(path.read_text(encoding="utf-8"))
    elif path.suffix in (".yml", ".yaml"):
        try:
            import yaml
        except ImportError as error:
            raise ConversionError(f"Reading {path} needs PyYAML: pip install pyyaml.") from error
        # BaseLoader makes strings, lists and mappings, and nothing else.
        entries = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    else:
        raise ConversionError(f"{path}: a dictionary ends with .json, .yml or .yaml.")
    if not isinstance(entries, dict):
        raise ConversionError(f"{path}: expected a mapping from tokens to ids, got {type(entries).__name__}.")
    by_id: dict[int, str] = {}
    for token, value in entries.items():
        try:
            token_id = int(value)
        except (TypeError, ValueError):
            raise ConversionError(f"{path}: the id of {token!r} must be a number, got {value!r}.") from None
        if token_id in by_id:
            raise ConversionError(f"{path}: {token!r} and {by_id[token_id]!r} have the same id {token_id}.")
        by_id[token_id] = token
    return in_order(by_id, str(path))


def in_order(by_id: dict[int, str], name: str) -> list[str]:
    """Tokens by id -> the list of them; `name` is for the error where ids are not 0, 1, 2, ..."""
    missing = next((index for index in range(len(by_id)) if index not in by_id), None)
    if missing is not None:
        raise ConversionError(f"{name}: {len(by_id)} tokens, but none has the id {missing}.")
    return [by_id[index] for index in range(len(by_id))]


def check_tokens(tokens: Sequence[str], name: str, size: int) -> None:
    """Raises [`ConversionError`] unless all tokens differ and there are `size`; `name` says which vocabulary."""
    if len(tokens) != size:
        raise ConversionError(f"The {name} vocabulary has {len(tokens)} tokens, the model {size}.")
    repeated = next((token for index, token in enumerate(tokens) if token in set(tokens[:index])), None)
    if len(set(tokens)) != len(tokens):
        raise ConversionError(f"The {name} vocabulary holds {repeated!r} twice.")


def _ids(tokens: Iterable[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}


def whitespace_backend(tokens: Sequence[str], unk: str | None, spaces_only: bool = False) -> Tokenizer:
    """Tokens stand between white space (with `spaces_only`, between spaces), and are joined with spaces."""
    tokenizer = Tokenizer(models.WordLevel(_ids(tokens), unk_token=unk))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed") if spaces_only else pre_tokenizers.WhitespaceSplit()
    return tokenizer


def character_backend(tokens: Sequence[str], unk: str | None, space: str = " ") -> Tokenizer:
    """Tokens are single code points; `space` is how the vocabulary writes the space."""
    tokenizer = Tokenizer(models.WordLevel(_ids(tokens), unk_token=unk))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(?m)."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    if space != " ":
        tokenizer.normalizer = normalizers.Replace(" ", space)
        tokenizer.decoder = decoders.Sequence([decoders.Replace(space, " "), decoders.Fuse()])
    return tokenizer


def read_codes(path: Path) -> list[tuple[str, str]]:
    """The merges of a subword-nmt codes file, the first to be done first."""
    lines = path.read_text(encoding="utf-8").split("\n")
    if not lines[0].startswith("#version: 0.2"):
        raise ConversionError(
            f"{path} holds codes of subword-nmt's version 0.1 (its first line is not '#version: 0.2'), where the end "
            "of a word is a piece of its own that then has to go: `tokenizers` cannot take a piece out. Leave the "
            "codes out, and give the model text that subword-nmt has cut."
        )
    merges: dict[tuple[str, str], None] = {}  # a repeated one counts where it stands first
    for number, line in enumerate(lines[1:], start=2):
        line = line.strip("\r\n ")
        if line:
            parts = tuple(line.split(" "))
            if len(parts) != 2:
                raise ConversionError(f"{path}, line {number}: expected two pieces, got {line!r}.")
            merges[parts] = None
    return list(merges)


def subword_nmt_backend(
    tokens: Sequence[str], codes: Path, specials: SpecialTokens, separator: str = "@@"
) -> Tokenizer:
    """
    Words between spaces, cut by subword-nmt's codes (Sennrich et al. 2016), without its options for a vocabulary
    threshold, glossaries and dropout.

    A piece that goes on is spelt `ab@@` by subword-nmt and `ab` here, a piece that ends a word `ab` by subword-nmt and
    `ab</w>` here; each has the id of its spelling in `tokens`.

    Args:
        tokens: in the order of ids, spelt as by subword-nmt.
        codes: the file of merges.
        specials: special tokens stay spelt as they are: no text is cut into them.
        separator: what marks a piece that goes on.
    """
    unk = _required_unknown(specials, "subword-nmt codes")
    special = {specials.pad, specials.bos, specials.eos, specials.unk}
    merges = read_codes(codes)
    ids: dict[str, int] = {}
    for index, token in enumerate(tokens):
        if token in special:
            piece = token
        elif token.endswith(separator) and token != separator:
            piece = token.removesuffix(separator)
        else:
            piece = token + END_OF_WORD
        if piece in ids:
            raise ConversionError(f"The tokens {tokens[ids[piece]]!r} and {token!r} are the same piece {piece!r}.")
        ids[piece] = index
    for piece in sorted({part for left, right in merges for part in (left, right, left + right)} - ids.keys()):
        ids[piece] = len(ids)
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token=unk, end_of_word_suffix=END_OF_WORD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer.decoder = decoders.Sequence(
        [
            *(decoders.Replace(token, token + END_OF_WORD) for token in special if token is not None),
            decoders.Replace(END_OF_WORD, " "),
            decoders.Fuse(),
            decoders.Strip(" ", 0, 1),
        ]
    )
    return tokenizer


def _required_unknown(specials: SpecialTokens, what: str) -> str:
    if specials.unk is None:
        raise ConversionError(f"A vocabulary with {what} needs an unknown token.")
    return specials.unk


# Kinds of pieces in a SentencePiece model: those that text can be cut into are normal and user-defined ones.
NORMAL, USER_DEFINED = 1, 4
UNIGRAM, BPE = 1, 2
# The mark in place of a space.
SPACE_MARK = "▁"


def sentencepiece_backend(tokens: Sequence[str], model: Path, specials: SpecialTokens) -> Tokenizer:
    """
    Text cut by a SentencePiece model (Kudo & Richardson 2018) of type unigram or bpe, whose pieces are then looked up
    in `tokens`.

    A run of characters that the model does not know is one piece to SentencePiece, looked up as a whole. Here the run
    is one unknown token, except for what of it is in `tokens`: such a character or (unigram) run is found within a
    longer run, too.

    Args:
        tokens: in the order of ids; the toolkit's, not the model's.
        model: the `.model` file; reading it needs the `protobuf` package.
        specials: of the toolkit.
    """
    from transformers.convert_slow_tokenizer import generate_merges, import_protobuf

    unk = _required_unknown(specials, "a SentencePiece model")
    try:
        proto = import_protobuf().ModelProto()
    except ImportError as error:
        raise ConversionError(f"Reading {model} needs a package: pip install sentencepiece protobuf.") from error
    try:
        proto.ParseFromString(model.read_bytes())
    except Exception as error:  # the package's DecodeError, which has no public place
        raise ConversionError(f"{model} is no SentencePiece model: {error}.") from error
    kind, rules = proto.trainer_spec.model_type, proto.normalizer_spec
    for name, refused in (
        (f"model_type {kind}; allowed are unigram ({UNIGRAM}) and bpe ({BPE})", kind not in (UNIGRAM, BPE)),
        ("byte_fallback", proto.trainer_spec.byte_fallback),
        ("treat_whitespace_as_suffix", proto.trainer_spec.treat_whitespace_as_suffix),
        ("escape_whitespaces off", not rules.escape_whitespaces),
        ("user-defined symbols", any(piece.type == USER_DEFINED for piece in proto.pieces)),
    ):
        if refused:
            raise ConversionError(f"{model}: {name} cannot be represented.")
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}
    ids = {token: index for index, token in enumerate(tokens)}
    for piece in scores:
        ids.setdefault(piece, len(ids))
    if kind == UNIGRAM:
        # What the model cannot cut text into: the toolkit's special tokens, above all. As unlikely as can be without
        # changing how unlikely an unknown character is, 10 below the least piece.
        least = min(scores.values())
        tokenizer = Tokenizer(models.Unigram([(token, scores.get(token, least)) for token in ids], unk_id=ids[unk]))
    else:
        merges = generate_merges(scores, scores)
        tokenizer = Tokenizer(models.BPE(ids, merges, unk_token=unk, fuse_unk=True))
    steps: list[normalizers.Normalizer] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE_MARK))
    steps.append(normalizers.Replace(" ", SPACE_MARK))
    tokenizer.normalizer = normalizers.Sequence(steps)
    # Text that spells a special token is not that token: it is cut behind its first character.
    names = [token for token in (specials.pad, specials.bos, specials.eos, unk) if token and len(token) > 1]
    inside = "|".join(f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})" for name in names)
    cuts: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.Split(Regex(inside), "isolated")]
    if not any(SPACE_MARK in piece[1:] for piece in scores):  # no piece goes over words: each on its own, for speed
        cuts.insert(0, pre_tokenizers.Split(SPACE_MARK, "merged_with_next"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    undo = [decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE_MARK, " "), decoders.Fuse(), *undo])
    return tokenizer


def cutting_files(side: str, options: ConversionOptions) -> tuple[Path | None, Path | None]:
    """The user's files that cut a side's text: `{side}_codes`, of subword-nmt, or `{side}_sentencepiece`."""
    codes, pieces = (options.files.get(f"{side}_{kind}") for kind in ("codes", "sentencepiece"))
    if codes is not None and pieces is not None:
        raise ConversionError(f"Give one of {side}_codes and {side}_sentencepiece, not both.")
    return codes, pieces


def text_backend(
    side: str, tokens: Sequence[str], specials: SpecialTokens, options: ConversionOptions, spaces_only: bool = False
) -> Tokenizer:
    """
    Text cut by the file that the user gave for this side ("source" or "target"); without one tokens stand between
    white space, see `whitespace_backend`.
    """
    codes, pieces = cutting_files(side, options)
    if codes is not None:
        return subword_nmt_backend(tokens, codes, specials)
    if pieces is not None:
        return sentencepiece_backend(tokens, pieces, specials)
    return whitespace_backend(tokens, specials.unk, spaces_only)


def make_side(
    backend: Tokenizer,
    specials: SpecialTokens,
    before: Sequence[str] = (),
    after: Sequence[str] = (),
    lowercase: bool = False,
    unicode_normalization: str | None = None,
) -> PreTrainedTokenizerFast:
    """
    One side of a [`RnnSeq2SeqTokenizer`].

    Args:
        backend: which cuts text and knows ids.
        specials: each has to be in the vocabulary.
        before, after: tokens that are put around every text: `after=(specials.eos,)` for a source that ends so, and
            always for the target (whose decoder's start token is the model's, `config.decoder_start_token_id`).
        lowercase: of text, before anything else but
        unicode_normalization: "NFC", "NFD", "NFKC" or "NFKD", which comes first.
    """
    steps: list[normalizers.Normalizer] = []
    if unicode_normalization is not None:
        steps.append(getattr(normalizers, unicode_normalization)())
    if lowercase:
        steps.append(normalizers.Lowercase())
    if steps:
        if backend.normalizer is not None:
            steps.append(backend.normalizer)
        backend.normalizer = normalizers.Sequence(steps)
    names = {f"{name}_token": token for name, token in vars(specials).items() if token is not None}
    for name, token in [*names.items(), *(("a text's first or last token", token) for token in (*before, *after))]:
        if backend.token_to_id(token) is None:
            raise ConversionError(f"The vocabulary does not have {token!r}, which is to be {name}.")
    if before or after:
        # Each token is a piece of its own in a template, so that no character of it means anything there.
        around = {token: backend.token_to_id(token) for token in (*before, *after)}
        backend.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *(f"{token}:1" for token in before), "$B:1", *(f"{t}:1" for t in after)],
            special_tokens=list(around.items()),
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, split_special_tokens=True, **names
    )
