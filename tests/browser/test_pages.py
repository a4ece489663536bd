"""Reports and views in a real browser: nothing is asked of a network, nothing is logged, everything is drawn and fits the window."""

from __future__ import annotations

from typing import Any

import pytest

import hookbook as hb
from hookbook.testing import toy
from tests.makers import result

WIDTHS = (1280, 400)
REPORTS = ["Patchscope", "TaskVectors", "HopKnockOut", pytest.param("FeatureExamples", marks=pytest.mark.hooked)]


@pytest.fixture
def opened(chromium):
    """Open a page; afterwards nothing may have been asked for or complained of."""
    pages, wrong = [], []

    def open_(path: Any, width: int = 1280, scheme: Any = "light", views: int = 0) -> Any:
        page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("request", lambda asked: None if asked.url.startswith(("file:", "data:")) else wrong.append(asked.url))
        page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(path.as_uri())
        if views:
            until(
                page,
                f"[...document.querySelectorAll('[data-hookbook-view]')].filter(e => e.offsetHeight > 40 && "
                f"e.querySelectorAll('*').length > 5).length == {views}",
            )
        pages.append(page)
        return page

    yield open_
    for page in pages:
        page.close()
    assert not wrong


def until(page: Any, condition: str) -> None:
    """Wait, without playwright's own way to, which the pages' policy forbids."""
    for _ in range(600):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(100)
    pytest.fail(f"not in a minute: {condition}")


def fits(page: Any) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.parametrize("kind", REPORTS)
def test_a_report_is_shown_whole_and_alone(opened, kind, tmp_path):
    path = result(kind).report(tmp_path / "page.html")
    views = path.read_text(encoding="utf-8").count('<div data-hookbook-view="')
    for width, scheme in zip(WIDTHS, ("light", "dark"), strict=True):
        page = opened(path, width, scheme, views)
        assert fits(page)
        pictures = page.evaluate("[...document.images].map(i => [i.alt.length, i.naturalWidth, i.offsetWidth])")
        assert pictures and all(alt > 20 and natural > 300 and shown > 300 for alt, natural, shown in pictures)
        drawn = page.evaluate(
            "[...document.querySelectorAll('[data-hookbook-view]')].map(e => [e.offsetWidth, e.offsetHeight, "
            "e.querySelectorAll('*').length])"
        )
        assert len(drawn) == views and all(wide > 100 and high > 40 and parts > 5 for wide, high, parts in drawn)
        text, ground = page.evaluate("[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]")
        assert (sum(map(int, text[4:-1].split(","))) > sum(map(int, ground[4:-1].split(",")))) == (scheme == "dark")
        wide = page.evaluate(
            "[...document.querySelectorAll('main *')].filter(e => e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).overflowX == "
            "'auto').map(e => e.tabIndex)"
        )
        assert all(index == 0 for index in wide), "what scrolls can be reached by keyboard"


def test_views_draw_what_they_hold_and_twice_if_shown_twice(opened, tmp_path):
    view = hb.generate(toy(), ["ab"], max_new_tokens=4).view()
    page = opened((view + view + result("Patchscope").view()).save(tmp_path / "views.html"), views=3)
    texts = page.evaluate("[...document.querySelectorAll('[data-hookbook-view]')].map(e => e.textContent)")
    assert texts[0] == texts[1] != "" and "Source layer" in texts[2]
    assert fits(page) and page.evaluate("new Set([...document.querySelectorAll('[data-hookbook-view]')].map(e => e.id)).size") == 3


def test_a_view_draws_in_a_page_of_others(opened, tmp_path):
    """As in a notebook or its page in documentation: the HTML is put into a page that knows nothing of it, and its scripts are run."""
    view = result("Patchscope").view()
    path = tmp_path / "notebook.html"
    path.write_text(
        f'<!doctype html><meta charset="utf-8"><div class="output">{view.html}</div><p>and</p><div class="output">{view.html}</div>',
        encoding="utf-8",
    )
    assert "Source layer" in opened(path, views=2).inner_text("body")
    late = opened(path, views=2)
    late.evaluate(
        """html => { const box = document.body.appendChild(document.createElement('div')); box.innerHTML = html;
        box.querySelectorAll('script').forEach(old => {
            const made = document.createElement('script'); made.textContent = old.textContent; old.replaceWith(made) }) }""",
        view.html,
    )
    until(late, "[...document.querySelectorAll('[data-hookbook-view]')].filter(e => e.children.length).length == 3")


def test_a_view_says_what_is_wrong_where_it_cannot_be_drawn(chromium, tmp_path):
    path = result("Patchscope").view().save(tmp_path / "view.html")
    page = chromium.new_context(java_script_enabled=False).new_page()
    page.goto(path.as_uri())
    assert "needs scripts" in page.inner_text("main")
    path.write_text(
        path.read_text().replace('"default-src', '"x').replace("<script>", "<script>delete window.DecompressionStream;", 1),
        encoding="utf-8",
    )
    page = chromium.new_page()
    page.goto(path.as_uri())
    until(page, "document.body.textContent.includes('could not be drawn')")
