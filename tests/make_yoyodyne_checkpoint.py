"""Trains a small model with Yoyodyne's own command and writes down what the original makes of some words.

Runs in an environment that has Yoyodyne, not in this project's:

    python tests/make_yoyodyne_checkpoint.py OUTPUT SoftAttentionLSTM --epochs 3
    python tests/make_yoyodyne_checkpoint.py OUTPUT PointerGeneratorGRU --layers 2 --train a.tsv --val b.tsv

Without files, whose lines are `characters<tab>symbols with spaces`, the task is to write made-up words backwards. In
OUTPUT there will be `model.ckpt` as Yoyodyne saves it; `config.yaml`, the training's; `outputs.json` with the `--val`
file's `sources` and `targets`, the original's `greedy` output and its beam search's (`beam`, of width 5); and
`logits.pt`, its scores of all targets under teacher forcing in float64, [T, V] each.
"""

import argparse
import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

BEAMS = 5


def made_up(path: Path, count: int, seed: int) -> None:
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        word = [draw.choice("abcdefghij") for _ in range(draw.randint(2, 6))]
        lines.append("".join(word) + "\t" + " ".join(word[::-1]) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


def settings(folder: Path, train: Path, val: Path, options: argparse.Namespace) -> dict[str, Any]:
    cell = "LSTM" if options.model.endswith("LSTM") else "GRU"
    encoder = {"embedding_size": 24, "hidden_size": 20, "layers": options.layers}
    encoder["bidirectional"] = not options.one_way
    model = {
        "source_encoder": {"class_path": f"yoyodyne.models.modules.{cell}Encoder", "init_args": encoder},
        "decoder_hidden_size": options.hidden,
        "decoder_layers": options.layers,
        "embedding_size": 24,
        "optimizer": {"class_path": "yoyodyne.optimizers.Adam", "init_args": {"lr": 0.005}},
    }
    if options.decoder_input_size:
        model["decoder_input_size"] = options.decoder_input_size
    data = {"model_dir": str(folder), "train": str(train), "val": str(val), "target_sep": " "}
    return {
        "seed_everything": 1,
        "trainer": {
            "max_epochs": options.epochs,
            "accelerator": "cpu",
            "devices": 1,
            "enable_progress_bar": False,
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(folder)},
            },
        },
        "model": {"class_path": f"yoyodyne.models.{options.model}Model", "init_args": model},
        "data": {**data, "tie_embeddings": not options.untied},
        "checkpoint": {"dirpath": str(folder), "filename": "model"},
    }  # fmt: skip


def original(config: dict[str, Any], checkpoint: dict[str, Any]) -> Any:
    """The trained model. Its modules are no part of what a checkpoint says of it, so they are made again."""
    from yoyodyne import models
    from yoyodyne.models import modules

    wanted = config["model"]["init_args"]
    encoder = wanted["source_encoder"]
    encoder_class = getattr(modules, encoder["class_path"].rsplit(".", 1)[1])
    names = ("decoder_hidden_size", "decoder_layers", "embedding_size", "decoder_input_size")
    given = {name: wanted[name] for name in names if name in wanted}
    sizes = {name: checkpoint["hyper_parameters"][name] for name in ("vocab_size", "target_vocab_size")}
    model_class = getattr(models, config["model"]["class_path"].rsplit(".", 1)[1])
    model = model_class(source_encoder=encoder_class(**encoder["init_args"]), **given, **sizes)
    model.load_state_dict(checkpoint["state_dict"])
    return model.eval()


@torch.no_grad()
def outputs(model: Any, data: Any, path: Path) -> tuple[dict[str, list[str]], list[torch.Tensor]]:
    """What it makes of a file."""
    from yoyodyne.data import collators, datasets, mappers

    mapper = mappers.Mapper(data.index)
    items = list(datasets.IterableDataset(str(path), mapper, data.parser))
    collate = collators.Collator(has_features=False, has_target=True)
    copies = hasattr(model, "generation_probability")

    def words(ids: Any) -> str:
        return " ".join(mapper.decode_target(ids))

    found: dict[str, list[str]] = {"greedy": [], "beam": []}
    logits = []
    for start in range(0, len(items), 32):
        batch = collate(items[start : start + 32])
        encoded = model.source_encoder(batch.source, model.embeddings)
        if not copies and model.has_source_projection:
            encoded = model.source_projection(encoded)
        mask = batch.source.mask
        read = (batch.source.tensor, encoded, mask) if copies else (encoded, mask)
        found["greedy"] += [words(row) for row in model.greedy_decode_predict_test(*read).argmax(1)]
        model.beam_width = BEAMS
        found["beam"] += [words(beams[0][1:]) for beams in model.beam_decode(*read)[0]]
        # Teacher forcing, by the model's own step, in float64: what differs is then no rounding.
        model.double()
        encoded = model.source_encoder(batch.source, model.embeddings)
        if not copies and model.has_source_projection:
            encoded = model.source_projection(encoded)
        read = (batch.source.tensor, encoded, mask) if copies else (encoded, mask)
        size = len(batch)
        symbol, state, steps = model.start_symbol(size), model.decoder.initial_state(size), []
        for column in batch.target.tensor.unbind(1):
            if copies:
                scores, state = model.decode_step(*read, symbol, state)
            else:
                scores, state = model.decode_step(symbol, *read, state)
            steps.append(scores)
            symbol = column.unsqueeze(1)
        model.float()
        scores = torch.cat(steps, dim=1)
        logits += [row[:length].clone() for row, length in zip(scores, batch.target.lengths().tolist(), strict=True)]
    return found, logits


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument(
        "model", choices=[k + c for k in ("SoftAttention", "PointerGenerator") for c in ("LSTM", "GRU")]
    )
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--decoder_input_size", type=int)
    parser.add_argument("--untied", action="store_true")
    parser.add_argument("--one_way", action="store_true", help="an encoder of one direction")
    parser.add_argument("--train", type=Path)
    parser.add_argument("--val", type=Path)
    options = parser.parse_args()
    from yoyodyne import data
    from yoyodyne.cli import main as cli

    folder = options.output
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    train, val = options.train or folder / "train.tsv", options.val or folder / "val.tsv"
    if not options.train:
        made_up(train, 300, seed=1)
        made_up(val, 60, seed=2)
    config = settings(folder, train, val, options)
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    cli.python_interface(["fit", "--config", str(folder / "config.yaml")])

    # As anyone reads it who has Yoyodyne, which says that its index is harmless.
    checkpoint = torch.load(folder / "model.ckpt", weights_only=True)
    module = data.DataModule(
        model_dir=str(folder), predict=str(val), target_sep=" ", tie_embeddings=not options.untied
    )
    found, logits = outputs(original(config, checkpoint), module, val)
    torch.save(logits, folder / "logits.pt")
    lines = [line.split("\t") for line in val.read_text(encoding="utf-8").splitlines()]
    found |= {"sources": [line[0] for line in lines], "targets": [line[1] for line in lines]}
    (folder / "outputs.json").write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main()
