"""What all metrics of this package share: their inputs, the checks on them, and the frame of an `evaluate.Metric`."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import datasets
import evaluate

INPUTS_DESCRIPTION = """
Args:
    predictions (`list[str]`): one text for each example.
    references (`list[str]` or `list[list[str]]`): one text, or one or more texts, for each example.
Options and results are in the description of the metric. All figures are percentages.
"""


class TextMetric(evaluate.Metric, ABC):
    """An `evaluate.Metric` from predicted texts and one or more reference texts for each to named figures.

    A subclass states its definition in its docstring, the source after the word "Reference:", and computes in
    `_compute`, which receives `predictions` as `list[str]` and `references` as `list[list[str]]`, both of one length
    that is not 0, no inner list empty.
    """

    def _info(self) -> evaluate.MetricInfo:
        definition, _, source = inspect.cleandoc(self.__doc__ or "").partition("\nReference:")
        return evaluate.MetricInfo(
            description=definition.strip(),
            citation=" ".join(source.split()),
            inputs_description=INPUTS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Sequence(datasets.Value("string")),
                }
            ),
        )

    def add_batch(
        self,
        *,
        predictions: Iterable[str] | None = None,
        references: Iterable[str | Sequence[str]] | None = None,
    ) -> None:
        """Add examples; `compute` then takes all that were added.

        Raises:
            TypeError: something is not a string.
            ValueError: no examples, unequal numbers of them, or an example without a reference.
        """
        checked_predictions, checked_references = check_texts(predictions, references)
        super().add_batch(predictions=checked_predictions, references=checked_references)

    def add(self, *, prediction: str | None = None, reference: str | Sequence[str] | None = None) -> None:
        """Add one example. Raises as `add_batch` does."""
        if prediction is None or reference is None:
            raise TypeError("prediction and reference are both required")
        self.add_batch(predictions=[prediction], references=[reference])

    @abstractmethod
    def _compute(self, *, predictions: list[str], references: list[list[str]]) -> dict[str, float | str]:
        """Figures by name. Subclasses add their options as keyword arguments with defaults."""


def check_texts(
    predictions: Iterable[str] | None, references: Iterable[str | Sequence[str]] | None
) -> tuple[list[str], list[list[str]]]:
    """Refuses what can't be scored and returns predictions and, for each, the list of its references.

    Raises:
        TypeError: an argument is not a list, or something in it is not a string.
        ValueError: no examples, unequal numbers of them, or an example without a reference.
    """
    for name, texts in (("predictions", predictions), ("references", references)):
        if texts is None or isinstance(texts, (str, bytes)) or not isinstance(texts, Iterable):
            raise TypeError(f"{name} must be a list with one entry for each example, not {type(texts).__name__}")
    assert predictions is not None
    assert references is not None
    prediction_list = list(predictions)
    reference_lists = [[entry] if isinstance(entry, str) else entry for entry in references]
    if len(prediction_list) != len(reference_lists):
        raise ValueError(f"{len(prediction_list)} predictions but {len(reference_lists)} references")
    if not prediction_list:
        raise ValueError("predictions and references are empty: no figure is defined without an example")
    for index, (prediction, entry) in enumerate(zip(prediction_list, reference_lists, strict=True)):
        if not isinstance(prediction, str):
            raise TypeError(f"predictions[{index}] must be a string, not {type(prediction).__name__}: {prediction!r}")
        if not isinstance(entry, Iterable) or isinstance(entry, bytes):
            raise TypeError(f"references[{index}] must be a string or a list of strings, not {entry!r}")
        for reference in entry:
            if not isinstance(reference, str):
                raise TypeError(
                    f"references[{index}] must hold strings, not {type(reference).__name__}: {reference!r}"
                )
        if len(entry) == 0:
            raise ValueError(f"references[{index}] is an empty list: each example needs at least one reference")
    return prediction_list, [list(entry) for entry in reference_lists]
