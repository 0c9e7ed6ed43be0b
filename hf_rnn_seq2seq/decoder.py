"""The target side: embeddings, and the only time loop.

Shapes: B batch, S source, T target, E embedding, H hidden, F features; `heads` attention heads.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .attention import PreparedMemory
from .cache_rnn_seq2seq import DecoderState
from .compiled_loop import Step, Tensors, scan_steps, scans
from .configuration_rnn_seq2seq import RnnSeq2SeqConfig
from .dropout import Dropout
from .scheduled_sampling import OwnInputs
from .shrinking_batch import shrinking_batch
from .step_products import shared_by_steps
from .wirings import WIRINGS, StepOutput


class RnnSeq2SeqDecoder(nn.Module):
    """Target embeddings, a wiring, and the loop over time."""

    _gradient_checkpointing_func: Callable[..., Any]  # set by transformers

    def __init__(self, config: RnnSeq2SeqConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.target_embedding_size, config.pad_token_id)
        self.embedding_dropout = Dropout(config.embedding_dropout)
        self.wiring = WIRINGS[config.wiring_type](config)
        self.output_dropout = Dropout(config.output_dropout)
        self.gradient_checkpointing = False
        self.grows = config.decoder_self_attention  # a part of the state, with every step

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_tokens = value

    def forward(
        self,
        x: torch.Tensor,
        state: DecoderState,
        prepared: PreparedMemory,
        mask: torch.Tensor | None = None,
        own: OwnInputs | None = None,
        lengths: torch.Tensor | None = None,
    ) -> tuple[StepOutput, DecoderState]:
        """
        Every way to run the model comes through here: teacher forcing and scheduled sampling with T tokens,
        generation with one.

        Args:
            x: embedded target tokens, [B, T, E].
            state: the state before the first of them.
            prepared: the source, as `wiring.attention.prepare` makes it.
            mask: true at tokens, [B, T]; the state passes over the rest unchanged.
            own: predictions that are read in place of some of `x`. Any wiring then goes step by step.
            lengths: how many tokens of each row are looked at, [B], on the CPU. Rows may then leave the loop behind
                them: what comes out for later tokens may be zeros, and the last state is not that of all rows.

        Returns:
            features [B, T, F], attention weights [B, heads, T, S], `gate_input` [B, T, *], every layer's outputs
            [B, T, H]; the last state.
        """
        x = self.embedding_dropout(x)
        at_once = mask is None and own is None and not self.wiring.sequential
        if scans(x.size(1)) and not (at_once or self.grows or own is not None or self.gradient_checkpointing):
            output, state = self._scan(x, state, prepared, mask)
            return output._replace(features=self.output_dropout(output.features)), state
        batch = None if lengths is None or at_once or own is not None else shrinking_batch(lengths, x.size(1))
        if batch is not None:
            x, state, prepared = batch.sort(x), state.map(batch.sort), prepared.map(batch.sort)
            mask = None if mask is None else batch.sort(mask)
        steps: list[StepOutput] = []
        # With gradient checkpointing a step runs again in the backward pass, after the loop.
        with shared_by_steps(x.size(1) > 1 and not at_once and not (self.gradient_checkpointing and self.training)):
            for t, x_t in enumerate((x,) if at_once else x.split(1, dim=1)):
                if batch is not None:
                    state, prepared = batch.step(t, state, prepared)
                    x_t = x_t[: batch.rows[t]]
                if own is not None and steps:
                    predicted = self.embedding_dropout(own.embed(steps[-1], self.embed_tokens))
                    x_t = torch.where(own.chosen[:, t, None, None], predicted.to(x_t.dtype), x_t)
                output, new_state = self._run(x_t, state, prepared)
                state = new_state if mask is None else new_state.where(mask[: len(x_t), t], state)
                steps.append(output)
        if len(steps) > 1:
            join = torch.cat if batch is None else batch.join
            output = StepOutput(
                features=join([step.features for step in steps], dim=1),
                weights=join([step.weights for step in steps], dim=2),
                gate_input=join([step.gate_input for step in steps], dim=1),
                layer_outputs=tuple(
                    join(list(outputs), dim=1) for outputs in zip(*(s.layer_outputs for s in steps), strict=True)
                ),
            )
        return output._replace(features=self.output_dropout(output.features)), state

    def _scan(
        self, x: torch.Tensor, state: DecoderState, prepared: PreparedMemory, mask: torch.Tensor | None
    ) -> tuple[StepOutput, DecoderState]:
        """The loop, as torch.compile takes it."""

        def step(old: Tensors, inputs: Tensors) -> Step:
            before = state.replace_tensors(list(old))
            output, after = self.wiring(inputs[0].unsqueeze(1), before, prepared)
            if len(inputs) > 1:
                after = after.where(inputs[1], before)
            outputs = (output.features, output.gate_input, *output.layer_outputs)
            return after.tensors(), [output.weights.squeeze(2), *(one.squeeze(1) for one in outputs)]

        last, outputs = scan_steps(step, state.tensors(), [x] if mask is None else [x, mask])
        weights, features, gate_input, *layer_outputs = outputs
        output = StepOutput(features, weights.transpose(1, 2), gate_input, tuple(layer_outputs))
        return output, state.replace_tensors(last)

    def _run(self, x: torch.Tensor, state: DecoderState, prepared: PreparedMemory) -> tuple[StepOutput, DecoderState]:
        """The wiring, whose intermediate results are recomputed in the backward pass if asked for."""
        if not (self.gradient_checkpointing and self.training):
            return self.wiring(x, state, prepared)
        size = len(state.tensors())

        # Re-entrant checkpointing sees only tensors that are arguments and results of their own.
        def flat(x: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            output, new = self.wiring(x, state.replace_tensors(list(tensors[:size])), PreparedMemory(*tensors[size:]))
            return (*new.tensors(), output.features, output.weights, output.gate_input, *output.layer_outputs)

        results = self._gradient_checkpointing_func(flat, x, *state.tensors(), *prepared)
        features, weights, gate_input, *layer_outputs = results[size:]
        return StepOutput(features, weights, gate_input, tuple(layer_outputs)), state.replace_tensors(
            list(results[:size])
        )
