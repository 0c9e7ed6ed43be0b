"""
Marian archives against its equations, written plainly in NumPy and float64 (for the type `nematus` those of
`plain_nematus`). Marian itself was not run.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from plain_nematus import Array, PlainNematus, beam_search, log_softmax, sigmoid
from test_convert_nematus import PAD_ID, SOURCES, TARGETS, make_archive, ours, theirs

from hf_rnn_seq2seq.convert import ConversionError, ConversionOptions, Converted, convert

H, E, SOURCE_SIZE, TARGET_SIZE = 5, 4, 9, 11


class PlainMarian:
    """
    One sentence and one word at a time, from parameters under `s2s`'s names. As in Marian's cells, a layer
    normalisation is of a whole product, has a gain and no bias, and an epsilon of 1e-9.
    """

    def __init__(self, parameters: Mapping[str, Any], config: Mapping[str, Any]):
        self.p = {name: np.asarray(value, dtype=np.float64) for name, value in parameters.items()}
        self.config = {
            "enc-cell": "gru", "dec-cell": "gru", "enc-depth": 1, "dec-depth": 1, "enc-cell-depth": 1,
            "dec-cell-base-depth": 2, "enc-type": "bidirectional", **config,
        }  # fmt: skip
        self.norm = bool(config.get("layer-normalization"))
        self.skip = bool(config.get("skip"))

    def layer_norm(self, x: Array, gain: str) -> Array:
        if not self.norm:
            return x
        return self.p[gain][0] * (x - x.mean()) / np.sqrt(x.var() + 1e-9)

    def cell(self, kind: str, prefix: str, x: Array | None, state: Any, final: bool = False) -> Any:
        """`state`: (h, c); of a GRU c is carried along and never used."""
        p, (h, c) = self.p, state
        names = ("", "x") if kind == "gru" else ("",)
        u, b = (np.concatenate([p[f"{prefix}_{what}{end}"] for end in names], axis=1) for what in ("U", "b"))
        from_h = self.layer_norm(h @ u, f"{prefix}_gamma2")
        from_x = np.zeros_like(from_h)
        if x is not None:
            w = np.concatenate([p[f"{prefix}_W{end}"] for end in names], axis=1)
            from_x = self.layer_norm(x @ w, f"{prefix}_gamma1")
        b = b[0]
        n = len(h)
        if kind == "lstm":
            gates = from_x + from_h + b
            f, i, o = sigmoid(gates[:n]), sigmoid(gates[n : 2 * n]), sigmoid(gates[3 * n :])
            c = f * c + i * np.tanh(gates[2 * n : 3 * n])
            return o * np.tanh(c), c
        r, z = np.split(sigmoid((from_x + from_h + b)[: 2 * n]), 2)
        x_n, h_n, b_n = from_x[2 * n :], from_h[2 * n :], b[2 * n :]
        new = np.tanh(x_n + (h_n + b_n) * r) if final else np.tanh(x_n + h_n * r + b_n)
        return (1 - z) * new + z * h, c

    def stack(self, prefixes: Sequence[str], x: Array | None, state: Any) -> Any:
        for prefix in prefixes:
            state = self.cell(self.config["enc-cell"], prefix, x, state)
            x = None
        return state

    def run(self, layers: Sequence[Sequence[str]], xs: Sequence[Array]) -> list[Array]:
        """Layers above each other, in one direction."""
        for level, prefixes in enumerate(layers):
            state: Any = (np.zeros(H), np.zeros(H))
            outputs = []
            for x in xs:
                state = self.stack(prefixes, x, state)
                outputs.append(state[0] + x if self.skip and level else state[0])
            xs = outputs
        return list(xs)

    def encode(self, source: Sequence[int]) -> Array:
        depth, cells = self.config["enc-depth"], self.config["enc-cell-depth"]
        bi = depth if self.config["enc-type"] == "bidirectional" else 1
        table = self.p["encoder_Wemb" if "encoder_Wemb" in self.p else "Wemb"]
        embedded = list(table[list(source)])
        sides = []
        for prefix in ("encoder_bi", "encoder_bi_r"):
            layers = [
                [
                    prefix + (f"_l{i}" if i > 1 else "") + (f"_cell{j}" if i > 1 or j > 1 else "")
                    for j in range(1, cells + 1)
                ]
                for i in range(1, bi + 1)
            ]
            back = prefix.endswith("_r")
            found = self.run(layers, embedded[::-1] if back else embedded)
            sides.append(found[::-1] if back else found)
        joined = [np.concatenate(pair) for pair in zip(*sides, strict=True)]
        layers = [[f"encoder_l{i}_cell{j}" for j in range(1, cells + 1)] for i in range(bi + 1, depth + 1)]
        return np.stack(self.run(layers, joined) if layers else joined)

    def dense(self, values: Sequence[Array], name: str) -> Array:
        total = np.zeros(self.p[f"{name}_b{'0' if len(values) > 1 else ''}"].shape[1])
        for index, value in enumerate(values):
            n = str(index) if len(values) > 1 else ""
            total = (
                total + self.layer_norm(value @ self.p[f"{name}_W{n}"], f"{name}_gamma{n}") + self.p[f"{name}_b{n}"][0]
            )
        return np.tanh(total)

    def first_states(self, annotations: Array) -> Any:
        start = self.dense([annotations.mean(0)], "decoder_ff_state")
        return [(start, start)] * self.config["dec-depth"]

    def attend(self, h: Array, annotations: Array) -> Array:
        p = self.p
        state = self.layer_norm(h @ p["decoder_W_comb_att"], "decoder_att_gamma2")
        scores = []
        for annotation in annotations:
            key = self.layer_norm(annotation @ p["decoder_Wc_att"], "decoder_att_gamma1") + p["decoder_b_att"][0]
            scores.append((np.tanh(key + state) @ p["decoder_U_att"])[0])
        return np.exp(log_softmax(np.array(scores))) @ annotations

    def step(self, word: int | None, states: Any, annotations: Array) -> tuple[Array, Any]:
        kind = self.config["dec-cell"]
        table = self.p["decoder_Wemb" if "decoder_Wemb" in self.p else "Wemb"]
        x = np.zeros(table.shape[1]) if word is None else table[word]
        state = self.cell(kind, "decoder_cell1", x, states[0])
        context = self.attend(state[0], annotations)
        for index in range(2, self.config["dec-cell-base-depth"] + 1):
            state = self.cell(kind, f"decoder_cell{index}", context if index == 2 else None, state, final=True)
        new, top = [state], state[0]
        for level in range(2, self.config["dec-depth"] + 1):
            state = self.cell(kind, f"decoder_l{level}_cell1", top, states[level - 1])
            new.append(state)
            top = state[0] + top if self.skip else state[0]
        hidden = self.dense([x, top, context], "decoder_ff_logit_l1")
        if "decoder_ff_logit_l2_Wt" in self.p:
            table = self.p["decoder_ff_logit_l2_Wt"]
        elif "decoder_ff_logit_l2_W" in self.p:
            table = self.p["decoder_ff_logit_l2_W"].T
        return table @ hidden + self.p["decoder_ff_logit_l2_b"][0], new


def make_s2s(config: dict[str, Any], output: str = "Wt", tables: str = "two", seed: int = 0) -> dict[str, Any]:
    """`output`: "Wt", the older "W" or "tied"; `tables`: "two" or "one"."""
    norm = config.get("layer-normalization")
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, int]] = {}

    def cell(kind: str, prefix: str, width: int) -> None:
        gates = {"": 2 * H, "x": H} if kind == "gru" else {"": 4 * H}
        for end, size in gates.items():
            shapes[f"{prefix}_U{end}"], shapes[f"{prefix}_b{end}"] = (H, size), (1, size)
            if width:
                shapes[f"{prefix}_W{end}"] = (width, size)
        if norm:
            shapes[f"{prefix}_gamma2"] = (1, 3 * H)
            if width:
                shapes[f"{prefix}_gamma1"] = (1, 3 * H)

    enc, dec = config.get("enc-cell", "gru"), config.get("dec-cell", "gru")
    depth = config.get("enc-depth", 1)
    bi = depth if config.get("enc-type", "bidirectional") == "bidirectional" else 1
    for i in range(1, depth + 1):
        for j in range(1, config.get("enc-cell-depth", 1) + 1):
            width = 0 if j > 1 else E if i == 1 else H if i <= bi else 2 * H if i == 2 else H
            if i <= bi:
                for prefix in ("encoder_bi", "encoder_bi_r"):
                    cell(enc, prefix + (f"_l{i}" if i > 1 else "") + (f"_cell{j}" if i > 1 or j > 1 else ""), width)
            else:
                cell(enc, f"encoder_l{i}_cell{j}", width)
    memory = 2 * H if bi == depth else H
    for j in range(1, config.get("dec-cell-base-depth", 2) + 1):
        cell(dec, f"decoder_cell{j}", E if j == 1 else memory if j == 2 else 0)
    for i in range(2, config.get("dec-depth", 1) + 1):
        cell(dec, f"decoder_l{i}_cell1", H)
    lookup = memory + 1
    shapes |= {"decoder_W_comb_att": (H, lookup), "decoder_Wc_att": (memory, lookup), "decoder_b_att": (1, lookup)}
    shapes["decoder_U_att"] = (lookup, 1)
    shapes |= {"decoder_ff_state_W": (memory, H), "decoder_ff_state_b": (1, H)}
    for n, width in enumerate((E, H, memory)):
        shapes |= {f"decoder_ff_logit_l1_W{n}": (width, E), f"decoder_ff_logit_l1_b{n}": (1, E)}
        if norm:
            shapes[f"decoder_ff_logit_l1_gamma{n}"] = (1, E)
    if norm:
        shapes |= {
            "decoder_ff_state_gamma": (1, H),
            "decoder_att_gamma1": (1, lookup),
            "decoder_att_gamma2": (1, lookup),
        }
    size = TARGET_SIZE
    if tables == "two":
        shapes |= {"encoder_Wemb": (SOURCE_SIZE, E), "decoder_Wemb": (size, E)}
    else:
        shapes["Wemb"] = (size, E)
    if output == "Wt":
        shapes["decoder_ff_logit_l2_Wt"] = (size, E)
    elif output == "W":
        shapes["decoder_ff_logit_l2_W"] = (E, size)
    shapes["decoder_ff_logit_l2_b"] = (1, size)
    return {name: rng.normal(0, 0.9, shape) for name, shape in shapes.items()}


def write(folder: Path, config: dict[str, Any], archive: Mapping[str, Any]) -> tuple[Path, ConversionOptions]:
    path = folder / "model.npz"
    text = yaml.safe_dump({"version": "v1.9.0 ba94c5b9", **config}).encode() + b"\0"
    stored: dict[str, Any] = {**archive, "special:model.yml": np.frombuffer(text, dtype=np.int8)}
    np.savez(path, **stored)
    files = {}
    for name, size in (("source", SOURCE_SIZE), ("target", TARGET_SIZE)):
        words = ["</s>", "<unk>", *(f"{name[0]}{index}" for index in range(2, size))]
        files[f"{name}_vocab"] = folder / f"{name}.yml"
        files[f"{name}_vocab"].write_text("".join(f'"{word}": {index}\n' for index, word in enumerate(words)))
    return path, ConversionOptions(files=files)


def compare(converted: Converted, plain: Any) -> None:
    """Logits to 1e-10, greedy and beam search."""
    model: Any = converted.model().double()
    model.load_state_dict({key: value.double() for key, value in converted.weights.items()}, strict=False)
    model.tie_weights()
    width = max(map(len, SOURCES))
    input_ids = torch.tensor([ours(row) + [PAD_ID] * (width - len(row)) for row in SOURCES])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in SOURCES])
    decoder_ids = torch.tensor([[PAD_ID, *ours(row)[:-1]] for row in TARGETS])
    with torch.no_grad():
        logits = model(input_ids, attention_mask=mask, decoder_input_ids=decoder_ids).logits
    without = torch.cat((logits[..., :PAD_ID], logits[..., PAD_ID + 1 :]), -1)
    for row, (source, target) in enumerate(zip(SOURCES, TARGETS, strict=True)):
        annotations = plain.encode(source)
        states, expected = plain.first_states(annotations), []
        for word in [None, *target[:-1]]:
            scores, states = plain.step(word, states, annotations)
            expected.append(scores)
        np.testing.assert_allclose(without[row].numpy(), np.stack(expected), rtol=0, atol=1e-10)
    for beams in (1, 3):
        found = model.generate(
            input_ids, attention_mask=mask, num_beams=beams, max_new_tokens=7, do_sample=False, suppress_tokens=None
        )
        for row, source in enumerate(SOURCES):
            words = found[row, 1:].tolist()
            words = words[: words.index(0) + 1] if 0 in words else [word for word in words if word != PAD_ID]
            assert theirs(words) == beam_search(plain, source, beams, 7)


DEEP = {"enc-cell-depth": 3, "dec-cell-base-depth": 4}
S2S: dict[str, tuple[dict[str, Any], str, str]] = {
    "gru": ({}, "Wt", "two"),
    "older output": ({}, "W", "two"),
    "tied": ({"tied-embeddings": True}, "tied", "two"),
    "all tied": ({"tied-embeddings-all": True}, "tied", "one"),
    "source tied": ({"tied-embeddings-src": True}, "Wt", "one"),
    "deep transition": (DEEP, "Wt", "two"),
    "layer norm": ({"layer-normalization": True}, "Wt", "two"),
    "deep transition, layer norm": ({**DEEP, "layer-normalization": True}, "Wt", "two"),
    "stacked": ({"enc-depth": 3, "dec-depth": 2}, "Wt", "two"),
    "stacked with skips": ({"enc-depth": 3, "dec-depth": 3, "skip": True, **DEEP}, "Wt", "two"),
    "stacked lstm": ({"enc-cell": "lstm", "dec-cell": "lstm", "enc-depth": 2, "dec-depth": 2, **DEEP}, "Wt", "two"),
    "lstm before gru": ({"enc-cell": "lstm"}, "Wt", "two"),
    "one more layer": ({"enc-type": "bi-unidirectional", "enc-depth": 2}, "Wt", "two"),
    "more layers": (
        {"enc-type": "bi-unidirectional", "enc-depth": 4, "skip": True, "layer-normalization": True}, "Wt", "two"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", S2S)
def test_s2s_is_the_equations(name: str, tmp_path: Path) -> None:
    config, output, tables = S2S[name]
    archive = make_s2s(config, output, tables)
    path, options = write(tmp_path, {"type": "s2s", **config}, archive)
    if tables == "one":
        options = ConversionOptions(files=dict.fromkeys(options.files, options.files["target_vocab"]))
    plain = PlainMarian(archive, config)
    if output == "tied":
        plain.p["decoder_ff_logit_l2_Wt"] = plain.p["Wemb" if tables == "one" else "decoder_Wemb"]
    compare(convert("marian", path, options), plain)


# What Marian's type `amun` saves of `s2s`'s names under others.
AMUN = {
    "decoder_cell1_U": "decoder_U", "decoder_cell1_Ux": "decoder_Ux", "decoder_cell1_W": "decoder_W",
    "decoder_cell1_Wx": "decoder_Wx", "decoder_cell1_b": "decoder_b", "decoder_cell1_bx": "decoder_bx",
    "decoder_cell2_U": "decoder_U_nl", "decoder_cell2_Ux": "decoder_Ux_nl", "decoder_cell2_W": "decoder_Wc",
    "decoder_cell2_Wx": "decoder_Wcx", "decoder_cell2_b": "decoder_b_nl", "decoder_cell2_bx": "decoder_bx_nl",
    "decoder_ff_logit_l1_W0": "ff_logit_prev_W", "decoder_ff_logit_l1_W1": "ff_logit_lstm_W",
    "decoder_ff_logit_l1_W2": "ff_logit_ctx_W", "decoder_ff_logit_l1_b0": "ff_logit_prev_b",
    "decoder_ff_logit_l1_b1": "ff_logit_lstm_b", "decoder_ff_logit_l1_b2": "ff_logit_ctx_b",
    "decoder_ff_logit_l1_gamma0": "ff_logit_l1_gamma0", "decoder_ff_logit_l1_gamma1": "ff_logit_l1_gamma1",
    "decoder_ff_logit_l1_gamma2": "ff_logit_l1_gamma2", "decoder_ff_logit_l2_W": "ff_logit_W",
    "decoder_ff_logit_l2_b": "ff_logit_b", "decoder_ff_state_W": "ff_state_W", "decoder_ff_state_b": "ff_state_b",
    "decoder_ff_state_gamma": "ff_state_gamma", "decoder_Wemb": "Wemb_dec", "encoder_Wemb": "Wemb",
}  # fmt: skip


def amun_name(name: str) -> str:
    return AMUN.get(name, name.replace("encoder_bi_", "encoder_"))


@pytest.mark.parametrize("norm", [False, True])
def test_amun_is_the_equations(norm: bool, tmp_path: Path) -> None:
    config = {"layer-normalization": norm}
    archive = make_s2s(config, "W")
    stored = {amun_name(name): value for name, value in archive.items()}
    assert {"encoder_r_Ux", "decoder_U_nl"} <= stored.keys()
    path, options = write(tmp_path, {"type": "amun", **config}, {**stored, "decoder_c_tt": np.zeros((1, 0))})
    compare(convert("marian", path, options), PlainMarian(archive, config))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("deep", [False, True])
def test_nematus_type_is_nematus(norm: bool, deep: bool, tmp_path: Path) -> None:
    """Its archives are Nematus's, with vectors of one row, and Marian's settings; layers above have Marian's names."""
    theirs_ = {"layer_normalisation": norm, "dec_depth": 2 if deep else 1}
    config: dict[str, Any] = {"type": "nematus", "layer-normalization": norm, "skip": True}
    if deep:
        theirs_ |= {"enc_recurrence_transition_depth": 3, "dec_base_recurrence_transition_depth": 4}
        config |= {"enc-cell-depth": 3, "dec-cell-base-depth": 4, "dec-depth": 2}
    archive = make_archive(theirs_)
    stored = {
        name.replace("decoder_2_", "decoder_l2_cell1_"): value[None] if value.ndim == 1 else value
        for name, value in archive.items()
        if name != "decoder_c_tt"
    }
    path, options = write(tmp_path, config, stored)
    compare(convert("marian", path, options), PlainNematus(archive, theirs_))


def test_vocabularies_and_settings(tmp_path: Path) -> None:
    path, options = write(tmp_path, {"type": "s2s"}, make_s2s({}))
    converted = convert("marian", path, options)
    assert converted.tokenizer("s2 what s8").input_ids == [3, 1, 9, 0]
    assert converted.origin == "Marian v1.9.0 ba94c5b9, type s2s"
    assert converted.model().generation_config.suppress_tokens == [1]
    # A token a line; and what the decoder's configuration names.
    lines = tmp_path / "target.txt"
    lines.write_text("".join(f"{word}\n" for word in ["</s>", "<unk>", "a", "b"]))
    (tmp_path / "model.npz.decoder.yml").write_text("vocabs:\n  - /elsewhere/source.yml\n  - target.txt\n")
    converted = convert("marian", path)
    assert converted.tokenizer(text_target="b a s2").input_ids == [4, 3, 1, 0]


def test_sentencepiece_vocabulary(tmp_path: Path) -> None:
    """As Marian trains one: the end of sentence is 0, the unknown piece 1."""
    sentencepiece = pytest.importorskip("sentencepiece")
    text = tmp_path / "text"
    text.write_text("low lower lowest new newer newest wide wider\n" * 20)
    size = TARGET_SIZE + 6
    special = {"eos_id": 0, "unk_id": 1, "bos_id": -1}
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "vocab"), vocab_size=size, **special, minloglevel=2
    )
    (tmp_path / "vocab.model").rename(tmp_path / "vocab.spm")
    archive = make_s2s({}) | {"encoder_Wemb": np.ones((size, E)), "decoder_Wemb": np.ones((size, E))}
    archive |= {"decoder_ff_logit_l2_Wt": np.ones((size, E)), "decoder_ff_logit_l2_b": np.ones((1, size))}
    path, _ = write(tmp_path, {"type": "s2s"}, archive)
    files = dict.fromkeys(("source_vocab", "target_vocab"), tmp_path / "vocab.spm")
    tokenizer = convert("marian", path, ConversionOptions(files=files)).tokenizer
    original = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "vocab.spm"))
    for sentence in ("lower wider", "new  low", "newest q"):
        assert tokenizer(sentence).input_ids == [*ours(original.encode(sentence)), 0]
        ids = tokenizer(text_target=sentence).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == original.decode(theirs(ids)[:-1]).replace(" ⁇ ", "")


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "transformer": ({"type": "transformer"}, "`type`='transformer' cannot be represented; allowed are s2s, amun"),
    "no type": ({}, "`type`=None"),
    "alternating": ({"type": "s2s", "enc-type": "alternating", "enc-depth": 2}, "`enc-type`='alternating'"),
    "no skips": ({"type": "s2s", "enc-type": "bi-unidirectional", "enc-depth": 3}, "`skip`=False"),
    "cell": ({"type": "s2s", "dec-cell": "mlstm"}, "`dec-cell`='mlstm'"),
    "lstm norm": ({"type": "s2s", "enc-cell": "lstm", "layer-normalization": True}, "`enc-cell`='lstm'"),
    "high": ({"type": "s2s", "dec-cell-high-depth": 2}, "`dec-cell-high-depth`=2"),
    "backwards": ({"type": "s2s", "right-left": True}, "`right-left`=True"),
    "missing": ({"type": "s2s", "layer-normalization": True}, "no parameter 'decoder_cell1_gamma1'"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str, tmp_path: Path) -> None:
    config, message = REFUSALS[name]
    path, options = write(tmp_path, config, make_s2s({}))
    with pytest.raises(ConversionError, match=message):
        convert("marian", path, options)


def test_refusals_of_archives(tmp_path: Path) -> None:
    archive = make_s2s({})
    path, options = write(tmp_path, {"type": "s2s"}, {**archive, "decoder_W_comb_att_1": np.zeros((2, 2))})
    with pytest.raises(ConversionError, match="cannot be represented: decoder_W_comb_att_1"):
        convert("marian", path, options)
    np.savez(path, **archive)
    with pytest.raises(ConversionError, match=r"no 'special:model\.yml'"):
        convert("marian", path, options)
    path, _ = write(tmp_path, {"type": "s2s"}, archive)
    with pytest.raises(ConversionError, match=r"source vocab of .* is missing"):
        convert("marian", path)
