"""Word error rate of speech recognition."""

from hf_rnn_seq2seq.metrics.edit_distance import sum_errors
from hf_rnn_seq2seq.metrics.speech_text import normalize_transcript
from hf_rnn_seq2seq.metrics.text_metric import TextMetric


class Wer(TextMetric):
    """Word error rate as in speech recognition, in percent.

        wer = 100 · (S + D + I) / N

    S, D, I: words substituted, deleted and inserted in an alignment with the fewest edits, N: words in the references,
    all summed over the corpus; words stand between white space. The parts are `wer_substitutions`, `wer_deletions` and
    `wer_insertions`, in percent of N too (their sum, not each of them, is the same for every best alignment). With
    several references the nearest counts, as in `symbol_error_rate`. Where all references are empty, N is 1. For the
    share of wrong sequences, which work on pronunciation calls WER, see `sequence_error_rate`.

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
        def words(text: str) -> list[str]:
            return normalize_transcript(text, lowercase, remove_punctuation).split()

        errors = sum_errors([words(text) for text in predictions], [[words(text) for text in r] for r in references])
        percent = 100 / errors.reference_length
        return {
            "wer": percent * errors.total,
            "wer_substitutions": percent * errors.substitutions,
            "wer_deletions": percent * errors.deletions,
            "wer_insertions": percent * errors.insertions,
        }
