"""Heat maps of attention with both axes labelled by tokens, in any script that an installed font can show.

Figures are built without `pyplot`: no display, no global state, nothing to close.
"""

import functools
import importlib.metadata
import math
import textwrap
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.layout_engine import ConstrainedLayoutEngine

# Inches: cells shrink from the first to the second as sequences grow, so that labels stay readable at 100 tokens.
LARGEST_CELL, SMALLEST_CELL = 0.36, 0.15
LONGEST_SIDE = 30.0  # inches; beyond, cells shrink further and only every k-th token is labelled
POINTS_PER_INCH = 72

# White space and control characters would leave a label that looks empty or breaks the line.
VISIBLE = {" ": "␣", "\t": "⇥", "\n": "↵", "\r": "↵", "\u00a0": "␣", "\u3000": "␣"}
MISSING = "\N{REPLACEMENT CHARACTER}"
DEFAULT_FAMILY = "DejaVu Sans"  # comes with matplotlib; IPA, Latin, Greek, Cyrillic, Arabic, Armenian, Georgian


def plot_attention(
    weights: torch.Tensor | npt.ArrayLike,
    source_tokens: Sequence[str],
    target_tokens: Sequence[str],
    *,
    title: str | None = None,
    colormap: str = "Blues",
    max_label_length: int = 20,
) -> Figure:
    """A heat map with one row for each target token, from the top, and one column for each source token.

    This is how Bahdanau et al. (2015), figure 3, show attention; darker is more weight, and the colour bar runs from 0
    to the largest weight in the map.

    Args:
        weights: [T, S] attention weights, none negative.
        source_tokens: S labels of the columns.
        target_tokens: T labels of the rows.
        title: a line above, wrapped where the figure is narrow.
        colormap: name of a Matplotlib colormap.
        max_label_length: longer labels are cut and end in "…".

    Returns:
        The figure; `figure.savefig("attention.png")` writes it.

    Raises:
        ValueError: `weights` isn't [T, S] for these tokens, is empty, or has negative or non-finite values.

    Warns:
        UserWarning: no installed font has the characters of a script (the message says what to install); they are
            shown as "�".
    """
    matrix = _as_matrix(weights, len(source_tokens), len(target_tokens))
    families, missing = font_families("".join([*source_tokens, *target_tokens, title or ""]))
    # From here on no unknown character remains, or Matplotlib would warn again at every drawing.
    columns = [_label(token, missing, max_label_length) for token in source_tokens]
    rows = [_label(token, missing, max_label_length) for token in target_tokens]

    cell = min(LARGEST_CELL, max(SMALLEST_CELL, 12 / max(matrix.shape)), LONGEST_SIDE / max(matrix.shape))
    font_size = min(11.0, max(cell, SMALLEST_CELL) * POINTS_PER_INCH * 0.7)
    em = font_size / POINTS_PER_INCH
    row_width, column_width = (max(map(_width, labels)) * em for labels in (rows, columns))
    width = matrix.shape[1] * cell + row_width + 1.2  # + colour bar and padding
    height = matrix.shape[0] * cell + max(column_width, em) + 0.4
    text_size = max(font_size, 9.0)
    heading = "\n".join(textwrap.wrap("".join(MISSING if char in missing else char for char in title or ""), 60))
    if heading:
        width = max(width, max(map(_width, heading.split("\n"))) * (text_size + 1) / POINTS_PER_INCH + 0.3)
        height += (heading.count("\n") + 1) * 1.5 * text_size / POINTS_PER_INCH

    figure = Figure(
        figsize=(width, max(height, 1.2)), layout=ConstrainedLayoutEngine(compress=True, w_pad=0.07, h_pad=0.07)
    )
    axes = figure.add_subplot()
    image = axes.imshow(matrix, cmap=colormap, vmin=0, vmax=matrix.max() or 1.0, interpolation="nearest")
    step = math.ceil(SMALLEST_CELL / cell)
    style = {"fontfamily": families, "fontsize": font_size, "parse_math": False}
    axes.set_xticks(range(0, len(columns), step), columns[::step], **style)
    axes.set_yticks(range(0, len(rows), step), rows[::step], **style)
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=2)
    for label in axes.get_xticklabels():
        label.set_rotation(90 if _width(label.get_text()) * em > 0.95 * cell * step else 0)
    if step == 1:  # faint lines lead the eye from a cell to its tokens
        axes.set_xticks(np.arange(0.5, len(columns) - 1), minor=True)
        axes.set_yticks(np.arange(0.5, len(rows) - 1), minor=True)
        axes.grid(which="minor", color="0.88", linewidth=0.4)
        axes.tick_params(which="minor", length=0)
    for spine in axes.spines.values():
        spine.set_linewidth(0.5)
    bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=max(8.0, min(30.0, matrix.shape[0] * cell / 0.15)))
    bar.ax.tick_params(labelsize=min(text_size, 9))
    bar.outline.set_linewidth(0.5)
    if heading:
        figure.suptitle(heading, fontfamily=families, fontsize=text_size + 1, parse_math=False)
    return figure


def save_attention_plots(
    folder: str | Path,
    weights: Iterable[torch.Tensor | npt.ArrayLike],
    source_tokens: Iterable[Sequence[str]],
    target_tokens: Iterable[Sequence[str]],
    *,
    dpi: int = 150,
) -> list[Path]:
    """Writes `attention_000.png` and so on, one a triple as `plot_attention` takes it, and returns their paths.

    Raises:
        ValueError: the three have different lengths, or as `plot_attention`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, (matrix, source, target) in enumerate(zip(weights, source_tokens, target_tokens, strict=True)):
        paths.append(folder / f"attention_{index:03d}.png")
        plot_attention(matrix, source, target).savefig(paths[-1], dpi=dpi)
    return paths


def font_families(text: str) -> tuple[list[str], frozenset[str]]:
    """Font families that together show a text, in Matplotlib's order of fallback, and the characters none of them has.

    Looks at Matplotlib's fonts, then at those of the system, then at font files in installed Python packages. Warns
    once for each script of which a character is missing.
    """
    needed = {char for char in text if not _is_invisible(char)} | {*VISIBLE.values(), "…", "◌", MISSING}
    families = []
    for family, path, face in _regular_fonts():
        if not needed:
            break
        if found := needed & _characters(path, face):
            families.append(family)
            needed -= found
    for script in sorted({_script(char) for char in needed}):
        _warn_once(script)
    return families, frozenset(needed)


@functools.cache  # one warning a script, not one a figure
def _warn_once(script: str) -> None:
    warnings.warn(
        f"no installed font has the {script} characters in the tokens; they are shown as {MISSING}. "
        "Install a font for them, such as a Noto font of the system, or: pip install 'hf-rnn-seq2seq[fonts]'",
        stacklevel=4,
    )


@functools.cache
def _regular_fonts() -> tuple[tuple[str, str, int], ...]:
    """Family, file and face of every upright font of regular weight, the most suitable first."""
    for path in _package_fonts():
        font_manager.fontManager.addfont(path)
    own = Path(matplotlib.get_data_path())
    fonts = [
        (entry.name, entry.fname, entry.index)
        for entry in font_manager.fontManager.ttflist
        if entry.style == entry.variant == "normal"
        and entry.weight == 400
        # Matplotlib's other fonts are for formulas; a "last resort" font draws a box for every character there is.
        and (entry.name == DEFAULT_FAMILY or own not in Path(entry.fname).parents)
        and "lastresort" not in entry.name.lower().replace(" ", "")
    ]

    def unsuitable(font: tuple[str, str, int]) -> tuple[bool, bool, bool, bool, str]:
        name = font[0]
        return (name != DEFAULT_FAMILY, "Noto Sans" not in name, "Mono" in name, "Serif" in name, name)

    return tuple(sorted(fonts, key=unsuitable))


def _package_fonts() -> list[str]:
    """Font files that came with an installed Python package, Matplotlib's apart, as `pip install` recorded them."""
    return [
        str(file.locate())
        for distribution in importlib.metadata.distributions()
        if distribution.name != "matplotlib"
        and any(suffix in (distribution.read_text("RECORD") or "") for suffix in (".ttf", ".otf", ".ttc"))
        for file in distribution.files or ()
        if file.suffix in (".ttf", ".otf", ".ttc") and Path(str(file.locate())).is_file()
    ]


@functools.cache
def _characters(path: str, face: int) -> frozenset[str]:
    """The characters a font has glyphs for."""
    return frozenset(map(chr, FT2Font(path, face_index=face).get_charmap()))


def _script(char: str) -> str:
    """The name of a character's script as Unicode's character names begin, such as HANGUL or DEVANAGARI."""
    name = unicodedata.name(char, "")
    return " ".join(name.split()[:2]) if name.startswith("CJK") else name.split(" ")[0] or f"U+{ord(char):04X}"


def _is_invisible(char: str) -> bool:
    """White space, control and format characters, which need no glyph of their own."""
    return char in VISIBLE or unicodedata.category(char) in ("Cc", "Cf", "Zs", "Zl", "Zp")


def _label(token: str, missing: frozenset[str], max_length: int) -> str:
    text = "".join(VISIBLE.get(char, MISSING if char in missing else char) for char in token)
    # Format characters (Cf) join or separate letters and stay; what else can't be seen is shown by its code.
    text = "".join(f"U+{ord(char):04X}" if unicodedata.category(char) in ("Cc", "Zl", "Zp") else char for char in text)
    if text and unicodedata.category(text[0]).startswith("M"):
        text = "◌" + text  # a combining mark alone would be drawn over its neighbour
    return text if len(text) <= max_length else text[: max_length - 1] + "…"


def _width(text: str) -> float:
    """The width of a line in ems, roughly: enough to choose the figure's size."""
    return sum(
        0.0 if unicodedata.combining(char) else 1.0 if unicodedata.east_asian_width(char) in "WF" else 0.65
        for char in text
    )


def _as_matrix(
    weights: torch.Tensor | npt.ArrayLike, source_length: int, target_length: int
) -> npt.NDArray[np.float64]:
    if isinstance(weights, torch.Tensor):
        weights = weights.detach().to("cpu", torch.float64).numpy()
    matrix = np.asarray(weights, dtype=np.float64)
    if matrix.shape != (target_length, source_length) or matrix.size == 0:
        raise ValueError(
            f"weights must be [T, S] = [{target_length}, {source_length}] for {target_length} target tokens and "
            f"{source_length} source tokens, none of them 0, not {list(matrix.shape)}"
        )
    if not np.isfinite(matrix).all() or matrix.min() < 0:
        raise ValueError(f"weights must be finite and not negative, not {matrix.min()} to {matrix.max()}")
    return matrix
