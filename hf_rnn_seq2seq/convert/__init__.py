"""Models of other toolkits as models of this package. No modeling code imports this.

A format is a module with `convert(path, options) -> Converted`; its docstring says which files it reads, which models
it takes and what it refuses. Modules are imported when asked for: some need an optional package.
"""

import importlib
from pathlib import Path

from .base import ConversionError, ConversionOptions, Converted, fit_vocabulary

# The name of a format and its module.
FORMATS = {
    "g2p_en": "g2p_en",
    "opennmt": "opennmt",
    "joeynmt": "joeynmt",
    "fairseq": "fairseq",
    "yoyodyne": "yoyodyne",
    "nematus": "nematus",
    "marian": "marian",
}


def convert(format_name: str, path: str | Path, options: ConversionOptions | None = None) -> Converted:
    """
    Args:
        format_name: a key of `FORMATS`.
        path: the checkpoint, a file or folder as its toolkit saves it.
        options: further files, and whether a pickle may be loaded.

    Raises:
        ConversionError: there is no such format or file, or a part of the model cannot be represented.
    """
    if format_name not in FORMATS:
        raise ConversionError(f"Unknown format {format_name!r}; there are {', '.join(FORMATS)}.")
    if not Path(path).exists():
        raise ConversionError(f"There is no checkpoint {path}.")
    module = importlib.import_module(f".{FORMATS[format_name]}", __package__)
    return fit_vocabulary(module.convert(Path(path), options or ConversionOptions()))


__all__ = ["FORMATS", "ConversionError", "ConversionOptions", "Converted", "convert"]
