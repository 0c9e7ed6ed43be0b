"""
Export of a trained model: ONNX files that run without torch.

    export_onnx(model, "outputs/mine_onnx", tokenizer=tokenizer)

Two graphs that decoding of any kind can be built of, the encoder with the decoder's first state and one decoder step,
and two more around that step, greedy and beam search (see onnx_search.py). Batch size, source length and whatever
grows while decoding are dynamic in all.

Needs the packages onnx, onnxscript and onnxruntime (`pip install hf-rnn-seq2seq[onnx]`).
"""

import functools
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedTokenizerBase

from . import onnx_runner, torch_export
from .modeling_rnn_seq2seq import RnnSeq2SeqForConditionalGeneration
from .onnx_graphs import exporting
from .onnx_runner import BEAM_SEARCH, DECODER, ENCODER, GREEDY_SEARCH, PRECISIONS, Precision, file_name
from .torch_export import TOLERANCE, Graph, export_programs, sample_lengths

if TYPE_CHECKING:
    import onnx
    import onnxruntime
    from google.protobuf.message import Message

# From here on an encoder's weights, too, are in a file of their own beside the graph, which may have 2 GB, in bytes.
EXTERNAL_DATA = 2**30


def export_onnx(
    model: RnnSeq2SeqForConditionalGeneration,
    folder: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    precisions: Sequence[Precision] = ("float32",),
) -> None:
    """
    Writes a folder that [`RnnSeq2SeqOnnx`] and, without torch and transformers, `onnx_runner.py` run: the graphs,
    config.json, generation_config.json, the tokenizer's files, and that runner itself. A step's weights are in one
    file (decoder_model.onnx.data) that the step and both searches read.

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

    from .onnx_search import beam_search, greedy_search

    for precision in precisions:
        if precision not in PRECISIONS:
            raise ValueError(f"`precisions` may hold {', '.join(PRECISIONS)}, got {precision!r}.")
    programs = export_programs(model, "onnx")
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        unchecked = Path(name)
        for file, graph in ((ENCODER, programs.encoder), (DECODER, programs.step)):
            save(to_onnx(graph), unchecked / file_name(file, "float32"))
        error = largest_error(model, unchecked)
        if not error < TOLERANCE:
            raise RuntimeError(
                f"The exported graphs differ from the model by {error:.1e}, more than {TOLERANCE:.0e}: nothing was "
                "written."
            )
        if "int8" in precisions:
            for file in (ENCODER, DECODER):
                quantize(unchecked / file_name(file, "float32"), unchecked / file_name(file, "int8"))
        for precision in precisions:
            step = onnx.load(unchecked / file_name(DECODER, precision), load_external_data=False)
            for file, search in ((GREEDY_SEARCH, greedy_search(step)), (BEAM_SEARCH, beam_search(step))):
                onnx.save(search, unchecked / file_name(file, precision))
        folder.mkdir(exist_ok=True)
        for path in sorted(unchecked.iterdir()):
            if "float32" in precisions or "_int8.onnx" in path.name:
                shutil.move(path, folder / path.name)
    model.config.to_json_file(folder / "config.json", use_diff=False)  # the runner knows no defaults
    model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    shutil.copy(onnx_runner.__file__, folder / "onnx_runner.py")


def save(proto: "onnx.ModelProto", path: Path) -> None:
    """Writes a graph: a decoder's weights, or very many, into a file of their own beside it, the rest with it."""
    import onnx

    external, weights = path.name.startswith(DECODER) or proto.ByteSize() > EXTERNAL_DATA, Path(f"{path}.data")
    onnx.save(proto, path, save_as_external_data=external, location=weights.name)
    if weights.exists():  # not with small tensors alone
        shutil.copymode(path, weights)  # onnx lets nobody else read it


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
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(path, output, weight_type=QuantType.QInt8, per_channel=True)
    save(onnx.load(output), output)


def largest_error(
    model: RnnSeq2SeqForConditionalGeneration, folder: str | os.PathLike[str], precision: Precision = "float32"
) -> float:
    """
    How far the graphs in a folder are from the model, see `torch_export.largest_error`: for two batch sizes and source
    lengths, padded on either side, at the first token and later.
    """
    import onnxruntime

    runs, outputs = [], []
    for file in (ENCODER, DECODER):
        path = Path(folder) / file_name(file, precision)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        outputs.append([output.name for output in session.get_outputs()])
        runs.append(functools.partial(run_session, session))
    length, longer = sample_lengths(model)
    sizes = [(1, longer, 0, "right"), (4, length - 1, 3, "left")]
    return torch_export.largest_error(model, runs, outputs, sizes)


def run_session(session: "onnxruntime.InferenceSession", tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    feeds = {one.name: tensor.numpy() for one, tensor in zip(session.get_inputs(), tensors, strict=True)}
    return [torch.as_tensor(array) for array in session.run(None, feeds)]
