"""
Runs an exported model with numpy, onnxruntime and tokenizers alone: no torch, no transformers.

`export_onnx` puts this file into the model's folder; it imports nothing of its package and can be copied anywhere.

    python onnx_runner.py . --num_beams 4 < words.txt

    from onnx_runner import RnnSeq2SeqRunner
    runner = RnnSeq2SeqRunner("outputs/mine_onnx")
    for best, *others in runner(["recurrent", "attention"], num_beams=4, num_return_sequences=2):
        print(best.text, best.score, best.attention.shape)

Greedy and beam search give the ids that transformers' generate() gives, by the same rules.

Shapes: B sources, N beams a source, K candidates a source, S source positions, S' what the decoder attends to, T
target tokens, V vocabulary.
"""

import argparse
import itertools
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import onnxruntime
from tokenizers import Tokenizer, models

Precision = Literal["float32", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

ENCODER, DECODER = "encoder_model", "decoder_model"
# The decoder's state: `past_x` goes into a step and `present_x` comes out.
PAST, PRESENT = "past_", "present_"

NEVER = np.float32(-1e9)  # what transformers adds to the score of what must not be chosen

Array = np.ndarray
Tensors = dict[str, Array]


def file_name(graph: str, precision: Precision) -> str:
    """`graph` is ENCODER or DECODER."""
    return f"{graph}.onnx" if precision == "float32" else f"{graph}_{precision}.onnx"


class StepResult(NamedTuple):
    logits: Array  # [B, V]; of a model that copies [B, V + S]
    attention: Array  # [B, heads, S']; no heads without attention
    state: Tensors


class OnnxGraphs:
    """
    Both graphs of an exported model. Nothing is remembered between calls.

    Args:
        folder: what `export_onnx` wrote.
        precision: which of the files.
        providers: ONNX Runtime's execution providers, best first.
        threads: for one operator; 0 leaves it to ONNX Runtime.

    Raises:
        FileNotFoundError: the folder has no such files.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        precision: Precision = "float32",
        providers: Sequence[str] = ("CPUExecutionProvider",),
        threads: int = 0,
    ):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Two sessions and torch share the processor: threads that wait in vain for more work would hold the others up.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        sessions = []
        for graph in (ENCODER, DECODER):
            path = Path(folder) / file_name(graph, precision)
            if not path.is_file():
                raise FileNotFoundError(f"{folder} has no {path.name}: export the model with {precision!r}")
            sessions.append(onnxruntime.InferenceSession(str(path), options, providers=list(providers)))
        self.encoder, self.decoder = sessions
        self.encoder_outputs = [output.name for output in self.encoder.get_outputs()]
        self.step_inputs = [one.name for one in self.decoder.get_inputs()]
        self.step_outputs = [output.name for output in self.decoder.get_outputs()]
        self.new_state = [PAST + name.removeprefix(PRESENT) for name in self.step_outputs[2:]]
        self.copies = "copy_ids" in self.step_inputs

    def encode(self, input_ids: Array, attention_mask: Array) -> Tensors:
        """Ids and mask [B, S] -> what the decoder attends to, and its first state (names that begin with PAST)."""
        feeds = {"input_ids": input_ids.astype(np.int64), "attention_mask": attention_mask.astype(np.int64)}
        return dict(zip(self.encoder_outputs, self.encoder.run(None, feeds), strict=True))

    def step(self, tokens: Array, tensors: Tensors) -> StepResult:
        """Tokens [B], all that `encode` gave and `copy_ids` [B, S] of a model that copies -> one step's results."""
        feeds = {name: tensors[name] for name in self.step_inputs if name != "input_ids"}
        logits, attention, *state = self.decoder.run(None, {"input_ids": tokens.astype(np.int64)[:, None], **feeds})
        return StepResult(logits, attention, dict(zip(self.new_state, state, strict=True)))


@dataclass(frozen=True)
class SearchOptions:
    """
    transformers' options of the same names, as far as this runner knows them.

    Args:
        num_beams: 1 is greedy search.
        num_return_sequences: at most `num_beams`.
        max_length: of the output, start token included.
        max_new_tokens: the same without the start token; goes before `max_length`. With neither, 20.
        length_penalty: a finished hypothesis is scored by log P / (number of tokens) ** length_penalty.
        early_stopping: True, False or "never".
    """

    num_beams: int = 1
    num_return_sequences: int = 1
    max_length: int | None = None
    max_new_tokens: int | None = None
    length_penalty: float = 1.0
    early_stopping: bool | str = False

    def __post_init__(self) -> None:
        for name in ("num_beams", "num_return_sequences", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}")
        if self.num_return_sequences > self.num_beams:
            raise ValueError(
                f"`num_return_sequences` ({self.num_return_sequences}) must be at most `num_beams` ({self.num_beams})"
            )
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(f"`early_stopping` must be True, False or 'never', got {self.early_stopping!r}")
        if self.max_new_tokens is None and self.max_length is not None and self.max_length < 2:
            raise ValueError(f"`max_length` must be at least 2, the start token and one more, got {self.max_length}")

    @property
    def new_tokens(self) -> int:
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        return 20 if self.max_length is None else self.max_length - 1


OPTIONS = tuple(field.name for field in fields(SearchOptions))

# What else may stand in generation_config.json without changing what comes out here.
HARMLESS = (
    "_from_model_config", "bos_token_id", "cache_implementation", "decoder_start_token_id", "eos_token_id",
    "output_attentions", "output_hidden_states", "output_logits", "output_scores", "pad_token_id",
    "return_dict_in_generate", "temperature", "top_k", "top_p", "transformers_version", "use_cache",
)  # fmt: skip


class Hypothesis(NamedTuple):
    ids: list[int]  # generated ones, T of them, end of sequence included, start token left out
    score: float  # log-probability over T ** length_penalty
    attention: Array  # mean over heads, [T, S'], with zeros at padding; [T, 0] without attention
    text: str = ""


class Batch(NamedTuple):
    input_ids: Array  # [B, S]
    attention_mask: Array  # [B, S]
    copy_ids: Array | None  # [B, S]
    words: list[list[str]]  # of every source those that only copying can give, in the order of their ids


class Texts:
    """
    From texts to ids and back, as RnnSeq2SeqTokenizer or a single tokenizer does it in transformers.

    Args:
        folder: with tokenizer.json, tokenizer_config.json and, of a pair, source_tokenizer.json.
        pad_id: padding's id.
    """

    def __init__(self, folder: Path, pad_id: int):
        settings = read_json(folder / "tokenizer_config.json")
        pair = folder / "source_tokenizer.json"
        self.target = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.source = Tokenizer.from_file(str(pair)) if pair.is_file() else self.target
        self.source.encode_special_tokens = bool(settings.get("split_special_tokens", pair.is_file()))
        self.size = self.target.get_vocab_size()
        self.pad_id = pad_id
        self.pads_left = settings.get("padding_side") == "left"
        self.counts_from_end = settings.get("truncation_side") == "left"
        self.copies_source = bool(settings.get("copies_source"))
        self.unknown_id = self.target.token_to_id(str(settings.get("unk_token"))) or 0
        self.speller = self.source
        if isinstance(self.source.model, models.WordLevel):
            # Unknown words as they are written: no text contains the one piece that this model knows.
            self.speller = Tokenizer(models.Unigram([("\U0010ffff", 0.0)], unk_id=0))
            for step in ("normalizer", "pre_tokenizer", "post_processor"):
                if getattr(self.source, step) is not None:
                    setattr(self.speller, step, getattr(self.source, step))
            self.speller.add_tokens(list(self.source.get_added_tokens_decoder().values()))
            self.speller.encode_special_tokens = self.source.encode_special_tokens

    def encode(self, texts: Sequence[str]) -> Batch:
        rows = [encoding.ids for encoding in self.source.encode_batch(list(texts))]
        mask = self._pad([[1] * len(row) for row in rows], 0)
        if not self.copies_source:
            return Batch(self._pad(rows, self.pad_id), mask, None, [[]] * len(rows))
        tokens = [encoding.tokens for encoding in self.speller.encode_batch(list(texts))]
        words = [self._words_outside(row) for row in tokens]
        copy_ids = [
            [self._copy_id(token, outside) for token in row] for row, outside in zip(tokens, words, strict=True)
        ]
        return Batch(self._pad(rows, self.pad_id), mask, self._pad(copy_ids, self.pad_id), words)

    def _pad(self, rows: list[list[int]], value: int) -> Array:
        width = max(1, *(len(row) for row in rows))
        padded = np.full((len(rows), width), value, np.int64)
        for index, row in enumerate(rows):
            padded[index, width - len(row) if self.pads_left else 0 :][: len(row)] = row
        return padded

    def _words_outside(self, tokens: list[str]) -> list[str]:
        special = {token.content for token in self.source.get_added_tokens_decoder().values() if token.special}
        in_order = tokens[::-1] if self.counts_from_end else tokens
        once = dict.fromkeys(token for token in in_order if token not in special)
        return [token for token in once if self.target.token_to_id(token) is None]

    def _copy_id(self, token: str, words: list[str]) -> int:
        known = self.target.token_to_id(token)
        if known is not None:
            return known
        return self.size + words.index(token) if token in words else self.unknown_id

    def decode(self, ids: list[int], words: list[str]) -> str:
        """`words` are the source's, see [`Batch`]."""
        if not words or max(ids, default=0) < self.size:
            return self.target.decode(ids, skip_special_tokens=True)
        added = self.target.get_added_tokens_decoder()
        tokens = [
            words[one - self.size] if one >= self.size else self.target.id_to_token(one)
            for one in ids
            if not (one in added and added[one].special)
        ]
        known = [token for token in tokens if token is not None]
        return " ".join(known) if self.target.decoder is None else self.target.decoder.decode(known)


class RnnSeq2SeqRunner:
    """
    An exported model with its tokenizers: texts in, texts out.

    Args:
        folder, precision, providers, threads: see [`OnnxGraphs`].

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: generation_config.json asks for something that this runner does not know.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        precision: Precision = "float32",
        providers: Sequence[str] = ("CPUExecutionProvider",),
        threads: int = 0,
    ):
        folder = Path(folder)
        self.graphs = OnnxGraphs(folder, precision, providers, threads)
        self.config = read_json(folder / "config.json")
        settings = {**self.config, **read_json(folder / "generation_config.json")}
        self.start_id = int(settings["decoder_start_token_id"])
        eos = settings.get("eos_token_id")
        self.eos_ids: list[int] = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        self.pad_id: int = settings.get("pad_token_id") or 0
        self.vocab_size = int(self.config["vocab_size"])
        self.defaults = read_options(folder / "generation_config.json")
        self.texts = Texts(folder, self.pad_id) if (folder / "tokenizer.json").is_file() else None

    def __call__(self, texts: Sequence[str], **options: Any) -> list[list[Hypothesis]]:
        """
        Args:
            texts: a batch of sources.
            options: see [`SearchOptions`]; what is not given is generation_config.json's.

        Returns:
            For each source its `num_return_sequences` hypotheses, best first.
        """
        if isinstance(texts, str):
            raise TypeError("`texts` must be a list of strings, not one string")
        if self.texts is None:
            raise FileNotFoundError("the folder has no tokenizer.json: pass ids to `generate`")
        if not texts:
            return []
        batch = self.texts.encode(texts)
        copy_ids = batch.copy_ids if self.graphs.copies else None
        found = self.generate(batch.input_ids, batch.attention_mask, copy_ids, **options)
        return [
            [one._replace(text=self.texts.decode(one.ids, words)) for one in hypotheses]
            for hypotheses, words in zip(found, batch.words, strict=True)
        ]

    def generate(
        self, input_ids: Array, attention_mask: Array | None = None, copy_ids: Array | None = None, **options: Any
    ) -> list[list[Hypothesis]]:
        """
        The same with ids in place of texts.

        Args:
            input_ids: [B, S].
            attention_mask: 1 at tokens, [B, S]; by default all are.
            copy_ids: of a model that copies, see `RnnSeq2SeqTokenizer`; with one vocabulary `input_ids` by default.
            options: see [`SearchOptions`].
        """
        unknown = options.keys() - set(OPTIONS)
        if unknown:
            raise TypeError(f"unknown option `{min(unknown)}`; there are {', '.join(OPTIONS)}")
        given = {**self.defaults, **options}
        if "max_length" in options and "max_new_tokens" not in options:
            given["max_new_tokens"] = None
        search = SearchOptions(**given)
        if attention_mask is None:
            attention_mask = np.ones_like(input_ids)
        if attention_mask.shape != input_ids.shape:
            raise ValueError(f"`attention_mask` must have shape {input_ids.shape}, got {attention_mask.shape}")
        width = None
        tensors = self.graphs.encode(input_ids, attention_mask)
        if self.graphs.copies:
            if copy_ids is None and self.config.get("source_vocab_size") is not None:
                raise ValueError("`head_type`='pointer_generator' with two vocabularies needs `copy_ids`")
            if copy_ids is None:  # nothing beyond the vocabulary can be copied
                copy_ids, width = input_ids, self.vocab_size
            tensors["copy_ids"] = copy_ids.astype(np.int64)
        elif copy_ids is not None:
            raise ValueError(f"`copy_ids` is for a head that copies, not {self.config.get('head_type')!r}")
        if search.num_beams == 1:
            return [[one] for one in self._greedy(tensors, width, len(input_ids), search)]
        return self._beams(tensors, width, len(input_ids), search)

    def _greedy(self, tensors: Tensors, width: int | None, batch: int, search: SearchOptions) -> list[Hypothesis]:
        tokens = np.full(batch, self.start_id)
        going = np.ones(batch, bool)
        rows = np.arange(batch)
        ids: list[list[int]] = [[] for _ in rows]
        total = np.zeros(batch, np.float32)
        attentions: list[Array] = []
        for _ in range(search.new_tokens):
            result = self.graphs.step(tokens, tensors)
            tensors = {**tensors, **result.state}
            logits = result.logits[:, :width]
            tokens = np.where(going, logits.argmax(-1), self.pad_id)
            total += np.where(going, log_softmax(logits)[rows, tokens], 0)
            attentions.append(mean_over_heads(result.attention))
            for row in rows[going]:
                ids[row].append(int(tokens[row]))
            going &= ~np.isin(tokens, self.eos_ids)
            if not going.any():
                break
        weights = np.stack(attentions)  # [T, B, S']
        return [
            Hypothesis(one, float(total[row] / len(one) ** search.length_penalty), weights[: len(one), row])
            for row, one in enumerate(ids)
        ]

    def _beams(self, tensors: Tensors, width: int | None, batch: int, search: SearchOptions) -> list[list[Hypothesis]]:
        """transformers' `GenerationMixin._beam_search`, step for step."""
        beams, longest, penalty = search.num_beams, search.new_tokens, search.length_penalty
        keep = max(2, 1 + len(self.eos_ids)) * beams  # enough that `beams` of them are unfinished
        is_top = np.arange(keep) < beams
        tensors = {name: np.repeat(tensor, beams, axis=0) for name, tensor in tensors.items()}

        running = np.full((batch, beams, longest), -1)
        running_parents = np.full_like(running, -1)
        running_scores = np.full((batch, beams), NEVER)
        running_scores[:, 0] = 0  # all beams are alike at first: one of them counts
        finished, finished_parents = running.copy(), running_parents.copy()
        scores = np.full((batch, beams), NEVER)
        is_finished = np.zeros((batch, beams), bool)
        may_improve = np.ones((batch, 1), bool)
        offset = beams * np.arange(batch)[:, None]
        attentions: list[Array] = []
        tokens = np.full(batch * beams, self.start_id)
        for t in np.arange(longest):
            result = self.graphs.step(tokens, tensors)
            attentions.append(mean_over_heads(result.attention))
            log_p = log_softmax(result.logits[:, :width])
            size = log_p.shape[-1]
            log_p = (log_p.reshape(batch, beams, size) + running_scores[:, :, None]).reshape(batch, -1)

            top_scores, top = largest(log_p, keep)  # [B, K]
            parents = top // size
            candidates = gather(running, parents)
            candidates[:, :, t] = top % size
            candidate_parents = gather(running_parents, parents)
            candidate_parents[:, :, t] = parents + offset
            ends = np.isin(candidates[:, :, t], self.eos_ids) | (t + 1 == longest)

            open_scores = top_scores + ends * NEVER
            running_scores, chosen = largest(open_scores, beams)
            running, running_parents = gather(candidates, chosen), gather(candidate_parents, chosen)

            done_scores = top_scores / np.float32((t + 1) ** penalty)
            if search.early_stopping is True:
                done_scores = done_scores + is_finished.all(-1, keepdims=True) * NEVER
            done_scores = done_scores + ~may_improve * NEVER + ~(ends & is_top) * NEVER
            scores, chosen = largest(np.concatenate((scores, done_scores), 1), beams)
            finished = gather(np.concatenate((finished, candidates), 1), chosen)
            finished_parents = gather(np.concatenate((finished_parents, candidate_parents), 1), chosen)
            is_finished = gather(np.concatenate((is_finished, ends & is_top), 1), chosen)

            # Could a running hypothesis still come before the worst finished one?
            length = longest if search.early_stopping == "never" and penalty > 0 else t + 1
            best = running_scores[:, :1] / np.float32(length**penalty)
            worst = np.where(is_finished, scores.min(1, keepdims=True), NEVER)
            may_improve &= (best > worst).any(-1, keepdims=True)
            if not may_improve.any() or ends.all() or (search.early_stopping is True and is_finished.all()):
                break
            last = running_parents[:, :, t].reshape(-1)
            state = {name: np.take(tensor, last, axis=0) for name, tensor in result.state.items()}
            tensors = {**tensors, **state}
            tokens = running[:, :, t].reshape(-1)

        weights = np.stack(attentions)  # [T, B * N, S']
        found = []
        for row in range(batch):
            hypotheses = []
            for beam in range(search.num_return_sequences):
                length = int((finished_parents[row, beam] >= 0).sum())
                chosen = finished_parents[row, beam, :length]
                ids = finished[row, beam, :length].tolist()
                attention = weights[np.arange(length), chosen]
                hypotheses.append(Hypothesis(ids, float(scores[row, beam]), attention))
            found.append(hypotheses)
        return found


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def read_options(path: Path) -> dict[str, Any]:
    """
    generation_config.json's search.

    Raises:
        ValueError: it holds an option that would change the result and that is not known here.
    """
    options = {name: value for name, value in read_json(path).items() if value is not None}
    for name, value in options.items():
        if name not in OPTIONS and name not in HARMLESS and not (name == "do_sample" and value is False):
            raise ValueError(
                f"{path} asks for `{name}`={value!r}, which this runner does not know; it knows {', '.join(OPTIONS)}"
            )
    return {name: options[name] for name in OPTIONS if name in options}


def log_softmax(x: Array) -> Array:
    """[..., V] -> [..., V]"""
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def largest(x: Array, k: int) -> tuple[Array, Array]:
    """The k largest of x [B, V] in descending order, and their places: [B, k] each."""
    k = min(k, x.shape[-1])
    some = np.argpartition(-x, k - 1, axis=-1)[:, :k]
    some.sort(-1)  # of equals among them the first comes first
    order = np.argsort(-np.take_along_axis(x, some, -1), axis=-1, kind="stable")
    places = np.take_along_axis(some, order, -1)
    return np.take_along_axis(x, places, -1), places


def gather(x: Array, places: Array) -> Array:
    """Row by row: x [B, N, ...], places [B, K] -> [B, K, ...]."""
    return x[np.arange(len(x))[:, None], places]


def mean_over_heads(attention: Array) -> Array:
    """[B, heads, S'] -> [B, S'], or [B, 0] without heads."""
    return attention.mean(1) if attention.shape[1] else attention.reshape(len(attention), 0)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Reads texts from standard input, a line each; writes one line each.")
    parser.add_argument("folder")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=0)
    for name in ("num_beams", "num_return_sequences", "max_new_tokens"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--length_penalty", type=float)
    args = parser.parse_args(arguments)
    runner = RnnSeq2SeqRunner(args.folder, args.precision, threads=args.threads)
    given = {name: value for name, value in vars(args).items() if name in OPTIONS and value is not None}
    while lines := list(itertools.islice(sys.stdin, args.batch_size)):
        for hypotheses in runner([line.rstrip("\n") for line in lines], **given):
            for one in hypotheses:
                print(" ".join(one.text.splitlines()))


if __name__ == "__main__":
    main()
