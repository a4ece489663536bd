"""Sites: one spelling each, and the order of the forward pass."""

from __future__ import annotations

import pytest
import torch

from hookbook.errors import HookbookError, SiteError
from hookbook.sites import SITES, Site, layers_to_sites
from hookbook.testing import toy
from tests.support.cases import Case

LAYERED = [name for name, spec in SITES.items() if spec.layered]
UNITS = [name for name, spec in SITES.items() if spec.unit]
WHOLE = [Site(name, layer) for layer in (0, 1, 9, 10, 123) for name in LAYERED] + [Site("embed"), Site("final_norm")]
EVERY = WHOLE + [Site(name, layer, unit) for name in UNITS for layer in (0, 10) for unit in (0, 3, 25)]
CARD = toy().card
TWO = toy(n_layers=2).card


@pytest.mark.parametrize("site", EVERY, ids=str)
def test_a_site_is_read_back_from_what_it_prints(site):
    assert Site.parse(str(site)) == site and Site.parse(site) is site
    assert Site.from_hook_name(site.hook_name) == site.whole
    assert (
        site.whole.unit is None
        and (site.whole.name, site.whole.layer) == (site.name, site.layer)
        and (site.whole is site) == (site.unit is None)
    )


def test_the_printed_form_is_name_layer_and_unit():
    assert [str(site) for site in (Site("embed"), Site("attn_out", 3), Site("head_z", 9, 3), Site("mlp_act", 0, 0))] == [
        "embed",
        "attn_out.3",
        "head_z.9.3",
        "mlp_act.0.0",
    ]


def test_sites_can_be_keys_and_are_frozen():
    assert {Site("resid_post", 1): 2}[Site.parse("resid_post.1")] == 2
    with pytest.raises(AttributeError):
        Site("resid_post", 1).layer = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    "text",
    [
        "resid_post.",
        ".1",
        "",
        ".",
        "1",
        "resid_post.01",
        "resid_post.-1",
        "resid_post.+1",
        "head_z.1.",
        "head_z.1.03",
        "head_z.1.-3",
        "head_z..3",
        "head_z.1.2.3",
        "mlp_act.1.x",
        "embed.",
        "resid_post.1e1",
        "resid_post.0x1",
        " resid_post.1",
        "resid_post.1 ",
        "resid_post.1\n",
        "resid_post .1",
        "resid_post. 1",
        "Resid_post.1",
        "RESID_POST.1",
        "resid-post.1",
        "resid_post[1]",
        "resid_post.1_0",
        "resid_post.\u0661",
        "resid_post.\uff11",
        "resid_post.\u00b2",
        "r\u0435sid_post.1",
        "blocks.1.hook_resid_post",
        None,
        1,
        1.0,
        True,
        b"resid_post.1",
        ("resid_post", 1),
    ],
)
def test_nothing_else_is_a_site(text):
    with pytest.raises(SiteError, match="is not a site"):
        Site.parse(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("all", "no site 'all'"),
        ("resid_post", "no layer None of resid_post: layers count blocks from 0"),
        ("head_z", "no layer None of head_z"),
        ("resid_post.1.0", "no site 'resid_post.1.0': resid_post has no heads or neurons to pick from. Instead: write 'resid_post.1'"),
        ("attn_out.2.1", "attn_out has no heads or neurons"),
        ("embed.0", "no site 'embed.0': a model has one embed. Instead: write 'embed'"),
        ("final_norm.3", "a model has one final_norm"),
        ("final_norm.3.1", "no site 'final_norm.3.1': a model has one final_norm"),
    ],
)
def test_what_reads_like_a_site_and_is_none_is_told_why(text, words):
    with pytest.raises(SiteError) as raised:
        Site.parse(text)
    assert words in str(raised.value)


def test_a_misspelt_site_is_told_the_nearest_one():
    with pytest.raises(SiteError) as raised:
        Site.parse("resid_pots.10")
    assert raised.value.instead == "write 'resid_post.10'"
    assert "no site 'resid_pots.10'" in str(raised.value) and all(name in raised.value.why for name in SITES)


def test_a_name_like_no_site_is_shown_what_a_site_looks_like():
    with pytest.raises(SiteError, match=r"write name\.layer, such as 'resid_post\.10'"):
        Site.parse("zzz.10")


@pytest.mark.parametrize("layer", [-1, True, 1.0, "1", None])
def test_a_site_has_a_whole_layer(layer):
    with pytest.raises(SiteError, match="no layer"):
        Site("resid_post", layer)


@pytest.mark.parametrize("unit", [-1, True, 1.0, "1"])
def test_a_head_or_neuron_is_a_whole_number(unit):
    for name in UNITS:
        with pytest.raises(SiteError, match=f"its {SITES[name].unit}s count from 0"):
            Site(name, 1, unit)


@pytest.mark.parametrize("name", ["embed", "final_norm"])
def test_what_no_block_has_takes_no_layer(name):
    assert Site(name).layer is None and not SITES[name].layered
    with pytest.raises(SiteError, match=f"a model has one {name}"):
        Site(name, 0)
    with pytest.raises(SiteError, match=f"a model has one {name}"):
        Site(name, None, 0)


def test_site_errors_are_hookbooks_and_value_errors():
    with pytest.raises(ValueError) as raised:
        Site.parse("resid_post")
    assert isinstance(raised.value, HookbookError)


def test_hook_names_are_those_of_transformer_lens():
    assert [Site(name, 10).hook_name for name in LAYERED] == [
        "blocks.10.hook_resid_pre",
        "blocks.10.attn.hook_pattern",
        "blocks.10.attn.hook_z",
        "blocks.10.hook_attn_out",
        "blocks.10.mlp.hook_in",
        "blocks.10.mlp.hook_post",
        "blocks.10.hook_mlp_out",
        "blocks.10.hook_resid_post",
    ]
    assert [Site("embed").hook_name, Site("final_norm").hook_name] == ["hook_embed", "ln_final.hook_out"]
    assert Site("head_z", 10, 3).hook_name == "blocks.10.attn.hook_z"


def test_other_names_of_the_same_tensors_are_known():
    assert Site.from_hook_name("blocks.10.hook_in") == Site("resid_pre", 10) and Site.from_hook_name("blocks.0.hook_out") == Site(
        "resid_post", 0
    )


@pytest.mark.parametrize(
    ("name", "why", "instead"),
    [
        ("blocks.7.hook_mlp_in", "the stream before the MLP's norm", "use 'mlp_in.7' if that is meant"),
        ("blocks.0.ln2.hook_normalized", "folded into the MLP", "use 'mlp_in.0' if that is meant"),
        ("blocks.1.mlp.hook_out", "a norm comes between", "use 'mlp_out.1' if that is meant"),
        ("blocks.1.attn.hook_out", "a norm comes between", "use 'attn_out.1' if that is meant"),
    ],
)
def test_a_hook_name_of_several_tensors_is_no_site_and_says_why(name, why, instead):
    with pytest.raises(SiteError, match="is not a hook name") as raised:
        Site.from_hook_name(name)
    assert why in raised.value.why and raised.value.instead == instead


@pytest.mark.parametrize(
    "name",
    [
        "",
        "resid_post.1",
        "blocks.1.hook_embed",
        "ln_final.hook_normalized",
        "blocks.1.attn.hook_q",
        "blocks.1.mlp.hook_pre",
        "blocks.01.hook_in",
        "blocks.1.hook_in\n",
        "hook_in",
        "blocks.1.hook_resid_mid",
        "blocks.1.hook_resid_post.x",
        "xblocks.1.hook_resid_post",
        "blocks.-1.hook_resid_post",
        "blocks..hook_resid_post",
        "blocks.{layer}.hook_resid_post",
        "blocksX1Xhook_resid_post",
        "blocks.1.hook_resid_post\n",
        "blocks.01.hook_resid_post",
        "blocks.\uff11.hook_resid_post",
    ],
)
def test_no_other_hook_name_is_a_site(name):
    with pytest.raises(SiteError, match="is not a hook name"):
        Site.from_hook_name(name)


def test_sites_sort_by_layer_then_by_place_in_the_block():
    reached = sorted(reversed(WHOLE), key=lambda site: site.order)
    block = ["resid_pre", "attn_pattern", "head_z", "attn_out", "mlp_in", "mlp_act", "mlp_out", "resid_post"]
    assert [str(site) for site in reached[:10]] == ["embed", *(f"{name}.0" for name in block), "resid_pre.1"]
    assert [site.layer for site in reached[1:-1]] == sorted(site.layer for site in WHOLE[:-2]) and reached[-1] == Site("final_norm")
    assert Site("head_z", 9, 3).order == Site("head_z", 9).order


def test_the_order_is_that_of_the_forward_pass():
    adapter = toy()
    case, reached = Case("toy", adapter), []

    def seen(site: Site, x: torch.Tensor) -> torch.Tensor:
        reached.append(site)
        return x

    handles = [handle for site in reversed(adapter.sites) for handle in case._hooks(site, seen)]
    adapter.plain_logits(torch.tensor([[1, 2]]))
    for handle in handles:
        handle.remove()
    assert len(reached) == adapter.card.n_layers * len(LAYERED) + 2
    assert sorted(reached, key=lambda site: site.order) == reached and tuple(reached) == adapter.sites


def test_a_layer_must_be_in_the_model():
    assert CARD.n_layers == 3 and Site("mlp_out", 2).check(CARD) == Site("mlp_out", 2)
    assert Site("embed").check(CARD) == Site("embed") and Site("final_norm").check(CARD) == Site("final_norm")
    with pytest.raises(SiteError, match="no site 'mlp_out.3': this model has layers 0 to 2"):
        Site("mlp_out", 3).check(CARD)


def test_a_head_or_neuron_must_be_in_the_model():
    assert (CARD.n_heads, CARD.d_head, CARD.d_mlp, CARD.d_model) == (2, 8, 32, 16)
    for name, n in (("attn_pattern", 2), ("head_z", 2), ("mlp_act", 32)):
        assert Site(name, 1, n - 1).check(CARD) == Site(name, 1, n - 1)
        with pytest.raises(SiteError, match=f"no site '{name}.1.{n}': this model has {SITES[name].unit}s 0 to {n - 1}"):
            Site(name, 1, n).check(CARD)


def test_units_and_widths_are_those_of_the_model():
    assert [Site.parse(text).units(CARD) for text in ("resid_post.1", "head_z.1", "attn_pattern.1", "mlp_act.1", "embed")] == [
        (1, 16),
        (2, 8),
        (2, 1),
        (32, 1),
        (1, 16),
    ]
    widths = {"embed": 16, "mlp_out.0": 16, "final_norm": 16, "head_z.0": 16, "head_z.0.1": 8, "mlp_act.0": 32, "mlp_act.0.31": 1}
    assert {text: Site.parse(text).width(CARD) for text in widths} == widths
    odd = toy(n_heads=3, d_head=4).card
    assert Site("head_z", 0).width(odd) == 12 and Site("head_z", 0, 2).width(odd) == 4 and Site("attn_pattern", 0).width(odd) == 3


@pytest.mark.parametrize(
    ("layers", "want"),
    [
        ("all", ["resid_post.0", "resid_post.1", "resid_post.2"]),
        (1, ["resid_post.1"]),
        (0, ["resid_post.0"]),
        (-1, ["resid_post.2"]),
        (-3, ["resid_post.0"]),
        ([2, 0], ["resid_post.2", "resid_post.0"]),
        ((0, -1), ["resid_post.0", "resid_post.2"]),
        (range(1, 3), ["resid_post.1", "resid_post.2"]),
        ((layer for layer in (0, 2)), ["resid_post.0", "resid_post.2"]),
        ("mlp_out.1", ["mlp_out.1"]),
        (Site("attn_out", 0), ["attn_out.0"]),
        ([Site("attn_out", 0), "mlp_out.1", -1], ["attn_out.0", "mlp_out.1", "resid_post.2"]),
        (["head_z.1.0", "head_z.1", "mlp_act.0.31"], ["head_z.1.0", "head_z.1", "mlp_act.0.31"]),
        (["embed", 0, "final_norm"], ["embed", "resid_post.0", "final_norm"]),
        ("final_norm", ["final_norm"]),
        ([1, -2, "resid_post.1", 0], ["resid_post.1", "resid_post.0"]),
    ],
)
def test_layers_mean_sites(layers, want):
    assert [str(site) for site in layers_to_sites(layers, CARD)] == want


def test_a_bare_layer_is_of_the_site_asked_for():
    assert [str(site) for site in layers_to_sites([0, -1, "mlp_out.1"], CARD, "attn_out")] == ["attn_out.0", "attn_out.2", "mlp_out.1"]
    assert layers_to_sites("all", TWO, "resid_pre") == (Site("resid_pre", 0), Site("resid_pre", 1))


@pytest.mark.parametrize(
    "layers",
    [
        [],
        (),
        range(0),
        3,
        -4,
        [0, 3],
        [0, -4],
        "resid_post.3",
        Site("resid_post", 3),
        True,
        False,
        [True],
        None,
        1.0,
        [1.5],
        "1",
        "ALL",
        ["all"],
        "resid_post",
        [None],
        [[0]],
        "head_z",
        "head_z.1.2",
        "mlp_act.0.32",
        "resid_post.1.0",
        "embed.0",
    ],
)
def test_layers_that_are_none_or_outside_are_refused(layers):
    with pytest.raises(SiteError):
        layers_to_sites(layers, CARD)
