"""
Runs an exported model with numpy, onnxruntime and tokenizers alone: no torch, no transformers.

`export_onnx` puts this file into the model's folder; it imports nothing of its package and can be copied anywhere.

    python onnx_runner.py . --num_beams 4 < words.txt

    from onnx_runner import RnnSeq2SeqRunner
    runner = RnnSeq2SeqRunner("outputs/mine_onnx")
    for best, *others in runner(["recurrent", "attention"], num_beams=4, num_return_sequences=2):
        print(best.text, best.score, best.attention.shape)

Greedy and beam search give the ids that transformers' generate() gives, by the same rules.

Shapes: B sources, N beams a source, rows R = B or B * N, S source positions, S' what the decoder attends to, T target
tokens, V vocabulary.
"""

import argparse
import functools
import itertools
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np
import onnxruntime
from tokenizers import Tokenizer, models

Precision = Literal["float32", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

# The encoder with the decoder's first state, one decoder step, and two loops around that.
ENCODER, DECODER, GREEDY_SEARCH, BEAM_SEARCH = "encoder_model", "decoder_model", "greedy_search", "beam_search"
GRAPHS = (ENCODER, DECODER, GREEDY_SEARCH, BEAM_SEARCH)
# The decoder's state: `past_x` goes into a step and `present_x` comes out.
PAST, PRESENT = "past_", "present_"

MOST = np.iinfo(np.int64).max  # all scores count
EARLY_STOPPING = {False: 0, True: 1, "never": 2}  # for the graph, where 3 is OpenNMT-py's search

Array = np.ndarray
Tensors = dict[str, Array]


def file_name(graph: str, precision: Precision) -> str:
    """`graph` is one of GRAPHS."""
    return f"{graph}.onnx" if precision == "float32" else f"{graph}_{precision}.onnx"


class StepResult(NamedTuple):
    logits: Array  # [B, V]; of a model that copies [B, V + S]
    attention: Array  # [B, heads, S']; no heads without attention
    state: Tensors


class GreedyResult(NamedTuple):
    sequences: Array  # ids without the start, padded behind an end, [B, T]
    scores: Array  # their log-probabilities, [B]
    attention: Array  # [T, B, heads, S']
    state: Tensors  # behind the last token


class BeamResult(NamedTuple):
    sequences: Array  # ids without the start, best first, -1 behind an end, [B, N, T]
    beam_indices: Array  # for each the row of its step in `attention`, [B, N, T]
    sequences_scores: Array  # see `score_inputs`, [B, N]
    attention: Array  # [T, B * N, heads, S']


class OnnxGraphs:
    """
    The graphs of an exported model, each loaded when it is first used. Nothing is remembered between calls.

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
        self.options = onnxruntime.SessionOptions()
        self.options.intra_op_num_threads = threads
        # Sessions and torch share the processor: threads that wait in vain for more work would hold the others up.
        self.options.add_session_config_entry("session.force_spinning_stop", "1")
        self.providers = list(providers)
        self.paths = {graph: Path(folder) / file_name(graph, precision) for graph in GRAPHS}
        for path in self.paths.values():
            if not path.is_file():
                raise FileNotFoundError(f"{folder} has no {path.name}: export the model with {precision!r}")
        self.encoder = self._load(ENCODER)

    def _load(self, graph: str) -> "Graph":
        return Graph(onnxruntime.InferenceSession(str(self.paths[graph]), self.options, providers=self.providers))

    @functools.cached_property
    def decoder(self) -> "Graph":
        return self._load(DECODER)

    @functools.cached_property
    def greedy_search(self) -> "Graph":
        return self._load(GREEDY_SEARCH)

    @functools.cached_property
    def beam_search(self) -> "Graph":
        return self._load(BEAM_SEARCH)

    def encode(self, input_ids: Array, attention_mask: Array) -> Tensors:
        """Ids and mask [B, S] -> what the decoder attends to, and its first state (names that begin with PAST)."""
        return self.encoder({"input_ids": input_ids, "attention_mask": attention_mask})

    def step(self, tokens: Array, tensors: Tensors) -> StepResult:
        """Tokens [B], all that `encode` gave and `copy_ids` [B, S] of a model that copies -> one step's results."""
        results = self.decoder({**tensors, "input_ids": tokens[:, None]})
        return StepResult(results["logits"], results["attention"], next_state(results))

    def greedy(self, start: Array, tensors: Tensors, **options: int | float | list[int]) -> GreedyResult:
        """
        Args:
            start: start tokens, [B].
            tensors: as for `step`.
            options: `max_new_tokens`, `eos_token_id` (a list), `pad_token_id`, `copy_steps` (it stops when sequences
                that have ended were carried along for so many steps for each of the others; infinity: when all have
                ended), `with_scores` (or they are zeros); of a model that copies `width`, how many of its scores
                count.
        """
        results = self.greedy_search({**tensors, "input_ids": start[:, None]}, **options)
        return GreedyResult(results["sequences"], results["scores"], results["attention"], next_state(results))

    def beams(self, start: Array, tensors: Tensors, **options: int | float | list[int]) -> BeamResult:
        """
        Args:
            start: start tokens, [B].
            tensors: as for `step`: one row a source, not a beam.
            options: `num_beams`, `max_new_tokens`, `eos_token_id` (a list) and `score_inputs`; of a model that copies
                `width`, how many of its scores count.
        """
        return BeamResult(**self.beam_search({**tensors, "input_ids": start[:, None]}, **options))


def next_state(results: Tensors) -> Tensors:
    """The state among a graph's results under the names by which it goes into the next call."""
    return {PAST + name.removeprefix(PRESENT): one for name, one in results.items() if name.startswith(PRESENT)}


class Graph:
    """
    One graph under the names of its inputs and outputs.

    Args:
        session: what runs it.
    """

    TYPES: ClassVar[dict[str, Any]] = {
        "tensor(int64)": np.int64,
        "tensor(float)": np.float32,
        "tensor(bool)": np.bool_,
    }

    def __init__(self, session: onnxruntime.InferenceSession):
        self.session = session
        self.inputs = {one.name: (self.TYPES[one.type], len(one.shape)) for one in session.get_inputs()}
        self.outputs = [one.name for one in session.get_outputs()]

    def __call__(self, tensors: Mapping[str, Array], **options: float | list[int]) -> Tensors:
        """
        Args:
            tensors: its inputs, and others that are not read.
            options: the same, as numbers and lists.
        """
        feeds = {}
        for name, (kind, rank) in self.inputs.items():
            if name in options:
                feeds[name] = np.array(options[name], kind, ndmin=rank)
            else:
                feeds[name] = tensors[name].astype(kind, copy=False)
        return dict(zip(self.outputs, self.session.run(self.outputs, feeds), strict=True))


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
        gnmt_length_penalty, opennmt_length_penalty: those of hf_rnn_seq2seq's `BeamSearchOptions`, in place of
            `length_penalty`; the second means OpenNMT-py's search, whatever `early_stopping` is.
    """

    num_beams: int = 1
    num_return_sequences: int = 1
    max_length: int | None = None
    max_new_tokens: int | None = None
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    gnmt_length_penalty: float | None = None
    opennmt_length_penalty: float | None = None

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
        penalties = [
            f"`{name}`={value}"
            for name, value, usual in (
                ("length_penalty", self.length_penalty, 1.0),
                ("gnmt_length_penalty", self.gnmt_length_penalty, None),
                ("opennmt_length_penalty", self.opennmt_length_penalty, None),
            )
            if value != usual
        ]
        if len(penalties) > 1:
            raise ValueError(f"{' and '.join(penalties)} exclude each other")
        if self.max_new_tokens is None and self.max_length is not None and self.max_length < 2:
            raise ValueError(f"`max_length` must be at least 2, the start token and one more, got {self.max_length}")

    @property
    def new_tokens(self) -> int:
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        return 20 if self.max_length is None else self.max_length - 1


OPTIONS = tuple(field.name for field in fields(SearchOptions))


def score_inputs(
    length_penalty: float,
    early_stopping: bool | str,
    gnmt_length_penalty: float | None = None,
    opennmt_length_penalty: float | None = None,
) -> dict[str, float]:
    """
    What the graph of beam search wants to know of these, see [`SearchOptions`]. A finished hypothesis of n tokens then
    scores log P / ((n + length_offset) / length_scale) ** length_penalty.
    """
    alpha, offset, scale, ending = length_penalty, 0.0, 1.0, EARLY_STOPPING[early_stopping]
    if gnmt_length_penalty is not None:  # Wu et al. 2016, eq. 14
        alpha, offset, scale = gnmt_length_penalty, 5.0, 6.0
    if opennmt_length_penalty is not None:
        alpha, offset, scale, ending = opennmt_length_penalty, 1.0, 1.0, 3
    return {"length_penalty": alpha, "length_offset": offset, "length_scale": scale, "early_stopping": ending}


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
        self.copies = self.config.get("head_type") == "pointer_generator"
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
        copy_ids = batch.copy_ids if self.copies else None
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
        tensors = self.graphs.encode(input_ids, attention_mask)
        width = MOST
        if self.copies:
            if copy_ids is None and self.config.get("source_vocab_size") is not None:
                raise ValueError("`head_type`='pointer_generator' with two vocabularies needs `copy_ids`")
            if copy_ids is None:  # nothing beyond the vocabulary can be copied
                copy_ids, width = input_ids, self.vocab_size
            tensors["copy_ids"] = copy_ids
        elif copy_ids is not None:
            raise ValueError(f"`copy_ids` is for a head that copies, not {self.config.get('head_type')!r}")
        start = np.full(len(input_ids), self.start_id)
        if search.num_beams == 1:
            return [[one] for one in self._greedy(start, tensors, width, search)]
        return self._beams(start, tensors, width, search)

    def _greedy(self, start: Array, tensors: Tensors, width: int, search: SearchOptions) -> list[Hypothesis]:
        found = self.graphs.greedy(
            start,
            tensors,
            max_new_tokens=search.new_tokens,
            eos_token_id=self.eos_ids,
            pad_token_id=self.pad_id,
            copy_steps=math.inf,
            with_scores=True,
            width=width,
        )
        weights = mean_over_heads(found.attention)
        hypotheses = []
        for row, tokens in enumerate(found.sequences):
            ends = np.flatnonzero(np.isin(tokens, self.eos_ids))
            length = int(ends[0]) + 1 if len(ends) else len(tokens)
            score = float(found.scores[row] / length**search.length_penalty)
            hypotheses.append(Hypothesis(tokens[:length].tolist(), score, weights[:length, row]))
        return hypotheses

    def _beams(self, start: Array, tensors: Tensors, width: int, search: SearchOptions) -> list[list[Hypothesis]]:
        found = self.graphs.beams(
            start,
            tensors,
            num_beams=search.num_beams,
            max_new_tokens=search.new_tokens,
            eos_token_id=self.eos_ids,
            width=width,
            **score_inputs(
                search.length_penalty,
                search.early_stopping,
                search.gnmt_length_penalty,
                search.opennmt_length_penalty,
            ),
        )
        weights = mean_over_heads(found.attention)
        hypotheses: list[list[Hypothesis]] = [[] for _ in start]
        for row, beam in np.ndindex(len(start), search.num_return_sequences):
            tokens = found.sequences[row, beam]
            ids = tokens[tokens >= 0]
            attention = weights[np.arange(len(ids)), found.beam_indices[row, beam, : len(ids)]]
            score = float(found.sequences_scores[row, beam])
            hypotheses[row].append(Hypothesis(ids.tolist(), score, attention))
        return hypotheses


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


def mean_over_heads(attention: Array) -> Array:
    """[T, R, heads, S'] -> [T, R, S'], or [T, R, 0] without heads."""
    return attention.mean(2) if attention.shape[2] else attention.reshape(*attention.shape[:2], 0)


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
