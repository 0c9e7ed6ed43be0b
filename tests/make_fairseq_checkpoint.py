"""Trains a small `lstm` model with fairseq 0.12 and writes down what the original makes of some sentences.

Runs in an environment that has fairseq, not in this project's:

    python tests/make_fairseq_checkpoint.py OUTPUT default --updates 100
    python tests/make_fairseq_checkpoint.py OUTPUT bidirectional --source train.en --target train.de \\
        --test-source test.en --test-target test.de

Without files the task is to write sentences of made-up words backwards. In OUTPUT there will be `checkpoint.pt`, as
fairseq saves it, and the two dictionaries; `outputs.json` with the test's `sources` and `targets`, their ids, and the
original's ids and scores: `greedy`, and its beam search's, `beam` (log-probabilities over length) and `beam_sum` (not
divided); and `logits.pt`, its scores of the first 20 targets, [T, V] each.
"""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

from parallel_text import arguments, read

# What each is there for: the options of fairseq-train that make the model.
CONFIGURATIONS = {
    "default": "--encoder-embed-dim 64 --decoder-embed-dim 64 --decoder-out-embed-dim 64",
    "bidirectional": "--encoder-bidirectional --encoder-layers 2 --decoder-layers 2 --encoder-embed-dim 40 "
    "--encoder-hidden-size 48 --decoder-embed-dim 40 --decoder-hidden-size 64 --decoder-out-embed-dim 40 "
    "--share-decoder-input-output-embed",
    "shared": "--encoder-bidirectional --encoder-embed-dim 48 --encoder-hidden-size 32 --decoder-embed-dim 48 "
    "--decoder-hidden-size 64 --decoder-out-embed-dim 48 --share-all-embeddings",
    "no-attention": "--decoder-attention 0 --encoder-embed-dim 48 --encoder-hidden-size 64 --decoder-embed-dim 48 "
    "--decoder-hidden-size 64 --decoder-out-embed-dim 32 --encoder-layers 2 --decoder-layers 2",
}
SCORED, MAX_LENGTH, BEAMS, BATCH = 20, 40, 5, 50


def allow_instances_as_defaults() -> None:
    """Python 3.11 refuses instances of data classes as fields' defaults, which fairseq and its hydra have."""
    plain = dataclasses._get_field  # type: ignore[attr-defined]

    def get_field(owner, name, *rest):  # type: ignore[no-untyped-def]
        default = getattr(owner, name, None)
        default = default.default if isinstance(default, dataclasses.Field) else default
        if dataclasses.is_dataclass(default) and type(default).__hash__ is None:
            type(default).__hash__ = object.__hash__  # type: ignore[method-assign]
        return plain(owner, name, *rest)

    dataclasses._get_field = get_field  # type: ignore[attr-defined]


def run(main, command: str) -> None:  # type: ignore[no-untyped-def]
    sys.argv = command.split()
    main()


def train(folder: Path, configuration: str, updates: int) -> None:
    from fairseq_cli import preprocess
    from fairseq_cli import train as fairseq_train

    joined = "--joined-dictionary" if "--share-all-embeddings" in configuration else ""
    run(
        preprocess.cli_main,
        f"fairseq-preprocess --source-lang src --target-lang tgt --trainpref {folder}/train --validpref {folder}/test "
        f"--destdir {folder}/data --thresholdsrc 8 --thresholdtgt 8 {joined}",
    )
    run(
        fairseq_train.cli_main,
        f"fairseq-train {folder}/data --arch lstm {configuration} --optimizer adam --lr 0.003 --clip-norm 5 "
        f"--dropout 0.1 --batch-size 32 --max-update {updates} --criterion cross_entropy --save-dir {folder}/saved "
        "--disable-validation --no-epoch-checkpoints --cpu --seed 1 --num-workers 0 --log-interval 50",
    )


def main() -> None:
    parser = arguments(__doc__, CONFIGURATIONS, "updates")
    options = parser.parse_args()
    folder = options.output / "work"
    folder.mkdir(parents=True)
    text = read(options)
    text.write(folder)

    allow_instances_as_defaults()
    import torch

    torch.set_num_threads(1)
    # Its checkpoints hold an argparse.Namespace, and it does not say so to a torch that reads tensors only.
    load = torch.load
    torch.load = lambda *arguments, **named: load(*arguments, **{**named, "weights_only": False})
    from fairseq.checkpoint_utils import load_model_ensemble_and_task
    from fairseq.sequence_generator import SequenceGenerator

    train(folder, CONFIGURATIONS[options.configuration], options.updates)
    models, _, task = load_model_ensemble_and_task([f"{folder}/saved/checkpoint_last.pt"])
    model = models[0].eval()
    source, target = task.source_dictionary, task.target_dictionary

    def ids(dictionary, lines):  # type: ignore[no-untyped-def]
        return [dictionary.encode_line(line, add_if_not_exist=False).long() for line in lines]

    sources, targets = ids(source, text.test_source), ids(target, text.test_target)

    def decode(beam_size: int, **setting) -> dict:  # type: ignore[no-untyped-def]
        generator = SequenceGenerator([model], target, beam_size=beam_size, max_len_b=MAX_LENGTH, **setting)
        tokens, scores = [], []
        order = sorted(range(len(sources)), key=lambda index: -len(sources[index]))
        for start in range(0, len(order), BATCH):
            rows = [sources[index] for index in order[start : start + BATCH]]
            width = len(rows[0])
            left = torch.stack([torch.cat((row.new_full((width - len(row),), source.pad()), row)) for row in rows])
            lengths = torch.tensor([len(row) for row in rows])
            found = generator.generate([model], {"net_input": {"src_tokens": left, "src_lengths": lengths}})
            tokens += [best[0]["tokens"].tolist() for best in found]
            scores += [float(best[0]["score"]) for best in found]
        back = sorted(range(len(order)), key=order.__getitem__)
        return {"ids": [tokens[place] for place in back], "scores": [scores[place] for place in back]}

    logits = []
    for row, words in list(zip(sources, targets, strict=True))[:SCORED]:
        previous = torch.cat((words[-1:], words[:-1]))
        with torch.no_grad():
            logits.append(model(row.unsqueeze(0), torch.tensor([len(row)]), previous.unsqueeze(0))[0][0].clone())
    outputs = {
        "sources": text.test_source,
        "targets": text.test_target,
        "source_ids": [row.tolist() for row in sources],
        "target_ids": [row.tolist() for row in targets],
        "greedy": decode(1),
        "beam": decode(BEAMS),
        "beam_sum": decode(BEAMS, normalize_scores=False),
    }
    (options.output / "outputs.json").write_text(json.dumps(outputs, ensure_ascii=False), encoding="utf-8")
    torch.save(logits, options.output / "logits.pt")
    shutil.copy(folder / "saved" / "checkpoint_last.pt", options.output / "checkpoint.pt")
    for name in ("dict.src.txt", "dict.tgt.txt"):
        shutil.copy(folder / "data" / name, options.output / name)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
