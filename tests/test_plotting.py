"""Attention heat maps: what is drawn, in which fonts, at which size, and what is refused."""

import itertools
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hf_rnn_seq2seq import plotting
from hf_rnn_seq2seq.plotting import font_families, plot_attention, save_attention_plots

# Two characters for private use, which no real font on the machine is likely to have.
PRIVATE, OTHER_PRIVATE = "\U0010fffd", "\U0010fffc"


def some_weights(rows: int, columns: int) -> torch.Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(0)).softmax(-1)


def pixels(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def column_labels(figure: Figure) -> list[str]:
    return [label.get_text() for label in figure.axes[0].get_xticklabels()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_target_tokens_and_columns_source_tokens(dtype: torch.dtype) -> None:
    weights = some_weights(2, 3).to(dtype).requires_grad_()
    figure = plot_attention(weights, ["k", "æ", "t"], ["c", "</s>"], title="cat")
    axes = figure.axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), weights.detach().double().numpy())
    assert column_labels(figure) == ["k", "æ", "t"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["c", "</s>"]
    top, bottom = (axes.transData.transform((0, row))[1] for row in (0, 1))
    assert top > bottom  # the first target token is the uppermost row
    assert figure.get_suptitle() == "cat"
    assert len(figure.axes) == 2  # the map and its colour bar


def test_lists_do_and_a_map_of_zeros_is_drawn() -> None:
    figure = plot_attention([[0, 0]], ["a", "b"], ["x"])
    assert pixels(figure).size


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 2), (3, 100), (100, 3), (100, 100)])
def test_labels_stay_inside_the_figure_and_apart(rows: int, columns: int) -> None:
    figure = plot_attention(
        some_weights(rows, columns),
        [f"source{i}" for i in range(columns)],
        [f"target{i}" for i in range(rows)],
        title="A title that is rather long for a figure that may be as narrow as a single cell",
    )
    pixels(figure)  # drawing is what places the labels
    width, height = figure.bbox.size
    assert max(figure.get_size_inches()) < 20
    axes = figure.axes[0]
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        boxes = [label.get_window_extent() for label in labels]
        assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height for box in boxes)
        assert not any(first.overlaps(second) for first, second in itertools.pairwise(boxes))
    assert len(axes.get_xticklabels()) == columns
    assert len(axes.get_yticklabels()) == rows


def test_of_very_many_columns_some_are_labelled() -> None:
    figure = plot_attention(some_weights(2, 1000), [str(i) for i in range(1000)], ["a", "b"])
    labels = column_labels(figure)
    assert labels == [str(i) for i in range(0, 1000, int(labels[1]))]
    assert int(labels[1]) > 1
    assert max(figure.get_size_inches()) < 35


def test_only_labels_wider_than_a_cell_are_turned() -> None:
    figure = plot_attention(some_weights(1, 3), ["ʃ", "schools", "학"], ["x"])
    assert [label.get_rotation() for label in figure.axes[0].get_xticklabels()] == [0, 90, 0]


def test_labels_show_white_space_lone_marks_formulas_and_cut_long_tokens() -> None:
    tokens = [" ", "a\n", "\t", "\u0301", "$x$", "\u0007", "x" * 50, "▁the"]
    figure = plot_attention(some_weights(1, 8), tokens, ["a"])
    assert column_labels(figure) == ["␣", "a↵", "⇥", "◌\u0301", "$x$", "U+0007", "x" * 19 + "…", "▁the"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a missing glyph or a bad formula would warn or raise
        pixels(figure)


@pytest.mark.parametrize(
    "text", ["ˈt͡ʃɛɹ.i pʰ ŋ̊ ɬ ʔ ɑ̃ː", "Ελληνικά", "Кириллица", "العربية", "ქართული", "Հայերեն", "Tiếng Việt ▁"]
)
def test_fonts_that_come_with_matplotlib_show_phones_and_these_scripts(text: str) -> None:
    families, missing = font_families(text)
    assert not missing
    assert families == ["DejaVu Sans"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels(plot_attention([[1.0]], [text], [text], title=text))


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("noto_cjk_sans_jp_regular", "나는 학교에 갔습니다 東京は雨です 今天下雨"),
        ("manimgx_fonts", "विद्यालय বাংলা தமிழ் ภาษาไทย አማርኛ 😀"),
    ],
)
def test_the_extra_of_fonts_shows_more_scripts(module: str, text: str) -> None:
    pytest.importorskip(module, reason="needs the extra: pip install 'hf-rnn-seq2seq[fonts]'")
    assert not font_families(text)[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels(plot_attention([[1.0] * len(text.split())], text.split(), ["a"], title=text))


def make_font_package(folder: Path) -> None:
    """An installed package with one font, which has a glyph (a square) for `PRIVATE` and nothing else."""
    pen = TTGlyphPen(None)
    for move, point in zip(
        (pen.moveTo, pen.lineTo, pen.lineTo, pen.lineTo), ((0, 0), (0, 700), (700, 700), (700, 0)), strict=True
    ):
        move(point)
    pen.closePath()
    square = pen.glyph()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "square"])
    builder.setupCharacterMap({ord(PRIVATE): "square"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "square": square})
    builder.setupHorizontalMetrics({".notdef": (500, 0), "square": (700, 0)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Test Private", "styleName": "Regular"})
    builder.setupOS2(usWeightClass=400)
    builder.setupPost()
    (folder / "font_package").mkdir()
    builder.save(folder / "font_package" / "private.ttf")
    info = folder / "font_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: font-package\nVersion: 1.0\n")
    (info / "RECORD").write_text("font_package/private.ttf,,\n")


@pytest.fixture
def fresh_fonts():
    """No font lookups remembered from, or left to, another test."""
    known = list(font_manager.fontManager.ttflist)
    plotting._regular_fonts.cache_clear()
    plotting._warn_once.cache_clear()
    yield
    font_manager.fontManager.ttflist[:] = known
    plotting._regular_fonts.cache_clear()
    plotting._warn_once.cache_clear()


@pytest.mark.usefixtures("fresh_fonts")
def test_a_font_in_an_installed_package_shows_what_no_other_has(tmp_path: Path, monkeypatch) -> None:
    make_font_package(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    families, missing = font_families(f"a{PRIVATE}")
    assert families == ["DejaVu Sans", "Test Private"]
    assert not missing
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shown = pixels(plot_attention([[0.0]], ["a"], [PRIVATE]))
        blank = pixels(plot_attention([[0.0]], ["a"], ["\u200b" + " "]))
    dark = [(image[..., :3].max(-1) < 60).sum() for image in (shown, blank)]
    assert dark[0] > dark[1] + 50  # the square is there


@pytest.mark.usefixtures("fresh_fonts")
def test_a_script_without_a_font_is_named_once_and_shown_as_a_replacement_character() -> None:
    with pytest.warns(
        UserWarning, match=r"no installed font has the U\+10FFFC characters.*hf-rnn-seq2seq\[fonts\]"
    ) as seen:
        figure = plot_attention([[1.0]], [OTHER_PRIVATE + "b"], ["a"], title=OTHER_PRIVATE)
    assert len(seen) == 1
    assert seen[0].filename == __file__  # the caller's line
    assert column_labels(figure) == ["�b"]
    assert figure.get_suptitle() == "�"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels(plot_attention([[1.0]], [OTHER_PRIVATE], ["a"]))


def test_scripts_are_named() -> None:
    names = [plotting._script(char) for char in "한ไऔ中ア"]
    assert names == ["HANGUL", "THAI", "DEVANAGARI", "CJK UNIFIED", "KATAKANA"]


def test_plots_are_written_without_display_or_pyplot(tmp_path: Path) -> None:
    code = (
        "import sys, matplotlib; from hf_rnn_seq2seq.plotting import save_attention_plots\n"
        f"folder = {str(tmp_path / 'new' / 'plots')!r}\n"
        "save_attention_plots(folder, [[[1.0]], [[0.5, 0.5]]], ['a', 'bc'], ['x', 'y'])\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    written = sorted((tmp_path / "new" / "plots").iterdir())
    assert [path.name for path in written] == ["attention_000.png", "attention_001.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    with pytest.raises(ValueError, match=r"shorter|longer"):
        save_attention_plots(tmp_path, [[[1.0]]], ["a", "b"], ["x", "y"])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.zeros(3, 2), r"\[T, S\] = \[2, 3\] for 2 target tokens and 3 source tokens.*not \[3, 2\]"),
        (torch.zeros(1, 2, 3), r"not \[1, 2, 3\]"),
        (torch.full((2, 3), float("nan")), "finite"),
        (torch.full((2, 3), -0.5), "not negative"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_attention(weights, ["a", "b", "c"], ["x", "y"])


def test_an_empty_side_is_refused() -> None:
    with pytest.raises(ValueError, match="none of them 0"):
        plot_attention(np.zeros((1, 0)), [], ["x"])
