"""
The model once more, from the papers' equations: NumPy in float64, one row and one token at a time, unpadded.

It shares nothing with the package but the names of the parameters (`state_dict()`) and of the configuration's fields.
Shapes: S source, T target, H hidden, M memory, F features, V vocabulary.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from hf_rnn_seq2seq import RnnSeq2SeqConfig

Array = npt.NDArray[np.float64]
Weights = Mapping[str, Array]
State = list[Array]  # of one layer: [h, c] for an LSTM, [h] for the others; each [H]


def to_numpy(state_dict: Mapping[str, torch.Tensor]) -> dict[str, Array]:
    return {name: tensor.detach().cpu().numpy().astype(np.float64) for name, tensor in state_dict.items()}


def below(weights: Weights, prefix: str) -> dict[str, Array]:
    """The parameters under `prefix.`, without it."""
    return {name[len(prefix) + 1 :]: value for name, value in weights.items() if name.startswith(prefix + ".")}


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def log_softmax(x: Array) -> Array:
    shifted = x - x.max()
    return shifted - math.log(np.exp(shifted).sum())


def normalised(weights: Weights, name: str, x: Array, gates: int) -> Array:
    """Ba et al. 2016, eq. 4, for each gate by itself."""
    parts = np.stack(np.split(x, gates))
    parts = (parts - parts.mean(1, keepdims=True)) / np.sqrt(parts.var(1, keepdims=True) + 1e-5)
    return weights[f"{name}.weight"] * parts.reshape(-1) + weights[f"{name}.bias"]


def normalised_together(weights: Weights, name: str, x: Array, groups: Sequence[int]) -> Array:
    """The same over the units of several gates at once: groups of so many gates, which all gates are thirds of x."""
    parts = np.split(x, np.cumsum(groups)[:-1] * (len(x) // sum(groups)))
    flat = np.concatenate([(part - part.mean()) / np.sqrt(part.var() + 1e-5) for part in parts])
    return weights[f"{name}.weight"] * flat + weights[f"{name}.bias"]


def new_state(cell_type: str, weights: Weights, x: Array, state: State, h_mask: Array | None = None) -> State:
    """
    One step of a cell: `x` [D], the old state, and Gal & Ghahramani's (2016) mask, which drops h_{t-1} wherever it
    enters a gate, but neither the memory cell nor what a GRU carries over.
    """
    h = state[0]
    if cell_type == "ssru":  # no product with h, so nothing that the mask could drop
        f, value = np.split(weights["weight_ih"] @ x, 2)
        f = sigmoid(f + weights["bias_f"])
        c = f * state[1] + (1 - f) * value
        return [np.maximum(c, 0), c]
    if cell_type in ("ln_lstm", "ln_gru"):
        gates = 4 if cell_type == "ln_lstm" else 3
        from_x = normalised(weights, "ih_norm", weights["weight_ih"] @ x, gates)
        from_h = normalised(weights, "hh_norm", weights["weight_hh"] @ (h if h_mask is None else h_mask * h), gates)
        if cell_type == "ln_lstm":
            i, f, g, o = np.split(from_x + from_h, 4)
            c = sigmoid(f) * state[1] + sigmoid(i) * np.tanh(g)
            return [sigmoid(o) * np.tanh(normalised(weights, "memory_norm", c, 1)), c]
        (x_r, x_z, x_n), (h_r, h_z, h_n) = np.split(from_x, 3), np.split(from_h, 3)
        r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)
        return [(1 - z) * np.tanh(x_n + r * h_n) + z * h]
    from_x, from_h = weights["weight_ih"] @ x, weights["weight_hh"] @ (h if h_mask is None else h_mask * h)
    if cell_type != "marian_gru":
        from_x, from_h = from_x + weights["bias_ih"], from_h + weights["bias_hh"]
    if cell_type in ("nematus_gru", "marian_gru"):
        groups = (2, 1) if cell_type == "nematus_gru" else (3,)
        from_x = normalised_together(weights, "ih_norm", from_x, groups)
        from_h = normalised_together(weights, "hh_norm", from_h, groups)
    if cell_type == "lstm":
        i, f, g, o = np.split(from_x + from_h, 4)
        c = sigmoid(f) * state[1] + sigmoid(i) * np.tanh(g)
        return [sigmoid(o) * np.tanh(c), c]
    if cell_type.endswith("gru"):
        (x_r, x_z, x_n), (h_r, h_z, h_n) = np.split(from_x, 3), np.split(from_h, 3)
        r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)
        return [(1 - z) * np.tanh(x_n + r * h_n) + z * h]
    if cell_type == "rnn_tanh":
        return [np.tanh(from_x + from_h)]
    return [np.maximum(from_x + from_h, 0)]


def cell_step(cell_type: str, weights: Weights, x: Array, state: State, zoneout: float = 0.0) -> State:
    """
    One step as in evaluation, where zoneout is its expectation (Krueger et al. 2017, section 3.2):
    z * old + (1 - z) * new for each state, the new h being made of the new c before zoneout.
    """
    new = new_state(cell_type, weights, x, state)
    return [zoneout * old + (1 - zoneout) * one for old, one in zip(state, new, strict=True)]


def zeros(cell_type: str, size: int) -> State:
    return [np.zeros(size) for _ in range(2 if cell_type in ("lstm", "ln_lstm", "ssru") else 1)]


def run_layer(
    cell_type: str, weights: Weights, xs: Sequence[Array], zoneout: float = 0.0
) -> tuple[list[Array], State]:
    """All outputs in the order of `xs`, and the state after the last."""
    size = len(weights["bias_f"]) if cell_type == "ssru" else weights["weight_hh"].shape[1]
    state = zeros(cell_type, size)
    outputs = []
    for x in xs:
        state = cell_step(cell_type, weights, x, state, zoneout)
        outputs.append(state[0])
    return outputs, state


class Encoded(NamedTuple):
    memory: list[Array]  # S of [M]
    final: list[State]  # a layer: h and, for an LSTM, c, each [M] with the forward direction first
    outputs: list[list[Array]]  # embeddings, then every layer's output


def encode(weights: Weights, config: RnnSeq2SeqConfig, source: Sequence[int]) -> Encoded:
    """`source`: the ids of one row, without padding."""
    table = weights["model.encoder.embed_tokens.weight"]
    xs = [table[token] for token in source]
    finals, outputs = [], [xs]
    for index in range(config.encoder_layers):
        layer = below(weights, f"model.encoder.body.layers.{index}.directions")
        ys, final = run_layer(config.cell_type, below(layer, "forward_layer"), xs, config.zoneout)
        if config.bidirectional:
            back, back_final = run_layer(config.cell_type, below(layer, "backward_layer"), xs[::-1], config.zoneout)
            ys = [np.concatenate(pair) for pair in zip(ys, back[::-1], strict=True)]
            final = [np.concatenate(pair) for pair in zip(final, back_final, strict=True)]
        if config.encoder_residual and index > 0:  # Wu et al. 2016, eq. 5-6
            ys = [x + y for x, y in zip(xs, ys, strict=True)]
        xs = ys
        finals.append(final)
        outputs.append(ys)
    return Encoded(xs, finals, outputs)


def bridge(weights: Weights, config: RnnSeq2SeqConfig, encoded: Encoded) -> list[State]:
    """The decoder's first state, a layer."""
    cell_type = config.decoder_cell_type or config.cell_type
    depth, size = config.decoder_layers, config.hidden_size
    first = [zeros(cell_type, size) for _ in range(depth)]
    if config.bridge_type == "zeros":
        return first
    parameters = below(weights, "model.bridge.projection")
    if config.bridge_type == "last":
        for index, states in enumerate(first):
            below_it = encoded.final[min(index, config.encoder_layers - 1)]
            for which in range(min(len(states), len(below_it))):
                value = below_it[which]
                states[which] = value if len(value) == size else parameters["weight"] @ value
        return first
    if config.bridge_type == "mean":  # Sennrich et al. 2017, section 3
        summary = sum(encoded.memory, start=np.zeros_like(encoded.memory[0])) / len(encoded.memory)
    else:  # Bahdanau et al. 2015, appendix A.2.2, with both directions
        summary = encoded.final[-1][0]
    flat = np.tanh(parameters["weight"] @ summary + parameters["bias"])
    return [list(np.split(part, len(first[0]))) for part in np.split(flat, depth)]


# What `attend` knows; tests/test_attention.py has plain implementations of the others.
ATTENTION_TYPES = ("none", "dot", "scaled_dot", "general", "additive", "normed_additive")


def attend(weights: Weights, attention_type: str, query: Array, memory: Sequence[Array]) -> tuple[Array, Array]:
    """`weights`: the attention's own. The context [M] and the attention weights [S]; both empty without attention."""
    if attention_type == "none":
        return np.zeros(0), np.zeros(0)
    scores = np.zeros(len(memory))
    for s, m in enumerate(memory):
        if attention_type == "dot":  # Luong et al. 2015, eq. 8
            scores[s] = query @ m
        elif attention_type == "scaled_dot":  # Vaswani et al. 2017, eq. 1
            scores[s] = query @ m / math.sqrt(len(query))
        elif attention_type == "general":  # Luong et al. 2015, eq. 8
            scores[s] = query @ (weights["key_projection.weight"] @ m)
        else:  # Bahdanau et al. 2015, appendix A.1.2
            v = weights["score_projection.weight"][0]
            hidden = weights["query_projection.weight"] @ query + weights["key_projection.weight"] @ m
            if attention_type == "normed_additive":  # Salimans & Kingma 2016, eq. 2, and tf/nmt's bias
                v = weights["scale"] * v / math.sqrt(float(v @ v))
                hidden = hidden + weights["bias"]
            scores[s] = v @ np.tanh(hidden)
    probabilities = np.exp(log_softmax(scores))
    context = np.zeros_like(memory[0])
    for probability, m in zip(probabilities, memory, strict=True):
        context += probability * m
    return context, probabilities


class DecoderState(NamedTuple):
    layers: list[State]
    features: Array  # of the step before; zeros before the first


class Step(NamedTuple):
    features: Array
    attention: Array
    layer_outputs: list[Array]
    state: DecoderState


def decoder_step(
    weights: Weights, config: RnnSeq2SeqConfig, token: int, state: DecoderState, memory: Sequence[Array]
) -> Step:
    """One target token. Attention's query and the readout's state are the top layer's."""
    wiring = below(weights, "model.decoder.wiring")
    attention = below(wiring, "attention")
    embedded = weights["model.decoder.embed_tokens.weight"][token]
    context = probabilities = np.zeros(0)

    x = embedded
    if config.wiring_type == "input_feeding":  # Luong et al. 2015, section 3.3
        x = np.concatenate([embedded, state.features])
    elif config.wiring_type == "bahdanau":  # Bahdanau et al. 2015, eq. 4-6
        context, probabilities = attend(attention, config.attention_type, state.layers[-1][0], memory)
        x = np.concatenate([embedded, context])

    layers, outputs = [], []
    for index, old in enumerate(state.layers):
        cell_type = config.decoder_cell_type or config.cell_type
        new = cell_step(cell_type, below(wiring, f"stack.layers.{index}"), x, old, config.zoneout)
        x = x + new[0] if config.decoder_residual and index > 0 else new[0]
        layers.append(new)
        outputs.append(x)

    if config.wiring_type == "bahdanau":  # Sennrich et al. 2017, eq. 5
        features = np.tanh(wiring["combine.0.weight"] @ np.concatenate([context, x, embedded]))
    else:
        context, probabilities = attend(attention, config.attention_type, x, memory)
        if config.attention_type == "none":
            features = x
        else:  # Luong et al. 2015, eq. 5
            features = np.tanh(wiring["combine.0.weight"] @ np.concatenate([context, x]))
    return Step(features, probabilities, outputs, DecoderState(layers, features))


def head(weights: Weights, config: RnnSeq2SeqConfig, features: Array) -> Array:
    """[F] -> logits [V]"""
    table = weights["head.output.weight"]
    if config.tie_word_embeddings:
        table = weights["model.decoder.embed_tokens.weight"]
        if table.shape[1] != len(features):
            features = weights["head.projection.weight"] @ features
    return table @ features + weights["head.output.bias"]


def first_state(weights: Weights, config: RnnSeq2SeqConfig, encoded: Encoded) -> DecoderState:
    return DecoderState(bridge(weights, config, encoded), np.zeros(config.hidden_size))


def oracle_steps(
    weights: Weights, config: RnnSeq2SeqConfig, source: Sequence[int], target: Sequence[int]
) -> list[Step]:
    """Every step of one row; `target` is what the decoder reads, beginning with the start token."""
    encoded = encode(weights, config, source)
    state = first_state(weights, config, encoded)
    steps = []
    for token in target:
        steps.append(decoder_step(weights, config, token, state, encoded.memory))
        state = steps[-1].state
    return steps


def oracle_logits(
    state_dict: Mapping[str, torch.Tensor],
    config: RnnSeq2SeqConfig,
    source_ids: Sequence[Sequence[int]],
    target_ids: Sequence[Sequence[int]],
) -> list[Array]:
    """Logits [T, V] of each row. `target_ids`: what the decoder reads; rows are unpadded, of any length."""
    weights = to_numpy(state_dict)
    rows = []
    for source, target in zip(source_ids, target_ids, strict=True):
        steps = oracle_steps(weights, config, source, target)
        rows.append(np.stack([head(weights, config, step.features) for step in steps]))
    return rows


def cross_entropy(logits: Sequence[Array], labels: Sequence[Sequence[int]], num_items: int | None = None) -> float:
    """Negative log-likelihood summed over labels other than -100, divided by their number or by `num_items`."""
    total, count = 0.0, 0
    for row, row_labels in zip(logits, labels, strict=True):
        for step, label in zip(row, row_labels, strict=True):
            if label != -100:
                total -= log_softmax(step)[label]
                count += 1
    return total / (count if num_items is None else num_items)


class Hypothesis(NamedTuple):
    tokens: tuple[int, ...]  # generated ones alone: no start token, with the end token if there is one
    log_probability: float

    def score(self, length_penalty: float) -> float:
        """
        transformers' beam score (`GenerationMixin._update_finished_beams`): the sum of log-probabilities over
        length ** length_penalty, the length being that of the generated tokens: end token in, start token out.
        """
        return self.log_probability / len(self.tokens) ** length_penalty


def all_hypotheses(
    state_dict: Mapping[str, torch.Tensor], config: RnnSeq2SeqConfig, source: Sequence[int], max_new_tokens: int
) -> list[Hypothesis]:
    """Everything generate() can return: all strings that end in EOS, and those without it of full length."""
    weights = to_numpy(state_dict)
    encoded = encode(weights, config, source)

    def grow(tokens: tuple[int, ...], last: int, state: DecoderState, total: float) -> Iterator[Hypothesis]:
        step = decoder_step(weights, config, last, state, encoded.memory)
        for token, log_probability in enumerate(log_softmax(head(weights, config, step.features))):
            hypothesis = Hypothesis((*tokens, token), total + float(log_probability))
            if token == config.eos_token_id or len(hypothesis.tokens) == max_new_tokens:
                yield hypothesis
            else:
                yield from grow(hypothesis.tokens, token, step.state, hypothesis.log_probability)

    assert config.decoder_start_token_id is not None
    return list(grow((), config.decoder_start_token_id, first_state(weights, config, encoded), 0.0))


def greedy_tokens(
    state_dict: Mapping[str, torch.Tensor], config: RnnSeq2SeqConfig, source: Sequence[int], max_new_tokens: int
) -> list[int]:
    """The most probable next token, again and again, up to and with EOS."""
    weights = to_numpy(state_dict)
    encoded = encode(weights, config, source)
    state = first_state(weights, config, encoded)
    assert config.decoder_start_token_id is not None
    tokens: list[int] = []
    last = config.decoder_start_token_id
    while len(tokens) < max_new_tokens and not (tokens and last == config.eos_token_id):
        step = decoder_step(weights, config, last, state, encoded.memory)
        state, last = step.state, int(head(weights, config, step.features).argmax())
        tokens.append(last)
    return tokens
