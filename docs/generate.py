"""Writes the pages of docs/reference that come from the code; a test checks that they are up to date."""

from __future__ import annotations

from pathlib import Path

from hookbook.errors import HookbookError
from hookbook.sites import SITES

REFERENCE = Path(__file__).parent / "reference"


def sites() -> str:
    """The table of sites."""
    rows = [f"| `{s.name}.L` | {s.shape} | `{s.hook_name.format(layer='L')}` | {s.meaning} |" for s in SITES.values()]
    return "\n".join([
        "# Sites", "", "A site names one tensor of block `L`, counted from 0. Rows are in the order of the forward pass.", "",
        "| site | shape | TransformerLens | meaning |", "|---|---|---|---|", *rows, "",
        "`resid_post.L` is `resid_pre.(L+1)`. On models with post-norms (Gemma 2 and 3) `attn_out` and `mlp_out` are what joins the stream, after the norm.", "",
    ])  # fmt: skip


def errors() -> str:
    """The table of errors."""
    rows = [f"| `{e.__name__}` | {(e.__doc__ or '').strip().rstrip('.')} |" for e in sorted(HookbookError.__subclasses__(), key=lambda e: e.__name__)]
    return "\n".join([
        "# Errors", "", "Every error says what happened, why, and what to do instead, and is raised before the first forward pass where it can be known.", "",
        "| error | meaning |", "|---|---|", f"| `HookbookError` | {(HookbookError.__doc__ or '').strip().rstrip('.')} |", *rows, "",
    ])  # fmt: skip


PAGES = {"sites.md": sites, "errors.md": errors}


def main() -> None:
    REFERENCE.mkdir(exist_ok=True)
    for name, make in PAGES.items():
        (REFERENCE / name).write_text(make(), encoding="utf-8")


if __name__ == "__main__":
    main()
