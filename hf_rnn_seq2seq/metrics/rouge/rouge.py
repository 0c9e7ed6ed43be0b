"""ROUGE by rouge_score."""

from rouge_score import rouge_scorer

from hf_rnn_seq2seq.metrics.text_metric import TextMetric

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class WhitespaceTokenizer:
    """What stands between white space, for languages that rouge_score's own tokenizer would delete."""

    def tokenize(self, text: str) -> list[str]:
        return text.split()


class Rouge(TextMetric):
    """ROUGE F-measures as rouge_score computes them, each the mean over examples, in percent.

        rouge = 100/N · Σ_i 2 · P_i · R_i / (P_i + R_i)

    P, R: precision and recall of unigrams (`rouge1`), of bigrams (`rouge2`), of the longest common subsequence of the
    whole text (`rougeL`) or of its lines (`rougeLsum`: union of the subsequences of each line). With several
    references the one with the highest F counts, for each type by itself. An empty text scores 0.

    Options: `tokenize="default"` is rouge_score's own: lower-cases and keeps the letters a–z and digits **only**, so
    text in another script scores 0; `"whitespace"` takes what stands between white space. `use_stemmer=False`, with
    True the default tokenizer stems with Porter's English stemmer.

    Reference: C.-Y. Lin (2004): ROUGE: a package for automatic evaluation of summaries.
    """

    def _compute(
        self,
        *,
        predictions: list[str],
        references: list[list[str]],
        tokenize: str = "default",
        use_stemmer: bool = False,
    ) -> dict[str, float | str]:
        if tokenize not in ("default", "whitespace"):
            raise ValueError(f"tokenize must be default or whitespace, not {tokenize!r}")
        if tokenize == "whitespace" and use_stemmer:
            raise ValueError("use_stemmer=True needs tokenize='default': rouge_score's own tokenizer is what stems")
        tokenizer = WhitespaceTokenizer() if tokenize == "whitespace" else None
        scorer = rouge_scorer.RougeScorer(ROUGE_TYPES, use_stemmer=use_stemmer, tokenizer=tokenizer)
        scores = [
            scorer.score_multi(texts, prediction) for prediction, texts in zip(predictions, references, strict=True)
        ]
        return {name: 100 * sum(score[name].fmeasure for score in scores) / len(scores) for name in ROUGE_TYPES}
