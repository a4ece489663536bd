"""The rooms of the package, which arrows between them are allowed, and the picture of both: `docs/generate.py` writes it.

A module may import its own room and the rooms its room uses, whether inside a function or for types alone.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Room:
    """Modules that belong together."""

    name: str
    what: str
    modules: tuple[str, ...]
    """On top of `hookbook`; of a folder everything in it."""
    uses: tuple[str, ...]


def _room(name: str, what: str, modules: str, uses: str = "") -> Room:
    return Room(name, what, tuple(modules.split()), tuple(uses.split()))


ROOMS = (
    _room("ground", "errors, the model's card, what runs beside the model", "errors card travel"),
    _room("words", "sites, tokens, requests, numbers that come later, files", "sites tokens maps deferred request reply storage", "ground"),
    _room("data", "tasks, relations, questions, scores", "tasks relations hops scores", "ground words"),
    _room("show", "pictures, tables, views, pages", "show", "ground words"),
    _room("engine", "requests: planned, checked, run, kept", "engine", "ground words"),
    _room("results", "what every result has", "results", "words show"),
    _room("remote", "jobs on a server", "remote", "ground words engine"),
    _room("adapter", "a model as recipes ask it", "adapter", "ground words engine"),
    _room("adapters", "one file for each backend", "adapters", "ground words engine remote adapter"),
    _room("models", "found, loaded, wrapped, examined", "models", "ground words engine adapter adapters"),
    _room(
        "kit",
        "what recipes share, and what users hold",
        "vectors prompts recipe asking controls interop testing",
        "ground words data show engine results remote adapter models",
    ),
    _room("sae", "autoencoders of SAELens on any model", "sae", "ground words show engine results adapter models kit"),
    _room("recipes", "the methods, in chapters", "recipes", "ground words data show engine results adapter models kit sae"),
    _room("face", "hb: the table of public names", "__init__", "ground words data results remote adapter models kit sae recipes engine"),
    _room("reproduce", "published effects", "reproduce", "ground words data show results adapter models kit sae recipes face"),
    _room("cli", "the commands", "cli __main__", "ground words data show results adapter models kit sae recipes face reproduce engine"),
)
"""From the ground up."""

DOORS = {
    ("hookbook.vectors", "hookbook.recipes.features.decomposition"),
    ("hookbook.sae", "hookbook.recipes.features.sae_training"),
}
"""The arrows that run up: `Vector.decompose`, `hb.sae.train`."""

_PLACES = (("hookbook", ROOT / "plugin/hookbook"), ("hookbook.adapters", ROOT / "adapters"), ("hookbook.recipes", ROOT / "recipes"))


def modules(places: tuple[tuple[str, Path], ...] = _PLACES) -> dict[str, Path]:
    """Every module by its name, through the two links; of the package itself the stub, which says what it imports when."""
    found = {}
    for name, place in places:
        for path in sorted(place.rglob("*.py")):  # which does not follow links
            parts = path.relative_to(place).with_suffix("").parts
            found[".".join([name, *parts]).removesuffix(".__init__")] = path
    found["hookbook"] = found["hookbook"].with_suffix(".pyi")
    return found


def arrows(found: dict[str, Path]) -> Iterator[tuple[str, str]]:
    """Which module imports which, wherever in its file."""
    for name, path in found.items():
        package = name if path.stem == "__init__" else name.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                wanted = [(alias.name, "") for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
                base = ".".join([*above, *([node.module] if node.module else [])])
                wanted = [(base, alias.name) for alias in node.names]
            else:
                continue
            for base, what in wanted:
                target = f"{base}.{what}" if f"{base}.{what}" in found else base
                if target in found and target != name:
                    yield name, target


def room(name: str) -> Room:
    """The room of a module."""
    top = (name.split(".") + ["__init__"])[1]
    return next(one for one in ROOMS if top in one.modules)


def wrong(found: dict[str, Path]) -> list[str]:
    """Arrows that are not allowed, and one circle, if there is any."""
    known, said = list(arrows(found)), []
    for source, target in sorted(set(known) - DOORS):
        mine, theirs = room(source), room(target)
        if theirs is not mine and theirs.name not in mine.uses:
            said.append(f"{source} imports {target}: {mine.name} does not use {theirs.name}")
    return said + circle(sorted(set(known) - DOORS))


def circle(known: list[tuple[str, str]]) -> list[str]:
    """The modules of a circle, as one line; nothing if there is none."""
    left = {name for arrow in known for name in arrow}
    while left:  # take away what nothing else that is left imports
        free = left - {target for source, target in known if source in left and source != target}
        if not free:
            return [f"a circle among {', '.join(sorted(_on_circle(left, known)))}"]
        left -= free
    return []


def _on_circle(left: set[str], known: list[tuple[str, str]]) -> set[str]:
    while True:  # take away what imports nothing else that is left, too
        ends = left - {source for source, target in known if target in left}
        if not ends:
            return left
        left = left - ends


def picture() -> str:
    """The rooms as an SVG: a room stands above all that it uses, with a line to each that it does not reach through another."""
    uses = {one.name: set(one.uses) for one in ROOMS}
    level: dict[str, int] = {}
    for one in ROOMS:
        level[one.name] = 1 + max((level[name] for name in one.uses), default=-1)
    rows = [[one for one in ROOMS if level[one.name] == at] for at in range(max(level.values()) + 1)]
    width, height, step, side = 960, 46, 84, 16
    place: dict[str, tuple[float, float, float]] = {}
    for at, row in enumerate(rows):
        each = (width - side * (len(row) + 1)) / len(row)
        for nth, one in enumerate(row):
            place[one.name] = (side + nth * (each + side), (len(rows) - 1 - at) * step + side, each)
    drawn = []
    for one in ROOMS:
        x, y, each = place[one.name]
        for below in sorted(uses[one.name] - set().union(*(uses[name] for name in one.uses))):
            bx, by, beach = place[below]
            line = f'x1="{x + each / 2:.0f}" y1="{y + height}" x2="{bx + beach / 2:.0f}" y2="{by:.0f}"'
            drawn.append(f'<line {line} stroke="#888" stroke-width="1.5" marker-end="url(#tip)"/>')
    for one in ROOMS:
        x, y, each = place[one.name]
        drawn.append(
            f"<g><title>{one.name}: {' '.join(one.modules)}; {one.what}</title>"
            f'<rect x="{x:.0f}" y="{y}" width="{each:.0f}" height="{height}" rx="5" fill="#eef1f8" stroke="#3f51b5"/>'
            f'<text x="{x + each / 2:.0f}" y="{y + 19}" font-size="13" font-weight="600" fill="#1a1a1a">{one.name}</text>'
            f'<text x="{x + each / 2:.0f}" y="{y + 36}" font-size="11" fill="#444">{one.what}</text></g>'
        )
    tall = len(rows) * step
    tip = '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    tip += '<path d="M0 0 8 4 0 8z"/></marker>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {tall}" role="img" text-anchor="middle" font-family="sans-serif">'
        f"<title>The rooms of hookbook: each imports those below it that its lines lead to.</title><defs>{tip}</defs>"
        f'<rect width="{width}" height="{tall}" fill="#fff"/>{"".join(drawn)}</svg>\n'
    )
