"""Pictures and views of results."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import hookbook as hb
from hookbook.errors import TokenError
from hookbook.results import Result, View
from hookbook.show.text import show
from hookbook.testing import toy
from tests.support.needs import require
from tests.support.samples import PROMPTS

# pictures


def test_a_grid_is_drawn_with_a_tick_for_each_layer(grid, plt):
    axes = grid.plot(prompt=1)
    assert grid.is_grid
    assert [t.get_text() for t in axes.get_xticklabels()] == [t.get_text() for t in axes.get_yticklabels()] == ["0", "1", "2"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("target layer", "source layer")
    drawn = torch.tensor(axes.images[0].get_array().data)
    assert torch.allclose(drawn.flatten().double(), grid.logprobs[1, :, 0].exp(), atol=1e-6)


def test_layers_are_drawn_with_a_row_for_each_prompt(lens, layers, plt):
    assert not layers.is_grid
    for result in (lens, layers):
        axes = result.plot()
        assert [t.get_text() for t in axes.get_xticklabels()] == ["0", "1", "2"] and [
            t.get_text() for t in axes.get_yticklabels()
        ] == PROMPTS
        assert torch.allclose(torch.tensor(axes.images[0].get_array().data).double(), result.logprobs[..., 0].exp(), atol=1e-6)


def test_a_long_prompt_is_drawn_with_its_end_and_visible_line_breaks(plt):
    (label,) = hb.logit_lens(toy(), "a" * 30 + "\nb\t").plot().get_yticklabels()
    assert label.get_text() == "…" + "a" * 26 + "⏎b⇥"  # what is asked about stands at its end


def test_pairs_that_are_no_grid_are_named_by_both_layers(plt):
    out = hb.patchscope(toy(), "ab", target="cd?", source_layers=[0, 2], target_layers=1)
    assert [t.get_text() for t in out.plot().get_xticklabels()] == ["0→1", "2→1"]


@pytest.mark.parametrize("value", ["probability", "surprisal", "x"])
def test_what_is_drawn_can_be_chosen(grid, plt, value):
    want = {"probability": grid.logprobs[0, :, 0].exp(), "surprisal": grid.surprisal[0], "x": grid.wanted_logprobs[0, :, 0].exp()}[value]
    drawn = torch.tensor(grid.plot(value=value).images[0].get_array().data)
    assert torch.allclose(drawn.flatten().double(), want, atol=1e-6)


def test_what_is_not_there_cannot_be_drawn(grid, plt):
    for result, value in ((grid, "y"), (replace(grid, surprisal=None), "surprisal")):
        with pytest.raises(TokenError, match=f"no value '{value}'"):
            result.plot(value=value)


def test_axes_given_are_drawn_on_and_returned(grid, lens, plt):
    _, (left, right) = plt.subplots(1, 2, figsize=(12, 4))
    assert grid.plot(left) is left and lens.plot(ax=right) is right
    assert len(left.images) == len(right.images) == 1


def test_the_likeliest_token_is_written_where_it_fits(lens, plt):
    _, (short, long) = plt.subplots(1, 2, figsize=(12, 6))
    written = [text.get_text() for text in lens.plot(short).texts]
    assert written == [show(lens.token(n, p).strip() or lens.token(n, p)) for n in range(3) for p in range(3)]
    cut = replace(lens, vocab=dict.fromkeys(lens.vocab, "too long " * 9)).plot(long).texts
    assert all("too long too".startswith(text.get_text()[:-1]) and text.get_text()[-1] == "…" for text in cut)
    cell = long.get_window_extent().width / 3
    assert len(cut) == 9 and all(text.get_window_extent().width <= cell for text in cut)


@pytest.mark.filterwarnings("error::UserWarning")
def test_awkward_tokens_are_drawn(odd, plt, tmp_path):
    for result in (odd, replace(odd, pairs=odd.pairs[:3], logprobs=odd.logprobs[:, :3], token_ids=odd.token_ids[:, :3])):
        result.plot().figure.savefig(tmp_path / "odd.png")
        assert (tmp_path / "odd.png").stat().st_size > 5000
    result.plot(value="北\n").figure.savefig(tmp_path / "odd.png")


@pytest.mark.parametrize("text", ["$5 and $6", "a $\\frac$ b", "$x^{$"])
def test_a_prompt_is_drawn_as_it_is_written(plt, text):
    axes = hb.logit_lens(toy(), text).plot()
    axes.figure.canvas.draw()
    (label,) = axes.get_yticklabels()
    assert label.get_text() == text and not label.get_parse_math()


def test_a_layer_asked_for_twice_is_drawn(plt):
    out = hb.patchscope(toy(), "ab", target="cd?", source_layers=[0, 0, 1, 1])
    assert out.plot().images


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        ("cat", "cat"),
        (" cat", " cat"),
        ("a\nb", "a⏎b"),
        ("a\tb", "a⇥b"),
        ("\n", "⏎"),
        ("\t", "⇥"),
        (" ", "␣"),
        ("   ", "␣␣␣"),
        ("", "␣"),
        ("\x00\x1b", "··"),
        ("北京", "北京"),
        ("é", "é"),
    ],
)
def test_a_token_is_shown_visibly(token, shown):
    assert show(token) == shown


def page_of(result: Result) -> str:
    require("circuitsvis")
    view = result.view()
    assert isinstance(view, View)
    return view._repr_html_()


def test_a_view_needs_no_network(grid, lens, odd):
    for html in map(page_of, (grid, lens, odd)):
        assert "unpkg.com" not in html and "<script src" not in html and "TopkSamples" in html


def test_a_view_holds_what_is_drawn(grid, lens):
    assert all(json.dumps(prompt) in page_of(lens) for prompt in PROMPTS)
    assert '"Source layer"' in page_of(grid) and '"Target layer"' in page_of(grid)


def test_a_view_is_saved_as_a_page(grid, tmp_path):
    require("circuitsvis")
    view = grid.view(prompt=2)
    path = view.save(tmp_path / "page.html")
    page = path.read_text(encoding="utf-8")
    assert path == tmp_path / "page.html" and page.startswith("<!doctype html>") and view.html in page and "unpkg.com" not in page


def test_a_prompt_cannot_end_the_views_script(lens):
    html = page_of(replace(lens, prompts=(replace(lens.prompts[0], text="</script><b>hi"), *lens.prompts[1:])))
    assert html.count("</script>") == page_of(lens).count("</script>")


def test_a_token_cannot_end_the_views_script(grid):
    for changed in (replace(grid, vocab=dict.fromkeys(grid.vocab, "</script>")), replace(grid, texts=(("</script>",) * 9,) * 3)):
        assert page_of(changed).count("</script>") == page_of(grid).count("</script>")
