"""Share of wrong sequences."""

from hf_rnn_seq2seq.metrics.edit_distance import SymbolKind, split_symbols
from hf_rnn_seq2seq.metrics.text_metric import TextMetric


class SequenceErrorRate(TextMetric):
    """Share of predictions that equal none of their references, in percent.

        sequence_error_rate = 100 · |{i : prediction_i ∉ references_i}| / N,  exact_match = 100 − sequence_error_rate

    This is what work on pronunciation, transliteration and inflection calls word error rate (WER), one sequence being
    one word; the word error rate of speech recognition is the metric `wer`. An empty reference is matched by an empty
    prediction only.

    Options: `symbols="whitespace"` compares what stands between white space, so that its amount does not matter;
    `"characters"` compares the strings as they are.

    Reference: K. Gorman, L. F. E. Ashby, A. Goyzueta, A. D. McCarthy, S. Wu, D. You (2020): The SIGMORPHON 2020 Shared
        Task on Multilingual Grapheme-to-Phoneme Conversion (there "WER").
    """

    def _compute(
        self, *, predictions: list[str], references: list[list[str]], symbols: SymbolKind = "whitespace"
    ) -> dict[str, float | str]:
        wrong = sum(
            split_symbols(prediction, symbols) not in [split_symbols(text, symbols) for text in texts]
            for prediction, texts in zip(predictions, references, strict=True)
        )
        exact = len(predictions) - wrong
        return {"sequence_error_rate": 100 * wrong / len(predictions), "exact_match": 100 * exact / len(predictions)}
