"""Recurrent encoder-decoders with attention as Hugging Face models."""

from .version import __version__

__all__ = ["__version__"]
