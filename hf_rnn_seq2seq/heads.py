"""From the decoder's features to logits over the target vocabulary."""

import torch
from torch import nn

from .configuration_rnn_seq2seq import RnnSeq2SeqConfig


class LinearHead(nn.Module):
    """
    logits = W x + b. With `tie_word_embeddings` W is the target embedding (Press & Wolf 2017), and a matrix without
    bias first brings the features to the embedding's width where the two differ.

    Args:
        config: the model's configuration.
        features_size: width F of the decoder's output.
    """

    def __init__(self, config: RnnSeq2SeqConfig, features_size: int):
        super().__init__()
        width = config.target_embedding_size if config.tie_word_embeddings else features_size
        self.projection = nn.Identity() if width == features_size else nn.Linear(features_size, width, bias=False)
        self.output = nn.Linear(width, config.vocab_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[B, T, F] -> [B, T, V]"""
        return self.output(self.projection(features))


HEADS: dict[str, type[LinearHead]] = {"linear": LinearHead}
