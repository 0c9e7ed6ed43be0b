"""OpenNMT-py checkpoints: against its equations in float64, and, where it is installed, against itself."""

import argparse
import json
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from beams import tiny_model
from models import batch_of, ragged_batch
from plain_opennmt import SOURCE_TOKENS, TARGET_TOKENS, PlainOpennmt, make_checkpoint, plain_beam
from safetensors.torch import save_file

from hf_rnn_seq2seq import RnnSeq2SeqTokenizer
from hf_rnn_seq2seq.convert import ConversionError, ConversionOptions, Converted, convert

SOURCES = ["ein x drei x both zwei", "drei", "zwei zwei unknown both"]
TARGETS = ["one two z", "both", "three y both both one"]

MODELS: dict[str, dict[str, Any]] = {
    "brnn-lstm-general": {},
    "rnn-gru-general": {"encoder_type": "rnn", "rnn_type": "GRU"},
    "brnn-gru-dot-no-feed": {"rnn_type": "GRU", "global_attention": "dot", "input_feed": 0, "coverage_attn": True},
    "brnn-lstm-dot-layers": {"global_attention": "dot", "input_feed": 0, "enc_layers": 2, "dec_layers": 2},
    "brnn-lstm-mlp": {"global_attention": "mlp", "enc_layers": 3, "dec_layers": 2},
    "rnn-gru-mlp-no-feed": {"encoder_type": "rnn", "rnn_type": "GRU", "global_attention": "mlp", "input_feed": 0},
    "bridge": {"bridge": True, "enc_layers": 3, "dec_layers": 3},
    "bridge-gru": {"bridge": True, "rnn_type": "GRU", "enc_layers": 2, "dec_layers": 1},
    "bridge-rnn": {"bridge": True, "encoder_type": "rnn", "enc_layers": 2, "dec_layers": 2},
    "sparsemax": {"global_attention_function": "sparsemax"},
    "no-attention": {"global_attention": "none"},
    "no-attention-no-feed": {"global_attention": "none", "input_feed": 0, "encoder_type": "rnn"},
    "shared": {"share_embeddings": True, "share_decoder_embeddings": True},
    "copy": {"copy_attn": True, "reuse_copy_attn": True, "global_attention": "mlp", "coverage_attn": True},
}


def converted(folder: Path, checkpoint: dict[str, Any], **options: Any) -> Converted:
    torch.save(checkpoint, folder / "model.pt")
    return convert("opennmt", folder / "model.pt", ConversionOptions(**options))


def inputs_of(tokenizer: RnnSeq2SeqTokenizer, sources: list[str], **kwargs: Any) -> dict[str, torch.Tensor]:
    batch = tokenizer(sources, padding=True, return_tensors="pt", **kwargs)
    return dict(batch)


@pytest.mark.parametrize("name", MODELS)
def test_is_the_original(tmp_path: Path, name: str) -> None:
    checkpoint = make_checkpoint(**MODELS[name])
    plain = PlainOpennmt(checkpoint)
    result = converted(tmp_path, checkpoint)
    model = result.model().double()
    tokens = checkpoint["vocab"]
    targets = [text if name != "shared" else "ein both x" for text in TARGETS]
    batch = inputs_of(result.tokenizer, SOURCES, text_target=targets)
    with torch.no_grad():
        logits = model(**batch).logits.log_softmax(-1)
    for row, (source, target) in enumerate(zip(SOURCES, targets, strict=True)):
        ids = plain.source_ids(source)
        assert batch["input_ids"][row, : len(ids)].tolist() == ids
        prefix = [tokens["tgt"].index(word) for word in ["<s>", *target.split()]]
        assert batch["labels"][row, : len(prefix)].tolist() == [*prefix[1:], 3]
        scores = plain.decoder(source)
        for step in range(1, len(prefix) + 1):
            expected = scores(prefix[:step])
            wanted = expected > -50  # what cannot be copied has a probability of about 0 here, exactly 0 there
            assert wanted.sum() >= len(tokens["tgt"]) - 1
            found = logits[row, step - 1, : len(expected)]
            torch.testing.assert_close(found[wanted], expected[wanted], atol=2e-6, rtol=1e-6)  # float32 weights
            assert (found[~wanted] < -50).all()


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("name", ["brnn-lstm-general", "rnn-gru-mlp-no-feed", "copy"])
def test_beam_search_is_the_original(tmp_path: Path, name: str, alpha: float) -> None:
    differs = 0
    for seed in range(4):
        checkpoint = make_checkpoint(seed, **MODELS[name])
        for value in checkpoint["generator"].values():
            value *= 0.4  # less sure of anything, so that hypotheses end at many lengths
        result = converted(tmp_path, checkpoint)
        assert result.generation == {"num_beams": 5, "opennmt_length_penalty": 1.0, "max_new_tokens": 250}
        model, plain = result.model().double(), PlainOpennmt(checkpoint)
        batch = inputs_of(result.tokenizer, SOURCES)
        longest = {"max_new_tokens": 9, "num_beams": 3}
        found = model.generate(**batch, **longest, opennmt_length_penalty=alpha)
        other = model.generate(**batch, **longest, opennmt_length_penalty=None, length_penalty=alpha)
        for row, source in enumerate(SOURCES):
            expected = plain_beam(plain.decoder(source), 3, alpha, start=2, end=3, longest=9)
            assert found[row, : len(expected)].tolist() == expected
            assert (found[row, len(expected) :] == model.config.pad_token_id).all() or expected[-1] == 3
            differs += other[row, : len(expected)].tolist() != expected
    if alpha and name == "rnn-gru-mlp-no-feed":
        assert differs > 0  # else the two searches are not told apart


def test_greedy_is_the_original(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(**MODELS["brnn-lstm-mlp"])
    result = converted(tmp_path, checkpoint)
    plain = PlainOpennmt(checkpoint)
    found = result.model().double().generate(**inputs_of(result.tokenizer, SOURCES), num_beams=1, max_new_tokens=7)
    for row, source in enumerate(SOURCES):
        scores, prefix = plain.decoder(source), [2]
        while prefix[-1] != 3 and len(prefix) < 8:
            prefix.append(int(scores(prefix).argmax()))
        assert found[row, : len(prefix)].tolist() == prefix


@pytest.mark.parametrize("beams", [1, 2, 4])
def test_opennmt_search_in_a_batch_and_with_prompts(beams: int) -> None:
    model = tiny_model(seed=2, attention_type="dot")
    source, mask = ragged_batch([5, 2, 7])
    options: dict[str, Any] = {"num_beams": beams, "max_new_tokens": 8}
    if beams > 1:
        options["opennmt_length_penalty"] = 0.7
    together = model.generate(source, attention_mask=mask, **options)
    for row, length in enumerate((5, 2, 7)):
        alone = model.generate(source[row : row + 1, :length], **options)
        width = min(alone.size(1), together.size(1))
        assert torch.equal(alone[0, :width], together[row, :width])


@pytest.mark.parametrize(
    "search", [{"opennmt_length_penalty": 0.7}, {"joeynmt_length_penalty": 0.7}, {"yoyodyne_beam_search": True}]
)
def test_early_stopping_is_not_read(search: dict[str, Any]) -> None:
    for seed in range(4):
        model = tiny_model(seed=seed)
        batch = batch_of(model, *ragged_batch([5, 2, 7]))
        options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 12, **search, "return_dict_in_generate": True}
        found = [
            model.generate(**batch, **options, early_stopping=value).sequences for value in (False, True, "never")
        ]
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    "other",
    [{"length_penalty": 0.5}, {"gnmt_length_penalty": 0.5}, {"coverage_penalty": 0.1}, {"force_words_ids": [[4]]}],
)
def test_opennmt_search_excludes_other_options(other: dict[str, Any]) -> None:
    source, mask = ragged_batch([3])
    with pytest.raises(ValueError, match=r"`opennmt_length_penalty`=1\.0 excludes"):
        tiny_model().generate(source, attention_mask=mask, num_beams=2, opennmt_length_penalty=1.0, **other)


def test_yoyodyne_search_is_on_or_off() -> None:
    source, mask = ragged_batch([3])
    for value in (0.5, 1, 0):
        with pytest.raises(ValueError, match=rf"`yoyodyne_beam_search` must be True or False, got {value}"):
            tiny_model().generate(source, attention_mask=mask, num_beams=2, yoyodyne_beam_search=value)
    with pytest.raises(ValueError, match=r"`yoyodyne_beam_search`=True excludes"):
        tiny_model().generate(source, attention_mask=mask, num_beams=2, yoyodyne_beam_search=True, length_penalty=0.5)
    with pytest.raises(ValueError, match="`yoyodyne_beam_search` needs beams"):
        tiny_model().generate(source, attention_mask=mask, yoyodyne_beam_search=True)


def test_opennmt_search_wants_a_number() -> None:
    source, mask = ragged_batch([3])
    with pytest.raises(ValueError, match="`opennmt_length_penalty` must be a number, got 'avg'"):
        tiny_model().generate(source, attention_mask=mask, num_beams=2, opennmt_length_penalty="avg")


# Files


class Field:
    """What stands for torchtext's and OpenNMT-py's classes of these attributes, under their names."""


def old_vocabulary(nested: bool) -> Any:
    """As 1.x and 2.x pickle it: fields, or (0.x) pairs of a name and a Vocab."""
    sides = {}
    for side, tokens in (("src", ["<unk>", "<blank>", *SOURCE_TOKENS[4:]]), ("tgt", TARGET_TOKENS)):
        vocabulary, field, multi = Field(), Field(), Field()
        vocabulary.__dict__.update(itos=list(tokens), stoi={token: i for i, token in enumerate(tokens)})
        field.__dict__.update(vocab=vocabulary, pad_token="<blank>")
        multi.__dict__.update(fields=[(side, field)])
        sides[side] = multi if nested else vocabulary
    return sides if nested else list(sides.items())


@pytest.fixture
def torchtext(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of that name for the time of pickling."""
    module = types.ModuleType("torchtext")
    module.Field = Field  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchtext", module)
    monkeypatch.setattr(Field, "__module__", "torchtext")


@pytest.mark.parametrize("nested", [True, False])
def test_version_2(tmp_path: Path, torchtext: None, monkeypatch: pytest.MonkeyPatch, nested: bool) -> None:
    checkpoint = make_checkpoint()
    plain = PlainOpennmt(checkpoint)
    table = "encoder.embeddings.make_embedding.emb_luts.0.weight"
    rows = [0, 1, *range(4, len(SOURCE_TOKENS))]  # a source without begin and end
    model = {**checkpoint["model"], table: checkpoint["model"][table][rows]}
    generator = {f"0.{name}": value for name, value in checkpoint["generator"].items()}
    opt = argparse.Namespace(**{k: v for k, v in vars(checkpoint["opt"]).items() if k != "model_task"}, rnn_size=6)
    old = {"model": model, "generator": generator, "vocab": old_vocabulary(nested), "opt": opt, "optim": None}
    torch.save(old, tmp_path / "model.pt")
    monkeypatch.delitem(sys.modules, "torchtext")

    with pytest.raises(ConversionError, match=r"more than tensors and plain values \(the class torchtext\.Field\)"):
        convert("opennmt", tmp_path / "model.pt")
    result = convert("opennmt", tmp_path / "model.pt", ConversionOptions(trust_pickle=True))
    assert result.origin == "OpenNMT-py 1 or 2"
    assert result.generation == {"num_beams": 5, "opennmt_length_penalty": 0.0, "max_new_tokens": 100}
    ids = result.tokenizer("ein\tdrei unknown")["input_ids"]
    assert [result.tokenizer.source_tokenizer.convert_ids_to_tokens(i) for i in ids] == ["ein", "drei", "<unk>"]
    with torch.no_grad():
        logits = result.model()(torch.tensor([ids]), decoder_input_ids=torch.tensor([[2]])).logits.log_softmax(-1)
    expected = plain.decoder("ein drei unknown")([2])
    torch.testing.assert_close(logits[0, 0].double(), expected, atol=1e-5, rtol=0)


def test_trusted_pickle_runs_nothing_of_the_packages(tmp_path: Path) -> None:
    """Objects of torchtext become plain attributes even if such a package is there."""
    checkpoint = make_checkpoint()
    torch.save(checkpoint, tmp_path / "model.pt")
    trusted = convert("opennmt", tmp_path / "model.pt", ConversionOptions(trust_pickle=True))
    plain = convert("opennmt", tmp_path / "model.pt")
    assert all(torch.equal(trusted.weights[name], value) for name, value in plain.weights.items())


def test_weights_in_a_file_of_their_own(tmp_path: Path) -> None:
    checkpoint = make_checkpoint()
    expected = converted(tmp_path, checkpoint)
    generator = {f"generator.{name}": value for name, value in checkpoint.pop("generator").items()}
    save_file({**checkpoint.pop("model"), **generator}, tmp_path / "model.safetensors")
    found = converted(tmp_path, checkpoint)
    assert all(torch.equal(found.weights[name], value) for name, value in expected.weights.items())
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"holds no weights, and model\.safetensors is not beside it"):
        convert("opennmt", tmp_path / "model.pt")


def test_words_are_cut_as_the_original_does(tmp_path: Path) -> None:
    tokenizer = converted(tmp_path, make_checkpoint()).tokenizer
    # 3.x cuts at spaces alone: a no-break space is a part of a word.
    assert tokenizer("ein drei\u00a0x")["input_ids"] == [4, 0]
    assert tokenizer.decode([4, 6, 3], skip_special_tokens=True) == "one both"
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (
        1,
        2,
        3,
        0,
    )


def test_copied_words_come_back(tmp_path: Path) -> None:
    tokenizer = converted(tmp_path, make_checkpoint(**MODELS["copy"])).tokenizer
    batch = tokenizer(["ein both x ein"])
    size = len(TARGET_TOKENS)
    assert batch["copy_ids"] == [[size, 6, size + 1, size]]
    assert tokenizer.batch_decode([[4, size + 1, size]], source_texts=["ein both x ein"]) == ["one x ein"]


def test_codes_of_subword_nmt(tmp_path: Path) -> None:
    codes = tmp_path / "codes"
    codes.write_text("#version: 0.2\ne i\nei n</w>\nz w\nzw ei</w>\n")
    plain = make_checkpoint()
    result = converted(tmp_path, plain, files={"source_codes": codes})
    tokenizer = result.tokenizer
    # "ein" is one piece; "zwein" is z w e i n -> zw ein: the piece `zw@@` is unknown to the original.
    ids = tokenizer("ein zwein")["input_ids"]
    assert ids[0] == 4
    assert len(ids) == 3
    assert ids[1] >= len(SOURCE_TOKENS)
    assert ids[2] == 4
    assert len(tokenizer.source_tokenizer) == result.config.source_vocab_size > len(SOURCE_TOKENS)
    model = result.model()
    with torch.no_grad():
        logits = model(torch.tensor([ids]), decoder_input_ids=torch.tensor([[2]])).logits.log_softmax(-1)
    expected = PlainOpennmt(plain).decoder("ein <unk> ein")([2])
    torch.testing.assert_close(logits[0, 0].double(), expected, atol=1e-5, rtol=0)


# Refusals


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        (
            {"encoder_type": "transformer"},
            "`encoder_type` 'transformer' cannot be represented; allowed: 'rnn', 'brnn'",
        ),
        ({"decoder_type": "cnn"}, "`decoder_type` 'cnn'"),
        ({"rnn_type": "SRU"}, "`rnn_type` 'SRU' cannot be represented; allowed: 'LSTM', 'GRU'"),
        ({"context_gate": "both"}, "`context_gate` 'both'"),
        ({"position_encoding": True}, "`position_encoding` True"),
        ({"model_task": "lm"}, "`model_task` 'lm'"),
        ({"n_src_feats": 1}, "`n_src_feats` 1"),
        ({"lora_layers": ["linear_in"]}, "`lora_layers`"),
        ({"global_attention_function": "entmax"}, "`global_attention_function` 'entmax'"),
        ({"copy_attn": True, "global_attention": "mlp"}, "`copy_attn` can be represented with `reuse_copy_attn`"),
        ({"copy_attn": True, "reuse_copy_attn": True}, "here they are True and 'general'"),
    ],
)
def test_refuses_by_name(tmp_path: Path, changed: dict[str, Any], match: str) -> None:
    checkpoint = make_checkpoint()
    vars(checkpoint["opt"]).update(changed)
    with pytest.raises(ConversionError, match=match):
        converted(tmp_path, checkpoint)


def test_refuses_features_in_the_weights(tmp_path: Path) -> None:
    checkpoint = make_checkpoint()
    checkpoint["model"]["encoder.embeddings.make_embedding.emb_luts.1.weight"] = torch.zeros(3, 2)
    with pytest.raises(ConversionError, match="second embedding table"):
        converted(tmp_path, checkpoint)
    checkpoint = make_checkpoint()
    checkpoint["vocab"]["src_feats"] = [["a"]]
    with pytest.raises(ConversionError, match="`n_src_feats`"):
        converted(tmp_path, checkpoint)


def test_refuses_weights_that_do_not_fit(tmp_path: Path) -> None:
    checkpoint = make_checkpoint()
    checkpoint["model"]["decoder.something.weight"] = torch.zeros(2)
    with pytest.raises(ConversionError, match=r"no place for: decoder\.something\.weight"):
        converted(tmp_path, checkpoint)
    checkpoint = make_checkpoint()
    del checkpoint["model"]["decoder.attn.linear_in.weight"]
    with pytest.raises(ConversionError, match=r"no weight 'decoder\.attn\.linear_in\.weight'"):
        converted(tmp_path, checkpoint)
    checkpoint = make_checkpoint()
    checkpoint["vocab"]["tgt"] = TARGET_TOKENS[:-1]
    with pytest.raises(ConversionError, match="The target vocabulary has 9 tokens, the model 10"):
        converted(tmp_path, checkpoint)
    checkpoint = make_checkpoint(share_embeddings=True)
    table = "decoder.embeddings.make_embedding.emb_luts.0.weight"
    checkpoint["model"][table] = checkpoint["model"][table] + 1
    with pytest.raises(ConversionError, match="the two embedding tables differ"):
        converted(tmp_path, checkpoint)


def test_refuses_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="it has no 'opt' and 'vocab'"):
        converted(tmp_path, {"model": {}})
    (tmp_path / "other.pt").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ConversionError, match=r"other\.pt"):
        convert("opennmt", tmp_path / "other.pt")
    with pytest.raises(ConversionError, match="Unknown file 'codes'; this format takes source_codes"):
        converted(tmp_path, make_checkpoint(), files={"codes": tmp_path})


# The original


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["brnn-lstm-general", "brnn-gru-mlp-bridge", "brnn-lstm-dot-no-feed", "copy-mlp", "shared"]
)
def test_against_the_original(tmp_path: Path, name: str) -> None:
    """`ONMT_PYTHON` is the Python of an environment with OpenNMT-py 3.x."""
    python = os.environ.get("ONMT_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import pyonmttok"], capture_output=True).returncode:
        pytest.skip("OpenNMT-py is not installed; ONMT_PYTHON may name a Python that has it")
    script = Path(__file__).with_name("make_opennmt_checkpoint.py")
    folder = tmp_path / "original"
    subprocess.run([python, str(script), str(folder), name], check=True, capture_output=True)
    result = convert("opennmt", folder / "model.pt")
    model, tokenizer = result.model(), result.tokenizer
    outputs = json.loads((folder / "outputs.json").read_text())
    logits = torch.load(folder / "logits.pt")
    scored = len(logits)
    batch = inputs_of(tokenizer, outputs["sources"][:scored], text_target=outputs["targets"][:scored])
    with torch.no_grad():
        found = model.double()(**batch).logits
    model.float()
    for row, expected in enumerate(logits):
        kept = expected > -50
        ours = found[row, : expected.size(0), : expected.size(1)]
        torch.testing.assert_close(ours[kept], expected[kept], atol=1e-5, rtol=0)
    batch = inputs_of(tokenizer, outputs["sources"])
    for name, options in {
        "greedy": {"num_beams": 1},
        "beam_none": {"opennmt_length_penalty": 0.0},
        "beam_avg": {},
    }.items():
        ids = model.generate(**batch, **{"max_new_tokens": 60, **options})
        words = {"source_texts": outputs["sources"]} if tokenizer.copies_source else {}
        texts = tokenizer.batch_decode(ids, **words)
        assert [text.split("</s>")[0].removeprefix("<s>").strip() for text in texts] == outputs[name]
