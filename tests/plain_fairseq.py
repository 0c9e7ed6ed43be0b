"""
fairseq's `lstm` model and its search, from its source (0.12) and in its names: NumPy in float64, one sentence and one
token at a time. It shares nothing with the package.

Shapes: S source, H hidden, M memory, V vocabulary.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from oracles import Array, State, log_softmax, new_state, to_numpy
from plain_joeynmt import PARTS, run_rnn, softmax

BOS, PAD, EOS, UNK = range(4)


class PlainFairseq:
    """
    Args:
        state: a checkpoint's `model`.
    """

    def __init__(self, state: Mapping[str, torch.Tensor], layers: int):
        self.weights, self.layers = to_numpy(state), layers
        self.bidirectional = "encoder.lstm.weight_ih_l0_reverse" in state

    def linear(self, name: str, x: Array) -> Array:
        """The layer of this name, which may lack a bias or be missing as a whole."""
        if f"{name}.weight" not in self.weights:
            return x
        return self.weights[f"{name}.weight"] @ x + self.weights.get(f"{name}.bias", 0.0)

    def first(self, source: Sequence[int]) -> tuple[list[Array], list[State], Array]:
        """The memory, the decoder's first state and what is fed to the first step."""
        xs = [self.weights["encoder.embed_tokens.weight"][index] for index in source]
        memory, finals = run_rnn(self.weights, "encoder.lstm", xs, self.layers, self.bidirectional)
        states: list[State] = [
            [self.linear("decoder.encoder_hidden_proj", h), self.linear("decoder.encoder_cell_proj", c)]
            for h, c in finals
        ]
        return memory, states, np.zeros(self.weights["decoder.layers.0.weight_hh"].shape[1])

    def step(
        self, token: int, memory: Sequence[Array], states: Sequence[State], fed: Array
    ) -> tuple[Array, list[State], Array]:
        """Scores [V], the new states and what is fed to the next step."""
        x = np.concatenate([self.weights["decoder.embed_tokens.weight"][token], fed])
        new = []
        for layer, state in enumerate(states):
            cell = {part: self.weights[f"decoder.layers.{layer}.{part}"] for part in PARTS}
            new.append(new_state("lstm", cell, x, state))
            x = new[-1][0]
        if "decoder.attention.input_proj.weight" in self.weights:
            query = self.weights["decoder.attention.input_proj.weight"] @ x
            context = softmax(np.array([float(m @ query) for m in memory])) @ np.stack(list(memory))
            x = np.tanh(self.weights["decoder.attention.output_proj.weight"] @ np.concatenate([context, x]))
        fed, x = x, self.linear("decoder.additional_fc", x)
        if "decoder.fc_out.weight" in self.weights:
            return self.linear("decoder.fc_out", x), new, fed
        return self.weights["decoder.embed_tokens.weight"] @ x, new, fed

    def logits(self, source: Sequence[int], target: Sequence[int]) -> Array:
        """[T, V]; `target` is what the decoder reads."""
        memory, states, fed = self.first(source)
        rows = []
        for token in target:
            scores, states, fed = self.step(token, memory, states, fed)
            rows.append(scores)
        return np.stack(rows)

    def beam(self, source: Sequence[int], size: int, penalty: float, longest: int) -> list[tuple[float, list[int]]]:
        """
        `SequenceGenerator` of one sentence, whose `max_len` is one less than `longest`: what it has finished, the best
        first.
        """
        memory, states, fed = self.first(source)
        beams = [(0.0, [EOS], states, fed)]
        found: list[tuple[float, list[int]]] = []
        for step in range(longest):
            candidates = []
            for total, tokens, states, fed in beams:
                scores, new, new_fed = self.step(tokens[-1], memory, states, fed)
                rows = log_softmax(scores) + total
                rows[PAD] = -np.inf
                if step < 1:
                    rows[EOS] = -np.inf
                if step + 1 == longest:
                    rows[np.arange(len(rows)) != EOS] = -np.inf
                candidates += [(float(row), [*tokens, index], new, new_fed) for index, row in enumerate(rows)]
            best = sorted(candidates, key=lambda candidate: -candidate[0])[: 2 * size]
            for total, tokens, _, _ in best[:size]:
                if tokens[-1] == EOS and len(found) < size:
                    found.append((total / (step + 1) ** penalty, tokens[1:]))
            if len(found) == size:
                break
            beams = [candidate for candidate in best if candidate[1][-1] != EOS][:size]
        return sorted(found, key=lambda hypothesis: -hypothesis[0])
