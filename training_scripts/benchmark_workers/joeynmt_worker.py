"""Jobs of benchmark.py for JoeyNMT 2, run by the Python of an environment that has it."""

from types import SimpleNamespace
from typing import Any

import torch
from joeynmt.batch import Batch as JoeyBatch
from joeynmt.model import build_model
from joeynmt.vocabulary import Vocabulary
from serve import Batch, padded, serve, timed_updates

UNK, PAD, START, END = 0, 1, 2, 3
ATTENTIONS = {"additive": "bahdanau", "general": "luong"}
SPECIAL = SimpleNamespace(
    unk_token="<unk>",
    unk_id=UNK,
    pad_token="<pad>",
    pad_id=PAD,
    bos_token="<s>",
    bos_id=START,
    eos_token="</s>",
    eos_id=END,
    sep_token=None,
    sep_id=None,
    lang_tags=[],
)
models: dict[str, Any] = {}


def make(name: str, source_vocab: int, target_vocab: int, attention: str, hidden: int, embedding: int) -> int:
    """A model with input feeding, and the optimizer that JoeyNMT would train it with."""
    vocabularies = [
        Vocabulary([f"{side}{i}" for i in range(size - 4)], SPECIAL)
        for side, size in (("s", source_vocab), ("t", target_vocab))
    ]
    embeddings = {"embedding_dim": embedding, "scale": False, "dropout": 0.2}
    common = {"type": "recurrent", "rnn_type": "lstm", "embeddings": embeddings, "dropout": 0.2, "num_layers": 1}
    decoder = {"hidden_size": hidden, "hidden_dropout": 0.2, "input_feeding": True, "init_hidden": "bridge"}
    model = build_model(
        {
            "encoder": {**common, "hidden_size": hidden // 2, "bidirectional": True},
            "decoder": {**common, **decoder, "attention": ATTENTIONS[attention]},
        },
        *vocabularies,
    ).train()
    model.loss_function = ("crossentropy", 0.0)
    models[name] = (model, torch.optim.Adam(model.parameters(), 1e-3))
    return sum(parameter.numel() for parameter in model.parameters())


def train(name: str, batches: list[Batch], precision: str) -> float:
    model, optimizer = models[name]

    def update(rows: Batch) -> None:
        source = [[*row, END] for row in rows["source"]]  # JoeyNMT ends sources, too
        batch = JoeyBatch(
            src=padded(source, PAD),
            src_length=torch.tensor([len(row) for row in source]),
            src_prompt_mask=None,
            trg=padded([[START, *row, END] for row in rows["target"]], PAD),
            trg_prompt_mask=None,
            indices=torch.arange(len(source)),
            device=torch.device("cpu"),
            pad_index=PAD,
            eos_index=END,
        )
        batch.sort_by_src_length()
        loss, *_ = model(return_type="loss", **vars(batch))
        batch.normalize(loss, normalization="tokens").backward()
        optimizer.step()
        optimizer.zero_grad()

    return timed_updates(update, batches, precision)


if __name__ == "__main__":
    serve({"make": make, "train": train})
