"""The pair of a source and a target tokenizer under the interface of one."""

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    StopStringCriteria,
    TextStreamer,
)

from hf_rnn_seq2seq.tokenization_rnn_seq2seq import RnnSeq2SeqTokenizer
from hf_rnn_seq2seq.tokenizer_training import TOKENIZER_BUILDERS, train_tokenizer

WORDS = ["cab", "한국", "bad"]
PHONES = ["k æ b", "h a n k u k", "b æ d"]


@pytest.fixture
def source() -> PreTrainedTokenizerFast:
    return train_tokenizer(WORDS, "char")


@pytest.fixture
def target() -> PreTrainedTokenizerFast:
    return train_tokenizer(PHONES, "symbols")


@pytest.fixture
def pair(source: PreTrainedTokenizerFast, target: PreTrainedTokenizerFast) -> RnnSeq2SeqTokenizer:
    return RnnSeq2SeqTokenizer(source_tokenizer=source, target_tokenizer=target)


def assert_same(one: RnnSeq2SeqTokenizer, other: RnnSeq2SeqTokenizer) -> None:
    assert one.source_tokenizer.get_vocab() == other.source_tokenizer.get_vocab()
    assert one.get_vocab() == other.get_vocab() == other.target_tokenizer.get_vocab()
    assert one.special_tokens_map == other.special_tokens_map
    assert one.source_special_tokens == other.source_special_tokens
    for name in ("padding_side", "truncation_side", "model_max_length", "split_special_tokens"):
        assert getattr(one, name) == getattr(other, name) == getattr(other.source_tokenizer, name)
    assert one(WORDS, text_target=PHONES).data == other(WORDS, text_target=PHONES).data
    ids = one(text_target=PHONES).input_ids
    assert one.batch_decode(ids) == other.batch_decode(ids)


def test_each_text_goes_to_its_side(
    pair: RnnSeq2SeqTokenizer, source: PreTrainedTokenizerFast, target: PreTrainedTokenizerFast
) -> None:
    both = pair(WORDS, text_target=PHONES)
    assert set(both) == {"input_ids", "attention_mask", "labels"}
    assert both.input_ids == source(WORDS).input_ids == pair(WORDS).input_ids
    assert both["labels"] == target(PHONES).input_ids == pair(text_target=PHONES).input_ids
    assert both.input_ids != target(WORDS).input_ids
    assert pair.encode(WORDS[0]) == source.encode(WORDS[0])
    assert pair.tokenize(WORDS[0]) == ["c", "a", "b"]
    assert pair("", text_target="").data == {"input_ids": [2], "attention_mask": [1], "labels": [2]}
    with pytest.raises(ValueError, match="text_target"):
        pair()


def test_everything_but_text_is_the_targets(pair: RnnSeq2SeqTokenizer, target: PreTrainedTokenizerFast) -> None:
    labels = pair(text_target=PHONES)["input_ids"]
    assert pair.batch_decode(labels, skip_special_tokens=True) == PHONES
    assert pair.decode(torch.tensor(labels[0]), skip_special_tokens=True) == PHONES[0]
    assert pair.convert_ids_to_tokens(labels[0]) == ["k", "æ", "b", "</s>"]
    assert pair.convert_tokens_to_ids(["k", "æ", "b", "</s>"]) == labels[0]
    assert pair.get_vocab() == target.get_vocab()
    assert len(pair) == pair.vocab_size == pair.target_vocab_size == len(target)
    assert (pair.pad_token_id, pair.bos_token_id, pair.eos_token_id, pair.unk_token_id) == (0, 1, 2, 3)
    assert pair.all_special_ids == [1, 2, 3, 0]


def test_either_side_alone(pair: RnnSeq2SeqTokenizer, source: PreTrainedTokenizerFast) -> None:
    ids = pair(WORDS).input_ids
    assert pair.source_tokenizer.batch_decode(ids, skip_special_tokens=True) == WORDS
    assert pair.source_tokenizer.convert_ids_to_tokens(ids[0]) == ["c", "a", "b", "</s>"]
    assert pair.source_vocab_size == len(pair.source_tokenizer) == len(source) != pair.target_vocab_size
    assert pair.target_tokenizer(PHONES).input_ids == pair(text_target=PHONES).input_ids


def test_an_error_in_the_target_leaves_nothing_behind(pair: RnnSeq2SeqTokenizer) -> None:
    before = pair(WORDS).input_ids
    with pytest.raises(ValueError, match="text input must be of type"):
        pair(WORDS, text_target=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="text input must be of type"):
        pair(3, text_target=PHONES)  # type: ignore[arg-type]
    assert pair(WORDS).input_ids == before


def test_truncation_and_padding(pair: RnnSeq2SeqTokenizer) -> None:
    short = pair(WORDS[0], text_target=PHONES[1], truncation=True, max_length=3, max_target_length=5)
    assert pair.source_tokenizer.convert_ids_to_tokens(short.input_ids) == ["c", "a", "</s>"]
    assert pair.convert_ids_to_tokens(short["labels"]) == ["h", "a", "n", "k", "</s>"]
    same = pair(WORDS[0], text_target=PHONES[1], truncation=True, max_length=3)
    assert len(same.input_ids) == len(same["labels"]) == 3
    # The limits of that call hold for that call alone.
    assert len(pair(WORDS[0], text_target=PHONES[1])["labels"]) == 7

    padded = pair(WORDS, text_target=PHONES, padding=True, return_tensors="pt")
    assert padded.input_ids.shape == padded.attention_mask.shape == (3, 4)
    assert padded.attention_mask.sum(1).tolist() == [4, 3, 4]
    assert padded["labels"].shape == (3, 7)
    assert padded["labels"][0, 4:].tolist() == [0, 0, 0]


def test_settings_are_those_of_both_sides(pair: RnnSeq2SeqTokenizer) -> None:
    pair.padding_side = pair.truncation_side = "left"
    pair.model_max_length = 3
    for padded in (pair(WORDS, padding=True), pair.pad({"input_ids": pair(WORDS).input_ids})):
        assert padded.attention_mask[1] == [0, 1, 1, 1]
    encoded = pair(WORDS[0], text_target=PHONES[0], truncation=True)
    assert pair.source_tokenizer.convert_ids_to_tokens(encoded.input_ids) == ["a", "b", "</s>"]
    assert pair.convert_ids_to_tokens(encoded["labels"]) == ["æ", "b", "</s>"]
    assert pair(text_target=["k", "k k"], padding=True).attention_mask == [[0, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize("side", ["right", "left"])
def test_collator(pair: RnnSeq2SeqTokenizer, side: str) -> None:
    pair.padding_side = side
    batch = DataCollatorForSeq2Seq(pair)([pair(w, text_target=p) for w, p in zip(WORDS, PHONES, strict=True)])
    assert batch["input_ids"].shape == (3, 4)
    assert batch["labels"].shape == (3, 7)
    padding = slice(4, None) if side == "right" else slice(0, 3)
    assert batch["labels"][0, padding].tolist() == [-100] * 3
    assert batch["input_ids"][1, -1 if side == "right" else 0] == 0


def test_special_tokens_in_text_are_text(
    pair: RnnSeq2SeqTokenizer, source: PreTrainedTokenizerFast, target: PreTrainedTokenizerFast
) -> None:
    for ids in (pair("a</s>b").input_ids, pair(text_target="a </s> <pad> <s> b").input_ids):
        assert ids[-1] == 2
        assert not {0, 1, 2}.intersection(ids[:-1])
    parsed = RnnSeq2SeqTokenizer(source, target, split_special_tokens=False)
    assert parsed("a</s>b").input_ids[1] == parsed(text_target="a </s> b").input_ids[1] == 2


def test_save_and_load(pair: RnnSeq2SeqTokenizer, tmp_path: Path) -> None:
    pair.add_tokens(["<2ko>"])
    pair.source_tokenizer.add_tokens(["zz"])
    pair.add_special_tokens({"extra_special_tokens": ["<x>"]})
    pair.padding_side = "left"
    pair.model_max_length = 77
    pair(WORDS, text_target=PHONES, truncation=True, max_length=2, padding="max_length")
    files = {Path(file).name for file in pair.save_pretrained(tmp_path)}
    assert files == {"tokenizer_config.json", "tokenizer.json", "source_tokenizer.json"}
    for name in ("tokenizer.json", "source_tokenizer.json"):
        saved = json.loads((tmp_path / name).read_text(encoding="utf-8"))
        assert saved["truncation"] is None
        assert saved["padding"] is None
    loaded = RnnSeq2SeqTokenizer.from_pretrained(tmp_path)
    assert_same(pair, loaded)
    assert loaded("zz<2ko>").input_ids == pair("zz<2ko>").input_ids
    loaded.save_pretrained(tmp_path / "again")
    assert_same(pair, RnnSeq2SeqTokenizer.from_pretrained(tmp_path / "again"))


@pytest.mark.parametrize("kind", list(TOKENIZER_BUILDERS))
def test_every_kind_on_either_side_survives_saving(kind: str, tmp_path: Path) -> None:
    texts = ["A man, 한국 (x).", "a b"]
    one = train_tokenizer(texts, kind, vocab_size=300)  # type: ignore[arg-type]
    other = train_tokenizer(PHONES, "symbols")
    for pair in (RnnSeq2SeqTokenizer(one, other), RnnSeq2SeqTokenizer(other, one)):
        pair.save_pretrained(tmp_path)
        loaded = RnnSeq2SeqTokenizer.from_pretrained(tmp_path)
        assert loaded(texts, text_target=texts).data == pair(texts, text_target=texts).data
        ids = pair(text_target=texts)["input_ids"]
        assert loaded.batch_decode(ids) == pair.batch_decode(ids)


class PairConfig(PreTrainedConfig):
    model_type = "rnn_seq2seq_tokenization_test"


def test_auto_tokenizer(pair: RnnSeq2SeqTokenizer, tmp_path: Path) -> None:
    AutoTokenizer.register(PairConfig, RnnSeq2SeqTokenizer, exist_ok=True)
    pair.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, padding_side="left")
    assert isinstance(loaded, RnnSeq2SeqTokenizer)
    assert loaded.source_tokenizer.padding_side == "left"
    assert loaded(WORDS, text_target=PHONES).data == pair(WORDS, text_target=PHONES).data


def test_remote_code(pair: RnnSeq2SeqTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RnnSeq2SeqTokenizer, "_auto_class", None)
    RnnSeq2SeqTokenizer.register_for_auto_class()
    pair.save_pretrained(tmp_path / "one")
    assert (tmp_path / "one" / "tokenization_rnn_seq2seq.py").is_file()
    program = """
import sys
from transformers import AutoTokenizer
sys.modules["hf_rnn_seq2seq"] = None  # an import of the package fails
tok = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(tok).__module__.startswith("transformers_modules"), tok(["cab"], text_target=["k b"]).data)
tok.save_pretrained(sys.argv[2])
"""
    for load, save in (("one", "two"), ("two", "three")):
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / load), str(tmp_path / save)],
            capture_output=True,
            text=True,
            check=True,
            cwd=tmp_path,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")},
        )
        assert done.stdout.strip() == f"True {pair(['cab'], text_target=['k b']).data}"
    assert (tmp_path / "three" / "tokenization_rnn_seq2seq.py").is_file()


def test_half_a_pair_is_refused(pair: RnnSeq2SeqTokenizer, tmp_path: Path) -> None:
    pair.save_pretrained(tmp_path)
    (tmp_path / "source_tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"has no source_tokenizer\.json: not a saved pair"):
        RnnSeq2SeqTokenizer.from_pretrained(tmp_path)


def test_copies_are_whole_and_independent(pair: RnnSeq2SeqTokenizer) -> None:
    size = len(pair)
    for copied in (copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))):
        assert_same(pair, copied)
        copied.add_tokens("new")
        copied.padding_side = "left"
        assert copied.target_vocab_size == len(copied) == size + 1
        assert pair.target_vocab_size == len(pair) == size
        assert pair.source_tokenizer.padding_side == "right"


def test_the_originals_stay_apart(
    pair: RnnSeq2SeqTokenizer, source: PreTrainedTokenizerFast, target: PreTrainedTokenizerFast
) -> None:
    pair.add_tokens("new")
    target.add_tokens(["p", "q"])
    assert pair.source_vocab_size == len(source) + 1
    assert pair.target_vocab_size == len(target) - 1


def test_datasets_map_and_fingerprint(pair: RnnSeq2SeqTokenizer) -> None:
    datasets = pytest.importorskip("datasets")
    from datasets.fingerprint import Hasher

    fresh = Hasher.hash(pair)
    pair(WORDS, text_target=PHONES, truncation=True, max_length=2, padding=True)
    assert Hasher.hash(pair) == fresh
    assert Hasher.hash(copy.deepcopy(pair)) == fresh
    data = datasets.Dataset.from_dict({"word": WORDS * 2, "phones": PHONES * 2})

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return dict(pair(list(batch["word"]), text_target=list(batch["phones"])))

    encoded = data.map(encode, batched=True, num_proc=2, remove_columns=["word", "phones"])
    expected = pair(WORDS * 2, text_target=PHONES * 2)
    assert list(encoded["input_ids"]) == expected.input_ids
    assert list(encoded["labels"]) == expected["labels"]
    pair.add_tokens("new")
    assert Hasher.hash(pair) != fresh


def test_add_tokens(pair: RnnSeq2SeqTokenizer) -> None:
    sizes = pair.source_vocab_size, pair.target_vocab_size
    assert pair.add_tokens(["<2ko>", "k"]) == 1  # "k" is a target token already, and new to the source
    assert (pair.source_vocab_size, pair.target_vocab_size) == (sizes[0] + 2, sizes[1] + 1)
    assert len(pair) == pair.target_vocab_size
    assert pair.tokenize("a<2ko>b") == ["a", "<2ko>", "b"]
    assert pair.source_tokenizer.add_tokens(["only"]) == 1
    assert (pair.source_vocab_size, pair.target_vocab_size) == (sizes[0] + 3, sizes[1] + 1)
    assert pair.target_tokenizer.add_tokens(["here"]) == 1
    assert len(pair) == sizes[1] + 2
    assert pair.decode(pair(text_target="k here").input_ids, skip_special_tokens=True) == "k here"


def test_add_special_tokens(pair: RnnSeq2SeqTokenizer) -> None:
    sizes = pair.source_vocab_size, pair.target_vocab_size
    assert sizes[0] != sizes[1]
    expected = rf"sep_token '<sep>' must have the same id .* {sizes[0]} in the source's and {sizes[1]} in the target's"
    with pytest.raises(ValueError, match=expected):
        pair.add_special_tokens({"sep_token": "<sep>"})
    assert (pair.source_vocab_size, pair.target_vocab_size, pair.sep_token) == (*sizes, None)
    assert pair.add_special_tokens({"extra_special_tokens": ["<x>"]}) == 1
    assert (pair.source_vocab_size, pair.target_vocab_size) == (sizes[0] + 1, sizes[1] + 1)
    assert pair.all_special_ids[-1] == sizes[1]
    assert pair.source_tokenizer.all_special_ids[-1] == sizes[0]
    pair.target_tokenizer.add_tokens([f"t{i}" for i in range(max(0, sizes[0] - sizes[1]))])
    pair.source_tokenizer.add_tokens([f"s{i}" for i in range(max(0, sizes[1] - sizes[0]))])
    assert pair.add_special_tokens({"sep_token": "<sep>"}) == 1  # now the ids are equal
    assert pair.sep_token_id == pair.source_tokenizer.sep_token_id == max(sizes) + 1


def test_setting_a_special_token(pair: RnnSeq2SeqTokenizer) -> None:
    pair.pad_token = pair.eos_token
    assert pair.pad_token_id == 2
    assert pair(WORDS, padding=True).input_ids[1][-1] == 2
    assert pair(text_target=PHONES, padding=True).input_ids[0][-1] == 2
    with pytest.raises(ValueError, match="pad_token 'k' must have the same id"):
        pair.pad_token = "k"
    with pytest.raises(ValueError, match="pad_token must be set"):
        pair.pad_token = None
    assert pair.pad_token == "</s>"


def test_disagreeing_sides_are_refused(source: PreTrainedTokenizerFast, target: PreTrainedTokenizerFast) -> None:
    shifted_model = json.loads(source.backend_tokenizer.to_str())
    vocab = shifted_model["model"]["vocab"]
    vocab["</s>"], vocab["<unk>"] = vocab["<unk>"], vocab["</s>"]
    for token in shifted_model["added_tokens"]:
        token["id"] = vocab[token["content"]]
    shifted = PreTrainedTokenizerFast(
        tokenizer_object=type(source.backend_tokenizer).from_str(json.dumps(shifted_model)),
        **source.special_tokens_map,
    )
    with pytest.raises(ValueError, match=r"eos_token '</s>' must have the same id .* 3 in the source's and 2 in the"):
        RnnSeq2SeqTokenizer(shifted, target)
    source.padding_side = "left"
    with pytest.raises(ValueError, match="padding_side is 'left' in source_tokenizer and 'right' in target_tokenizer"):
        RnnSeq2SeqTokenizer(source, target)
    assert RnnSeq2SeqTokenizer(source, target, padding_side="left").padding_side == "left"
    target.pad_token = None
    source.padding_side = "right"
    with pytest.raises(ValueError, match="pad_token must be set in target_tokenizer"):
        RnnSeq2SeqTokenizer(source, target)


def test_missing_sides_are_refused(target: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TypeError, match="source_tokenizer must be a PreTrainedTokenizerFast, not NoneType"):
        RnnSeq2SeqTokenizer(target_tokenizer=target)
    with pytest.raises(TypeError, match="target_tokenizer must be a PreTrainedTokenizerFast, not str"):
        RnnSeq2SeqTokenizer(target, "folder")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="needs source_tokenizer= and target_tokenizer="):
        RnnSeq2SeqTokenizer()


def test_a_source_only_special_token_is_kept(target: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    source = train_tokenizer(WORDS, "char")
    source.add_special_tokens({"mask_token": "<mask>"})
    pair = RnnSeq2SeqTokenizer(source, target)
    assert pair.mask_token is None
    pair.save_pretrained(tmp_path)
    assert RnnSeq2SeqTokenizer.from_pretrained(tmp_path).source_tokenizer.mask_token == "<mask>"


def test_stop_strings_and_streaming_on_the_target(capsys: pytest.CaptureFixture[str]) -> None:
    pair = RnnSeq2SeqTokenizer(train_tokenizer(["한국"], "char"), train_tokenizer(["abcdefgh xy"], "char"))
    ids = torch.tensor(pair(["한"], text_target=["ab xy"])["labels"])[:, :-1]
    stops = StopStringCriteria(pair.target_tokenizer, [" xy"])
    assert stops(ids, None).tolist() == [True]
    assert stops(ids[:, :-1], None).tolist() == [False]
    streamer = TextStreamer(pair, skip_special_tokens=True)
    for token in ids[0]:
        streamer.put(token[None])
    streamer.end()
    assert capsys.readouterr().out == "ab xy\n"
