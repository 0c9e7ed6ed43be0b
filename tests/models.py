"""Small models in float64, and a covering set of configurations, for the tests of the model."""

import itertools
import random
from typing import Any

import torch

from hf_rnn_seq2seq import RnnSeq2SeqConfig, RnnSeq2SeqForConditionalGeneration
from hf_rnn_seq2seq.configuration_rnn_seq2seq import CELLS_WITH_MEMORY

VOCABULARY = 13
CELLS = ["lstm", "gru", "rnn_tanh", "rnn_relu", "ln_lstm", "ln_gru", "nematus_gru", "marian_gru", "ssru"]

# A value that is a dict is a whole variant: several fields that only make sense together.
AXES: dict[str, list[Any]] = {
    "encoder": [
        {"encoder_type": "rnn", "encoder_layers": 1},
        {"encoder_type": "rnn", "encoder_layers": 3, "encoder_residual": True, "reverse_source": True},
        {"encoder_type": "rnn", "encoder_layers": 2, "bidirectional": False},
        {"encoder_type": "rnn", "encoder_layers": 2, "encoder_transition_depth": 3},
        {"encoder_type": "gnmt", "encoder_layers": 3},
        {"encoder_type": "pyramidal", "encoder_layers": 2},
        {"encoder_type": "pyramidal", "encoder_layers": 3, "bidirectional": False, "reverse_source": True},
        {"encoder_type": "conv", "encoder_layers": 2},
        {"encoder_type": "transformer", "encoder_layers": 2, "encoder_heads": 2, "encoder_ffn_size": 10},
        {"encoder_type": "embedding", "embedding_size": 8},
    ],
    "cell_type": CELLS,
    "decoder_cell_type": [None, *CELLS],
    "attention": [
        {"attention_type": "none"},
        {"attention_type": "dot"},
        {"attention_type": "scaled_dot"},
        {"attention_type": "general"},
        {"attention_type": "additive"},
        {"attention_type": "additive", "attention_coverage": True, "attention_bias": True},
        {"attention_type": "additive", "attention_bias": True, "layer_norm": True},
        {"attention_type": "normed_additive"},
        {"attention_type": "multi_head", "attention_heads": 2},
        {"attention_type": "multi_head", "attention_heads": 4, "attention_scoring": "additive"},
        {"attention_type": "location", "location_filters": 3, "location_kernel_size": 3},
        {"attention_type": "local_m", "attention_window": 1},
        {"attention_type": "local_p", "attention_window": 2, "attention_scoring": "additive"},
        {"attention_type": "monotonic"},
    ],
    "attention_normalizer": ["softmax", "sparsemax", "entmax15"],
    "decoder_self_attention": [False, True],
    "wiring": [
        {"wiring_type": "output_only"},
        {"wiring_type": "input_feeding"},
        {"wiring_type": "context_feeding"},
        {"wiring_type": "bahdanau"},
        {"wiring_type": "bahdanau_joined"},
        {"wiring_type": "context", "attention_type": "none", "decoder_self_attention": False},
        {"wiring_type": "conditional"},
        {"wiring_type": "conditional", "decoder_transition_depth": 4},
        {"wiring_type": "gnmt"},
        {"wiring_type": "gnmt_v2"},
        {"wiring_type": "rnmt_plus"},
    ],
    "head": [
        {"head_type": "linear"},
        {"head_type": "linear", "output_normalizer": "sparsemax"},
        {"head_type": "deep", "output_normalizer": "entmax15"},
        {"head_type": "deep"},
        {"head_type": "deep_tanh"},
        {"head_type": "pointer_generator"},
    ],
    "bridge_type": ["zeros", "last", "mean", "linear", "affine", "layerwise", "dense", "learned"],
    "decoder_layers": [1, 2, 3],
    "decoder_residual": [False, True],
    "source_vocab_size": [None, 11],
    "tie_word_embeddings": [False, True],
    "zoneout": [0.0, 0.2],
}


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """The fields of a row of axis values; those of a later variant win."""
    setting: dict[str, Any] = {}
    for name, value in row.items():
        setting.update(value if isinstance(value, dict) else {name: value})
    return setting


def holds(row: dict[str, Any]) -> bool:
    """A variant may overwrite the fields of an earlier axis, whose value the row then does not hold."""
    return all(flat(row).items() >= flat({name: value}).items() for name, value in row.items())


def possible(row: dict[str, Any]) -> bool:
    """What the configuration refuses among these values, said again here because asking it takes a millisecond."""
    get = flat(row).get
    attention, wiring = get("attention_type"), get("wiring_type")
    scores = attention not in ("none", "monotonic") or get("decoder_self_attention")
    wide = wiring == "context_feeding" and (get("decoder_cell_type") or get("cell_type")) in CELLS_WITH_MEMORY
    return not (
        (get("attention_normalizer") != "softmax" and not scores)
        or (get("head_type") == "pointer_generator" and (attention == "none" or get("encoder_type") == "pyramidal"))
        or (wiring == "context" and get("bridge_type") in ("zeros", "learned"))
        or (wiring in ("gnmt", "gnmt_v2") and get("decoder_layers") == 1)
        or (attention in ("dot", "scaled_dot") and wide)
    )


def pairwise(axes: dict[str, list[Any]], seed: int = 0) -> tuple[list[dict[str, Any]], set[tuple[Any, ...]]]:
    """
    Rows in which every two values of every two axes occur together, found greedily, and the pairs that no row can
    hold: (axis, index of its value, other axis, index of its value).
    """
    names, rng = list(axes), random.Random(seed)
    pairs = {
        (a, x, b, y)
        for a, b in itertools.combinations(names, 2)
        for x, y in itertools.product(range(len(axes[a])), range(len(axes[b])))
    }
    rows, impossible = [], set()
    while pairs:
        first = min(pairs)
        best: tuple[int, dict[str, Any], set[tuple[Any, ...]]] = (0, {}, set())
        together = {first[0]: axes[first[0]][first[1]], first[2]: axes[first[2]][first[3]]}
        tried = found = 0 if holds(together) else 4000
        while found < 12 and tried < (60 if found else 4000):
            tried += 1
            index = {name: rng.randrange(len(axes[name])) for name in names}
            index[first[0]], index[first[2]] = first[1], first[3]
            row = {name: axes[name][index[name]] for name in names}
            if not holds(row) or not possible(row):
                continue
            found += 1
            covered = {(a, index[a], b, index[b]) for a, b in itertools.combinations(names, 2)} & pairs
            if len(covered) > best[0]:
                best = (len(covered), row, covered)
        if not best[0]:
            pairs.discard(first)
            impossible.add(first)
            continue
        pairs -= best[2]
        rows.append(flat(best[1]))
    return rows, impossible


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


CONFIGURATIONS, IMPOSSIBLE_PAIRS = pairwise(AXES)


def name_of(setting: dict[str, Any]) -> str:
    return "-".join(str(value) for value in setting.values())


def copying(config: RnnSeq2SeqConfig, source: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    `copy_ids` for a model that copies and can't tell a source id's word in the target: here two source ids in three
    are of words that the target has, the third is outside.
    """
    if config.head_type != "pointer_generator" or config.shared_vocabulary:
        return {}
    outside = config.vocab_size + torch.arange(source.size(1)).expand_as(source)
    first = (source.unsqueeze(2) == source.unsqueeze(1)).int().argmax(2)  # the same word has the same id
    return {"copy_ids": torch.where(source % 3 == 0, outside.gather(1, first), source).masked_fill(source == 0, 0)}


def batch_of(
    model: RnnSeq2SeqForConditionalGeneration, source: torch.Tensor, mask: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """What `model` wants of this source."""
    batch = {"input_ids": source, **copying(model.config, source)}
    return batch if mask is None else {**batch, "attention_mask": mask}


def ragged_batch(
    lengths: list[int], side: str = "right", ids: int = 11, seed: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random source ids [B, S] padded on one side or alternately on both, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(source)
    for row, length in enumerate(lengths):
        source[row, :length] = torch.randint(3, ids, (length,), generator=generator)
        mask[row, :length] = 1
    batch = padded({"source": source, "mask": mask}, lengths, side)
    return batch["source"], batch["mask"]


def padded(batch: dict[str, torch.Tensor], lengths: list[int], side: str) -> dict[str, torch.Tensor]:
    """Rows of these lengths with their padding [B, S] on the right, with it on one side or alternately on both."""
    width = max(lengths)
    starts = [{"right": 0, "left": width - length, "both": (width - length) // 2}[side] for length in lengths]
    return {
        name: torch.stack([row.roll(start) for row, start in zip(rows, starts, strict=True)])
        for name, rows in batch.items()
    }
