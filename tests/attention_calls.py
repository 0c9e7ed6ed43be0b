"""A kind of attention by itself, random arguments for it, and a run over a sequence."""

from typing import Any

import torch
from models import tiny_config

from hf_rnn_seq2seq import RnnSeq2SeqConfig
from hf_rnn_seq2seq.attention import Alignment, Attention, make_attention


def build(seed: int = 1, spread: float = 1.0, **setting: Any) -> tuple[Attention, RnnSeq2SeqConfig]:
    """In float64; every parameter random, so that none can be forgotten."""
    config = tiny_config(**setting)
    attention = make_attention(config).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return attention, config


def draw(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def run(
    attention: Attention, queries: torch.Tensor, memory: torch.Tensor, mask: torch.Tensor, at_once: bool = False
) -> tuple[torch.Tensor, torch.Tensor, Alignment]:
    """Contexts [B, T, C], weights [B, heads, T, S] and the last alignment, step by step or in one call."""
    prepared = attention.prepare(memory, mask)
    alignment = attention.first_alignment(prepared)
    if at_once:
        return attention(queries, prepared, alignment)
    contexts, weights = [], []
    for query in queries.split(1, dim=1):
        context, weight, alignment = attention(query, prepared, alignment)
        contexts.append(context)
        weights.append(weight)
    return torch.cat(contexts, 1), torch.cat(weights, 2), alignment
