"""Speed on one GPU: GNMT v2's four layers of 1,024 in bfloat16, as NVIDIA published it, and wirings beside each other.

    python training_scripts/benchmark_gpu.py --output gpu.json

and to try the script out:

    python training_scripts/benchmark_gpu.py --device cpu --batch_size 2 --length 8 --vocab 500 --width 32

Training: source and target tokens a second, of the preset, of the same with input feeding or without feedback, and of
a plain torch model of the same size (nn.LSTM encoder, a loop of nn.LSTMCell with attention). Decoding: tokens a second
at batch 128 and 1, greedy and beam 5. Sequences all have `--length` tokens, so that nothing depends on the data.
Contestants take turns, round by round; printed are medians and ratios. For comparison, NVIDIA's DeepLearningExamples
on an A100: training 140,900 tokens a second (mixed precision), decoding at batch 128 with beam 5 28,200.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from benchmark import machine, median_ratio, rounds, timed
from torch import nn
from torch.nn import functional as F

from hf_rnn_seq2seq import RnnSeq2SeqForConditionalGeneration, preset


class PlainModel(nn.Module):
    """What one writes without any thought of speed: an nn.LSTM encoder, and a loop over time for the decoder."""

    def __init__(self, vocab: int, width: int, layers: int):
        super().__init__()
        self.source, self.target = nn.Embedding(vocab, width), nn.Embedding(vocab, width)
        self.encoder = nn.LSTM(width, width, layers, batch_first=True)
        self.cells = nn.ModuleList([nn.LSTMCell(width * (1 if layer == 0 else 2), width) for layer in range(layers)])
        self.query, self.key, self.score = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 1)
        self.output = nn.Linear(width, vocab)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        memory, _ = self.encoder(self.source(input_ids))
        keys = self.key(memory)
        states: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * len(self.cells)
        outputs = []
        context = memory[:, 0]
        for x in self.target(labels).unbind(1):
            for index, cell in enumerate(self.cells):
                if index:
                    x = torch.cat((x, context), dim=-1)
                states[index] = cell(x, states[index])
                x = states[index][0]
                if index == 0:
                    energies = self.score(torch.tanh(keys + self.query(x).unsqueeze(1)))
                    context = (energies.softmax(1) * memory).sum(1)
            outputs.append(self.output(x))
        return F.cross_entropy(torch.stack(outputs, 1).flatten(0, 1), labels.flatten())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--length", type=int, default=32, help="of source and target, in tokens")
    parser.add_argument("--vocab", type=int, default=32320)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(argv)
    device = options.device
    torch.manual_seed(0)

    widths = {"hidden_size": options.width, "embedding_size": options.width, "encoder_hidden_size": None}
    config = partial(preset, "gnmt_v2_4layer", vocab_size=options.vocab, source_vocab_size=options.vocab, **widths)
    models: dict[str, nn.Module] = {
        "GNMT v2": RnnSeq2SeqForConditionalGeneration(config()),
        "input feeding": RnnSeq2SeqForConditionalGeneration(config(wiring_type="input_feeding")),
        "output only": RnnSeq2SeqForConditionalGeneration(config(wiring_type="output_only")),
        "plain loop": PlainModel(options.vocab, options.width, 4),
    }
    ids = torch.randint(4, options.vocab, (options.batch_size, options.length), device=device)
    batch = {"input_ids": ids, "labels": ids.flip(1).contiguous()}
    work: dict[str, Callable[[], None]] = {}
    for name, model in models.items():
        optimizer = torch.optim.Adam(model.to(device).train().parameters(), 1e-4, fused=True)

        def update(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            with torch.autocast(torch.device(device).type, torch.bfloat16):
                loss = model(**batch)
            (loss if isinstance(loss, torch.Tensor) else loss.loss).backward()
            optimizer.step()
            optimizer.zero_grad()

        work[f"train {name}"] = update
    decoder = models["GNMT v2"]
    for rows in (1, options.batch_size):
        for beams in (1, 5):

            def generate(rows: int = rows, beams: int = beams) -> None:
                decoder.eval()
                length = {"min_new_tokens": options.length, "max_new_tokens": options.length}
                with torch.inference_mode(), torch.autocast(torch.device(device).type, torch.bfloat16):
                    decoder.generate(ids[:rows], num_beams=beams, do_sample=False, **length)
                decoder.train()

            work[f"decode batch {rows} beam {beams}"] = generate

    seconds = rounds(
        {name: partial(timed, job, device, repeats=options.repeats) for name, job in work.items()}, options.rounds
    )

    figures = {}
    for name, all_seconds in seconds.items():
        median = statistics.median(all_seconds)
        rows = int(name.split()[2]) if name.startswith("decode") else 2 * options.batch_size
        figures[name] = {"seconds": median, "tokens_per_second": rows * options.length / median, "all": all_seconds}
        print(f"{name:32} {median * 1e3:9.2f} ms  {figures[name]['tokens_per_second']:12.0f} tokens/s")
    ratios = {
        "GNMT v2 / plain loop": ("train plain loop", "train GNMT v2"),
        "input feeding takes, of output only": ("train input feeding", "train output only"),
        "beam 5 takes, of greedy, batch 1": ("decode batch 1 beam 5", "decode batch 1 beam 1"),
        f"beam 5 takes, of greedy, batch {options.batch_size}": tuple(
            f"decode batch {options.batch_size} beam {beams}" for beams in (5, 1)
        ),
    }
    for name, (above, below) in ratios.items():
        ratio = median_ratio(seconds[above], seconds[below])
        figures[name] = {"ratio": ratio}
        print(f"{name:44} {ratio:6.2f} x")
    if options.output is not None:
        where = machine(torch.get_num_threads(), device)
        record = {"machine": where, "options": {**vars(options), "output": None}}
        options.output.write_text(json.dumps(record | {"figures": figures}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
