"""Small models in float64, and a covering set of configurations, for the tests of the model."""

import itertools
import random
from typing import Any

import torch

from hf_rnn_seq2seq import RnnSeq2SeqConfig, RnnSeq2SeqForConditionalGeneration

VOCABULARY = 13

AXES: dict[str, list[Any]] = {
    "cell_type": ["lstm", "gru", "rnn_tanh", "rnn_relu"],
    "decoder_cell_type": [None, "lstm", "gru", "rnn_tanh"],
    "attention_type": ["none", "dot", "scaled_dot", "general", "additive", "normed_additive"],
    "wiring_type": ["output_only", "input_feeding", "bahdanau"],
    "bridge_type": ["zeros", "last", "mean", "linear"],
    "bidirectional": [True, False],
    "encoder_layers": [1, 2],
    "decoder_layers": [1, 3],
    "encoder_residual": [False, True],
    "decoder_residual": [False, True],
    "source_vocab_size": [None, 11],
    "tie_word_embeddings": [False, True],
    "zoneout": [0.0, 0.2],
}


def pairwise(axes: dict[str, list[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Settings in which every two values of every two axes occur together, found greedily."""
    names, rng = list(axes), random.Random(seed)
    pairs = {
        (a, x, b, y)
        for a, b in itertools.combinations(names, 2)
        for x, y in itertools.product(range(len(axes[a])), range(len(axes[b])))
    }
    rows = []
    while pairs:
        candidates = []
        first = min(pairs)
        for _ in range(20):
            row = {name: rng.randrange(len(axes[name])) for name in names}
            row[first[0]], row[first[2]] = first[1], first[3]
            covered = {(a, row[a], b, row[b]) for a, b in itertools.combinations(names, 2)} & pairs
            candidates.append((len(covered), row, covered))
        _, row, covered = max(candidates, key=lambda candidate: candidate[0])
        pairs -= covered
        rows.append({name: axes[name][index] for name, index in row.items()})
    return rows


CONFIGURATIONS = pairwise(AXES)


def name_of(setting: dict[str, Any]) -> str:
    return "-".join(str(value) for value in setting.values())


def tiny_config(**setting: Any) -> RnnSeq2SeqConfig:
    defaults: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 8, "embedding_size": 6}
    return RnnSeq2SeqConfig(**{**defaults, **setting})


def tiny_model(seed: int = 0, **setting: Any) -> RnnSeq2SeqForConditionalGeneration:
    """In float64 and evaluation mode, with outputs far enough apart that searches have something to choose from."""
    torch.manual_seed(seed)
    model = RnnSeq2SeqForConditionalGeneration(tiny_config(**setting)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2).add_(0.1 * torch.randn_like(parameter))
    return model


def ragged_batch(
    lengths: list[int], side: str = "right", ids: int = 11, seed: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random source ids [B, S] padded on one side or alternately on both, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    source = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros_like(source)
    for row, length in enumerate(lengths):
        start = {"right": 0, "left": width - length, "both": (width - length) // 2}[side]
        source[row, start : start + length] = torch.randint(3, ids, (length,), generator=generator)
        mask[row, start : start + length] = 1
    return source, mask
