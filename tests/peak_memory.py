"""Runs one piece of work and prints how many MB it took at its peak above what the model's weights take."""

import argparse
import resource
import time
from pathlib import Path

import torch

from hf_rnn_seq2seq import RnnSeq2SeqConfig, RnnSeq2SeqForConditionalGeneration


def resident() -> float:
    """MB in use now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 1e6


def peak() -> float:
    """MB in use at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", choices=["train", "generate"], default="train")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--source", type=int, default=20)
    parser.add_argument("--target", type=int, default=20)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--attention", default="additive")
    parser.add_argument("--wiring", default="input_feeding")
    parser.add_argument("--beams", type=int, default=1)
    parser.add_argument("--all-logits", action="store_true")
    args = parser.parse_args()

    torch.manual_seed(0)
    config = RnnSeq2SeqConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        embedding_size=args.hidden // 2,
        attention_type=args.attention,
        wiring_type=args.wiring,
    )
    model = RnnSeq2SeqForConditionalGeneration(config)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if args.work == "train" else None
    source = torch.randint(4, args.vocabulary, (args.batch, args.source))

    def work(target: int) -> None:
        if args.work == "train":
            labels = torch.randint(4, args.vocabulary, (args.batch, target))
            model.train()(source, labels=labels, skip_logits=not args.all_logits).loss.backward()
        else:
            model.eval().generate(
                source, min_new_tokens=target, max_new_tokens=target, num_beams=args.beams, suppress_tokens=[2]
            )

    work(2)  # what libraries allocate once
    before = resident()
    started = time.process_time()
    work(args.target)
    print(f"{max(peak() - before, 0):.0f} MB, {time.process_time() - started:.1f} s of processor time")


if __name__ == "__main__":
    main()
