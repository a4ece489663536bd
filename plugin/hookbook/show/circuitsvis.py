"""circuitsvis pictures that need no network and are light: the library, 1.3 MB, travels compressed, and a page runs it once."""

from __future__ import annotations

import base64
import gzip
import hashlib
import re
from functools import cache
from pathlib import Path
from typing import Any

from hookbook.errors import Refused
from hookbook.show.text import need

_CALL = re.compile(r"CircuitsVis\.render\(\s*\"[^\"]*\",\s*CircuitsVis\.(\w+),\s*(\{.*\})\s*\)\s*</script>\s*$", re.DOTALL)

_DRAW = """
(async () => {
  const drawn = document.querySelectorAll('[data-hookbook-view="KEY"]:not([data-hookbook-drawn])');
  drawn.forEach((box) => { box.dataset.hookbookDrawn = "" });
  try {
    window.hookbookCircuitsVis ??= (async () => {
      const bytes = Uint8Array.from(atob("BUNDLE"), (letter) => letter.charCodeAt(0));
      const code = document.createElement("script");
      code.textContent = await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
      document.head.appendChild(code).remove();
      return window.CircuitsVis;
    })();
    const library = await window.hookbookCircuitsVis;
    drawn.forEach((box) => {
      box.textContent = "";
      box.id = "hookbook-view-" + (window.hookbookViews = (window.hookbookViews ?? 0) + 1);
      library.render(box.id, library.NAME, PROPS);
    });
  } catch (error) {
    drawn.forEach((box) => { box.textContent = "This picture could not be drawn: " + error });
  }
})();
"""


def drawn(source: str) -> str:
    """HTML that draws what a circuitsvis picture's `local_src` would. The same picture twice on a page is drawn twice."""
    found = _CALL.search(source)
    if found is None:
        raise Refused(
            "view()", "this circuitsvis writes its pictures in a way that hookbook does not know", "pip install circuitsvis==1.43.3"
        )
    name, props = (
        found[1],
        found[2].replace("</", "<\\/").replace("<!--", "<\\!--").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"),
    )
    key = hashlib.sha256((name + props).encode()).hexdigest()[:12]
    parts = {"KEY": key, "BUNDLE": _packed(), "NAME": name, "PROPS": props}
    script = re.sub("|".join(parts), lambda part: parts[part[0]], _DRAW)
    style = "background:#fff;color:#000;color-scheme:light;padding:.5rem;overflow-x:auto"
    # for what is shown beside a token, not for a screen
    room = '<style>[data-hookbook-view] > div[style*="600px"] { padding-bottom: 10rem !important }</style>'
    words = "This picture needs scripts: in a notebook, trust it or run the cell; in a browser, allow them for this page."
    return (
        f'{room}<div data-hookbook-view="{key}" role=region tabindex=0 aria-label="interactive picture" style="{style}">'
        f"{words}</div><script>{script}</script>"
    )


@cache
def _bundle() -> bytes:
    circuitsvis: Any = need("circuitsvis", "view()")
    return (Path(circuitsvis.__file__).parent / "dist/cdn/iife.js").read_bytes()


@cache
def _packed() -> str:
    return base64.b64encode(gzip.compress(_bundle(), 9, mtime=0)).decode()


def once(page: str) -> str:
    """A page on which only the first view brings the library; its promise is there before a later script runs."""
    if "data-hookbook-view" not in page:
        return page
    head, found, tail = page.partition(_packed())
    return head + found + tail.replace(_packed(), "")


def policy(page: str) -> str:
    """The content security policy under which a page's own scripts run, each by its hash, and nothing else does."""
    scripts = [script.encode() for script in re.findall(r"<script>(.*?)</script>", page, re.DOTALL)]
    if scripts:
        scripts.append(_bundle())
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(script).digest()).decode()}'" for script in scripts)
    return "default-src 'none'; style-src 'unsafe-inline'; img-src data:" + (f"; script-src {hashes}" if hashes else "")
