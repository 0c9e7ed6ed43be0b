"""From the Trainer's predicted ids to metrics over texts."""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
from transformers import EvalPrediction, PreTrainedTokenizerBase

from .metrics import compute_metrics_for


class Scorer:
    """`compute_metrics` for the Trainer: scores predictions against the reference texts themselves.

    The labels that the Trainer hands over, decoded back to text, would make an unknown token in the reference look
    like a right answer, and are only one of several references.

    Args:
        tokenizer: decodes the predictions.
        names: keys of `hf_rnn_seq2seq.metrics.METRICS`.
        options: of the metrics by name, as for `hf_rnn_seq2seq.metrics.compute_metrics_for`; those of others are
            passed over.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        names: Sequence[str],
        options: Mapping[str, dict[str, object]] | None = None,
    ) -> None:
        self.names = names
        self.options = {name: value for name, value in (options or {}).items() if name in names}
        self.tokenizer = tokenizer
        self.references: list[str] | list[list[str]] = []
        self.sources: list[str] = []
        self.texts: dict[str, str] = {}

    def watch(self, dataset: datasets.Dataset) -> datasets.Dataset:
        """Score against this dataset's references (or its one target a row) from now on, and copy from its sources."""
        column = next((name for name in ("references", "target") if name in dataset.column_names), None)
        self.references = [] if column is None else list(dataset[column])
        self.sources = list(dataset["source"])
        self.texts = {}
        return dataset

    def decode(self, ids: np.ndarray | tuple[np.ndarray]) -> list[str]:
        """Texts of the Trainer's predictions [rows, tokens], which are padded with -100."""
        ids = np.where(ids == -100, self.tokenizer.pad_token_id, ids)
        copied: dict[str, Any] = {}
        if getattr(self.tokenizer, "copies_source", False):
            copied["source_texts"] = self.sources
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True, **copied)

    def __call__(self, output: EvalPrediction) -> dict[str, float]:
        results = compute_metrics_for(self.names, self.decode(output.predictions), self.references, self.options)
        self.texts = {name: value for name, value in results.items() if isinstance(value, str)}
        return {name: value for name, value in results.items() if not isinstance(value, str)}

    def signatures(self, prefix: str) -> dict[str, str]:
        """What the last figures were made with: texts, which the Trainer and TensorBoard can't log."""
        return {f"{prefix}_{name}": value for name, value in self.texts.items()}
