"""The options of beam search in generate(): outputs that agree, other options, saving, the Trainer, refusals."""

import threading
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from beams import (
    LENGTHS,
    SEARCHES,
    contains_all,
    scores_of,
    search,
    tiny_model,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ragged_batch
from test_beam_oracle import generated
from transformers import AutoModelForSeq2SeqLM, GenerationConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from hf_rnn_seq2seq import (
    RnnSeq2SeqForConditionalGeneration,
    RnnSeq2SeqTrainer,
    RnnSeq2SeqTrainingArguments,
    generation_rnn_seq2seq,
)
from hf_rnn_seq2seq.beam_search import take_turns

# All searches


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize(
    "setting",
    [
        {"wiring_type": "output_only", "attention_type": "dot"},
        {"wiring_type": "input_feeding", "decoder_layers": 2, "zoneout": 0.1, "source_vocab_size": 11},
        {"wiring_type": "bahdanau", "cell_type": "gru"},
    ],
    ids=lambda setting: setting["wiring_type"],
)
def test_outputs_agree_with_each_other(setting: dict[str, Any], name: str) -> None:
    """With and without cache, alone and in a batch, with padding on either side; scores, indices and attention."""
    model, options = tiny_model(seed=4, **setting), SEARCHES[name]
    source, mask = ragged_batch(LENGTHS)
    out = search(model, source, mask, output_attentions=True, **options)

    uncached = search(model, source, mask, use_cache=False, output_attentions=True, **options)
    assert torch.equal(out.sequences, uncached.sequences)
    assert torch.equal(cast(torch.Tensor, out.beam_indices), cast(torch.Tensor, uncached.beam_indices))
    torch.testing.assert_close(scores_of(out), scores_of(uncached))
    bare = model.generate(
        source, attention_mask=mask, max_new_tokens=8, num_beams=4, num_return_sequences=2, **options
    )
    width = min(bare.size(1), out.sequences.size(1))
    assert torch.equal(bare[:, :width].view(3, 2, -1), out.sequences[:, :width].view(3, 4, -1)[:, :2])

    other_source, other_mask = ragged_batch(LENGTHS, "left")
    for row in range(len(LENGTHS)):
        by_row = options.get("force_words_ids_by_row")
        own = options if by_row is None else {"force_words_ids_by_row": by_row[row : row + 1]} if by_row[row] else {}
        at = slice(4 * row, 4 * row + 4)
        alone = search(model, other_source[row : row + 1], other_mask[row : row + 1], **own)
        single = search(model, source[row, mask[row].bool()][None], mask[row, mask[row].bool()][None], **own)
        for one in (alone, single):
            torch.testing.assert_close(scores_of(one), scores_of(out)[at], rtol=1e-5, atol=1e-5)
            assert list(map(generated, one.sequences)) == list(map(generated, out.sequences[at]))

    # Attention and log-probabilities of what is returned are those of teacher forcing, but for diversity penalties.
    rows = torch.arange(3).repeat_interleave(4)
    forced = model(
        source[rows], attention_mask=mask[rows], decoder_input_ids=out.sequences[:, :-1], output_attentions=True
    )
    transitions = model.compute_transition_scores(out.sequences, out.scores, out.beam_indices)
    chosen = forced.logits.log_softmax(-1).gather(2, out.sequences[:, 1:, None]).squeeze(2)
    matrices = model.generated_attentions(out)
    for row, sequence in enumerate(out.sequences):
        length = len(generated(sequence))
        torch.testing.assert_close(matrices[row], forced.cross_attentions[0][row, 0, :length], rtol=1e-9, atol=1e-9)
        if "num_beam_groups" not in options:
            torch.testing.assert_close(transitions[row, :length].double(), chosen[row, :length], rtol=1e-5, atol=1e-5)
        else:
            assert (transitions[row, :length] < chosen[row, :length] + 1e-5).all()
        if not any("penalty" in option and option != "diversity_penalty" for option in options):
            total = transitions[row, :length].sum() / length
            torch.testing.assert_close(total, scores_of(out)[row], rtol=1e-5, atol=1e-5)
    assert (scores_of(out).view(3, 4).diff(dim=1) <= 0).all()


def test_the_searches_differ() -> None:
    model = tiny_model(seed=5)
    source, mask = ragged_batch(LENGTHS)
    plain = search(model, source, mask).sequences.tolist()
    assert all(search(model, source, mask, **options).sequences.tolist() != plain for options in SEARCHES.values())


@pytest.mark.parametrize("name", SEARCHES)
def test_bfloat16_and_several_ends(name: str) -> None:
    model = tiny_model(seed=5).bfloat16()
    source, mask = ragged_batch(LENGTHS)
    options = {name: value for name, value in SEARCHES[name].items() if name != "force_words_ids_by_row"}
    out = search(model, source, mask, eos_token_id=[2, 8, 11], **options)
    for sequence in out.sequences[:, 1:].tolist():
        end = next((place for place, token in enumerate(sequence) if token in (2, 8, 11)), len(sequence))
        assert set(sequence[end + 1 :]) <= {0, 2}
        assert contains_all(tuple(sequence[:end]), options.get("force_words_ids", []))


@pytest.mark.parametrize("options", [{}, *SEARCHES.values()], ids=["plain", *SEARCHES])
def test_prefix_allowed_tokens(options: dict[str, Any]) -> None:
    """Only what the function allows; forced words, where it allows them."""
    model = tiny_model(seed=5)
    source, mask = ragged_batch(LENGTHS)
    allowed = [[2, 3, 5, 6, 7], [2, 5, 6, 7, 8], [2, 4, 5, 6, 7, 9]]
    out = search(model, source, mask, prefix_allowed_tokens_fn=lambda row, _: allowed[row], **options)
    for index, sequence in enumerate(out.sequences):
        assert set(generated(sequence)) <= set(allowed[index // 4])
        if "force_words_ids" in options and index % 4 == 0:
            assert contains_all(generated(sequence), options["force_words_ids"][:1])


def test_nothing_remains_on_the_model() -> None:
    model = tiny_model(attention_type="none")
    source, mask = ragged_batch(LENGTHS)
    before, config = dict(vars(model)), model.generation_config.to_dict()
    search(model, source, mask, num_beam_groups=2, diversity_penalty=1.0, gnmt_length_penalty=1.0)
    search(model, source, mask, force_words_ids=[[5]])
    with pytest.raises(ValueError, match=r"`coverage_penalty`=0\.2 needs attention"):
        search(model, source, mask, coverage_penalty=0.2)
    assert vars(model) == before
    assert model.generation_config.to_dict() == config
    assert type(model) is RnnSeq2SeqForConditionalGeneration


def test_threads_do_not_disturb_each_other() -> None:
    model = tiny_model(seed=5)
    source, mask = ragged_batch(LENGTHS)
    expected = {name: search(model, source, mask, **options).sequences for name, options in SEARCHES.items()}
    wrong = []

    def run(name: str) -> None:
        for _ in range(2):
            if not torch.equal(search(model, source, mask, **SEARCHES[name]).sequences, expected[name]):
                wrong.append(name)

    threads = [threading.Thread(target=run, args=(name,)) for name in SEARCHES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_plain_search_makes_no_view(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(seed=5)
    source, mask = ragged_batch(LENGTHS)
    plain = search(model, source, mask).sequences
    monkeypatch.delattr(generation_rnn_seq2seq, "beam_search")
    assert torch.equal(search(model, source, mask, num_beam_groups=1, coverage_penalty=0.0).sequences, plain)


# Where options come from


@pytest.mark.parametrize("name", SEARCHES)
def test_options_are_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model, options = tiny_model(seed=5), SEARCHES[name]
    source, mask = ragged_batch(LENGTHS)
    expected = search(model, source, mask, **options).sequences
    for option, value in {**options, "num_beams": 4, "max_new_tokens": 8}.items():
        setattr(model.generation_config, option, value)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "beam_search.py").exists()  # the checkpoint carries its code
    own: Any = get_class_from_dynamic_module("modeling_rnn_seq2seq.RnnSeq2SeqForConditionalGeneration", str(tmp_path))
    for loaded in (AutoModelForSeq2SeqLM.from_pretrained(tmp_path), own.from_pretrained(tmp_path)):
        out = loaded.generate(source, attention_mask=mask, num_return_sequences=4)
        assert torch.equal(out, expected)
        given = GenerationConfig(num_beams=4, max_new_tokens=8, num_return_sequences=4)  # the model's fill in the rest
        assert torch.equal(loaded.generate(source, attention_mask=mask, generation_config=given), expected)
    assert type(loaded).__module__ != type(model).__module__
    if not any(option.startswith("force_words_ids") for option in options):
        greedy = model.generate(source, attention_mask=mask, num_beams=1)  # saved options wait for beams
        plain = tiny_model(seed=5).generate(source, attention_mask=mask, max_new_tokens=8)
        assert torch.equal(greedy, plain)


@pytest.mark.parametrize("name", ["gnmt, coverage", "groups, gnmt, coverage", "words"])
def test_trainer_predicts_with_the_options(name: str, tmp_path: Path) -> None:
    model, options = tiny_model(seed=5).float(), SEARCHES[name]
    source, mask = ragged_batch(LENGTHS)
    expected = model.generate(source, attention_mask=mask, num_beams=4, max_new_tokens=8, **options)
    rows = [
        {"input_ids": ids[keep.bool()].tolist(), "labels": [3, 4, 2], "row": row}
        for row, (ids, keep) in enumerate(zip(source, mask, strict=True))
    ]
    config = GenerationConfig(
        num_beams=4, max_new_tokens=8, decoder_start_token_id=1, eos_token_id=2, pad_token_id=0, **options
    )
    args = RnnSeq2SeqTrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", generation_config=config, remove_unused_columns=False
    )

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        index = [row["row"] for row in batch]  # evaluation has an order of its own
        labels = torch.tensor([row["labels"] for row in batch])
        return {"input_ids": source[index], "attention_mask": mask[index], "labels": labels}

    trainer: Any = RnnSeq2SeqTrainer(model, args, data_collator=collate)
    predictions = trainer.predict(rows).predictions
    assert predictions[:, : expected.size(1)].tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gnmt_length_penalty": 0.6, "length_penalty": 0.5}, "`length_penalty`=0.5 exclude each other"),
        ({"gnmt_length_penalty": "long"}, "`gnmt_length_penalty` must be a number, got 'long'"),
        ({"coverage_penalty": -0.1}, "`coverage_penalty` must be 0 or more, got -0.1"),
        ({"gnmt_length_penalty": 0.6, "num_beams": 1, "num_return_sequences": 1}, "`num_beams` has to be greater"),
        ({"force_words_ids": [[5]], "num_beams": 1, "num_return_sequences": 1}, "`num_beams` has to be greater"),
        ({"num_beam_groups": 3, "diversity_penalty": 0.5}, "should be divisible by `num_beam_groups` \\(3\\)"),
        ({"num_beam_groups": 2}, "`diversity_penalty` should be greater than `0.0`"),
        ({"num_beam_groups": 2, "diversity_penalty": -1.0}, "`diversity_penalty` should be greater than `0.0`"),
        ({"diversity_penalty": 1.0}, "`num_beam_groups` must be an integer greater than 1"),
        ({"num_beam_groups": 2, "diversity_penalty": 1.0, "do_sample": True}, "`do_sample` must be set to `False`"),
        ({"force_words_ids": [[5]], "do_sample": True}, "`do_sample` is set to `True`, which is incompatible"),
        ({"force_words_ids": [[5]], "num_beam_groups": 2, "diversity_penalty": 1.0}, "`num_beam_groups` is set to"),
        ({"force_words_ids": []}, "has to be a non-empty list"),
        ({"force_words_ids": [[]]}, r"`list\[list\[int\]\]` of positive integers"),
        ({"force_words_ids": [[5, -1]]}, r"of positive integers, but has \[5, -1\]"),
        ({"force_words_ids": [5]}, "of positive integers, but has 5"),
        ({"force_words_ids": [[5, 2]]}, r"has \[5, 2\], with the end of sequence \(2\) in it"),
        ({"force_words_ids": [[13]]}, "has 13, but the model's last token is 12"),
        ({"force_words_ids_by_row": [[[5]]]}, "has 1 rows, the batch 3"),
        ({"force_words_ids": [[5]], "force_words_ids_by_row": [[[5]]] * 3}, "exclude each other"),
        ({"constraints": ["a"]}, "use `force_words_ids`"),
        ({"gnmt_lenght_penalty": 0.6}, "gnmt_lenght_penalty"),
    ],
    ids=str,
)  # fmt: skip
def test_refusals(options: dict[str, Any], message: str) -> None:
    source, mask = ragged_batch(LENGTHS)
    with pytest.raises(ValueError, match=message):
        search(tiny_model(), source, mask, **options)


def test_misspelt_attributes_are_refused() -> None:
    source, mask = ragged_batch(LENGTHS)
    config = GenerationConfig(num_beams=4, max_new_tokens=3, coverge_penalty=0.2)
    with pytest.raises(ValueError, match="`coverge_penalty`: did you mean `coverage_penalty`"):
        tiny_model().generate(source, attention_mask=mask, generation_config=config)


@settings(max_examples=100, derandomize=True)
@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=12))
def test_banks_take_turns(candidates: list[tuple[int, int, int]]) -> None:
    scores, banks, ranks = torch.tensor(candidates).T[:, None].unbind()
    found = take_turns(scores.float(), banks, ranks)[0].tolist()
    left, expected = sorted(candidates, key=lambda one: -one[0]), []
    while left:
        rank = min(one[2] for one in left)
        for bank in sorted({one[1] for one in left if one[2] == rank}):
            best = next(one for one in left if one[1:] == (bank, rank))
            left.remove(best)
            expected.append(best)
    assert [candidates[index] for index in found] == expected
