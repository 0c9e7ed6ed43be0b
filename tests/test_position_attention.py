"""What holds of the kinds of attention that go by where tokens stand; their equations are in test_attention.py.

Shapes: B batch, S source, T target.
"""

import pytest
import torch
from attention_calls import build, draw, run
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny_config

from hf_rnn_seq2seq.attention import make_attention


@settings(max_examples=30)
@given(seed=st.integers(0, 999), training=st.booleans(), lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_monotonic_never_goes_back(seed: int, training: bool, lengths: list[int]) -> None:
    attention, config = build(seed, attention_type="monotonic", monotonic_noise=2.0)
    attention.train(training)
    mask = torch.arange(9).flip(0) < torch.tensor(lengths).unsqueeze(1)  # on the left
    memory, queries = draw(len(lengths), 9, config.memory_size, seed=seed), draw(len(lengths), 6, 8, seed=seed + 1)
    _, weights, _ = run(attention, queries, memory, mask)
    weights = weights[:, 0].detach()  # [B, T, S]
    if training:  # the probability of standing at s or before it never grows
        passed = weights.cumsum(-1)
        assert (passed[:, 1:] <= passed[:, :-1] + 1e-12).all()
        return
    assert set(weights.unique().tolist()) <= {0.0, 1.0}
    attended = weights.sum(-1)
    assert (attended <= 1).all()
    assert (attended[:, 1:] <= attended[:, :-1]).all()  # once through the source, never again
    at = weights.argmax(-1).masked_fill(attended == 0, 9)
    assert (at[:, 1:] >= at[:, :-1]).all()


def test_monotonic_extremes_are_finite() -> None:
    """Scores at which 1 - p underflows, over a long source, in float32."""
    config = tiny_config(attention_type="monotonic", monotonic_noise=0.0)
    attention = make_attention(config).train()
    with torch.no_grad():
        attention.scale.fill_(200.0)
    memory, queries = draw(2, 400, config.memory_size, seed=0), draw(2, 6, config.query_size, seed=1)
    mask = torch.ones(2, 400, dtype=torch.bool)
    contexts, weights, _ = run(attention, queries.float(), memory.float(), mask)
    exact, exact_weights, _ = run(attention.double(), queries, memory, mask)
    torch.testing.assert_close(weights.double(), exact_weights, rtol=0, atol=1e-3)
    torch.testing.assert_close(contexts.double(), exact, rtol=0, atol=1e-2)
    exact.sin().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in attention.parameters())


def test_monotonic_noise() -> None:
    """Normal, of the given standard deviation, on the scores, in training alone."""
    attention, config = build(attention_type="monotonic", monotonic_noise=1.5)
    memory = draw(1, 1, config.memory_size, seed=0).expand(4000, 1, -1)
    queries = draw(1, 1, config.query_size, seed=1).expand(4000, 1, -1)
    mask = torch.ones(4000, 1, dtype=torch.bool)
    torch.manual_seed(0)
    _, weights, _ = run(attention.train(), queries, memory, mask)
    noise = (
        torch.logit(weights.detach().flatten()) - attention.score(queries[:1], attention.make_keys(memory[:1])).item()
    )
    assert abs(noise.mean()) < 5 * 1.5 / 4000**0.5
    assert noise.std().item() == pytest.approx(1.5, rel=0.06)
    _, weights, _ = run(attention.eval(), queries, memory, mask)
    assert len(weights.unique()) == 1


def test_local_m_stays_at_the_last_token() -> None:
    attention, config = build(attention_type="local_m", attention_window=1)
    memory, queries = draw(2, 6, config.memory_size, seed=0), draw(2, 9, config.query_size, seed=1)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]]).bool()
    _, weights, (t,) = run(attention, queries, memory, mask)
    assert t.tolist() == [[9], [9]]
    windows = [[s for s in range(6) if weights[1, 0, step, s] > 0] for step in range(9)]
    assert windows == [[3, 4], [3, 4, 5]] + [[4, 5]] * 7
