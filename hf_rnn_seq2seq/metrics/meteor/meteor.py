"""METEOR by nltk."""

import nltk
from nltk.corpus import wordnet
from nltk.stem import PorterStemmer, SnowballStemmer
from nltk.tokenize import NLTKWordTokenizer
from nltk.translate.meteor_score import meteor_score

from hf_rnn_seq2seq.metrics.text_metric import TextMetric

STEMMERS = ("porter", "none", *(name for name in SnowballStemmer.languages if name != "porter"))


class NoStemmer:
    """Every word is its own stem."""

    def stem(self, word: str) -> str:
        return word


class NoSynonyms:
    """A WordNet without a word in it."""

    def synsets(self, word: str) -> list[object]:
        return []


def make_stemmer(name: str) -> PorterStemmer | SnowballStemmer | NoStemmer:
    """By a name in `STEMMERS`."""
    if name == "none":
        return NoStemmer()
    return PorterStemmer() if name == "porter" else SnowballStemmer(name)


class Meteor(TextMetric):
    """METEOR as nltk computes it for a text, the mean over examples, in percent, with a signature.

        meteor = 100/N · Σ_i (1 − γ · (c / m)^β) · P · R / (α · P + (1 − α) · R),  α = 0.9, β = 3, γ = 0.5

    m: the words of the prediction that are matched with words of the reference, equal ones first, then those with
    equal stems, then synonyms; P and R: their share of either text; c: the number of chunks, runs of matched words
    that stand in both texts one behind the other. Upper and lower case count as equal. With several references the
    one with the highest score counts. A text without a match, or an empty one, scores 0. Results: `meteor` and
    `meteor_signature` (a string).

    The mean of the texts' scores is what `evaluate`'s metric of this name gives, too. The authors' own program adds m
    and c up over the corpus, matches a word that occurs several times so that c is least, where nltk takes the last
    ones first, and has other parameters and paraphrases in its newer versions: figures made with it don't compare.

    Options: `stemmer="porter"`, for English; "none"; or the name of a language that nltk has a Snowball stemmer for.
    `synonyms=False`; True takes English ones from nltk's WordNet, which must be there (`python -m nltk.downloader
    wordnet`), and nltk looks for the stems in it. `tokenize="treebank"` is nltk's for words, "whitespace" takes what
    stands between white space.

    Reference: S. Banerjee, A. Lavie (2005): METEOR: an automatic metric for MT evaluation with improved correlation
        with human judgments; A. Lavie, A. Agarwal (2007): METEOR: an automatic metric for MT evaluation with high
        levels of correlation with human judgments.
    """

    def _compute(
        self,
        *,
        predictions: list[str],
        references: list[list[str]],
        stemmer: str = "porter",
        synonyms: bool = False,
        tokenize: str = "treebank",
    ) -> dict[str, float | str]:
        if stemmer not in STEMMERS:
            raise ValueError(f"stemmer must be one of {', '.join(STEMMERS)}, not {stemmer!r}")
        if tokenize not in ("treebank", "whitespace"):
            raise ValueError(f"tokenize must be treebank or whitespace, not {tokenize!r}")
        if synonyms:
            try:
                wordnet.ensure_loaded()
            except LookupError:
                raise ValueError(
                    "synonyms=True needs nltk's WordNet, which is not here: python -m nltk.downloader wordnet"
                ) from None
        words = str.split if tokenize == "whitespace" else NLTKWordTokenizer().tokenize
        rules = {"stemmer": make_stemmer(stemmer), "wordnet": wordnet if synonyms else NoSynonyms()}
        scores = [
            meteor_score([words(text) for text in texts], words(prediction), **rules)
            for prediction, texts in zip(predictions, references, strict=True)
        ]
        matched = "wordnet" if synonyms else "no"
        signature = f"stem:{stemmer}|syn:{matched}|tok:{tokenize}|version:nltk-{nltk.__version__}"
        return {"meteor": 100 * sum(scores) / len(scores), "meteor_signature": signature}
