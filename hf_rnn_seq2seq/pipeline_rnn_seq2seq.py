"""`pipeline("rnn-text2text", model=...)`: texts in, texts out, with scores, attention and alternatives on request.

This file travels with a checkpoint to the Hub and imports nothing from the package.
Shapes: B batch, n hypotheses a source, N = B n, T target, M memory, V vocabulary.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypedDict, overload

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.base import Pipeline

TASK = "rnn-text2text"
MAX_NEW_TOKENS = 256  # where neither the arguments nor the model name a limit; transformers would stop at 20
INPUTS = ("input_ids", "attention_mask", "copy_ids")  # what a model takes of a tokenizer's output


class CustomPipelines(dict[str, dict[str, Any]]):
    """
    A configuration's `custom_pipelines`: by task, the pipeline that comes with a checkpoint.

    `in` leaves out the tasks that are registered, so that an installed package wins over a checkpoint's own code, as
    it does for models: `pipeline()` looks a task up by `in`, and what it finds needs `trust_remote_code`. Where no
    task is named, `pipeline()` takes the one key, and finds it among the registered ones.
    """

    def __contains__(self, task: object) -> bool:
        return super().__contains__(task) and task not in PIPELINE_REGISTRY.get_supported_tasks()


def with_custom_pipelines(attributes: dict[str, Any]) -> dict[str, Any]:
    """A configuration's further attributes and, unless it is among them, `custom_pipelines`."""
    own = {"impl": "pipeline_rnn_seq2seq.RnnText2TextPipeline", "pt": ["AutoModelForSeq2SeqLM"], "type": "text"}
    saved = attributes.get("custom_pipelines")
    return {**attributes, "custom_pipelines": CustomPipelines({TASK: own} if saved is None else copy.deepcopy(saved))}


class Hypothesis(TypedDict, total=False):
    """
    One generated text of a source. All but the text is there on request only; for a source without any text, scores
    are `None` and lists empty.

    generated_text: without special tokens.
    log_probability: natural, the model's own of all tokens up to and with the end of sequence, whatever sampling or
        penalties chose them.
    score: log_probability / number of tokens ** `length_penalty` (1 by default), or what takes its place with
        `gnmt_length_penalty` and `coverage_penalty`: what beam search ranks by and generate() calls
        `sequences_scores` (which has a diversity penalty, too, and leaves out a prompt given as `decoder_input_ids`).
    token_log_probabilities: their T parts.
    target_tokens: T tokens, end of sequence included, as the vocabulary has them.
    source_tokens: M tokens; where the encoder shortens the source, each stands for several, with spaces between.
    attention: [T, M] weights of the last attending layer, the mean over its heads, padding left out.
    alternatives: for each of the T tokens the most likely tokens at its place, given those before it, and their
        probabilities, the likeliest first.
    """

    generated_text: str
    score: float | None
    log_probability: float | None
    token_log_probabilities: list[float]
    target_tokens: list[str]
    source_tokens: list[str]
    attention: torch.Tensor
    alternatives: list[list[tuple[str, float]]]


class Reading(NamedTuple):
    """What a model makes of given sequences when it reads them; behind the end of a sequence all is 0."""

    token_log_probabilities: torch.Tensor  # [N, T]
    lengths: torch.Tensor  # [N], tokens up to and with the end of sequence
    scores: torch.Tensor  # [N], see `Hypothesis`
    attention: torch.Tensor | None  # [N, T, M]
    memory_mask: torch.Tensor  # [B, M], a source's
    alternatives: tuple[torch.Tensor, torch.Tensor] | None  # probabilities and ids, [N, T, k]

    @property
    def log_probabilities(self) -> torch.Tensor:
        """[N]"""
        return self.token_log_probabilities.sum(-1)


def read_sequences(
    model: PreTrainedModel,
    inputs: Mapping[str, torch.Tensor],
    sequences: torch.Tensor,
    settings: Mapping[str, Any],
    *,
    with_attention: bool = False,
    num_alternatives: int = 0,
) -> Reading:
    """
    Scores generated sequences in one teacher-forced pass.

    Args:
        inputs: [B, S] tensors as for generate(); N is a multiple of B, the sequences of one source following each
            other.
        sequences: [N, T + 1] ids as generate() returned them, the first the decoder's start.
        settings: of the `GenerationConfig` that generated them, as a dictionary: where a sequence ends, and what
            penalties its score has.
        with_attention: give `attention`; the model must have attention.
        num_alternatives: k of `alternatives`.
    """
    repeats = len(sequences) // len(inputs["input_ids"])
    # A source is encoded once, however many sequences it has.
    encoded = model.get_encoder()(inputs["input_ids"], inputs["attention_mask"], return_dict=True)
    memory_mask = encoded.memory_mask  # [B, M]
    others = {name: tensor for name, tensor in inputs.items() if name != "input_ids"}
    expand: Any = model._expand_inputs_for_generation
    _, repeated = expand(repeats, is_encoder_decoder=True, encoder_outputs=encoded, **others)
    beta = settings.get("coverage_penalty")
    attends = {"output_attentions": True} if beta or with_attention else {}
    outputs = model(**repeated, decoder_input_ids=sequences[:, :-1], use_cache=False, **attends)
    tokens = sequences[:, 1:]
    log_probabilities = outputs.logits.float().log_softmax(-1)  # [N, T, V]
    scores = log_probabilities.gather(-1, tokens[..., None]).squeeze(-1)  # [N, T]

    eos = settings.get("eos_token_id")
    ends = torch.tensor([] if eos is None else eos, device=tokens.device).view(-1)
    is_end = torch.isin(tokens, ends)
    counts = (is_end.cumsum(-1) - is_end.int()) == 0  # up to and with the first end of sequence
    if settings.get("stop_strings") and settings.get("pad_token_id") is not None:
        # These end a sequence without an end of sequence: padding follows.
        padding = (tokens == settings["pad_token_id"]).flip(-1).cumprod(-1).flip(-1).bool()
        counts &= is_end.any(-1, keepdim=True) | ~padding
    scores = scores.masked_fill(~counts, 0.0)
    total, length = scores.sum(-1), counts.sum(-1)

    alpha, power = settings.get("gnmt_length_penalty"), settings.get("length_penalty")
    score = (
        total / length ** (1.0 if power is None else power) if alpha is None else total / ((5 + length) / 6) ** alpha
    )
    attention = None
    if attends:
        attention = outputs.cross_attentions[-1].float().mean(1) * counts[..., None]  # [N, T, M]
    if beta:  # Wu et al. 2016, eq. 14
        assert attention is not None
        covered = attention.sum(1).clamp(torch.finfo(torch.float32).tiny, 1.0).log()  # [N, M]
        score = score + beta * (covered * memory_mask.repeat_interleave(repeats, dim=0)).sum(-1)
    alternatives = None
    if num_alternatives:
        best = log_probabilities.topk(min(num_alternatives, log_probabilities.size(-1)), dim=-1)
        alternatives = best.values.exp() * counts[..., None], best.indices
    return Reading(scores, length, score, attention, memory_mask, alternatives)


class RnnText2TextPipeline(Pipeline):
    """
    Generates texts from texts with a recurrent encoder-decoder.

        >>> import hf_rnn_seq2seq
        >>> from transformers import pipeline
        >>> pipe = pipeline("rnn-text2text", model="outputs/cmudict_g2p")
        >>> pipe("recurrent", num_beams=4, num_return_sequences=2, return_scores=True)

    Arguments of `pipeline()` as everywhere (`device`, `dtype`, `batch_size`, `tokenizer`, ...); those of a call may
    also be given there, for all calls. Without a limit of its own or of the model's a text has at most 256 tokens.

    On a CPU the model's large matrices are kept in the layout of the fastest products, too: see `model.packed`.
    """

    _load_tokenizer = True  # type: ignore[assignment]  # declared without a type, as are these
    _load_processor = _load_image_processor = _load_video_processor = _load_feature_extractor = False  # type: ignore[assignment]

    _pipeline_calls_generate = True
    _default_generation_config = GenerationConfig(max_new_tokens=MAX_NEW_TOKENS)

    tokenizer: PreTrainedTokenizerBase  # type: ignore[assignment]  # always there

    @overload  # type: ignore[override]  # the base class takes anything
    def __call__(self, inputs: str, **options: Any) -> list[Hypothesis]: ...
    @overload
    def __call__(self, inputs: list[str], **options: Any) -> list[list[Hypothesis]]: ...
    @overload
    def __call__(self, inputs: Iterable[str], **options: Any) -> Iterator[list[Hypothesis]]: ...
    def __call__(
        self, inputs: str | list[str] | Iterable[str], **options: Any
    ) -> list[Hypothesis] | list[list[Hypothesis]] | Iterator[list[Hypothesis]]:
        """
        Args:
            inputs: a text, a list of texts, or a generator or torch `Dataset` of texts (for a column of one,
                `KeyDataset(dataset, "column")`). White space alone gives empty texts.
            batch_size: how many sources are generated for at once; 1 by default.
            return_scores: add `score`, `log_probability` and `token_log_probabilities`.
            return_alignments: add `attention`, `source_tokens` and `target_tokens`.
            num_alternatives: add this many `alternatives` for each token, and `target_tokens`.
            truncation: cut sources to the tokenizer's `model_max_length`.
            options: all else is generate()'s: `num_beams`, `num_return_sequences`, `do_sample`, `max_new_tokens`,
                `generation_config`, ...

        Returns:
            `num_return_sequences` [`Hypothesis`] dictionaries, best first under beam search: for a text a list of
            them, for a list of texts a list of such lists, for a generator or dataset an iterator over such lists,
            which reads on as it is read.

        Raises:
            TypeError: an input is no text.
            ValueError: `return_alignments` for a model without attention; `num_alternatives` is negative; what
                generate() refuses.
        """
        if isinstance(inputs, list) and not inputs:
            return []  # the base class looks at the first
        return super().__call__(inputs, **options)

    def _sanitize_parameters(
        self,
        truncation: bool | None = None,
        return_scores: bool | None = None,
        return_alignments: bool | None = None,
        num_alternatives: int | None = None,
        **generate_kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if return_alignments and getattr(self.model.config, "attention_type", None) == "none":
            raise ValueError("`return_alignments` needs attention, but this model has `attention_type`='none'.")
        if num_alternatives is not None and num_alternatives < 0:
            raise ValueError(f"`num_alternatives` must be 0 or more, got {num_alternatives}.")
        own = {
            "return_scores": return_scores,
            "return_alignments": return_alignments,
            "num_alternatives": num_alternatives,
        }
        forward = {name: value for name, value in own.items() if value is not None}
        return {} if truncation is None else {"truncation": truncation}, {**forward, **generate_kwargs}, {}

    def preprocess(self, input_: str, truncation: bool = False) -> dict[str, Any]:  # type: ignore[override]
        if not isinstance(input_, str):
            raise TypeError(
                f"{TASK} takes a text, a list of texts, or a generator or torch Dataset of texts (a column: "
                f"transformers.pipelines.pt_utils.KeyDataset), not {type(input_).__name__}."
            )
        encoded = self.tokenizer(input_, truncation=truncation)
        rows = {name: encoded[name] for name in INPUTS if name in encoded}
        blank = not (input_.strip() and rows["input_ids"])
        if not rows["input_ids"]:
            # One token, so that its batch can be generated for; what comes out is thrown away.
            rows = {name: [self.tokenizer.pad_token_id] for name in rows} | {"attention_mask": [1]}
        tensors = {name: torch.tensor([row]) for name, row in rows.items()}
        return {**tensors, "source": input_, "blank": torch.tensor([blank])}

    def _forward(  # type: ignore[override]
        self,
        input_tensors: dict[str, Any],
        return_scores: bool = False,
        return_alignments: bool = False,
        num_alternatives: int = 0,
        **generate_kwargs: Any,
    ) -> dict[str, Any]:
        """Every tensor of the result has B rows, which the base class then takes apart."""
        inputs = {name: input_tensors[name] for name in INPUTS if name in input_tensors}
        generate_kwargs = self._prepare_generate_kwargs(generate_kwargs)
        settings = self._get_set_generation_params(generate_kwargs)
        if settings.get("stop_strings"):
            generate_kwargs["tokenizer"] = self.tokenizer
        with self.model.packed(keep=True):  # type: ignore[operator]  # declared nowhere, as generate()
            sequences = self.model.generate(**inputs, **generate_kwargs)  # type: ignore[operator]
        if not isinstance(sequences, torch.Tensor):
            sequences = sequences.sequences  # `return_dict_in_generate`, asked for by the model's own configuration
        batch, source = len(inputs["input_ids"]), input_tensors["source"]
        result = {
            "sequences": sequences.view(batch, -1, sequences.size(-1)),  # [B, n, T + 1]
            "source": [source] if isinstance(source, str) else source,
            "blank": input_tensors["blank"],
        }
        if not (return_scores or return_alignments or num_alternatives):
            return result
        reading = read_sequences(
            self.model,
            inputs,
            sequences,
            settings,
            with_attention=return_alignments,
            num_alternatives=num_alternatives,
        )
        result["lengths"] = reading.lengths.view(batch, -1)
        if return_scores:
            result["scores"] = reading.scores.view(batch, -1)
            result["token_log_probabilities"] = reading.token_log_probabilities.unflatten(0, (batch, -1))
        if return_alignments:
            assert reading.attention is not None
            result |= {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
            result |= {"attention": reading.attention.unflatten(0, (batch, -1)), "memory_mask": reading.memory_mask}
        if reading.alternatives is not None:
            probabilities, ids = reading.alternatives
            result["alternative_probabilities"] = probabilities.unflatten(0, (batch, -1))
            result["alternative_ids"] = ids.unflatten(0, (batch, -1))
        return result

    def postprocess(self, model_outputs: dict[str, Any]) -> list[Hypothesis]:  # type: ignore[override]
        """Of one source, with a first dimension of 1."""
        tensors = {name: value[0] for name, value in model_outputs.items() if isinstance(value, torch.Tensor)}
        outputs: dict[str, Any] = {**model_outputs, **tensors}
        source = outputs["source"] if isinstance(outputs["source"], str) else outputs["source"][0]
        copied: dict[str, Any] = {}
        if getattr(self.tokenizer, "copies_source", False):
            copied["source_texts"] = [source]
        texts = self.tokenizer.batch_decode(outputs["sequences"], skip_special_tokens=True, **copied)
        if outputs["blank"]:
            texts = [""] * len(texts)
            outputs["lengths"] = torch.zeros(len(texts), dtype=torch.long)
        hypotheses = [Hypothesis(generated_text=text) for text in texts]
        for index, hypothesis in enumerate(hypotheses):
            self._describe(hypothesis, outputs, index, source)
        return hypotheses

    def _describe(self, hypothesis: Hypothesis, outputs: dict[str, Any], index: int, source: str) -> None:
        """Adds what was asked for to hypothesis number `index` of a source."""
        if "scores" in outputs:
            parts = outputs["token_log_probabilities"][index, : outputs["lengths"][index]].tolist()
            hypothesis["score"] = None if outputs["blank"] else outputs["scores"][index].item()
            hypothesis["log_probability"] = None if outputs["blank"] else math.fsum(parts)
            hypothesis["token_log_probabilities"] = parts
        if "attention" not in outputs and "alternative_ids" not in outputs:
            return
        length = outputs["lengths"][index]
        hypothesis["target_tokens"] = self._target_tokens(outputs["sequences"][index, 1 : length + 1].tolist(), source)
        if "attention" in outputs:
            columns = outputs["memory_mask"].bool() & ~outputs["blank"]
            hypothesis["attention"] = outputs["attention"][index, :length, columns]
            ids = outputs["input_ids"][outputs["attention_mask"].bool()].tolist()
            side = getattr(self.tokenizer, "source_tokenizer", self.tokenizer)
            tokens = [str(token) for token in side.convert_ids_to_tokens(ids)]
            hypothesis["source_tokens"] = _grouped(tokens, int(columns.sum()))
        if "alternative_ids" in outputs:
            hypothesis["alternatives"] = [
                list(zip(self._target_tokens(ids, source), probabilities, strict=True))
                for ids, probabilities in zip(
                    outputs["alternative_ids"][index, :length].tolist(),
                    outputs["alternative_probabilities"][index, :length].tolist(),
                    strict=True,
                )
            ]

    def _target_tokens(self, ids: list[int], source: str) -> list[str]:
        """Tokens of target ids; an id outside the vocabulary is a word of the source."""
        tokens = getattr(self.tokenizer, "target_tokenizer", self.tokenizer).convert_ids_to_tokens(ids)
        return [
            str(self.tokenizer.decode([token_id], source_text=source)) if token is None else token
            for token_id, token in zip(ids, tokens, strict=True)
        ]


def _grouped(tokens: list[str], positions: int) -> list[str]:
    """Labels for the positions of an encoder that halves its length once or several times, or not at all."""
    size = 1
    while size < len(tokens) and -(-len(tokens) // size) > positions:
        size *= 2
    return [" ".join(tokens[start : start + size]) for start in range(0, len(tokens), size)][:positions]


__all__ = ["RnnText2TextPipeline"]
