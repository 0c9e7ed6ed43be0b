"""
An exported model under transformers' generate(): every search, computed by ONNX Runtime.

Shapes: B batch, S source, S' what the decoder attends to, T target, V vocabulary.
"""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, cast

import torch
from transformers import Cache, GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.utils import ModelOutput

from .beam_options import BeamSearchOptions
from .cache_rnn_seq2seq import DecoderState, RnnSeq2SeqCache
from .configuration_rnn_seq2seq import RnnSeq2SeqConfig
from .ended_rows import COPY_STEPS, Ended, Ends
from .fast_generation import classes_with_own_helpers, every, is_covered
from .generation_rnn_seq2seq import RnnSeq2SeqGenerationMixin
from .heads import HEADS
from .onnx_runner import MOST, PAST, OnnxGraphs, Precision, Tensors, score_inputs
from .signatures import with_known_signature

# Up to so many sources a search is one call of ONNX Runtime, which carries rows on that have ended. Among more that
# costs more than what Python spends: greedy search drops them, and beam search goes step by step.
WHOLE_SEARCH_SOURCES = 4

# The options of `BeamSearchOptions` that a graph knows.
GRAPH_OPTIONS = ("gnmt_length_penalty", "opennmt_length_penalty")


class RnnSeq2SeqOnnxEncoder:
    """What `model.get_encoder()` returns."""

    main_input_name = "input_ids"

    def __init__(self, graphs: OnnxGraphs):
        self.graphs = graphs

    def __call__(self, *args: Any, **kwargs: Any) -> ModelOutput:
        return self.forward(*args, **kwargs)

    @with_known_signature
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ModelOutput:
        """
        Args:
            input_ids: [B, S].
            attention_mask: 1 at tokens, padding on either side, [B, S].

        The other arguments come from generate(), and change nothing.

        Returns:
            Every tensor that the graph gives as a field of its own, since generate() repeats just those for its beams:
            `memory_values`, `memory_mask`, `past_layer_0_h`, ...; and `source_ids`.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        tensors = self.graphs.encode(input_ids.numpy(), mask.numpy())
        return ModelOutput(
            **{name: torch.from_numpy(tensor) for name, tensor in tensors.items()}, source_ids=input_ids
        )


class OnnxSteps:
    """
    [`decoding_steps.Steps`] of an exported model: rows that have ended leave its batches.

    Args:
        model: the exported model.
        cache: its cache after the first step.
        encoder_outputs: what its encoder gave.
        copy_ids: as for `model.forward`.
    """

    def __init__(
        self,
        model: "RnnSeq2SeqOnnx",
        cache: RnnSeq2SeqCache,
        encoder_outputs: ModelOutput,
        copy_ids: torch.Tensor | None,
    ):
        assert cache.state is not None
        self.graphs = model.graphs
        self.tensors, self.width = model.step_inputs(encoder_outputs, copy_ids)
        states = zip(state_names(self.tensors), cache.state.tensors(), strict=True)
        self.tensors |= {name: tensor.numpy() for name, tensor in states}

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        result = self.graphs.step(tokens.numpy(), self.tensors)
        self.tensors |= result.state
        return torch.from_numpy(result.logits[:, : self.width])

    def select(self, rows: torch.Tensor) -> None:
        self.tensors = {name: tensor[rows.numpy()] for name, tensor in self.tensors.items()}

    def reorder(self, rows: torch.Tensor) -> None:
        self.tensors |= {name: self.tensors[name][rows.numpy()] for name in state_names(self.tensors)}

    def repeat(self, times: int) -> None:
        self.tensors = {name: tensor.repeat(times, axis=0) for name, tensor in self.tensors.items()}


class RnnSeq2SeqOnnx(PreTrainedModel, RnnSeq2SeqGenerationMixin):
    """
    An exported model with transformers' generate(): greedy search, sampling, beams, all options of
    `BeamSearchOptions`, scores, and attention (`output_attentions=True`, `generated_attentions`), by the same ids as
    the model it was exported from.

    It computes on the CPU side of torch's tensors; where ONNX Runtime itself computes is for its `providers` to say.
    """

    main_input_name = "input_ids"
    device = torch.device("cpu")
    dtype = torch.float32
    _is_stateful = True  # a state can't take tokens back
    decoding_steps = OnnxSteps

    def __init__(self, graphs: OnnxGraphs, config: RnnSeq2SeqConfig, generation_config: GenerationConfig):
        super().__init__(config)  # without parameters: the graphs have them
        self.graphs, self.generation_config = graphs, generation_config
        self.eval()

    @classmethod
    def from_pretrained(  # type: ignore[override]  # files of another kind
        cls,
        folder: str | os.PathLike[str],
        precision: Precision = "float32",
        providers: Sequence[str] = ("CPUExecutionProvider",),
        threads: int = 0,
    ) -> "RnnSeq2SeqOnnx":
        """
        Args:
            folder: what `export_onnx` wrote.
            precision, providers, threads: see [`OnnxGraphs`].
        """
        graphs = OnnxGraphs(folder, precision, providers, threads)
        config = RnnSeq2SeqConfig.from_pretrained(folder)
        return cls(graphs, config, GenerationConfig.from_pretrained(folder))

    def save_pretrained(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError("An exported model is a folder of files: copy it.")

    def get_encoder(self, modality: str | None = None) -> RnnSeq2SeqOnnxEncoder:
        return RnnSeq2SeqOnnxEncoder(self.graphs)

    @with_known_signature
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: ModelOutput | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        copy_ids: torch.Tensor | None = None,
    ) -> Seq2SeqLMOutput:
        """
        [`RnnSeq2SeqForConditionalGeneration.forward`] without losses, embeddings and hidden states; the decoder goes
        one token at a time.

        Returns:
            `logits` [B, T, V] or with `copy_ids` [B, T, V + S], `past_key_values` and, if asked for,
            `cross_attentions`: a tuple of [B, heads, T, S'], empty without attention.
        """
        if output_hidden_states:
            raise ValueError("`output_hidden_states`: an exported model gives none.")
        if decoder_input_ids is None:
            raise ValueError("Give `decoder_input_ids`.")
        if encoder_outputs is None:
            if input_ids is None:
                raise ValueError("Give `input_ids` or `encoder_outputs`.")
            encoder_outputs = self.get_encoder()(input_ids, attention_mask)
        cache = past_key_values if isinstance(past_key_values, RnnSeq2SeqCache) else RnnSeq2SeqCache()
        tensors, width = self.step_inputs(encoder_outputs, copy_ids)
        names = state_names(tensors)
        state = [tensors[name] for name in names]
        if cache.state is not None:
            state = [tensor.numpy() for tensor in cache.state.tensors()]
        live = None
        if decoder_attention_mask is not None:
            live = decoder_attention_mask[:, -decoder_input_ids.size(1) :].bool()
        logits, weights = [], []
        for t, tokens in enumerate(decoder_input_ids.unbind(1)):
            tensors |= dict(zip(names, state, strict=True))
            result = self.graphs.step(tokens.numpy(), tensors)
            new, old = (flat_state(one) for one in ([result.state[name] for name in names], state))
            if live is not None:
                new = new.where(live[:, t], old)
            state = [tensor.numpy() for tensor in new.tensors()]
            logits.append(torch.from_numpy(result.logits[:, :width]))
            weights.append(torch.from_numpy(result.attention))
        cache.advance(new, decoder_input_ids.size(1))
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        attention = torch.stack(weights, dim=2)  # [B, heads, T, S']
        return Seq2SeqLMOutput(
            logits=torch.stack(logits, dim=1),
            past_key_values=cache if use_cache is not False else None,  # type: ignore[arg-type]  # transformers declares one kind
            cross_attentions=((attention,) if attention.size(1) else ()) if output_attentions else None,
        )

    def _sample(  # type: ignore[override]  # `self` is declared as a protocol there
        self, input_ids: torch.LongTensor, *, generation_config: GenerationConfig, **kwargs: Any
    ) -> Any:
        """Greedy search is one call of ONNX Runtime until it is worth while to drop the rows that have ended."""
        longest = self._whole_search_length(input_ids, generation_config, kwargs)
        if longest is None or generation_config.do_sample:
            return super()._sample(input_ids, generation_config=generation_config, **kwargs)
        tensors, width = self.step_inputs(kwargs["encoder_outputs"], kwargs.get("copy_ids"))
        eos, pad = eos_ids(generation_config), cast(Any, generation_config)._pad_token_tensor
        fill = 0 if pad is None else int(pad)
        ended = Ended(len(input_ids), input_ids.device)
        while True:
            rows = len(input_ids)
            found = self.graphs.greedy(
                input_ids[:, -1].numpy(),
                tensors,
                max_new_tokens=longest,
                eos_token_id=eos,
                pad_token_id=fill,
                copy_steps=math.inf if rows <= WHOLE_SEARCH_SOURCES else COPY_STEPS,
                with_scores=False,
                width=width,
            )
            new = torch.from_numpy(found.sequences)
            input_ids = cast(torch.LongTensor, torch.cat((input_ids, new), dim=1))
            longest -= new.size(1)
            has_ended = torch.isin(new, torch.tensor(eos, dtype=torch.long)).any(1)
            if longest == 0 or has_ended.all():
                break
            going_on = ended.add(has_ended, input_ids[has_ended])
            input_ids = cast(torch.LongTensor, input_ids[going_on])
            tensors = {name: tensor[going_on.numpy()] for name, tensor in (tensors | found.state).items()}
        ended.add(torch.ones(rows, dtype=torch.bool), input_ids)
        return ended.all_sequences(fill)

    def _beam_search(  # type: ignore[override]  # the same
        self, input_ids: torch.LongTensor, *, generation_config: GenerationConfig, **kwargs: Any
    ) -> Any:
        """Beam search for few sources, transformers' or OpenNMT-py's, is one call of ONNX Runtime."""
        config, beams = generation_config, cast(int, generation_config.num_beams)
        longest = self._whole_search_length(input_ids[::beams], config, kwargs)
        options = getattr(config, "_beam_search_options", None)
        few = len(input_ids) <= beams * WHOLE_SEARCH_SOURCES
        known = in_the_graph(options, config) and not config.do_sample and not classes_with_own_helpers(self)
        if longest is None or not few or not known:
            return super()._beam_search(input_ids, generation_config=config, **kwargs)
        kwargs = every(kwargs, beams)
        tensors, width = self.step_inputs(every(kwargs["encoder_outputs"], beams), kwargs.get("copy_ids"))
        eos, pad = eos_ids(config), cast(Any, config)._pad_token_tensor
        rule = {} if options is None else {name: getattr(options, name) for name in GRAPH_OPTIONS}
        found = self.graphs.beams(
            input_ids[::beams, 0].numpy(),
            tensors,
            num_beams=beams,
            max_new_tokens=longest,
            eos_token_id=eos,
            width=width,
            **score_inputs(cast(float, config.length_penalty), cast(bool | str, config.early_stopping), **rule),
        )
        returned = cast(int, config.num_return_sequences)
        best = torch.from_numpy(found.sequences[:, :returned]).flatten(0, 1)  # [B * returned, T]
        best = best[:, (best >= 0).any(0)]
        fill = int(pad or eos[0]) if eos else -1
        return torch.cat((input_ids[::beams].repeat_interleave(returned, 0), best.where(best >= 0, fill)), dim=1)

    def _whole_search_length(
        self, prompt: torch.Tensor, generation_config: GenerationConfig, options: dict[str, Any]
    ) -> int | None:
        """
        May graphs of searches take a call's place? They know nothing between two steps but what ends a sequence.
        If so, how many tokens they may make at most.

        Args:
            prompt: [B, T].
            options: the keyword arguments of `GenerationMixin._sample` or `_beam_search`.
        """
        ends = Ends(options["stopping_criteria"])
        knows = ends.simple and ends.max_length is not None and set(ends.eos) == set(eos_ids(generation_config))
        if prompt.size(1) > 1 or options["logits_processor"] or not knows:
            return None
        if not is_covered(self, cast(torch.LongTensor, prompt), generation_config, options):
            return None
        return max(1, cast(int, ends.max_length) - 1)

    def step_inputs(self, encoder_outputs: Mapping[str, Any], copy_ids: torch.Tensor | None) -> tuple[Tensors, int]:
        """All that a first step reads but its tokens; and how many of its logits count, `MOST` if all."""
        tensors: Tensors = {
            name: value.numpy() for name, value in encoder_outputs.items() if isinstance(value, torch.Tensor)
        }
        if not HEADS[self.config.head_type].copies:
            if copy_ids is not None:
                raise ValueError(f"`copy_ids` is for a head that copies, not {self.config.head_type!r}.")
            return tensors, MOST
        width = MOST
        if copy_ids is None:
            if not self.config.shared_vocabulary:
                raise ValueError("`config.head_type`='pointer_generator' with two vocabularies needs `copy_ids`.")
            copy_ids, width = encoder_outputs["source_ids"], self.config.vocab_size
        return tensors | {"copy_ids": copy_ids.numpy()}, width


def in_the_graph(options: BeamSearchOptions | None, config: GenerationConfig) -> bool:
    """Does the graph of beam search know these options, if any?"""
    if options is None:
        return True
    unknown = options.has_groups or options.has_words or bool(options.coverage_penalty)
    if unknown or not set(options.toolkits) <= {"opennmt_length_penalty"}:
        return False
    # OpenNMT-py may find fewer hypotheses than beams; what then stands in the other places is for our own loop to say.
    return options.opennmt_length_penalty is None or config.num_return_sequences == 1


def eos_ids(config: GenerationConfig) -> list[int]:
    """What ends a sequence, as generate() has prepared it."""
    eos = cast(Any, config)._eos_token_tensor
    return [] if eos is None else eos.tolist()


def state_names(tensors: Tensors) -> list[str]:
    """The decoder's state among all that a step reads."""
    return [name for name in tensors if name.startswith(PAST)]


def flat_state(tensors: Sequence[Any]) -> DecoderState:
    """The state's arrays as a state for [`RnnSeq2SeqCache`], which moves them all alike."""
    return DecoderState(layers=(), feed=tuple(torch.from_numpy(tensor) for tensor in tensors))


__all__ = ["RnnSeq2SeqOnnx"]
