"""
Unknown words of the output replaced by source words: for vocabularies of whole words.

Each `<unk>` that a model with attention has generated is replaced by the source word that it attended to most, or by
that word's translation in a dictionary (Luong et al. 2015, "Addressing the Rare Word Problem in Neural Machine
Translation", section 3.3; by attention: Jean et al. 2015, section 3.3).

    >>> inputs, words = tokenize_with_words(tokenizer, texts, padding=True, return_tensors="pt")
    >>> outputs = model.generate(**inputs, num_beams=5, return_dict_in_generate=True, output_attentions=True)
    >>> replace_unknown_words(model, outputs, tokenizer, words, dictionary)
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from transformers import BatchEncoding, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.generation import GenerateBeamEncoderDecoderOutput, GenerateEncoderDecoderOutput

from .generation_rnn_seq2seq import RnnSeq2SeqGenerationMixin

PLACE = "\ufdd0"  # stands for an unknown word while a text is decoded; Unicode keeps it out of texts


class SourceWord(NamedTuple):
    """A word as it stands in the source text, and whether white space (or nothing) comes before it."""

    text: str
    after_space: bool


def tokenize_with_words(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], **options: Any
) -> tuple[BatchEncoding, list[list[SourceWord | None]]]:
    """
    Encodes source texts and says which word stands behind each position.

    Args:
        tokenizer: any "fast" tokenizer; of a `RnnSeq2SeqTokenizer` the source side is used.
        texts: the sources, B of them.
        options: as for calling the tokenizer (`padding`, `truncation`, `return_tensors`, ...).

    Returns:
        What `tokenizer(texts, **options)` returns, and for each text its S words, one a position: the whole word in
        its own spelling where a token is a piece of one; `None` for special tokens and padding.
    """
    encoding = tokenizer(list(texts), **options)
    if encoding.encodings is None:
        raise ValueError(f"Words need the offsets of a fast tokenizer, which {type(tokenizer).__name__} is not.")
    special_ids = set(getattr(tokenizer, "source_tokenizer", tokenizer).all_special_ids) - {tokenizer.unk_token_id}
    rows = []
    for text, encoded in zip(texts, encoding.encodings, strict=True):
        spans: dict[int, tuple[int, int]] = {}
        for word, (start, end) in zip(encoded.word_ids, encoded.offsets, strict=True):
            if word is not None:
                first, last = spans.get(word, (start, end))
                spans[word] = min(first, start), max(last, end)
        found = {word: _source_word(text, *span) for word, span in spans.items()}
        rows.append(
            [
                None if word is None or token in special_ids else found[word]
                for token, word in zip(encoded.ids, encoded.word_ids, strict=True)
            ]
        )
    return encoding, rows


def _source_word(text: str, start: int, end: int) -> SourceWord | None:
    """The word in text[start:end], without white space around it."""
    word = text[start:end].strip()
    start += len(text[start:end]) - len(text[start:end].lstrip())
    return SourceWord(word, start == 0 or text[start - 1].isspace()) if word else None


def replace_unknown_words(
    model: RnnSeq2SeqGenerationMixin,
    outputs: GenerateEncoderDecoderOutput | GenerateBeamEncoderDecoderOutput,
    tokenizer: PreTrainedTokenizerFast,
    words: Sequence[Sequence[SourceWord | None]],
    dictionary: Mapping[str, str] | None = None,
) -> list[str]:
    """
    The generated texts, as `tokenizer.batch_decode(sequences, skip_special_tokens=True)` gives them, but with a source
    word, or its translation, for each unknown word. Where the tokens carry the spaces between words, the source tells
    whether there is one before a replaced word.

    Args:
        model: the model or ensemble that generated; it must attend to every source position.
        outputs: of `model.generate(**inputs, return_dict_in_generate=True, output_attentions=True)`, with any search
            and number of outputs, N for the B sources.
        tokenizer: decodes the sequences.
        words: from [`tokenize_with_words`], for the same inputs.
        dictionary: translations of source words, in the spelling of the source text.

    Returns:
        N texts. An unknown word for which the source has no word at all stays what it is (`<unk>`).

    Raises:
        ValueError: the outputs have no attention weights, or copied words in them; `words` is of another shape.
    """
    attentions = model.generated_attentions(outputs)
    if tokenizer.unk_token is None:
        raise ValueError(f"{type(tokenizer).__name__} has no `unk_token` that could be replaced.")
    if not words or len(outputs.sequences) % len(words):
        raise ValueError(f"`outputs` has {len(outputs.sequences)} sequences, no multiple of the {len(words)} sources.")
    if int(outputs.sequences.max()) >= len(tokenizer):
        raise ValueError(
            "`outputs` has words copied by the model itself: `tokenizer.batch_decode(sequences, source_texts=texts)` "
            "gives them back."
        )
    positions = attentions[0].size(-1)
    for row in words:
        if len(row) != positions:
            raise ValueError(
                f"`words` has a row of {len(row)} positions, but the model attends to {positions}. Give the words of "
                "just these inputs; an encoder that shortens the source can't tell which word it attends to."
            )
    repeats = len(outputs.sequences) // len(words)
    beam_indices = getattr(outputs, "beam_indices", None)
    assert outputs.cross_attentions is not None
    steps = len(outputs.cross_attentions) if beam_indices is None else beam_indices.size(1)
    prompt = outputs.sequences.size(1) - steps
    special_ids = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    spaced = _tokens_carry_spaces(tokenizer)

    texts = []
    for index, (sequence, weights) in enumerate(zip(outputs.sequences.tolist(), attentions, strict=True)):
        source = words[index // repeats]
        copyable = torch.tensor([word is not None for word in source], device=weights.device)
        best = weights.masked_fill(~copyable, -1).argmax(-1).tolist()  # [T]
        kept = [(place, token) for place, token in enumerate(sequence, -prompt) if token not in special_ids]
        kept = [(place, token) for place, token in kept if place >= 0 or token != tokenizer.unk_token_id]
        tokens = tokenizer.convert_ids_to_tokens([token for _, token in kept])
        is_unknown = [token == tokenizer.unk_token_id for _, token in kept]
        marked = [PLACE if unknown else token for token, unknown in zip(tokens, is_unknown, strict=True)]
        text, *parts = tokenizer.convert_tokens_to_string(marked).split(PLACE)
        places = [place for (place, _), unknown in zip(kept, is_unknown, strict=True) if unknown]
        for place, part in zip(places, parts, strict=True):
            word = source[best[place]] or SourceWord(tokenizer.unk_token, True)
            if spaced and word.after_space and text and not text[-1].isspace():
                text += " "
            text += (dictionary or {}).get(word.text, word.text) + part
        texts.append(text)
    return texts


def _tokens_carry_spaces(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Does a word's token bring the space before it, or is the space, if any, a token of its own (characters)?"""
    backend, text = tokenizer.backend_tokenizer, "a b"
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    pieces = [text] if backend.pre_tokenizer is None else [p for p, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    return " " in tokenizer.convert_tokens_to_string(["a", pieces[-1]])


def read_dictionary(path: str | os.PathLike[str]) -> dict[str, str]:
    """
    Reads a dictionary of one pair a line, in UTF-8: source word, tab, translation, which may be several words; or two
    words with spaces between. Blank lines are passed over.

    Raises:
        ValueError: a line is no such pair, or gives a word a second translation; names the file and the line.
        OSError: the file can't be read.
    """
    dictionary: dict[str, str] = {}
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip("\r\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}: not UTF-8 ({error.reason})") from error
            pair = [part.strip() for part in line.split("\t")] if "\t" in line else line.split()
            if not "".join(pair):
                continue
            if len(pair) != 2 or not all(pair):
                raise ValueError(
                    f"{path}, line {number}: {line!r} must be a source word, a tab and its translation, or two words"
                )
            source, target = pair
            if dictionary.setdefault(source, target) != target:
                raise ValueError(
                    f"{path}, line {number}: {source!r} is translated by {target!r}, and before by "
                    f"{dictionary[source]!r}; give one translation"
                )
    return dictionary


__all__ = ["SourceWord", "read_dictionary", "replace_unknown_words", "tokenize_with_words"]
