"""torch.compile: whole models in one graph, with the same gradients, which then takes other lengths."""

from typing import Any

import pytest
import torch
from models import CONFIGURATIONS, VOCABULARY, name_of, tiny_model
from torch._dynamo.testing import CompileCounterWithBackend

CLOSE = {"atol": 1e-9, "rtol": 1e-7}
SETTINGS = [
    {"wiring_type": "input_feeding", "attention_type": "additive", "encoder_layers": 1},
    pytest.param(
        {"wiring_type": "output_only", "cell_type": "gru", "attention_type": "dot", "encoder_layers": 1},
        marks=pytest.mark.slow,
    ),
    *(pytest.param(setting, marks=pytest.mark.slow) for setting in CONFIGURATIONS[::30]),
]


def batch(rows: int, source: int, target: int, vocabulary: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(rows, source, dtype=torch.long)
    mask[1, -2:] = 0
    labels = torch.randint(3, VOCABULARY, (rows, target))
    return {"input_ids": torch.randint(3, vocabulary, (rows, source)), "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("setting", SETTINGS, ids=name_of)
def test_gradients_are_the_same_and_other_lengths_take_one_more_graph(setting: dict[str, Any]) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    model = tiny_model(**setting)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    weights = [weight for weight in model.parameters() if weight.numel()]
    graphs = []
    for target, source in ((4, 9), (6, 9), (3, 9), (7, 9), (7, 12), (5, 11), (4, 17)):
        x = batch(3, source, target, model.config.source_size)
        found, wanted = compiled(**x), model(**x)
        torch.testing.assert_close(found.logits, wanted.logits, **CLOSE)
        gradients = [torch.autograd.grad(one.loss, weights, allow_unused=True) for one in (found, wanted)]
        for one, other in zip(*gradients, strict=True):
            if other is None:
                assert one is None or (one == 0).all()
            else:
                torch.testing.assert_close(one, other, **CLOSE)
        graphs.append(counter.frame_count)
    # One of the first lengths, one for another target length, one for another source length. A decoder that attends
    # to its own past, and goes step by step, has a state that grows: each of its lengths is a graph of its own.
    grows = model.config.decoder_self_attention and model.get_decoder().wiring.sequential
    assert graphs == ([1, 2, 3, 4, 5, 6, 7] if grows else [1, 2, 2, 2, 3, 3, 3])


@pytest.mark.parametrize("zoneout", [0.3, pytest.param(0.0, marks=pytest.mark.slow)])
def test_training_with_dropout_compiles(zoneout: float) -> None:
    torch.compiler.reset()
    model = tiny_model(zoneout=zoneout, dropout=0.3, recurrent_dropout=0.3, encoder_layers=2, decoder_layers=2).train()
    x = batch(3, 6, 5, model.config.source_size)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    losses = []
    for _ in range(2):
        loss = compiled(**x).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[0] != losses[1]
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_cache_goes_on() -> None:
    torch.compiler.reset()
    model = tiny_model(wiring_type="input_feeding")
    encoded = model.get_encoder()(torch.tensor([[5, 6, 7], [8, 9, 3]]), torch.ones(2, 3, dtype=torch.long))
    target = torch.tensor([[1, 4, 5, 6, 7], [1, 7, 8, 3, 3]])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    whole = model(encoder_outputs=encoded, decoder_input_ids=target).logits
    cache, logits = None, []
    for ids in target.split([2, 2, 1], dim=1):  # a cache is made, then changed, by a loop, then by one step
        output = compiled(encoder_outputs=encoded, decoder_input_ids=ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    assert cache.get_seq_length() == target.size(1)
    torch.testing.assert_close(torch.cat(logits, dim=1), whole, **CLOSE)
