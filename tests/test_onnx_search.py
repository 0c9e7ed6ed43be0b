"""Searches as graphs: around steps of all kinds, with the ids of transformers' loops."""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ragged_batch

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import onnx
from exported import exported

from hf_rnn_seq2seq import onnx_search
from hf_rnn_seq2seq.onnx_model import WHOLE_SEARCH_SOURCES, RnnSeq2SeqOnnx
from hf_rnn_seq2seq.onnx_runner import BEAM_SEARCH, DECODER, GREEDY_SEARCH, OnnxGraphs
from hf_rnn_seq2seq.onnx_search import beam_search, best_of_blocks, greedy_search

# A recurrent step of three lines, whose state is that of the exported encoder: what it likes to say, and how soon it
# ends, is for its random numbers to say, and no export is needed for each.
STEP = """
<ir_version: 10, opset_import: ["" : 20]>
step (int64[batch, 1] input_ids, float[batch, source, width] memory_values, float[batch, units] past_layer_0_h,
      float[batch, units] past_layer_0_c, float[batch, units] past_feed_0)
  => (float[batch, WORDS] logits, float[batch, 1, source] attention, float[batch, units] present_layer_0_h,
      float[batch, units] present_layer_0_c, float[batch, units] present_feed_0)
{
  token = Squeeze(input_ids, last)
  embedding = Gather(embeddings, token)
  kept = Mul(past_layer_0_h, half)
  mixed = Add(kept, embedding)
  present_layer_0_h = Tanh(mixed)
  present_layer_0_c = Add(past_layer_0_c, embedding)
  present_feed_0 = Identity(past_feed_0)
  product = MatMul(present_layer_0_h, weight)
  logits = Add(product, bias)
  looked = ReduceSum<keepdims = 0>(memory_values, last)
  head = Unsqueeze(looked, middle)
  attention = Softmax<axis = -1>(head)
}
"""


def write_searches(folder: Path, seed: int, eos_bias: float) -> None:
    """Puts a step of random numbers, and its searches, in the place of an export's; of 12 words with odd seeds."""
    model, export = exported()
    shutil.copytree(export, folder, dirs_exist_ok=True)
    units, words = model.config.hidden_size, model.config.vocab_size - seed % 2
    numbers = np.random.default_rng(seed)
    bias = numbers.normal(0, 0.5, words)
    bias[2] += eos_bias
    arrays = {
        "embeddings": numbers.normal(0, 1, (words, units)),
        "weight": numbers.normal(0, 2, (units, words)),
        "bias": bias,
        "half": np.array(0.5),
    }
    step = onnx.parser.parse_model(STEP.replace("WORDS", str(words)))
    for name, array in arrays.items():
        step.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    for name, array in (("last", np.array([-1])), ("middle", np.array([1]))):
        step.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.checker.check_model(step)
    for name, graph in ((DECODER, step), (GREEDY_SEARCH, greedy_search(step)), (BEAM_SEARCH, beam_search(step))):
        onnx.checker.check_model(graph, full_check=True)
        onnx.save(graph, folder / f"{name}.onnx")


@pytest.fixture(autouse=True, scope="module")
def blocks() -> Iterator[None]:
    """The best of 12 words is found by blocks, that of 13 is not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_search, "BLOCKED_WORDS", 12)
        yield


def test_the_best_by_blocks_is_the_first_highest() -> None:
    """With many scores alike."""
    for count, size in ((2, 3), (3, 2), (5, 20), (20, 5)):
        logits = np.random.default_rng(count).integers(0, 4, (50, count * size)).astype(np.float32)
        best = best_of_blocks(logits, np.array([0, count, size]))
        assert best.tolist() == logits.argmax(1)[:, None].tolist()


searches = st.fixed_dictionaries(
    {
        "num_beams": st.integers(1, 5),
        "eos_token_id": st.sampled_from([2, [2, 5, 2], [2, 3, 4]]),
        "penalty": st.sampled_from(
            [{"length_penalty": alpha} for alpha in (-1.0, 0.0, 0.6, 1.0, 2.0)]
            + [{name: alpha} for name in ("gnmt_length_penalty", "opennmt_length_penalty") for alpha in (0.0, 0.8)]
        ),
        "early_stopping": st.sampled_from([False, True, "never"]),
        "max_length": st.integers(2, 25),
        "returned": st.integers(1, 5),
    }
)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    eos_bias=st.sampled_from([-2.0, 0.0, 2.0]),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=3 * WHOLE_SEARCH_SOURCES),
    options=st.lists(searches, min_size=6, max_size=12),
)
def test_ids_are_those_of_transformers_loops(
    tmp_path_factory: pytest.TempPathFactory, seed: int, eos_bias: float, lengths: list[int], options: list[Any]
) -> None:
    folder = tmp_path_factory.mktemp("searches")
    write_searches(folder, seed, eos_bias)
    found: Any = RnnSeq2SeqOnnx.from_pretrained(folder, threads=1)
    source, mask = ragged_batch(lengths, side="both")
    for one in options:
        search = one | (one["penalty"] if one["num_beams"] > 1 else {})
        del search["penalty"]
        search["num_return_sequences"] = min(search["num_beams"], search.pop("returned"))
        if "opennmt_length_penalty" in search:
            search["num_return_sequences"] = 1
        arguments = {"inputs": source, "attention_mask": mask, "pad_token_id": 0, **search}
        found._fast_generation = False
        wanted = found.generate(**arguments)
        found._fast_generation = True
        assert found.generate(**arguments).tolist() == wanted.tolist(), search


def test_greedy_search_in_parts_and_its_scores(tmp_path: Path) -> None:
    """A search that stops and goes on from its state makes what one in one go makes, and scores are the steps'."""
    write_searches(tmp_path, seed=2, eos_bias=0.0)  # with these, sequences end after 1, 4, 6, 5 and 1 tokens
    graphs = OnnxGraphs(tmp_path, threads=1)
    source, mask = (tensor.numpy() for tensor in ragged_batch([5, 2, 6, 1, 3]))
    tensors, start = graphs.encode(source, mask), np.array([1, 3, 5, 6, 8])
    options = {"eos_token_id": [2, 4], "pad_token_id": 7, "with_scores": True}
    whole = graphs.greedy(start, tensors, max_new_tokens=12, copy_steps=math.inf, **options)
    unscored = graphs.greedy(
        start, tensors, max_new_tokens=12, copy_steps=math.inf, **options | {"with_scores": False}
    )
    assert unscored.scores.tolist() == [0] * 5
    assert unscored.sequences.tolist() == whole.sequences.tolist()

    tokens, expected = start, np.zeros(5)
    going, state = np.ones(5, bool), dict(tensors)
    for t in range(whole.sequences.shape[1]):
        result = graphs.step(tokens, state)
        state |= result.state
        log_p = torch.from_numpy(result.logits).double().log_softmax(-1).numpy()
        tokens = np.where(going, log_p.argmax(-1), 7)
        expected += going * log_p[np.arange(5), tokens]
        assert whole.sequences[:, t].tolist() == tokens.tolist()
        np.testing.assert_allclose(whole.attention[t], result.attention, atol=1e-6)
        going &= ~np.isin(tokens, [2, 4])
    np.testing.assert_allclose(whole.scores, expected, rtol=1e-5)

    # Two that have ended and three that have not are worth 2, 4 and 6 steps after the first ones; then there are more.
    for copy_steps, length in ((0, 1), (1, 2), (2, 3), (4, 4), (5, 5)):
        part = graphs.greedy(start, tensors, max_new_tokens=12, copy_steps=copy_steps, **options)
        ended = np.isin(part.sequences, [2, 4]).any(1)
        assert part.sequences.shape[1] == length
        rest = {name: one[~ended] for name, one in (tensors | part.state).items()}
        others = graphs.greedy(
            part.sequences[~ended, -1], rest, max_new_tokens=12 - length, copy_steps=math.inf, **options
        )
        assert part.sequences.tolist() == whole.sequences[:, :length].tolist()
        assert others.sequences.tolist() == whole.sequences[~ended, length:].tolist()
