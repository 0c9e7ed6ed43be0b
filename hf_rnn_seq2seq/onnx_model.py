"""
An exported model under transformers' generate(): every search, computed by ONNX Runtime.

Shapes: B batch, S source, S' what the decoder attends to, T target, V vocabulary.
"""

import os
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from transformers import Cache, GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.utils import ModelOutput

from .cache_rnn_seq2seq import DecoderState, RnnSeq2SeqCache
from .configuration_rnn_seq2seq import RnnSeq2SeqConfig
from .generation_rnn_seq2seq import RnnSeq2SeqGenerationMixin
from .onnx_runner import PAST, OnnxGraphs, Precision, Tensors
from .signatures import with_known_signature


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

    def step_inputs(self, encoder_outputs: ModelOutput, copy_ids: torch.Tensor | None) -> tuple[Tensors, int | None]:
        """All that a first step reads but its tokens; and how many of its logits count, `None` if all."""
        tensors: Tensors = {
            name: value.numpy() for name, value in encoder_outputs.items() if isinstance(value, torch.Tensor)
        }
        if not self.graphs.copies:
            if copy_ids is not None:
                raise ValueError(f"`copy_ids` is for a head that copies, not {self.config.head_type!r}.")
            return tensors, None
        width = None
        if copy_ids is None:
            if not self.config.shared_vocabulary:
                raise ValueError("`config.head_type`='pointer_generator' with two vocabularies needs `copy_ids`.")
            copy_ids, width = encoder_outputs["source_ids"], self.config.vocab_size
        return tensors | {"copy_ids": copy_ids.numpy()}, width


def state_names(tensors: Tensors) -> list[str]:
    """The decoder's state among all that a step reads."""
    return [name for name in tensors if name.startswith(PAST)]


def flat_state(tensors: Sequence[Any]) -> DecoderState:
    """The state's arrays as a state for [`RnnSeq2SeqCache`], which moves them all alike."""
    return DecoderState(layers=(), feed=tuple(torch.from_numpy(tensor) for tensor in tensors))


__all__ = ["RnnSeq2SeqOnnx"]
