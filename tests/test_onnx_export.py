"""
Exported graphs compute what the models do, under every search.

An export takes seconds, so the ordinary run has a few models that between them hold every value of every axis, each
exported once; the slow run has all `CONFIGURATIONS`.
"""

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoding import count_rows
from models import CONFIGURATIONS, batch_of, name_of, ragged_batch, tiny_model
from scripts import load_script

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import onnx
from exported import check_searches, covering, exported, values_of

from hf_rnn_seq2seq import RnnSeq2SeqTokenizer, onnx_export
from hf_rnn_seq2seq.onnx_export import export_onnx, largest_error
from hf_rnn_seq2seq.onnx_model import OnnxSteps, RnnSeq2SeqOnnx
from hf_rnn_seq2seq.onnx_runner import BEAM_SEARCH, DECODER, ENCODER, GREEDY_SEARCH, file_name
from hf_rnn_seq2seq.tokenizer_training import train_tokenizer

COVERING = covering()


def test_the_few_models_have_every_value() -> None:
    every = set().union(*(values_of(one) for one in CONFIGURATIONS))
    assert set().union(*(values_of(one) for one in COVERING)) == every
    assert len(every) > 60


@pytest.mark.parametrize("setting", COVERING, ids=name_of)
def test_searches_give_the_models_ids_scores_and_attention(setting: dict[str, Any]) -> None:
    check_searches(*exported(**setting))


@pytest.mark.slow
@pytest.mark.parametrize("setting", CONFIGURATIONS, ids=name_of)
def test_every_configuration(setting: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(**setting).float()
    export_onnx(model, tmp_path / "onnx", precisions=("float32", "int8"))
    check_searches(model, tmp_path / "onnx")
    # It loads, runs and has its shapes. Of how near it is this says nothing: models of eight units that choose where
    # to look, or normalise, magnify what is rounded to 8 bits.
    assert math.isfinite(largest_error(model, tmp_path / "onnx", "int8"))


def test_searches_of_our_own_and_sampling() -> None:
    model: Any
    model, folder = exported()
    found: Any = RnnSeq2SeqOnnx.from_pretrained(folder)
    source, mask = ragged_batch([5, 1, 3])
    for options in (
        {"do_sample": True, "top_k": 5},
        {"do_sample": True, "num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 4, "gnmt_length_penalty": 0.8, "coverage_penalty": 0.3},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.6},
        {"num_beams": 4, "force_words_ids": [[5, 6], [7]]},
    ):
        results = []
        for one in (model, found):
            torch.manual_seed(0)
            results.append(one.generate(source, attention_mask=mask, max_new_tokens=6, **options))
        assert torch.equal(*results), options


@pytest.mark.parametrize("setting", [{}, {"head_type": "pointer_generator", "attention_coverage": True}], ids=str)
def test_rows_that_have_ended_leave_the_batch(
    setting: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the ids of transformers' own loops, which keep them."""
    model: Any = tiny_model(seed=2, **setting).float()
    with torch.no_grad():
        model.head.output.bias[model.config.eos_token_id] += 0.6  # some sentences end early
    export_onnx(model, tmp_path / "onnx")
    found: Any = RnnSeq2SeqOnnx.from_pretrained(tmp_path / "onnx")
    rows = count_rows(OnnxSteps, monkeypatch)
    search = found.graphs.greedy

    def greedy(start: np.ndarray, *args: Any, **options: Any) -> Any:
        rows.append(len(start))
        return search(start, *args, **options)

    monkeypatch.setattr(found.graphs, "greedy", greedy)
    batch = batch_of(model, *ragged_batch([5, 1, 3, 7, 2, 6, 4, 1]))
    for options in ({}, {"num_beams": 3, "num_return_sequences": 2}):
        rows.clear()
        ids = found.generate(**batch, max_new_tokens=30, **options)
        assert rows == sorted(rows, reverse=True)
        assert min(rows) < max(rows) <= 8 * options.get("num_beams", 1)
        found._fast_generation = False
        assert torch.equal(found.generate(**batch, max_new_tokens=30, **options), ids)
        del found._fast_generation


WHOLE_SEARCHES: list[dict[str, Any]] = [
    {},
    {"eos_token_id": [2, 5, 7], "pad_token_id": 3},
    {"eos_token_id": 9, "max_length": 2},
    {"num_beams": 3},
    {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.0, "early_stopping": True},
    {"num_beams": 2, "num_return_sequences": 2, "length_penalty": 2.0, "early_stopping": "never"},
    {"num_beams": 3, "length_penalty": -1.0, "eos_token_id": [2, 5, 7]},
    {"num_beams": 3, "num_return_sequences": 2, "gnmt_length_penalty": 0.7},
    {"num_beams": 3, "opennmt_length_penalty": 1.0},
]


def check_whole_searches(found: Any, batch: dict[str, torch.Tensor]) -> None:
    """A search in one call gives the ids of transformers' loops, for some sources and for each alone."""
    for options in WHOLE_SEARCHES:
        for rows in (slice(0, None), *(slice(row, row + 1) for row in range(len(batch["input_ids"])))):
            part = {name: tensor[rows] for name, tensor in batch.items()}
            arguments = {**part, "max_length": 12, **options}
            found._fast_generation = False
            wanted = found.generate(**arguments)
            del found._fast_generation
            assert torch.equal(found.generate(**arguments), wanted), options


@pytest.mark.parametrize("setting", [{}, {"head_type": "pointer_generator", "attention_coverage": True}], ids=str)
def test_searches_for_few_sources_are_one_call(setting: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = exported(**setting)
    found: Any = RnnSeq2SeqOnnx.from_pretrained(folder)
    batch = batch_of(model, *ragged_batch([5, 1, 3, 7], side="both"))
    check_whole_searches(found, batch)
    # With words outside the vocabulary and without.
    others = [batch, {name: one for name, one in batch.items() if name != "copy_ids"}]
    for part in others:
        check_whole_searches(found, {name: one[:2] for name, one in part.items()})

    class Steps(Exception):
        """Step by step."""

    def step(*args: Any) -> None:
        raise Steps

    monkeypatch.setattr(found.graphs, "step", step)
    for options in WHOLE_SEARCHES:
        found.generate(**batch, **options)
    more = batch_of(model, *ragged_batch([5, 1, 3, 7, 2]))
    prompt = torch.ones(4, 2, dtype=torch.long)
    found.generate(**more)
    unlike: list[dict[str, Any]] = [
        {**more, "num_beams": 2},
        {"do_sample": True},
        {"num_beams": 2, "do_sample": True},
        {"repetition_penalty": 1.5},
        {"num_beams": 2, "no_repeat_ngram_size": 2},
        {"decoder_input_ids": prompt},
        {"num_beams": 2, "gnmt_length_penalty": 0.5, "coverage_penalty": 0.1},
        {"num_beams": 2, "joeynmt_length_penalty": 0.5},
        {"num_beams": 2, "num_return_sequences": 2, "opennmt_length_penalty": 0.5},
        {"max_time": 10.0},
        {"return_dict_in_generate": True},
        {"num_beams": 2, "return_dict_in_generate": True},
    ]
    for options in unlike:
        with pytest.raises(Steps):
            found.generate(**{**batch, **options})

    class OwnHelpers(RnnSeq2SeqOnnx):
        def _check_early_stop_heuristic(self, **arguments: Any) -> torch.Tensor:  # type: ignore[override]
            return torch.zeros_like(super()._check_early_stop_heuristic(**arguments))

    found.__class__ = OwnHelpers
    with pytest.raises(Steps):
        found.generate(**batch, num_beams=2)


def test_prefixes_caches_and_masks() -> None:
    """A prompt, padded on the left, and going on from a cache, as with the model."""
    model: Any
    model, folder = exported()
    found: Any = RnnSeq2SeqOnnx.from_pretrained(folder)
    source, mask = ragged_batch([5, 2])
    prompt, prompt_mask = torch.tensor([[1, 4, 5], [0, 1, 6]]), torch.tensor([[1, 1, 1], [0, 1, 1]])
    kwargs = {"attention_mask": mask, "decoder_input_ids": prompt, "decoder_attention_mask": prompt_mask}
    wanted = model.generate(source, max_new_tokens=5, **kwargs)
    assert torch.equal(found.generate(source, max_new_tokens=5, **kwargs), wanted)
    with torch.no_grad():
        logits = model(source, mask, decoder_input_ids=prompt).logits
    first = found(source, mask, decoder_input_ids=prompt[:, :1])
    rest = found(source, mask, decoder_input_ids=prompt[:, 1:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat((first.logits, rest.logits), dim=1), logits, atol=1e-5, rtol=1e-4)


def test_one_vocabulary_copies_its_own_ids() -> None:
    model: Any
    model, folder = exported(head_type="pointer_generator")
    source, mask = ragged_batch([5, 2, 4])
    found: Any = RnnSeq2SeqOnnx.from_pretrained(folder)
    wanted = model.generate(source, attention_mask=mask, num_beams=2, max_new_tokens=5)
    assert torch.equal(found.generate(source, attention_mask=mask, num_beams=2, max_new_tokens=5), wanted)
    with pytest.raises(ValueError, match="`copy_ids` is for a head that copies, not 'linear'"):
        RnnSeq2SeqOnnx.from_pretrained(exported()[1])(source, decoder_input_ids=source, copy_ids=source)


def test_hidden_states_are_refused() -> None:
    found: Any = RnnSeq2SeqOnnx.from_pretrained(exported()[1])
    with pytest.raises(ValueError, match="output_hidden_states"):
        found(torch.ones(1, 2, dtype=torch.long), decoder_input_ids=torch.ones(1, 1), output_hidden_states=True)
    with pytest.raises(ValueError, match="decoder_input_ids"):
        found(torch.ones(1, 2, dtype=torch.long))


# int8


def file_size(graph: Path) -> int:
    """With the weights beside it."""
    return sum(path.stat().st_size for path in (graph, graph.with_name(f"{graph.name}.data")) if path.exists())


def test_int8_is_small_near_and_runs(tmp_path: Path) -> None:
    setting = {"vocab_size": 400, "hidden_size": 64, "embedding_size": 64, "attention_type": "dot"}
    model = tiny_model(**setting).float()
    export_onnx(model, tmp_path, precisions=("float32", "int8"))
    for graph, kinds in ((ENCODER, {"DynamicQuantizeLSTM"}), (DECODER, {"MatMulInteger"})):
        sizes = [file_size(tmp_path / file_name(graph, precision)) for precision in ("float32", "int8")]
        assert sizes[1] < 0.4 * sizes[0]
        proto = onnx.load(tmp_path / file_name(graph, "int8"))
        onnx.checker.check_model(proto)
        assert str(Path(onnx_export.__file__).parent).encode() not in proto.SerializeToString()
        nodes = proto.graph.node
        assert kinds <= {node.op_type for node in nodes}
    assert 1e-6 < largest_error(model, tmp_path, "int8") < 0.05
    source, mask = ragged_batch([5, 2, 4])
    found: Any = RnnSeq2SeqOnnx.from_pretrained(tmp_path, "int8")
    output = found.generate(source, attention_mask=mask, num_beams=3, max_new_tokens=4, min_new_tokens=4)
    assert output.shape == (3, 5)
    for search in (GREEDY_SEARCH, BEAM_SEARCH):  # they have the step's weights, not their own
        onnx.checker.check_model(str(tmp_path / file_name(search, "int8")))
        assert file_size(tmp_path / file_name(search, "int8")) < 0.5 * file_size(tmp_path / file_name(DECODER, "int8"))
    check_whole_searches(found, {"input_ids": source, "attention_mask": mask})


# What is written, and what is not


def test_a_graph_that_differs_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = onnx_export.to_onnx

    def spoilt(graph: Any) -> onnx.ModelProto:
        proto = original(graph)
        weights = max(proto.graph.initializer, key=lambda one: len(one.raw_data))
        array = onnx.numpy_helper.to_array(weights)
        weights.CopyFrom(onnx.numpy_helper.from_array(array * array.dtype.type(1.05), weights.name))
        return proto

    monkeypatch.setattr(onnx_export, "to_onnx", spoilt)
    with pytest.raises(RuntimeError, match=r"differ from the model by .* nothing was written"):
        export_onnx(tiny_model(), tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


def test_unknown_precision_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`precisions` may hold float32, int8, got 'int4'"):
        export_onnx(tiny_model(), tmp_path, precisions=("int4",))  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"has no encoder_model_int8.onnx: export the model with 'int8'"):
        RnnSeq2SeqOnnx.from_pretrained(exported()[1], "int8")


def test_script_with_weights_in_files_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["ab ba", "c"]
    tokenizer = RnnSeq2SeqTokenizer(train_tokenizer(words, "char"), train_tokenizer(words, "symbols"))
    sizes = {"source_vocab_size": tokenizer.source_vocab_size, "vocab_size": len(tokenizer)}
    model = tiny_model(**sizes, hidden_size=32).float()  # small tensors stay in the graph
    for one in (model, tokenizer):
        one.save_pretrained(tmp_path / "saved")
    monkeypatch.setattr(onnx_export, "EXTERNAL_DATA", 0)
    load_script("export_onnx").main([str(tmp_path / "saved"), str(tmp_path / "onnx"), "--int8"])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed] == ["float32", "int8"]
    names = {path.name for path in (tmp_path / "onnx").iterdir()}
    assert names >= {
        "encoder_model.onnx", "encoder_model.onnx.data", "decoder_model.onnx.data", "decoder_model_int8.onnx",
        "greedy_search.onnx", "beam_search_int8.onnx",
        "config.json", "generation_config.json", "tokenizer.json", "source_tokenizer.json", "onnx_runner.py",
    }  # fmt: skip
    moved = shutil.move(tmp_path / "onnx", tmp_path / "elsewhere")
    source, mask = ragged_batch([4, 2], ids=tokenizer.source_vocab_size)
    found: Any = RnnSeq2SeqOnnx.from_pretrained(moved)
    assert torch.equal(found.generate(source, attention_mask=mask), model.generate(source, attention_mask=mask))
    with pytest.raises(SystemExit, match="nowhere"):
        load_script("export_onnx").main([str(tmp_path / "nowhere"), str(tmp_path / "onnx")])
