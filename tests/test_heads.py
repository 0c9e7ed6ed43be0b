"""Heads against plain implementations of the papers' equations, one word and one source position at a time."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import VOCABULARY, ragged_batch, tiny_config, tiny_model
from torch import nn
from transformers import AutoModelForSeq2SeqLM

from hf_rnn_seq2seq import RnnSeq2SeqConfig, RnnSeq2SeqForConditionalGeneration
from hf_rnn_seq2seq.heads import DeepHead, DeepTanhHead, Head, HeadInput, LinearHead, PointerGeneratorHead

B, T, S, FEATURES, GATE = 2, 3, 5, 7, 9
# Repeated words, and with five more ids than the vocabulary has, words outside of it; padding (0) at the end.
COPY_IDS = torch.tensor([[4, VOCABULARY, 4, 6, VOCABULARY], [VOCABULARY + 1, 7, VOCABULARY, 0, 0]])


def make_head(cls: type[Head], **setting: Any) -> Head:
    torch.manual_seed(0)
    head = cls(tiny_config(**setting), FEATURES, GATE).double()
    for parameter in head.parameters():
        nn.init.normal_(parameter)
    return head


def make_inputs(heads: int = 2, copy_ids: torch.Tensor | None = None, extra: int = 0) -> HeadInput:
    """Every tensor asks for a gradient; the weights of the last two positions of the last row are zero."""
    torch.manual_seed(1)
    scores = torch.randn(B, heads, T, S, dtype=torch.float64)
    scores[1, :, :, 3:] = -torch.inf
    return HeadInput(
        features=torch.randn(B, T, FEATURES, dtype=torch.float64).requires_grad_(),
        weights=scores.softmax(-1).requires_grad_(),
        gate_input=torch.randn(B, T, GATE, dtype=torch.float64).requires_grad_(),
        copy_ids=copy_ids,
        extra_ids=extra,
    )


def assert_same_with_gradients(head: Head, inputs: HeadInput, plain: torch.Tensor, *among: torch.Tensor) -> None:
    """The head's output is `plain`, and so are the gradients to its parameters and to tensors `among` its input."""
    output = head(inputs)
    torch.testing.assert_close(output, plain, rtol=0, atol=1e-10)
    direction = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    wanted = [*head.parameters(), *among]
    got = torch.autograd.grad(output, wanted, direction, retain_graph=True)
    expected = torch.autograd.grad(plain, wanted, direction)
    assert all(gradient.abs().max() > 1e-3 for gradient in expected)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("width", [None, 6, 5], ids=["default", "embedding's", "other"])
def test_deep_head(tied: bool, width: int | None) -> None:
    head = make_head(DeepHead, head_type="deep", head_hidden_size=width, tie_word_embeddings=tied)
    inputs = make_inputs()
    weights = dict(head.named_parameters())
    rows = []
    for features in inputs.features.flatten(0, 1):
        u = [row @ features for row in weights["maxout.weight"]]  # t~ of A.2.2, without bias
        t = torch.stack([torch.maximum(u[2 * j], u[2 * j + 1]) for j in range(width or 8)])
        if tied and width != 6:
            t = weights["projection.weight"] @ t
        rows.append(weights["output.weight"] @ t + weights["output.bias"])
    assert "maxout.bias" not in weights
    assert ("projection.weight" in weights) == (tied and width != 6)
    assert_same_with_gradients(head, inputs, torch.stack(rows).view(B, T, VOCABULARY), inputs.features)


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("width", [None, 6], ids=["default", "embedding's"])
def test_deep_tanh_head(norm: bool, tied: bool, width: int | None) -> None:
    """On features [c; s; x], which are 5, 8 and 6 wide."""
    torch.manual_seed(0)
    config = tiny_config(
        head_type="deep_tanh",
        head_hidden_size=width,
        tie_word_embeddings=tied,
        layer_norm=norm,
        attention_type="additive",
    )
    head = DeepTanhHead(config, 5 + 8 + 6, 0).double()
    for parameter in head.parameters():
        nn.init.normal_(parameter)
    features = torch.randn(B, T, 19, dtype=torch.float64).requires_grad_()
    weights = dict(head.named_parameters())
    rows = []
    for row in features.flatten(0, 1):
        parts = row.split([5, 8, 6]) if norm else [row]
        total = torch.zeros(width or 8, dtype=torch.float64)
        for index, part in enumerate(parts):
            mapped = weights[f"hidden.{index}.weight"] @ part + weights[f"hidden.{index}.bias"]
            if norm:
                own = slice(index * len(mapped), (index + 1) * len(mapped))
                centred = mapped - mapped.mean()
                mapped = weights["norm.weight"][own] * centred / (centred.square().mean() + 1e-5).sqrt()
                mapped = mapped + weights["norm.bias"][own]
            total = total + mapped
        t = torch.tanh(total)
        if tied and width != 6:
            t = weights["projection.weight"] @ t
        rows.append(weights["output.weight"] @ t + weights["output.bias"])
    inputs = HeadInput(features=features)
    assert_same_with_gradients(head, inputs, torch.stack(rows).view(B, T, VOCABULARY), features)


def plain_pointer(head: Head, inputs: HeadInput) -> torch.Tensor:
    """See et al. 2017, eq. 8 and 9, in probabilities; what is impossible gets the smallest normal float32."""
    assert inputs.copy_ids is not None
    weights = dict(head.named_parameters())
    rows = []
    for b in range(inputs.features.size(0)):
        for t in range(inputs.features.size(1)):
            p_gen = torch.sigmoid(weights["gate.weight"][0] @ inputs.gate_input[b, t] + weights["gate.bias"][0])
            scores = weights["output.weight"] @ inputs.features[b, t] + weights["output.bias"]
            exponentials = (scores - scores.max()).exp()
            p = [p_gen * e / exponentials.sum() for e in exponentials]
            p += [torch.tensor(torch.finfo(torch.float32).tiny, dtype=torch.float64)] * inputs.extra_ids
            for i, word in enumerate(inputs.copy_ids[b].tolist()):
                a = sum(inputs.weights[b, k, t, i] for k in range(inputs.weights.size(1))) / inputs.weights.size(1)
                p[word] = p[word] + (1 - p_gen) * a
            rows.append(torch.stack(p).log())
    return torch.stack(rows).unflatten(0, inputs.features.shape[:2])


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("extra", [0, S], ids=["one vocabulary", "extended"])
def test_pointer_generator_head(heads: int, extra: int) -> None:
    head = make_head(PointerGeneratorHead, head_type="pointer_generator")
    inputs = make_inputs(heads, COPY_IDS if extra else COPY_IDS.clamp(max=VOCABULARY - 1), extra)
    output = head(inputs)
    assert output.shape == (B, T, VOCABULARY + extra)
    plain = plain_pointer(head, inputs)
    # The weights' own gradient is meant along directions that keep their sum: through the softmax that made them.
    logits = torch.randn(B, heads, T, S, dtype=torch.float64).requires_grad_()
    soft = inputs._replace(weights=logits.masked_fill(inputs.weights == 0, -torch.inf).softmax(-1))
    torch.testing.assert_close(output, plain, rtol=0, atol=1e-10)
    torch.testing.assert_close(output.exp().sum(-1), torch.ones(B, T, dtype=torch.float64), rtol=0, atol=1e-10)
    assert_same_with_gradients(head, soft, plain_pointer(head, soft), soft.features, soft.gate_input, logits)
    # Of what is outside the vocabulary and not in the source there is nothing.
    floor = math.log(torch.finfo(torch.float32).tiny)
    assert (output[0, :, VOCABULARY + 1 :] == floor).all()


@settings(max_examples=60)
@given(
    ids=st.lists(st.integers(0, VOCABULARY + S - 1), min_size=S, max_size=S),
    weights=st.lists(st.floats(0, 1), min_size=S, max_size=S),
    total=st.sampled_from([0.0, 1e-30, 0.5, 1.0]),
    gate=st.floats(-300, 300),
    scale=st.floats(0, 300),
)
def test_pointer_probabilities_sum_to_one(
    ids: list[int], weights: list[float], total: float, gate: float, scale: float
) -> None:
    """Whatever the scores, however sure the gate, and also where attention's weights do not sum to one."""
    torch.manual_seed(0)
    head = make_head(PointerGeneratorHead, head_type="pointer_generator")
    nn.init.constant_(head.gate.bias, gate)
    nn.init.zeros_(head.gate.weight)
    a = torch.tensor(weights, dtype=torch.float64)
    a = a / a.sum() * total if a.sum() > 0 else a
    inputs = HeadInput(
        (torch.randn(1, 1, FEATURES, dtype=torch.float64) * scale).requires_grad_(),
        a.view(1, 1, 1, S).requires_grad_(),
        torch.zeros(1, 1, GATE, dtype=torch.float64).requires_grad_(),
        torch.tensor([ids]),
        S,
    )
    log_p = head(inputs)
    assert abs(log_p.exp().sum().item() - 1) < 1e-10
    log_p.sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in inputs[:3])


def test_pointer_in_low_precision_computes_in_float32() -> None:
    head = make_head(PointerGeneratorHead, head_type="pointer_generator")
    inputs = make_inputs(copy_ids=COPY_IDS, extra=S)
    exact = head(inputs)
    low = head.bfloat16()(HeadInput(*(x.detach().bfloat16() for x in inputs[:3]), COPY_IDS, S))
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.exp(), exact.float().exp(), rtol=0, atol=0.05)
    torch.testing.assert_close(low.exp().sum(-1), torch.ones(B, T), rtol=0, atol=0.02)
    single = head.float()(HeadInput(*(x.detach().float() for x in inputs[:3]), COPY_IDS, S))
    torch.testing.assert_close(single.exp().sum(-1), torch.ones(B, T), rtol=0, atol=1e-5)


def test_pointer_has_as_many_parameters_as_the_papers() -> None:
    """See et al. 2017, section 3: "1153 extra parameters" for hidden states of 256 and embeddings of 128."""
    setting: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": 256,
        "encoder_hidden_size": 256,
        "embedding_size": 128,
        "wiring_type": "context_feeding",
    }
    counts = [
        RnnSeq2SeqForConditionalGeneration(RnnSeq2SeqConfig(**setting, head_type=head_type)).num_parameters()
        for head_type in ("linear", "pointer_generator")
    ]
    assert counts[1] - counts[0] == 1153


def test_deep_head_has_as_many_parameters_as_the_papers() -> None:
    """Bahdanau et al. 2015, A.2.2: U_o [2l, n], V_o [2l, m], C_o [2l, 2n], W_o [K, l]; the bias b is ours."""
    m, n, half = 6, 8, 5  # m and n of the paper's, half is its l
    config = tiny_config(head_type="deep", wiring_type="bahdanau", head_hidden_size=half, encoder_hidden_size=n)
    head = RnnSeq2SeqForConditionalGeneration(config).head
    expected = 2 * half * (n + m + 2 * n) + VOCABULARY * half + VOCABULARY
    assert sum(parameter.numel() for parameter in head.parameters()) == expected


HEAD_SETTINGS: list[dict[str, Any]] = [
    {"head_type": "linear"},
    {"head_type": "deep"},
    {"head_type": "deep", "head_hidden_size": 5},
    {"head_type": "pointer_generator"},
]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("setting", HEAD_SETTINGS, ids=str)
def test_resizing_the_vocabulary(setting: dict[str, Any], tied: bool) -> None:
    model = tiny_model(**setting, tie_word_embeddings=tied)
    source, mask = ragged_batch([4, 2])
    before = model(source, mask, decoder_input_ids=source).logits
    model.resize_token_embeddings(VOCABULARY + 2, mean_resizing=False)
    after = model(source, mask, decoder_input_ids=source).logits
    assert after.shape[-1] == VOCABULARY + 2 == model.head.output.out_features
    difference = after[..., :VOCABULARY] - before  # of a distribution over more words, one number everywhere
    if setting["head_type"] == "pointer_generator":
        torch.testing.assert_close(after.exp().sum(-1), torch.ones(2, 4, dtype=torch.float64))
    else:
        torch.testing.assert_close(difference, torch.zeros_like(difference))
    tables = model.head.output.weight is model.get_decoder().get_input_embeddings().weight
    assert tables == tied


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("setting", HEAD_SETTINGS, ids=str)
def test_saved_heads_come_back(setting: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    model = tiny_model(**setting, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float64)
    source, mask = ragged_batch([4, 2])
    logits = [one(source, mask, decoder_input_ids=source).logits for one in (model, again)]
    assert torch.equal(*logits)


def test_heads_share_linear_heads_output_layer() -> None:
    """One way to tie: the parameters that `tie_weights` knows have the same names in every head."""
    for setting in HEAD_SETTINGS:
        head = tiny_model(**setting, tie_word_embeddings=True).head
        assert isinstance(head, LinearHead)
        assert head.output.in_features == 6
