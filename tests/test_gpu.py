"""On a CUDA device: the same results as on the CPU, mixed precision, and nothing that waits for the device."""

from typing import Any

import pytest
import torch
from models import CONFIGURATIONS, batch_of, name_of, ragged_batch, tiny_config, tiny_model

from hf_rnn_seq2seq import RnnSeq2SeqForConditionalGeneration

pytestmark = pytest.mark.gpu

LENGTHS = [5, 1, 3]
TARGET = torch.tensor([[1, 4, 5, 6], [1, 7, 8, 3], [1, 9, 9, 4]])


@pytest.mark.parametrize("setting", CONFIGURATIONS, ids=name_of)
def test_equals_the_cpu(setting: dict[str, Any]) -> None:
    model = tiny_model(**setting)
    source, mask = ragged_batch(LENGTHS)
    batch = batch_of(model, source, mask)
    on_cuda = {name: value.cuda() for name, value in batch.items()}
    expected = model(**batch, labels=TARGET)
    expected.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()
                 if parameter.grad is not None}  # fmt: skip
    ids = model.generate(**batch, max_new_tokens=6, num_beams=3)
    model.zero_grad()
    model.cuda()
    out = model(**on_cuda, labels=TARGET.cuda())
    out.loss.backward()
    torch.testing.assert_close(out.logits.cpu(), expected.logits, rtol=0, atol=1e-9)
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad.cpu(), gradient, rtol=1e-5, atol=1e-7)
    on_gpu = model.generate(**on_cuda, max_new_tokens=6, num_beams=3)
    assert torch.equal(on_gpu.cpu(), ids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("setting", CONFIGURATIONS[:8], ids=name_of)
def test_autocast(setting: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = RnnSeq2SeqForConditionalGeneration(tiny_config(**setting)).eval().cuda()
    source, mask = (tensor.cuda() for tensor in ragged_batch(LENGTHS))
    batch = batch_of(model, source, mask)
    expected = model(**batch, labels=TARGET.cuda()).loss
    with torch.autocast("cuda", dtype):
        loss = model(**batch, labels=TARGET.cuda()).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.02)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("setting", CONFIGURATIONS[:8], ids=name_of)
def test_a_training_step_never_waits_for_the_device(setting: dict[str, Any]) -> None:
    model = tiny_model(**setting).float().cuda().train()
    source, mask = (tensor.cuda() for tensor in ragged_batch(LENGTHS))
    batch, labels = batch_of(model, source, mask), TARGET.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**batch, labels=labels).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
