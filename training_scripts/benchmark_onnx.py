"""Compare an exported model's speed with PyTorch's:

    OMP_NUM_THREADS=1 python training_scripts/benchmark_onnx.py outputs/mine outputs/mine_onnx words.txt \\
        --output benchmark.json

The folder of the export must hold the same model; a precision that is not in it is left out. Each measurement
generates for the same lines with the same search: PyTorch by generate() inside `model.packed()`, ONNX Runtime under
generate() (`RnnSeq2SeqOnnx`) and by the runner without torch (`RnnSeq2SeqRunner`), one after the other, over and over
in one process, so that what else the machine does comes to all alike. Times are of the process (all threads), texts to
texts, in milliseconds a line; ratios are medians of the rounds' own.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from benchmark import machine, median_ratio, rounds, timed
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, GenerationMixin, PreTrainedTokenizerBase

import hf_rnn_seq2seq  # noqa: F401  # registers the model with the Auto classes
from hf_rnn_seq2seq.onnx_model import RnnSeq2SeqOnnx
from hf_rnn_seq2seq.onnx_runner import ENCODER, PRECISIONS, RnnSeq2SeqRunner, file_name


def generate(
    model: GenerationMixin, tokenizer: PreTrainedTokenizerBase, batches: list[list[str]], num_beams: int
) -> None:
    for batch in batches:
        inputs = tokenizer(batch, padding=True, return_tensors="pt")
        tokenizer.batch_decode(model.generate(**inputs, num_beams=num_beams), skip_special_tokens=True)


def run(runner: RnnSeq2SeqRunner, batches: list[list[str]], num_beams: int) -> None:
    for batch in batches:
        runner(batch, num_beams=num_beams)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model_name_or_path")
    parser.add_argument("onnx_folder", type=Path)
    parser.add_argument("text_file", type=Path, help="Sources, a line each.")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--num_beams", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--lines", type=int, default=24, help="The file's first, but a whole batch at least.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="For each of the two libraries.")
    parser.add_argument("--output", type=Path, help="All times as JSON.")
    args = parser.parse_args(argv)

    torch.set_num_threads(args.threads)
    lines = [line for line in args.text_file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(lines) < max(args.lines, *args.batch_sizes):
        raise SystemExit(f"{args.text_file} has {len(lines)} lines, too few")
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    model = AutoModelForSeq2SeqLM.from_pretrained(args.model_name_or_path).eval()
    found = [name for name in PRECISIONS if (args.onnx_folder / file_name(ENCODER, name)).is_file()]
    exported = {name: RnnSeq2SeqOnnx.from_pretrained(args.onnx_folder, name, threads=args.threads) for name in found}
    runners = {name: RnnSeq2SeqRunner(args.onnx_folder, name, threads=args.threads) for name in found}

    records = []
    print("batch  beams  contestant              ms a line  times PyTorch's speed")
    for batch_size in args.batch_sizes:
        batches = [lines[i : i + batch_size] for i in range(0, max(args.lines, batch_size), batch_size)]
        count = sum(map(len, batches))
        for num_beams in args.num_beams:
            work = {"pytorch": functools.partial(generate, model, tokenizer, batches, num_beams)}
            for name in found:
                work[f"generate, {name}"] = functools.partial(generate, exported[name], tokenizer, batches, num_beams)
                work[f"runner, {name}"] = functools.partial(run, runners[name], batches, num_beams)
            with model.packed():
                times = rounds(
                    {name: functools.partial(timed, job, clock=time.process_time) for name, job in work.items()},
                    args.rounds,
                )
            for contestant, seconds in times.items():
                each = statistics.median(seconds) / count * 1000
                ratio = median_ratio(times["pytorch"], seconds)
                print(f"{batch_size:5}  {num_beams:5}  {contestant:22}  {each:9.2f}  {ratio:9.2f}", flush=True)
                records.append(
                    {
                        "batch_size": batch_size,
                        "num_beams": num_beams,
                        "contestant": contestant,
                        "milliseconds_per_line": each,
                        "speed_ratio": ratio,
                        "seconds": seconds,
                    }
                )
    if args.output is not None:
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        args.output.write_text(
            json.dumps({"machine": machine(args.threads), "settings": settings, "records": records}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
