"""run_generate.py on a tiny model: the same outputs as generate() line by line, in order, and clear refusals."""

import gzip
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from decoding import pack_at_once
from torch.nn import functional as F
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from hf_rnn_seq2seq import RnnSeq2SeqConfig, RnnSeq2SeqForConditionalGeneration, RnnSeq2SeqTokenizer, step_products
from hf_rnn_seq2seq.ensemble import RnnSeq2SeqEnsemble
from hf_rnn_seq2seq.tokenizer_training import train_tokenizer
from hf_rnn_seq2seq.unknown_words import replace_unknown_words, tokenize_with_words

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
    # Seeds that give outputs of many lengths.
    return save(folder, tokenizer, sizes, {"pair": 4, "shared": 2}[request.param])


def save(folder: Path, tokenizer, sizes: dict[str, int], seed: int, unknown: float = -100.0, **setting) -> Path:
    """Saves a model with random weights; `unknown` is the bias of the unknown word."""
    torch.manual_seed(seed)
    model = RnnSeq2SeqForConditionalGeneration(
        RnnSeq2SeqConfig(
            **sizes,
            hidden_size=16,
            embedding_size=8,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.bos_token_id,
            **setting,
        )
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-1, 1)
        bias = model.get_output_embeddings().bias
        bias[tokenizer.pad_token_id] = bias[tokenizer.bos_token_id] = -100
        bias[tokenizer.unk_token_id] = unknown
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def other_folder(model_folder: Path, tmp_path_factory) -> Path:
    """A model of another architecture for the same tokenizer, which often generates the unknown word."""
    model, tokenizer = load(model_folder)
    sizes = {"vocab_size": model.config.vocab_size, "source_vocab_size": model.config.source_vocab_size}
    setting = {"cell_type": "gru", "attention_type": "general", "wiring_type": "output_only"}
    return save(tmp_path_factory.mktemp("other"), tokenizer, sizes, seed=1, unknown=3.0, **setting)


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


def test_several_models_are_an_ensemble(model_folder, other_folder, tmp_path, run) -> None:
    (one, tokenizer), (other, _) = load(model_folder), load(other_folder)
    both = ["--model_name_or_path", str(model_folder), str(other_folder), "--num_beams=3"]
    results = []
    for average in ("probabilities", "log_probabilities"):
        ensemble = RnnSeq2SeqEnsemble([one, other], average)
        expected = []
        for line in LINES:
            inputs = tokenizer(line, return_tensors="pt")
            text = tokenizer.batch_decode(
                ensemble.generate(**inputs, num_beams=3, max_new_tokens=9), skip_special_tokens=True
            )
            expected += text if line.strip() else [""]
        found = run(LINES, *both, f"--ensemble_average={average}")
        assert found == expected
        results.append(found)
    assert run(LINES, *both) == results[0] != results[1]
    assert (
        len({tuple(run(LINES, "--num_beams=3")), tuple(run(LINES, *both[:1], both[2], both[3])), *map(tuple, results)})
        == 4
    )

    ensemble.save_pretrained(tmp_path / "ensemble")
    tokenizer.save_pretrained(tmp_path / "ensemble")
    assert run(LINES, "--model_name_or_path", str(tmp_path / "ensemble"), "--num_beams=3") == results[1]
    (record,) = run(["cat"], "--model_name_or_path", str(tmp_path / "ensemble"), "--output_format=jsonl")
    inputs = tokenizer("cat", return_tensors="pt")
    sequence = ensemble.generate(**inputs, max_new_tokens=9)[0, 1:].tolist()
    by_definition = log_probability(ensemble, inputs, sequence)
    assert json.loads(record)["predictions"][0]["log_probability"] == pytest.approx(by_definition, rel=1e-5)


def test_ids_alone_come_through_our_own_loops(model_folder, run, monkeypatch) -> None:
    """All lines' matrices are packed once."""
    pack_at_once(monkeypatch)
    monkeypatch.setattr(step_products, "can_be_packed", lambda weight: True)
    monkeypatch.setattr(step_products, "packed_product", lambda x, packed, bias: F.linear(x, packed, bias))
    packings: list[int] = []

    def pack(weight: torch.Tensor) -> torch.Tensor:
        packings.append(weight.numel())
        return weight

    monkeypatch.setattr(step_products, "pack", pack)
    expected = run(LINES, "--batch_size=100")
    once = len(packings)
    assert 0 < once < 10
    assert run(LINES, "--batch_size=1") == expected
    assert len(packings) == 2 * once


@pytest.mark.parametrize("beams", [1, 3])
def test_unknown_words_are_replaced(other_folder, tmp_path, run, beams: int) -> None:
    model, tokenizer = load(other_folder)
    lines = [*LINES, "Ø", "aØbØ"]
    dictionary = {"Ø": "O", "a": "alpha"}
    (tmp_path / "dictionary.tsv").write_text("Ø\tO\na\talpha\n", encoding="utf-8")
    plain, translated = [], []
    for line in lines:
        inputs, words = tokenize_with_words(tokenizer, [line], return_tensors="pt")
        options = {"num_beams": beams, "num_return_sequences": beams, "max_new_tokens": 9, "output_attentions": True}
        outputs = model.generate(**inputs, **options, return_dict_in_generate=True)
        is_text = bool(line.strip())
        plain += replace_unknown_words(model, outputs, tokenizer, words) if is_text else [""] * beams
        translated += replace_unknown_words(model, outputs, tokenizer, words, dictionary) if is_text else [""] * beams
    flags = ["--model_name_or_path", str(other_folder), f"--num_beams={beams}", f"--num_return_sequences={beams}"]
    assert run(lines, *flags, "--replace_unknown", "--batch_size=3") == plain
    dictionary_flag = f"--dictionary={tmp_path / 'dictionary.tsv'}"
    assert run(lines, *flags, "--replace_unknown", dictionary_flag) == translated
    assert len({tuple(run(lines, *flags)), tuple(plain), tuple(translated)}) == 3
    scored = [json.loads(line) for line in run(lines, *flags, "--replace_unknown", "--output_format=jsonl")]
    assert [candidate["text"] for record in scored for candidate in record["predictions"]] == plain


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        (
            ["--gnmt_length_penalty=0.8", "--coverage_penalty=0.4"],
            {"gnmt_length_penalty": 0.8, "coverage_penalty": 0.4},
        ),
        (["--coverage_penalty=2.0", "--length_penalty=0.5"], {"coverage_penalty": 2.0, "length_penalty": 0.5}),
        (["--num_beam_groups=2", "--diversity_penalty=3"], {"num_beam_groups": 2, "diversity_penalty": 3.0}),
        (["--force_words", "WORD"], {"force_words_ids": []}),
    ],
)
def test_options_of_beam_search(model_folder, run, flags: list[str], options: dict) -> None:
    model, tokenizer = load(model_folder)
    if "force_words_ids" in options:
        word = "tʃ" if isinstance(tokenizer, RnnSeq2SeqTokenizer) else "b"
        ids = tokenizer(text_target=word, add_special_tokens=False).input_ids
        flags, options = ["--force_words", word], {"force_words_ids": [ids]}
    flags = [*flags, "--num_beams=4", "--num_return_sequences=4", "--output_format=jsonl"]
    records = [json.loads(line) for line in run(LINES, *flags, "--batch_size=3")]
    plain = [json.loads(line) for line in run(LINES, *flags[-3:])]
    assert records != plain
    for record in records:
        if not record["source"].strip():
            continue
        result = model.generate(
            **tokenizer(record["source"], return_tensors="pt"),
            num_beams=4,
            num_return_sequences=4,
            max_new_tokens=9,
            output_scores=True,
            return_dict_in_generate=True,
            **options,
        )
        texts = tokenizer.batch_decode(result.sequences, skip_special_tokens=True)
        assert [prediction["text"] for prediction in record["predictions"]] == texts
        if "num_beam_groups" not in options:
            scores = [prediction["score"] for prediction in record["predictions"]]
            assert scores == pytest.approx(result.sequences_scores.tolist(), rel=1e-4)


def test_the_length_penalty_given_now_replaces_the_saved_one() -> None:
    from transformers import GenerationConfig

    namespace = runpy.run_path(str(SCRIPT))
    args = namespace["GenerateArguments"](model_name_or_path=["x"], num_beams=2, gnmt_length_penalty=0.6)
    config = namespace["make_generation_config"](args, GenerationConfig(length_penalty=2.0))
    assert (config.length_penalty, config.gnmt_length_penalty) == (1.0, 0.6)
    args = namespace["GenerateArguments"](model_name_or_path=["x"], num_beams=2, length_penalty=0.5)
    config = namespace["make_generation_config"](args, config)
    assert (config.length_penalty, config.gnmt_length_penalty) == (0.5, None)


def test_a_model_that_copies_gives_words_outside_its_vocabulary_back(tmp_path: Path, run) -> None:
    source, target = train_tokenizer(["a b c"], "symbols"), train_tokenizer(["x y"], "symbols")
    tokenizer = RnnSeq2SeqTokenizer(source, target, copies_source=True)
    sizes = {"vocab_size": tokenizer.target_vocab_size, "source_vocab_size": tokenizer.source_vocab_size}
    folder = save(tmp_path / "copies", tokenizer, sizes, seed=0, head_type="pointer_generator")
    model, tokenizer = load(folder)
    lines, expected = ["a Zoë b", "c", "b Ödön a Zoë"], []
    for line in lines:
        sequences = model.generate(**tokenizer(line, return_tensors="pt"), max_new_tokens=9, num_beams=2)
        expected += tokenizer.batch_decode(sequences, skip_special_tokens=True, source_texts=[line])
    assert run(lines, "--model_name_or_path", str(folder), "--num_beams=2") == expected
    assert "Zoë" in " ".join(expected)
    with pytest.raises(SystemExit, match="--replace_unknown: this model"):
        run(lines, "--model_name_or_path", str(folder), "--replace_unknown")


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
    args = namespace["GenerateArguments"](model_name_or_path=["x"])
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
        (["--gnmt_length_penalty=0.5"], "--gnmt_length_penalty 0.5 needs --num_beams greater than 1"),
        (["--coverage_penalty=0.5"], "--coverage_penalty 0.5 needs --num_beams greater than 1"),
        (["--force_words=cat"], "--force_words cat needs --num_beams greater than 1"),
        (["--num_beams=2", "--force_words", "ж"], "--force_words ж: not in the model's target vocabulary"),
        (["--num_beams=2", "--gnmt_length_penalty=1", "--length_penalty=2"], "exclude each other"),
        (["--num_beams=3", "--num_beam_groups=2", "--diversity_penalty=1"], "should be divisible by"),
        (["--num_beams=4", "--num_beam_groups=2"], "`diversity_penalty` should be greater than"),
        (["--dictionary=x.tsv"], "--dictionary x.tsv needs --replace_unknown"),
        (["--replace_unknown", "--dictionary=/no/such"], "--dictionary: [Errno 2] No such file"),
        (["--ensemble_average=probabilities"], "--ensemble_average probabilities needs several models"),
        (["--do_sample", "--temperature=-1"], "--temperature -1.0: must be greater than 0"),
        (["--do_sample", "--top_p=1.5"], "--top_p 1.5: must be greater than 0 and at most 1"),
        (["--generation_options", "early_stopping=perhaps"], "generation options: `early_stopping`"),
        (["--generation_options", "no_such=1"], "--generation_options no_such=1: must be name=value"),
        (["--generation_options", "min_length"], "--generation_options min_length: must be name=value"),
        (["--num_beams=2", "--generation_options", "num_beams=3"], "num_beams is given twice"),
        (["--generation_options", "opennmt_length_penalty=1"], "opennmt_length_penalty 1 needs --num_beams greater"),
        (["--num_beams=2", "--generation_options", "opennmt_length_penalty=x"], "opennmt_length_penalty"),
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


def test_models_that_do_not_go_together_are_refused(model_folder: Path, tmp_path: Path, run) -> None:
    tokenizer = train_tokenizer(["completely different"], "char")
    other = str(save(tmp_path / "other", tokenizer, {"vocab_size": len(tokenizer)}, seed=0))
    with pytest.raises(SystemExit, match="is another one than that of"):
        run(["cat"], "--model_name_or_path", str(model_folder), other)
    setting = {"attention_type": "none", "wiring_type": "output_only"}
    deaf = str(save(tmp_path / "deaf", tokenizer, {"vocab_size": len(tokenizer)}, seed=0, **setting))
    for flags in (["--replace_unknown"], ["--coverage_penalty=1", "--num_beams=2"]):
        with pytest.raises(SystemExit, match=r"needs a recurrent model with attention"):
            run(["cat"], "--model_name_or_path", deaf, *flags)
