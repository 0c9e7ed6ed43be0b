"""
Yoyodyne checkpoints: hand-made ones against its equations, written step by step in float64, and, where Yoyodyne is
installed, trained ones against Yoyodyne itself (`YOYODYNE_PYTHON` names its environment's Python).
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hf_rnn_seq2seq.convert import ConversionError, ConversionOptions, Converted, convert
from hf_rnn_seq2seq.convert.yoyodyne import SPECIAL

E, H, M = 4, 5, 3  # embeddings, decoder, one direction of the encoder
START, END = 2, 3
SOURCE_SYMBOLS = ["a", "b", "c"]
TARGET_SYMBOLS = ["a", "x", "yy"]


class Index:
    """Pickles as Yoyodyne's index does: as a call of a function of its own with plain values."""

    def __init__(self, **state: Any):
        self.state = state

    def __reduce__(self) -> tuple[Any, tuple[dict[str, Any]]]:
        return _reconstruct_index, (self.state,)


def _reconstruct_index(state: dict[str, Any]) -> dict[str, Any]:
    raise AssertionError("a converter must not call what a checkpoint names")


_reconstruct_index.__module__ = "yoyodyne.data.indexes"


def index_of(tied: bool) -> dict[str, Any]:
    source = SOURCE_SYMBOLS if tied else [f"{{{symbol}}}" for symbol in SOURCE_SYMBOLS]
    return {
        "source_vocabulary": source, "features_vocabulary": None, "target_vocabulary": TARGET_SYMBOLS,
        "tie_embeddings": tied,
    }  # fmt: skip


def make_weights(
    cell: str,
    layers: int,
    copies: bool = False,
    tied: bool = True,
    both: bool = True,
    projected: int = 0,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """A state dict with Yoyodyne's names."""
    torch.manual_seed(seed)
    gates = {"lstm": 4, "gru": 3}[cell]
    memory = M * (2 if both else 1)
    context = projected or memory
    symbols = len({*SOURCE_SYMBOLS, *TARGET_SYMBOLS}) if tied else len(SOURCE_SYMBOLS) + len(TARGET_SYMBOLS)
    target = len(SPECIAL) + (symbols if tied else len(TARGET_SYMBOLS))
    shapes: dict[str, tuple[int, ...]] = {"embeddings.weight": (len(SPECIAL) + symbols, E)}

    def recurrent(name: str, width: int, size: int, endings: list[str]) -> None:
        for layer in range(layers):
            for ending in endings:
                shapes[f"{name}.weight_ih_l{layer}{ending}"] = (
                    gates * size,
                    width if layer == 0 else size * len(endings),
                )
                shapes[f"{name}.weight_hh_l{layer}{ending}"] = (gates * size, size)
                shapes[f"{name}.bias_ih_l{layer}{ending}"] = shapes[f"{name}.bias_hh_l{layer}{ending}"] = (
                    gates * size,
                )

    recurrent("source_encoder.module", E, M, ["", "_reverse"] if both else [""])
    recurrent("decoder.module", E + context, H, [""])
    shapes |= {"decoder.h0": (H,), "decoder.attention.M.weight": (H, context + H), "decoder.attention.M.bias": (H,)}
    shapes |= {"decoder.attention.V.weight": (1, H), "decoder.attention.V.bias": (1,)}
    if cell == "lstm":
        shapes["decoder.c0"] = (H,)
    if projected:
        shapes |= {"source_projection.weight": (projected, memory), "source_projection.bias": (projected,)}
    shapes |= {"classifier.weight": (target, H + (context if copies else 0)), "classifier.bias": (target,)}
    if copies:
        shapes |= {
            f"generation_probability.W_{n}.weight": (1, w) for n, w in (("attention", context), ("hs", H), ("emb", E))
        }
        shapes["generation_probability.bias"] = (1,)
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def write(path: Path, weights: dict[str, torch.Tensor], index: dict[str, Any] | None, extra: Any = None) -> Path:
    """As Lightning does, with hyperparameters that the model does not need among those that it does."""
    hyperparameters: dict[str, Any] = {"decoder_dropout": 0.3, "max_target_length": 9, "scheduler": None}
    if index is not None:
        hyperparameters["index"] = Index(**index)
    if extra is not None:
        hyperparameters["optimizer"] = extra
    # The name under which the function is pickled has to be there while it is.
    module = type(sys)("yoyodyne.data.indexes")
    vars(module)["_reconstruct_index"] = _reconstruct_index
    names = ("yoyodyne", "yoyodyne.data", "yoyodyne.data.indexes")
    there = {name: sys.modules.get(name) for name in names}
    sys.modules.update(dict.fromkeys(names, module))
    try:
        torch.save({"state_dict": weights, "hyper_parameters": hyperparameters, "epoch": 3}, path)
    finally:
        for name, before in there.items():
            if before is None:
                del sys.modules[name]
            else:
                sys.modules[name] = before
    return path


class Plain:
    """Yoyodyne's equations, one word and one symbol at a time."""

    def __init__(self, weights: dict[str, torch.Tensor], layers: int, tied: bool):
        self.w, self.layers = weights, layers
        self.lstm = "decoder.c0" in weights
        self.first_source = 0 if tied else len(TARGET_SYMBOLS)  # where the source's own ids begin, behind SPECIAL

    def cell(self, name: str, ending: str, x: torch.Tensor, state: list[torch.Tensor]) -> list[torch.Tensor]:
        w_ih, w_hh, b_ih, b_hh = (
            self.w[f"{name}.{part}_{ending}"] for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        from_x, from_h = w_ih @ x + b_ih, w_hh @ state[0] + b_hh
        if self.lstm:
            i, f, g, o = (from_x + from_h).chunk(4)
            c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
            return [o.sigmoid() * c.tanh(), c]
        (x_r, x_z, x_n), (h_r, h_z, h_n) = from_x.chunk(3), from_h.chunk(3)
        z = (x_z + h_z).sigmoid()
        return [(1 - z) * (x_n + (x_r + h_r).sigmoid() * h_n).tanh() + z * state[0]]

    def encode(self, source: list[int]) -> list[torch.Tensor]:
        """`source`: ids of the converted source side."""
        shifted = [symbol if symbol < len(SPECIAL) else symbol + self.first_source for symbol in source]
        xs = [self.w["embeddings.weight"][symbol] for symbol in shifted]
        for layer in range(self.layers):
            sides = []
            for ending in (f"l{layer}", f"l{layer}_reverse"):
                if f"source_encoder.module.weight_hh_{ending}" not in self.w:
                    continue
                state, outputs = [torch.zeros(M, dtype=torch.float64)] * 2, []
                for x in xs if ending[-1].isdigit() else xs[::-1]:
                    state = self.cell("source_encoder.module", ending, x, state)
                    outputs.append(state[0])
                sides.append(outputs if ending[-1].isdigit() else outputs[::-1])
            xs = [torch.cat(parts) for parts in zip(*sides, strict=True)]
        if "source_projection.weight" in self.w:
            xs = [self.w["source_projection.weight"] @ x + self.w["source_projection.bias"] for x in xs]
        return xs

    def scores(self, source: list[int], read: list[int]) -> torch.Tensor:
        """Logits, or log-probabilities where the model copies, after each symbol that the decoder reads: [T, V]."""
        w, memory, rows = self.w, self.encode(source), []
        first = [w["decoder.h0"], w["decoder.c0"]] if self.lstm else [w["decoder.h0"]]
        states = [first] * self.layers
        for symbol in read:
            x = w["embeddings.weight"][symbol]
            query = states[-1][0]
            energies = torch.stack(
                [
                    w["decoder.attention.V.weight"][0]
                    @ (w["decoder.attention.M.weight"] @ torch.cat((m, query)) + w["decoder.attention.M.bias"]).tanh()
                    + w["decoder.attention.V.bias"][0]
                    for m in memory
                ]
            )
            attention = energies.softmax(0)
            context = sum((a * m for a, m in zip(attention, memory, strict=True)), torch.zeros_like(memory[0]))
            value, new = torch.cat((x, context)), []
            for layer, state in enumerate(states):
                new.append(self.cell("decoder.module", f"l{layer}", value, state))
                value = new[-1][0]
            states, h = new, value
            if "generation_probability.bias" not in w:
                rows.append(w["classifier.weight"] @ h + w["classifier.bias"])
                continue
            generated = (w["classifier.weight"] @ torch.cat((h, context)) + w["classifier.bias"]).softmax(0)
            gate = w["generation_probability.bias"][0]
            for name, part in (("attention", context), ("hs", h), ("emb", x)):
                gate = gate + w[f"generation_probability.W_{name}.weight"][0] @ part
            copied = torch.zeros_like(generated)
            for a, place in zip(attention, source, strict=True):
                copied[place] += a
            rows.append((gate.sigmoid() * generated + (1 - gate.sigmoid()) * copied).log())
        return torch.stack(rows)


def in_float64(converted: Converted) -> Any:
    model = converted.model().double()
    model.load_state_dict({name: value.double() for name, value in converted.weights.items()}, strict=False)
    return model


SETTINGS: dict[str, dict[str, Any]] = {
    "lstm": {"cell": "lstm", "layers": 1},
    "gru, two layers": {"cell": "gru", "layers": 2},
    "two vocabularies": {"cell": "gru", "layers": 1, "tied": False},
    "one way": {"cell": "lstm", "layers": 2, "both": False},
    "projected": {"cell": "lstm", "layers": 1, "projected": 7},
    "copying": {"cell": "gru", "layers": 1, "copies": True},
    "copying, two layers": {"cell": "lstm", "layers": 2, "copies": True},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_scores_are_the_equations(name: str, tmp_path: Path) -> None:
    setting = SETTINGS[name]
    tied = setting.get("tied", True)
    weights = make_weights(**setting)
    converted = convert("yoyodyne", write(tmp_path / "model.ckpt", weights, index_of(tied)))
    model, plain = in_float64(converted), Plain(weights, setting["layers"], tied)
    texts, targets = ["abca", "c", "bb?"], ["x yy", "a", "yy x x"]
    batch = converted.tokenizer(texts, return_tensors="pt", padding=True)
    rows = [[START, *converted.tokenizer(text_target=text).input_ids[:-1]] for text in targets]
    for row, read in enumerate(rows):
        single = {key: value[row : row + 1] for key, value in batch.items()}
        with torch.no_grad():
            found = model(**single, decoder_input_ids=torch.tensor([read])).logits[0]
        source = batch.input_ids[row][batch.attention_mask[row].bool()].tolist()
        assert source[0] == START
        assert source[-1] == END
        torch.testing.assert_close(found, plain.scores(source, read), rtol=0, atol=1e-10)
        ids = model.generate(**batch, num_beams=1)[row, 1:].tolist()
        ids = ids[: ids.index(END) + 1] if END in ids else ids
        own = [START]
        while len(own) <= 9 and (len(own) == 1 or own[-1] != END):
            own.append(int(plain.scores(source, own)[-1].argmax()))
        assert ids == own[1:]


def plain_beams(plain: Plain, source: list[int], width: int, steps: int) -> list[tuple[float, list[int]]]:
    """Yoyodyne's search: of the finished and all that the others can become, the best stay."""
    beams = [(0.0, [START])]
    for _ in range(steps):
        candidates = [beam for beam in beams if beam[1][-1] == END]
        for score, ids in beams:
            if ids[-1] != END:
                log_p = torch.log_softmax(plain.scores(source, ids)[-1], dim=-1).tolist()
                candidates += [(score + one, [*ids, symbol]) for symbol, one in enumerate(log_p)]
        beams = sorted(candidates, reverse=True)[:width]
    return beams


@pytest.mark.parametrize("name", ["two vocabularies", "copying"])
def test_beams_are_yoyodynes(name: str, tmp_path: Path) -> None:
    """In a batch, the best and the others; and transformers' own search would find others."""
    setting, different = SETTINGS[name], 0
    tied = setting.get("tied", True)
    for seed in range(3):
        weights = make_weights(**setting, seed=seed)
        converted = convert("yoyodyne", write(tmp_path / "model.ckpt", weights, index_of(tied)))
        model, plain = in_float64(converted), Plain(weights, setting["layers"], tied)
        batch = converted.tokenizer(["abca", "c", "bb?"], return_tensors="pt", padding=True)
        options = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 6}
        found = model.generate(**batch, **options, return_dict_in_generate=True, output_scores=True)
        ids = model.generate(**batch, **options)
        other = model.generate(**batch, **options, yoyodyne_beam_search=False, length_penalty=0.0)
        for row in range(3):
            source = batch.input_ids[row][batch.attention_mask[row].bool()].tolist()
            wanted = plain_beams(plain, source, width=3, steps=6)
            for place, (score, symbols) in enumerate(wanted):
                at = 3 * row + place
                for sequences in (found.sequences, ids):
                    assert sequences[at, : len(symbols)].tolist() == symbols
                    assert set(sequences[at, len(symbols) :].tolist()) <= {0, END}
                assert found.sequences_scores[at].item() == pytest.approx(score, abs=1e-5)
                mine = other[at].tolist()
                different += mine[: len(symbols)] != symbols
    assert different > 0


def test_tokenizer_and_settings(tmp_path: Path) -> None:
    path = write(tmp_path / "model.ckpt", make_weights("lstm", 1), index_of(True))
    converted = convert("yoyodyne", path)
    tokenizer = converted.tokenizer
    assert tokenizer("abz").input_ids == [START, 6, 7, 1, END]
    assert tokenizer(text_target="x yy b").input_ids == [9, 10, 7, END]
    assert tokenizer.decode([9, 10, END, 0], skip_special_tokens=True) == "x yy"
    assert converted.config.dropout == 0.3
    assert converted.model().generation_config.max_new_tokens == 9
    assert "the source character by character, and the target with a space between symbols" in converted.notes[0]
    # The training's configuration says otherwise: an empty separator is Yoyodyne's default.
    settings = tmp_path / "config.yaml"
    settings.write_text(yaml.safe_dump({"data": {"source_sep": " "}}))
    told = convert("yoyodyne", path, ConversionOptions(files={"config": settings}))
    assert told.tokenizer("a b z").input_ids == [START, 6, 7, 1, END]
    assert told.tokenizer(text_target="xb").input_ids == [9, 7, END]
    assert "as its configuration says" in told.notes[0]
    settings.write_text(yaml.safe_dump({"data": {"target_sep": "_"}}))
    with pytest.raises(ConversionError, match="`target_sep`='_' cannot be represented"):
        convert("yoyodyne", path, ConversionOptions(files={"config": settings}))


@pytest.mark.parametrize("kind", ["yaml", "json"])
def test_index_from_a_file(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / "model.ckpt", make_weights("gru", 1, tied=False), None)
    with pytest.raises(ConversionError, match="does not hold the vocabularies: give them as `index`"):
        convert("yoyodyne", path)
    file = tmp_path / f"index.{kind}"
    text = json.dumps(index_of(False)) if kind == "json" else "!Index\n" + yaml.safe_dump(index_of(False))
    file.write_text(text)
    converted = convert("yoyodyne", path, ConversionOptions(files={"index": file}))
    assert converted.tokenizer("cab").input_ids == [START, 8, 6, 7, END]
    assert converted.tokenizer(text_target="x yy a").input_ids == [7, 8, 6, END]
    file.write_text("{" if kind == "json" else "!!python/object/apply:os.system [false]")
    with pytest.raises(ConversionError, match=r"index\.\w+ cannot be read"):
        convert("yoyodyne", path, ConversionOptions(files={"index": file}))
    file.write_text(json.dumps({"source_vocabulary": ["a"], "tie_embeddings": True}))
    with pytest.raises(ConversionError, match="lacks target_vocabulary"):
        convert("yoyodyne", path, ConversionOptions(files={"index": file}))
    file.write_text(json.dumps({**index_of(False), "target_vocabulary": ["x"]}))
    with pytest.raises(ConversionError, match="The index has 10 symbols for the embeddings, which have 12"):
        convert("yoyodyne", path, ConversionOptions(files={"index": file}))


def opened(folder: str) -> str:
    """What a checkpoint might call."""
    (Path(folder) / "opened").touch()
    return "opened"


class Trap:
    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return opened, (str(self.folder),)


def test_a_pickle_is_opened_only_on_demand(tmp_path: Path) -> None:
    path = write(tmp_path / "model.ckpt", make_weights("lstm", 1), index_of(True), extra=Trap(tmp_path))
    file = tmp_path / "index.json"
    file.write_text(json.dumps(index_of(True)))
    with pytest.raises(ConversionError, match=r"opened.*--trust-pickle"):
        convert("yoyodyne", path, ConversionOptions(files={"index": file}))
    assert not (tmp_path / "opened").exists()
    convert("yoyodyne", path, ConversionOptions(files={"index": file}, trust_pickle=True)).model()
    assert (tmp_path / "opened").exists()


def without(weights: dict[str, torch.Tensor], *prefixes: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in weights.items() if not name.startswith(prefixes)}


def test_refusals(tmp_path: Path) -> None:
    weights, path = make_weights("lstm", 1), tmp_path / "model.ckpt"
    some = torch.zeros(1)
    for changed, message in (
        (weights | {"features_encoder.module.weight_hh_l0": some}, "a features encoder"),
        (without(weights, "decoder.attention"), "no attention: its context is divided by the batch's padded length"),
        (without(weights, "source_encoder"), "The source encoder is no GRU or LSTM"),
        (without(weights, "decoder.h0"), "no soft-attention or pointer-generator model"),
        (weights | {"decoder.extra": some}, r"cannot be represented: decoder\.extra"),
    ):
        with pytest.raises(ConversionError, match=message):
            convert("yoyodyne", write(path, changed, index_of(True)))
    torch.save({"weights": 1}, path)
    with pytest.raises(ConversionError, match="no Lightning checkpoint"):
        convert("yoyodyne", path)
    copying = make_weights("gru", 1, copies=True, tied=False)
    with pytest.raises(ConversionError, match="A pointer-generator without `tie_embeddings`"):
        convert("yoyodyne", write(path, copying, index_of(False)))


ORIGINALS = {
    "SoftAttentionLSTM": [],
    "SoftAttentionGRU": ["--untied", "--layers", "2", "--decoder_input_size", "18"],
    "PointerGeneratorLSTM": [],
    "PointerGeneratorGRU": ["--layers", "2", "--one_way"],
}


def compare_with_original(folder: Path) -> tuple[int, int, int]:
    """Scores of every target in float64, and how many of the greedy and the beam outputs are the same, of how many."""
    converted = convert("yoyodyne", folder / "model.ckpt", ConversionOptions(files={"config": folder / "config.yaml"}))
    model: Any = converted.model()
    exact = in_float64(converted)
    tokenizer = converted.tokenizer
    outputs, logits = json.loads((folder / "outputs.json").read_text()), torch.load(folder / "logits.pt")
    same = [0, 0]
    for start in range(0, len(logits), 32):
        part = slice(start, start + 32)
        batch = tokenizer(
            outputs["sources"][part], text_target=outputs["targets"][part], return_tensors="pt", padding=True
        )
        labels = batch.pop("labels")
        with torch.no_grad():
            found = exact(**batch, labels=labels).logits
        for row, expected in zip(found, logits[part], strict=True):
            # Logarithms of tiny probabilities: what is impossible for one is 1e-38 for the other.
            floor = -80.0 if converted.config.head_type == "pointer_generator" else -1e9
            torch.testing.assert_close(
                row[: len(expected)].clamp(min=floor), expected.clamp(min=floor), rtol=0, atol=1e-5
            )
        for index, (beams, name) in enumerate(((1, "greedy"), (5, "beam"))):
            texts = tokenizer.batch_decode(model.generate(**batch, num_beams=beams), skip_special_tokens=True)
            same[index] += sum(ours == theirs for ours, theirs in zip(texts, outputs[name][part], strict=True))
    return same[0], same[1], len(logits)


def yoyodyne_python() -> str | None:
    return os.environ.get("YOYODYNE_PYTHON") or (sys.executable if importlib.util.find_spec("yoyodyne") else None)


@pytest.mark.slow
@pytest.mark.skipif(yoyodyne_python() is None, reason="Yoyodyne is not installed")
@pytest.mark.parametrize("name", ORIGINALS)
def test_trained_originals(name: str, tmp_path: Path) -> None:
    script = Path(__file__).with_name("make_yoyodyne_checkpoint.py")
    folder = tmp_path / "original"
    command = [str(yoyodyne_python()), str(script), str(folder), name, *ORIGINALS[name]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    greedy, beam, count = compare_with_original(folder)
    assert greedy == beam == count == 60
