"""
Nematus's equations (Sennrich et al. 2017; deep transition: Miceli Barone et al. 2017) in NumPy and float64, one
sentence and one word at a time, from an archive's parameters under Nematus's names.

Written from the published code's equations, for comparison with converted models; it shares nothing with the package.
The original itself needs Theano, or TensorFlow 1, and was not run.

Shapes: H state, V vocabulary, S source, T target.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
EOS = 0


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def log_softmax(x: Array) -> Array:
    shifted = x - x.max()
    return shifted - np.log(np.exp(shifted).sum())


class PlainNematus:
    """
    Args:
        parameters: the archive's arrays.
        options: the configuration, with the Theano version's names.
    """

    def __init__(self, parameters: Mapping[str, npt.NDArray[Any]], options: Mapping[str, Any]):
        self.p = {name: np.asarray(value, dtype=np.float64) for name, value in parameters.items()}
        self.options = options
        self.layer_norm = bool(options.get("layer_normalisation"))
        self.theano = bool(options.get("theano_compat", True))
        self.layers = int(options.get("dec_depth", 1))

    def norm(self, x: Array, gain: str, shift: str) -> Array:
        if not self.layer_norm:
            return x
        return self.p[gain] * (x - x.mean()) / np.sqrt(x.var() + 1e-5) + self.p[shift]

    def update(self, h: Array, gates: Array, from_state: Array, from_input: Array) -> Array:
        """gates: what r and u are made of, [2H]; from_state is what r is for."""
        r, u = np.split(sigmoid(gates), 2)
        return u * h + (1 - u) * np.tanh(r * from_state + from_input)

    def outside(self, prefix: str, x: Array | None, h: Array, suffix: str = "") -> Array:
        """A GRU whose biases are the input's: the encoder's, the decoder's first, and of Theano all above it."""
        p, name = self.p, lambda part: f"{prefix}_{part}{suffix}"
        if x is None:
            x_gates, x_new = p[name("b")], p[name("bx")]
        else:
            x_gates = self.norm(x @ p[name("W")] + p[name("b")], name("W") + "_lns", name("W") + "_lnb")
            x_new = self.norm(x @ p[name("Wx")] + p[name("bx")], name("Wx") + "_lns", name("Wx") + "_lnb")
        gates = self.norm(h @ p[name("U")], name("U") + "_lns", name("U") + "_lnb") + x_gates
        return self.update(h, gates, self.norm(h @ p[name("Ux")], name("Ux") + "_lns", name("Ux") + "_lnb"), x_new)

    def inside(self, names: Mapping[str, str], x: Array | None, h: Array) -> Array:
        """A GRU whose biases are the state's: after attention, and of TensorFlow all above it."""
        p = self.p
        gates = self.norm(h @ p[names["U"]] + p[names["b"]], names["U"] + "_lns", names["U"] + "_lnb")
        new = self.norm(h @ p[names["Ux"]] + p[names["bx"]], names["Ux"] + "_lns", names["Ux"] + "_lnb")
        added = np.zeros_like(h)
        if x is not None:
            gates = gates + self.norm(x @ p[names["W"]], names["W"] + "_lns", names["W"] + "_lnb")
            added = self.norm(x @ p[names["Wx"]], names["Wx"] + "_lns", names["Wx"] + "_lnb")
        return self.update(h, gates, new, added)

    def encode(self, source: Sequence[int]) -> Array:
        """Annotations [S, 2H]. `source` ends with EOS."""
        embedded = self.p["Wemb"][list(source)]
        found = []
        for prefix, order in (("encoder", embedded), ("encoder_r", embedded[::-1])):
            h = np.zeros(self.p[f"{prefix}_Ux"].shape[1])
            states = []
            for x in order:
                h = self.outside(prefix, x, h)
                for depth in range(1, int(self.options.get("enc_recurrence_transition_depth", 1))):
                    h = self.outside(prefix, None, h, f"_drt_{depth}")
                states.append(h)
            found.append(states if prefix == "encoder" else states[::-1])
        return np.concatenate([np.stack(states) for states in found], axis=1)

    def first_states(self, annotations: Array) -> list[Array]:
        mapped = annotations.mean(0) @ self.p["ff_state_W"] + self.p["ff_state_b"]
        return [np.tanh(self.norm(mapped, "ff_state_ln_s", "ff_state_ln_b"))] * self.layers

    def attend(self, h: Array, annotations: Array) -> Array:
        p = self.p
        state = self.norm(h @ p["decoder_W_comb_att"], "decoder_W_comb_att_lns", "decoder_W_comb_att_lnb")
        scores = []
        for annotation in annotations:
            mapped = annotation @ p["decoder_Wc_att"] + p["decoder_b_att"]
            mapped = self.norm(mapped, "decoder_Wc_att_lns", "decoder_Wc_att_lnb")
            scores.append((np.tanh(state + mapped) @ p["decoder_U_att"])[0] + p["decoder_c_tt"][0])
        weights = np.exp(log_softmax(np.array(scores)))
        return weights @ annotations

    def step(self, word: int | None, states: list[Array], annotations: Array) -> tuple[Array, list[Array]]:
        """Scores of the next word [V], and the new states; `word` is `None` at the start."""
        p = self.p
        table = p["Wemb"] if self.options.get("tie_encoder_decoder_embeddings") else p["Wemb_dec"]
        x = np.zeros(table.shape[1]) if word is None else table[word]
        h = self.outside("decoder", x, states[0])
        context = self.attend(h, annotations)
        for depth in range(int(self.options.get("dec_base_recurrence_transition_depth", 2)) - 1):
            suffix = f"_drt_{depth}" if depth else ""
            spelt = {"U": "U_nl", "Ux": "Ux_nl", "b": "b_nl", "bx": "bx_nl", "W": "Wc", "Wx": "Wcx"}
            names = {short: f"decoder_{name}{suffix}" for short, name in spelt.items()}
            h = self.inside(names, None if depth else context, h)
        new, top = [h], h
        for level in range(2, self.layers + 1):
            prefix = f"decoder_{level}"
            if self.theano:
                h = self.outside(prefix, top, states[level - 1])
            else:
                names = {short: f"{prefix}_{short}" for short in ("U", "Ux", "b", "bx", "W", "Wx")}
                h = self.inside(names, top, states[level - 1])
            new.append(h)
            top = top + h
        hidden = np.zeros(p["ff_logit_lstm_W"].shape[1])
        for part, value in (("lstm", top), ("prev", x), ("ctx", context)):
            name = f"ff_logit_{part}"
            hidden = hidden + self.norm(value @ p[f"{name}_W"] + p[f"{name}_b"], f"{name}_ln_s", f"{name}_ln_b")
        output = table.T if self.options.get("tie_decoder_embeddings") else p["ff_logit_W"]
        return np.tanh(hidden) @ output + p["ff_logit_b"], new

    def logits(self, source: Sequence[int], target: Sequence[int]) -> Array:
        """Scores [T, V] of every word of `target` from those before it."""
        annotations = self.encode(source)
        states, rows = self.first_states(annotations), []
        for word in [None, *target[:-1]]:
            row, states = self.step(word, states, annotations)
            rows.append(row)
        return np.stack(rows)

    def greedy(self, source: Sequence[int], longest: int) -> list[int]:
        return beam_search(self, source, 1, longest)

    def beam(self, source: Sequence[int], width: int, longest: int) -> list[int]:
        return beam_search(self, source, width, longest)


def beam_search(model: Any, source: Sequence[int], width: int, longest: int) -> list[int]:
    """
    The best finished sentence by the sum of log-probabilities, EOS included. `width` unfinished ones live on at every
    step, of the 2 * `width` best extensions, as in transformers; `model` has `encode`, `first_states` and `step`.
    """
    step: Callable[..., tuple[Array, Any]] = model.step
    annotations = model.encode(source)
    live: list[tuple[float, list[int], Any]] = [(0.0, [], model.first_states(annotations))]
    done: list[tuple[float, list[int]]] = []
    while live:
        extended = []
        for total, words, states in live:
            row, new = step(words[-1] if words else None, states, annotations)
            extended += [(total + score, [*words, word], new) for word, score in enumerate(log_softmax(row))]
        extended.sort(key=lambda one: -one[0])
        best = extended[: 2 * width]
        done += [(total, words) for total, words, _ in best[:width] if words[-1] == EOS]
        live = [one for one in best if one[1][-1] != EOS][:width]
        done = sorted(done, key=lambda one: -one[0])[:width]
        if len(live[0][1]) == longest:
            done += [(total, words) for total, words, _ in live]
            break
        if len(done) == width and done[-1][0] >= live[0][0]:
            break
    return max(done, key=lambda one: one[0])[1]
