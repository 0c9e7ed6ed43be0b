"""Ensembles as models among others: modes and types, saving, members that copy, refusals, the Trainer."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_model
from test_ensemble import (
    AVERAGES,
    EOS,
    SOURCES,
    VOCABULARY,
    generated,
    members,
    next_log_probabilities,
    pad,
    start,
)

from hf_rnn_seq2seq import RnnSeq2SeqCache, RnnSeq2SeqForConditionalGeneration
from hf_rnn_seq2seq.ensemble import RnnSeq2SeqEnsemble


def test_modes_types_and_parameters_reach_the_members() -> None:
    models = members(2, dropout=0.5)
    ensemble = RnnSeq2SeqEnsemble(models)
    assert not ensemble.training
    ensemble.train()
    assert all(model.training and model.model.encoder.training for model in models)
    target = torch.tensor([[1, 3], [1, 4], [1, 3]])
    torch.manual_seed(0)
    noisy = ensemble(**pad(SOURCES), decoder_input_ids=target).logits
    ensemble.eval()
    clean = ensemble(**pad(SOURCES), decoder_input_ids=target).logits
    assert (noisy - clean).abs().max() > 1e-3
    assert sum(p.numel() for p in ensemble.parameters()) == sum(p.numel() for m in models for p in m.parameters())
    ensemble.to(torch.bfloat16)
    assert models[1].dtype == ensemble.dtype == torch.bfloat16
    low = ensemble(**pad(SOURCES), decoder_input_ids=target).logits
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, clean.float(), rtol=0.2, atol=0.3)


def test_save_and_load(tmp_path: Path) -> None:
    models = members(3)
    ensemble = RnnSeq2SeqEnsemble(models, "log_probabilities", [1, 2, 3])
    ensemble.save_pretrained(tmp_path / "both")
    saved = json.loads((tmp_path / "both" / "ensemble.json").read_text())
    assert saved == {
        "members": ["member_0", "member_1", "member_2"],
        "average": "log_probabilities",
        "weights": pytest.approx([1 / 6, 2 / 6, 3 / 6]),
    }
    inputs = {**pad(SOURCES), "decoder_input_ids": torch.tensor([[1, 3], [1, 4], [1, 3]])}
    expected = ensemble(**inputs).logits
    loaded = RnnSeq2SeqEnsemble.from_pretrained(tmp_path / "both", dtype="auto")
    assert not loaded.training
    assert torch.equal(loaded(**inputs).logits, expected)
    folders = [tmp_path / "both" / f"member_{index}" for index in range(3)]
    listed = RnnSeq2SeqEnsemble.from_pretrained(folders, "log_probabilities", [1, 2, 3], dtype=torch.float64)
    assert torch.equal(listed(**inputs).logits, expected)
    assert RnnSeq2SeqEnsemble.from_pretrained([str(folders[0])], dtype=torch.float32).dtype == torch.float32
    even = RnnSeq2SeqEnsemble.from_pretrained(tmp_path / "both", "probabilities", [1, 1, 1], dtype="auto")
    assert torch.equal(even(**inputs).logits, RnnSeq2SeqEnsemble(models)(**inputs).logits)
    with pytest.raises(ValueError, match=r"member_0 has no ensemble\.json, so it is no saved ensemble"):
        RnnSeq2SeqEnsemble.from_pretrained(folders[0])


def test_one_source_read_in_different_ways() -> None:
    """One table for both sides, or two; what counts is how many ids each side has."""
    shared, split = members(1)[0], members(1, source_vocab_size=VOCABULARY)[0]
    output = RnnSeq2SeqEnsemble([shared, split]).generate(**pad(SOURCES), max_new_tokens=3)
    assert output.shape[0] == 3


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"vocab_size": 6}, "the same `vocab_size`, got 5, 6"),
        ({"source_vocab_size": 7}, "the same `source_size`, got 5, 7"),
        ({"eos_token_id": 4}, "the same `eos_token_id`, got 2, 4"),
        ({"decoder_start_token_id": 2}, "the same `decoder_start_token_id`, got 1, 2"),
        ({"pad_token_id": 3}, "the same `pad_token_id`, got 0, 3"),
    ],
)
def test_models_that_do_not_match_are_refused(other: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RnnSeq2SeqEnsemble([tiny_model(vocab_size=5), tiny_model(**{"vocab_size": 5, **other})])


def test_other_refusals() -> None:
    models = members(2)
    with pytest.raises(ValueError, match="at least one model, got none"):
        RnnSeq2SeqEnsemble([])
    with pytest.raises(ValueError, match="`average` must be one of probabilities, log_probabilities, got 'mean'"):
        RnnSeq2SeqEnsemble(models, "mean")  # type: ignore[arg-type]
    for weights in ([1.0], [1.0, 0.0], [1.0, -1.0], [1.0, math.nan], [1.0, math.inf]):
        with pytest.raises(ValueError, match="`weights` must be 2 positive numbers, one a model, got"):
            RnnSeq2SeqEnsemble(models, weights=weights)
    with pytest.raises(ValueError, match="the same `device`, got 'cpu', 'meta'"):
        RnnSeq2SeqEnsemble([models[0], members(2)[1].to("meta")])

    ensemble = RnnSeq2SeqEnsemble(models)
    inputs = {**pad(SOURCES), "decoder_input_ids": torch.tensor([[1], [1], [1]])}
    with pytest.raises(ValueError, match="`output_hidden_states`: ask its members"):
        ensemble(**inputs, output_hidden_states=True)
    with pytest.raises(ValueError, match="must have the decoder input's shape"):
        ensemble(**inputs, labels=torch.tensor([[3, 2], [3, 2], [3, 2]]))
    one = models[0](**inputs, use_cache=True)
    with pytest.raises(ValueError, match="a RnnSeq2SeqEnsembleCache of 2 members, got RnnSeq2SeqCache"):
        ensemble(**inputs, past_key_values=one.past_key_values)
    assert isinstance(one.past_key_values, RnnSeq2SeqCache)
    three = RnnSeq2SeqEnsemble([*models, models[0]])(**inputs, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="of 2 members, got RnnSeq2SeqEnsembleCache of 3"):
        ensemble(**inputs, past_key_values=three)
    with pytest.raises(ValueError, match="it holds nothing of member 0, but last_hidden_state"):
        ensemble(encoder_outputs=models[0].get_encoder()(inputs["input_ids"]), decoder_input_ids=torch.ones(3, 1))
    with pytest.raises(ValueError, match="stateful"):
        ensemble.generate(**pad(SOURCES[:1]), prompt_lookup_num_tokens=2)


def copying(count: int, **setting: Any) -> list[RnnSeq2SeqForConditionalGeneration]:
    models = []
    for index in range(count):
        wiring = ("input_feeding", "bahdanau")[index]
        model = tiny_model(seed=index, vocab_size=6, head_type="pointer_generator", wiring_type=wiring, **setting)
        with torch.no_grad():
            model.head.output.bias[EOS] += 1.0
        models.append(model)
    return models


@AVERAGES
def test_members_that_copy(average: Any) -> None:
    models = copying(2)
    output = RnnSeq2SeqEnsemble(models, average).generate(**pad(SOURCES, left=True), max_new_tokens=8)
    for row, source in enumerate(SOURCES):
        tokens: list[int] = []
        while len(tokens) < 8 and tokens[-1:] != [EOS]:
            scores = next_log_probabilities(models, source, [start(models), *tokens], average)
            tokens.append(int(scores.argmax()))
        assert generated(output[row]) == tuple(tokens)


@AVERAGES
def test_members_that_copy_words_outside_the_vocabulary(average: Any) -> None:
    models = copying(2, source_vocab_size=9)
    inputs = pad([[4, 7, 8], [8, 3]])
    inputs["copy_ids"] = torch.tensor([[4, 6, 7], [6, 3, 0]])  # 6 and 7 are no words of the vocabulary
    target = torch.tensor([[1, 6, 3], [1, 6, 6]])
    found = RnnSeq2SeqEnsemble(models, average)(**inputs, decoder_input_ids=target).logits
    assert found.shape == (2, 3, 6 + 3)
    each = [model(**inputs, decoder_input_ids=target).logits.double() for model in models]
    if average == "probabilities":
        expected = ((each[0].exp() + each[1].exp()) / 2).log()
    else:
        expected = (each[0] + each[1]) / 2
        expected = expected - expected.exp().sum(-1, keepdim=True).log()
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    beams = RnnSeq2SeqEnsemble(models, average).generate(
        **inputs, num_beams=4, num_return_sequences=4, max_new_tokens=8
    )
    assert ((beams >= 6) & (beams < 9)).any()
    alone = {name: tensor[1:, :2] for name, tensor in inputs.items()}
    single = RnnSeq2SeqEnsemble(models, average).generate(
        **alone, num_beams=4, num_return_sequences=4, max_new_tokens=8
    )
    assert [generated(row) for row in beams[4:]] == [generated(row) for row in single]


def test_copying_and_other_models_do_not_mix() -> None:
    with pytest.raises(ValueError, match="the same `head_type`, got 'linear', 'pointer_generator'"):
        RnnSeq2SeqEnsemble([tiny_model(vocab_size=6), copying(1)[0]])


def test_predict_with_the_trainer(tmp_path: Path) -> None:
    from transformers import DataCollatorForSeq2Seq

    from hf_rnn_seq2seq import RnnSeq2SeqTokenizer, RnnSeq2SeqTrainer, RnnSeq2SeqTrainingArguments
    from hf_rnn_seq2seq.tokenizer_training import train_tokenizer

    words = ["a b", "b a b", "c", "a c c b"]
    tokenizer = RnnSeq2SeqTokenizer(train_tokenizer(words, "symbols"), train_tokenizer(words, "symbols"))
    models = members(2, vocab_size=tokenizer.target_vocab_size, source_vocab_size=tokenizer.source_vocab_size)
    ensemble = RnnSeq2SeqEnsemble(models)
    rows = [dict(tokenizer(word, text_target=word)) for word in words]
    trainer = RnnSeq2SeqTrainer(
        model=ensemble,
        args=RnnSeq2SeqTrainingArguments(
            str(tmp_path), per_device_eval_batch_size=3, generation_max_length=6, use_cpu=True, report_to=[]
        ),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    result = trainer.predict(rows)  # type: ignore[arg-type]  # a list serves as a dataset
    for row, prediction in zip(rows, result.predictions, strict=True):
        expected = generated(ensemble.generate(torch.tensor([row["input_ids"]]), max_length=6)[0])
        assert tuple(prediction[1 : 1 + len(expected)].tolist()) == expected
    total = sum(
        -next_log_probabilities(models, row["input_ids"], [1, *row["labels"][:place]])[label]
        for row in rows
        for place, label in enumerate(row["labels"])
    )
    count = len(list(itertools.chain(*(row["labels"] for row in rows))))
    assert result.metrics["test_loss"] == pytest.approx(total / count, rel=1e-4)
