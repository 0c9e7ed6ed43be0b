"""Speed of training and decoding beside other toolkits, on this machine, in one run.

    python training_scripts/benchmark.py train --opennmt_python ~/opennmt/bin/python
    python training_scripts/benchmark.py decode --opennmt_python ~/opennmt/bin/python --opennmt_model model.pt \\
        --source test.en
    python training_scripts/benchmark.py vocabulary --model outputs/multi30k_en_de --source test.en
    python training_scripts/benchmark.py scaling

Every toolkit is a process of its own that waits for its turn: they work one after another, round by round, so that
what else happens on the machine meets all alike. Printed are medians over the rounds, and ratios as medians of the
rounds' ratios; `--output` gets a JSON file with every figure, the machine and the versions. A peer without a Python
that has it is left out with a line that says so.

train: all get the same made-up batches, with the lengths of image captions, in groups of like length; input feeding,
one layer, dropout 0.2, Adam. Target tokens a second, with end of sequence, without padding. The data is ids: no
reading, no tokenizing. "as shipped" is torch's default precision; "medium" sets torch.set_float32_matmul_precision
for a peer, too; ours has what its Trainer would choose on this machine. The bare matrix products of a step, and these
with cross entropy over the vocabulary and Adam, take their turn as well: what no implementation of this step exceeds.

decode: a model that OpenNMT-py has trained, and the same converted to ours: the same weights and words; or, with
--model, one of ours in several precisions, and exports that ONNX Runtime computes under our generate(). Sentences a
second from text to text, and the share of sentences for which the output is the first one's; with --target how good
they are. The bare matrix products of the decoder's steps take their turn as well, in each precision: without another
way to the best words, no implementation exceeds them.

vocabulary: greedy search in float32 with --model's target vocabulary and with larger ones, which are filled up with
words that look like its own and are hardly ever chosen: by exact scores of all words, and of those alone that a rough
product leaves (hf_rnn_seq2seq/screening.py); inside packed(). Where no rough product is faster both are the same.

scaling: time of an update over source length, target length, batch, width and vocabulary, one at a time, with additive
attention and input feeding, and a plot.
"""

import argparse
import importlib.util
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

WORKERS = Path(__file__).parent / "benchmark_workers"
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
PEERS = {"opennmt": "OpenNMT-py", "joeynmt": "JoeyNMT"}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
DROPOUT = {"dropout": 0.2, "embedding_dropout": 0.2, "output_dropout": 0.2}


class Worker:
    """A toolkit's process. `worker.job(...)` does one job there and gives its result."""

    def __init__(self, python: str, toolkit: str, threads: int):
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        command = [python, str(WORKERS / f"{toolkit}_worker.py")]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            text=True,
        )

    def __getattr__(self, job: str) -> Callable[..., Any]:
        def ask(**arguments: Any) -> Any:
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            self.process.stdin.write(json.dumps({"job": job, **arguments}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
            answer = json.loads(line) if line else {"error": "the process ended"}
            if "error" in answer:
                raise RuntimeError(f"{self.process.args}: {job}: {answer['error']}")
            return answer["result"]

        return ask


def peers(options: argparse.Namespace) -> dict[str, Worker]:
    workers = {}
    for toolkit, name in PEERS.items():
        python = getattr(options, f"{toolkit}_python", None)
        if python is None:
            print(f"{name}: left out, no --{toolkit}_python")
        else:
            workers[toolkit] = Worker(python, toolkit, options.threads)
    return workers


def rounds(contestants: dict[str, Callable[[], float]], count: int) -> dict[str, list[float]]:
    """What each contestant measures in each round; one more round before them warms up."""
    measured: dict[str, list[float]] = {name: [] for name in contestants}
    for index in range(count + 1):
        for name, measure in contestants.items():
            figure = measure()
            if index:
                measured[name].append(figure)
    return measured


def timed(
    work: Callable[[], object], device: str = "cpu", clock: Callable[[], float] = time.perf_counter, repeats: int = 1
) -> float:
    """Seconds of one of `repeats`."""
    import torch

    if device != "cpu":
        torch.cuda.synchronize()
    start = clock()
    for _ in range(repeats):
        work()
    if device != "cpu":
        torch.cuda.synchronize()
    return (clock() - start) / repeats


def median_ratio(above: list[float], below: list[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def table(measured: dict[str, list[float]], unit: str, base: str) -> list[dict[str, Any]]:
    """Prints and returns median, range and ratio to `base`."""
    rows = []
    for name, figures in measured.items():
        ratio = median_ratio(figures, measured[base])
        rows.append({"name": name, "unit": unit, "median": statistics.median(figures), "all": figures, "ratio": ratio})
        low, high = min(figures), max(figures)
        print(f"{name:44} {statistics.median(figures):10.1f} {unit}  ({low:.1f} to {high:.1f})  {ratio:6.2f} x {base}")
    return rows


def captions(count: int, size: int, source_vocab: int, target_vocab: int, length: float) -> list[dict[str, Any]]:
    """Batches of rows of like length; both sides have some `length` tokens, normally distributed, as captions have."""
    draw = random.Random(0)
    lengths = sorted(max(4, round(draw.gauss(length, 0.31 * length))) for _ in range(count * size))
    batches = []
    for first in range(0, len(lengths), size):
        part = lengths[first : first + size]
        batches.append(
            {
                "source": [[draw.randrange(4, source_vocab) for _ in range(length)] for length in part],
                "target": [
                    [draw.randrange(4, target_vocab) for _ in range(max(2, length + draw.randint(-2, 2)))]
                    for length in part
                ],
            }
        )
    draw.shuffle(batches)
    return batches


def config(options: argparse.Namespace, **overrides: Any) -> dict[str, Any]:
    return (
        SPECIAL
        | DROPOUT
        | {
            "vocab_size": options.target_vocab,
            "source_vocab_size": options.source_vocab,
            "hidden_size": options.hidden,
            "embedding_size": options.embedding,
            "wiring_type": "input_feeding",
            **overrides,
        }
    )


def sizes_of(options: argparse.Namespace) -> dict[str, int]:
    """A peer's."""
    return {name: getattr(options, name) for name in ("source_vocab", "target_vocab", "hidden", "embedding")}


VARIANTS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, bf16": {"bf16": True},
    "ours, a gradient each step": {"plain": True},
    "ours, output_only": {"wiring_type": "output_only"},
    "ours, output_only, bf16": {"wiring_type": "output_only", "bf16": True},
}
LOADED: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, packed": {"packed": True},
    "ours, bf16, packed": {"dtype": "bfloat16", "packed": True},
    "ours, int8": {"int8": True},
    "ours, ONNX Runtime": {"onnx": "float32"},
    "ours, ONNX Runtime, int8": {"onnx": "int8"},
}
DECODING_LIMITS = {f"matrix products alone, {one}": one for one in ("float32", "bfloat16", "int8")}


def train(options: argparse.Namespace) -> list[dict[str, Any]]:
    ours, others = Worker(sys.executable, "our", options.threads), peers(options)
    vocabularies = options.source_vocab, options.target_vocab
    batches = captions(options.updates, options.batch_size, *vocabularies, options.length)
    tokens = sum(len(row) + 1 for batch in batches for row in batch["target"])
    sizes = sizes_of(options)
    precision_of_ours = ours.recommended(rows=options.batch_size, width=options.hidden)
    other = "highest" if precision_of_ours == "medium" else "medium"
    print(f'ours is at "{precision_of_ours}", as --float32_matmul_precision auto chooses here, where nothing is said')

    def speed(worker: Worker, name: str, precision: str) -> float:
        return tokens / worker.train(name=name, batches=batches, precision=precision)

    def limit(precision: str, parameters: int = 0, bf16: bool = False) -> float:
        call = {"batches": batches, "precision": precision, "parameters": parameters, "bf16": bf16}
        return tokens / ours.limit(**call, **sizes)

    rows = []
    for attention in options.attention:
        contestants: dict[str, Callable[[], float]] = {}
        for toolkit, worker in others.items():
            name = f"{toolkit} {attention}"
            worker.make(name=name, attention=attention, **sizes)
            for label, precision in (("as shipped", "highest"), ("medium", "medium")):
                contestants[f"{PEERS[toolkit]}, {label}"] = partial(speed, worker, name, precision)
        sizes_of_ours = {}
        for label, settings in VARIANTS.items():
            name = f"{label} {attention}"
            sizes_of_ours[label] = ours.make(name=name, **config(options, attention_type=attention, **settings))
            contestants[label] = partial(speed, ours, name, precision_of_ours)
        contestants[f"ours, {other}"] = partial(speed, ours, f"ours {attention}", other)
        for precision in ("highest", "medium"):
            contestants[f"matrix products alone, {precision}"] = partial(limit, precision)
        parameters = sizes_of_ours["ours"]
        contestants["products, cross entropy and Adam"] = partial(limit, precision_of_ours, parameters)
        contestants["matrix products alone, bf16"] = partial(limit, "highest", bf16=True)
        contestants["products, cross entropy and Adam, bf16"] = partial(limit, "highest", parameters, bf16=True)
        print(f"\ntraining, {attention} attention:")
        base = f"{PEERS['opennmt']}, as shipped" if "opennmt" in others else "ours"
        rows += [{"attention": attention, **row} for row in table(rounds(contestants, options.rounds), "tok/s", base)]
    return rows


def decode(options: argparse.Namespace) -> list[dict[str, Any]]:
    from hf_rnn_seq2seq.convert import convert

    peer_misses = options.opennmt_model is not None and options.opennmt_python is None
    if options.source is None or peer_misses or (options.model is None) == (options.opennmt_model is None):
        raise SystemExit("decode needs --source, and either --model or --opennmt_model with --opennmt_python.")
    ours = Worker(sys.executable, "our", options.threads)
    sentences = options.source.read_text(encoding="utf-8").splitlines()[: options.sentences]
    contestants: dict[str, Worker] = {}
    with tempfile.TemporaryDirectory() as folder:
        if options.opennmt_model is not None:
            peer = contestants["OpenNMT-py"] = peers(options)["opennmt"]
            peer.load(name="OpenNMT-py", checkpoint=str(options.opennmt_model))
            converted = convert("opennmt", options.opennmt_model)
            converted.model().save_pretrained(folder)
            converted.tokenizer.save_pretrained(folder)
        for label, settings in LOADED.items():
            missing = [one for one in ONNX_PACKAGES if "onnx" in settings and importlib.util.find_spec(one) is None]
            if missing:
                print(f"{label}: left out, {', '.join(missing)} not installed")
                continue
            contestants[label] = ours
            size = ours.load(name=label, folder=folder if options.model is None else str(options.model), **settings)
            print(f"{label}: {size / 1e6:.1f} MB of weights")
    base = next(iter(contestants))
    outputs: dict[str, list[str]] = {}

    def speed(label: str, some: list[str], batch_size: int, beams: int) -> float:
        result = contestants[label].decode(name=label, sentences=some, batch_size=batch_size, beams=beams)
        outputs[label] = result["outputs"]
        return len(some) / result["seconds"]

    def limit(precision: str, some: list[str], batch_size: int, beams: int) -> float:
        call = {"sentences": some, "batch_size": batch_size, "beams": beams, "precision": precision}
        return len(some) / ours.decoding_limit(name="ours", **call)

    rows = []
    for batch_size, count in ((1, max(len(sentences) // 5, 1)), (64, len(sentences))):
        for beams in (1, 5):
            some = sentences[:count]
            measures = {label: partial(speed, label, some, batch_size, beams) for label in contestants}
            for label, precision in DECODING_LIMITS.items():
                measures[label] = partial(limit, precision, some, batch_size, beams)
            print(f"\n{'greedy' if beams == 1 else f'beam {beams}'}, batches of {batch_size}:")
            for row in table(rounds(measures, options.rounds), "sentences/s", base):
                rows.append({"batch_size": batch_size, "beams": beams, **row})
                if row["name"] in DECODING_LIMITS:
                    continue
                found = outputs[row["name"]]
                rows[-1]["same_output"] = same = share_of_same(found, outputs[base])
                print(f"    {row['name']}: the same output for {same:.1%}{quality(found, options.target)}")
    return rows


def share_of_same(outputs: list[str], others: list[str]) -> float:
    return sum(a == b for a, b in zip(outputs, others, strict=True)) / len(outputs)


def vocabulary(options: argparse.Namespace) -> list[dict[str, Any]]:
    if options.source is None or options.model is None:
        raise SystemExit("vocabulary needs --model and --source.")
    ours = Worker(sys.executable, "our", options.threads)
    sentences = options.source.read_text(encoding="utf-8").splitlines()[: options.sentences]
    outputs: dict[bool, list[str]] = {}

    def speed(screens: bool, some: list[str], batch_size: int) -> float:
        result = ours.decode(name="model", sentences=some, batch_size=batch_size, beams=1, screens=screens)
        outputs[screens] = result["outputs"]
        return len(some) / result["seconds"]

    rows = []
    for times in (1, 4, 16):
        size = ours.load(name="model", folder=str(options.model), packed=True, times=times)
        for batch_size, some in ((1, sentences[: max(len(sentences) // 10, 1)]), (64, sentences)):
            print(f"\n{times} times the vocabulary, {size / 1e6:.0f} MB of weights, batches of {batch_size}:")
            contestants = {"all words": partial(speed, False, some, batch_size)}
            contestants["screened"] = partial(speed, True, some, batch_size)
            for row in table(rounds(contestants, options.rounds), "sentences/s", "all words"):
                rows.append({"times": times, "batch_size": batch_size, **row})
            same = share_of_same(outputs[False], outputs[True])
            print(f"    the same output for {same:.1%}")
            rows[-1]["same_output"] = same
    return rows


def quality(outputs: list[str], target: Path | None) -> str:
    """Of outputs beside the first references of a file: BLEU without tokenizing, and how many differ."""
    if target is None:
        return ""
    from sacrebleu.metrics import BLEU

    references = target.read_text(encoding="utf-8").splitlines()[: len(outputs)]
    bleu = BLEU(tokenize="none", force=True).corpus_score(outputs, [references]).score
    wrong = sum(a != b for a, b in zip(outputs, references, strict=True)) / len(outputs)
    return f"; BLEU {bleu:.2f}, {wrong:.2%} differ from the reference"


SCALES = {
    "source length": (10, 20, 50, 100, 200),
    "target length": (10, 20, 50, 100, 200),
    "batch": (4, 8, 16, 32, 64),
    "width": (64, 128, 256, 512, 1024),
    "vocabulary": (1_000, 4_000, 16_000, 64_000),
}


def scaling(options: argparse.Namespace) -> list[dict[str, Any]]:
    ours, others = Worker(sys.executable, "our", options.threads), peers(options)
    draw = random.Random(0)
    middle = {"source length": 20, "target length": 20, "batch": 16, "width": 256, "vocabulary": 4_000}
    rows = []
    for axis, value in ((axis, value) for axis, values in SCALES.items() for value in values):
        at = middle | {axis: value}
        widths = {"hidden": at["width"], "embedding": at["width"] // 2}
        sizes = argparse.Namespace(source_vocab=4_000, target_vocab=at["vocabulary"], **widths)
        ours.make(name="model", **config(sizes, attention_type="additive"))
        for worker in others.values():
            worker.make(name="model", attention="additive", **sizes_of(sizes))
        lengths = {"source": (at["source length"], 4_000), "target": (at["target length"] - 1, at["vocabulary"])}
        batch = {
            side: [[draw.randrange(4, size) for _ in range(length)] for _ in range(at["batch"])]
            for side, (length, size) in lengths.items()
        }
        updates = {"name": "model", "batches": [batch] * 3, "precision": "highest"}
        workers = {"ours": ours, **{PEERS[toolkit]: worker for toolkit, worker in others.items()}}
        measured = rounds({name: partial(worker.train, **updates) for name, worker in workers.items()}, 3)
        seconds = {name: statistics.median(figures) / 3 for name, figures in measured.items()}
        rows.append({"axis": axis, "value": value, "seconds": seconds})
        figures = "  ".join(f"{name} {one * 1e3:8.1f}" for name, one in seconds.items())
        print(f"{axis:14} {value:7}  ms an update: {figures}", flush=True)
    return rows


def plot_scaling(rows: Iterable[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(SCALES), figsize=(3 * len(SCALES), 3), sharey=True, layout="constrained")
    for axis, name in zip(axes, SCALES, strict=True):
        points = [(row["value"], row["seconds"]) for row in rows if row["axis"] == name]
        for contestant in points[0][1]:
            milliseconds = [seconds[contestant] * 1e3 for _, seconds in points]
            axis.loglog([value for value, _ in points], milliseconds, marker="o", label=contestant)
        axis.set_xticks([value for value, _ in points], [f"{value:,}" for value, _ in points], fontsize="small")
        axis.minorticks_off()
        axis.set_xlabel(name)
        axis.grid(which="both", alpha=0.3)
    axes[0].set_ylabel("ms an update")
    axes[0].legend()
    figure.savefig(path)


def machine(threads: int, device: str = "cpu") -> dict[str, Any]:
    """What figures depend on besides the work, for the JSON file."""
    import torch
    import transformers

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        found = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = found[0].split(":", 1)[1].strip() if found else cpu
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    gpu = {} if device == "cpu" else {"gpu": torch.cuda.get_device_name(device)}
    return {**gpu, "cpu": cpu, "threads": threads, **versions}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "decode", "vocabulary", "scaling"))
    parser.add_argument("--opennmt_python", help="a Python that has OpenNMT-py 3")
    parser.add_argument("--joeynmt_python", help="a Python that has JoeyNMT 2")
    parser.add_argument("--opennmt_model", type=Path, help="a checkpoint that OpenNMT-py has saved, for decode")
    parser.add_argument("--model", type=Path, help="a folder of this package's instead, decoded in several precisions")
    parser.add_argument("--source", type=Path, help="sentences to decode, one a line")
    parser.add_argument(
        "--target", type=Path, help="their references; BLEU and the share of differing outputs are printed"
    )
    parser.add_argument("--sentences", type=int, default=500, help="how many of them; a fifth at batch 1")
    parser.add_argument("--attention", nargs="+", default=["additive", "general"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=10, help="a round")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--length", type=float, default=12.2, help="of sequences, for train: their mean")
    parser.add_argument("--source_vocab", type=int, default=5921)
    parser.add_argument("--target_vocab", type=int, default=7859)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--embedding", type=int, default=256)
    parser.add_argument("--output", type=Path, help="a JSON file; scaling also puts a plot beside it")
    options = parser.parse_args(argv)
    rows = {"train": train, "decode": decode, "vocabulary": vocabulary, "scaling": scaling}[options.what](options)
    if options.output is not None:
        record = {"machine": machine(options.threads), "what": options.what, "rows": rows}
        options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        if options.what == "scaling":
            plot_scaling(rows, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
