"""Sites: one word for each tensor of the forward pass.

A site says which tensor, a position (`hookbook.tokens`) says which token. Names are TransformerLens' words, so
`resid_post.10` is `blocks.10.hook_resid_post`. Layers count blocks from 0, and `resid_post[l]` is `resid_pre[l + 1]`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from hookbook.errors import SiteError


@dataclass(frozen=True, slots=True)
class SiteSpec:
    """What is true of a site on every backend."""

    name: str
    shape: str
    rank: int
    """Order within one block's part of the forward pass."""
    hook_name: str
    """What TransformerLens calls it."""
    meaning: str


SITES: dict[str, SiteSpec] = {
    spec.name: spec
    for spec in (
        SiteSpec("resid_pre", "batch pos d_model", 0, "blocks.{layer}.hook_resid_pre", "stream entering the block"),
        SiteSpec("attn_out", "batch pos d_model", 1, "blocks.{layer}.hook_attn_out", "attention's addition to the stream, after any post-norm"),
        SiteSpec("mlp_out", "batch pos d_model", 2, "blocks.{layer}.hook_mlp_out", "MLP's addition to the stream, after any post-norm"),
        SiteSpec("resid_post", "batch pos d_model", 3, "blocks.{layer}.hook_resid_post", "stream leaving the block"),
    )
}

_GRAMMAR = re.compile(r"([a-z_]+)\.(0|[1-9][0-9]*)")


@dataclass(frozen=True, slots=True)
class Site:
    """Where in the forward pass.

    Example:
        >>> Site.parse("resid_post.10")
        Site(name='resid_post', layer=10)
        >>> str(Site("mlp_out", 3)), Site("mlp_out", 3).hook_name
        ('mlp_out.3', 'blocks.3.hook_mlp_out')
    """

    name: str
    layer: int

    def __post_init__(self) -> None:
        if self.name not in SITES:
            close = difflib.get_close_matches(self.name, SITES, n=1)
            raise SiteError(
                f"no site {str(self)!r}",
                f"the sites are {', '.join(SITES)}",
                f"write '{close[0]}.{self.layer}'" if close else "write name.layer, such as 'resid_post.10'",
            )
        if not isinstance(self.layer, int) or isinstance(self.layer, bool) or self.layer < 0:
            raise SiteError(f"no layer {self.layer!r}", "layers count blocks from 0", "write a whole number of 0 or more")

    @classmethod
    def parse(cls, text: str | Site) -> Site:
        """The site that `str(site)` printed; anything else raises `SiteError`."""
        if isinstance(text, Site):
            return text
        match = _GRAMMAR.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise SiteError(f"{text!r} is not a site", "a site is a name and a layer", "write name.layer, such as 'resid_post.10'")
        return cls(match[1], int(match[2]))

    @classmethod
    def from_hook_name(cls, name: str) -> Site:
        """The site TransformerLens calls `name`, such as `blocks.10.hook_resid_post`."""
        for spec in SITES.values():
            match = re.fullmatch(re.escape(spec.hook_name).replace(r"\{layer\}", "(0|[1-9][0-9]*)"), name)
            if match:
                return cls(spec.name, int(match[1]))
        raise SiteError(f"{name!r} is not a hook name of a site", "", f"use one of {', '.join(s.hook_name for s in SITES.values())}")

    @property
    def hook_name(self) -> str:
        """What TransformerLens calls this site."""
        return SITES[self.name].hook_name.format(layer=self.layer)

    @property
    def order(self) -> tuple[int, int]:
        """Sorts sites as the forward pass reaches them."""
        return (self.layer, SITES[self.name].rank)

    def check(self, n_layers: int) -> Site:
        """This site, or `SiteError` if a model of `n_layers` has none such."""
        if self.layer >= n_layers:
            raise SiteError(f"no site '{self}'", f"this model has layers 0 to {n_layers - 1}", f"use a layer of at most {n_layers - 1}")
        return self

    def __str__(self) -> str:
        return f"{self.name}.{self.layer}"


def layers_to_sites(layers: Any, n_layers: int, name: str = "resid_post") -> tuple[Site, ...]:
    """Sites from `"all"`, a layer, a site, its text, or several of them; `name` is used for bare layers.

    A negative layer counts from the end, as in a list; what is named twice counts once.

    Example:
        >>> [str(site) for site in layers_to_sites([0, -1, "mlp_out.1"], 3)]
        ['resid_post.0', 'resid_post.2', 'mlp_out.1']
    """
    if isinstance(layers, str) and layers == "all":
        layers = range(n_layers)
    if isinstance(layers, (Integral, str, Site)) or not isinstance(layers, Iterable):
        layers = [layers]
    sites = []
    for item in layers:
        if isinstance(item, Integral) and not isinstance(item, bool):
            item = int(item)
            if item < -n_layers:
                raise SiteError(f"no layer {item}", f"this model has layers 0 to {n_layers - 1}", "use one of them")
            item = Site(name, item + n_layers if item < 0 else item)
        sites.append(Site.parse(item).check(n_layers))  # pyright: ignore[reportArgumentType]  parse refuses what it cannot read
    if not sites:
        raise SiteError("no layers were given", "there is nothing to read or edit", "give 'all', a layer, or a list of layers")
    return tuple(dict.fromkeys(sites))
