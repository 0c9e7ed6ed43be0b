"""Exports of small models, made once, and what they must give: for the tests of ONNX."""

import copy
import functools
import tempfile
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from models import AXES, CONFIGURATIONS, batch_of, ragged_batch, tiny_model

from hf_rnn_seq2seq import RnnSeq2SeqForConditionalGeneration
from hf_rnn_seq2seq.configuration_rnn_seq2seq import RECURRENT_ENCODERS
from hf_rnn_seq2seq.onnx_export import export_onnx
from hf_rnn_seq2seq.onnx_model import RnnSeq2SeqOnnx
from hf_rnn_seq2seq.onnx_runner import RnnSeq2SeqRunner

SEARCHES: list[dict[str, Any]] = [
    {},
    {"num_beams": 3, "num_return_sequences": 2},
    {"num_beams": 4, "num_return_sequences": 4, "length_penalty": 0.3, "early_stopping": True},
    {"num_beams": 2, "length_penalty": 2.0, "early_stopping": "never"},
]
# Two sides of padding, one row, one token, a row without any.
SOURCES = (([5, 3, 0], "both"), ([7, 2], "left"), ([1], "right"))


def values_of(setting: dict[str, Any]) -> set[tuple[str, int]]:
    """Which values of which axes a configuration has; a cell of the encoder's only where it has recurrent layers."""
    return {
        (axis, index)
        for axis, values in AXES.items()
        for index, value in enumerate(values)
        if axis != "cell_type" or setting["encoder_type"] in RECURRENT_ENCODERS
        if setting.items() >= (value if isinstance(value, dict) else {axis: value}).items()
    }


def covering() -> list[dict[str, Any]]:
    """Some of `CONFIGURATIONS`, few and small, that between them have every value of every axis that any has."""
    missing = set().union(*(values_of(one) for one in CONFIGURATIONS))
    chosen = []
    while missing:
        best = max(CONFIGURATIONS, key=lambda one: len(values_of(one) & missing) - 0.1 * one.get("encoder_layers", 1))
        chosen.append(best)
        missing -= values_of(best)
    return chosen


@functools.cache
def _folders() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


_exports: dict[str, tuple[RnnSeq2SeqForConditionalGeneration, Path]] = {}


def exported(**setting: Any) -> tuple[RnnSeq2SeqForConditionalGeneration, Path]:
    """A small model in float32, and the folder of its export."""
    key = repr(setting)
    if key not in _exports:
        model = cast(RnnSeq2SeqForConditionalGeneration, tiny_model(**setting).float())
        folder = Path(_folders().name) / str(len(_exports))
        export_onnx(model, folder)
        _exports[key] = model, folder
    return _exports[key]


def score(model: Any, batch: dict[str, torch.Tensor], row: int, ids: list[int]) -> float:
    """The model's log P of these ids for one source of a batch."""
    one = {name: tensor[row : row + 1] for name, tensor in batch.items()}
    with torch.no_grad():
        logits = model(**one, decoder_input_ids=torch.tensor([[1, *ids[:-1]]])).logits[0]
    return float(logits.log_softmax(-1)[range(len(ids)), ids].sum())


def check_searches(model: Any, folder: Path) -> None:
    """
    Ids, scores and attention of every search, by generate() and by the runner, are the model's: scores to 1e-3 and
    weights to 1e-4, and three times what rounding does to the model's own.
    """
    exact = copy.deepcopy(model).double()
    onnx = RnnSeq2SeqOnnx.from_pretrained(folder)
    runner = RnnSeq2SeqRunner(folder)
    attends = model.config.attention_type != "none"
    for lengths, side in SOURCES:
        source, mask = ragged_batch(lengths, side)
        batch = batch_of(model, source, mask)
        arrays = {name: tensor.numpy() for name, tensor in batch.items()}
        for search in SEARCHES:
            options = {**search, "max_new_tokens": 7}
            returned = {"return_dict_in_generate": True, "output_attentions": True, "output_scores": True}
            wanted = model.generate(**batch, **options, **returned)
            found = onnx.generate(**batch, **options, **returned)
            assert found.sequences.tolist() == wanted.sequences.tolist(), (side, search)
            attention = model.generated_attentions(wanted) if attends else None
            unrounded = exact.generate(**batch, **options, **returned)
            near_weights = {"atol": 1e-4, "rtol": 1e-3}
            if attention is not None:
                for one, other in zip(attention, exact.generated_attentions(unrounded), strict=True):
                    if one.shape == other.shape and one.numel():
                        rounded = float((other - one).abs().max())
                        near_weights["atol"] = max(near_weights["atol"], 1e-4 + 3 * rounded)
                torch.testing.assert_close(onnx.generated_attentions(found), attention, **near_weights)
            if search:
                scores = wanted.sequences_scores
                near = {"atol": 1e-3 + 3 * float((unrounded.sequences_scores - scores).abs().max()), "rtol": 1e-3}
                torch.testing.assert_close(found.sequences_scores, scores, **near)
            places = iter(range(len(wanted.sequences)))
            for row, hypotheses in enumerate(runner.generate(**arrays, **options)):
                # A sparse normaliser's words of probability zero, log P = -87.3 each, are all alike: whichever of them
                # a search takes is right, and it goes on from there.
                lowest = min(one.score * len(one.ids) ** search.get("length_penalty", 1.0) for one in hypotheses)
                for one, place in zip(hypotheses, places, strict=False):
                    if lowest < -80:
                        assert model.config.output_normalizer != "softmax"
                        continue
                    ids = wanted.sequences[place, 1:].tolist()
                    length = ids.index(2) + 1 if 2 in ids else len(ids)
                    if search and one.ids != ids[:length]:  # a tie, but for rounding
                        alike = score(model, batch, row, one.ids) / len(one.ids) ** search.get("length_penalty", 1.0)
                        np.testing.assert_allclose(alike, scores[place], **near)
                        np.testing.assert_allclose(one.score, scores[place], **near)
                        continue
                    if attention is not None:
                        length = len(attention[place])
                        np.testing.assert_allclose(one.attention, attention[place], **near_weights)
                    assert one.ids == ids[:length], (side, search)
                    if search:
                        np.testing.assert_allclose(one.score, scores[place], **near)
