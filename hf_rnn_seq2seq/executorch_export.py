"""
Export of a trained model to ExecuTorch, PyTorch's runtime for phones and other small devices.

    export_executorch(model, "outputs/mine_executorch", tokenizer=tokenizer)

Needs the package executorch, in a version that goes with torch's, which no other part of this package does.
"""

import functools
import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch
from transformers import PreTrainedTokenizerBase
from transformers.exporters.utils import apply_patches

from .modeling_rnn_seq2seq import RnnSeq2SeqForConditionalGeneration
from .torch_export import DECODER, ENCODER, TOLERANCE, Graph, Limits, export_programs, largest_error, sample_lengths

if TYPE_CHECKING:
    from executorch.runtime import Method

ExecutorchBackend = Literal["portable", "xnnpack"]

LIMITS = Limits(batch=1, source=128, past=128)


def export_executorch(
    model: RnnSeq2SeqForConditionalGeneration,
    folder: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    limits: Limits = LIMITS,
    backend: ExecutorchBackend = "xnnpack",
) -> None:
    """
    Writes encoder_model.pte and decoder_model.pte, in float32, whose one method `forward` takes and gives what
    [`EncoderGraph`] and [`StepGraph`] do, config.json, generation_config.json and the tokenizer's files.

    Greedy search by ExecuTorch's Python bindings (C++, Java and Swift have the like):

        encoder, step = (Runtime.get().load_program(path).load_method("forward") for path in (..., ...))
        memory = encoder.execute([input_ids, attention_mask])  # with the first state behind it
        logits, attention, *state = step.execute([token, *memory])
        memory[len(memory) - len(state):] = state

    A head that copies takes `copy_ids` between `token` and `memory`.

    Args:
        model: is left as it is.
        folder: is made if need be; files of the same names are overwritten.
        tokenizer: its files go into the folder.
        limits: ExecuTorch reserves all memory beforehand, and its loops take one batch size.
        backend: "xnnpack" has fast kernels for CPUs; what these do not cover stays with the "portable" ones.

    Raises:
        ValueError: limits or a backend that can't be.
        RuntimeError: the programs do not compute what the model does; nothing is written then. ExecuTorch itself
            raises this and other errors where it has no kernel for an operation (sorting is one: no sparse
            normalisers).
    """
    if backend not in get_args(ExecutorchBackend):
        raise ValueError(f"`backend` must be one of {', '.join(get_args(ExecutorchBackend))}, got {backend!r}.")
    from executorch.runtime import Runtime

    programs = export_programs(model, limits=limits)
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        paths, runs = [], []
        for file, graph in ((ENCODER, programs.encoder), (DECODER, programs.step)):
            path = Path(name) / f"{file}.pte"
            path.write_bytes(lower(graph, backend))
            paths.append(path)
            runs.append(functools.partial(execute, Runtime.get().load_program(path).load_method("forward")))
        length, longer = sample_lengths(model)
        longer = min(longer, limits.source)
        sizes = [(limits.batch, longer, 0, "right"), (limits.batch, length - 1, 3, "left")]
        error = largest_error(model, runs, [list(graph.outputs) for graph in programs], sizes)
        if not error < TOLERANCE:
            raise RuntimeError(
                f"The lowered programs differ from the model by {error:.1e}, more than {TOLERANCE:.0e}: nothing was "
                "written."
            )
        folder.mkdir(exist_ok=True)
        for path in paths:
            path.replace(folder / path.name)
    model.config.to_json_file(folder / "config.json", use_diff=False)
    model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def lower(graph: Graph, backend: ExecutorchBackend) -> bytes:
    """A program for ExecuTorch's runtime, the contents of its file."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from transformers.exporters import exporter_executorch  # noqa: F401  # registers the patches

    with ExitStack() as patches:  # without them XNNPACK refuses values that leave a part of the graph twice
        patches.enter_context(apply_patches("executorch"))
        patches.enter_context(apply_patches("executorch.xnnpack"))
        partitioners = [XnnpackPartitioner()] if backend == "xnnpack" else []
        return to_edge_transform_and_lower(graph.program, partitioner=partitioners).to_executorch().buffer


def execute(method: "Method", tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """ExecuTorch takes no strides."""
    return method.execute([tensor.contiguous() for tensor in tensors])
