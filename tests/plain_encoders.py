"""The encoders written plainly: one sentence, a list of vectors, read by loops. And small encoders to compare."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from models import tiny_config

from hf_rnn_seq2seq import RnnSeq2SeqConfig
from hf_rnn_seq2seq.encoders import RnnSeq2SeqEncoder

BODIES: dict[str, dict[str, Any]] = {
    "rnn": {"encoder_type": "rnn", "encoder_layers": 2},
    "rnn_residual": {
        "encoder_type": "rnn",
        "encoder_layers": 4,
        "bidirectional": False,
        "encoder_residual": True,
        "residual_start": 3,
    },
    "rnn_transition": {"encoder_type": "rnn", "encoder_layers": 2, "encoder_transition_depth": 3},
    "gnmt": {"encoder_type": "gnmt", "encoder_layers": 4},
    "gnmt_2": {"encoder_type": "gnmt", "encoder_layers": 2},
    "gnmt_1": {"encoder_type": "gnmt", "encoder_hidden_size": 4},
    "pyramidal": {"encoder_type": "pyramidal", "encoder_layers": 3},
    "pyramidal_one_way": {"encoder_type": "pyramidal", "encoder_layers": 2, "bidirectional": False},
    "pyramidal_1": {"encoder_type": "pyramidal"},
    "conv": {"encoder_type": "conv", "encoder_layers": 2, "encoder_kernel_size": 5, "max_source_positions": 9},
    "conv_equal": {"encoder_type": "conv", "embedding_size": 8},
    "transformer": {"encoder_type": "transformer", "encoder_layers": 2, "encoder_heads": 2, "encoder_ffn_size": 5},
    "transformer_equal": {"encoder_type": "transformer", "embedding_size": 8, "encoder_heads": 4},
    "embedding": {"encoder_type": "embedding"},
}


def tiny_encoder(seed: int = 0, **setting: Any) -> RnnSeq2SeqEncoder:
    """In float64; all parameters random, so that none can be forgotten."""
    torch.manual_seed(seed)
    encoder = RnnSeq2SeqEncoder(tiny_config(**setting)).double().eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return encoder


Rows = list[torch.Tensor]
Parameters = Mapping[str, torch.Tensor]


class Plain(NamedTuple):
    memory: Rows
    final_state: torch.Tensor  # [L, N, M]
    layers: list[Rows]
    keys: Rows | None = None
    attentions: list[torch.Tensor] | None = None  # a layer [heads, S, S]


def affine(p: Parameters, name: str, x: torch.Tensor) -> torch.Tensor:
    y = p[f"{name}.weight"] @ x
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def plain_cell(kind: str, p: Parameters, name: str, rows: Rows) -> tuple[Rows, Rows]:
    """One layer and direction, a step of which goes through one cell or several."""
    names = [name] if f"{name}.weight_ih" in p else [f"{name}.cells.{k}" for k in range(3)]
    cells = [[p[f"{one}.{part}"] for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")] for one in names]
    h = c = torch.zeros(cells[0][1].shape[1], dtype=cells[0][1].dtype)
    outputs = []
    for x in rows:
        for w, u, b, d in cells:
            from_x = w @ x[: w.shape[1]] + b  # transitions have no input
            if kind == "lstm":
                i, f, g, o = (from_x + u @ h + d).chunk(4)
                c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                h = torch.sigmoid(o) * torch.tanh(c)
            else:
                (xr, xz, xn), (hr, hz, hn) = from_x.chunk(3), (u @ h + d).chunk(3)
                z = torch.sigmoid(xz + hz)
                h = (1 - z) * torch.tanh(xn + torch.sigmoid(xr + hr) * hn) + z * h
        outputs.append(h)
    return outputs, [h, c] if kind == "lstm" else [h]


def plain_layer(kind: str, p: Parameters, layer: int, rows: Rows, both: bool) -> tuple[Rows, list[Rows]]:
    """Outputs, and final states by direction."""
    outputs, final = plain_cell(kind, p, f"layers.{layer}.directions.forward_layer", rows)
    if not both:
        return outputs, [final]
    backward, last = plain_cell(kind, p, f"layers.{layer}.directions.backward_layer", rows[::-1])
    return [torch.cat(pair) for pair in zip(outputs, backward[::-1], strict=True)], [final, last]


def plain_recurrent(config: RnnSeq2SeqConfig, p: Parameters, rows: Rows) -> Plain:
    finals, layers = [], []
    x = rows
    for layer in range(config.encoder_layers):
        if config.encoder_type == "pyramidal" and layer > 0:
            x = x + [torch.zeros_like(x[0])] * (len(x) % 2)
            x = [torch.cat((x[i], x[i + 1])) for i in range(0, len(x), 2)]
        both = layer == 0 if config.encoder_type == "gnmt" else config.bidirectional
        y, final = plain_layer(config.cell_type, p, layer, x, both)
        residual = config.encoder_residual and layer + 1 >= config.residual_start
        if residual or (config.encoder_type == "gnmt" and layer + 1 >= 3):
            y = [a + b for a, b in zip(x, y, strict=True)]
        if config.encoder_type == "gnmt" and layer == 0 and config.encoder_layers > 1:
            final = final[1:]
        finals.append(torch.stack([torch.cat(states) for states in zip(*final, strict=True)]))
        layers.append(y)
        x = y
    return Plain(x, torch.stack(finals), layers)


def plain_convolution(p: Parameters, name: str, rows: Rows) -> Rows:
    weight, bias = p[f"{name}.conv.weight"], p[f"{name}.conv.bias"]  # [out, in, k], [out]
    taps = weight.shape[2]
    outputs = []
    for s, row in enumerate(rows):
        total = bias + row
        for tap in range(taps):
            at = s + tap - taps // 2
            if 0 <= at < len(rows):
                total = total + weight[:, :, tap] @ rows[at]
        outputs.append(torch.tanh(total))
    return outputs


def plain_conv(config: RnnSeq2SeqConfig, p: Parameters, rows: Rows) -> Plain:
    x = [row + p["position_embedding.weight"][s] for s, row in enumerate(rows)]
    if "projection.weight" in p:
        x = [affine(p, "projection", row) for row in x]
    keys, layers = x, []
    for layer in range(config.encoder_layers):
        keys = plain_convolution(p, f"key_layers.{layer}", keys)
        x = plain_convolution(p, f"layers.{layer}", x)
        layers.append(x)
    return Plain(x, plain_mean(x), layers, keys)


def plain_norm(p: Parameters, name: str, x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean()
    return p[f"{name}.weight"] * centred / torch.sqrt((centred * centred).mean() + 1e-5) + p[f"{name}.bias"]


def plain_transformer(config: RnnSeq2SeqConfig, p: Parameters, rows: Rows) -> Plain:
    width, heads = config.memory_size, config.encoder_heads
    size = width // heads
    x = []
    for s, row in enumerate(rows):
        y = row * config.embedding_size**0.5
        y = affine(p, "projection", y) if "projection.weight" in p else y
        angles = [s / 10000 ** (2 * (i // 2) / width) for i in range(width)]
        wave = [math.cos(angle) if i % 2 else math.sin(angle) for i, angle in enumerate(angles)]
        x.append(y + torch.tensor(wave, dtype=y.dtype))
    layers, attentions = [], []
    for layer in range(config.encoder_layers):
        name = f"layers.{layer}"
        normed = [plain_norm(p, f"{name}.attention_norm", row) for row in x]
        q, k, v = (
            [affine(p, f"{name}.attention.{part}_projection", row) for row in normed]
            for part in ("query", "key", "value")
        )
        weights, mixed = [], []
        for s in range(len(x)):
            found, contexts = [], []
            for head in range(heads):
                part = slice(head * size, (head + 1) * size)
                scores = [q[s][part].dot(k[t][part]) / size**0.5 for t in range(len(x))]
                exponents = [torch.exp(score) for score in scores]
                a = [exponent / sum(exponents) for exponent in exponents]
                contexts.append(sum(a[t] * v[t][part] for t in range(len(x))))
                found.append(torch.stack(a))
            mixed.append(affine(p, f"{name}.attention.output_projection", torch.cat(contexts)))
            weights.append(torch.stack(found))
        attentions.append(torch.stack(weights, dim=1))  # [heads, S, S]
        x = [row + m for row, m in zip(x, mixed, strict=True)]
        inner = [affine(p, f"{name}.ffn.0", plain_norm(p, f"{name}.ffn_norm", row)).clamp(min=0) for row in x]
        x = [row + affine(p, f"{name}.ffn.2", y) for row, y in zip(x, inner, strict=True)]
        layers.append(x)
    layers[-1] = [plain_norm(p, "norm", row) for row in x]
    return Plain(layers[-1], plain_mean(layers[-1]), layers, attentions=attentions)


def plain_mean(rows: Rows) -> torch.Tensor:
    return (sum(rows[1:], rows[0]) / len(rows)).view(1, 1, -1)


def plain_embedding(config: RnnSeq2SeqConfig, p: Parameters, rows: Rows) -> Plain:
    return Plain(rows, plain_mean(rows), [rows])


PLAIN = {"conv": plain_conv, "transformer": plain_transformer, "embedding": plain_embedding}


def plain(config: RnnSeq2SeqConfig, p: Parameters, rows: Rows) -> Plain:
    """The sentence as the encoder reads it; with `reverse_source` from its end, the result in the source's order."""
    read = PLAIN.get(config.encoder_type, plain_recurrent)
    if not config.reverse_source:
        return read(config, p, rows)
    found = read(config, p, rows[::-1])
    return Plain(
        found.memory[::-1],
        found.final_state,
        [layer[::-1] for layer in found.layers],
        found.keys[::-1] if found.keys else None,
        [weights.flip(1, 2) for weights in found.attentions] if found.attentions else None,
    )
