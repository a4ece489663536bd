"""The built site: whole, its links lead somewhere, and every public name is in it."""

from __future__ import annotations

import importlib
import inspect
import re
import zlib
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import hookbook as hb
from hookbook.results import Result
from tests.docs.fences import FENCE, PAGES, ROOT

MODULES = (
    "prompts",
    "tasks",
    "relations",
    "hops",
    "scores",
    "interop",
    "sae",
    "sites",
    "request",
    "testing",
    "tokens",
    "show.plots",
    "show.view",
    "results",
    "errors",
)


PARTS = {"stylesheet", "icon", "preload", "modulepreload", "prefetch", "preconnect", "dns-prefetch", "manifest"}
"""Links that a browser follows to show the page."""


class Page(HTMLParser):
    """What a page links to, what of it the page is made of, and what in it can be linked to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.parts: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for key, value in attrs:
            if key in ("href", "src") and value is not None:
                self.links.append(value)
                if key == "src" or (tag == "link" and PARTS.intersection((dict(attrs).get("rel") or "").split())):
                    self.parts.append(value)
            if key == "id" or (key == "name" and tag == "a"):
                self.anchors.add(value or "")


page = cache(Page)


def broken(folder: Path, path: Path) -> list[str]:
    """Links of a page that lead nowhere, or ask the network for a part of the page."""
    found = []
    for link in page(path).links:
        parts = urlsplit(link)
        if parts.scheme in ("data", "mailto"):
            continue
        if parts.scheme or parts.netloc:
            if parts.scheme != "https" or "." not in parts.netloc or " " in link:
                found.append(f"{path.name}: {link} is no address")
            if link in page(path).parts:
                found.append(f"{path.name}: {link} would be loaded")
            continue
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        target = target / "index.html" if target.is_dir() else target
        if path.name == "404.html" and parts.path.startswith("/"):
            target = folder / unquote(parts.path).lstrip("/")
            target = target / "index.html" if target.is_dir() else target
        if not target.is_file():
            found.append(f"{path.relative_to(folder)}: {link} is not there")
        elif parts.fragment and target.suffix == ".html" and unquote(parts.fragment) not in page(target).anchors | {"__skip"}:
            found.append(f"{path.relative_to(folder)}: {link} has no such anchor")
    return found


def test_every_link_of_the_site_leads_somewhere(site):
    files = sorted(site.rglob("*.html"))
    assert len(files) > 25 and (site / "search" / "search_index.json").stat().st_size > 100_000
    assert sum(len(page(path).links) for path in files) > 1000
    assert not [line for path in files for line in broken(site, path)]


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<a href="b.html"></a><a href="#x"></a><img src="c.png"><a href="http://x"></a><a id="y" href="#y"></a>'
    )
    assert len(broken(tmp_path, tmp_path / "a.html")) == 4


def test_a_part_that_would_be_loaded_is_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<script src="https://a.org/x.js"></script><img src="https://a.org/x.png"><link rel="stylesheet" href="https://a.org/x.css">'
        '<link rel="canonical" href="https://a.org/x.html"><a href="https://a.org/y.html"></a><img src="data:image/png;base64,">'
    )
    assert [line.split()[1][-4:] for line in broken(tmp_path, tmp_path / "a.html")] == ["x.js", ".png", ".css"]


@pytest.mark.parametrize("name", [*PAGES, "CHANGELOG.md"])
def test_links_of_a_page_as_it_stands_in_the_repository(name):
    text = FENCE.sub("", (ROOT / name).read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        parts = urlsplit(link)
        if parts.scheme:
            assert parts.scheme == "https" and "." in parts.netloc, f"{name}: {link}"
            continue
        target = ROOT / name if not parts.path else (ROOT / name).parent / unquote(parts.path)
        assert target.exists(), f"{name}: {link}"
        if parts.fragment and target.suffix == ".md" and "reference/api" not in str(target):  # those are made when the site is built
            heads = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.M)
            assert parts.fragment in [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads], f"{name}: {link}"


@pytest.fixture(scope="session")
def shown(site) -> set[str]:
    """Every Python name that the site describes."""
    raw = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    lines = [line.split(" ") for line in zlib.decompress(raw).decode().splitlines()]
    anchors = {name: address.replace("$", name) for name, _, _, address, _ in lines}
    for name, address in anchors.items():  # the inventory is right about them
        path, _, anchor = address.partition("#")
        assert anchor in page(site / path).anchors, name
    return set(anchors)


def test_every_public_name_is_in_the_site(shown):
    for name in hb.__all__:
        value = getattr(hb, name)
        home = f"hookbook.{hb._HOME[name]}.{name}" if name in hb._HOME else f"hookbook.{name}"
        assert {home, f"hookbook.{name}"} & shown, f"hb.{name} is on no page of docs/generate.py"
        assert inspect.getdoc(value), name


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_of_a_module_is_in_the_site(module, shown):
    found = importlib.import_module(f"hookbook.{module}")
    own = [name for name, value in vars(found).items() if not name.startswith("_") and getattr(value, "__module__", None) == found.__name__]
    assert own
    for name in getattr(found, "__all__", own):
        assert {f"hookbook.{module}.{name}", f"hookbook.{name}"} & shown, f"hookbook.{module}.{name}"


def test_every_public_method_of_a_result_is_in_the_site(shown):
    results = [
        getattr(hb, name)
        for name in hb.__all__
        if inspect.isclass(getattr(hb, name)) and issubclass(getattr(hb, name), (Result, hb.Vector))
    ]
    assert len(results) > 20
    for kind in results:
        for name in [name for name in dir(kind) if not name.startswith("_")]:
            owner = next(base for base in kind.__mro__ if name in vars(base))
            assert {f"{owner.__module__}.{owner.__name__}.{name}", f"hookbook.{owner.__name__}.{name}"} & shown, (
                f"{kind.__name__}.{name}, of {owner}"
            )


def test_every_recipe_is_beside_its_paper(site):
    text = (ROOT / "docs/reference/recipes.md").read_text(encoding="utf-8")
    recipes = [name for name in hb.__all__ if hb._HOME.get(name, "").startswith("recipes.") and name[0].islower()]
    assert len(recipes) > 25 and all(f"`hb.{name}`" in text for name in recipes)
    assert len(re.findall(r"arxiv\.org/abs/\d{4}\.\d{5}", text)) > 15
