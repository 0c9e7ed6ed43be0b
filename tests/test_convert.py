"""What all converters share (reading, unknown pieces, saving, the script), and g2p_en."""

import importlib.util
import random
import string
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scripts import load_script
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedTokenizerFast

from hf_rnn_seq2seq import RnnSeq2SeqConfig, RnnSeq2SeqForConditionalGeneration, RnnSeq2SeqTokenizer
from hf_rnn_seq2seq.convert import (
    FORMATS,
    ConversionError,
    ConversionOptions,
    Converted,
    convert,
    fit_vocabulary,
)
from hf_rnn_seq2seq.convert.base import NEVER, StandIn, check_files, read_torch
from hf_rnn_seq2seq.convert.g2p_en import GRAPHEMES, PHONEMES
from hf_rnn_seq2seq.convert.saving import save
from hf_rnn_seq2seq.convert.vocabularies import (
    SpecialTokens,
    make_side,
    subword_nmt_backend,
    whitespace_backend,
)

SPECIALS = SpecialTokens(pad="<pad>", bos="<s>", eos="</s>", unk="<unk>")
FIRST = ["<unk>", "<pad>", "<s>", "</s>"]


# A vocabulary with pieces that the original reads as unknown


def pair(source: PreTrainedTokenizerFast, target: PreTrainedTokenizerFast) -> RnnSeq2SeqTokenizer:
    return RnnSeq2SeqTokenizer(source, target)


def test_unknown_pieces(tmp_path: Path) -> None:
    """The rows behind the original's vocabulary change nothing that the model computes."""
    codes = tmp_path / "codes"
    codes.write_text("#version: 0.2\na b\nab c</w>\n")
    tokens = [*FIRST, "abc", "a@@", "b"]
    for shared, tied in ((True, True), (False, False), (False, True)):
        sides = [make_side(subword_nmt_backend(tokens, codes, SPECIALS), SPECIALS) for _ in range(2)]
        config = RnnSeq2SeqConfig(
            vocab_size=len(tokens), source_vocab_size=None if shared else len(tokens), embedding_size=8, hidden_size=8,
            tie_word_embeddings=tied, pad_token_id=1, bos_token_id=2, eos_token_id=3, decoder_start_token_id=2,
            unk_token_id=0,
        )  # fmt: skip
        torch.manual_seed(0)
        original = RnnSeq2SeqForConditionalGeneration(config).eval()
        given = Converted(config, original.state_dict(), pair(*sides), "test")
        size = len(tokens)
        grown = fit_vocabulary(given)
        model, tokenizer = grown.model(), grown.tokenizer
        assert model.config.vocab_size == len(tokenizer) > size
        assert model.config.source_size == tokenizer.source_vocab_size
        assert any("read" in note and "source" in note for note in grown.notes)
        ids = torch.tensor([tokenizer("abc abb acb")["input_ids"]])
        assert (ids >= size).any()
        known = torch.where(ids < size, ids, 0)
        with torch.no_grad():
            found = model(ids, decoder_input_ids=ids).logits
            expected = original(known, decoder_input_ids=known).logits
        torch.testing.assert_close(found[..., :size], expected, atol=1e-6, rtol=0)
        assert (found.softmax(-1)[..., size:] == 0).all()


def test_vocabulary_that_is_too_small() -> None:
    tokenizer = pair(*(make_side(whitespace_backend(FIRST, "<unk>"), SPECIALS) for _ in range(2)))
    with pytest.raises(ConversionError, match="The source vocabulary has 4 tokens, the model 5"):
        fit_vocabulary(Converted(RnnSeq2SeqConfig(vocab_size=5), {}, tokenizer, "test"))


# Reading and saving


class Unsafe:
    pass


def test_reading_a_pickle(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"a": torch.ones(2), "b": Unsafe()}, path)
    with pytest.raises(ConversionError, match=rf"the class {Unsafe.__module__}\.Unsafe.*--trust-pickle"):
        read_torch(path, trust_pickle=False)
    assert isinstance(read_torch(path, trust_pickle=False, allowed=[Unsafe])["b"], Unsafe)
    assert isinstance(read_torch(path, trust_pickle=True)["b"], Unsafe)
    package = Unsafe.__module__.split(".")[0]
    assert isinstance(read_torch(path, trust_pickle=True, stand_ins=[package])["b"], StandIn)


def test_weights_have_to_be_the_models() -> None:
    converted = tiny_g2p_converted()
    name = "head.output.bias"
    weights = dict(converted.weights)
    bias = weights.pop(name)
    converted.weights = weights
    with pytest.raises(ConversionError, match=rf"Weights without a value: \['{name}'\]"):
        converted.model()
    converted.weights = {**weights, name: bias, "other": bias}
    with pytest.raises(ConversionError, match=r"weights without a place: \['other'\]"):
        converted.model()


def test_formats() -> None:
    with pytest.raises(ConversionError, match="Unknown format 'sockeye'; there are g2p_en, opennmt"):
        convert("sockeye", "model.pt")
    with pytest.raises(ConversionError, match=r"There is no checkpoint model\.pt"):
        convert("opennmt", "model.pt")
    for name in FORMATS:
        assert importlib.util.find_spec(f"hf_rnn_seq2seq.convert.{FORMATS[name]}") is not None


def test_files_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="Unknown file 'x'; this format takes none"):
        check_files(ConversionOptions(files={"x": tmp_path}), ())
    with pytest.raises(ConversionError, match="The file 'x' is not there"):
        check_files(ConversionOptions(files={"x": tmp_path / "y"}), ("x",))
    with pytest.raises(ConversionError, match="needs the file 'x' \\(--file x=PATH\\)"):
        check_files(ConversionOptions(), ("x",), needed=("x",))


def test_saved_model(tmp_path: Path) -> None:
    converted = tiny_g2p_converted()
    folder = tmp_path / "new" / "model"
    save(converted, folder, "checkpoint20.npz")
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(["ab", "xyz"], return_tensors="pt", padding=True)
    assert torch.equal(model.generate(**batch), converted.model().generate(**batch))
    assert model.generation_config.max_new_tokens == 20
    card = (folder / "README.md").read_text()
    for part in ("g2p_en 2", "`checkpoint20.npz`", converted.notes[0], "| `cell_type` | gru |", "library_name"):
        assert part in card
    assert not list(folder.parent.glob("*.partial"))

    with pytest.raises(ConversionError, match="is there already and not an empty folder"):
        save(converted, folder, "checkpoint20.npz")
    (tmp_path / "empty").mkdir()
    save(converted, tmp_path / "empty", "checkpoint20.npz")
    assert (tmp_path / "empty" / "config.json").is_file()


def test_saves_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converted = tiny_g2p_converted()
    # A disk that is full when the last file is written.
    monkeypatch.setattr("hf_rnn_seq2seq.convert.saving.card", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        save(converted, tmp_path / "model", "x")
    assert list(tmp_path.iterdir()) == []


def test_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = load_script("convert_checkpoint").main
    path = write_g2p(tmp_path / "checkpoint20.npz")
    main(["--format", "g2p_en", str(path), str(tmp_path / "out")])
    assert "checkpoint20.npz of g2p_en 2" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").is_file()
    with pytest.raises(ConversionError, match="Unknown file 'vocab'"):
        main(["--format", "g2p_en", str(path), str(tmp_path / "two"), "--file", f"vocab={path}"])
    assert not (tmp_path / "two").exists()
    for arguments, match in (
        (["--format", "g2p_en", str(path), "x", "--file", "vocab"], "expected NAME=PATH, got 'vocab'"),
        (["--format", "g2p_en", str(path), "x", "--file", "a=b", "--file", "a=c"], "given twice"),
        (["--format", "sockeye", str(path), "x"], "invalid choice"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert match in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["--format", "g2p_en", "--describe"])
    assert ended.value.code == 0
    assert "checkpoint20.npz" in capsys.readouterr().out


# g2p_en


def g2p_arrays(seed: int = 0, hidden: int = 6, width: int = 5) -> dict[str, np.ndarray]:
    """Under its names and with its numbers of letters and phones."""
    draw = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"enc_emb": (len(GRAPHEMES), width), "dec_emb": (len(PHONEMES), width)}
    for side in ("enc", "dec"):
        shapes |= {f"{side}_w_ih": (3 * hidden, width), f"{side}_w_hh": (3 * hidden, hidden)}
        shapes |= {f"{side}_b_ih": (3 * hidden,), f"{side}_b_hh": (3 * hidden,)}
    shapes |= {"fc_w": (len(PHONEMES), hidden), "fc_b": (len(PHONEMES),)}
    return {name: draw.normal(0, 0.8, shape).astype(np.float32) for name, shape in shapes.items()}


def write_g2p(path: Path, **changed: Any) -> Path:
    np.savez(path, **{name: value for name, value in {**g2p_arrays(), **changed}.items() if value is not None})
    return path


def tiny_g2p_converted() -> Converted:
    with tempfile.TemporaryDirectory() as folder:
        return convert("g2p_en", write_g2p(Path(folder) / "checkpoint20.npz"))


def plain_g2p(word: str, arrays: dict[str, np.ndarray]) -> list[str]:
    """`G2p.predict` in float64, from its code."""
    v = {name: value.astype(np.float64) for name, value in arrays.items()}
    letters = ["<pad>", "<unk>", "</s>", *string.ascii_lowercase]

    def step(side: str, x: np.ndarray, h: np.ndarray) -> np.ndarray:
        from_x = v[f"{side}_w_ih"] @ x + v[f"{side}_b_ih"]
        from_h = v[f"{side}_w_hh"] @ h + v[f"{side}_b_hh"]
        two = 2 * len(h)
        r, z = np.split(1 / (1 + np.exp(-from_x[:two] - from_h[:two])), 2)
        n = np.tanh(from_x[two:] + r * from_h[two:])
        return (1 - z) * n + z * h

    h = np.zeros(v["enc_w_hh"].shape[1])
    for letter in [*word, "</s>"]:
        h = step("enc", v["enc_emb"][letters.index(letter) if letter in letters[2:] else 1], h)
    phones, last = [], 2
    for _ in range(20):
        h = step("dec", v["dec_emb"][last], h)
        last = int((v["fc_w"] @ h + v["fc_b"]).argmax())
        if last == 3:
            break
        phones.append(PHONEMES[last])
    return phones


def phones_of(converted: Converted, words: list[str]) -> list[list[str]]:
    tokenizer, model = converted.tokenizer, converted.model()
    ids = model.generate(**tokenizer(words, return_tensors="pt", padding=True))
    rows = []
    for row in ids.tolist():
        tokens = tokenizer.convert_ids_to_tokens(row[1:])
        rows.append(tokens[: tokens.index("</s>")] if "</s>" in tokens else tokens)
    return rows


def test_g2p_is_the_original(tmp_path: Path) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choice(string.ascii_lowercase) for _ in range(draw.randint(1, 9))) for _ in range(60)]
    words += ["A", "o'clock", "caf\u00e9", "</s>", "", "a b"]
    for seed, end in ((0, 4), (1, 3)):
        arrays = g2p_arrays(seed)
        arrays["fc_b"][3] = end  # so that words end at several lengths, one of them the limit
        converted = convert("g2p_en", write_g2p(tmp_path / "checkpoint20.npz", **arrays))
        expected = [plain_g2p(word, arrays) for word in words]
        assert len({len(phones) for phones in expected}) > 2
        assert phones_of(converted, words) == expected


def test_g2p_tokenizer() -> None:
    tokenizer = tiny_g2p_converted().tokenizer
    assert tokenizer("abz?")["input_ids"] == [3, 4, 28, 1, 2]
    assert tokenizer(text_target="AA0 ZH")["input_ids"] == [4, 73, 3]
    assert tokenizer.decode([4, 73, 3], skip_special_tokens=True) == "AA0 ZH"
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 2, 3)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"fc_b": None}, r"arrays missing \['fc_b'\], unknown \[\]"),
        ({"more": np.zeros(2)}, r"unknown \['more'\]"),
        ({"enc_emb": np.zeros((30, 5), np.float32)}, "30 letters and 74 phones; g2p_en has 29 and 74"),
        ({"fc_b": np.array([{}], dtype=object)}, "no NumPy archive of plain arrays"),
    ],
)
def test_g2p_refuses(tmp_path: Path, changed: dict[str, Any], match: str) -> None:
    with pytest.raises(ConversionError, match=match):
        convert("g2p_en", write_g2p(tmp_path / "checkpoint20.npz", **changed))


def test_g2p_refuses_what_is_no_archive(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint20.npz"
    path.write_bytes(b"PK\x03\x04 not a zip archive")
    with pytest.raises(ConversionError, match="no NumPy archive"):
        convert("g2p_en", path)


def test_g2p_itself() -> None:
    """The published weights, where the package is installed (nothing of it is imported: that downloads data)."""
    spec = importlib.util.find_spec("g2p_en")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("g2p_en is not installed")
    path = Path(spec.submodule_search_locations[0]) / "checkpoint20.npz"
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    draw = random.Random(0)
    words = ["".join(draw.choice(string.ascii_lowercase) for _ in range(draw.randint(1, 12))) for _ in range(100)]
    words += ["activationist", "wikipedia", "google", "antidisestablishmentarianism"]
    assert phones_of(convert("g2p_en", path), words) == [plain_g2p(word, arrays) for word in words]


def test_never_is_never() -> None:
    assert torch.tensor([0.0, NEVER], dtype=torch.float16).softmax(0)[1] == 0
