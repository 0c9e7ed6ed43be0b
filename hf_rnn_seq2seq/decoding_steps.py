"""
A model behind the first step of generate(), for the loops of `fast_generation`.

Shape letters: V vocabulary; rows are the sequences of a batch, under beam search its sources' beams side by side.
"""

from typing import Any, Protocol, cast

import torch
from transformers.utils import ModelOutput

from .losses import as_logits
from .wirings import StepOutput


class Steps(Protocol):
    """A decoder behind the first step of generate()."""

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Reads every row's next token: [rows] -> logits [rows, V]."""
        ...

    def select(self, rows: torch.Tensor) -> None:
        """Goes on with these rows alone. Of rows that were repeated it takes all of a source, or none."""
        ...

    def reorder(self, rows: torch.Tensor) -> None:
        """Puts each row in the place of another one of the same source."""
        ...

    def repeat(self, times: int) -> None:
        """Each row several times over, side by side."""
        ...


class DecodingSteps:
    """
    [`Steps`] of one model.

    Args:
        model: a `RnnSeq2SeqForConditionalGeneration`.
        cache: its cache after the first step.
        encoder_outputs: what it read.
        copy_ids: as for `model.forward`.
    """

    def __init__(self, model: Any, cache: Any, encoder_outputs: ModelOutput, copy_ids: torch.Tensor | None):
        self.model, self.decoder, self.config = model, model.model.decoder, model.config
        self.state, self.prepared = cache.state, cache.prepared_memory
        self.source_ids, self.copy_ids = encoder_outputs.get("source_ids"), copy_ids
        self.sharing = 1  # how many rows have one source's prepared memory in common

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.model.head.copies:
            tokens = tokens.masked_fill(tokens >= self.config.vocab_size, self.config.unk_token_id)
        scores = self.model._scores(self.source_ids, self.read(tokens), self.copy_ids)[:, -1]
        return as_logits(scores, self.config.output_normalizer)

    def before_output(self, tokens: torch.Tensor) -> torch.Tensor:
        """Reads as a call does, but gives what the output layer of a `LinearHead` is to read: [rows] -> [rows, *]."""
        inputs = self.model._head_input(self.source_ids, self.read(tokens), self.copy_ids)
        return cast(torch.Tensor, self.model.head.before_output(inputs)[:, -1])

    def read(self, tokens: torch.Tensor) -> StepOutput:
        """What the decoder makes of every row's next token: [rows] -> [rows, 1, ...]."""
        x = self.decoder.embed_tokens(tokens).unsqueeze(1)  # [rows, 1, E]
        output, self.state = self.decoder(x, self.state, self.prepared)
        return cast(StepOutput, output)

    def select(self, rows: torch.Tensor) -> None:
        sources = rows[:: self.sharing] // self.sharing
        self.prepared = self.prepared.map(lambda tensor: tensor.index_select(0, sources))
        self.select_state(rows)

    def select_state(self, rows: torch.Tensor) -> None:
        """What `select` does to all but the prepared memory."""
        self.source_ids, self.copy_ids = (
            None if ids is None else ids.index_select(0, rows) for ids in (self.source_ids, self.copy_ids)
        )
        self.reorder(rows)

    def reorder(self, rows: torch.Tensor) -> None:
        self.state = self.state.map(lambda tensor: tensor.index_select(0, rows))

    def repeat(self, times: int) -> None:
        rows = torch.arange(self.prepared.mask.size(0), device=self.prepared.mask.device).repeat_interleave(times)
        if self.state.alignment:  # each row looks at the memory in a way of its own
            self.select(rows)
        else:
            self.select_state(rows)
            self.sharing *= times


def first_steps(model: Any, outputs: ModelOutput, model_kwargs: dict[str, Any]) -> Steps:
    """The model's steps after the first one, whose `outputs` these are."""
    return type(model).decoding_steps(
        model, outputs["past_key_values"], model_kwargs["encoder_outputs"], model_kwargs.get("copy_ids")
    )
