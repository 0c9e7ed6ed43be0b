"""Normalisation of transcripts before speech metrics."""

import unicodedata


def normalize_transcript(text: str, lowercase: bool, remove_punctuation: bool) -> str:
    """The text with single spaces between words, none at the ends; on request lower-cased and without punctuation."""
    if lowercase:
        text = text.lower()
    if remove_punctuation:
        text = "".join(char for char in text if not unicodedata.category(char).startswith("P"))
    return " ".join(text.split())
