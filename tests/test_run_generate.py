"""run_generate.py on a tiny model: the same outputs as generate() line by line, in order, and clear refusals."""

import gzip
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from hf_rnn_seq2seq import RnnSeq2SeqConfig, RnnSeq2SeqForConditionalGeneration, RnnSeq2SeqTokenizer
from hf_rnn_seq2seq.tokenizer_training import train_tokenizer

SCRIPT = Path(__file__).parents[1] / "training_scripts" / "run_generate.py"
LINES = ["cat", "", "a", "한국", "tactac cat", "   ", "catcatcat", "b"]


@pytest.fixture(scope="module", params=["pair", "shared"])
def model_folder(request, tmp_path_factory) -> Path:
    """A saved model with random weights, large enough ones that outputs depend on the source and often end."""
    folder = tmp_path_factory.mktemp("model")
    source = train_tokenizer(LINES, "char")
    if request.param == "pair":
        target = train_tokenizer(["K AE T B AH tʃ 한 x y z"], "symbols")
        tokenizer = RnnSeq2SeqTokenizer(source, target)
        sizes = {"source_vocab_size": tokenizer.source_vocab_size, "vocab_size": tokenizer.target_vocab_size}
    else:
        tokenizer, sizes = source, {"vocab_size": len(source)}
    torch.manual_seed({"pair": 4, "shared": 2}[request.param])  # seeds that give outputs of many lengths
    model = RnnSeq2SeqForConditionalGeneration(
        RnnSeq2SeqConfig(
            **sizes,
            hidden_size=16,
            embedding_size=8,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.bos_token_id,
        )
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-1, 1)
        bias = model.get_output_embeddings().bias
        bias[tokenizer.pad_token_id] = bias[tokenizer.bos_token_id] = bias[tokenizer.unk_token_id] = -100
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run(model_folder: Path, tmp_path: Path, monkeypatch):
    """Runs the script in this process on lines of text; returns the output's lines."""

    def run(lines: list[str], *flags: str) -> list[str]:
        source, output = tmp_path / "source.txt", tmp_path / "output.txt"
        source.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        main(monkeypatch, model_folder, "--input_file", str(source), "--output_file", str(output), *flags)
        return output.read_text(encoding="utf-8").split("\n")[:-1]

    return run


def main(monkeypatch, folder: Path, *flags: str) -> None:
    monkeypatch.setattr(
        sys,
        "argv",
        [str(SCRIPT), "--model_name_or_path", str(folder), "--device", "cpu", "--max_new_tokens=9", *flags],
    )
    runpy.run_path(str(SCRIPT), run_name="__main__")


def load(folder: Path):
    return AutoModelForSeq2SeqLM.from_pretrained(folder, dtype="auto").eval(), AutoTokenizer.from_pretrained(folder)


def log_probability(model, inputs, ids: list[int]) -> float:
    """Sum of log-probabilities of `ids`, found step by step from the definition."""
    total, history = 0.0, [model.config.decoder_start_token_id]
    for token in ids:
        with torch.no_grad():
            logits = model(**inputs, decoder_input_ids=torch.tensor([history])).logits[0, -1]
        total += float(logits.log_softmax(-1)[token])
        history.append(token)
    return total


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ([], {}),
        (["--num_beams", "3"], {"num_beams": 3}),
        (
            ["--num_beams=4", "--num_return_sequences=3", "--length_penalty=0.3"],
            {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.3},
        ),
        (
            ["--generation_options", "repetition_penalty=2.5", "no_repeat_ngram_size=1"],
            {"repetition_penalty": 2.5, "no_repeat_ngram_size": 1},
        ),
    ],
)
def test_each_line_gives_what_generate_gives_for_it_alone(model_folder, run, flags, options) -> None:
    model, tokenizer = load(model_folder)
    expected = []
    for line in LINES:
        outputs = [""] * options.get("num_return_sequences", 1)
        if line.strip():
            sequences = model.generate(**tokenizer(line, return_tensors="pt"), max_new_tokens=9, **options)
            outputs = tokenizer.batch_decode(sequences, skip_special_tokens=True)
        expected += outputs
    assert len(set(expected)) > 3  # or the order would go untested
    for sizes in (["--batch_size=2", "--chunk_size=3"], ["--batch_size=100"]):
        assert run(LINES, *flags, *sizes) == expected


def test_scores_are_log_probabilities_by_definition_and_rank_as_beam_search_does(model_folder, run) -> None:
    model, tokenizer = load(model_folder)
    flags = ["--num_beams=4", "--num_return_sequences=4", "--length_penalty=0.5", "--output_format=jsonl"]
    records = [json.loads(line) for line in run(LINES, *flags, "--batch_size=3")]
    assert [record["source"] for record in records] == LINES
    lengths = set()
    for record in records:
        if not record["source"].strip():
            assert record["predictions"] == [{"text": "", "score": None, "log_probability": None}] * 4
            continue
        inputs = tokenizer(record["source"], return_tensors="pt")
        result = model.generate(
            **inputs,
            num_beams=4,
            num_return_sequences=4,
            length_penalty=0.5,
            max_new_tokens=9,
            output_scores=True,
            return_dict_in_generate=True,
        )
        scores = [prediction["score"] for prediction in record["predictions"]]
        assert scores == pytest.approx(result.sequences_scores.tolist(), rel=1e-5)
        assert scores == sorted(scores, reverse=True)
        for prediction, sequence in zip(record["predictions"], result.sequences[:, 1:].tolist(), strict=True):
            end = sequence.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in sequence else len(sequence)
            lengths.add(end)
            by_definition = log_probability(model, inputs, sequence[:end])
            assert prediction["log_probability"] == pytest.approx(by_definition, rel=1e-5)
    assert len(lengths) > 2
    assert 9 in lengths  # some without an end, some with


def test_the_score_of_a_text_cut_at_a_stop_string_leaves_padding_out(run) -> None:
    lines = [line for line in LINES if line.strip()]
    plain = run(lines)
    stop = plain[0].split()[0] if " " in plain[0] else plain[0][0]
    flags = ["--generation_options", f'stop_strings=["{stop}"]', "--output_format=jsonl"]
    together = [json.loads(line) for line in run(lines, *flags)]
    assert [record["predictions"][0]["text"] for record in together] != plain
    for line, record in zip(lines, together, strict=True):  # alone, nothing is padded
        assert json.loads(run([line], *flags)[0])["predictions"][0]["score"] == pytest.approx(
            record["predictions"][0]["score"], rel=1e-5
        )


def test_sampling_is_seeded_and_its_options_count(run) -> None:
    flags = ["--do_sample", "--num_return_sequences=2", "--temperature=3.0"]
    first = run(LINES, *flags)
    assert len(first) == 2 * len(LINES)
    assert first == run(LINES, *flags)
    assert first != run(LINES, *flags, "--seed=7")
    greedy = [line for line in run(LINES) for _ in range(2)]
    assert first != greedy
    assert run(LINES, *flags, "--top_k=1") == greedy
    assert run(LINES, *flags, "--top_p=1e-9") == greedy


def test_without_a_limit_of_its_own_the_model_may_write_past_twenty_tokens(model_folder, run) -> None:
    _, tokenizer = load(model_folder)
    (text,) = run(
        ["cat"], "--max_new_tokens=40", "--generation_options", f"suppress_tokens=[{tokenizer.eos_token_id}]"
    )
    assert len(getattr(tokenizer, "target_tokenizer", tokenizer)(text).input_ids) > 30
    # main() always names a limit, so this one asks the function.
    namespace = runpy.run_path(str(SCRIPT))
    args = namespace["GenerateArguments"](model_name_or_path="x")
    from transformers import GenerationConfig

    assert namespace["make_generation_config"](args, GenerationConfig()).max_new_tokens == 256
    assert namespace["make_generation_config"](args, GenerationConfig(max_length=70)).max_new_tokens is None
    args.max_new_tokens = 5
    assert namespace["make_generation_config"](args, GenerationConfig(max_length=70)).max_length is None


def test_standard_input_to_standard_output(model_folder: Path, run) -> None:
    expected = run(["cat\rcat", *LINES])
    source = "\ufeff" + "\r\n".join(["cat\rcat", *LINES])  # no line end after the last, a lone \r within the first
    result = subprocess.run(
        [sys.executable, SCRIPT, "--model_name_or_path", model_folder, "--device=cpu", "--max_new_tokens=9"],
        input=source.encode(),
        capture_output=True,
        check=True,
        env={"PYTHONIOENCODING": "ascii", "HF_HUB_OFFLINE": "1", "PATH": "", "OMP_NUM_THREADS": "1"},
    )
    assert result.stdout.decode("utf-8").split("\n") == [*expected, ""]
    assert b"it/s" not in result.stderr  # no progress bar where nobody looks
    assert b"line" not in result.stderr


def test_gzip_and_an_empty_file(model_folder: Path, tmp_path: Path, monkeypatch, run) -> None:
    expected = run(LINES)
    output = tmp_path / "output.txt"
    for text, lines in (("\n".join(LINES), expected), ("", [])):
        with gzip.open(tmp_path / "source.gz", "wt", encoding="utf-8") as file:
            file.write(text)
        main(monkeypatch, model_folder, "--input_file", str(tmp_path / "source.gz"), "--output_file", str(output))
        assert output.read_text(encoding="utf-8").splitlines() == lines


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_return_sequences=3", "--num_beams=2"], "--num_return_sequences 3 needs --num_beams 3 or more"),
        (["--num_return_sequences=2"], "or --do_sample"),
        (["--temperature=0.5"], "--temperature 0.5 needs --do_sample"),
        (["--top_k=5"], "--top_k 5 needs --do_sample"),
        (["--length_penalty=0.5"], "--length_penalty 0.5 needs --num_beams greater than 1"),
        (["--do_sample", "--temperature=-1"], "--temperature -1.0: must be greater than 0"),
        (["--do_sample", "--top_p=1.5"], "--top_p 1.5: must be greater than 0 and at most 1"),
        (["--generation_options", "early_stopping=perhaps"], "generation options: `early_stopping`"),
        (["--generation_options", "no_such=1"], "--generation_options no_such=1: must be name=value"),
        (["--generation_options", "min_length"], "--generation_options min_length: must be name=value"),
        (["--num_beams=2", "--generation_options", "num_beams=3"], "num_beams is given twice"),
        (["--batch_size=0"], "--batch_size 0: must be at least 1"),
        (["--num_beams=-1"], "--num_beams -1: must be at least 1"),
        (["--output_file=/no/such/folder/x"], "--output_file /no/such/folder/x: its folder doesn't exist"),
    ],
)
def test_wrong_options_are_refused(run, flags: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as refusal:
        run(["cat"], *flags)
    assert message in str(refusal.value)


def test_wrong_files_are_refused(model_folder: Path, tmp_path: Path, monkeypatch) -> None:
    def refusal(path: Path, output: Path = tmp_path / "output.txt", folder: Path = model_folder) -> str:
        with pytest.raises(SystemExit) as error:
            main(monkeypatch, folder, "--input_file", str(path), "--output_file", str(output))
        return str(error.value)

    assert refusal(tmp_path / "missing.txt") == f"--input_file {tmp_path / 'missing.txt'}: no such file"
    latin = tmp_path / "latin.txt"
    latin.write_bytes("cat\ncafé\n".encode("latin-1"))
    assert f"{latin}, line 2: not UTF-8" in refusal(latin)
    assert "would be overwritten" in refusal(latin, output=latin)
    no_gzip = tmp_path / "cat.gz"
    no_gzip.write_text("cat\n")
    assert "not a whole gzip file" in refusal(no_gzip)
    no_gzip.write_bytes(gzip.compress(b"cat\n" * 100)[:-6])
    assert "not a whole gzip file" in refusal(no_gzip)
    latin.write_text("cat\n")
    assert "--model_name_or_path" in refusal(latin, folder=tmp_path)
