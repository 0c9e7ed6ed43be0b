"""What torch.compile costs and gives: time to the first step, and speed beside the same model in eager mode.

    python training_scripts/benchmark_compile.py --output compile.json

and on a GPU, or to try the script out:

    python training_scripts/benchmark_compile.py --device cuda --dtype bfloat16 --width 1024
    python training_scripts/benchmark_compile.py --batch_size 2 --length 5 --vocab 50 --width 16 --rounds 2

Work is forward and backward of one batch without an optimizer, and decoding with a cache, a step a token; LSTMs,
additive attention. Sequences all have `--length` tokens. The first step is timed by the clock, with torch's caches of
compiled code off, and again at another batch size and other lengths, which compiles once more, and at third ones,
which does not. Then contestants take turns, round by round, on a CPU timed by what their process used; printed are
medians and ratios.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from benchmark import machine, median_ratio, rounds, timed
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from hf_rnn_seq2seq import RnnSeq2SeqConfig, RnnSeq2SeqForConditionalGeneration

Batch = dict[str, torch.Tensor]


def random_batch(rows: int, source: int, target: int, vocab: int, device: str) -> Batch:
    ids = torch.randint(4, vocab, (rows, source), device=device)
    labels = torch.randint(4, vocab, (rows, target), device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def train(model: nn.Module, batch: Batch) -> None:
    model(**batch, skip_logits=True).loss.backward()
    model.zero_grad()


@torch.no_grad()
def decode(model: nn.Module, batch: Batch, plain: RnnSeq2SeqForConditionalGeneration, tokens: int) -> None:
    """`tokens` steps behind a plain encoder."""
    encoded = plain.get_encoder()(batch["input_ids"], batch["attention_mask"])
    cache, ids = None, batch["input_ids"][:, :1]
    for _ in (None,) * tokens:
        output = model(encoder_outputs=encoded, decoder_input_ids=ids, past_key_values=cache, use_cache=True)
        cache, ids = output.past_key_values, output.logits.argmax(-1)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--length", type=int, default=14, help="of source and target, in tokens")
    parser.add_argument("--vocab", type=int, default=7859)
    parser.add_argument("--width", type=int, default=512, help="of the LSTMs; embeddings are half as wide")
    parser.add_argument("--wirings", nargs="+", default=["output_only", "input_feeding"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(argv)
    device, rows, length = options.device, options.batch_size, options.length
    torch.set_num_threads(options.threads)
    torch._inductor.config.force_disable_caches = True
    make = partial(random_batch, vocab=options.vocab, device=device)
    # The batch that is timed comes last. A length or batch size that changes for the first time compiles once more.
    batches = [
        make(rows, length, length),
        make(rows + 1, length + 2, length + 3),
        make(rows + 2, length + 1, length + 7),
    ]
    where = machine(options.threads, device)
    print(", ".join(f"{name} {value}" for name, value in where.items()))

    figures: dict[str, dict[str, float]] = {}
    for wiring in options.wirings:
        torch.manual_seed(0)
        torch.compiler.reset()
        config = RnnSeq2SeqConfig(
            vocab_size=options.vocab, hidden_size=options.width, embedding_size=options.width // 2,
            attention_type="additive", wiring_type=wiring,
        )  # fmt: skip
        model = RnnSeq2SeqForConditionalGeneration(config).to(device, getattr(torch, options.dtype)).train()
        for kind in ("training", "decoding"):
            graphs = CompileCounterWithBackend("inductor")
            compiled = torch.compile(model, fullgraph=True, backend=graphs)

            job = train if kind == "training" else partial(decode, plain=model, tokens=length)
            model.train(kind == "training")
            name = f"{wiring} {kind}"
            found: dict[str, float] = {}
            for index, batch in enumerate(batches):
                found[f"step_{index}_seconds"] = timed(partial(job, compiled, batch=batch), device, time.perf_counter)
                found[f"step_{index}_graphs"] = graphs.frame_count
            clock = time.process_time if device == "cpu" else time.perf_counter
            contestants = {
                contestant: partial(timed, partial(job, module, batch=batches[0]), device, clock)
                for contestant, module in (("eager", model), ("compiled", compiled))
            }
            seconds = rounds(contestants, options.rounds)
            found |= {contestant: statistics.median(all_seconds) for contestant, all_seconds in seconds.items()}
            found["ratio"] = median_ratio(seconds["eager"], seconds["compiled"])
            figures[name] = found
            first = ", ".join(f"{found[f'step_{i}_seconds']:.1f} s ({found[f'step_{i}_graphs']})" for i in range(3))
            print(f"{name:24} first steps at three sizes (graphs so far): {first}")
            print(
                f"{'':24} then eager {found['eager'] * 1e3:.1f} ms, compiled {found['compiled'] * 1e3:.1f} ms: "
                f"{found['ratio']:.2f} x"
            )
    if options.output is not None:
        record = {"machine": where, "options": {**vars(options), "output": None}}
        options.output.write_text(json.dumps(record | {"figures": figures}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
