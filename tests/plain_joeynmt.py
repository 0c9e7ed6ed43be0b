"""
JoeyNMT's recurrent model and its searches, from its source (2.3) and in its names: NumPy in float64, one sentence and
one token at a time. It shares nothing with the package.

Shapes: S source, H hidden, M memory, V vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from oracles import Array, State, log_softmax, new_state, to_numpy

UNK, PAD, BOS, EOS = range(4)
PARTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def softmax(scores: Array) -> Array:
    return np.exp(log_softmax(scores))


def torch_cell(weights: Mapping[str, Array], prefix: str, suffix: str) -> tuple[str, dict[str, Array]]:
    """A layer of torch's LSTM or GRU: which it is, and its weights by the names of `new_state`."""
    found = {part: weights[f"{prefix}.{part}{suffix}"] for part in PARTS}
    rows, width = found["weight_hh"].shape
    return {3: "gru", 4: "lstm"}[rows // width], found


def zero_state(kind: str, width: int) -> State:
    return [np.zeros(width) for _ in range(2 if kind == "lstm" else 1)]


def run_rnn(
    weights: Mapping[str, Array], prefix: str, xs: Sequence[Array], layers: int, bidirectional: bool
) -> tuple[list[Array], list[State]]:
    """torch.nn.LSTM or GRU: outputs [S, M] of the top layer; every layer's last state, directions side by side."""
    finals = []
    outputs = list(xs)
    for layer in range(layers):
        found, ends = [], []
        for suffix in ("", "_reverse")[: 1 + bidirectional]:
            kind, cell = torch_cell(weights, prefix, f"_l{layer}{suffix}")
            state, hs = zero_state(kind, cell["weight_hh"].shape[1]), []
            for x in outputs[::-1] if suffix else outputs:
                state = new_state(kind, cell, x, state)
                hs.append(state[0])
            found.append(hs[::-1] if suffix else hs)
            ends.append(state)
        outputs = [np.concatenate(both) for both in zip(*found, strict=True)]
        finals.append([np.concatenate(both) for both in zip(*ends, strict=True)])
    return outputs, finals


class PlainJoeynmt:
    """
    Args:
        state: a checkpoint's `model_state`.
        model: the configuration's `model`.
    """

    def __init__(self, state: Mapping[str, torch.Tensor], model: Mapping[str, Any]):
        self.weights = to_numpy(state)
        self.encoder, self.decoder = model["encoder"], model["decoder"]
        self.shared = model.get("tied_embeddings", False)

    def embed(self, side: str, part: Mapping[str, Any], index: int) -> Array:
        if self.shared:
            side, part = "src", self.encoder  # one object does for both sides
        row = self.weights[f"{side}_embed.lut.weight"][index]
        return row * math.sqrt(len(row)) if part["embeddings"].get("scale") else row

    def first(self, source: Sequence[int]) -> tuple[list[Array], list[State], Array]:
        """The memory, the decoder's first state and the first attentional vector."""
        xs = [self.embed("src", self.encoder, index) for index in source]
        memory, finals = run_rnn(self.weights, "encoder.rnn", xs, self.encoder["num_layers"], bidirectional=True)
        last = finals[-1][0]
        kind, cell = torch_cell(self.weights, "decoder.rnn", "_l0")
        width = cell["weight_hh"].shape[1]
        option = self.decoder.get("init_hidden", "bridge")
        if option == "bridge":
            h = np.tanh(self.weights["decoder.bridge_layer.weight"] @ last + self.weights["decoder.bridge_layer.bias"])
        elif option == "last":
            h = last[:width]
        else:
            h = np.zeros(width)
        states = [[h, h] if kind == "lstm" else [h] for _ in range(self.decoder["num_layers"])]
        return memory, states, np.zeros(width)

    def step(
        self, token: int, memory: Sequence[Array], states: Sequence[State], fed: Array
    ) -> tuple[Array, list[State], Array]:
        """Scores [V], the new states and attentional vector."""
        x = self.embed("trg", self.decoder, token)
        if self.decoder.get("input_feeding", True):
            x = np.concatenate([x, fed])
        new = []
        for layer, state in enumerate(states):
            kind, cell = torch_cell(self.weights, "decoder.rnn", f"_l{layer}")
            new.append(new_state(kind, cell, x, state))
            x = new[-1][0]
        query = x
        names = self.weights
        keys = [names["decoder.attention.key_layer.weight"] @ m for m in memory]
        if self.decoder["attention"] == "bahdanau":
            projected = names["decoder.attention.query_layer.weight"] @ query
            scores = [
                float((names["decoder.attention.energy_layer.weight"] @ np.tanh(projected + k))[0]) for k in keys
            ]
        else:
            scores = [float(query @ k) for k in keys]
        context = softmax(np.array(scores)) @ np.stack(list(memory))
        joined = np.concatenate([query, context])
        fed = np.tanh(names["decoder.att_vector_layer.weight"] @ joined + names["decoder.att_vector_layer.bias"])
        return names["decoder.output_layer.weight"] @ fed, new, fed

    def logits(self, source: Sequence[int], target: Sequence[int]) -> Array:
        """[T, V]; `target` is what the decoder reads."""
        memory, states, fed = self.first(source)
        rows = []
        for token in target:
            scores, states, fed = self.step(token, memory, states, fed)
            rows.append(scores)
        return np.stack(rows)

    def allowed(self, scores: Array, step: int) -> Array:
        scores = scores.copy()
        scores[[BOS, PAD]] = -np.inf
        if step < 1:
            scores[EOS] = -np.inf
        return scores

    def greedy(self, source: Sequence[int], longest: int) -> list[int]:
        memory, states, fed = self.first(source)
        tokens = [BOS]
        while len(tokens) <= longest and tokens[-1] != EOS:
            scores, states, fed = self.step(tokens[-1], memory, states, fed)
            tokens.append(int(self.allowed(scores, len(tokens) - 1).argmax()))
        return tokens[1:]

    def beam(self, source: Sequence[int], size: int, alpha: float, longest: int) -> list[tuple[float, list[int]]]:
        """`joeynmt.search.beam_search` of one sentence: all hypotheses that it has found, the best first."""
        memory, states, fed = self.first(source)
        beams = [(0.0, [BOS], states, fed)]
        finished = [False] * size
        found: list[tuple[float, list[int]]] = []
        for step in range(longest):
            candidates = []
            for log_probability, tokens, states, fed in beams:
                scores, new, new_fed = self.step(tokens[-1], memory, states, fed)
                rows = self.allowed(log_softmax(scores), step) + log_probability
                candidates += [(float(row), [*tokens, index], new, new_fed) for index, row in enumerate(rows)]
            beams = sorted(candidates, key=lambda candidate: -candidate[0])[:size]
            finished = [old or beam[1][-1] == EOS for old, beam in zip(finished, beams, strict=True)]
            if step + 1 == longest:
                finished = [True] * size
            penalty = ((5 + step + 1) / 6) ** alpha
            for done, (log_probability, tokens, _, _) in zip(finished, beams, strict=True):
                ends = tokens[1:].count(EOS)
                if done and ((ends == 0 and step + 1 == longest) or (ends == 1 and tokens[-1] == EOS)):
                    found.append((log_probability / penalty, tokens[1:]))
            if all(finished):
                break
        return sorted(found, key=lambda hypothesis: -hypothesis[0])
