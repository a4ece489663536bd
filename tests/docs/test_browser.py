"""The site in a browser, from a server and from its folder: it asks nothing of the network, reports no error, and fits a phone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.docs.fences import ROOT

NOTEBOOKS = sorted(f"tutorials/{path.stem}.html" for path in (ROOT / "docs/tutorials").glob("*.ipynb"))
PAGES = [
    "index.html",
    *NOTEBOOKS,
    "explanation/forked-pass.html",
    "how-to/steer.html",
    "reference/sites.html",
    "reference/recipes.html",
    "reference/api/reading.html",
]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def served(site: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(params=[1280, 400])
def tab(request, chromium) -> Iterator[Any]:
    """A page of a browser, with what it asked for and complained about."""
    page = chromium.new_page(viewport={"width": request.param, "height": 900})
    page.asked, page.said = [], []
    page.on("request", lambda asked: page.asked.append(asked.url))
    page.on("requestfailed", lambda failed: page.said.append(failed.url))
    page.on("console", lambda message: page.said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: page.said.append(str(error)))
    yield page
    page.close()


@pytest.mark.parametrize("where", ["http", "file"])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_whole_and_asks_nothing_of_the_network(name, where, tab, site, served):
    home = served if where == "http" else site.as_uri() + "/"
    tab.goto(home + name, wait_until="networkidle")
    assert not tab.said
    assert not [url for url in tab.asked if not url.startswith((home, "data:", "blob:"))] and len(tab.asked) > 2
    assert tab.evaluate("document.documentElement.scrollWidth") <= tab.viewport_size["width"]
    assert tab.locator("h1").count() == 1 and tab.locator("article img").evaluate_all(
        "all => all.every(image => image.complete && image.naturalWidth)"
    )
    if name in NOTEBOOKS:
        cells = tab.locator(".jp-OutputArea-output")
        assert cells.count() > 3
        assert not cells.evaluate_all(
            "all => all.filter(cell => !cell.innerText.trim() && !cell.querySelector('img, svg, table, iframe, canvas')).length"
        )


@pytest.mark.parametrize("where", ["http", "file"])
def test_the_search_finds(where, tab, site, served):
    tab.goto((served if where == "http" else site.as_uri() + "/") + "index.html", wait_until="networkidle")
    if tab.viewport_size["width"] < 700:
        tab.locator("label[for=__search]:visible").first.click()
    tab.locator("input[name=query]").click()
    tab.keyboard.type("surprisal", delay=60)
    tab.locator(".md-search-result__link[href*=patchscope], .md-search-result__link[href*=reading]").first.wait_for(
        state="attached", timeout=10_000
    )
    assert not tab.said


def test_what_asks_the_network_is_seen(chromium):
    """The control of the tests above."""
    page, asked = chromium.new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    page.set_content('<script src="http://127.0.0.1:9/mathjax.js"></script>')
    assert asked == ["http://127.0.0.1:9/mathjax.js"]
    page.close()
