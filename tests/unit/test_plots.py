"""Pictures: letters that are read or not there, colours by sign, labels as many as fit, and letters of any script."""

from __future__ import annotations

import warnings

import pytest
import torch

from hookbook.show import fonts
from hookbook.show.fonts import FAMILY, families, spelt
from hookbook.show.plots import SMALLEST, bars, drawing, heat_map, ink, lines
from hookbook.show.text import show
from tests.support.needs import require

WORDS = ["the", " Princess", "characterization", "1997", ",", "Королева", "مرحبا", "北京", "🙂"]


@pytest.fixture
def only_ours(monkeypatch):
    """A machine where nothing but matplotlib's own font is installed."""
    require("matplotlib")
    monkeypatch.setattr(fonts, "_family", lambda letter: FAMILY if letter in fonts._letters(FAMILY) else None)


def grid(n: int, ax=None, **more):
    words = [[WORDS[(x + 3 * y) % len(WORDS)] for x in range(n)] for y in range(n)]
    numbers = [str(i) for i in range(n)]
    return heat_map(
        ax, torch.linspace(0, 1, n * n).view(n, n), words, numbers, numbers, ("source layer", "target layer", "probability"), **more
    )


@pytest.mark.parametrize("n", [3, 18, 30, 60, 100])
def test_words_in_cells_are_read_or_left_out(plt, n):
    ax = grid(n)
    ax.figure.canvas.draw()
    box = ax.get_window_extent()
    assert all(size <= most for size, most in zip(ax.figure.get_size_inches(), (14, 10), strict=True))
    for text in ax.texts:
        extent = text.get_window_extent()
        assert text.get_fontsize() >= SMALLEST and extent.width <= box.width / n and extent.height <= 1.1 * box.height / n
    assert bool(ax.texts) == (n <= 60) and (n != 30 or len(ax.texts) > 500)


def test_there_is_no_more_text_than_room_on_axes_that_are_given(plt):
    _, axes = plt.subplots(1, 3, figsize=(6, 2))
    assert not grid(30, axes[0]).texts and axes[0].get_xlabel() == "target layer"
    labels = [label for label in axes[0].get_yticklabels() if label.get_text()]
    tops = sorted(label.get_window_extent().y0 for label in labels)
    assert 2 <= len(labels) < 30 and all(b - a >= 8 for a, b in zip(tops, tops[1:], strict=False))


def test_labels_that_are_too_wide_stand_upright_and_numbers_are_thinned(plt):
    sites = [f"resid_post.{i}" for i in range(40)]
    ax = lines(None, {"a": torch.rand(40)}, ("site", "value"), labels=sites)
    assert {label.get_rotation() for label in ax.get_xticklabels()} == {90.0}
    ax = lines(None, {"a": torch.rand(400)}, ("layer", "value"), labels=[str(i) for i in range(400)])
    assert {label.get_rotation() for label in ax.get_xticklabels()} == {0.0} and 3 < len(ax.get_xticklabels()) < 60


def test_signed_values_are_white_at_0_and_as_strong_on_both_sides(plt):
    ax = heat_map(
        None, torch.tensor([[-1.0, 0.0, 4.0, float("nan")]]), [["", "", "", ""]], ["a"], list("wxyz"), ("r", "c", "v"), signed=True
    )
    image = ax.images[0]
    assert image.get_clim() == (-4, 4) and image.cmap.name.startswith("RdBu")
    assert min(image.to_rgba(torch.tensor([0.0]).numpy())[0][:3]) > 0.95


@pytest.mark.parametrize(
    ("colour", "read"), [((0, 0, 0), "white"), ((1, 1, 1), "black"), ((0, 0.13, 0.3), "white"), ((1, 0.9, 0.2), "black")]
)
def test_words_are_read_on_their_colour(colour, read):
    assert ink(colour) == read


def test_letters_that_no_font_has_are_spelt_out(only_ours, plt):
    assert (
        spelt("a北京b") == "aU+5317+4EACb"
        and spelt("é⏎␣…") == "é⏎␣…"
        and spelt("🙂") == ("🙂" if ord("🙂") in fonts._letters(FAMILY) else "U+1F642")
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for ax in (
            heat_map(
                None, torch.rand(2, 2), [["北", "京"], ["日本語", "한"]], ["北京", "नमस्ते"], ["a", "ไทย"], ("北", "r", "北"), title="北京 $x"
            ),
            lines(None, {"北": torch.rand(3), "$x": torch.rand(3)}, ("北", "京"), title="北"),
            bars(None, ["北", "$y$"], torch.tensor([1.0, -1.0]), "北"),
        ):
            ax.figure.canvas.draw()
    assert {"U+5317", "U+4EAC"} <= {text.get_text() for text in plt.figure(plt.get_fignums()[0]).axes[0].texts}


def test_a_font_that_has_the_letters_is_used(monkeypatch, plt):
    monkeypatch.setattr(
        fonts,
        "_letters",
        lambda family: {FAMILY: frozenset(map(ord, "ab")), "Noto Sans CJK SC": frozenset(map(ord, "北"))}.get(family, frozenset()),
    )
    monkeypatch.setattr(
        fonts, "_other", lambda letter, names: next((f for f in ("Last Resort", "Noto Sans CJK SC") if letter in fonts._letters(f)), None)
    )
    assert spelt("a北京") == "a北U+4EAC" and families(["a北"]) == [FAMILY, "Noto Sans CJK SC"]


def test_fonts_of_boxes_are_not_fonts(monkeypatch):
    require("matplotlib")
    has = {"Last Resort High-Efficiency": {0x5317}, "Noto Color Emoji": {0x5317}, "Zen": {0x5317}, "Noto Sans CJK SC": {0x5317}}
    monkeypatch.setattr(fonts, "_letters", lambda family: frozenset(has[family]))
    fonts._other.cache_clear()
    assert fonts._other(0x5317, frozenset(has)) == "Noto Sans CJK SC"
    assert fonts._other(0x5317, frozenset(list(has)[:3])) == "Zen" and fonts._other(0x5317, frozenset(list(has)[:2])) is None
    fonts._other.cache_clear()


def test_the_settings_of_others_stay(plt):
    plt.rcParams["font.size"] = 20
    before = dict(plt.rcParams)
    grid(3)
    assert dict(plt.rcParams) == before


def test_a_picture_that_fails_leaves_no_figure(plt):
    before = plt.get_fignums()
    with pytest.raises(ZeroDivisionError), drawing(None, (3, 2)):
        raise ZeroDivisionError
    assert plt.get_fignums() == before


def test_tokens_are_not_given_to_latex(plt):
    with plt.rc_context({"text.usetex": True}):
        ax = bars(None, ["a_b$", "%"], torch.tensor([1.0, 2.0]), "value")
    assert not any(label.get_usetex() for label in ax.get_yticklabels())


def test_four_levels_are_four_lines(plt):
    ax = lines(None, {"x": torch.arange(3.0)}, ("place", "value"), levels={name: float(i) for i, name in enumerate("abcd")})
    assert [line.get_label() for line in ax.lines] == ["x", *"abcd"]


def test_joiners_of_letters_stay_and_marks_of_direction_do_not():
    assert show("می\u200cخواهم") == "می\u200cخواهم" and show("👨\u200d👩") == "👨\u200d👩" and show("a\u202eb") == "a·b"
