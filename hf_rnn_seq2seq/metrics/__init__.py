"""Metrics as `evaluate` modules that need no network: by class, by name, or by folder through `evaluate.load`.

All figures are percentages (a perfect BLEU is 100, an error rate of one half is 50). Definitions are in the docstrings
of the classes. Importing this sub-package imports `evaluate` and `datasets`, which takes seconds; `hf_rnn_seq2seq`
itself does not import it.
"""

from collections.abc import Iterable, Mapping, Sequence

from .bleu.bleu import Bleu
from .cer.cer import Cer
from .chrf.chrf import Chrf
from .meteor.meteor import Meteor
from .rouge.rouge import Rouge
from .sequence_error_rate.sequence_error_rate import SequenceErrorRate
from .symbol_error_rate.symbol_error_rate import SymbolErrorRate
from .text_metric import TextMetric
from .wer.wer import Wer

METRICS: dict[str, type[TextMetric]] = {
    "sequence_error_rate": SequenceErrorRate,
    "symbol_error_rate": SymbolErrorRate,
    "bleu": Bleu,
    "chrf": Chrf,
    "meteor": Meteor,
    "rouge": Rouge,
    "wer": Wer,
    "cer": Cer,
}


def compute_metrics_for(
    names: Iterable[str],
    predictions: Sequence[str],
    references: Sequence[str] | Sequence[Sequence[str]],
    options: Mapping[str, Mapping[str, object]] | None = None,
) -> dict[str, float | str]:
    """Figures of several metrics over the same texts, in percent, in one dict.

    Strings among the values (`bleu_signature`, `chrf_signature`) belong into the results file. Hand only the numbers
    to `Trainer.log` or back from `compute_metrics`, since trackers such as TensorBoard drop or refuse anything else:
    `{name: value for name, value in results.items() if isinstance(value, float)}`.

    Args:
        names: keys of `METRICS`.
        predictions: one text for each example.
        references: one text, or a list of one or more texts, for each example.
        options: by metric name, keyword arguments for that metric, e.g. `{"bleu": {"lowercase": True}}`.

    Raises:
        ValueError: an unknown name, options for a metric that is not asked for, or texts that can't be scored.
        TypeError: texts that are not strings, or an option the metric doesn't have.
    """
    names = list(names)
    options = options or {}
    for name in names:
        if name not in METRICS:
            raise ValueError(f"unknown metric {name!r}: choose from {', '.join(METRICS)}")
    for name in options:
        if name not in names:
            raise ValueError(f"options for metric {name!r}, which is not among those asked for: {', '.join(names)}")
    results: dict[str, float | str] = {}
    for name in names:
        # In memory: an arrow file on disk would mean waiting for its lock when several processes evaluate at once.
        metric = METRICS[name](keep_in_memory=True)
        results |= metric.compute(predictions=predictions, references=references, **options.get(name, {}))
    return results


__all__ = [
    "METRICS",
    "Bleu",
    "Cer",
    "Chrf",
    "Meteor",
    "Rouge",
    "SequenceErrorRate",
    "SymbolErrorRate",
    "TextMetric",
    "Wer",
    "compute_metrics_for",
]
