"""
Nematus archives against `plain_nematus`, an independent implementation of Nematus's equations in float64: the original
runs on no present Python, so these tests are the proof that there is.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_nematus import PlainNematus

from hf_rnn_seq2seq import RnnSeq2SeqTokenizer
from hf_rnn_seq2seq.convert import ConversionError, ConversionOptions, convert
from hf_rnn_seq2seq.convert.nematus import PAD_ID

H, E, SOURCE_SIZE, TARGET_SIZE = 5, 4, 9, 11
SOURCES = [[5, 3, 7, 2, 0], [4, 0], [8, 1, 6, 0]]
TARGETS = [[3, 9, 4, 0], [2, 2, 10, 5], [7, 1, 6, 0]]


def gru_shapes(options: dict[str, Any], prefix: str, width: int, suffix: str = "", nl: bool = False) -> dict[str, Any]:
    """Of a cell with input, or of a transition."""
    u, ux, b, bx, w, wx = ("U_nl", "Ux_nl", "b_nl", "bx_nl", "Wc", "Wcx") if nl else ("U", "Ux", "b", "bx", "W", "Wx")
    shapes: dict[str, Any] = {u: (H, 2 * H), ux: (H, H), b: (2 * H,), bx: (H,)}
    if width:
        shapes |= {w: (width, 2 * H), wx: (width, H)}
    if options.get("layer_normalisation"):
        for name in (u, ux, *((w, wx) if width else ())):
            shapes |= {f"{name}{suffix}_{ending}": shapes[name][1:] for ending in ("lns", "lnb")}
    # The norms' names already have the suffix within.
    return {f"{prefix}_{name}" if "_ln" in name else f"{prefix}_{name}{suffix}": s for name, s in shapes.items()}


def make_archive(options: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    norm = options.get("layer_normalisation")
    emb = {"Wemb": (SOURCE_SIZE, E)}
    one_table = options.get("tie_encoder_decoder_embeddings")
    target_size = SOURCE_SIZE if one_table else TARGET_SIZE
    if not one_table:
        emb["Wemb_dec"] = (target_size, E)
    shapes: dict[str, Any] = dict(emb)
    for prefix in ("encoder", "encoder_r"):
        shapes |= gru_shapes(options, prefix, E)
        for depth in range(1, options.get("enc_recurrence_transition_depth", 1)):
            shapes |= gru_shapes(options, prefix, 0, f"_drt_{depth}")
    shapes |= gru_shapes(options, "decoder", E)
    for depth in range(options.get("dec_base_recurrence_transition_depth", 2) - 1):
        shapes |= gru_shapes(options, "decoder", 0 if depth else 2 * H, f"_drt_{depth}" if depth else "", nl=True)
    for level in range(2, options.get("dec_depth", 1) + 1):
        shapes |= gru_shapes(options, f"decoder_{level}", H)
    shapes |= {"decoder_W_comb_att": (H, 2 * H), "decoder_Wc_att": (2 * H, 2 * H), "decoder_b_att": (2 * H,)}
    shapes |= {"decoder_U_att": (2 * H, 1), "decoder_c_tt": (1,)}
    for name, width, out in (
        ("ff_state", 2 * H, H), ("ff_logit_lstm", H, E), ("ff_logit_prev", E, E), ("ff_logit_ctx", 2 * H, E),
    ):  # fmt: skip
        shapes |= {f"{name}_W": (width, out), f"{name}_b": (out,)}
        if norm:
            shapes |= {f"{name}_ln_s": (out,), f"{name}_ln_b": (out,)}
    if norm:
        shapes |= {f"decoder_{x}_{e}": (2 * H,) for x in ("W_comb_att", "Wc_att") for e in ("lns", "lnb")}
    if not options.get("tie_decoder_embeddings"):
        shapes["ff_logit_W"] = (E, target_size)
    shapes["ff_logit_b"] = (target_size,)
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0, 0.9, shape) for name, shape in shapes.items()}


def write(
    folder: Path, options: dict[str, Any], archive: dict[str, Any], words: tuple[int, int] | None = None
) -> Path:
    """The archive, its configuration and two dictionaries of `words` entries."""
    sizes = words or (SOURCE_SIZE, len(archive["ff_logit_b"]))
    for name, size in zip(("source", "target"), sizes, strict=True):
        entries = {"eos": 0, "UNK": 1} | {f"{name[0]}{index}": index for index in range(2, size)}
        (folder / f"{name}.json").write_text(json.dumps(entries))
    named = {"dictionaries": ["/nowhere/source.json", "target.json"], "dim": H, "dim_word": E}
    if options.get("tie_encoder_decoder_embeddings"):
        named["dictionaries"] = ["/nowhere/source.json", "source.json"]
    path = folder / "model.npz"
    np.savez(path, history_errs=np.zeros(3), uidx=np.array(7), **archive)
    (folder / "model.npz.json").write_text(json.dumps(named | options))
    return path


def ours(ids: list[int]) -> list[int]:
    """Nematus's ids as ours."""
    return [index + (index >= PAD_ID) for index in ids]


def theirs(ids: list[int]) -> list[int]:
    return [index - (index > PAD_ID) for index in ids]


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_decoder_embeddings": True},
    "one table": {"tie_decoder_embeddings": True, "tie_encoder_decoder_embeddings": True},
    "deep transition": {"enc_recurrence_transition_depth": 3, "dec_base_recurrence_transition_depth": 4},
    "layers": {"dec_depth": 3},
    "layers of TensorFlow": {"dec_depth": 3, "theano_compat": False},
    "layer norm": {"layer_normalisation": True},
    "all": {
        "layer_normalisation": True, "enc_recurrence_transition_depth": 2, "dec_base_recurrence_transition_depth": 3,
        "dec_depth": 2, "tie_decoder_embeddings": True,
    },
    "all of TensorFlow": {
        "layer_normalisation": True, "enc_recurrence_transition_depth": 2, "dec_base_recurrence_transition_depth": 3,
        "dec_depth": 2, "theano_compat": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_logits_and_searches_are_the_equations(name: str, tmp_path: Path) -> None:
    options = SETTINGS[name]
    archive = make_archive(options)
    if options.get("theano_compat") is False:  # its transitions of the encoder have no biases
        left_out = [key for key in archive if re.match("encoder(_r)?_bx?_drt_", key)]
        archive = archive | {key: np.zeros_like(archive[key]) for key in left_out}
    plain = PlainNematus(archive, options)
    stored = {key: value for key, value in archive.items() if value.any()}
    converted = convert("nematus", write(tmp_path, options, stored))
    model: Any = converted.model().double()
    model.load_state_dict({key: value.double() for key, value in converted.weights.items()}, strict=False)
    model.tie_weights()

    width = max(map(len, SOURCES))
    limit = SOURCE_SIZE if options.get("tie_encoder_decoder_embeddings") else TARGET_SIZE
    targets = [[word % limit for word in target] for target in TARGETS]
    input_ids = torch.tensor([ours(row) + [PAD_ID] * (width - len(row)) for row in SOURCES])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in SOURCES])
    decoder_ids = torch.tensor([[PAD_ID, *ours(row)[:-1]] for row in targets])
    with torch.no_grad():
        logits = model(input_ids, attention_mask=mask, decoder_input_ids=decoder_ids).logits
    assert (logits[..., PAD_ID] == -1e4).all()
    without = torch.cat((logits[..., :PAD_ID], logits[..., PAD_ID + 1 :]), -1)
    for row, (source, target) in enumerate(zip(SOURCES, targets, strict=True)):
        np.testing.assert_allclose(without[row].numpy(), plain.logits(source, target), rtol=0, atol=1e-10)

    for beams in (1, 3):
        found = model.generate(
            input_ids, attention_mask=mask, num_beams=beams, max_new_tokens=7, length_penalty=0.0, do_sample=False
        )
        for row, source in enumerate(SOURCES):
            words = found[row, 1:].tolist()
            words = words[: words.index(0) + 1] if 0 in words else [word for word in words if word != PAD_ID]
            assert theirs(words) == plain.beam(source, beams, 7)


def test_tokenizer_and_settings(tmp_path: Path) -> None:
    """Words beyond the model's are unknown; entries that a dictionary lacks are fillers."""
    archive = make_archive({})
    path = write(tmp_path, {"dropout_hidden": 0.25, "use_dropout": True, "model_version": 0.1}, archive, words=(20, 8))
    converted = convert("nematus", path)
    tokenizer, config = converted.tokenizer, converted.config
    assert tokenizer("s2 s8 s9 what").input_ids == [3, 9, 1, 1, 0]
    assert tokenizer(text_target="t7 t8").input_ids == [8, 1, 0]
    assert tokenizer.decode([3, 8, 0, PAD_ID], skip_special_tokens=True) == "t2 t7"
    assert (config.source_vocab_size, config.vocab_size) == (SOURCE_SIZE + 1, TARGET_SIZE + 1)
    assert (len(tokenizer.source_tokenizer), len(tokenizer)) == (SOURCE_SIZE + 1, TARGET_SIZE + 1)
    assert (config.eos_token_id, config.pad_token_id, config.decoder_start_token_id) == (0, PAD_ID, PAD_ID)
    assert config.dropout == 0.25
    assert not converted.weights["model.decoder.embed_tokens.weight"][PAD_ID].any()
    converted.tokenizer.save_pretrained(tmp_path / "saved")
    again = RnnSeq2SeqTokenizer.from_pretrained(tmp_path / "saved")
    assert again("s2 s3").input_ids == [3, 4, 0]


def test_subword_codes_cut_the_text(tmp_path: Path) -> None:
    archive = make_archive({})
    path = write(tmp_path, {}, archive)
    entries = ["eos", "UNK", "a@@", "b", "ab@@", "c", "ab", "d", "e"]
    (tmp_path / "source.json").write_text(json.dumps({word: index for index, word in enumerate(entries)}))
    codes = tmp_path / "codes"
    codes.write_text("#version: 0.2\na b\na b</w>\n")
    converted = convert("nematus", path, ConversionOptions(files={"source_codes": codes}))
    source = converted.tokenizer.source_tokenizer
    assert source.convert_ids_to_tokens(source("ab abc").input_ids) == ["ab</w>", "ab", "c</w>", "eos"]
    assert source("ab abc").input_ids == ours([6, 4, 5, 0])
    converted.model()


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "layers of the encoder": ({"enc_depth": 2}, "`enc_depth`=2"),
    "transformer": ({"model_type": "transformer"}, "`model_type`='transformer'"),
    "LSTM": ({"encoder": "lstm"}, "`encoder`='lstm'"),
    "deep layer with attention": ({"dec_depth": 2, "decoder_deep": "gru_cond"}, "`decoder_deep`='gru_cond'"),
    "transition above": ({"dec_high_recurrence_transition_depth": 2}, "`dec_high_recurrence_transition_depth`=2"),
    "context above": ({"dec_deep_context": True}, "`dec_deep_context`=True"),
    "factors": ({"factors": 2}, "`factors`=2"),
    "mixture": ({"softmax_mixture_size": 3}, "`softmax_mixture_size`=3"),
    "activation": ({"output_hidden_activation": "relu"}, "`output_hidden_activation`='relu'"),
    "weight normalisation": ({"weight_normalisation": True}, "`weight_normalisation`=True"),
    "dropout of old": ({"use_dropout": True}, "`model_version` before 0.1"),
    "missing": ({"layer_normalisation": True}, "no parameter 'encoder_W_lns'"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str, tmp_path: Path) -> None:
    options, message = REFUSALS[name]
    with pytest.raises(ConversionError, match=message):
        convert("nematus", write(tmp_path, options, make_archive({})))


def test_refusals_of_files(tmp_path: Path) -> None:
    archive = make_archive({})
    path = write(tmp_path, {}, archive | {"encoder_extra": np.zeros(2)})
    with pytest.raises(ConversionError, match="cannot be represented: encoder_extra"):
        convert("nematus", path)
    path = write(tmp_path, {}, archive | {"Wemb": np.zeros((SOURCE_SIZE, E), dtype=np.int64)})
    with pytest.raises(ConversionError, match="'Wemb' must hold floating-point numbers, it is int64"):
        convert("nematus", path)
    path = write(tmp_path, {}, archive)
    np.savez(path, history_errs=np.array([{}], dtype=object), **archive)
    convert("nematus", path)  # a pickle that nobody opens
    np.savez(path, **(archive | {"Wemb": np.array([{}], dtype=object)}))
    with pytest.raises(ConversionError, match="'Wemb' is no array of numbers"):
        convert("nematus", path)
    path.write_bytes(b"nothing")
    with pytest.raises(ConversionError, match=r"model\.npz is no \.npz archive"):
        convert("nematus", path)
    path = write(tmp_path, {}, archive)
    (tmp_path / "source.json").unlink()
    with pytest.raises(ConversionError, match=r"source vocab .* is missing: '/nowhere/source.json' is not there"):
        convert("nematus", path)
    (tmp_path / "model.npz.json").unlink()
    with pytest.raises(ConversionError, match=r"configuration .*model\.npz\.json is missing"):
        convert("nematus", path)
