"""BLEU by sacrebleu."""

import sacrebleu

from hf_rnn_seq2seq.metrics.sacrebleu_references import reference_streams
from hf_rnn_seq2seq.metrics.text_metric import TextMetric

# sacrebleu's other tokenizers (flores, spm) download a model at run time.
TOKENIZERS = ("13a", "none", "intl", "char", "zh", "ja-mecab", "ko-mecab")


class Bleu(TextMetric):
    """Corpus BLEU as sacrebleu computes it, in percent, with the signature that makes the figure comparable.

        bleu = 100 · min(1, exp(1 − r / c)) · exp(¼ Σ_{n=1..4} log p_n)

    p_n: clipped n-gram precision over the corpus, c: length of the predictions, r: summed length of the references
    closest in length. Results: `bleu`, `bleu_brevity_penalty` (the factor min(1, …), in percent) and `bleu_signature`
    (a string). With several references n-gram counts are clipped at the largest count in any of them. Empty references
    contribute no n-grams; BLEU of a corpus without a matching unigram is 0.

    Options: `lowercase=False`; `tokenize="13a"`, or `"none"` for text that is tokenised already, `"intl"`, `"char"`,
    `"zh"`, `"ja-mecab"`, `"ko-mecab"`; `smooth_method="exp"`, or `"none"`, `"floor"`, `"add-k"` (where some p_n is 0).

    Reference: K. Papineni, S. Roukos, T. Ward, W.-J. Zhu (2002): BLEU: a method for automatic evaluation of machine
        translation; M. Post (2018): A call for clarity in reporting BLEU scores.
    """

    def _compute(
        self,
        *,
        predictions: list[str],
        references: list[list[str]],
        lowercase: bool = False,
        tokenize: str = "13a",
        smooth_method: str = "exp",
    ) -> dict[str, float | str]:
        if tokenize not in TOKENIZERS:
            raise ValueError(f"tokenize must be one of {', '.join(TOKENIZERS)}, not {tokenize!r}")
        smooth_methods = tuple(sacrebleu.BLEU.SMOOTH_DEFAULTS)
        if smooth_method not in smooth_methods:
            raise ValueError(f"smooth_method must be one of {', '.join(smooth_methods)}, not {smooth_method!r}")
        # force: no warning about text that looks tokenised where the caller has said that it is
        metric = sacrebleu.BLEU(
            lowercase=lowercase, tokenize=tokenize, smooth_method=smooth_method, force=tokenize == "none"
        )
        score = metric.corpus_score(predictions, reference_streams(references))
        return {
            "bleu": score.score,
            "bleu_brevity_penalty": 100 * score.bp,
            "bleu_signature": str(metric.get_signature()),
        }
