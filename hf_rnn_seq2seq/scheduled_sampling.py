"""
Scheduled sampling: in training the decoder reads some of its own predictions in place of the labels.

Shapes: B batch, T target, E embedding, V vocabulary, W words to choose among: V, or more for a head that copies.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from .configuration_rnn_seq2seq import RnnSeq2SeqConfig
from .losses import log_probabilities
from .wirings import StepOutput

# What a wiring made of one token -> scores [B, 1, W].
StepScores = Callable[[StepOutput], torch.Tensor]


class ScheduledSampling(NamedTuple):
    """
    How a decoder's inputs are mixed (Bengio et al. 2015, section 2.4). After the first, each is with `probability`
    made of the model's prediction at the step before, else it is the label's embedding, as in teacher forcing.

    Args:
        probability: share of own predictions, 1 - epsilon_i in the paper; 0 is teacher forcing, 1 is free running.
        unit: `token`: each input is drawn by itself; `sequence`: all inputs of a row together.
        mode: what is read of a prediction p: `argmax`, the embedding of its most probable word; `sample`, that of a
            word drawn from it; `gumbel`, a mixture of all embeddings, through which gradients flow back to the step
            before, by weights softmax((log p + G) / temperature) with Gumbel noise G (Goyal et al. 2017).
        temperature: of `gumbel`; the lower, the nearer to `sample`.
    """

    probability: float
    unit: str = "token"
    mode: str = "argmax"
    temperature: float = 1.0


class OwnInputs:
    """
    What a decoder reads of its own predictions in one pass over a batch.

    A prediction is made with the dropout that the step itself had, but without that on the features before the head.
    Padding is never replaced, nor what follows a step at which the state stood still (a start token after padding).

    Args:
        sampling: how to mix.
        step_scores: the head.
        config: the model's configuration.
        x: the labels' embeddings, [B, T, E].
        ids: the labels themselves, [B, T], if they are known; padding is what has `config.pad_token_id`.
        mask: the decoder's attention mask, [B, T].
    """

    def __init__(
        self,
        sampling: ScheduledSampling,
        step_scores: StepScores,
        config: RnnSeq2SeqConfig,
        x: torch.Tensor,
        ids: torch.Tensor | None,
        mask: torch.Tensor | None,
    ):
        self.sampling = sampling
        self.step_scores = step_scores
        self.normalizer = config.output_normalizer
        self.unk_token_id = config.unk_token_id
        batch, length = x.shape[:2]
        draws = torch.rand(batch, length if sampling.unit == "token" else 1, device=x.device)
        chosen = (draws < sampling.probability).expand(batch, length)
        if ids is not None:
            chosen = chosen & (ids != config.pad_token_id)
        if mask is not None:
            chosen = chosen & torch.cat((mask[:, :1], mask[:, :-1]), dim=1)
        self.chosen = chosen  # which inputs are own predictions, [B, T]; the first has none before it

    def embed(self, output: StepOutput, embedding: nn.Embedding) -> torch.Tensor:
        """The prediction of one step, embedded: [B, 1, E]."""
        # Not under no_grad: autocast would keep the head's weights, cast without a gradient, for the loss as well.
        scores = self.step_scores(output)
        if self.sampling.mode == "argmax":
            return self._embed_ids(scores.argmax(-1), embedding)
        log_p = log_probabilities(scores, self.normalizer)
        noisy = log_p - torch.empty_like(log_p).exponential_().log()  # plus Gumbel noise: its maximum is a sample of p
        if self.sampling.mode == "sample":
            return self._embed_ids(noisy.argmax(-1), embedding)
        weights = torch.softmax(noisy / self.sampling.temperature, dim=-1)  # [B, 1, W]
        inside, outside = weights.split([embedding.num_embeddings, weights.size(-1) - embedding.num_embeddings], -1)
        mixed = inside.to(embedding.weight.dtype) @ embedding.weight
        if outside.size(-1) > 0:
            mixed = mixed + outside.sum(-1, keepdim=True) * embedding.weight[self.unk_token_id]
        return mixed

    def _embed_ids(self, ids: torch.Tensor, embedding: nn.Embedding) -> torch.Tensor:
        if self.unk_token_id is not None:
            ids = ids.masked_fill(ids >= embedding.num_embeddings, self.unk_token_id)
        return embedding(ids)
