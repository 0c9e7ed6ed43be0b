"""Training the inner tokenizers from a corpus with the `tokenizers` library.

| kind       | a token is                                                              | exact round trip for         |
|------------|-------------------------------------------------------------------------|------------------------------|
| `word`     | a word or a punctuation mark, with the space before it                  | text of known tokens         |
| `char`     | one code point                                                          | text of known characters     |
| `symbols`  | what stands between white space: phones, text that is tokenised already | known symbols, single spaces |
| `bpe`      | a piece of a word, by merges of pairs (Sennrich et al. 2016)            | text of known characters     |
| `unigram`  | a piece of a word, by a unigram language model (Kudo 2018)              | text of known characters     |
| `byte_bpe` | a piece of a word's bytes, by merges of pairs (Radford et al. 2019)     | any text                     |

Exact means `tok.decode(tok(text).input_ids, skip_special_tokens=True) == text`, with leading, trailing and repeated
spaces, where neither lower-casing nor Unicode normalisation was asked for.

`word`, `bpe` and `unigram` write the space as U+2581 (▁), as SentencePiece does, and put one before the text, so
that a word is the same token at the start of a sentence and within it: `A man.` is `▁A ▁man .`, and `A man .` is `▁A
▁man ▁.`. A ▁ in the text itself comes back as a space. `byte_bpe` puts a space before the text for the same reason;
decoding takes it off.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from .tokenization_rnn_seq2seq import RnnSeq2SeqTokenizer

TokenizerKind = Literal["word", "char", "symbols", "bpe", "unigram", "byte_bpe"]
UnicodeNormalization = Literal["none", "nfc", "nfd", "nfkc", "nfkd"]

# Their ids are their places here, in every kind.
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")
PAD, BOS, EOS, UNK = SPECIAL_TOKENS

UNICODE_NORMALIZERS: dict[str, Callable[[], normalizers.Normalizer]] = {
    "nfc": normalizers.NFC,
    "nfd": normalizers.NFD,
    "nfkc": normalizers.NFKC,
    "nfkd": normalizers.NFKD,
}

# A word: letters, marks, digits, "_" and the two joiners (U+200C in Persian, U+200D in Hindi), with apostrophes and
# hyphens inside. Any other character is a token of its own. Regular expressions are Oniguruma's: (?m) lets a dot
# match a newline.
_LETTERS = r"[\p{L}\p{M}\p{N}_\x{200C}\x{200D}]+"
WORDS = Regex(rf"▁?{_LETTERS}(?:['’‐-]{_LETTERS})*|▁?[^▁]|▁")
CHARACTERS = Regex(r"(?m).")
# A symbol that is spelt like a special token would be looked up as that token: cut it in two.
SPELT_LIKE_SPECIAL = Regex(r"\A<(?=(?:pad|/?s|unk)>\z)")


def _spaces_as_marks(tokenizer: Tokenizer, normalizer: normalizers.Normalizer) -> None:
    """Cuts text into words and punctuation, reversibly: spaces become ▁, with one more before the text."""
    tokenizer.normalizer = normalizers.Sequence([normalizer, normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(WORDS, "isolated")
    # After Fuse there is one string, so Strip takes off the one space that was put before the text, and no other.
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])


def _build_word(
    normalizer: normalizers.Normalizer, vocab_size: int, min_frequency: int
) -> tuple[Tokenizer, trainers.Trainer]:
    tokenizer = Tokenizer(models.WordLevel({}, unk_token=UNK))
    _spaces_as_marks(tokenizer, normalizer)
    return tokenizer, _word_level_trainer(vocab_size, min_frequency)


def _build_char(
    normalizer: normalizers.Normalizer, vocab_size: int, min_frequency: int
) -> tuple[Tokenizer, trainers.Trainer]:
    tokenizer = Tokenizer(models.WordLevel({}, unk_token=UNK))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Split(CHARACTERS, "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer, _word_level_trainer(vocab_size, min_frequency)


def _build_symbols(
    normalizer: normalizers.Normalizer, vocab_size: int, min_frequency: int
) -> tuple[Tokenizer, trainers.Trainer]:
    tokenizer = Tokenizer(models.WordLevel({}, unk_token=UNK))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(SPELT_LIKE_SPECIAL, "isolated")]
    )
    # No decoder: tokens are joined with spaces.
    return tokenizer, _word_level_trainer(vocab_size, min_frequency)


def _word_level_trainer(vocab_size: int, min_frequency: int) -> trainers.Trainer:
    return trainers.WordLevelTrainer(
        vocab_size=vocab_size, min_frequency=min_frequency, special_tokens=list(SPECIAL_TOKENS), show_progress=False
    )


def _build_bpe(
    normalizer: normalizers.Normalizer, vocab_size: int, min_frequency: int
) -> tuple[Tokenizer, trainers.Trainer]:
    tokenizer = Tokenizer(models.BPE(unk_token=UNK, fuse_unk=True))
    _spaces_as_marks(tokenizer, normalizer)
    return tokenizer, trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=min_frequency, special_tokens=list(SPECIAL_TOKENS), show_progress=False
    )


def _build_unigram(
    normalizer: normalizers.Normalizer, vocab_size: int, min_frequency: int
) -> tuple[Tokenizer, trainers.Trainer]:
    tokenizer = Tokenizer(models.Unigram())
    _spaces_as_marks(tokenizer, normalizer)
    return tokenizer, trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), unk_token=UNK, show_progress=False
    )


def _make_reproducible(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Puts a trained unigram model into an order that is the same in every run, and within its size.

    The trainer goes through hash tables with random seeds: ties come in any order, the characters that no piece needed
    get scores 0.0001 apart in any order, and a very small vocabulary may come out a piece too large.
    """
    pieces = json.loads(tokenizer.to_str())["model"]["vocab"][len(SPECIAL_TOKENS) :]
    scores = {}
    group = previous = float("inf")
    for character, score in sorted((p for p in pieces if len(p[0]) == 1), key=lambda p: -p[1]):
        if previous - score > 2e-4:
            group = score
        scores[character], previous = round(group, 4), score
    longer = sorted(((round(score, 4), piece) for piece, score in pieces if len(piece) > 1), reverse=True)
    room = vocab_size - len(SPECIAL_TOKENS) - len(scores)
    scores.update((piece, score) for score, piece in longer[:room])
    in_order = sorted(scores.items(), key=lambda item: (-item[1], item[0]))
    tokenizer.model = models.Unigram([(token, 0.0) for token in SPECIAL_TOKENS] + in_order, SPECIAL_TOKENS.index(UNK))


def _build_byte_bpe(
    normalizer: normalizers.Normalizer, vocab_size: int, min_frequency: int
) -> tuple[Tokenizer, trainers.Trainer]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizer, normalizers.Prepend(" ")])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    return tokenizer, trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )


# From kind to builder: (normalizer, vocab_size, min_frequency) -> an untrained tokenizer and its trainer.
TOKENIZER_BUILDERS: dict[
    TokenizerKind, Callable[[normalizers.Normalizer, int, int], tuple[Tokenizer, trainers.Trainer]]
] = {
    "word": _build_word,
    "char": _build_char,
    "symbols": _build_symbols,
    "bpe": _build_bpe,
    "unigram": _build_unigram,
    "byte_bpe": _build_byte_bpe,
}


def train_tokenizer(
    corpus: Iterable[str],
    kind: TokenizerKind,
    *,
    vocab_size: int = 8000,
    min_frequency: int = 1,
    lowercase: bool = False,
    unicode_normalization: UnicodeNormalization = "none",
) -> PreTrainedTokenizerFast:
    """Trains a tokenizer of one kind (see the table at the top of the file).

    `<pad>`, `<s>`, `</s>`, `<unk>` have the ids 0 to 3, every encoding ends with `</s>` (an empty text is `[2]`),
    and none begins with `<s>`. `</s>` within a text is text (`split_special_tokens=True`), not the end of the
    sequence.

    Args:
        corpus: texts, usually one sentence or word each; read once and kept in memory.
        kind: what a token is.
        vocab_size: the greatest number of tokens, special tokens included; rarer ones are left out. A small corpus
            gives fewer.
        min_frequency: tokens (`bpe`, `byte_bpe`: merges) seen fewer times are left out; in `bpe` and `unigram`, so are
            characters seen fewer times.
        lowercase: lower-cases every text, also when encoding.
        unicode_normalization: Unicode normalisation form of every text, also when encoding, before
            lower-casing.

    Raises:
        TypeError: the corpus is one string, or something in it is not a string.
        ValueError: unknown `kind` or `unicode_normalization`, `min_frequency` below 1, an empty corpus, `vocab_size`
            too small for the characters (`byte_bpe`: bytes) it must hold, or `min_frequency` so high that no token
            is left.
    """
    if kind not in TOKENIZER_BUILDERS:
        raise ValueError(f"kind is {kind!r}; allowed: {', '.join(TOKENIZER_BUILDERS)}")
    if unicode_normalization != "none" and unicode_normalization not in UNICODE_NORMALIZERS:
        allowed = ", ".join(["none", *UNICODE_NORMALIZERS])
        raise ValueError(f"unicode_normalization is {unicode_normalization!r}; allowed: {allowed}")
    if min_frequency < 1:
        raise ValueError(f"min_frequency is {min_frequency}; it must be at least 1")

    steps = [] if unicode_normalization == "none" else [UNICODE_NORMALIZERS[unicode_normalization]()]
    if lowercase:
        steps.append(normalizers.Lowercase())
    normalizer = normalizers.Sequence(steps)

    texts = [normalizer.normalize_str(text) for text in _checked(corpus)]
    if not any(text.strip() for text in texts):
        raise ValueError(f"the corpus for kind={kind!r} is empty: {len(texts)} texts, none with a visible character")
    needed, what = len(SPECIAL_TOKENS) + 1, "a token beside the special ones"
    if kind in ("bpe", "unigram"):
        counts = Counter[str]()
        for text in texts:
            counts.update(text)
        rare = {ord(character): " " for character, count in counts.items() if count < min_frequency}
        texts = [text.translate(rare) for text in texts] if rare else texts
        alphabet = {"▁", *(character for character in counts if ord(character) not in rare and character != " ")}
        needed, what = len(SPECIAL_TOKENS) + len(alphabet), f"the corpus's {len(alphabet)} characters"
    elif kind == "byte_bpe":
        needed, what = len(SPECIAL_TOKENS) + 256, "the 256 bytes"
    if vocab_size < needed:
        raise ValueError(
            f"vocab_size is {vocab_size}; kind={kind!r} needs at least {needed}, "
            f"for {what} and the {len(SPECIAL_TOKENS)} special tokens"
        )

    tokenizer, trainer = TOKENIZER_BUILDERS[kind](normalizer, vocab_size, min_frequency)
    tokenizer.train_from_iterator(texts, trainer=trainer)
    if kind == "unigram":
        _make_reproducible(tokenizer, vocab_size)
    if tokenizer.get_vocab_size() == len(SPECIAL_TOKENS):
        raise ValueError(f"min_frequency is {min_frequency}: no token of kind {kind!r} is as frequent as that")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", pair=f"$A {EOS} $B:1 {EOS}:1", special_tokens=[(EOS, SPECIAL_TOKENS.index(EOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def _checked(corpus: Iterable[str]) -> Iterator[str]:
    if isinstance(corpus, str):
        raise TypeError("corpus is one string; it must be an iterable of strings, such as a list of sentences")
    for number, text in enumerate(corpus):
        if not isinstance(text, str):
            raise TypeError(f"text {number} of the corpus (the first is 0) is {text!r}; it must be a string")
        yield text


@dataclass
class TokenizerArguments:
    """How to train tokenizers; usable with `transformers.HfArgumentParser`."""

    source_tokenizer_kind: TokenizerKind = field(
        default="bpe",
        metadata={"help": "Source tokens: words, characters, symbols between white space (phones), or subwords."},
    )
    target_tokenizer_kind: TokenizerKind | None = field(
        default=None, metadata={"help": "Target tokens. Default: as source_tokenizer_kind."}
    )
    source_tokenizer_size: int = field(
        default=8000, metadata={"help": "Greatest size of the source (or shared) vocabulary, special tokens included."}
    )
    target_tokenizer_size: int | None = field(
        default=None, metadata={"help": "Greatest size of the target vocabulary. Default: as source_tokenizer_size."}
    )
    tokenizer_min_frequency: int = field(
        default=1, metadata={"help": "Tokens (in BPE: merges) seen fewer times in the training data are left out."}
    )
    tokenizer_lowercase: bool = field(default=False, metadata={"help": "Lower-case source and target."})
    tokenizer_normalization: UnicodeNormalization = field(
        default="none", metadata={"help": "Unicode normalisation form of source and target."}
    )
    shared_vocabulary: bool = field(
        default=False, metadata={"help": "One tokenizer for both sides, trained on source and target together."}
    )


def build_tokenizer(
    source_corpus: Iterable[str], target_corpus: Iterable[str], arguments: TokenizerArguments
) -> PreTrainedTokenizerFast | RnnSeq2SeqTokenizer:
    """Trains one shared tokenizer, or a pair of them.

    Raises:
        ValueError: `shared_vocabulary` with a `target_tokenizer_kind` or `target_tokenizer_size` of its own; and,
            naming the side, whatever `train_tokenizer` refuses.
    """

    def train(side: str, corpus: Iterable[str], kind: TokenizerKind, size: int) -> PreTrainedTokenizerFast:
        try:
            return train_tokenizer(
                corpus,
                kind,
                vocab_size=size,
                min_frequency=arguments.tokenizer_min_frequency,
                lowercase=arguments.tokenizer_lowercase,
                unicode_normalization=arguments.tokenizer_normalization,
            )
        except (TypeError, ValueError) as error:
            raise type(error)(f"{side} tokenizer: {error}") from error

    source_kind, source_size = arguments.source_tokenizer_kind, arguments.source_tokenizer_size
    target_kind, target_size = arguments.target_tokenizer_kind, arguments.target_tokenizer_size
    if arguments.shared_vocabulary:
        if target_kind not in (None, source_kind) or target_size not in (None, source_size):
            raise ValueError(
                f"shared_vocabulary: there is one tokenizer, so target_tokenizer_kind={target_kind!r} and "
                f"target_tokenizer_size={target_size!r} must be left out or be the source's: "
                f"{source_kind!r} and {source_size!r}"
            )
        return train("shared", _both(source_corpus, target_corpus), source_kind, source_size)
    return RnnSeq2SeqTokenizer(
        source_tokenizer=train("source", source_corpus, source_kind, source_size),
        target_tokenizer=train("target", target_corpus, target_kind or source_kind, target_size or source_size),
    )


def _both(source_corpus: Iterable[str], target_corpus: Iterable[str]) -> Iterator[str]:
    yield from _checked(source_corpus)
    yield from _checked(target_corpus)
