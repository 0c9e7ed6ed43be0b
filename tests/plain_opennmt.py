"""
OpenNMT-py's recurrent models and its beam search written out from its code (`onmt.encoders.rnn_encoder`,
`onmt.decoders.decoder`, `onmt.modules.global_attention`, `copy_generator`, `onmt.translate.beam_search`), one sentence
and one step at a time in float64; and made-up checkpoints under its names.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch

H, WIDTH = 6, 4
SPECIAL = ["<unk>", "<blank>", "<s>", "</s>"]
SOURCE_TOKENS = [*SPECIAL, "ein", "zwei", "drei", "x", "both"]
TARGET_TOKENS = [*SPECIAL, "one", "two", "both", "three", "y", "z"]

Weights = dict[str, torch.Tensor]


def make_checkpoint(seed: int = 0, **changed: Any) -> dict[str, Any]:
    """As 3.x saves one, with these of its options and random weights."""
    opt: dict[str, Any] = {
        "model_type": "text", "model_task": "seq2seq", "encoder_type": "brnn", "decoder_type": "rnn",
        "rnn_type": "LSTM", "enc_layers": 1, "dec_layers": 1, "global_attention": "general",
        "global_attention_function": "softmax", "input_feed": 1, "bridge": False, "copy_attn": False,
        "reuse_copy_attn": False, "coverage_attn": False, "share_embeddings": False,
        "share_decoder_embeddings": False, "context_gate": None, "dropout": [0.3],
    } | changed  # fmt: skip
    both = opt["encoder_type"] == "brnn"
    tokens = {"src": SOURCE_TOKENS, "tgt": SOURCE_TOKENS if opt["share_embeddings"] else TARGET_TOKENS}
    width = H if opt["share_decoder_embeddings"] else WIDTH
    gates = 4 if opt["rnn_type"] == "LSTM" else 3
    h = H // 2 if both else H
    table = "embeddings.make_embedding.emb_luts.0.weight"
    shapes: dict[str, tuple[int, ...]] = {f"encoder.{table}": (len(tokens["src"]), width)}
    for layer in range(opt["enc_layers"]):
        for suffix in ("", "_reverse")[: 1 + both]:
            inputs = width if layer == 0 else H
            shapes |= layer_shapes(f"encoder.rnn.{{}}_l{layer}{suffix}", gates * h, inputs, h)
    if opt["bridge"]:
        for state in range(2 if gates == 4 else 1):
            total = h * opt["enc_layers"]
            shapes |= {f"encoder.bridge.{state}.weight": (total, total), f"encoder.bridge.{state}.bias": (total,)}
    shapes[f"decoder.{table}"] = (len(tokens["tgt"]), width)
    for layer in range(opt["dec_layers"]):
        inputs = H if layer else width + (H if opt["input_feed"] else 0)
        pattern = f"decoder.rnn.layers.{layer}.{{}}" if opt["input_feed"] else f"decoder.rnn.{{}}_l{layer}"
        shapes |= layer_shapes(pattern, gates * H, inputs, H)
    attn = {"linear_out.weight": (H, 2 * H)}
    if opt["global_attention"] == "general":
        attn |= {"linear_in.weight": (H, H)}
    elif opt["global_attention"] == "mlp":
        attn |= {"linear_context.weight": (H, H), "linear_query.weight": (H, H), "linear_query.bias": (H,)}
        attn |= {"v.weight": (1, H), "linear_out.bias": (H,)}
    if opt["coverage_attn"]:
        attn |= {"linear_cover.weight": (H, 1)}
    if opt["global_attention"] != "none":
        shapes |= {f"decoder.attn.{name}": shape for name, shape in attn.items()}
    generator: dict[str, tuple[int, ...]] = {"weight": (len(tokens["tgt"]), H), "bias": (len(tokens["tgt"]),)}
    if opt["copy_attn"]:
        generator = {f"linear.{name}": shape for name, shape in generator.items()}
        generator |= {"linear_copy.weight": (1, H), "linear_copy.bias": (1,)}
    random = torch.Generator().manual_seed(seed)

    def draw(shapes: dict[str, tuple[int, ...]]) -> Weights:
        return {name: torch.randn(shape, generator=random) * 0.8 for name, shape in shapes.items()}

    model, output = draw(shapes), draw(generator)
    if opt["share_embeddings"]:
        model[f"decoder.{table}"] = model[f"encoder.{table}"]
    if opt["share_decoder_embeddings"]:
        output["weight"] = model[f"decoder.{table}"]
    vocabulary = {**tokens, "data_task": "seq2seq", "decoder_start_token": "<s>"}
    return {"model": model, "generator": output, "vocab": vocabulary, "opt": argparse.Namespace(**opt), "optim": {}}


def layer_shapes(pattern: str, rows: int, inputs: int, h: int) -> dict[str, tuple[int, ...]]:
    return {
        pattern.format("weight_ih"): (rows, inputs),
        pattern.format("weight_hh"): (rows, h),
        pattern.format("bias_ih"): (rows,),
        pattern.format("bias_hh"): (rows,),
    }


class PlainOpennmt:
    """The original's computation with a checkpoint's weights."""

    def __init__(self, checkpoint: dict[str, Any]):
        self.opt = checkpoint["opt"]
        self.p = {name: value.double() for name, value in checkpoint["model"].items()}
        self.g = {name: value.double() for name, value in checkpoint["generator"].items()}
        self.tokens = checkpoint["vocab"]

    def cell(self, pattern: str, x: torch.Tensor, state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        w_ih, w_hh, b_ih, b_hh = (
            self.p[pattern.format(part)] for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        h = state[0]
        if self.opt.rnn_type == "LSTM":
            i, f, g, o = (w_ih @ x + b_ih + w_hh @ h + b_hh).chunk(4)
            c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
            return o.sigmoid() * c.tanh(), c
        (x_r, x_z, x_n), (h_r, h_z, h_n) = (w_ih @ x + b_ih).chunk(3), (w_hh @ h + b_hh).chunk(3)
        z, n = (x_z + h_z).sigmoid(), (x_n + (x_r + h_r).sigmoid() * h_n).tanh()
        return ((1 - z) * n + z * h,)

    def source_ids(self, source: str) -> list[int]:
        tokens = self.tokens["src"]
        return [tokens.index(word) if word in tokens else 0 for word in source.split()]

    def encode(self, ids: list[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The memory [S, H], and for each state tensor [layers, H]."""
        both = self.opt.encoder_type == "brnn"
        states = 2 if self.opt.rnn_type == "LSTM" else 1
        size = H // 2 if both else H
        rows = list(self.p["encoder.embeddings.make_embedding.emb_luts.0.weight"][ids])
        final: list[list[torch.Tensor]] = [[] for _ in range(states)]  # [layers * directions], as torch orders them
        for layer in range(self.opt.enc_layers):
            directions = []
            for suffix in ("", "_reverse")[: 1 + both]:
                state = tuple(torch.zeros(size, dtype=torch.float64) for _ in range(states))
                outputs = []
                for x in rows[::-1] if suffix else rows:
                    state = self.cell(f"encoder.rnn.{{}}_l{layer}{suffix}", x, state)
                    outputs.append(state[0])
                directions.append(outputs[::-1] if suffix else outputs)
                for kept, value in zip(final, state, strict=True):
                    kept.append(value)
            rows = [torch.cat(parts) for parts in zip(*directions, strict=True)]
        stacked = [torch.stack(kept) for kept in final]  # [layers * directions, size]
        if self.opt.bridge:
            for index, value in enumerate(stacked):
                weight, bias = (self.p[f"encoder.bridge.{index}.{part}"] for part in ("weight", "bias"))
                result = torch.relu(value.reshape(-1, size * self.opt.enc_layers) @ weight.t() + bias)
                stacked[index] = result.reshape(value.shape)
        if both:
            stacked = [torch.cat((value[0::2], value[1::2]), dim=1) for value in stacked]
        return torch.stack(rows), stacked

    def attend(self, query: torch.Tensor, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        name, kind = "decoder.attn.", self.opt.global_attention
        if kind == "mlp":
            wq = self.p[name + "linear_query.weight"] @ query + self.p[name + "linear_query.bias"]
            hidden = torch.stack([wq + self.p[name + "linear_context.weight"] @ m for m in memory]).tanh()
            scores = hidden @ self.p[name + "v.weight"][0]
        else:
            if kind == "general":
                projected = self.p[name + "linear_in.weight"] @ query
            scores = memory @ (projected if kind == "general" else query)
        weights = sparsemax(scores) if self.opt.global_attention_function == "sparsemax" else scores.softmax(0)
        out = self.p[name + "linear_out.weight"] @ torch.cat((weights @ memory, query))
        return (out + self.p[name + "linear_out.bias"] if kind == "mlp" else out.tanh()), weights

    def decoder(self, source: str) -> Callable[[list[int]], torch.Tensor]:
        """A function from what the decoder has read to the log-probabilities of what comes next."""
        memory, start = self.encode(self.source_ids(source))

        def scores(prefix: list[int]) -> torch.Tensor:
            states = [tuple(value[layer] for value in start) for layer in range(self.opt.dec_layers)]
            feed = torch.zeros(H, dtype=torch.float64)
            weights = torch.zeros(0)
            for token in prefix:
                token = 0 if token >= len(self.tokens["tgt"]) else token  # a copied word is read as unknown
                x = self.p["decoder.embeddings.make_embedding.emb_luts.0.weight"][token]
                if self.opt.input_feed:
                    x = torch.cat((x, feed))
                for layer, state in enumerate(states):
                    kind = f"layers.{layer}.{{}}" if self.opt.input_feed else f"{{}}_l{layer}"
                    states[layer] = self.cell(f"decoder.rnn.{kind}", x, state)
                    x = states[layer][0]
                feed = x
                if self.opt.global_attention != "none":
                    feed, weights = self.attend(x, memory)
            if not self.opt.copy_attn:
                return (self.g["weight"] @ feed + self.g["bias"]).log_softmax(0)
            return self.copying(feed, weights, source.split()).log()

        return scores

    def copying(self, hidden: torch.Tensor, weights: torch.Tensor, source: list[str]) -> torch.Tensor:
        """Probabilities of the target's words, and behind them of the source's that the target lacks, in order."""
        logits = self.g["linear.weight"] @ hidden + self.g["linear.bias"]
        logits[self.tokens["tgt"].index("<blank>")] = -torch.inf
        p_copy = (self.g["linear_copy.weight"] @ hidden + self.g["linear_copy.bias"]).sigmoid()
        p = torch.cat((logits.softmax(0) * (1 - p_copy), torch.zeros(len(source), dtype=torch.float64)))
        outside: dict[str, int] = {}
        for word, weight in zip(source, weights * p_copy, strict=True):
            if word in self.tokens["tgt"]:
                p[self.tokens["tgt"].index(word)] += weight
            else:
                p[outside.setdefault(word, len(self.tokens["tgt"]) + len(outside))] += weight
        return p


def sparsemax(scores: torch.Tensor) -> torch.Tensor:
    """Martins & Astudillo 2016, algorithm 1."""
    ordered = scores.sort(descending=True).values
    k = max(k for k in range(1, len(scores) + 1) if 1 + k * ordered[k - 1] > ordered[:k].sum())
    return (scores - (ordered[:k].sum() - 1) / k).clamp(min=0)


def plain_beam(
    scores: Callable[[list[int]], torch.Tensor], beams: int, alpha: float, start: int, end: int, longest: int
) -> list[int]:
    """`BeamSearchBase.advance` and `update_finished` for one sentence, `length_penalty: avg`, n_best 1."""
    alive: list[tuple[float, list[int]]] = [(0.0, [start])]
    finished: list[tuple[float, list[int]]] = []
    for length in range(1, longest + 1):
        candidates = [
            (score + float(value), [*prefix, token])
            for score, prefix in alive
            for token, value in enumerate(scores(prefix))
        ]
        best = sorted(candidates, key=lambda candidate: -candidate[0])[:beams]
        ended = [prefix[-1] == end or length == longest for _, prefix in best]
        finished += [
            (score / (length + 1) ** alpha, p) for (score, p), is_end in zip(best, ended, strict=True) if is_end
        ]
        if ended[0]:
            break
        alive = [one for one, is_end in zip(best, ended, strict=True) if not is_end]
    return max(finished, key=lambda one: one[0])[1]
