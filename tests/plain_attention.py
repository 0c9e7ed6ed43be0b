"""
The papers' attention equations written out in loops, independently of the package: one unpadded row and one query at
a time, in torch so that gradients can be compared. `w` are an attention's parameters by name.

Shapes: S source, T target, M memory, Q query, A hidden width of additive scoring.
"""

import math
from collections.abc import Mapping

import torch

from hf_rnn_seq2seq import RnnSeq2SeqConfig


def softmax(scores: list[torch.Tensor]) -> list[torch.Tensor]:
    exponentials = [score.exp() for score in scores]
    return [exponential / sum(exponentials) for exponential in exponentials]


def content_scores(
    scoring: str, w: Mapping[str, torch.Tensor], q: torch.Tensor, memory: torch.Tensor
) -> list[torch.Tensor]:
    if scoring == "dot":
        return [q @ m for m in memory]
    if scoring == "scaled_dot":
        return [q @ m / math.sqrt(len(q)) for m in memory]
    if scoring == "general":
        return [q @ (w["key_projection.weight"] @ m) for m in memory]
    bias = w.get("key_projection.bias", 0)
    v = w["score_projection.weight"][0]
    query = normed(w, "query_norm", w["query_projection.weight"] @ q)
    keys = [normed(w, "key_norm", w["key_projection.weight"] @ m + bias) for m in memory]
    return [v @ torch.tanh(query + key) for key in keys]


def normed(w: Mapping[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    """Layer normalisation, where there is one (Ba et al. 2016)."""
    if f"{name}.weight" not in w:
        return x
    centred = x - x.mean()
    return w[f"{name}.weight"] * centred / (centred.square().mean() + 1e-5).sqrt() + w[f"{name}.bias"]


def below(w: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in w.items() if name.startswith(prefix)}


def plain_row(
    config: RnnSeq2SeqConfig, w: Mapping[str, torch.Tensor], queries: torch.Tensor, memory: torch.Tensor, soft: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries [T, Q], memory [S, M] -> contexts [T, C], weights [heads, T, S]; `soft`: as in training."""
    if config.decoder_self_attention:
        contexts, weights = plain_source(config, below(w, "source."), queries, memory, soft)
        own = []
        for t, q in enumerate(queries):
            past = queries[:t]
            c = torch.zeros_like(q)
            for a, k in zip(softmax(content_scores("additive", w, q, past)), past, strict=True):
                c = c + a * k
            own.append(c)
        return torch.cat((contexts, torch.stack(own)), -1), weights
    return plain_source(config, w, queries, memory, soft)


def plain_source(
    config: RnnSeq2SeqConfig, w: Mapping[str, torch.Tensor], queries: torch.Tensor, memory: torch.Tensor, soft: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    kind, length, zero = config.attention_type, len(memory), memory.new_zeros(())
    if kind == "none":
        return queries.new_zeros(len(queries), 0), queries.new_zeros(0, len(queries), length)
    if kind == "multi_head":
        return plain_multi_head(config, w, queries, memory)
    coverage = previous = [zero] * length
    if kind == "monotonic":
        previous = [zero + 1] + [zero] * (length - 1)
    contexts, weights = [], []
    for t, q in enumerate(queries):
        if kind in ("dot", "scaled_dot", "general") or (kind == "additive" and not config.attention_coverage):
            a = softmax(content_scores(kind, w, q, memory))
        elif kind in ("additive", "normed_additive", "location"):
            v = w["score_projection.weight"][0]
            if kind == "normed_additive":
                v = w["scale"] * v / (v @ v).sqrt()
            scores = []
            for s, m in enumerate(memory):
                hidden = w["query_projection.weight"] @ q + w["key_projection.weight"] @ m
                hidden = hidden + w.get("bias", 0) + w.get("key_projection.bias", 0)
                if config.attention_coverage:  # See et al. 2017, eq. 11
                    hidden = hidden + w["trace.projection.weight"][:, 0] * coverage[s]
                if kind == "location":  # Chorowski et al. 2015: f = F * a, centred; nothing beyond the ends
                    filters = w["trace.filters"][:, 0]  # [K, width]
                    half = filters.shape[1] // 2
                    f = torch.zeros_like(filters[:, 0])
                    for offset in range(-half, half + 1):
                        if 0 <= s + offset < length:
                            f = f + filters[:, half + offset] * previous[s + offset]
                    hidden = hidden + w["trace.projection.weight"] @ f
                scores.append(v @ torch.tanh(hidden))
            a = softmax(scores)
        elif kind in ("local_m", "local_p"):
            a = plain_local(config, w, q, memory, t)
        else:
            a = plain_monotonic(w, q, memory, previous, soft)
        coverage = [c + one for c, one in zip(coverage, a, strict=True)]
        previous = a
        contexts.append(sum(one * m for one, m in zip(a, memory, strict=True)))
        weights.append(torch.stack(a))
    return torch.stack(contexts), torch.stack(weights).unsqueeze(0)


def plain_multi_head(
    config: RnnSeq2SeqConfig, w: Mapping[str, torch.Tensor], queries: torch.Tensor, memory: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Vaswani et al. 2017, section 3.2.2, each head with its own rows of the projections."""
    width = config.attention_size // config.attention_heads
    heads, weights = [], []
    for head in range(config.attention_heads):
        rows = slice(head * width, (head + 1) * width)
        bias = w["key_projection.bias"][rows] if "key_projection.bias" in w else 0
        keys = [w["key_projection.weight"][rows] @ m + bias for m in memory]
        values = [w["value_projection.weight"][rows] @ m for m in memory]
        contexts, head_weights = [], []
        for q in queries:
            query = w["query_projection.weight"][rows] @ q
            if config.scoring == "additive":
                v = w["scoring.score_projection.weight"][head]
                scores = [v @ torch.tanh(query + key) for key in keys]
            else:
                scale = math.sqrt(width) if config.scoring == "scaled_dot" else 1
                scores = [query @ key / scale for key in keys]
            a = softmax(scores)
            contexts.append(sum(one * value for one, value in zip(a, values, strict=True)))
            head_weights.append(torch.stack(a))
        heads.append(torch.stack(contexts))
        weights.append(torch.stack(head_weights))
    return torch.cat(heads, -1) @ w["output_projection.weight"].T, torch.stack(weights)


def plain_local(
    config: RnnSeq2SeqConfig, w: Mapping[str, torch.Tensor], q: torch.Tensor, memory: torch.Tensor, t: int
) -> list[torch.Tensor]:
    """Luong et al. 2015, section 3.2."""
    length, half = len(memory), config.attention_window
    centre = q.new_tensor(min(t, length - 1))
    if config.attention_type == "local_p":
        hidden = torch.tanh(w["position_projection.weight"] @ q)
        centre = length / (1 + (-(w["position_score.weight"][0] @ hidden)).exp())
    inside = [s for s in range(length) if abs(s - float(centre.detach())) <= half]
    scores = content_scores(config.scoring, below(w, "scoring."), q, memory)
    found = dict(zip(inside, softmax([scores[s] for s in inside]), strict=True))
    if config.attention_type == "local_p":
        sigma = half / 2
        found = {s: a * (-((s - centre) ** 2) / (2 * sigma**2)).exp() for s, a in found.items()}
        total = sum(found.values())
        found = {s: a / total for s, a in found.items()}
    return [found.get(s, q.new_zeros(())) for s in range(length)]


def plain_monotonic(
    w: Mapping[str, torch.Tensor], q: torch.Tensor, memory: torch.Tensor, previous: list[torch.Tensor], soft: bool
) -> list[torch.Tensor]:
    """Raffel et al. 2017: eq. 11-14 in training, else the process of section 2.2."""
    v = w["score_projection.weight"][0]
    v = w["scale"] * v / (v @ v).sqrt()
    p = []
    for m in memory:
        hidden = w["query_projection.weight"] @ q + w["key_projection.weight"] @ m + w["bias"]
        p.append(1 / (1 + (-(v @ torch.tanh(hidden) + w["offset"])).exp()))
    if soft:
        weights, before, q_before = [], q.new_zeros(()), q.new_zeros(())
        for one, last in zip(p, previous, strict=True):
            q_before = (1 - before) * q_before + last
            before = one
            weights.append(one * q_before)
        return weights
    weights = [q.new_zeros(()) for _ in memory]
    at = [s for s, last in enumerate(previous) if last == 1]
    for s in range(at[0] if at else len(p), len(p)):
        if p[s] > 0.5:
            weights[s] = q.new_ones(())
            break
    return weights
