"""JoeyNMT models: made-up ones against its equations and search, trained ones against JoeyNMT itself."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from originals import cut, make_original
from plain_joeynmt import BOS, EOS, PlainJoeynmt

from hf_rnn_seq2seq import RnnSeq2SeqForConditionalGeneration, RnnSeq2SeqTokenizer
from hf_rnn_seq2seq.convert import ConversionError, ConversionOptions, Converted, convert

SPECIAL = ["<unk>", "<pad>", "<s>", "</s>"]
SOURCE_TOKENS = [*SPECIAL, "a", "b", "c", "▁", "it's"]
TARGET_TOKENS = [*SPECIAL, "x", "y", "z", "w", "ab", "B", "."]
SOURCES = [[4, 5, 7, 6, 3], [8, 3], [0, 4, 4, 3]]
TARGETS = [[2, 9, 4, 7], [2, 5, 6, 10], [2, 0, 8]]

PLAIN: dict[str, Any] = {
    "joeynmt_version": "2.3.0",
    "data": {"src": {"lang": "aa", "level": "word"}, "trg": {"lang": "bb", "level": "word"}},
    "testing": {"beam_size": 3, "beam_alpha": 1.0, "max_output_length": 12},
    "model": {
        "encoder": {
            "type": "recurrent", "rnn_type": "lstm", "hidden_size": 4, "num_layers": 1, "bidirectional": True,
            "embeddings": {"embedding_dim": 5}, "dropout": 0.1,
        },
        "decoder": {
            "type": "recurrent", "rnn_type": "lstm", "hidden_size": 6, "num_layers": 1, "attention": "bahdanau",
            "init_hidden": "bridge", "input_feeding": True, "embeddings": {"embedding_dim": 3}, "hidden_dropout": 0.3,
        },
    },
}  # fmt: skip


def changed(settings: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with the value at this path, its names joined with dots."""
    settings = copy.deepcopy(settings)
    *parents, name = path.split(".")
    place = settings
    for parent in parents:
        place = place.setdefault(parent, {})
    place[name] = value
    return settings


def with_all(changes: dict[str, Any]) -> dict[str, Any]:
    settings = PLAIN
    for path, value in changes.items():
        settings = changed(settings, path, value)
    return settings


ENCODER, DECODER = "model.encoder", "model.decoder"
MODELS: dict[str, dict[str, Any]] = {
    "lstm-bahdanau-bridge": {},
    "gru-luong-bridge": {f"{ENCODER}.rnn_type": "gru", f"{DECODER}.rnn_type": "gru", f"{DECODER}.attention": "luong"},
    "layers": {f"{ENCODER}.num_layers": 2, f"{DECODER}.num_layers": 3},
    "no-feeding-zero": {f"{DECODER}.input_feeding": False, f"{DECODER}.init_hidden": "zero"},
    "last-of-both": {f"{DECODER}.init_hidden": "last", f"{DECODER}.hidden_size": 8, f"{DECODER}.num_layers": 2},
    "last-forward": {f"{DECODER}.init_hidden": "last", f"{DECODER}.hidden_size": 4, f"{ENCODER}.num_layers": 2},
    "last-gru": {f"{DECODER}.init_hidden": "last", f"{DECODER}.hidden_size": 4, f"{DECODER}.rnn_type": "gru"},
    "scaled": {f"{ENCODER}.embeddings.scale": True, f"{DECODER}.embeddings.scale": True},
    "tied-softmax": {"model.tied_softmax": True, f"{DECODER}.embeddings.embedding_dim": 6},
    "tied-softmax-scaled": {
        "model.tied_softmax": True, f"{DECODER}.embeddings.embedding_dim": 6, f"{DECODER}.embeddings.scale": True,
    },
    "one-table": {"model.tied_embeddings": True, f"{DECODER}.embeddings.embedding_dim": 5},
    "one-table-scaled": {
        "model.tied_embeddings": True, f"{DECODER}.embeddings.embedding_dim": 5, f"{ENCODER}.embeddings.scale": True,
    },
    "one-table-scaled-and-tied": {
        "model.tied_embeddings": True, "model.tied_softmax": True, f"{ENCODER}.embeddings.scale": True,
        f"{DECODER}.embeddings.scale": True, f"{ENCODER}.embeddings.embedding_dim": 6,
        f"{DECODER}.embeddings.embedding_dim": 6,
    },
}  # fmt: skip


def make_state(settings: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under JoeyNMT's names."""
    model = settings["model"]
    encoder, decoder = model["encoder"], model["decoder"]
    h, hidden = encoder["hidden_size"], decoder["hidden_size"]
    e, target_e = (part["embeddings"]["embedding_dim"] for part in (encoder, decoder))
    target_size = len(SOURCE_TOKENS if model.get("tied_embeddings") else TARGET_TOKENS)
    shapes: dict[str, tuple[int, ...]] = {
        "src_embed.lut.weight": (len(SOURCE_TOKENS), e),
        "trg_embed.lut.weight": (target_size, target_e),
    }

    def add_rnn(side: str, part: dict[str, Any], size: int, first: int, suffixes: tuple[str, ...]) -> None:
        rows = (3 if part["rnn_type"] == "gru" else 4) * size
        for layer in range(part["num_layers"]):
            for suffix in suffixes:
                name = f"{side}.rnn.{{}}_l{layer}{suffix}"
                shapes[name.format("weight_ih")] = (rows, first if layer == 0 else size * len(suffixes))
                shapes[name.format("weight_hh")] = (rows, size)
                shapes[name.format("bias_ih")] = shapes[name.format("bias_hh")] = (rows,)

    add_rnn("encoder", encoder, h, e, ("", "_reverse"))
    add_rnn("decoder", decoder, hidden, target_e + (hidden if decoder["input_feeding"] else 0), ("",))
    shapes["decoder.att_vector_layer.weight"], shapes["decoder.att_vector_layer.bias"] = (
        (hidden, hidden + 2 * h),
        (hidden,),
    )
    shapes["decoder.output_layer.weight"] = (target_size, hidden)
    shapes["decoder.attention.key_layer.weight"] = (hidden, 2 * h)
    if decoder["attention"] == "bahdanau":
        shapes["decoder.attention.query_layer.weight"] = (hidden, hidden)
        shapes["decoder.attention.energy_layer.weight"] = (1, hidden)
    if decoder["init_hidden"] == "bridge":
        shapes["decoder.bridge_layer.weight"], shapes["decoder.bridge_layer.bias"] = (hidden, 2 * h), (hidden,)
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=generator) * 0.8 for name, shape in shapes.items()}
    if model.get("tied_embeddings"):
        state["trg_embed.lut.weight"] = state["src_embed.lut.weight"]
    if model.get("tied_softmax"):
        state["decoder.output_layer.weight"] = state["trg_embed.lut.weight"]
    return state


def write(folder: Path, settings: dict[str, Any], state: dict[str, torch.Tensor]) -> Path:
    """A model folder as JoeyNMT leaves it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    target = SOURCE_TOKENS if settings["model"].get("tied_embeddings") else TARGET_TOKENS
    for name, tokens in (("src", SOURCE_TOKENS), ("trg", target)):
        (folder / f"{name}_vocab.txt").write_text("".join(token + "\n" for token in tokens), encoding="utf-8")
    checkpoint = {"model_state": state, "optimizer_state": {"lr": 1e-3}, "stats_state": {"steps": 7}}
    torch.save(checkpoint, folder / "best.ckpt")
    return folder


def converted(folder: Path, settings: dict[str, Any], seed: int = 0) -> tuple[Converted, PlainJoeynmt]:
    state = make_state(settings, seed)
    return convert("joeynmt", write(folder, settings, state)), PlainJoeynmt(state, settings["model"])


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_outputs_are_the_equations(name: str, tmp_path: Path) -> None:
    settings = with_all(MODELS[name])
    result, plain = converted(tmp_path, settings)
    model = result.model().double()
    size = model.config.vocab_size
    targets = [[token % size for token in target] for target in TARGETS]
    for source, target in zip(SOURCES, targets, strict=True):
        with torch.no_grad():
            found = model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([target])).logits[0]
        torch.testing.assert_close(found, torch.from_numpy(plain.logits(source, target)), rtol=0, atol=1e-6)
    batch = result.tokenizer.pad({"input_ids": SOURCES}, return_tensors="pt")
    outputs = model.generate(**batch, num_beams=1)
    assert cut(outputs.tolist(), EOS) == [plain.greedy(source, 12) for source in SOURCES]


@pytest.mark.parametrize("alpha", [-1.0, 1.0])
@pytest.mark.parametrize("name", ["lstm-bahdanau-bridge", "gru-luong-bridge"])
def test_beams_are_joeynmts(name: str, alpha: float, tmp_path: Path) -> None:
    """All that they find, and not what transformers' do: that differs for some of these models."""
    different = 0
    for seed in range(4):
        settings = changed(with_all(MODELS[name]), "testing.beam_alpha", alpha)
        result, plain = converted(tmp_path, settings, seed)
        model = result.model().double()
        batch = result.tokenizer.pad({"input_ids": SOURCES}, return_tensors="pt")
        wanted = [plain.beam(source, 3, max(alpha, 0.0), 12) for source in SOURCES]
        options: dict[str, Any] = {"return_dict_in_generate": True, "output_scores": True}
        found = model.generate(**batch, **options, num_return_sequences=3)
        rows = cut(found.sequences.tolist(), EOS)
        for index, hypotheses in enumerate(wanted):
            for place, (score, tokens) in enumerate(hypotheses[:3]):
                assert rows[3 * index + place] == tokens
                assert math.isclose(float(found.sequences_scores[3 * index + place]), score, abs_tol=1e-5)
        model.generation_config.joeynmt_length_penalty = None
        other = model.generate(**batch, gnmt_length_penalty=max(alpha, 0.0), num_return_sequences=3)
        different += cut(other.tolist(), EOS) != rows
    assert different > 0


def test_a_saved_model_searches_as_joeynmt(tmp_path: Path) -> None:
    result, plain = converted(tmp_path / "original", PLAIN, seed=2)
    result.model().save_pretrained(tmp_path / "saved")
    result.tokenizer.save_pretrained(tmp_path / "saved")
    model = RnnSeq2SeqForConditionalGeneration.from_pretrained(tmp_path / "saved")
    tokenizer = RnnSeq2SeqTokenizer.from_pretrained(tmp_path / "saved")
    batch = tokenizer(["a b ▁ c"], return_tensors="pt")
    assert batch["input_ids"].tolist() == [SOURCES[0]]
    assert cut(model.generate(**batch).tolist(), EOS) == [plain.beam(SOURCES[0], 3, 1.0, 12)[0][1]]
    assert result.origin == "JoeyNMT 2.3.0"


def test_special_symbols_elsewhere_and_language_tags(tmp_path: Path) -> None:
    symbols = {
        "unk_token": "[unk]", "unk_id": 2, "pad_token": "[pad]", "pad_id": 3, "bos_token": "[s]", "bos_id": 0,
        "eos_token": "[/s]", "eos_id": 1, "sep_token": "[sep]", "sep_id": 4, "lang_tags": ["[aa]"],
    }  # fmt: skip
    settings = with_all({"data.special_symbols": symbols, "testing.generate_unk": False})
    state = make_state(settings)
    folder = write(tmp_path, settings, state)
    tokens = ["[s]", "[/s]", "[unk]", "[pad]", "[sep]", "[aa]"]
    for name, own in (("src", SOURCE_TOKENS), ("trg", TARGET_TOKENS)):
        (folder / f"{name}_vocab.txt").write_text(
            "\n".join([*tokens, *own[6:], "q", "r"][: len(own)]), encoding="utf-8"
        )
    with pytest.raises(ConversionError, match="puts unk '\\[unk\\]' at 2"):
        convert("joeynmt", folder)  # JoeyNMT itself puts unk, pad, bos, eos in this order
    for index, name in enumerate(("unk", "pad", "bos", "eos")):
        symbols[f"{name}_id"] = index
    tokens[:4] = ["[unk]", "[pad]", "[s]", "[/s]"]
    (folder / "config.yaml").write_text(yaml.safe_dump(changed(settings, "data.special_symbols", symbols)))
    for name, own in (("src", SOURCE_TOKENS), ("trg", TARGET_TOKENS)):
        (folder / f"{name}_vocab.txt").write_text(
            "\n".join([*tokens, *own[6:], "q", "r"][: len(own)]), encoding="utf-8"
        )
    result = convert("joeynmt", folder)
    assert result.config.pad_token_id == 1
    assert result.generation["suppress_tokens"] == [0, 1, 2, 4, 5]


# Text


def ids(tmp_path: Path, changes: dict[str, Any], text: str) -> list[int]:
    result, _ = converted(tmp_path, with_all(changes))
    return result.tokenizer([text])["input_ids"][0]


def test_words_characters_case_and_normalisation(tmp_path: Path) -> None:
    assert ids(tmp_path, {}, "A b q") == [0, 5, 0, 3]
    assert ids(tmp_path, {"data.src.lowercase": True}, "A b") == [4, 5, 3]
    assert ids(tmp_path, {"data.src.level": "char"}, "a bz") == [4, 7, 5, 0, 3]
    assert ids(tmp_path, {"data.src.normalize": True}, " a\u3000\u3000it’s\u200b b ") == [4, 8, 5, 3]
    result, _ = converted(tmp_path, with_all({"data.trg.level": "char"}))
    assert result.tokenizer.decode([4, 7, 5, 3], skip_special_tokens=True) == "xwy"


def test_a_configuration_of_1(tmp_path: Path) -> None:
    settings = with_all(
        {"data": {"src": "aa", "trg": "bb", "level": "bpe", "lowercase": True}, "testing": {"alpha": 0.6}}
    )
    del settings["joeynmt_version"]
    result, _ = converted(tmp_path, settings)
    assert result.tokenizer(["A c"])["input_ids"] == [[4, 6, 3]]
    assert result.generation["joeynmt_length_penalty"] == 0.6
    assert result.generation["num_beams"] == 1
    assert result.generation["max_new_tokens"] == 150
    assert any("1.5 times" in note for note in result.notes)


def test_subword_nmt_codes_beside_the_checkpoint(tmp_path: Path) -> None:
    text = {"level": "bpe", "tokenizer_type": "subword-nmt", "tokenizer_cfg": {"codes": "/nowhere/target.codes"}}
    settings = changed(PLAIN, "data.trg", {"lang": "bb", **text})
    folder = write(tmp_path, settings, make_state(settings))
    with pytest.raises(ConversionError, match="target_codes"):
        convert("joeynmt", folder)
    (folder / "target.codes").write_text("#version: 0.2\na b</w>\nb c</w>\n")
    (folder / "trg_vocab.txt").write_text("\n".join([*SPECIAL, "x", "y", "z", "w", "ab", "a@@", "b"]) + "\n")
    result = convert("joeynmt", folder)
    labels = result.tokenizer(text_target="ab x")["input_ids"]
    assert labels == [8, 4, 3]
    assert result.tokenizer.decode(labels, skip_special_tokens=True) == "ab x"
    assert any("smaller ones" in note for note in result.notes)


# Refusals


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({f"{ENCODER}.type": "transformer"}, ["encoder.type", "transformer"]),
        ({f"{DECODER}.type": "transformer"}, ["decoder.type", "transformer"]),
        ({f"{DECODER}.activation": "relu"}, ["activation", "relu", "tanh"]),
        ({"data.src.tokenizer_cfg": {"pretokenizer": "moses"}}, ["pretokenizer", "moses", "source"]),
        ({f"{DECODER}.init_hidden": "last"}, ["init_hidden", "8", "6"]),
        ({"data.special_symbols": {"pad_id": 0}}, ["special_symbols", "pad"]),
    ],
)
def test_refused_by_name(changes: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    state = make_state(with_all({}))
    if changes.get(f"{DECODER}.init_hidden") == "last":
        state = {name: weight for name, weight in state.items() if "bridge_layer" not in name}
    with pytest.raises(ConversionError) as error:
        convert("joeynmt", write(tmp_path, with_all(changes), state))
    assert all(word in str(error.value) for word in words)


def test_other_refusals(tmp_path: Path) -> None:
    state = make_state(PLAIN)
    folder = write(tmp_path / "m", PLAIN, {n: w for n, w in state.items() if "_reverse" not in n})
    with pytest.raises(ConversionError, match="bidirectional"):
        convert("joeynmt", folder)
    folder = write(tmp_path / "m", PLAIN, {**state, "decoder.gate.weight": torch.ones(1)})
    with pytest.raises(ConversionError, match=r"decoder\.gate\.weight"):
        convert("joeynmt", folder)
    folder = write(tmp_path / "m", PLAIN, {n: w for n, w in state.items() if "key_layer" not in n})
    with pytest.raises(ConversionError, match="key_layer"):
        convert("joeynmt", folder)
    folder = write(tmp_path / "m", changed(PLAIN, "model.tied_softmax", True), state)
    with pytest.raises(ConversionError, match="tied_softmax"):
        convert("joeynmt", folder)
    folder = write(tmp_path / "m", PLAIN, state)
    (folder / "src_vocab.txt").write_text("one\n")
    with pytest.raises(ConversionError, match="source vocabulary has 5 tokens, the model 9"):
        convert("joeynmt", folder)
    (folder / "src_vocab.txt").unlink()
    with pytest.raises(ConversionError, match="source_vocab"):
        convert("joeynmt", folder)
    given = tmp_path / "given.txt"
    given.write_text("\n".join(SOURCE_TOKENS), encoding="utf-8")
    (folder / "best.ckpt").rename(folder / "120.ckpt")
    with pytest.raises(ConversionError, match=r"best\.ckpt"):
        convert("joeynmt", folder, ConversionOptions(files={"source_vocab": given}))
    result = convert("joeynmt", folder / "120.ckpt", ConversionOptions(files={"source_vocab": given}))
    assert result.tokenizer(["c"])["input_ids"] == [[6, 3]]


# The original


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lstm-bridge", "gru-last", "lstm-tied", "subword-nmt", "sentencepiece"])
def test_against_the_original(name: str, tmp_path: Path) -> None:
    """`JOEYNMT_PYTHON` is the Python of an environment with JoeyNMT 2.3."""
    script = "make_joeynmt_checkpoint.py"
    folder = make_original(script, "joeynmt", "JOEYNMT_PYTHON", [name, "--updates", "120"], tmp_path)
    result = convert("joeynmt", folder / "model")
    model, tokenizer = result.model(), result.tokenizer
    assert model.config.decoder_start_token_id == BOS
    outputs = json.loads((folder / "outputs.json").read_text())
    assert tokenizer(outputs["sources"])["input_ids"] == outputs["source_ids"]
    assert tokenizer(text_target=outputs["targets"])["input_ids"] == [row[1:] for row in outputs["target_ids"]]
    scored = torch.load(folder / "logits.pt")
    model.double()
    for source, target, logits in zip(outputs["source_ids"], outputs["target_ids"], scored, strict=False):
        with torch.no_grad():
            found = model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([target[:-1]])).logits[0]
        torch.testing.assert_close(found[:, : logits.size(1)], logits, rtol=0, atol=1e-5)
    model.float()
    batch = tokenizer.pad({"input_ids": outputs["source_ids"]}, return_tensors="pt")
    words = (folder / "model" / "trg_vocab.txt").read_text(encoding="utf-8").split("\n")
    for key, options in (("greedy", {"num_beams": 1}), ("beam", {"joeynmt_length_penalty": 0.0}), ("beam_alpha", {})):
        rows = cut(model.generate(**batch, **options).tolist(), EOS)
        assert [[words[index] for index in row] for row in rows] == outputs[key]["tokens"]
