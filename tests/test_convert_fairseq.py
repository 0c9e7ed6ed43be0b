"""fairseq's `lstm` models: made-up ones against its equations and search, trained ones against fairseq itself."""

import argparse
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from originals import cut, make_original
from plain_fairseq import EOS, PAD, PlainFairseq

from hf_rnn_seq2seq import RnnSeq2SeqForConditionalGeneration, RnnSeq2SeqTokenizer
from hf_rnn_seq2seq.convert import ConversionError, ConversionOptions, Converted, convert

SOURCE_WORDS, TARGET_WORDS = ["a", "b", "c", "d@@", "madeupword0000"], ["x", "y", "z", "w", "v", "madeupword0000"]
SOURCES = [[4, 5, 6, 4, 2], [7, 2], [3, 4, 4, 2]]
TARGETS = [[2, 9, 4, 7], [2, 5, 6, 8], [2, 3, 8]]

PLAIN: dict[str, Any] = {
    "arch": "lstm", "encoder_embed_dim": 5, "decoder_embed_dim": 5, "encoder_hidden_size": 6, "decoder_hidden_size": 6,
    "decoder_out_embed_dim": 6, "encoder_layers": 1, "decoder_layers": 1, "encoder_bidirectional": False,
    "decoder_attention": "1", "dropout": 0.1, "source_lang": "de", "target_lang": "en", "criterion": "cross_entropy",
    "adaptive_softmax_cutoff": "10000,50000,200000",
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bidirectional": {
        "encoder_bidirectional": True, "encoder_hidden_size": 3, "encoder_layers": 2, "decoder_layers": 2,
    },
    "projected": {
        "encoder_bidirectional": True, "encoder_hidden_size": 4, "encoder_layers": 2, "decoder_layers": 2,
        "arch": "lstm_luong_wmt_en_de",
    },
    "no-attention": {"decoder_attention": "0", "encoder_layers": 2, "decoder_layers": 2},
    "additional-fc": {"decoder_out_embed_dim": 4},
    "tied": {"share_decoder_input_output_embed": True, "decoder_out_embed_dim": 5, "decoder_embed_dim": 5},
    "tied-without-fc": {
        "share_decoder_input_output_embed": True, "decoder_out_embed_dim": 6, "decoder_embed_dim": 6,
        "encoder_embed_dim": 4,
    },
    "one-table": {"share_all_embeddings": True, "decoder_out_embed_dim": 5},
}  # fmt: skip


def make_state(options: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under fairseq's names."""
    shared = options.get("share_all_embeddings", False)
    tied = shared or options.get("share_decoder_input_output_embed", False)
    directions = ("", "_reverse")[: 1 + options["encoder_bidirectional"]]
    h, hidden, out = options["encoder_hidden_size"], options["decoder_hidden_size"], options["decoder_out_embed_dim"]
    memory = h * len(directions)
    target_size = 4 + len(SOURCE_WORDS if shared else TARGET_WORDS)
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.embed_tokens.weight": (4 + len(SOURCE_WORDS), options["encoder_embed_dim"]),
        "decoder.embed_tokens.weight": (target_size, options["decoder_embed_dim"]),
    }
    for layer in range(options["encoder_layers"]):
        for direction in directions:
            width = memory if layer else options["encoder_embed_dim"]
            for part, shape in (("weight_ih", (4 * h, width)), ("weight_hh", (4 * h, h)), ("bias_ih", (4 * h,)),
                                ("bias_hh", (4 * h,))):  # fmt: skip
                shapes[f"encoder.lstm.{part}_l{layer}{direction}"] = shape
    for layer in range(options["decoder_layers"]):
        width = hidden if layer else hidden + options["decoder_embed_dim"]
        for part, shape in (("weight_ih", (4 * hidden, width)), ("weight_hh", (4 * hidden, hidden)),
                            ("bias_ih", (4 * hidden,)), ("bias_hh", (4 * hidden,))):  # fmt: skip
            shapes[f"decoder.layers.{layer}.{part}"] = shape

    def linear(name: str, rows: int, width: int) -> None:
        shapes[f"decoder.{name}.weight"], shapes[f"decoder.{name}.bias"] = (rows, width), (rows,)

    if memory != hidden:
        linear("encoder_hidden_proj", hidden, memory)
        linear("encoder_cell_proj", hidden, memory)
    if options["decoder_attention"] == "1":
        shapes["decoder.attention.input_proj.weight"] = (memory, hidden)
        shapes["decoder.attention.output_proj.weight"] = (hidden, hidden + memory)
    if out != hidden:
        linear("additional_fc", out, hidden)
    if not tied:
        linear("fc_out", target_size, out)
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=generator) * 0.7 for name, shape in shapes.items()}
    if not tied:
        state["decoder.fc_out.bias"][EOS] += 4  # so that hypotheses end
    if shared:
        state["decoder.embed_tokens.weight"] = state["encoder.embed_tokens.weight"]
    return state


def write(folder: Path, options: dict[str, Any], state: dict[str, torch.Tensor], new: bool = True) -> Path:
    """A checkpoint of 0.12 (or of 0.9) and its dictionaries."""
    folder.mkdir(exist_ok=True)
    shared = options.get("share_all_embeddings", False)
    for name, words in (("de", SOURCE_WORDS), ("en", SOURCE_WORDS if shared else TARGET_WORDS)):
        (folder / f"dict.{name}.txt").write_text("".join(f"{word} {9 - n}\n" for n, word in enumerate(words)))
    args = argparse.Namespace(**options)
    checkpoint: dict[str, Any] = {
        "model": state,
        "optimizer_history": [{"num_updates": 3}],
        "extra_state": {"epoch": 1},
    }
    if new:
        task = {"_name": "translation", "source_lang": options["source_lang"], "target_lang": options["target_lang"]}
        cfg = {"_name": None, "model": args, "task": task, "criterion": {"_name": options["criterion"]}, "bpe": None}
        checkpoint |= {"args": None, "cfg": cfg}
    else:
        checkpoint["args"] = args
    path = folder / "checkpoint_best.pt"
    torch.save(checkpoint, path)
    return path


def converted(
    folder: Path, changes: dict[str, Any], seed: int = 0, new: bool = True
) -> tuple[Converted, PlainFairseq]:
    options = {**PLAIN, **changes}
    state = make_state(options, seed)
    return convert("fairseq", write(folder, options, state, new)), PlainFairseq(state, options["encoder_layers"])


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_equations(name: str, tmp_path: Path) -> None:
    result, plain = converted(tmp_path, MODELS[name], new=name != "projected")
    model = result.model().double()
    for source, target in zip(SOURCES, TARGETS, strict=True):
        target = [token % model.config.vocab_size for token in target]
        with torch.no_grad():
            found = model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([target])).logits[0]
        torch.testing.assert_close(found, torch.from_numpy(plain.logits(source, target)), rtol=0, atol=2e-6)


@pytest.mark.parametrize("penalty", [0.0, 1.0])
@pytest.mark.parametrize("name", ["plain", "no-attention", "additional-fc"])
def test_outputs_are_the_searchs(name: str, penalty: float, tmp_path: Path) -> None:
    """One beam is greedy search. A batch padded on the left, as fairseq's are."""
    compared = 0
    for seed in range(4):
        result, plain = converted(tmp_path, MODELS[name], seed)
        model = result.model().double()
        result.tokenizer.padding_side = "left"
        batch = result.tokenizer.pad({"input_ids": SOURCES}, return_tensors="pt")
        assert batch["input_ids"][1].tolist() == [PAD] * 3 + SOURCES[1]
        options: dict[str, Any] = {"max_new_tokens": 30, "length_penalty": penalty}
        rows = model.generate(**batch, **options, num_beams=1)
        assert cut(rows.tolist(), EOS) == [plain.beam(source, 1, penalty, 30)[0][1] for source in SOURCES]
        found = model.generate(**batch, **options, num_beams=3, return_dict_in_generate=True, output_scores=True)
        for index, (row, source) in enumerate(zip(cut(found.sequences.tolist(), EOS), SOURCES, strict=True)):
            hypotheses = plain.beam(source, 3, penalty, 30)
            if max(len(tokens) for _, tokens in hypotheses) == 30:
                continue  # the end's probability would count in fairseq
            compared += 1
            assert row == hypotheses[0][1]
            assert math.isclose(float(found.sequences_scores[index]), hypotheses[0][0], abs_tol=1e-5)
    assert compared > 6


def test_a_saved_model_and_its_text(tmp_path: Path) -> None:
    result, plain = converted(tmp_path / "original", {})
    result.model().save_pretrained(tmp_path / "saved")
    result.tokenizer.save_pretrained(tmp_path / "saved")
    model = RnnSeq2SeqForConditionalGeneration.from_pretrained(tmp_path / "saved")
    tokenizer = RnnSeq2SeqTokenizer.from_pretrained(tmp_path / "saved")
    batch = tokenizer(["a  b c\ta", "q d@@ <s>"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == [[4, 5, 6, 4, EOS], [3, 7, 0, EOS, PAD]]
    outputs = model.generate(**batch)
    best = plain.beam([4, 5, 6, 4, EOS], 5, 1.0, 60)[0][1]
    assert cut(outputs.tolist(), EOS)[0] == best
    words = ["<s>", "<pad>", "</s>", "<unk>", *TARGET_WORDS]
    kept = " ".join(words[token] for token in best if token > 3)
    assert tokenizer.decode(outputs[0], skip_special_tokens=True) == kept
    assert model.config.decoder_start_token_id == EOS
    assert result.origin == "fairseq 0.10 or newer"


def test_dictionaries_and_codes_elsewhere(tmp_path: Path) -> None:
    options = {**PLAIN, "source_lang": None}
    path = write(tmp_path / "model", options, make_state(options), new=False)
    with pytest.raises(ConversionError, match="source_vocab"):
        convert("fairseq", path)
    dictionary, codes = tmp_path / "words.txt", tmp_path / "codes"
    (tmp_path / "model" / "dict.de.txt").rename(dictionary)
    codes.write_text("#version: 0.2\n")
    files = {"source_vocab": dictionary, "source_codes": codes}
    result = convert("fairseq", path.parent, ConversionOptions(files=files))
    assert result.origin == "fairseq before 0.10"
    assert result.tokenizer(["da b"])["input_ids"] == [[7, 4, 5, EOS]]
    with pytest.raises(ConversionError, match="not both"):
        convert("fairseq", path, ConversionOptions(files={**files, "source_sentencepiece": codes}))


def test_options_of_omegaconf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As 0.10 pickled them; made by a stand-in for the package, which need not be there when they are read."""
    module = types.ModuleType("omegaconf")
    for name in ("DictConfig", "AnyNode"):
        setattr(module, name, type(name, (), {"__module__": "omegaconf"}))
    monkeypatch.setitem(sys.modules, "omegaconf", module)

    def node(kind: str, **attributes: Any) -> Any:
        made = getattr(module, kind)()
        vars(made).update(attributes)
        return made

    def config(values: dict[str, Any]) -> Any:
        return node("DictConfig", _content={name: node("AnyNode", _val=value) for name, value in values.items()})

    state = make_state(PLAIN)
    path = write(tmp_path, PLAIN, state)
    model = config({**PLAIN, "dropout": 0.25})
    cfg = node("DictConfig", _content={"model": model, "task": config({"source_lang": "de", "target_lang": "en"})})
    torch.save({"model": state, "args": None, "cfg": cfg}, path)
    monkeypatch.delitem(sys.modules, "omegaconf")
    with pytest.raises(ConversionError, match="trust"):
        convert("fairseq", path)
    result = convert("fairseq", path, ConversionOptions(trust_pickle=True))
    assert result.config.dropout == 0.25


class Harmful:
    """Would write a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_refusals(tmp_path: Path) -> None:
    def refused(changes: dict[str, Any], state: dict[str, torch.Tensor] | None, *words: str) -> None:
        options = {**PLAIN, **changes}
        with pytest.raises(ConversionError) as error:
            convert("fairseq", write(tmp_path, options, make_state(options) if state is None else state))
        assert all(word in str(error.value) for word in words)

    refused({"arch": "transformer_iwslt_de_en"}, None, "arch", "transformer_iwslt_de_en", "lstm")
    adaptive = {name: weight for name, weight in make_state(PLAIN).items() if "fc_out" not in name}
    refused({"criterion": "adaptive_loss"}, {**adaptive, "decoder.adaptive_softmax.head.weight": torch.ones(2, 2)},
            "adaptive")  # fmt: skip
    refused({}, {**make_state(PLAIN), "decoder.gate.weight": torch.ones(2, 2)}, "decoder.gate.weight")
    refused({}, {n: w for n, w in make_state(PLAIN).items() if "output_proj" not in n}, "output_proj")
    path = write(tmp_path, PLAIN, make_state(PLAIN))
    (tmp_path / "dict.en.txt").write_text("x 1\n")
    with pytest.raises(ConversionError, match="target vocabulary has 5 tokens, the model 10"):
        convert("fairseq", path)
    (tmp_path / "dict.en.txt").write_text("x 1\nx 1 #fairseq:overwrite\n")
    with pytest.raises(ConversionError, match="line 2"):
        convert("fairseq", path)
    with pytest.raises(ConversionError, match=r"checkpoint_best\.pt nor checkpoint_last\.pt"):
        convert("fairseq", tmp_path.parent)
    torch.save({"weights": {}}, path)
    with pytest.raises(ConversionError, match="'model'"):
        convert("fairseq", path)
    torch.save({"model": {}}, path)
    with pytest.raises(ConversionError, match="options"):
        convert("fairseq", path)
    torch.save({"model": {}, "cfg": Harmful(tmp_path / "harm")}, path)
    with pytest.raises(ConversionError, match="trust"):
        convert("fairseq", path)
    assert not (tmp_path / "harm").exists()


# The original


@pytest.mark.slow
@pytest.mark.parametrize("name", ["default", "bidirectional", "shared", "no-attention"])
def test_against_the_original(name: str, tmp_path: Path) -> None:
    """`FAIRSEQ_PYTHON` is the Python of an environment with fairseq 0.12."""
    script = "make_fairseq_checkpoint.py"
    folder = make_original(script, "fairseq", "FAIRSEQ_PYTHON", [name, "--updates", "150"], tmp_path)
    result = convert("fairseq", folder / "checkpoint.pt")
    model, tokenizer = result.model(), result.tokenizer
    outputs = json.loads((folder / "outputs.json").read_text())
    assert tokenizer(outputs["sources"])["input_ids"] == outputs["source_ids"]
    assert tokenizer(text_target=outputs["targets"])["input_ids"] == outputs["target_ids"]
    scored = torch.load(folder / "logits.pt")
    for source, target, logits in zip(outputs["source_ids"], outputs["target_ids"], scored, strict=False):
        read = torch.tensor([[EOS, *target[:-1]]])
        with torch.no_grad():
            found = model(input_ids=torch.tensor([source]), decoder_input_ids=read).logits[0]
        torch.testing.assert_close(found, logits, rtol=0, atol=1e-5)
    batch = tokenizer.pad({"input_ids": outputs["source_ids"]}, return_tensors="pt")
    for key, options in (("greedy", {"num_beams": 1}), ("beam", {}), ("beam_sum", {"length_penalty": 0.0})):
        rows = cut(model.generate(**batch, max_new_tokens=41, **options).tolist(), EOS)
        # The end that comes with the greatest length: fairseq counts its probability.
        ended = [index for index, row in enumerate(outputs[key]["ids"]) if len(row) <= 40 or key == "greedy"]
        assert [rows[index] for index in ended] == [outputs[key]["ids"][index] for index in ended]
        assert len(ended) > len(rows) / 2
