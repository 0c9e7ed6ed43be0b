"""Edit distance over reference length."""

from hf_rnn_seq2seq.metrics.edit_distance import SymbolKind, split_symbols, sum_errors
from hf_rnn_seq2seq.metrics.text_metric import TextMetric


class SymbolErrorRate(TextMetric):
    """Edit distance summed over the corpus, divided by the summed length of the references, in percent.

        symbol_error_rate = 100 · Σ_i d(prediction_i, reference_i) / Σ_i |reference_i|

    d is the Levenshtein distance: substitutions, deletions and insertions cost 1 each. With phones as symbols this is
    the phone (or phoneme) error rate, PER. With several references the one at the smallest distance counts, in the
    numerator and, with its length, in the denominator; of equally near ones the longest. Above 100 where predictions
    are much longer than references. Where all references are empty, the denominator is 1.

    Options: `symbols="whitespace"` for symbols separated by white space, `"characters"` for every Unicode code point
    (white space included; nothing is normalised).

    Reference: V. I. Levenshtein (1966): Binary codes capable of correcting deletions, insertions, and reversals; as
        PER in K. Gorman et al. (2020): The SIGMORPHON 2020 Shared Task on Multilingual Grapheme-to-Phoneme Conversion.
    """

    def _compute(
        self, *, predictions: list[str], references: list[list[str]], symbols: SymbolKind = "whitespace"
    ) -> dict[str, float | str]:
        errors = sum_errors(
            [split_symbols(text, symbols) for text in predictions],
            [[split_symbols(text, symbols) for text in texts] for texts in references],
        )
        return {"symbol_error_rate": 100 * errors.total / errors.reference_length}
