"""chrF by sacrebleu."""

import sacrebleu

from hf_rnn_seq2seq.metrics.sacrebleu_references import reference_streams
from hf_rnn_seq2seq.metrics.text_metric import TextMetric


class Chrf(TextMetric):
    """Character n-gram F-score as sacrebleu computes it, in percent, with the signature that makes it comparable.

        chrf = 100 · (1 + β²) · P · R / (β² · P + R),  β = 2

    P and R: precision and recall of character n-grams (white space left out), averaged over n = 1..6, from counts
    summed over the corpus. Results: `chrf` and `chrf_signature` (a string). With several references the one with the
    highest score of its own counts for each example. Empty references contribute no n-grams.

    Options: `word_order=0`; with 2 it is chrF++, word n-grams up to that order averaged in; `lowercase=False`.

    Reference: M. Popović (2015): chrF: character n-gram F-score for automatic MT evaluation; (2017): chrF++: words
        helping character n-grams.
    """

    def _compute(
        self,
        *,
        predictions: list[str],
        references: list[list[str]],
        word_order: int = 0,
        lowercase: bool = False,
    ) -> dict[str, float | str]:
        metric = sacrebleu.CHRF(word_order=word_order, lowercase=lowercase)
        score = metric.corpus_score(predictions, reference_streams(references))
        return {"chrf": score.score, "chrf_signature": str(metric.get_signature())}
