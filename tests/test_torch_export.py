"""A model's two graphs as torch.export programs."""

from typing import Any

import pytest
import torch
from models import name_of, tiny_model

from hf_rnn_seq2seq.torch_export import Limits, export_programs, largest_error, make_sample


@pytest.mark.parametrize(
    "setting",
    [
        {"cell_type": "gru", "encoder_layers": 1},
        {"attention_type": "dot", "decoder_self_attention": True, "attention_normalizer": "sparsemax"},
        {"encoder_type": "pyramidal", "encoder_layers": 2, "cell_type": "ssru", "attention_type": "monotonic"},
        {"encoder_type": "conv", "encoder_layers": 1, "head_type": "pointer_generator"},
    ],
    ids=name_of,
)
def test_programs_of_torch_export(setting: dict[str, Any]) -> None:
    model = tiny_model(**setting).float()
    programs = export_programs(model)
    encoder, step = programs.encoder.program.module(), programs.step.program.module()
    for batch, length, past, side in ((2, 11, 2, "left"), (5, 6, 4, "right")):
        sample = make_sample(model, batch, length, past, side)
        source, token = sample.inputs()
        wanted = sample.run(model)
        for found, want in ((encoder(*source), wanted[0]), (step(*token), wanted[1])):
            torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-4)
    names = list(programs.step.inputs)
    assert names[0] == "input_ids"
    assert programs.step.inputs["memory_mask"][0] == "batch"


def test_limits() -> None:
    model = tiny_model(decoder_self_attention=True).float()
    programs = export_programs(model, limits=Limits(batch=1, source=12, past=5))
    assert set(programs.step.inputs["memory_mask"].values()) == {"batch", "source"}
    encoder, step = programs.encoder.program.module(), programs.step.program.module()
    sample = make_sample(model, 1, 12, past=5)
    for program, inputs, wanted in zip((encoder, step), sample.inputs(), sample.run(model), strict=True):
        torch.testing.assert_close(program(*inputs), wanted, atol=1e-5, rtol=1e-4)
    for batch, length, past, message in ((2, 12, 5, "1"), (1, 13, 5, "12"), (1, 12, 6, "5")):
        (*source,), (*token,) = make_sample(model, batch, length, past).inputs()
        program, inputs = (step, token) if past > 5 else (encoder, source)
        with pytest.raises(Exception, match=message):
            program(*inputs)


@pytest.mark.parametrize(
    ("setting", "limits", "message"),
    [
        ({"encoder_type": "conv", "max_source_positions": 2}, None, r"`max_source_positions`=2: .* at least 3"),
        ({}, Limits(1, 8, 9), r"at least Limits\(batch=1, source=9, past=4\), got Limits\(batch=1, source=8, past=9"),
        ({}, Limits(0, 9, 9), r"got Limits\(batch=0"),
        ({}, Limits(1, 9, 3), r"past=3"),
    ],
)
def test_refusals(setting: dict[str, Any], limits: Limits | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        export_programs(tiny_model(**setting), limits=limits)


def test_largest_error_is_relative_and_sees_every_output() -> None:
    model = tiny_model().float()
    sizes = [(2, 5, 1, "right")]
    sample = make_sample(model.double(), *sizes[0])
    outputs = [["memory", "keys", "mask", "h", "c", "feed"][: len(wanted)] for wanted in sample.run(model)]
    outputs[1] = ["logits", *(str(index) for index in range(len(sample.run(model)[1]) - 1))]

    def spoilt(graph: int, output: int) -> list[Any]:
        runs = []
        for index, wanted in enumerate(sample.run(model)):
            values = list(wanted)
            if index == graph:
                values[output] = values[output].double() + 0.5 * torch.eye(*values[output].flatten(1).shape).view_as(
                    values[output]
                )
            runs.append(lambda tensors, values=values: values)
        return runs

    outputs[0] = [str(index) for index in range(len(sample.run(model)[0]))]
    assert largest_error(model, spoilt(2, 0), outputs, sizes) < 1e-6
    for graph, names in enumerate(outputs):
        for output in range(len(names)):
            assert largest_error(model, spoilt(graph, output), outputs, sizes) > 1e-3, (graph, output)
