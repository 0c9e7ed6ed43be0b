"""Character error rate of speech recognition."""

from hf_rnn_seq2seq.metrics.edit_distance import sum_errors
from hf_rnn_seq2seq.metrics.speech_text import normalize_transcript
from hf_rnn_seq2seq.metrics.text_metric import TextMetric


class Cer(TextMetric):
    """Character error rate as in speech recognition, in percent.

        cer = 100 · (S + D + I) / N

    as `wer`, over Unicode code points instead of words. White space at the ends is left out, a run of it elsewhere
    counts as one character. With several references the nearest counts, as in `symbol_error_rate`. Where all
    references are empty, N is 1.

    Options: `lowercase=False`; `remove_punctuation=False` (every character of a Unicode category P).

    Reference: A. C. Morris, V. Maier, P. Green (2004): From WER and RIL to MER and WIL: improved evaluation measures
        for connected speech recognition.
    """

    def _compute(
        self,
        *,
        predictions: list[str],
        references: list[list[str]],
        lowercase: bool = False,
        remove_punctuation: bool = False,
    ) -> dict[str, float | str]:
        def characters(text: str) -> str:
            return normalize_transcript(text, lowercase, remove_punctuation)

        errors = sum_errors(
            [characters(text) for text in predictions], [[characters(text) for text in r] for r in references]
        )
        return {"cer": 100 * errors.total / errors.reference_length}
