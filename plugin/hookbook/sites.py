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
from typing import TYPE_CHECKING, Any

from hookbook.errors import SiteError

if TYPE_CHECKING:
    from hookbook.card import ModelCard


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
    unit: str | None = None
    """What a third part of the name picks: `head`, `neuron`, or nothing."""

    @property
    def layered(self) -> bool:
        """Whether every block has one."""
        return "{layer}" in self.hook_name


SITES: dict[str, SiteSpec] = {
    spec.name: spec
    for spec in (
        SiteSpec("embed", "batch pos d_model", -1, "hook_embed", "what the token embedding gives, before learned positions are added"),
        SiteSpec("resid_pre", "batch pos d_model", 0, "blocks.{layer}.hook_resid_pre", "stream entering the block"),
        SiteSpec(
            "attn_pattern",
            "batch head pos key",
            1,
            "blocks.{layer}.attn.hook_pattern",
            "attention of each token to each, after the softmax",
            "head",
        ),
        SiteSpec("head_z", "batch pos head d_head", 2, "blocks.{layer}.attn.hook_z", "input of attention's output projection", "head"),
        SiteSpec(
            "attn_out", "batch pos d_model", 3, "blocks.{layer}.hook_attn_out", "attention's addition to the stream, after any post-norm"
        ),
        SiteSpec("mlp_in", "batch pos d_model", 4, "blocks.{layer}.mlp.hook_in", "what the MLP takes: the stream after the norm before it"),
        SiteSpec(
            "mlp_act", "batch pos d_mlp", 5, "blocks.{layer}.mlp.hook_post", "neurons: input of the MLP's output projection", "neuron"
        ),
        SiteSpec("mlp_out", "batch pos d_model", 6, "blocks.{layer}.hook_mlp_out", "MLP's addition to the stream, after any post-norm"),
        SiteSpec("resid_post", "batch pos d_model", 7, "blocks.{layer}.hook_resid_post", "stream leaving the block"),
        SiteSpec("final_norm", "batch pos d_model", 0, "ln_final.hook_out", "what the final norm gives, which the unembedding takes"),
    )
}

INNER = tuple(
    spec.name for spec in sorted(SITES.values(), key=lambda spec: spec.rank) if spec.layered and not spec.name.startswith("resid")
)
"""Sites inside a block, in the order of the pass."""

_OTHER_NAMES = {"blocks.{layer}.hook_in": "resid_pre", "blocks.{layer}.hook_out": "resid_post"}
"""What a TransformerBridge calls sites, too: the same tensors in every family."""

_NO_SITES = {
    "blocks.{layer}.hook_mlp_in": (
        "TransformerLens has the stream before the MLP's norm there, SAELens' Gemma Scope 2 transcoders mean what the norm gives",
        "mlp_in",
    ),
    "blocks.{layer}.ln2.hook_normalized": (
        "it is what the MLP takes only where the norm's weight and bias are folded into the MLP",
        "mlp_in",
    ),
    "blocks.{layer}.mlp.hook_out": ("in Gemma 2 and 3 and others a norm comes between it and the stream", "mlp_out"),
    "blocks.{layer}.attn.hook_out": ("in Gemma 2 and 3 and others a norm comes between it and the stream", "attn_out"),
}
"""Names of which it depends on the model or the library what they are: why, and the site that is meant if it is."""

_GRAMMAR = re.compile(r"([a-z_]+)(?:\.(0|[1-9][0-9]*)(?:\.(0|[1-9][0-9]*))?)?")
_WRITE = "write name.layer, such as 'resid_post.10', or name.layer.head, such as 'head_z.9.3'"


@dataclass(frozen=True, slots=True)
class Site:
    """Where in the forward pass.

    Args:
        name: One of `SITES`.
        layer: The block, counted from 0; None for `embed` and `final_norm`, which no block has.
        unit: One head of `head_z` or `attn_pattern`, one neuron of `mlp_act`; None: all of them.

    Example:
        >>> Site.parse("resid_post.10")
        Site(name='resid_post', layer=10, unit=None)
        >>> str(Site("mlp_out", 3)), Site("mlp_out", 3).hook_name
        ('mlp_out.3', 'blocks.3.hook_mlp_out')
        >>> Site.parse("head_z.9.3").unit
        3
    """

    name: str
    layer: int | None = None
    unit: int | None = None

    def __post_init__(self) -> None:
        spec = SITES.get(self.name)
        if spec is None:
            close = difflib.get_close_matches(str(self.name), SITES, n=1)
            raise SiteError(
                f"no site {str(self)!r}",
                f"the sites are {', '.join(SITES)}",
                f"write {str(close[0]) + str(self)[len(str(self.name)) :]!r}" if close else _WRITE,
            )
        if not spec.layered:
            if self.layer is not None or self.unit is not None:
                raise SiteError(f"no site {str(self)!r}", f"a model has one {self.name}", f"write {self.name!r}")
            return
        if not _counts(self.layer):
            raise SiteError(f"no layer {self.layer!r} of {self.name}", "layers count blocks from 0", _WRITE)
        if self.unit is not None and (spec.unit is None or not _counts(self.unit)):
            picks = f"its {spec.unit}s count from 0" if spec.unit else f"{self.name} has no heads or neurons to pick from"
            raise SiteError(f"no site {str(self)!r}", picks, f"write '{self.name}.{self.layer}'")

    @classmethod
    def parse(cls, text: str | Site) -> Site:
        """The site that `str(site)` printed; anything else raises `SiteError`."""
        if isinstance(text, Site):
            return text
        match = _GRAMMAR.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise SiteError(f"{text!r} is not a site", "a site is a name and a layer", _WRITE)
        return cls(match[1], *(None if part is None else int(part) for part in match.groups()[1:]))

    @classmethod
    def from_hook_name(cls, name: str) -> Site:
        """The site TransformerLens calls `name`, such as `blocks.10.hook_resid_post`, or `blocks.10.hook_out`."""
        known = {spec.hook_name: spec.name for spec in SITES.values()} | _OTHER_NAMES
        for pattern in (*known, *_NO_SITES):
            match = re.fullmatch(re.escape(pattern).replace(r"\{layer\}", "(0|[1-9][0-9]*)"), name)
            if match and pattern in known:
                return cls(known[pattern], *map(int, match.groups()))
            if match:
                why, site = _NO_SITES[pattern]
                raise SiteError(f"{name!r} is not a hook name of a site", why, f"use '{site}.{match[1]}' if that is meant")
        raise SiteError(f"{name!r} is not a hook name of a site", "", f"use one of {', '.join(s.hook_name for s in SITES.values())}")

    @property
    def hook_name(self) -> str:
        """What TransformerLens calls this site; a head or a neuron is a part of that tensor.

        A TransformerBridge has all of these names, a HookedTransformer not those of `mlp_in` and `final_norm`, and SAELens'
        `SAETransformerBridge` few: `Adapter.hook_name` says what one model calls it.
        """
        return SITES[self.name].hook_name.format(layer=self.layer)

    @property
    def whole(self) -> Site:
        """This site with all its heads or neurons."""
        return self if self.unit is None else Site(self.name, self.layer)

    @property
    def order(self) -> tuple[float, int]:
        """Sorts sites as the forward pass reaches them."""
        layer = {"embed": -1, "final_norm": float("inf")}.get(self.name, self.layer)
        return (layer, SITES[self.name].rank)  # type: ignore[return-value]

    def units(self, card: ModelCard) -> tuple[int, int]:
        """How many heads or neurons a model has here, and the width of one; a site without them is one unit."""
        return {"head_z": (card.n_heads, card.d_head), "attn_pattern": (card.n_heads, 1), "mlp_act": (card.d_mlp, 1)}.get(
            self.name, (1, card.d_model)
        )

    def width(self, card: ModelCard) -> int:
        """The length of a vector here: of one head or neuron if one is named, of all of them end to end otherwise."""
        units, width = self.units(card)
        return width if self.unit is not None else units * width

    def check(self, card: ModelCard) -> Site:
        """This site, or `SiteError` if a model has none such."""
        if self.layer is not None and self.layer >= card.n_layers:
            raise SiteError(
                f"no site '{self}'", f"this model has layers 0 to {card.n_layers - 1}", f"use a layer of at most {card.n_layers - 1}"
            )
        if self.unit is not None and self.unit >= self.units(card)[0]:
            raise SiteError(
                f"no site '{self}'", f"this model has {SITES[self.name].unit}s 0 to {self.units(card)[0] - 1}", "use one of them"
            )
        return self

    def __str__(self) -> str:
        return ".".join(str(part) for part in (self.name, self.layer, self.unit) if part is not None)


def _counts(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0


def layers_to_sites(layers: Any, card: ModelCard, name: str = "resid_post") -> tuple[Site, ...]:
    """Sites from `"all"`, a layer, a site, its text, or several of them; `name` is used for bare layers.

    A negative layer counts from the end, as in a list; what is named twice counts once.

    Example:
        >>> from hookbook.testing import toy
        >>> [str(site) for site in layers_to_sites([0, -1, "mlp_out.1"], toy().card)]
        ['resid_post.0', 'resid_post.2', 'mlp_out.1']
    """
    n_layers = card.n_layers
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
        sites.append(Site.parse(item).check(card))  # pyright: ignore[reportArgumentType]  parse refuses what it cannot read
    if not sites:
        raise SiteError("no layers were given", "there is nothing to read or edit", "give 'all', a layer, or a list of layers")
    return tuple(dict.fromkeys(sites))
