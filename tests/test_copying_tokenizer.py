"""The tokenizer's ids for copied words, and training with them through the Trainer and the script."""

import random
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny_config, tiny_model
from scripts import load_script
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, PreTrainedTokenizerFast

from hf_rnn_seq2seq import (
    RnnSeq2SeqForConditionalGeneration,
    RnnSeq2SeqTokenizer,
    RnnSeq2SeqTrainer,
    RnnSeq2SeqTrainingArguments,
)
from hf_rnn_seq2seq.tokenizer_training import train_tokenizer

UNK = 3


SOURCES = ["who is Ann Bob Ann now", "is Zoe", "is it"]
TARGETS = ["now Bob it there who", "it Zoe Bob", "there is it"]


@pytest.fixture
def pair() -> RnnSeq2SeqTokenizer:
    """Both vocabularies know "is it now", one each "who here" and "there"; nobody knows a name."""
    return RnnSeq2SeqTokenizer(
        train_tokenizer(["who is here now", "is it"], "symbols"),
        train_tokenizer(["now there is it"], "symbols"),
        copies_source=True,
    )


def test_copy_ids_and_labels(pair: RnnSeq2SeqTokenizer) -> None:
    size = len(pair)
    known = pair.get_vocab()
    encoding = pair(SOURCES, text_target=TARGETS)
    who, ann, bob = size, size + 1, size + 2
    assert encoding["copy_ids"] == [
        [who, known["is"], ann, bob, ann, known["now"], 2],
        [known["is"], size, 2],
        [known["is"], known["it"], 2],
    ]
    assert encoding["labels"] == [
        [known["now"], bob, known["it"], known["there"], who, 2],
        [known["it"], size, UNK, 2],  # Bob is another source's
        [known["there"], known["is"], known["it"], 2],
    ]
    assert encoding["input_ids"] == pair.source_tokenizer(SOURCES)["input_ids"]
    alone = [pair(source, text_target=target) for source, target in zip(SOURCES, TARGETS, strict=True)]
    assert [one["copy_ids"] for one in alone] == encoding["copy_ids"]
    assert [one["labels"] for one in alone] == encoding["labels"]
    assert pair(SOURCES)["copy_ids"] == encoding["copy_ids"]
    assert "copy_ids" not in pair(text_target=TARGETS)
    assert pair.batch_decode(encoding["copy_ids"], source_texts=SOURCES, skip_special_tokens=True) == SOURCES


def test_the_setting_can_be_changed_and_is_saved(pair: RnnSeq2SeqTokenizer, tmp_path: Path) -> None:
    pair.save_pretrained(tmp_path / "on")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "on")
    assert isinstance(loaded, RnnSeq2SeqTokenizer)
    assert loaded(SOURCES, text_target=TARGETS).data == pair(SOURCES, text_target=TARGETS).data
    loaded.copies_source = False
    encoding = loaded(SOURCES, text_target=TARGETS)
    assert set(encoding) == {"input_ids", "attention_mask", "labels"}
    assert max(map(max, encoding["labels"])) < len(pair)
    loaded.save_pretrained(tmp_path / "off")
    assert not AutoTokenizer.from_pretrained(tmp_path / "off").copies_source


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["pt", "np", None])
def test_padding(pair: RnnSeq2SeqTokenizer, side: str, kind: str | None) -> None:
    pair.padding_side = side
    rows = pair(SOURCES, text_target=TARGETS)
    encoding = pair(SOURCES, text_target=TARGETS, padding=True, return_tensors=kind)
    fed = [{name: rows[name][i] for name in ("input_ids", "copy_ids")} for i in range(3)]
    padded = pair.pad(fed, return_tensors="np", pad_to_multiple_of=8)
    assert padded["copy_ids"].shape == padded["input_ids"].shape == (3, 8)
    for i in range(3):
        filler = [0] * (7 - len(rows["copy_ids"][i]))
        expected = rows["copy_ids"][i] + filler if side == "right" else filler + rows["copy_ids"][i]
        assert np.array_equal(encoding["copy_ids"][i], expected)
        assert np.array_equal(padded["copy_ids"][i, :7] if side == "right" else padded["copy_ids"][i, 1:], expected)
    assert len(encoding["labels"][1]) == 6
    single = pair(SOURCES[0], text_target=TARGETS[0], return_tensors="pt")
    assert single["copy_ids"].tolist() == rows["copy_ids"][:1]
    assert single["labels"].tolist() == rows["labels"][:1]


@pytest.mark.parametrize("side", ["right", "left"])
def test_cut_sources_decode_by_their_whole_text(pair: RnnSeq2SeqTokenizer, side: str) -> None:
    pair.truncation_side = side
    encoding = pair(SOURCES[0], text_target="Ann Bob who", truncation=True, max_length=4, max_target_length=9)
    kept = "who is Ann" if side == "right" else "Bob Ann now"
    assert pair.decode(encoding["copy_ids"], True, source_text=SOURCES[0]) == kept
    said = "Ann <unk> who" if side == "right" else "Ann Bob <unk>"
    assert pair.decode(encoding["labels"], source_text=SOURCES[0]) == f"{said} </s>"
    assert max(encoding["copy_ids"]) < len(pair) + len(encoding["copy_ids"])


def test_words_already_split(pair: RnnSeq2SeqTokenizer) -> None:
    words = [text.split() for text in SOURCES]
    targets = [text.split() for text in TARGETS]
    encoding = pair(words, text_target=targets, is_split_into_words=True)
    assert encoding.data == pair(SOURCES, text_target=TARGETS).data
    assert pair(words[0], is_split_into_words=True)["copy_ids"] == encoding["copy_ids"][0]
    assert pair.batch_decode(encoding["labels"], True, source_texts=words) == [
        "now Bob it there who",
        "it Zoe",
        TARGETS[2],
    ]


def test_decoding(pair: RnnSeq2SeqTokenizer) -> None:
    size, known = len(pair), pair.get_vocab()
    rows = [[1, size + 2, known["it"], 2], [size, size + 9, 0], [known["is"], size], [size + 1]]
    texts = pair.batch_decode(
        torch.tensor([row + [0] * (4 - len(row)) for row in rows]), True, source_texts=SOURCES[:2]
    )
    assert texts == ["Bob it", "who", "is Zoe", ""]  # two of each; what stands for nothing is unknown, and so special
    assert pair.batch_decode(rows) == ["<s> <unk> it </s>", "<unk> <unk> <pad>", "is <unk>", "<unk>"]
    assert pair.batch_decode(rows[:2], source_texts=SOURCES[:2]) == [
        "<s> Bob it </s>",
        "Zoe <unk> <pad>",
    ]
    assert pair.decode(rows[0], source_text=SOURCES[0]) == "<s> Bob it </s>"
    assert pair.decode([rows[0], rows[2]], source_text=SOURCES[0]) == ["<s> Bob it </s>", "is who"]
    assert pair.decode(size, source_text=SOURCES[1]) == "Zoe"
    assert pair.batch_decode([], source_texts=[]) == []
    with pytest.raises(ValueError, match="3 sequences can't be shared out among 2 source_texts"):
        pair.batch_decode(rows[:3], source_texts=SOURCES[:2])


def test_special_tokens_are_no_words(pair: RnnSeq2SeqTokenizer) -> None:
    pair.source_tokenizer.add_special_tokens({"extra_special_tokens": ["<de>"]})
    pair.add_tokens(["<sep>"])
    pair.source_tokenizer.add_tokens(["<only>"])
    encoding = pair("Ann <sep> <only> <de> Bob </s> <unk>", split_special_tokens=False)
    size = len(pair)
    sep = pair.get_vocab()["<sep>"]
    assert encoding["copy_ids"] == [size, sep, size + 1, UNK, size + 2, 2, UNK, 2]
    # As text they are words of two pieces (see `symbols`), and can't be mistaken.
    assert pair("Ann </s>")["copy_ids"] == [size, size + 1, size + 2, 2]


def test_words_of_other_tokenizers() -> None:
    """With marks for spaces, lower-casing and punctuation, a word is copied as the vocabulary would write it."""
    train = ["The man , here ."] * 2
    source = train_tokenizer(train, "word", lowercase=True)
    pair = RnnSeq2SeqTokenizer(source, train_tokenizer(["the dog ."], "word", lowercase=True), copies_source=True)
    text = "The  Dog-man, met Ömer."
    encoding = pair(text, text_target="the dog met Ömer.")
    assert pair.decode(encoding["copy_ids"], True, source_text=text) == text.lower()
    assert pair.decode(encoding["labels"], True, source_text=text) == "the dog met ömer."
    characters = RnnSeq2SeqTokenizer(
        train_tokenizer(["ab"], "char", unicode_normalization="nfd"),
        train_tokenizer(["ab"], "char", unicode_normalization="nfd"),
        copies_source=True,
    )
    one = characters("a한b", text_target="b한a")  # one character, three pieces at the same place of the text
    assert len(set(one["copy_ids"])) == len(one["copy_ids"]) == 6
    assert one["labels"][:-1] == [one["copy_ids"][i] for i in (4, 1, 2, 3, 0)]


def test_subwords_copy_by_their_text() -> None:
    """Nothing is unknown to bytes; what one vocabulary has and the other has not still is a word to copy."""
    source, target = train_tokenizer(["low lower"], "byte_bpe"), train_tokenizer(["new newer"], "byte_bpe")
    pair = RnnSeq2SeqTokenizer(source, target, copies_source=True)
    text = "lower newer Ω"
    encoding = pair(text)
    assert pair.decode(encoding["copy_ids"], True, source_text=text) == text
    known = pair.get_vocab()
    for token, copy_id in zip(
        pair.source_tokenizer.convert_ids_to_tokens(encoding["input_ids"]), encoding["copy_ids"], strict=True
    ):
        assert copy_id == known.get(token, copy_id)
        assert (copy_id >= len(pair)) == (token not in known)


def test_the_tokenizer_refuses(pair: RnnSeq2SeqTokenizer) -> None:
    with pytest.raises(ValueError, match="no text_pair"):
        pair("is", "it")
    with pytest.raises(ValueError, match="return_overflowing_tokens"):
        pair("is it", truncation=True, max_length=2, return_overflowing_tokens=True)
    with pytest.raises(ValueError, match="text has 3 rows and text_target 2"):
        pair(SOURCES, text_target=TARGETS[:2])
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "a": 1}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    no_unknown = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")
    with pytest.raises(ValueError, match="unk_token"):
        RnnSeq2SeqTokenizer(no_unknown, no_unknown, copies_source=True)("a")


words = st.lists(
    st.sampled_from(["is", "it", "now", "who", "there", "Ann", "Bob", "<unk", "▁x", "é", "😀"]), max_size=9
)


@settings(max_examples=60)
@given(rows=st.lists(st.tuples(words, words), min_size=1, max_size=4), side=st.sampled_from(["left", "right"]))
def test_round_trips(rows: list[tuple[list[str], list[str]]], side: str) -> None:
    pair = ROUND_TRIP_PAIR
    pair.padding_side = side
    sources, targets = ([" ".join(row[i]) for row in rows] for i in (0, 1))
    encoding = pair(sources, text_target=targets, padding=True)
    assert pair.batch_decode(encoding["copy_ids"], True, source_texts=sources) == sources
    said = [
        " ".join(word if word in source or word in pair.get_vocab() else "<unk>" for word in target)
        for source, target in rows
    ]
    labels = [[i for i in row if i not in (0, 2)] for row in encoding["labels"]]
    assert pair.batch_decode(labels, source_texts=sources) == said
    for row in encoding["copy_ids"]:
        outside = [i for i in dict.fromkeys(row) if i >= len(pair)]
        assert outside == list(range(len(pair), len(pair) + len(outside)))


ROUND_TRIP_PAIR = RnnSeq2SeqTokenizer(
    train_tokenizer(["who is here now", "is it"], "symbols"),
    train_tokenizer(["now there is it"], "symbols"),
    copies_source=True,
)


# Training.


def test_generate_takes_the_tokenizers_ids(pair: RnnSeq2SeqTokenizer) -> None:
    """Whole batches, with prompts that hold words outside the vocabulary, and stop strings among known ones."""
    model = tiny_model(head_type="pointer_generator", vocab_size=len(pair), source_vocab_size=pair.source_vocab_size)
    batch = pair(SOURCES, padding=True, return_tensors="pt")
    prompt = torch.tensor([[1, len(pair)]] * 3)
    free = model.generate(**batch, decoder_input_ids=prompt, max_new_tokens=4)
    assert torch.equal(free[:, :2], prompt)
    stopped = model.generate(
        **batch, decoder_input_ids=prompt, max_new_tokens=4, tokenizer=pair, stop_strings=["is", "it", "now", "there"]
    )
    assert stopped.tolist() != free.tolist()
    for row, whole in zip(stopped, free, strict=True):
        ends = [place for place, i in enumerate(whole.tolist()) if 3 < i < len(pair)]
        length = ends[0] + 1 if ends else len(whole)
        assert torch.equal(row[:length], whole[:length])
        assert (row[length:] == 0).all()


def people(count: int, seed: int, initial: str) -> list[dict[str, str]]:
    """Two names in a row, to be said in reverse; names are syllables after an `initial`."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        a, b = (initial + "".join(rng.choice("aeiou") + rng.choice("bdgmn") for _ in range(3)) for _ in range(2))
        rows.append({"source": f"{a} met {b} today", "target": f"today {b} saw {a}"})
    return rows


@pytest.mark.parametrize("shared", [False, True], ids=["two vocabularies", "one vocabulary"])
def test_training_learns_to_copy_unseen_words(shared: bool, tmp_path: Path) -> None:
    train, test = people(160, 0, "k"), people(12, 1, "s")
    source = train_tokenizer(["met today", "saw"] if shared else ["met today"], "symbols")
    target = source if shared else train_tokenizer(["today saw"], "symbols")
    tokenizer = RnnSeq2SeqTokenizer(source, target, copies_source=True)
    torch.manual_seed(0)
    model = RnnSeq2SeqForConditionalGeneration(
        tiny_config(
            vocab_size=len(tokenizer),
            source_vocab_size=None if shared else tokenizer.source_vocab_size,
            hidden_size=24,
            head_type="pointer_generator",
            coverage_loss_weight=0.1,
            dropout=0,
            embedding_dropout=0,
            output_dropout=0,
        )
    )
    assert len(tokenizer) < 10

    def encode(rows: list[dict[str, str]]) -> list[dict[str, list[int]]]:
        return [dict(tokenizer(row["source"], text_target=row["target"])) for row in rows]

    seen: list[list[str]] = []

    def compute_metrics(output: Any) -> dict[str, float]:
        ids = np.where(output.predictions == -100, 0, output.predictions)
        seen.append(tokenizer.batch_decode(ids, True, source_texts=[row["source"] for row in test]))
        return {"exact": float(np.mean([a == row["target"] for a, row in zip(seen[-1], test, strict=True)]))}

    trainer = RnnSeq2SeqTrainer(
        model=model,
        args=RnnSeq2SeqTrainingArguments(
            output_dir=str(tmp_path),
            num_train_epochs=12,
            learning_rate=0.02,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=5,
            generation_max_length=8,
            label_smoothing_factor=0.1 if shared else 0.0,
            train_sampling_strategy="random",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            save_strategy="no",
        ),
        train_dataset=encode(train),
        eval_dataset=encode(test),
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        compute_metrics=compute_metrics,
    )
    trainer.train()
    for beams in (1, 4):
        assert trainer.evaluate(num_beams=beams)["eval_exact"] == 1.0, seen[-1]
    assert seen[0] == [row["target"] for row in test]

    trainer.save_model(str(tmp_path))
    again = RnnSeq2SeqForConditionalGeneration.from_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    batch = loaded([row["source"] for row in test], padding=True, return_tensors="pt")
    outputs = again.generate(**batch, num_beams=4, num_return_sequences=2, max_length=8)
    texts = loaded.batch_decode(outputs, True, source_texts=[row["source"] for row in test])
    assert texts[::2] == seen[0]


@pytest.mark.parametrize("shared", [False, True], ids=["two vocabularies", "one vocabulary"])
def test_the_training_script_copies(shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    script = load_script("run_seq2seq")
    flags = ["--output_dir", str(tmp_path / "out"), "--do_train", "--do_eval", "--do_predict", "--num_beams", "2"]
    for split, rows in (("train", people(60, 0, "k")), ("validation", people(5, 1, "s")), ("test", people(7, 2, "s"))):
        file = tmp_path / f"{split}.tsv"
        file.write_text("".join(f"{row['source']}\t{row['target']}\n" for row in rows), encoding="utf-8")
        flags += [f"--{split}_file", str(file)]
    flags += ["--head_type", "pointer_generator", "--source_tokenizer_kind", "symbols"]
    flags += ["--tokenizer_min_frequency", "20", "--hidden_size", "16", "--embedding_size", "8", "--max_steps", "30"]
    flags += ["--learning_rate", "0.03", "--per_device_train_batch_size", "20", "--per_device_eval_batch_size", "3"]
    flags += ["--metrics", "bleu", "--use_cpu", "--disable_tqdm", "true", "--num_attention_plots", "1"]
    script.main([*flags, "--shared_vocabulary"] if shared else flags)

    model = RnnSeq2SeqForConditionalGeneration.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.copies_source
    assert (model.config.unk_token_id, model.config.vocab_size) == (tokenizer.unk_token_id, len(tokenizer))
    assert model.config.shared_vocabulary == shared
    sources = [row["source"] for row in people(7, 2, "s")]
    outputs = model.generate(**tokenizer(sources, padding=True, return_tensors="pt"))
    assert (outputs >= len(tokenizer)).any()
    texts = tokenizer.batch_decode(outputs, True, source_texts=sources)
    assert (tmp_path / "out" / "generated_predictions.txt").read_text(encoding="utf-8").splitlines() == texts
    assert list((tmp_path / "out" / "attention_plots").iterdir())
