"""Frames and pictures of the logit lens, and the prompts that translate."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest
import torch

import hookbook as hb
from hookbook.errors import DataError, TokenError
from hookbook.show.cells import grid_table
from hookbook.testing import toy
from hookbook.tokens import beginnings
from tests.support.needs import require

PROMPTS = ["abc", "hi, you"]
COLUMNS = ["prompt", "position", "position_token", "own_token", "site", "layer", "rank", "token", "logprob", "own_logprob", "entropy", "kl"]


@pytest.fixture(scope="module")
def lens() -> hb.LogitLens:
    return hb.logit_lens(toy(), PROMPTS, position=slice(None), k=3, tokens=["x", "\n"], languages={"a": ["dog", "cat"], "b": "maus"})


def drawn(axes) -> torch.Tensor:
    return torch.tensor(axes.images[0].get_array().data).double()


def test_a_frame_has_a_row_for_each_prompt_token_layer_and_rank(lens):
    frame = lens.to_frame()
    assert list(frame.columns) == [*COLUMNS, "logprob x", "logprob \n", "rank x", "rank \n", "language a", "language b"]
    promised = hb.LogitLens.to_frame.__doc__
    assert promised is not None and all(f"`{column}`" in promised for column in [*COLUMNS, "logprob t", "rank t", "language l"])
    n, sites, k = lens.token_ids.shape
    assert len(frame) == n * sites * k == (4 + 8) * 3 * 3 and not frame[["prompt", "position", "layer", "rank"]].duplicated().any()
    for at, row in enumerate(frame.itertuples()):
        (n, s), r = divmod(at // 3, 3), at % 3
        prompt, position = lens.rows[n]
        assert (row.prompt, row.position, row.position_token) == (PROMPTS[prompt], position, lens.prompts[prompt].strings[position])
        assert (
            (row.site, row.layer, row.rank) == ("resid_post", s, r)
            and row.token == lens.token(n, s, r)
            and row.own_token == lens.own_tokens[n]
        )
        assert (row.logprob, row.own_logprob) == (float(lens.logprobs[n, s, r]), float(lens.own_logprobs[n, s, r]))
        assert (row.entropy, row.kl) == (float(lens.entropy[n, s]), float(lens.kl[n, s]))
        assert row[13:19] == (
            *lens.wanted_logprobs[n, s].tolist(),
            *lens.wanted_ranks[n, s].tolist(),
            *lens.language_logprobs[n, s].tolist(),
        )


def test_several_tokens_of_a_prompt_are_drawn_down_and_layers_across(lens, plt):
    axes = lens.plot(prompt=1)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("layer", "token")
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == [f"{i} {string}" for i, string in enumerate(lens.prompts[1].strings)] and labels[1] == "1 h"
    assert torch.allclose(drawn(axes), lens.logprobs[4:, :, 0].exp())
    assert [label.get_text() for label in hb.logit_lens(toy(), PROMPTS, layers=["embed", "mlp_out.1"]).plot().get_xticklabels()] == [
        "embed",
        "mlp_out.1",
    ]


@pytest.mark.parametrize("value", ["entropy", "kl", "x", "b"])
def test_what_is_drawn_can_be_chosen(lens, plt, value):
    want = {"entropy": lens.entropy, "kl": lens.kl, "x": lens.wanted_logprobs[..., 0].exp(), "b": lens.language_logprobs[..., 1].exp()}[
        value
    ][:4]
    axes = lens.plot(value=value)
    assert torch.allclose(drawn(axes), want)
    assert axes.images[0].get_clim() == ((float(want.min()), float(want.max())) if value in ("entropy", "kl") else (0, 1))


def test_tokens_and_languages_are_curves_over_layers(lens, plt):
    curves = [torch.tensor(line.get_ydata()) for line in lens.plot_tokens().lines]
    assert torch.allclose(torch.stack(curves, -1), lens.wanted_logprobs.exp().mean(0))
    axes = lens.plot_tokens(value="rank")
    ranks = torch.stack([torch.tensor(line.get_ydata()) for line in axes.lines], -1)
    assert torch.equal(ranks, lens.wanted_ranks.double().quantile(0.5, 0)) and axes.yaxis_inverted()
    axes = lens.plot_languages()
    chances = lens.language_logprobs.exp()
    assert torch.allclose(torch.stack([torch.tensor(line.get_ydata()) for line in axes.lines], -1), chances.mean(0))
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"] and len(axes.collections) == 2
    top = torch.tensor(axes.collections[1].get_paths()[0].vertices)[:, 1].max()
    assert float(top) == pytest.approx(float((chances.mean(0) + 1.96 * chances.std(0) / 12**0.5)[:, 1].max()))


def test_what_is_not_there_cannot_be_drawn(lens, plt):
    bare = hb.logit_lens(toy(), "ab")
    for draw, match in (
        (bare.plot_tokens, "give tokens="),
        (bare.plot_languages, "give languages="),
        (lambda: lens.plot(value="y"), "no value 'y'.*entropy, kl, probability, a, b, x"),
        (lambda: lens.plot_tokens(value="y"), "probability or rank"),
        (lambda: lens.plot(prompt=2), "prompts 0 to 1"),
    ):
        with pytest.raises(TokenError, match=match):
            draw()


def test_views_and_tables_hold_what_is_drawn(lens):
    require("circuitsvis")
    html = lens.view(prompt=1)._repr_html_()
    assert "unpkg.com" not in html and json.dumps("7 u") in html and '"Token"' in html and '"Layer"' in html
    require("jinja2")
    table = grid_table(hb.logit_lens(toy(), "abc", k=2))
    assert "prompt down, layer across" in table and ">abc<" in table


# translations


def table() -> list[dict[str, str]]:
    data = json.loads((files("hookbook") / "data" / "languages.json").read_text(encoding="utf-8"))
    return [dict(zip(data["languages"], row, strict=True)) for row in data["words"]]


def test_no_word_is_there_twice_and_no_english_word_is_part_of_another_languages():
    words = table()
    assert len(words) >= 40
    for language in words[0]:
        assert len({row[language] for row in words}) == len(words)
    for row in words:
        assert not [word for language, word in row.items() if language != "English" and row["English"].lower() in word.lower()]


def test_translations_are_shown_and_one_is_asked_for():
    items, words = hb.prompts.translation(toy(), "French", "Chinese", shots=2, seed=3), {row["French"]: row for row in table()}
    assert len(items.prompts) == len(items.languages) > 40 and items == hb.prompts.translation(toy(), "French", "Chinese", shots=2, seed=3)
    assert items != hb.prompts.translation(toy(), "French", "Chinese", shots=2, seed=4)
    for prompt, some in zip(items.prompts, items.languages, strict=True):
        *shown, asked = prompt.split("\n")
        parts = [line.split('"') for line in (*shown, asked)]
        assert len(shown) == 2 and all(line[0] == "Français: " and line[2] == " - 中文: " for line in parts)
        row = words[parts[-1][1]]
        assert asked.endswith('" - 中文: "') and all(
            line[3] == words[line[1]]["Chinese"] and line[1] != row["French"] for line in parts[:-1]
        )
        assert list(some) == ["Chinese", "English", "unrelated English"] and (some["Chinese"], some["English"]) == (
            row["Chinese"],
            row["English"],
        )
        assert some["unrelated English"] != row["English"] and some["unrelated English"] in {other["English"] for other in table()}
    assert list(hb.prompts.translation(toy(), "Chinese", "English").languages[0]) == ["English", "unrelated English"]


def test_words_that_tokens_cannot_tell_apart_are_left_out():
    """Of single bytes, an English and a French word with the same first letter begin alike."""
    items, tokenizer = hb.prompts.translation(toy(), "Chinese", "French"), toy().tokenizer
    alike = [row for row in table() if row["English"][0] == row["French"][0]]
    assert len(alike) > 5 and len(items.prompts) == len(table()) - len(alike)
    for some in items.languages:
        sets = [{*beginnings(word, tokenizer)} for word in some.values()]
        assert sum(map(len, sets)) == len(set.union(*sets))
    hb.logit_lens(toy(n_ctx=256), items.prompts[:2], languages=items.languages[:2])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (("French", "Klingon"), "no words in 'Klingon'.*Chinese"),
        (("French", "French"), "use two languages"),
        (("French", "German", 84), "there are 84 words"),
    ],
)
def test_translations_that_cannot_be(call, match):
    with pytest.raises(DataError, match=match):
        hb.prompts.translation(toy(), *call[:2], **({"shots": call[2]} if call[2:] else {}))
