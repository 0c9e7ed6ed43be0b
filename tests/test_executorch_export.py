"""Programs lowered for ExecuTorch, run by its own runtime; skipped where the package executorch is not installed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import batch_of, name_of, ragged_batch, tiny_model

pytest.importorskip("executorch")

from executorch.runtime import Runtime

from hf_rnn_seq2seq import executorch_export
from hf_rnn_seq2seq.executorch_export import execute, export_executorch
from hf_rnn_seq2seq.torch_export import DECODER, ENCODER, Limits

LIMITS = Limits(batch=1, source=16, past=10)
SETTINGS = [
    {"cell_type": "lstm", "attention_type": "general", "wiring_type": "input_feeding"},
    {"cell_type": "gru", "attention_type": "additive", "wiring_type": "bahdanau"},
]


def greedy(folder: Path, inputs: list[torch.Tensor], copied: list[torch.Tensor], eos: int, steps: int) -> list[int]:
    """One source's ids by the loop of `export_executorch`'s documentation."""
    encoder, step = (
        Runtime.get().load_program(folder / f"{file}.pte").load_method("forward") for file in (ENCODER, DECODER)
    )
    memory = list(execute(encoder, inputs))
    ids = [1]
    while ids[-1] != eos and len(ids) <= steps:
        logits, _, *state = execute(step, [torch.tensor([ids[-1:]]), *copied, *memory])
        ids.append(int(logits.argmax()))
        memory[len(memory) - len(state) :] = state
    return ids


@pytest.mark.parametrize("backend", ["portable", "xnnpack"])
@pytest.mark.parametrize("setting", SETTINGS, ids=name_of)
def test_greedy_search_gives_the_models_ids(setting: dict[str, Any], backend: Any, tmp_path: Path) -> None:
    model: Any = tiny_model(**setting).float()
    export_executorch(model, tmp_path / "lowered", limits=LIMITS, backend=backend)
    assert {path.name for path in (tmp_path / "lowered").iterdir()} == {
        "encoder_model.pte", "decoder_model.pte", "config.json", "generation_config.json",
    }  # fmt: skip
    for lengths, side in (([16], "right"), ([7], "right"), ([1], "left"), ([9, 4], "left"), ([12, 5], "right")):
        source, mask = ragged_batch(lengths, side)
        batch = batch_of(model, source, mask)
        wanted = model.generate(**batch, max_new_tokens=8).tolist()
        for row, ids in enumerate(wanted):
            one = {name: tensor[row : row + 1] for name, tensor in batch.items()}
            inputs = [one.pop("input_ids"), one.pop("attention_mask")]
            found = greedy(tmp_path / "lowered", inputs, list(one.values()), eos=2, steps=8)
            assert found == ids[: len(found)]
            assert set(ids[len(found) :]) <= {0}


def test_programs_that_differ_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executorch_export, "TOLERANCE", 0.0)
    with pytest.raises(RuntimeError, match=r"differ from the model by .* nothing was written"):
        export_executorch(tiny_model(), tmp_path / "lowered", limits=LIMITS, backend="portable")
    assert list(tmp_path.iterdir()) == []


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`backend` must be one of portable, xnnpack, got 'coreml'"):
        export_executorch(tiny_model(), tmp_path, backend="coreml")  # type: ignore[arg-type]
