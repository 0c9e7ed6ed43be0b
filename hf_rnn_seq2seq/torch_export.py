"""
A model's two graphs as `torch.export` programs, and how near to the model they stay wherever they run.

Decoding is a loop around the second graph: there is the encoder with the decoder's first state, and one decoder step.
Source length and whatever grows while decoding are dynamic in both, and so is the batch unless `Limits` are given.
"""

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.export import Dim, ExportedProgram

from .attention import PreparedMemory
from .cache_rnn_seq2seq import DecoderState
from .modeling_rnn_seq2seq import RnnSeq2SeqForConditionalGeneration
from .onnx_graphs import Backend, EncoderGraph, StepGraph, exporting, memory_tensors, state_names, without_loops

# Of the files of both graphs, without a suffix, and of the state that goes into a step and comes out of it: as
# onnx_runner.py has them, which imports nothing of this package.
ENCODER, DECODER = "encoder_model", "decoder_model"
PAST, PRESENT = "past_", "present_"

# How far a graph in float32 may be from the model: absolute for weights and probabilities, relative to the largest
# value for larger things.
TOLERANCE = 1e-4

# After how many tokens the steps are that are traced and compared to learn which axes grow.
PAST_TOKENS = (4, 7)


class Sample(NamedTuple):
    """One batch on its way through a model."""

    source: torch.Tensor  # [B, S]
    mask: torch.Tensor  # [B, S]
    token: torch.Tensor  # the next, [B, 1]
    prepared: PreparedMemory
    state: DecoderState  # after some tokens
    graph: StepGraph

    def step_tensors(self) -> list[torch.Tensor]:
        """[`StepGraph.forward`]'s after the token, with any target ids for a head that copies."""
        model = self.graph.model
        copy_ids = [self.source % model.config.vocab_size] if model.head.copies else []
        return [*copy_ids, *memory_tensors(self.prepared), *self.state.tensors()]

    def inputs(self) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Of both graphs."""
        return (self.source, self.mask), (self.token, *self.step_tensors())

    @torch.no_grad()
    def run(
        self, model: RnnSeq2SeqForConditionalGeneration
    ) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """What both graphs of a model give by torch."""
        source, step = self.inputs()
        return EncoderGraph(model)(*source), StepGraph(model, self.state, self.graph.keys)(*step)


def make_sample(
    model: RnnSeq2SeqForConditionalGeneration, batch: int, length: int, past: int, side: str = "right"
) -> Sample:
    """Random rows, the first of which is as long as the batch, and the state after `past` random tokens."""
    generator = torch.Generator().manual_seed(length)
    source = torch.randint(model.config.source_size, (batch, length), generator=generator)
    tokens = torch.randint(model.config.vocab_size, (past + 1, batch, 1), generator=generator)
    positions = torch.arange(length).expand_as(source)
    lengths = (length - torch.arange(batch)).clamp(min=1).unsqueeze(1)
    mask = (positions < lengths if side == "right" else positions >= length - lengths).long()
    with torch.no_grad():
        prepared, state = EncoderGraph(model).start(source, mask)
        state = state.map(torch.Tensor.detach)  # a learnt first state is a view of parameters
        graph = StepGraph(model, state, keys=prepared.keys is not prepared.values)
        sample = Sample(source, mask, tokens[0], prepared, state, graph)
        for following in tokens[1:]:
            outputs = graph(sample.token, *sample.step_tensors())
            sample = sample._replace(token=following, state=state.replace_tensors(list(outputs[2:])))
    return sample


def sample_lengths(model: RnnSeq2SeqForConditionalGeneration) -> tuple[int, int]:
    """Two source lengths that even a pyramid leaves different, and longer than 1."""
    config = model.config
    length = 2 ** (config.encoder_layers + 1 if config.encoder_type == "pyramidal" else 2)
    longest = config.max_source_positions if config.encoder_type == "conv" else 3 * length + 1
    return min(2 * length + 1, longest - 1), min(3 * length + 1, longest)


class Graph(NamedTuple):
    """A graph, and what goes in and comes out: names, and by these the dynamic axes (batch, source, memory, past)."""

    program: ExportedProgram
    inputs: dict[str, dict[int, str]]
    outputs: dict[str, dict[int, str]]


class Programs(NamedTuple):
    """Both graphs of a model."""

    encoder: Graph
    step: Graph


class Limits(NamedTuple):
    """What programs are made for, where a runtime reserves its memory beforehand."""

    batch: int  # rows, neither more nor fewer
    source: int  # positions at most, padding included
    past: int  # target tokens at most


def export_programs(
    model: RnnSeq2SeqForConditionalGeneration, backend: Backend = "torch", limits: Limits | None = None
) -> Programs:
    """
    `torch.export` of the encoder and of one decoder step, see [`EncoderGraph`] and [`StepGraph`].

    torch takes a `pyramidal` encoder's program only for sources longer than 2^(L-1), padding included.

    Args:
        model: is left as it is.
        backend: "torch" gives programs that torch can run; "onnx" those for `torch.onnx.export`.
        limits: fix the batch, and bound the lengths.

    Raises:
        ValueError: a `conv` encoder of fewer than 3 positions; limits below what is traced.
    """
    traced = without_loops(model, backend).float()
    model = without_loops(model, "none").float()
    shortens = model.get_encoder().body.shortens
    lengths = sample_lengths(model)
    if lengths[0] < 2:
        raise ValueError(
            f"`max_source_positions`={model.config.max_source_positions}: an export needs sources of two lengths "
            "above 1, so it must be at least 3."
        )
    if limits is not None and (limits.batch < 1 or limits.source < lengths[0] or limits.past < PAST_TOKENS[0]):
        raise ValueError(f"`limits` must be at least {Limits(1, lengths[0], PAST_TOKENS[0])}, got {limits}.")
    batches = (3, 2) if limits is None else (limits.batch, limits.batch + 1)
    one, other = (make_sample(model, *sizes) for sizes in zip(batches, lengths, PAST_TOKENS, strict=True))
    copied = ["copy_ids"] if model.head.copies else []
    memory = ["memory_values", *(["memory_keys"] if one.graph.keys else []), "memory_mask"]
    state = state_names(one.state)
    names = [*copied, *memory, *(PAST + name for name in state)]

    # An axis is dynamic if two batches differ in it; by how much says what it is.
    kinds = {batches: "batch", PAST_TOKENS: "past"}
    kinds[one.prepared.mask.size(1), other.prepared.mask.size(1)] = "memory" if shortens else "source"
    axes: dict[str, dict[int, str]] = {}
    for name, a, b in zip(names, one.step_tensors(), other.step_tensors(), strict=True):
        sizes = enumerate(zip(a.shape, b.shape, strict=True))
        axes[name] = {axis: kinds[pair] for axis, pair in sizes if pair[0] != pair[1]}
    encoder_inputs = {name: {0: "batch", 1: "source"} for name in ("input_ids", "attention_mask")}
    step_inputs = {"input_ids": {0: "batch"}, **axes}

    longest = None if limits is None else limits.source
    if model.config.encoder_type == "conv":
        positions = model.config.max_source_positions
        longest = positions if longest is None else min(longest, positions)
    joined = 2 ** (model.config.encoder_layers - 1) if shortens else 1
    dims = {
        "past": Dim("past", max=None if limits is None else limits.past),
        "memory": Dim("memory", max=None if longest is None else -(-longest // joined)),
        "source": Dim("source", min=joined + 1 if shortens else None, max=longest),
    }
    if limits is None:
        dims["batch"] = Dim("batch")

    def dynamic(inputs: dict[str, dict[int, str]]) -> list[dict[int, Dim]]:
        return [{axis: dims[kind] for axis, kind in one.items() if kind in dims} for one in inputs.values()]

    step = StepGraph(traced, one.state, one.graph.keys)
    with exporting():
        encoder_program = torch.export.export(
            EncoderGraph(traced),
            (one.source, one.mask),
            dynamic_shapes=tuple(dynamic(encoder_inputs)),
            strict=False,
        )
        token_shape, *shapes = dynamic(step_inputs)
        step_program = torch.export.export(
            step, (one.token, *one.step_tensors()), dynamic_shapes=(token_shape, tuple(shapes)), strict=False
        )
    step_outputs: dict[str, dict[int, str]] = {"logits": {0: "batch"}, "attention": {0: "batch"}}
    for name in state:
        kept = {axis: kind if kind != "past" else "past + 1" for axis, kind in axes[PAST + name].items()}
        step_outputs[PRESENT + name] = kept
    encoder_outputs = {name: axes[name] for name in names[len(copied) :]}
    return Programs(
        Graph(encoder_program, encoder_inputs, encoder_outputs), Graph(step_program, step_inputs, step_outputs)
    )


def largest_error(
    model: RnnSeq2SeqForConditionalGeneration,
    runs: Sequence[Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]],
    outputs: Sequence[Sequence[str]],
    sizes: Sequence[tuple[int, int, int, str]],
) -> float:
    """
    How far encoder and step are from the model where they run: the largest difference of anything that comes out of
    them, given the same, relative to the largest value of its kind where that is above 1; of `logits` their softmax is
    compared.

    A model may magnify rounding errors, as layer normalisation of nearly equal values does: three times what changing
    its weights at random by one part in a million does to a tensor does not count.

    Args:
        model: in any precision.
        runs: the encoder and the step, from the graph's inputs in float32 to its outputs.
        outputs: the outputs' names, of both.
        sizes: batch, source length, past tokens and side of the padding of what they are to be given.

    Raises:
        RuntimeError: an output has another shape than the model's.
    """
    exact = without_loops(model, "none").double()
    changed = [change_weights(exact, seed) for seed in range(3)]
    error = 0.0
    for size in sizes:
        sample = make_sample(exact, *size)
        results = [sample.run(one) for one in (exact, *changed)]
        for run, names, tensors, *wanted in zip(runs, outputs, sample.inputs(), *results, strict=True):
            found = run([tensor.float() if tensor.is_floating_point() else tensor for tensor in tensors])
            for name, *values in zip(names, found, *wanted, strict=True):
                if values[0].shape != values[1].shape:
                    raise RuntimeError(
                        f"`{name}` has shape {tuple(values[0].shape)}, the model's {tuple(values[1].shape)}."
                    )
                if values[0].numel() == 0:
                    continue
                graph, want, *near = (
                    torch.softmax(v.double(), dim=-1) if name == "logits" else v.double() for v in values
                )
                difference = (graph - want).abs().max() - 3 * max((value - want).abs().max() for value in near)
                relative = difference / want.abs().max().clamp(min=1.0)
                error = max(error, float(relative.nan_to_num(nan=torch.inf)))
    return error


def change_weights(model: RnnSeq2SeqForConditionalGeneration, seed: int) -> RnnSeq2SeqForConditionalGeneration:
    """A copy with every weight changed by about one part in a million."""
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1 + 1e-6 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
    return model
