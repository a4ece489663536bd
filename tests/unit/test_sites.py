"""Sites: one spelling each, and the order of the forward pass."""

from __future__ import annotations

import pytest
import torch

from hookbook.errors import HookbookError, SiteError
from hookbook.sites import SITES, Site, layers_to_sites
from hookbook.testing import toy
from tests.conftest import Case

EVERY = [Site(name, layer) for layer in (0, 1, 9, 10, 123) for name in SITES]


@pytest.mark.parametrize("site", EVERY, ids=str)
def test_a_site_is_read_back_from_what_it_prints(site):
    assert Site.parse(str(site)) == site and Site.parse(site) is site
    assert Site.from_hook_name(site.hook_name) == site


def test_sites_can_be_keys_and_are_frozen():
    assert {Site("resid_post", 1): 2}[Site.parse("resid_post.1")] == 2
    with pytest.raises(AttributeError):
        Site("resid_post", 1).layer = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    "text",
    [
        "resid_post",
        "resid_post.",
        ".1",
        "",
        ".",
        "1",
        "all",
        "resid_post.01",
        "resid_post.-1",
        "resid_post.+1",
        "resid_post.1.0",
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


def test_site_errors_are_hookbooks_and_value_errors():
    with pytest.raises(ValueError) as raised:
        Site.parse("resid_post")
    assert isinstance(raised.value, HookbookError)


def test_hook_names_are_those_of_transformer_lens():
    assert [Site(name, 10).hook_name for name in SITES] == [
        "blocks.10.hook_resid_pre",
        "blocks.10.hook_attn_out",
        "blocks.10.hook_mlp_out",
        "blocks.10.hook_resid_post",
    ]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "resid_post.1",
        "hook_embed",
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
    reached = sorted(reversed(EVERY), key=lambda site: site.order)
    assert [str(site) for site in reached[:5]] == ["resid_pre.0", "attn_out.0", "mlp_out.0", "resid_post.0", "resid_pre.1"]
    assert [site.layer for site in reached] == sorted(site.layer for site in EVERY)


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
    assert len(reached) == adapter.card.n_layers * len(SITES)
    assert sorted(reached, key=lambda site: site.order) == reached and tuple(reached) == adapter.sites


def test_a_layer_must_be_in_the_model():
    assert Site("mlp_out", 2).check(3) == Site("mlp_out", 2)
    with pytest.raises(SiteError, match="no site 'mlp_out.3': this model has layers 0 to 2"):
        Site("mlp_out", 3).check(3)


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
    ],
)
def test_layers_mean_sites(layers, want):
    assert [str(site) for site in layers_to_sites(layers, 3)] == want


def test_a_bare_layer_is_of_the_site_asked_for():
    assert [str(site) for site in layers_to_sites([0, -1, "mlp_out.1"], 3, "attn_out")] == ["attn_out.0", "attn_out.2", "mlp_out.1"]
    assert layers_to_sites("all", 2, "resid_pre") == (Site("resid_pre", 0), Site("resid_pre", 1))


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
    ],
)
def test_layers_that_are_none_or_outside_are_refused(layers):
    with pytest.raises(SiteError):
        layers_to_sites(layers, 3)
