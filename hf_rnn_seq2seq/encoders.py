"""The source side: embeddings around an encoder body, and the encoder's output type.

Shapes: B batch, S source, E embedding, M memory width, L encoder layers, N states a cell (an LSTM has two).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_rnn_seq2seq import RnnSeq2SeqConfig
from .dropout import Dropout
from .encoder_bodies import ENCODERS
from .signatures import with_known_signature


@dataclass
class RnnSeq2SeqEncoderOutput(ModelOutput):
    """
    The encoder's output. Every tensor is batch-first and a field of its own, because generate() repeats just those
    for its beams; the first three are always there.

    Args:
        last_hidden_state: the memory, [B, S, M]; zero at padding. A pyramidal encoder has a shorter S than the source.
        final_state: each layer's state after the last token, directions side by side, [B, L, N, M]; of an encoder
            without recurrence the mean of its memory, [B, 1, 1, M].
        memory_mask: true where `last_hidden_state` is to be attended to, [B, S]. An encoder that shortens the source
            returns the shortened mask.
        hidden_states: embeddings and the output of every layer, if asked for: [B, S, E], then [B, S, M] (a `gnmt`
            encoder's first layer is twice as wide).
        attentions: the self-attention weights of every layer of a transformer, if asked for, [B, heads, S, S].
        memory_keys: what attention scores where it differs from what it averages (Gehring et al. 2017), [B, S, M].
        source_ids: what was read, [B, S], where ids were and the encoder does not shorten the source: what a pointer
            copies.
    """

    # A ModelOutput's fields need defaults; these three are always given.
    last_hidden_state: torch.Tensor = None  # type: ignore[assignment]
    final_state: torch.Tensor = None  # type: ignore[assignment]
    memory_mask: torch.Tensor = None  # type: ignore[assignment]
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    memory_keys: torch.Tensor | None = None
    source_ids: torch.Tensor | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        """All seven fields in their order, `None` where one is not there, so that each has a place of its own."""
        return tuple(getattr(self, field) for field in self.__dataclass_fields__)


class RnnSeq2SeqEncoder(nn.Module):
    """Source embeddings and an encoder body: what `model.get_encoder()` returns."""

    main_input_name = "input_ids"

    def __init__(self, config: RnnSeq2SeqConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.source_size, config.embedding_size, config.pad_token_id)
        self.embedding_dropout = Dropout(config.embedding_dropout)
        self.body = ENCODERS[config.encoder_type](config)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_tokens = value

    @with_known_signature
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> RnnSeq2SeqEncoderOutput:
        """
        Args:
            input_ids: source ids, [B, S].
            attention_mask: 1 at tokens and 0 at padding, which may stand on either side, [B, S].
            inputs_embeds: embedded source instead of ids, [B, S, E].
            output_attentions: return the self-attention weights of an encoder that has some.
            output_hidden_states: return embeddings and every layer's output.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        expected = inputs_embeds.shape[:2]
        if attention_mask is not None and attention_mask.shape != expected:
            raise ValueError(
                f"`attention_mask` must have the source's shape [batch, source length] = {tuple(expected)}, "
                f"got {tuple(attention_mask.shape)}."
            )
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        x = self.embedding_dropout(inputs_embeds)
        mask = None if attention_mask is None else attention_mask.to(torch.bool)
        if self.config.reverse_source:
            x, mask = x.flip(1), None if mask is None else mask.flip(1)
        body = self.body(x, mask, output_attentions)
        if self.config.reverse_source:  # what was read backwards is handed on in the source's order
            body = body.flip()
        return RnnSeq2SeqEncoderOutput(
            last_hidden_state=body.memory,
            final_state=body.final_state,
            memory_mask=body.mask,
            hidden_states=(inputs_embeds, *body.layer_outputs) if output_hidden_states else None,
            attentions=body.attentions or None,
            memory_keys=body.memory_keys,
            source_ids=None if self.body.shortens else input_ids,
        )
