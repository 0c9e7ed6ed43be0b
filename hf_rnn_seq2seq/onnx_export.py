"""
Export of a trained model: ONNX files that run without torch, and `torch.export` programs.

    export_onnx(model, "outputs/mine_onnx", tokenizer=tokenizer)

Two graphs, because decoding is a loop around the second: the encoder with the decoder's first state, and one decoder
step. Batch size, source length and whatever grows while decoding are dynamic in both.

ONNX needs the packages onnx, onnxscript and onnxruntime (`pip install hf-rnn-seq2seq[onnx]`).
"""

import copy
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.export import Dim, ExportedProgram
from transformers import PreTrainedTokenizerBase

from . import onnx_runner
from .attention import PreparedMemory
from .cache_rnn_seq2seq import DecoderState
from .modeling_rnn_seq2seq import RnnSeq2SeqForConditionalGeneration
from .onnx_graphs import Backend, EncoderGraph, StepGraph, exporting, memory_tensors, state_names, without_loops
from .onnx_runner import DECODER, ENCODER, PAST, PRECISIONS, PRESENT, Precision, file_name

if TYPE_CHECKING:
    import onnx
    from google.protobuf.message import Message

# How far a graph in float32 may be from the model: absolute for weights and probabilities, relative to the largest
# value for larger things.
TOLERANCE = 1e-4

# From here on weights are kept in a file of their own beside the graph, which may be 2 GB at most, in bytes.
EXTERNAL_DATA = 2**30


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


def export_programs(model: RnnSeq2SeqForConditionalGeneration, backend: Backend = "torch") -> Programs:
    """
    `torch.export` of the encoder and of one decoder step, see [`EncoderGraph`] and [`StepGraph`].

    torch takes a `pyramidal` encoder's program only for sources longer than 2^(L-1), padding included.

    Args:
        model: is left as it is.
        backend: "torch" gives programs that torch can run; "onnx" those for `torch.onnx.export`.

    Raises:
        ValueError: a `conv` encoder of fewer than 3 positions.
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
    one, other = make_sample(model, 3, lengths[0], past=4), make_sample(model, 2, lengths[1], past=7)
    copied = ["copy_ids"] if model.head.copies else []
    memory = ["memory_values", *(["memory_keys"] if one.graph.keys else []), "memory_mask"]
    state = state_names(one.state)
    names = [*copied, *memory, *(PAST + name for name in state)]

    # An axis is dynamic if two batches differ in it; by how much says what it is.
    kinds = {(3, 2): "batch", (4, 7): "past"}
    kinds[one.prepared.mask.size(1), other.prepared.mask.size(1)] = "memory" if shortens else "source"
    axes: dict[str, dict[int, str]] = {}
    for name, a, b in zip(names, one.step_tensors(), other.step_tensors(), strict=True):
        sizes = enumerate(zip(a.shape, b.shape, strict=True))
        axes[name] = {axis: kinds[pair] for axis, pair in sizes if pair[0] != pair[1]}
    encoder_inputs = {name: {0: "batch", 1: "source"} for name in ("input_ids", "attention_mask")}
    step_inputs = {"input_ids": {0: "batch"}, **axes}

    dims = {name: Dim(name) for name in ("batch", "past", "memory", "source")}
    if shortens:
        dims["source"] = Dim("source", min=2 ** (model.config.encoder_layers - 1) + 1)
    elif model.config.encoder_type == "conv":
        dims["source"] = Dim("source", max=model.config.max_source_positions)

    def dynamic(inputs: dict[str, dict[int, str]]) -> list[dict[int, Dim]]:
        return [{axis: dims[kind] for axis, kind in one_input.items()} for one_input in inputs.values()]

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


def export_onnx(
    model: RnnSeq2SeqForConditionalGeneration,
    folder: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    precisions: Sequence[Precision] = ("float32",),
) -> None:
    """
    Writes a folder that [`RnnSeq2SeqOnnx`] and, without torch and transformers, `onnx_runner.py` run: both graphs,
    config.json, generation_config.json, the tokenizer's files, and that runner itself.

    Args:
        model: any [`RnnSeq2SeqForConditionalGeneration`]; is left as it is.
        folder: is made if need be; files of the same names are overwritten.
        tokenizer: its files go into the folder.
        precisions: "float32", and "int8" for weights quantised by ONNX Runtime (`quantize_dynamic`) in files of their
            own; activations are quantised while running. An LSTM's matrices, matrix products and embeddings are
            quantised; a GRU's or simple cell's in the encoder are not, for which ONNX Runtime has no kernels.

    Raises:
        ValueError: a precision that does not exist.
        RuntimeError: the graph does not compute what the model does, for two more batch sizes and lengths with padding
            on either side; nothing is written then.
    """
    import onnx

    for precision in precisions:
        if precision not in PRECISIONS:
            raise ValueError(f"`precisions` may hold {', '.join(PRECISIONS)}, got {precision!r}.")
    programs = export_programs(model, "onnx")
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        unchecked = Path(name)
        for file, graph in ((ENCODER, programs.encoder), (DECODER, programs.step)):
            proto = to_onnx(graph)
            external = proto.ByteSize() > EXTERNAL_DATA
            path = unchecked / file_name(file, "float32")
            onnx.save(proto, path, save_as_external_data=external, location=f"{path.name}.data")
        error = largest_error(model, unchecked)
        if not error < TOLERANCE:
            raise RuntimeError(
                f"The exported graphs differ from the model by {error:.1e}, more than {TOLERANCE:.0e}: nothing was "
                "written."
            )
        if "int8" in precisions:
            for file in (ENCODER, DECODER):
                quantize(unchecked / file_name(file, "float32"), unchecked / file_name(file, "int8"))
        folder.mkdir(exist_ok=True)
        for path in sorted(unchecked.iterdir()):
            if "float32" in precisions or path.name.endswith("_int8.onnx"):
                shutil.move(path, folder / path.name)
    model.config.to_json_file(folder / "config.json", use_diff=False)  # the runner knows no defaults
    model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    shutil.copy(onnx_runner.__file__, folder / "onnx_runner.py")


def to_onnx(graph: Graph) -> "onnx.ModelProto":
    """The graph for ONNX, with its tensors and dynamic axes under their names."""
    with exporting():
        exported = torch.onnx.export(
            graph.program, input_names=list(graph.inputs), output_names=list(graph.outputs), dynamo=True, verbose=False
        )
    assert exported is not None
    proto = exported.model_proto
    # Shapes of intermediate results, by names of the exporter's own; quantisation takes them for fixed.
    del proto.graph.value_info[:]
    remove_notes(proto)
    for value in (*proto.graph.input, *proto.graph.output):
        for axis, name in {**graph.inputs, **graph.outputs}[value.name].items():
            value.type.tensor_type.shape.dim[axis].dim_param = name
    return proto


def remove_notes(message: "Message") -> None:
    """Takes out of a model, and all in it, where in which file of Python each node comes from."""
    for field, value in message.ListFields():
        if field.name == "metadata_props":
            message.ClearField(field.name)
        elif field.name != "raw_data" and field.message_type is not None:
            for part in value if field.is_repeated else [value]:
                remove_notes(part)


def quantize(path: Path, output: Path) -> None:
    """ONNX Runtime's dynamic quantisation to 8 bits of one graph, a scale for each column of a matrix."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(path, output, weight_type=QuantType.QInt8, per_channel=True)


def largest_error(
    model: RnnSeq2SeqForConditionalGeneration, folder: str | os.PathLike[str], precision: Precision = "float32"
) -> float:
    """
    How far the graphs in a folder are from the model: the largest difference of anything that comes out of encoder and
    step, given the same, relative to the largest value of its kind where that is above 1; of `logits` their softmax is
    compared. Two batch sizes and source lengths, padded on either side, at the first token and later.

    A model may magnify rounding errors, as layer normalisation of nearly equal values does: three times what changing
    its weights at random by one part in a million does to a tensor does not count.
    """
    import onnxruntime

    sessions = [
        onnxruntime.InferenceSession(Path(folder) / file_name(file, precision), providers=["CPUExecutionProvider"])
        for file in (ENCODER, DECODER)
    ]
    exact = without_loops(model, "none").double()
    changed = [change_weights(exact, seed) for seed in range(3)]
    length, longer = sample_lengths(model)
    error = 0.0
    for batch, size, past, side in ((1, longer, 0, "right"), (4, length - 1, 3, "left")):
        sample = make_sample(exact, batch, size, past, side)
        results = [sample.run(one) for one in (exact, *changed)]
        for session, tensors, *wanted in zip(sessions, sample.inputs(), *results, strict=True):
            feeds = {
                one.name: (tensor.float() if tensor.is_floating_point() else tensor).numpy()
                for one, tensor in zip(session.get_inputs(), tensors, strict=True)
            }
            for one, found, *others in zip(session.get_outputs(), session.run(None, feeds), *wanted, strict=True):
                if found.shape != tuple(others[0].shape):
                    raise RuntimeError(f"`{one.name}` has shape {found.shape}, the model's {tuple(others[0].shape)}.")
                if found.size == 0:
                    continue
                values = [torch.as_tensor(value).double() for value in (found, *others)]
                if one.name == "logits":
                    values = [torch.softmax(value, dim=-1) for value in values]
                graph, want, *near = values
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
