"""
A model as two graphs with every tensor of the decoder's state as an input and an output: what exporters want.

[`EncoderGraph`] reads a source and makes what the decoder attends to and its first state; [`StepGraph`] reads one
token and makes scores and the next state. Neither has a Python loop over time: recurrent layers become `scan`, or
nodes of ONNX's own, so that every length can be dynamic.

Shapes: B batch, S source, S' memory (shorter than S behind a pyramidal encoder), V vocabulary, H hidden, D input,
N states a cell (an LSTM has two).
"""

import copy
import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, cast

import torch
from torch import nn
from torch.nn import functional as F

from . import normalizers
from .attention import PreparedMemory
from .cache_rnn_seq2seq import DecoderState
from .compiled_loop import Step, Tensors, scan_steps
from .configuration_rnn_seq2seq import RECURRENT_ENCODERS
from .encoder_bodies import (
    BodyOutput,
    DeepTransition,
    EncoderBody,
    EncoderLayer,
    PyramidalEncoder,
    first_token,
    zero_padding,
)
from .heads import HeadInput
from .losses import as_logits
from .modeling_rnn_seq2seq import RnnSeq2SeqForConditionalGeneration
from .recurrent_layers import GRU, LSTM, KernelLayer, LinearRecurrence, RecurrentLayer, ReluRNN, State, TanhRNN

Backend = Literal["onnx", "torch", "none"]


class ScanLayer(nn.Module):
    """One direction of an encoder layer in evaluation, step by step, by torch's `scan`: one step is traced, not T."""

    def __init__(self, layer: RecurrentLayer | DeepTransition):
        super().__init__()
        self.cells = nn.ModuleList(layer.cells if isinstance(layer, DeepTransition) else [layer])

    def forward(self, x: torch.Tensor, state: None, mask: torch.Tensor) -> tuple[torch.Tensor, State]:
        """x [B, T, D], no first state, mask [B, T] -> outputs [B, T, H], the final state."""
        first, *others = cast(list[RecurrentLayer], list(self.cells))
        x = first.project(zero_padding(x, mask))

        def step(old: Tensors, inputs: Tensors) -> Step:
            x_t, token = inputs  # [B, *], [B, 1]
            new = first._advance(x_t, tuple(old), ())
            for cell in others:
                new = cell.step(x_t[:, :0], new)
            new = tuple(torch.where(token, n, o) for n, o in zip(new, old, strict=True))
            return new, (new[0] * token,)

        final, (outputs,) = scan_steps(step, first.zero_state(x), [x, mask.unsqueeze(-1)])
        return outputs, tuple(final)


def scan_linear_recurrence(a: torch.Tensor, b: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """`LinearRecurrence.apply`, whose number of doublings depends on T, for any T: a, b [B, T, H] -> [B, T, H]."""

    def step(old: Tensors, inputs: Tensors) -> Step:
        new = inputs[0] * old[0] + inputs[1]
        return [new], [new]

    _, (outputs,) = scan_steps(step, [first], [a, b])
    return outputs


def join_pairs(x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`PyramidalEncoder.join`, whose reshaping torch.export cannot follow, by indices."""
    index = 2 * torch.arange((x.size(1) + 1) // 2)
    x, mask = F.pad(x, (0, 0, 0, 1)), F.pad(mask, (0, 1))
    return torch.cat((x[:, index], x[:, index + 1]), dim=-1), mask[:, index] | mask[:, index + 1]


@contextmanager
def exporting() -> Iterator[None]:
    """
    While a graph is traced: no gradients, and no Python decision by a length.
    """
    replaced = (
        (LinearRecurrence, "apply", scan_linear_recurrence),
        (normalizers, "SORTED_WHOLE", math.inf),
        (PyramidalEncoder, "join", staticmethod(join_pairs)),
    )
    originals = [(owner, name, inspect.getattr_static(owner, name)) for owner, name, _ in replaced]
    try:
        for owner, name, value in replaced:
            setattr(owner, name, value)
        with torch.no_grad():
            yield
    finally:
        for owner, name, value in originals:
            setattr(owner, name, value)


class OnnxEncoderLayer(nn.Module):
    """
    An encoder layer of torch's cells as one LSTM, GRU or RNN node of ONNX, both directions in it. Rows are padded on
    the right (see [`LeftAlignedBody`]), and the node is told their lengths.

    The node's weights are constants of the graph, where quantisation looks for them.
    """

    W: torch.Tensor  # [directions, num_gates * H, D]
    R: torch.Tensor  # [directions, num_gates * H, H]
    B: torch.Tensor  # [directions, 2 * num_gates * H]

    # The node, the order of its gates by torch's, and what else each direction must be told.
    NODES: ClassVar[dict[type[RecurrentLayer], tuple[str, tuple[int, ...], dict[str, int | list[str]]]]] = {
        LSTM: ("LSTM", (0, 3, 1, 2), {}),  # i f g o -> i o f c
        GRU: ("GRU", (1, 0, 2), {"linear_before_reset": 1}),  # r z n -> z r h
        TanhRNN: ("RNN", (0,), {"activations": ["Tanh"]}),
        ReluRNN: ("RNN", (0,), {"activations": ["Relu"]}),
    }

    def __init__(self, layer: EncoderLayer):
        super().__init__()
        cells = cast(list[KernelLayer], list(layer.directions.children()))
        self.op_type, order, attributes = self.NODES[type(cells[0])]
        self.num_states, self.hidden_size = cells[0].num_states, cells[0].hidden_size
        self.attributes: dict[str, Any] = {
            "hidden_size": self.hidden_size,
            "direction": "bidirectional" if len(cells) > 1 else "forward",
            **{name: value * len(cells) if isinstance(value, list) else value for name, value in attributes.items()},
        }
        self.directions = len(cells)

        def reorder(weight: torch.Tensor) -> torch.Tensor:
            gates = weight.detach().chunk(len(order))
            return torch.cat([gates[gate] for gate in order])

        self.register_buffer("W", torch.stack([reorder(cell.weight_ih) for cell in cells]))
        self.register_buffer("R", torch.stack([reorder(cell.weight_hh) for cell in cells]))
        biases = [torch.cat((reorder(cell.bias_ih), reorder(cell.bias_hh))) for cell in cells]
        self.register_buffer("B", torch.stack(biases))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[`EncoderLayer.forward`]'s."""
        batch, length = mask.shape
        final_shape = (self.directions, batch, self.hidden_size)
        shapes = [(length, *final_shape), *[final_shape] * self.num_states]
        outputs, *finals = torch.onnx.ops.symbolic_multi_out(
            self.op_type,
            (x.transpose(0, 1), self.W, self.R, self.B, mask.sum(1, dtype=torch.int32)),
            self.attributes,
            dtypes=[x.dtype] * len(shapes),
            shapes=shapes,
        )
        outputs = outputs.permute(2, 0, 1, 3).flatten(2)  # [B, S, directions * H]
        final = torch.stack([value.transpose(0, 1).flatten(1) for value in finals], dim=1)
        return zero_padding(outputs, mask), final


def turn(x: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Every row of x [B, S, *] turned round until its position `start` [B, 1], in [0, S), stands first."""
    length = x.size(1)
    index = torch.arange(length).unsqueeze(0) + start  # [B, S]
    index = torch.where(index < length, index, index - length)  # ONNX has no remainder by a length
    return x.gather(1, index.unsqueeze(-1).expand_as(x))


class LeftAlignedBody(nn.Module):
    """A recurrent encoder body that is shown all rows moved to the left; its memory is moved back."""

    def __init__(self, body: EncoderBody):
        super().__init__()
        self.body = body
        self.shortens = body.shortens
        if self.shortens:  # such a body moves rows itself, and leaves its memory on the left
            setattr(body, "move_left", lambda x, mask: (x, mask))  # noqa: B010  # in place of a static method

    def forward(self, x: torch.Tensor, mask: torch.Tensor, output_attentions: bool) -> BodyOutput:
        """[`EncoderBody.forward`]'s, without the layers' outputs."""
        first = first_token(mask)
        moved = turn(mask.unsqueeze(-1), first).squeeze(-1)
        output = self.body(turn(x, first), moved, output_attentions)
        if self.shortens:
            return output
        back = torch.where(first > 0, mask.size(1) - first, 0)
        return BodyOutput(turn(output.memory, back), output.final_state, mask, [])


def without_loops(model: RnnSeq2SeqForConditionalGeneration, backend: Backend) -> RnnSeq2SeqForConditionalGeneration:
    """
    A copy of the model, in evaluation mode and on the CPU, whose encoder has no Python loop over time.

    Args:
        backend: "onnx" makes nodes of ONNX of torch's own cells, which torch cannot compute; "torch" leaves everything
            to `scan`; "none" leaves the loops.
    """
    model = copy.deepcopy(model).cpu().eval()
    if backend == "none" or model.config.encoder_type not in RECURRENT_ENCODERS:
        return model
    encoder = model.get_encoder()
    layers = encoder.body.layers
    for index, layer in enumerate(layers):
        cells = list(layer.directions.values())
        if backend == "onnx" and isinstance(cells[0], KernelLayer) and cells[0].zoneout == 0:
            layers[index] = OnnxEncoderLayer(layer)
        else:
            for name, cell in layer.directions.items():
                layer.directions[name] = ScanLayer(cell)
    if backend == "onnx":
        encoder.body = LeftAlignedBody(encoder.body)
    return model


def state_names(state: DecoderState) -> list[str]:
    """One name a tensor, in the order of `DecoderState.tensors`: `layer_0_h`, `layer_0_c`, `feed_0`, ..."""
    names = [f"layer_{index}_{'hc'[part]}" for index, layer in enumerate(state.layers) for part in range(len(layer))]
    names += [f"feed_{index}" for index in range(len(state.feed))]
    return names + [f"alignment_{index}" for index in range(len(state.alignment))]


class EncoderGraph(nn.Module):
    """
    Source ids and mask [B, S] -> memory_values [B, S', *], memory_keys where they are other tensors, memory_mask
    [B, S'], and every tensor of the decoder's first state.
    """

    def __init__(self, model: RnnSeq2SeqForConditionalGeneration):
        super().__init__()
        self.model = model

    def start(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[PreparedMemory, DecoderState]:
        model = self.model.model
        output = model.encoder(input_ids, attention_mask, return_dict=True)
        return model._start(output, None)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        prepared, state = self.start(input_ids, attention_mask)
        return (*memory_tensors(prepared), *state.tensors())


def memory_tensors(prepared: PreparedMemory) -> list[torch.Tensor]:
    """Each once: values, keys unless they are the values, mask."""
    keys = [] if prepared.keys is prepared.values else [prepared.keys]
    return [prepared.values, *keys, prepared.mask]


class StepGraph(nn.Module):
    """
    One token, `input_ids` [B, 1], what the encoder made, and the state -> scores `logits` [B, V] as the model's, the
    attention weights `attention` [B, heads, S'], and the next state.

    Args:
        model: the model.
        state: any state of its decoder, for its structure.
    """

    def __init__(self, model: RnnSeq2SeqForConditionalGeneration, state: DecoderState, keys: bool):
        super().__init__()
        self.model, self.state, self.keys = model, state, keys

    def forward(self, input_ids: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """
        Args:
            tensors: `copy_ids` [B, S] of a head that copies, then `memory_tensors`, then the state's. With `copy_ids`
                scores are [B, V + S].
        """
        model, config = self.model.model, self.model.config
        rest = list(tensors)
        copied: tuple[torch.Tensor | None, int] = (None, 0)
        if self.model.head.copies:
            copy_ids = rest.pop(0)
            copied = (copy_ids, copy_ids.size(1))
            input_ids = input_ids.masked_fill(input_ids >= config.vocab_size, cast(int, config.unk_token_id))
        values = rest.pop(0)
        keys = rest.pop(0) if self.keys else values
        prepared = PreparedMemory(keys, values, rest.pop(0))
        output, state = model.decoder(
            model.decoder.embed_tokens(input_ids), self.state.replace_tensors(rest), prepared
        )
        scores = self.model.head(HeadInput(output.features, output.weights, output.gate_input, *copied)).squeeze(1)
        return (as_logits(scores, config.output_normalizer), output.weights.squeeze(2), *state.tensors())
