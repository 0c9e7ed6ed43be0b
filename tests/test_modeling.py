"""Step = sequence, padded = unpadded, batched = single, cached = uncached, checkpointed = plain; refusals."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CONFIGURATIONS, batch_of, name_of, padded, ragged_batch, tiny_model
from transformers import DynamicCache, StaticCache

from hf_rnn_seq2seq import RnnSeq2SeqCache, additive_scores
from hf_rnn_seq2seq.recurrent_layers import CELLS

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
LENGTHS = [5, 1, 3]
TARGET = torch.tensor([[1, 4, 5, 6], [1, 7, 8, 3], [1, 9, 9, 4]])

every_configuration = pytest.mark.parametrize("setting", CONFIGURATIONS, ids=name_of)


def compare_logits(one: torch.Tensor, other: torch.Tensor) -> None:
    """Of [T, V] or, where source words are copied, [T, V + S], to the shorter source's."""
    width = min(one.size(-1), other.size(-1))
    torch.testing.assert_close(one[..., :width], other[..., :width], **CLOSE)
    assert all((rest[..., width:] < -80).all() for rest in (one, other))  # nothing to copy there


@every_configuration
def test_padding_and_batching_change_nothing(setting: dict[str, Any]) -> None:
    model = tiny_model(**setting)
    options = {"output_attentions": True}
    batch = batch_of(model, *ragged_batch(LENGTHS))
    alone = []
    for row, length in enumerate(LENGTHS):
        single = {name: rows[row : row + 1, :length] for name, rows in batch.items() if name != "attention_mask"}
        alone.append(model(**single, decoder_input_ids=TARGET[row : row + 1], **options))
    for side in ("right", "left", "both"):
        moved = padded(batch, LENGTHS, side)
        together = model(**moved, decoder_input_ids=TARGET, **options)
        tokens = model.get_encoder()(moved["input_ids"], moved["attention_mask"]).memory_mask
        for row, single in enumerate(alone):
            compare_logits(together.logits[row], single.logits[0])
            for weights, expected in zip(together.cross_attentions, single.cross_attentions, strict=True):
                torch.testing.assert_close(weights[row][..., tokens[row]], expected[0], **CLOSE)
                assert (weights[row][..., ~tokens[row]] == 0).all()


@every_configuration
def test_attention_sums_to_one(setting: dict[str, Any]) -> None:
    model = tiny_model(**setting)
    source, mask = ragged_batch(LENGTHS)
    out = model(**batch_of(model, source, mask), decoder_input_ids=TARGET, output_attentions=True)
    assert len(out.cross_attentions) == (setting["attention_type"] != "none")
    for weights in out.cross_attentions:
        assert weights.shape[:3] == (3, setting.get("attention_heads", 1), 4)
        assert (weights >= 0).all()
        total = weights.sum(-1)
        one = (total - 1).abs() < 1e-10
        # hard monotonic attention stops at one position, or has come to the end
        assert (one | (total == 0)).all() if setting["attention_type"] == "monotonic" else one.all()


@every_configuration
def test_steps_equal_the_sequence(setting: dict[str, Any]) -> None:
    model = tiny_model(**setting)
    source, mask = ragged_batch(LENGTHS)
    batch = batch_of(model, source, mask)
    whole = model(**batch, decoder_input_ids=TARGET, output_hidden_states=True)
    cache, logits = None, []
    for part in (TARGET[:, :1], TARGET[:, 1:3], TARGET[:, 3:]):
        out = model(**batch, decoder_input_ids=part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole.logits, **CLOSE)
    assert cache.get_seq_length() == 4
    for one, other in zip(cache.state.tensors(), whole.past_key_values.state.tensors(), strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    sizes = [hidden.shape[-1] for hidden in whole.decoder_hidden_states]
    assert sizes == [model.config.target_embedding_size] + [8] * setting["decoder_layers"]
    assert len(whole.encoder_hidden_states) == 1 + model.config.encoder_layers


@every_configuration
def test_left_padded_targets_equal_unpadded(setting: dict[str, Any]) -> None:
    """Prompts of different lengths in one batch: padding in front leaves the state alone."""
    model = tiny_model(**setting)
    source, _ = ragged_batch([4, 4])
    target = torch.tensor([[1, 4, 5, 6], [0, 0, 1, 7]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    batch = batch_of(model, source)
    first, second = ({name: value[row : row + 1] for name, value in batch.items()} for row in (0, 1))
    together = model(**batch, decoder_input_ids=target, decoder_attention_mask=mask).logits
    torch.testing.assert_close(together[0], model(**first, decoder_input_ids=target[:1]).logits[0], **CLOSE)
    alone = model(**second, decoder_input_ids=target[1:, 2:]).logits
    torch.testing.assert_close(together[1, 2:], alone[0], **CLOSE)
    # a mask that covers the cached tokens, too, as generate() hands it on
    begun = model(**batch, decoder_input_ids=target[:, :2], decoder_attention_mask=mask[:, :2], use_cache=True)
    rest = model(
        **batch,
        decoder_input_ids=target[:, 2:],
        decoder_attention_mask=mask,
        past_key_values=begun.past_key_values,
    )
    torch.testing.assert_close(rest.logits, together[:, 2:], **CLOSE)


@every_configuration
def test_gradient_checkpointing_changes_nothing(setting: dict[str, Any]) -> None:
    recurrent = 0.0 if "ssru" in (setting["cell_type"], setting["decoder_cell_type"]) else 0.3
    model = tiny_model(**setting, recurrent_dropout=recurrent, output_dropout=0.3).train()
    batch = batch_of(model, *ragged_batch(LENGTHS))

    def gradients() -> dict[str, torch.Tensor]:
        """A decoder blind to the source leaves the encoder's out, or makes them zero."""
        model.zero_grad()
        torch.manual_seed(5)
        model(**batch, labels=TARGET).loss.backward()
        return {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for name, parameter in model.named_parameters()
        }

    plain = gradients()
    for reentrant in (True, False):
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        torch.testing.assert_close(gradients(), plain, **CLOSE)


@every_configuration
def test_every_parameter_is_used(setting: dict[str, Any]) -> None:
    model = tiny_model(**setting).train()
    source, mask = ragged_batch(LENGTHS)
    model(**batch_of(model, source, mask), labels=TARGET).loss.backward()
    unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    # Decoders that never look at the source have an encoder for nothing; that is the setting's own fault.
    blind = setting["attention_type"] == "none" and setting["bridge_type"] in ("zeros", "learned")
    assert unused == [] or (blind and all(name.startswith("model.encoder") for name in unused))


@pytest.mark.parametrize("cell", CELLS)
def test_loop_equals_fused(cell: str) -> None:
    """The loop that recurrent dropout and zoneout take, at rates that do nothing, against torch's kernel."""
    torch.manual_seed(0)
    layer = CELLS[cell](5, 4).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x, mask = torch.randn(3, 6, 5).double(), torch.tensor([[1] * 6, [0] * 2 + [1] * 3 + [0], [0] * 6]).bool()
    for m in (mask, None):
        fused, fused_state = layer(x, None, m)
        looped, looped_state = layer._forward_by_steps(x, layer.zero_state(x), m)
        torch.testing.assert_close(looped, fused, **CLOSE)
        for one, other in zip(looped_state, fused_state, strict=True):
            torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_pass_padding_by(cell: str) -> None:
    torch.manual_seed(0)
    layer = CELLS[cell](5, 4).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(1, 3, 5).double()
    padded = torch.cat((torch.randn(1, 2, 5).double(), x, torch.randn(1, 1, 5).double()), 1).requires_grad_()
    mask = torch.tensor([[0, 0, 1, 1, 1, 0]]).bool()
    gradients = []
    for inputs, m in ((x, None), (padded, mask)):
        layer.zero_grad()
        outputs, state = layer(inputs, None, m)
        (outputs.pow(2).sum() + sum(value.sin().sum() for value in state)).backward()
        gradients.append([parameter.grad.clone() for parameter in layer.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    assert (padded.grad[~mask] == 0).all()
    assert (padded.grad[mask] != 0).any()


@pytest.mark.parametrize("attention_type", ["additive", "normed_additive"])
def test_energies_in_parts_equal_the_whole(attention_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(attention_type=attention_type, wiring_type="output_only")
    source, mask = ragged_batch(LENGTHS)
    seen = []
    for limit in (2**26, 2 * 3 * 5 * 8, 1):  # all, two target positions, one
        monkeypatch.setattr(additive_scores, "NUMBERS_AT_ONCE", limit // torch.get_num_threads())
        model.zero_grad()
        out = model(source, attention_mask=mask, labels=TARGET)
        out.logits.sin().sum().backward()
        seen.append([out.logits.detach(), *(p.grad for p in model.parameters())])
    for parts in seen[1:]:
        for one, other in zip(parts, seen[0], strict=True):
            torch.testing.assert_close(one, other, **CLOSE)


def test_variational_dropout_keeps_its_mask() -> None:
    """One mask for a whole sequence: a unit that is dropped stays dropped (Gal & Ghahramani 2016)."""
    torch.manual_seed(0)
    layer = CELLS["rnn_relu"](2, 64, recurrent_dropout=0.5).train()
    with torch.no_grad():
        layer.weight_ih.fill_(1)
        layer.weight_hh.copy_(torch.eye(64))
        layer.bias_ih.zero_()
        layer.bias_hh.zero_()
    # Each unit adds 2 a step to what the mask lets through of itself: 0 if dropped, doubled if kept.
    outputs, _ = layer(torch.ones(1, 4, 2))
    kept = outputs[0, 1] > 2.5
    assert 10 < kept.sum() < 54
    assert torch.equal(outputs[0, 3] > 2.5, kept)
    assert (outputs[0, 3][~kept] == 2).all()


def test_a_source_of_padding_alone_is_finite() -> None:
    for setting in CONFIGURATIONS[:40]:
        model = tiny_model(**setting)
        source, mask = ragged_batch([3, 2])
        mask[1] = 0
        batch = batch_of(model, source, mask)
        out = model(**batch, labels=TARGET[:2], output_attentions=True)
        assert torch.isfinite(out.logits).all()
        assert torch.isfinite(out.loss)
        assert all((weights[1] == 0).all() for weights in out.cross_attentions)
        generated = model.generate(**batch, max_new_tokens=3)
        alone = model.generate(**{name: value[:1] for name, value in batch.items()}, max_new_tokens=3)
        assert generated[0].tolist()[: alone.size(1)] == alone[0].tolist()


@pytest.mark.parametrize("wiring", ["output_only", "input_feeding"])
def test_long_sources_and_targets(wiring: str) -> None:
    model = tiny_model(wiring_type=wiring).float()
    source = torch.randint(3, 13, (1, 5000))
    target = torch.randint(3, 13, (1, 5000))
    with torch.no_grad():
        logits = model(source, decoder_input_ids=target[:, : 5000 if wiring == "output_only" else 50]).logits
        assert torch.isfinite(logits).all()
        assert torch.isfinite(model(source[:, :3], decoder_input_ids=target).logits).all()


@given(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4), side=st.sampled_from(["right", "left", "both"]))
@settings(max_examples=25)
def test_padding_changes_nothing_for_any_lengths(lengths: list[int], side: str) -> None:
    model = tiny_model(encoder_layers=2, bridge_type="last")
    source, mask = ragged_batch(lengths, side)
    together = model(source, attention_mask=mask, decoder_input_ids=source).logits
    for row in range(len(lengths)):
        ids = source[row][mask[row].bool()].unsqueeze(0)
        alone = model(ids, decoder_input_ids=source[row : row + 1]).logits
        torch.testing.assert_close(together[row], alone[0], **CLOSE)


# Arguments


def test_embeddings_and_encoder_outputs_stand_for_ids() -> None:
    for setting in ({}, {"source_vocab_size": 11, "decoder_embedding_size": 7, "cell_type": "gru"}):
        model = tiny_model(**setting)
        source, mask = ragged_batch(LENGTHS)
        expected = model(source, attention_mask=mask, decoder_input_ids=TARGET).logits
        embedded = model.get_input_embeddings()(source)
        target = model.get_decoder().get_input_embeddings()(TARGET)
        same = model(inputs_embeds=embedded, attention_mask=mask, decoder_inputs_embeds=target).logits
        assert torch.equal(same, expected)
        encoded = model.get_encoder()(source, attention_mask=mask)
        for outputs in (encoded, encoded.to_tuple(), model.get_encoder()(source, mask, return_dict=False)):
            same = model(encoder_outputs=outputs, attention_mask=mask, decoder_input_ids=TARGET).logits
            assert torch.equal(same, expected)
        assert torch.equal(model(encoder_outputs=encoded, decoder_input_ids=TARGET).logits, expected)


def test_tuple_output_has_the_same_values() -> None:
    model = tiny_model()
    source, _ = ragged_batch([4])
    named = model(source, labels=source, output_attentions=True, output_hidden_states=True)
    plain = model(source, labels=source, output_attentions=True, output_hidden_states=True, return_dict=False)
    assert isinstance(plain, tuple)
    assert torch.equal(plain[0], named.loss)
    assert torch.equal(plain[1], named.logits)
    assert len(plain) == len(named.to_tuple())


def test_configuration_can_ask_for_attentions() -> None:
    model = tiny_model()
    model.config.output_attentions = True
    model.config.output_hidden_states = True
    source, _ = ragged_batch([4])
    out = model(source, decoder_input_ids=source)
    assert out.cross_attentions[0].shape == (1, 1, 4, 4)
    assert len(out.encoder_hidden_states) == len(out.decoder_hidden_states) == 2


def test_loss_is_cross_entropy_over_labels() -> None:
    model = tiny_model()
    source, mask = ragged_batch(LENGTHS)
    labels = TARGET.masked_fill(torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1]]).bool(), -100)
    out = model(source, attention_mask=mask, labels=labels)
    log_probabilities = torch.log_softmax(out.logits.float(), -1)
    kept = labels != -100
    expected = -log_probabilities[kept].gather(1, labels[kept].unsqueeze(1)).double()
    torch.testing.assert_close(out.loss.double(), expected.mean(), rtol=0, atol=1e-6)
    accumulated = model(source, attention_mask=mask, labels=labels, num_items_in_batch=20).loss
    torch.testing.assert_close(accumulated.double(), expected.sum() / 20, rtol=0, atol=1e-6)
    shifted = model.prepare_decoder_input_ids_from_labels(labels)
    assert shifted.tolist() == [[1, 1, 4, 5], [1, 1, 7, 0], [1, 1, 9, 9]]
    assert torch.equal(model(source, attention_mask=mask, decoder_input_ids=shifted).logits, out.logits)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, ["input_ids", "inputs_embeds"]),
        ({"input_ids": torch.ones(2, 3).long()}, ["decoder_input_ids", "labels"]),
        (
            {"input_ids": torch.ones(2, 3).long(), "decoder_input_ids": torch.ones(3, 2).long()},
            ["decoder_input_ids", "3", "2"],
        ),
        ({"input_ids": torch.ones(2, 3).long(), "labels": torch.ones(1, 2).long()}, ["labels", "1", "2"]),
        (
            {"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.ones(2, 4)},
            ["attention_mask", "(2, 3)", "(2, 4)"],
        ),
        (
            {"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.ones(1, 3)},
            ["attention_mask", "(2, 3)", "(1, 3)"],
        ),
        (
            {
                "input_ids": torch.ones(2, 3).long(),
                "decoder_input_ids": torch.ones(2, 2).long(),
                "decoder_attention_mask": torch.ones(2, 5),
            },
            ["decoder_attention_mask", "(2, 2)", "(2, 5)"],
        ),
        (
            {
                "input_ids": torch.ones(2, 3).long(),
                "decoder_input_ids": torch.ones(2, 2).long(),
                "labels": torch.ones(2, 3).long(),
            },
            ["labels", "(2, 2)", "(2, 3)"],
        ),
        (
            {"encoder_outputs": (torch.ones(2, 3, 8).double(),), "labels": torch.ones(2, 2).long()},
            ["encoder_outputs", "final_state"],
        ),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(arguments: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as refusal:  # noqa: PT011  several words are looked for below
        tiny_model()(**arguments)
    for word in words:
        assert word in str(refusal.value)


def test_cache_of_another_batch_is_refused() -> None:
    model = tiny_model()
    source, _ = ragged_batch([3, 3])
    cache = model(source[:1], decoder_input_ids=source[:1]).past_key_values
    with pytest.raises(ValueError, match=r"`past_key_values` holds 1 rows.* 2"):
        model(source, decoder_input_ids=source, past_key_values=cache)


def test_foreign_caches() -> None:
    model = tiny_model()
    source, _ = ragged_batch([3])
    expected = model(source, decoder_input_ids=source)
    out = model(source, decoder_input_ids=source, past_key_values=DynamicCache())  # empty: replaced by ours
    assert torch.equal(out.logits, expected.logits)
    assert isinstance(out.past_key_values, RnnSeq2SeqCache)
    full = DynamicCache()
    full.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), 0)
    with pytest.raises(ValueError, match="RnnSeq2SeqCache, got DynamicCache"):
        model(source, decoder_input_ids=source, past_key_values=full)
    static = StaticCache(config=model.config, max_cache_len=4)
    with pytest.raises(ValueError, match="RnnSeq2SeqCache, got StaticCache"):
        model(source, decoder_input_ids=source, past_key_values=static)


# The cache as a value


@torch.no_grad()
@pytest.mark.parametrize("wiring", ["output_only", "input_feeding", "bahdanau"])
def test_cache_moves_as_a_whole(wiring: str) -> None:
    model = tiny_model(wiring_type=wiring, decoder_layers=2)
    source, mask = ragged_batch(LENGTHS)
    encoded = model.get_encoder()(source, mask)
    start = model(encoder_outputs=encoded, decoder_input_ids=TARGET[:, :2]).past_key_values

    def after(rows: list[int], cache: RnnSeq2SeqCache) -> torch.Tensor:
        chosen = tuple(None if tensor is None else tensor[rows] for tensor in encoded.to_tuple())
        return model(encoder_outputs=chosen, decoder_input_ids=TARGET[rows][:, 2:], past_key_values=cache).logits

    plain = after([0, 1, 2], copy.deepcopy(start))
    for rows, change in (
        ([2, 0, 0], lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0]))),
        ([2, 1], lambda cache: cache.batch_select_indices(torch.tensor([2, 1]))),
        ([0, 0, 1, 1, 2, 2], lambda cache: cache.batch_repeat_interleave(2)),
        ([0, 1, 2], lambda cache: cache.offload(0)),
    ):
        cache = copy.deepcopy(start)
        change(cache)
        assert cache.batch_size == len(rows)
        torch.testing.assert_close(after(rows, cache), plain[rows], **CLOSE)
    start.reset()
    assert start.get_seq_length() == 0
    assert start.batch_size == -1
    assert not start.is_initialized
    first = model(encoder_outputs=encoded, decoder_input_ids=TARGET[:, :2], past_key_values=start).logits
    torch.testing.assert_close(first, model(encoder_outputs=encoded, decoder_input_ids=TARGET[:, :2]).logits, **CLOSE)


def test_cache_says_what_it_cannot_do() -> None:
    model = tiny_model()
    source, _ = ragged_batch([3])
    cache = model(source, decoder_input_ids=source).past_key_values
    cache.crop(0)
    with pytest.raises(NotImplementedError, match="rolled back"):
        cache.crop(-1)
    with pytest.raises(NotImplementedError, match="keys and values"):
        cache.update(torch.ones(1), torch.ones(1), 0)


def test_keys_are_projected_once_a_source(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(attention_type="additive")
    attention, calls = model.model.decoder.wiring.attention, []
    make_keys = attention.make_keys
    monkeypatch.setattr(attention, "make_keys", lambda memory: calls.append(1) or make_keys(memory))
    source, _ = ragged_batch([3])
    model.generate(source, max_new_tokens=6, min_new_tokens=6, num_beams=2)
    assert len(calls) == 1
