"""The models: encoder, bridge and decoder; and with a head, a loss and generate()."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import Seq2SeqLMOutput, Seq2SeqModelOutput
from transformers.utils import can_return_tuple

from .attention import PreparedMemory
from .bridges import BRIDGES
from .cache_rnn_seq2seq import DecoderState, RnnSeq2SeqCache
from .chunked_loss import head_loss
from .configuration_rnn_seq2seq import RnnSeq2SeqConfig
from .decoder import RnnSeq2SeqDecoder
from .decoding_steps import DecodingSteps
from .encoders import RnnSeq2SeqEncoder, RnnSeq2SeqEncoderOutput
from .generation_rnn_seq2seq import RnnSeq2SeqGenerationMixin
from .heads import HEADS, HeadInput, check_copy_ids
from .int8 import register
from .losses import IGNORED, as_logits, coverage_loss
from .pretrained_base import RnnSeq2SeqPreTrainedModel
from .recurrent_base import tokens_to_last
from .scheduled_sampling import OwnInputs, ScheduledSampling
from .signatures import with_known_signature
from .step_products import StepLinear
from .wirings import StepOutput


def shift_tokens_right(
    labels: torch.Tensor, pad_token_id: int | None, decoder_start_token_id: int | None
) -> torch.Tensor:
    """Decoder input for teacher forcing, [B, T]: the start token, then labels but the last; -100 becomes padding."""
    if pad_token_id is None or decoder_start_token_id is None:
        raise ValueError("`config.pad_token_id` and `config.decoder_start_token_id` must be set to shift labels.")
    start = labels.new_full((labels.size(0), 1), decoder_start_token_id)
    shifted = torch.cat((start, labels[:, :-1]), dim=1)
    return shifted.masked_fill(shifted == -100, pad_token_id)


@dataclass
class RnnSeq2SeqModelOutput(Seq2SeqModelOutput):
    """
    `Seq2SeqModelOutput` and what a head may want beside the features.

    Args:
        attention_weights: [B, heads, T, S], if there is attention.
        gate_input: what a head that copies decides by, [B, T, *].
        source_ids: `RnnSeq2SeqEncoderOutput`'s, [B, S].
    """

    attention_weights: torch.Tensor | None = None
    gate_input: torch.Tensor | None = None
    source_ids: torch.Tensor | None = None


@dataclass
class RnnSeq2SeqLMOutput(Seq2SeqLMOutput):
    """
    `Seq2SeqLMOutput` and what training may ask for.

    Args:
        smoothing_loss: of smoothed labels, the part of `loss` without its weight.
        scores: the head's, before `config.output_normalizer`, [B, T, V] or with `copy_ids` [B, T, V + S].
    """

    smoothing_loss: torch.Tensor | None = None
    scores: torch.Tensor | None = None


class RnnSeq2SeqModel(RnnSeq2SeqPreTrainedModel):
    """Encoder, bridge and decoder, up to the features that a head would read."""

    def __init__(self, config: RnnSeq2SeqConfig):
        super().__init__(config)
        self.encoder = RnnSeq2SeqEncoder(config)
        self.bridge = BRIDGES[config.bridge_type](config)
        self.decoder = RnnSeq2SeqDecoder(config)
        shared = {"encoder.embed_tokens.weight": "decoder.embed_tokens.weight"}
        self._tied_weights_keys = shared if config.shared_vocabulary else {}
        self.post_init()

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        # transformers ties everything or nothing by `tie_word_embeddings`; here that is about the output layer, and
        # one vocabulary has one embedding table in any case.
        return dict(self._tied_weights_keys)

    def get_input_embeddings(self) -> nn.Embedding:
        """The source side's; with one vocabulary, also the target's (`get_decoder().get_input_embeddings()`)."""
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:  # type: ignore[override]
        self.encoder.set_input_embeddings(value)
        if self.config.shared_vocabulary:
            self.decoder.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: RnnSeq2SeqEncoderOutput | tuple[torch.Tensor, ...] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        scheduled_sampling: ScheduledSampling | None = None,
        step_scores: Callable[[torch.Tensor | None, StepOutput], torch.Tensor] | None = None,
        target_lengths: torch.Tensor | None = None,
    ) -> RnnSeq2SeqModelOutput:
        """
        Args:
            input_ids: source ids, [B, S].
            attention_mask: 1 at source tokens, 0 at padding on either side, [B, S]. With `encoder_outputs` it may be
                left out: they carry their own mask.
            decoder_input_ids: target ids that the decoder reads, [B, T]; with `past_key_values`, only the new ones.
            decoder_attention_mask: 1 at target tokens, [B, T] or, with a cache, [B, tokens so far + T]; the state
                passes over the rest unchanged.
            encoder_outputs: what `get_encoder()` returned, as it is or as a tuple.
            past_key_values: a [`RnnSeq2SeqCache`].
            inputs_embeds, decoder_inputs_embeds: embeddings instead of ids, [B, S, E] and [B, T, E].
            use_cache: return the state after the last token as `past_key_values`.
            output_attentions: return `cross_attentions`, a tuple of [B, heads, T, S] (empty without attention).
            output_hidden_states: return embeddings and every layer's output for both sides.
            scheduled_sampling: let the decoder read predictions of its own; `step_scores` gives their scores
                [B, 1, V] from `source_ids` and a step's output.
            target_lengths: how many of each row's target tokens are looked at, [B]. Rows may then leave the loop over
                time behind them: what is returned for later tokens may be zeros, and there is no cache.

        Returns:
            `RnnSeq2SeqModelOutput`; `last_hidden_state` holds the features, [B, T, F].
        """
        config = self.config
        use_cache = config.use_cache if use_cache is None else use_cache
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states

        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids,
                attention_mask,
                inputs_embeds,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
                return_dict=True,
            )
        encoder_outputs = self._check_encoder_outputs(encoder_outputs, attention_mask)
        memory = encoder_outputs.last_hidden_state

        if (decoder_input_ids is None) == (decoder_inputs_embeds is None):
            raise ValueError("Give exactly one of `decoder_input_ids`, `decoder_inputs_embeds` (or `labels`).")
        if decoder_inputs_embeds is None:
            decoder_inputs_embeds = self.decoder.embed_tokens(decoder_input_ids)
        if target_lengths is not None and (use_cache or past_key_values is not None):
            raise ValueError("`target_lengths` is for whole targets: it needs `use_cache=False`, without a cache.")
        if decoder_inputs_embeds.size(0) != memory.size(0):
            raise ValueError(
                f"The decoder's batch ({decoder_inputs_embeds.size(0)} rows in `decoder_input_ids`, "
                f"`decoder_inputs_embeds` or `labels`) must be the encoder's ({memory.size(0)} rows)."
            )

        cache = self._check_cache(past_key_values, memory)
        prepared, state = self._start(encoder_outputs, cache)
        mask = self._check_decoder_mask(decoder_attention_mask, decoder_inputs_embeds, cache)
        own = None
        if scheduled_sampling is not None and scheduled_sampling.probability > 0:
            assert step_scores is not None
            head = partial(step_scores, encoder_outputs.source_ids)
            own = OwnInputs(scheduled_sampling, head, config, decoder_inputs_embeds, decoder_input_ids, mask)
        output, state = self.decoder(decoder_inputs_embeds, state, prepared, mask, own, target_lengths)
        if cache is not None:
            cache.advance(state, decoder_inputs_embeds.size(1))
        elif use_cache:  # made only now, because torch.compile's loop forgets what was made before it
            cache = RnnSeq2SeqCache(state, decoder_inputs_embeds.size(1))
            cache.prepared(memory, lambda: prepared)
        heads = self.decoder.wiring.attention.num_heads
        return RnnSeq2SeqModelOutput(
            last_hidden_state=output.features,
            past_key_values=cache if use_cache else None,  # type: ignore[arg-type]  # transformers declares one kind
            decoder_hidden_states=(decoder_inputs_embeds, *output.layer_outputs) if output_hidden_states else None,
            cross_attentions=((output.weights,) if heads else ()) if output_attentions else None,
            encoder_last_hidden_state=memory,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
            attention_weights=output.weights if heads else None,
            gate_input=output.gate_input if self.decoder.wiring.copies else None,
            source_ids=encoder_outputs.source_ids,
        )

    def _start(
        self, encoder_outputs: RnnSeq2SeqEncoderOutput, cache: RnnSeq2SeqCache | None
    ) -> tuple[PreparedMemory, DecoderState]:
        """The prepared source, and the state before the first new token: the cache's, else the bridge's."""
        memory, wiring = encoder_outputs.last_hidden_state, self.decoder.wiring

        def prepare() -> PreparedMemory:
            return wiring.attention.prepare(memory, encoder_outputs.memory_mask, encoder_outputs.memory_keys)

        prepared = prepare() if cache is None else cache.prepared(memory, prepare)
        if cache is None or cache.state is None:
            return prepared, wiring.first_state(self.bridge(encoder_outputs), prepared)
        return prepared, cache.state

    # Refusals. They look at shapes and types only, so none waits for a GPU or breaks a compiled graph.

    @staticmethod
    def _check_encoder_outputs(
        output: RnnSeq2SeqEncoderOutput | tuple[torch.Tensor, ...], attention_mask: torch.Tensor | None
    ) -> RnnSeq2SeqEncoderOutput:
        if isinstance(output, tuple):
            output = RnnSeq2SeqEncoderOutput(*output)  # type: ignore[arg-type]  # tensors, then tuples of them
        # By name: an output may come from another copy of this code, or be another model's.
        names = ("last_hidden_state", "final_state", "memory_mask", "hidden_states", "attentions")
        memory, final_state, memory_mask, *others = (
            getattr(output, name, None) for name in (*names, "memory_keys", "source_ids")
        )
        if memory is None or final_state is None:
            raise ValueError(
                "`encoder_outputs` must be what `model.get_encoder()(...)` returns: `last_hidden_state` and "
                f"`final_state` are needed, got {type(output).__name__} without."
            )
        if memory_mask is None and attention_mask is not None:
            memory_mask = attention_mask.to(torch.bool)
        if memory_mask is None:
            memory_mask = memory.new_ones(memory.shape[:2], dtype=torch.bool)
        if memory_mask.shape != memory.shape[:2]:
            raise ValueError(
                f"`encoder_outputs.memory_mask` has shape {tuple(memory_mask.shape)}, but the encoder's output is "
                f"[batch, length] = {tuple(memory.shape[:2])}."
            )
        if attention_mask is not None and attention_mask.size(0) != memory.size(0):
            raise ValueError(
                f"`attention_mask` has {attention_mask.size(0)} rows, `encoder_outputs` {memory.size(0)}."
            )
        return RnnSeq2SeqEncoderOutput(memory, final_state, memory_mask, *others)

    @staticmethod
    def _check_cache(cache: Cache | None, memory: torch.Tensor) -> RnnSeq2SeqCache | None:
        """Our cache, or `None` for an empty foreign one, as generate() or a user may hand in."""
        if cache is None:
            return None
        if type(cache).__name__ != "RnnSeq2SeqCache":
            if type(cache).__name__ in ("DynamicCache", "EncoderDecoderCache") and cache.get_seq_length() == 0:
                return None
            raise ValueError(
                f"`past_key_values` must be a RnnSeq2SeqCache, got {type(cache).__name__}: a recurrent state has no "
                "keys and values to quantise, crop or make static."
            )
        if cache.batch_size not in (-1, memory.size(0)):
            raise ValueError(
                f"`past_key_values` holds {cache.batch_size} rows, the encoder's output {memory.size(0)}."
            )
        return cast(RnnSeq2SeqCache, cache)  # by name: it may come from another copy of this code

    @staticmethod
    def _check_decoder_mask(
        mask: torch.Tensor | None, embeds: torch.Tensor, cache: RnnSeq2SeqCache | None
    ) -> torch.Tensor | None:
        if mask is None:
            return None
        batch, length = embeds.shape[:2]
        past = 0 if cache is None else cache.get_seq_length()
        if mask.dim() != 2 or mask.size(0) != batch or mask.size(1) not in (length, past + length):
            raise ValueError(
                f"`decoder_attention_mask` must have shape [batch, target length] = {(batch, length)}"
                + (f" or, with the cached tokens, {(batch, past + length)}" if past else "")
                + f", got {tuple(mask.shape)}."
            )
        return mask[:, -length:].to(torch.bool)


class RnnSeq2SeqForConditionalGeneration(RnnSeq2SeqPreTrainedModel, RnnSeq2SeqGenerationMixin):
    """[`RnnSeq2SeqModel`] with a head over the target vocabulary, a loss, and generate()."""

    accepts_loss_kwargs = True  # tells the Trainer to hand in `num_items_in_batch`
    decoding_steps = DecodingSteps  # this forward pass, step by step; a subclass with another one needs others
    _tied_weights_keys = {"head.output.weight": "model.decoder.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: RnnSeq2SeqConfig):
        super().__init__(config)
        self.model = RnnSeq2SeqModel(config)
        wiring = self.model.decoder.wiring
        self.head = HEADS[config.head_type](config, wiring.features_size, wiring.gate_size)
        self.loss_type = "ForMaskedLM"  # cross entropy without a shift: the decoder's input is shifted already
        self.post_init()

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        keys = dict(self._tied_weights_keys) if self.config.tie_word_embeddings else {}
        if all_submodels:
            inner = self.model.get_expanded_tied_weights_keys()
            keys.update({f"model.{key}": f"model.{value}" for key, value in inner.items()})
        return keys

    def get_output_embeddings(self) -> nn.Linear:
        return self.head.output

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        if type(new_embeddings) is nn.Linear:  # as transformers makes when it resizes
            new_embeddings.__class__ = StepLinear  # which differs in how it makes its product
        self.head.output = new_embeddings

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Used by `DataCollatorForSeq2Seq` and the Trainer's label smoothing. [B, T] -> [B, T]"""
        return shift_tokens_right(labels, self.config.pad_token_id, self.config.decoder_start_token_id)

    @with_known_signature
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: RnnSeq2SeqEncoderOutput | tuple[torch.Tensor, ...] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        copy_ids: torch.Tensor | None = None,
        smoothing: float = 0.0,
        scheduled_sampling: ScheduledSampling | None = None,
        skip_logits: bool = False,
        output_scores: bool = False,
    ) -> RnnSeq2SeqLMOutput:
        """
        [`RnnSeq2SeqModel.forward`]'s arguments, and

        Args:
            labels: target ids, [B, T], -100 where no loss is wanted. Without decoder inputs, these are made by
                shifting them right.
            num_items_in_batch: number of labels in all of an accumulated batch, by which the loss is then divided.
            copy_ids: for a head that copies, the target id of every source position, [B, S]. Ids from V to
                V + S - 1 are words of this row's source that the vocabulary lacks, in `labels` and
                `decoder_input_ids`, too; the decoder reads `config.unk_token_id` for them. At padding any id will do.
                A [`RnnSeq2SeqTokenizer`] with `copies_source=True` makes them; with one vocabulary, `input_ids` serve.
            smoothing: share of every label's mass that goes to all words alike, see `smoothing_loss`.
            scheduled_sampling: in training, let the decoder read some predictions of its own.
            skip_logits: return the loss without `logits`, which are then never all in memory (see `head_loss`).
            output_scores: return `scores` as well, from which `logits` are made.

        Returns:
            `RnnSeq2SeqLMOutput`; `loss` is the mean over the labels of `config.output_normalizer`'s loss (for softmax,
            cross entropy) plus the weighted coverage loss; `logits`, [B, T, V] or with `copy_ids` [B, T, V + S], are
            scores before a softmax, or log-probabilities where there is another normaliser or a head that copies.
        """
        if labels is not None:
            use_cache = False
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        elif skip_logits:
            raise ValueError("`skip_logits=True` leaves the loss alone, which needs `labels`.")
        if copy_ids is not None and not self.head.copies:
            raise ValueError(
                f"`copy_ids` is for a head that copies, but `config.head_type` is {self.config.head_type!r}."
            )
        if self.head.copies and decoder_input_ids is not None:
            outside = decoder_input_ids >= self.config.vocab_size
            decoder_input_ids = decoder_input_ids.masked_fill(outside, cast(int, self.config.unk_token_id))
        only_loss = skip_logits and past_key_values is None
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            scheduled_sampling=scheduled_sampling,
            step_scores=partial(self._scores, copy_ids=copy_ids),
            return_dict=True,
            target_lengths=self._label_lengths(labels, output_attentions, output_hidden_states) if only_loss else None,
        )
        parts = StepOutput(outputs.last_hidden_state, outputs.attention_weights, outputs.gate_input, ())
        inputs = self._head_input(outputs.source_ids, parts, copy_ids)
        scores = None if skip_logits else self.head(inputs)
        loss = smoothing_part = None
        if labels is not None:
            loss, smoothing_part = head_loss(
                self.head, inputs, scores, labels, self.config, self.loss_function, num_items_in_batch, smoothing
            )
            if self.config.coverage_loss_weight > 0:
                weights = outputs.attention_weights
                if decoder_attention_mask is not None:  # no attention is paid at padding
                    weights = weights * decoder_attention_mask[:, None, -labels.size(1) :, None]
                loss = loss + self.config.coverage_loss_weight * coverage_loss(weights, labels, num_items_in_batch)
        return RnnSeq2SeqLMOutput(
            loss=loss,
            logits=None if scores is None else as_logits(scores, self.config.output_normalizer),
            past_key_values=outputs.past_key_values,
            decoder_hidden_states=outputs.decoder_hidden_states,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
            smoothing_loss=smoothing_part,
            scores=scores if output_scores else None,
        )

    def _label_lengths(
        self, labels: torch.Tensor | None, output_attentions: bool | None, output_hidden_states: bool | None
    ) -> torch.Tensor | None:
        """How many target tokens of each row the loss looks at, where rows may leave the loop behind them."""
        shown = (
            self.config.output_attentions if output_attentions is None else output_attentions,
            self.config.output_hidden_states if output_hidden_states is None else output_hidden_states,
        )
        # Elsewhere than on a CPU such rows cost less than to wait for their number; and a compiled loop has one size.
        if labels is None or any(shown) or labels.device.type != "cpu" or torch.compiler.is_compiling():
            return None
        return tokens_to_last(labels != IGNORED)

    def _head_input(
        self, source_ids: torch.Tensor | None, output: StepOutput, copy_ids: torch.Tensor | None
    ) -> HeadInput:
        copied = check_copy_ids(self.config, copy_ids, source_ids, output.weights)
        return HeadInput(output.features, output.weights, output.gate_input, *copied)

    def _scores(
        self, source_ids: torch.Tensor | None, output: StepOutput, copy_ids: torch.Tensor | None
    ) -> torch.Tensor:
        """The head's, of one step or of all."""
        return self.head(self._head_input(source_ids, output, copy_ids))


register()  # before a checkpoint whose weights are in eight bits is looked into

__all__ = ["RnnSeq2SeqForConditionalGeneration", "RnnSeq2SeqModel", "RnnSeq2SeqPreTrainedModel"]
