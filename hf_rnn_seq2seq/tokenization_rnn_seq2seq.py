"""A source and a target tokenizer with different vocabularies behind one Hugging Face tokenizer.

This file travels with a checkpoint to the Hub and imports nothing from the package.
"""

import copy
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, models
from transformers import BatchEncoding, PreTrainedTokenizerFast
from transformers.utils import PaddingStrategy, to_py_obj

SOURCE_TOKENIZER_FILE = "source_tokenizer.json"

# Settings that the pair and its two sides always have in common.
SHARED_SETTINGS = ("padding_side", "truncation_side", "model_max_length", "split_special_tokens")

Texts = str | Sequence[str] | Sequence[Sequence[str]]


class RnnSeq2SeqTokenizer(PreTrainedTokenizerFast):
    """Pairs a source and a target tokenizer under the usual interface of a Hugging Face tokenizer.

    One rule says which vocabulary a method uses: **text goes in through the source, everything else is the target.**

    - `tok(text)`, `tok.encode`, `tok.tokenize` encode with the source tokenizer; `text_target=` with the target
      tokenizer: `tok(text, text_target=...)` gives the target's ids as `labels`, `tok(text_target=...)` as
      `input_ids`.
    - `decode`, `batch_decode`, `convert_ids_to_tokens`, `convert_tokens_to_ids`, `get_vocab`, `vocab_size`, `len`
      and the special tokens are the target's: this is the vocabulary that the model generates (`config.vocab_size`).
    - Either side on its own is `tok.source_tokenizer` or `tok.target_tokenizer`, each a `PreTrainedTokenizerFast`:
      `tok.source_tokenizer.batch_decode(input_ids)` reads source ids back. Their sizes, added tokens included, are
      `source_vocab_size` and `target_vocab_size`.

    Special tokens: `pad_token`, and every other special token that both vocabularies contain, has the same id in
    both, or `ValueError` is raised, since `tok.pad_token_id` is one number.

    Adding tokens: `add_tokens` and `add_special_tokens` add to both vocabularies and return by how many the target's
    grew; `tok.source_tokenizer.add_tokens(...)` adds to the source alone. A new `sep_token`, say, is refused where
    its ids would differ; `extra_special_tokens` may differ.

    Settings (`padding_side`, `truncation_side`, `model_max_length`, `split_special_tokens`) are the pair's, and
    setting one sets it for both sides. `split_special_tokens` is True unless it is passed: `</s>` within a text is
    text, not the end of the sequence. (A control token to be written into texts is one for `add_tokens`, or pass
    `split_special_tokens=False`.)

    Copying (See et al. 2017): with `copies_source=True` a source also comes with `copy_ids`, for a model with
    `head_type="pointer_generator"` and `vocab_size=len(tok)`. Source tokens get the target id of the same text; those
    which the target vocabulary lacks get ids of their own for this one source, `len(tok)` for the first such word,
    `len(tok) + 1` for the next different one (counted from the end with `truncation_side="left"`, so that cutting a
    source changes none). The same ids stand for these words in `labels`; only what is in neither the vocabulary nor
    the source is unknown there. `batch_decode(sequences, source_texts=texts)` puts the words back. For vocabularies of
    whole words (a `WordLevel` model); the two sides must write a word alike. A single vocabulary for both sides goes
    in twice, with `source_vocab_size=None` in the model's configuration.

    Args:
        source_tokenizer, target_tokenizer: any "fast" tokenizers (those with a `backend_tokenizer`). They are copied:
            changing the originals later changes nothing here. Of a subclass its `tokenizers` backend and special
            tokens are kept; both sides return `input_ids` and `attention_mask` only.
        tokenizer_file, source_tokenizer_file, source_special_tokens: what `from_pretrained` passes instead of the
            first two: the target's and the source's `tokenizer.json`, and the source's special tokens by name.
        copies_source: give `copy_ids`, and decode them; may also be set later, and is saved.
        kwargs: as for `PreTrainedTokenizerFast`; they win over what the two tokenizers say.

    Raises:
        TypeError: a side is missing or is no fast tokenizer.
        ValueError: special tokens or settings of the two sides disagree, or a saved folder lacks the source's file.
    """

    vocab_files_names = {"tokenizer_file": "tokenizer.json", "source_tokenizer_file": SOURCE_TOKENIZER_FILE}  # noqa: RUF012

    def __init__(
        self,
        source_tokenizer: PreTrainedTokenizerFast | None = None,
        target_tokenizer: PreTrainedTokenizerFast | None = None,
        *,
        tokenizer_file: str | None = None,
        source_tokenizer_file: str | None = None,
        source_special_tokens: dict[str, Any] | None = None,
        copies_source: bool = False,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("split_special_tokens", True)
        if source_tokenizer is not None or target_tokenizer is not None:
            for side, tokenizer in (("source_tokenizer", source_tokenizer), ("target_tokenizer", target_tokenizer)):
                if not isinstance(tokenizer, PreTrainedTokenizerFast):
                    raise TypeError(f"{side} must be a PreTrainedTokenizerFast, not {type(tokenizer).__name__}")
            assert source_tokenizer is not None
            assert target_tokenizer is not None
            for name in ("padding_side", "truncation_side", "model_max_length"):
                values = getattr(source_tokenizer, name), getattr(target_tokenizer, name)
                if name not in kwargs and values[0] != values[1]:
                    raise ValueError(
                        f"{name} is {values[0]!r} in source_tokenizer and {values[1]!r} in target_tokenizer; "
                        f"pass {name}=... to choose"
                    )
                kwargs.setdefault(name, values[1])
            source_backend: dict[str, Any] = {"tokenizer_object": source_tokenizer.backend_tokenizer}
            source_special_tokens = _special_tokens(source_tokenizer)
            kwargs = {
                "tokenizer_object": target_tokenizer.backend_tokenizer,
                **_special_tokens(target_tokenizer),
                **kwargs,
            }
        else:
            if tokenizer_file is None and source_tokenizer_file is None:
                raise TypeError(
                    "RnnSeq2SeqTokenizer needs source_tokenizer= and target_tokenizer=; "
                    "a saved one is loaded with from_pretrained"
                )
            for file_name, path in (
                ("tokenizer.json", tokenizer_file),
                (SOURCE_TOKENIZER_FILE, source_tokenizer_file),
            ):
                if path is None:
                    raise ValueError(
                        f"{kwargs.get('name_or_path', 'the folder')} has no {file_name}: not a saved pair"
                    )
            source_backend = {"tokenizer_file": source_tokenizer_file}
            kwargs["tokenizer_file"] = tokenizer_file
        # What is left in kwargs is saved in tokenizer_config.json, these two by way of attributes of the same names.
        super().__init__(source_special_tokens=source_special_tokens, copies_source=copies_source, **kwargs)
        self.copies_source = copies_source

        self._source_tokenizer = PreTrainedTokenizerFast(**source_backend, **(source_special_tokens or {}))
        target = PreTrainedTokenizerFast(tokenizer_object=self._tokenizer, **_special_tokens(self))
        target._tokenizer = self._tokenizer  # one backend for the pair and its target side, not a copy
        self._target_tokenizer = target
        self._share_settings()

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Keeps the file names as they are: the base class would rebuild a tokenizer from the bare vocabulary."""
        return kwargs

    @property
    def source_tokenizer(self) -> PreTrainedTokenizerFast:
        """The source side on its own; what is added to it is added to the pair's source vocabulary."""
        return self._source_tokenizer

    @property
    def target_tokenizer(self) -> PreTrainedTokenizerFast:
        """The target side on its own; what is added to it is added to the pair's target vocabulary."""
        return self._target_tokenizer

    @property
    def source_vocab_size(self) -> int:
        """Number of source ids, added tokens included: the model's `config.source_vocab_size`."""
        return len(self._source_tokenizer)

    @property
    def target_vocab_size(self) -> int:
        """Number of target ids, added tokens included: the model's `config.vocab_size`; the same as `len(tok)`."""
        return len(self._target_tokenizer)

    @property
    def source_special_tokens(self) -> dict[str, Any]:
        """The source's special tokens by name, as `save_pretrained` writes them."""
        return _special_tokens(self._source_tokenizer)

    def __call__(
        self,
        text: Texts | None = None,
        text_pair: Texts | None = None,
        text_target: Texts | None = None,
        text_pair_target: Texts | None = None,
        *,
        max_target_length: int | None = None,
        **kwargs: Any,
    ) -> BatchEncoding:
        """Encodes source texts, target texts, or both, each a string or a batch (a list of strings).

        Options are those of every Hugging Face tokenizer and hold for both sides, but for `max_target_length`, which
        is the target's `max_length` (the default: `max_length`).

        Returns:
            `input_ids` and `attention_mask` of `text`, with the ids of `text_target` as `labels`; with no `text`,
            those of `text_target`. With `padding`, labels are padded with `pad_token_id` (`DataCollatorForSeq2Seq`
            pads with -100). With `copies_source`, also `copy_ids` of `text`, as long as `input_ids`.

        Raises:
            ValueError: `copies_source` with what it has no ids for: a `text_pair`, `return_overflowing_tokens`, or a
            target vocabulary without an unknown token.
        """
        # No mode is switched, so an error in either half leaves nothing behind.
        target = None
        if text_target is not None:
            target_kwargs = kwargs if max_target_length is None else {**kwargs, "max_length": max_target_length}
            target = self._target_tokenizer(text_target, text_pair_target, **target_kwargs)
            if text is None:
                return target
        if self.copies_source and (text_pair is not None or kwargs.get("return_overflowing_tokens")):
            raise ValueError("copies_source: one source has one row, no text_pair or return_overflowing_tokens")
        encoding = super().__call__(text, text_pair, **kwargs)
        if target is not None:
            encoding["labels"] = target["input_ids"]
        if self.copies_source:
            assert text is not None  # the call above refuses it
            split = kwargs.get("is_split_into_words", False)
            copies = self._copies(text, text_target, target, split)
            tensors = kwargs.get("return_tensors")
            for name, rows in copies.items():
                encoding[name] = rows if tensors is not None or _is_batch(text, split) else rows[0]
            encoding.convert_to_tensors(tensors)
        return encoding

    def _copies(
        self, text: Texts, text_target: Texts | None, target: BatchEncoding | None, split: bool
    ) -> dict[str, list[list[int]]]:
        """`copy_ids` of the texts that were encoded last, and their `labels`; `split` if they came as words."""
        sources = _written_tokens(self._source_tokenizer, text, split)
        words = [self._words_outside(tokens) for tokens in sources]
        find, unknown = self.backend_tokenizer.token_to_id, self._unknown_id()
        copies = {
            "copy_ids": [
                [outside.get(token, unknown) if (found := find(token)) is None else found for token in tokens]
                for outside, tokens in zip(words, sources, strict=True)
            ]
        }
        if target is not None and text_target is not None:
            targets = _written_tokens(self._target_tokenizer, text_target, split)
            if len(targets) != len(sources):
                raise ValueError(f"text has {len(sources)} rows and text_target {len(targets)}")
            copies["labels"] = [
                [outside.get(token, token_id) for token, token_id in zip(tokens, encoding.ids, strict=True)]
                for outside, tokens, encoding in zip(words, targets, target.encodings or [], strict=True)
            ]
        return copies

    def _words_outside(self, tokens: list[str]) -> dict[str, int]:
        """The ids of one source's words that the target vocabulary lacks, in order."""
        special = {token.content for token in self._source_tokenizer.added_tokens_decoder.values() if token.special}
        in_order = tokens if self.truncation_side == "right" else tokens[::-1]
        # A dict for its order: every word once, where it stands first.
        words = dict.fromkeys(token for token in in_order if token not in special)
        outside = [token for token in words if self.backend_tokenizer.token_to_id(token) is None]
        return {token: len(self) + place for place, token in enumerate(outside)}

    def _unknown_id(self) -> int:
        if self.unk_token_id is None:
            raise ValueError("copies_source needs a target vocabulary with an unk_token")
        return self.unk_token_id

    def decode(
        self,
        token_ids: int | list[int] | list[list[int]] | np.ndarray | torch.Tensor,
        skip_special_tokens: bool = False,
        source_text: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> str | list[str]:
        """As everywhere in transformers, with the target vocabulary.

        Args:
            source_text: with `copies_source`, the source of `token_ids` as it was encoded (a string, or its words).
                Ids of words outside the vocabulary then become these words; without it, the unknown token.
        """
        if source_text is not None:
            (kwargs["copied"],) = self._copied_words([source_text])
        return super().decode(token_ids, skip_special_tokens, **kwargs)

    def batch_decode(
        self,
        sequences: list[int] | list[list[int]] | np.ndarray | torch.Tensor,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        source_texts: Sequence[str] | Sequence[Sequence[str]] | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """`decode` of each sequence.

        Args:
            source_texts: their sources, one for every sequence, or for every n sequences in a row (as
                `num_return_sequences` gives them).
        """
        kwargs["clean_up_tokenization_spaces"] = clean_up_tokenization_spaces
        if source_texts is None:
            return super().batch_decode(sequences, skip_special_tokens, **kwargs)
        rows = to_py_obj(sequences)
        count = len(source_texts)
        if len(rows) % max(count, 1) or (rows and not count):
            raise ValueError(f"{len(rows)} sequences can't be shared out among {count} source_texts")
        repeats = len(rows) // max(count, 1)
        return [
            self._decode(row, skip_special_tokens, copied=copied, **kwargs)
            for index, copied in enumerate(self._copied_words(source_texts))
            for row in rows[index * repeats : (index + 1) * repeats]
        ]

    def _copied_words(self, texts: Sequence[str] | Sequence[Sequence[str]]) -> list[list[str]]:
        """The words outside the target vocabulary of every source, in the order of their ids."""
        if not texts:
            return []
        split = not isinstance(texts[0], str)
        self._source_tokenizer(list(texts), is_split_into_words=split, verbose=False)  # takes off the last truncation
        return [list(self._words_outside(tokens)) for tokens in _written_tokens(self._source_tokenizer, texts, split)]

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        copied: Sequence[str] = (),
        **kwargs: Any,
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        size = len(self)
        if self.unk_token_id is not None:
            ids = [self.unk_token_id if token_id >= size + len(copied) else token_id for token_id in ids]
        if not copied or max(ids, default=0) < size:
            return super()._decode(ids, skip_special_tokens, clean_up_tokenization_spaces, **kwargs)
        added = self.backend_tokenizer.get_added_tokens_decoder()
        tokens = [
            copied[token_id - size] if token_id >= size else self.backend_tokenizer.id_to_token(token_id)
            for token_id in ids
            if not (skip_special_tokens and token_id in added and added[token_id].special)
        ]
        text = self.convert_tokens_to_string([token for token in tokens if token is not None])
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        return self.clean_up_tokenization(text) if clean_up_tokenization_spaces else text

    def _pad(
        self,
        encoded_inputs: dict[str, list[int]] | BatchEncoding,
        max_length: int | None = None,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
    ) -> dict:
        padded = super()._pad(
            encoded_inputs, max_length, padding_strategy, pad_to_multiple_of, padding_side, return_attention_mask
        )
        if "copy_ids" in padded:
            missing = [self.pad_token_id] * (len(padded["input_ids"]) - len(padded["copy_ids"]))
            left = (padding_side or self.padding_side) == "left"
            padded["copy_ids"] = missing + padded["copy_ids"] if left else padded["copy_ids"] + missing
        return padded

    def _encode_plus(self, *args: Any, **kwargs: Any) -> BatchEncoding:
        # Every way of encoding a text (call, encode, tokenize) comes through here.
        return self._source_tokenizer._encode_plus(*args, **kwargs)

    def __setattr__(self, key: str, value: Any) -> None:
        name = key.removesuffix("_id")
        special = name in self.SPECIAL_TOKENS_ATTRIBUTES
        if not (special or key in SHARED_SETTINGS) or "_target_tokenizer" not in self.__dict__:
            super().__setattr__(key, value)
            return
        previous = self._special_tokens_map[name] if special else getattr(self, key)
        super().__setattr__(key, value)
        try:
            self._share_settings()
        except ValueError:
            super().__setattr__(name, previous)
            raise

    def _share_settings(self) -> None:
        """Gives the pair's settings and special tokens to both sides, after a check that ids agree."""
        source, target = self._source_tokenizer, self._target_tokenizer
        for name, token in self.special_tokens_map.items():
            source_id = source.backend_tokenizer.token_to_id(token)
            target_id = target.backend_tokenizer.token_to_id(token)
            if source_id != target_id and (source_id is not None or name == "pad_token"):
                raise ValueError(
                    f"{name} {token!r} must have the same id in both vocabularies, "
                    f"but it is {source_id} in the source's and {target_id} in the target's (None: not there)"
                )
        if self.pad_token is None:
            raise ValueError("pad_token must be set in target_tokenizer, and be in both vocabularies with the same id")
        for name in SHARED_SETTINGS:
            setattr(source, name, getattr(self, name))
            setattr(target, name, getattr(self, name))
        for name, value in self._special_tokens_map.items():
            target._special_tokens_map[name] = value
            if value is not None and source.backend_tokenizer.token_to_id(str(value)) is not None:
                source._special_tokens_map[name] = value
        target._extra_special_tokens = list(self._extra_special_tokens)
        for token in self.extra_special_tokens:
            if token not in source.extra_special_tokens and source.backend_tokenizer.token_to_id(token) is not None:
                source._extra_special_tokens.append(token)

    def _add_tokens(self, new_tokens: list[str | AddedToken], special_tokens: bool = False) -> int:  # type: ignore[override]
        # (Ignored: the base class says "a list of one or a list of the other".)
        size = len(self)
        super()._add_tokens(new_tokens, special_tokens=special_tokens)
        if "_target_tokenizer" in self.__dict__:  # not so while the base class's __init__ runs
            self._source_tokenizer._add_tokens(new_tokens, special_tokens=special_tokens)
            self._share_settings()
        return len(self) - size  # the backend also counts tokens it had already

    def add_special_tokens(
        self,
        special_tokens_dict: dict[str, str | AddedToken | Sequence[str | AddedToken]],
        replace_extra_special_tokens: bool = True,
    ) -> int:
        """Adds special tokens to both vocabularies; returns by how many the target's grew.

        Raises:
            ValueError: a named token (`sep_token`, ...) would have different ids on the two sides; nothing is
            changed then.
        """
        trial = copy.deepcopy(self)  # tokens can't be taken out of a backend again
        PreTrainedTokenizerFast.add_special_tokens(trial, special_tokens_dict, replace_extra_special_tokens)
        return super().add_special_tokens(special_tokens_dict, replace_extra_special_tokens)

    def _save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        file_names: tuple[str, ...],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
    ) -> tuple[str, ...]:
        # Truncation and padding of the last call are kept in the backends, and would be saved as if they were
        # settings.
        for side in (self._source_tokenizer, self._target_tokenizer):
            side.backend_tokenizer.no_truncation()
            side.backend_tokenizer.no_padding()
        file_names = super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        source_file = os.path.join(save_directory, prefix + SOURCE_TOKENIZER_FILE)
        self._source_tokenizer.backend_tokenizer.save(source_file)
        return (*file_names, source_file)


def _special_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Special tokens by name (`pad_token`, ..., and the list `extra_special_tokens`), as a constructor takes them."""
    return {**tokenizer.special_tokens_map, "extra_special_tokens": list(tokenizer.extra_special_tokens)}


def _is_batch(texts: Texts, split: bool) -> bool:
    """Several texts, or one? `split` if a text is a list of words."""
    return not isinstance(texts, str) and (not split or (len(texts) > 0 and not isinstance(texts[0], str)))


def _written_tokens(side: PreTrainedTokenizerFast, texts: Texts, split: bool) -> list[list[str]]:
    """The tokens of the texts that a side has just encoded, with unknown words as they are written.

    "As they are written" is as the vocabulary would have them, lower-cased and with marks for spaces, say. So they
    are what the side's own steps make of the texts when no word is known: a Unigram model of one piece that no text
    contains gives back any word whole. Tokens of models for pieces of words stay what they are.
    """
    batch = list(texts) if _is_batch(texts, split) else [texts]
    encoder = side.backend_tokenizer
    if isinstance(encoder.model, models.WordLevel):
        known, encoder = encoder, Tokenizer(models.Unigram([("\U0010ffff", 0.0)], unk_id=0))
        for step in ("normalizer", "pre_tokenizer", "post_processor"):
            if getattr(known, step) is not None:
                setattr(encoder, step, getattr(known, step))
        encoder.add_tokens(list(known.get_added_tokens_decoder().values()))
        encoder.encode_special_tokens = known.encode_special_tokens
        if known.truncation is not None:
            encoder.enable_truncation(**known.truncation)
        if known.padding is not None:
            encoder.enable_padding(**known.padding)
    return [encoding.tokens for encoding in encoder.encode_batch(batch, is_pretokenized=split)]
