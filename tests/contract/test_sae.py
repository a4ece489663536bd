"""SAEs of SAELens on every adapter: encoding, reconstruction and edits of features against SAELens' own encode and decode in plain hooks."""

from __future__ import annotations

import pytest
import torch
from sae_lens import SAE

import hookbook as hb
from hookbook.request import Read, Readout, Request, Row
from tests.conftest import SAES, assert_plain

N = 24
ARCHITECTURES = ["standard", "jumprelu", "topk", "gated"]


def make_sae(adapter, architecture="jumprelu", name="resid_post", layer: int | None = 1, seed=0, **more):
    """A random SAE of SAELens for an adapter's site, in float64."""
    site = hb.Site(name, layer)
    config = {
        "d_in": site.width(adapter.card),
        "d_sae": N,
        "dtype": "float64",
        "metadata": {"hook_name": site.hook_name, "model_name": adapter.card.model_id},
        "architecture": architecture,
        **({"k": 5} if architecture == "topk" else {}),
        **({"reshape_activations": "hook_z"} if name == "head_z" else {}),
        **more,
    }
    cls = SAE.get_sae_class_for_architecture(architecture)
    sae = cls(SAE.get_sae_config_class_for_architecture(architecture).from_dict(config))
    generator = torch.Generator().manual_seed(seed)
    for key, value in sae.state_dict().items():
        scale = 0.1 if key == "threshold" else 1.0 if key.startswith("W") else 0.3
        drawn = torch.randn(value.shape, generator=generator, dtype=value.dtype) * scale
        value.copy_(drawn.abs() if key == "threshold" else drawn)
    return sae


def attached(case, *args, **more):
    sae = hb.sae.attach(case.adapter, make_sae(case.adapter, *args, **more))
    SAES[sae.name] = sae.sae
    return sae


def check(case, edits, generate=0, reads=()):
    """Several rows in one climb equal plain runs through SAELens."""
    prompts = [case.adapter.encode("a prompt"), case.adapter.encode("another, longer")]
    rows = [Row(i % 2, edits=edit if isinstance(edit, tuple) else (edit,)) for i, edit in enumerate(edits)]
    request = Request(prompts, [Row(0), *rows], [Read(site) for site in reads], Readout(logits=True, k=2), generate=generate)
    exact = 1e-10 if case.name == "toy" or "gpt2" in case.name else 1e-6  # the others' norms compute in float32
    assert_plain(case, request, case.adapter.run(request, progress=False), exact)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale"])
def test_edits_of_features_are_hooks_between_encode_and_decode(case, architecture, norm):
    sae = attached(case, architecture, normalize_activations=norm)
    check(
        case,
        [
            sae.edit(3, to=2.0),
            sae.edit([1, 5, 7], add=[1.0, -2.0, 0.5]),
            sae.edit([2, 3], scale=-1.5, position=[1, -1]),
            sae.edit([2, 3], to=0, keep_error=False),
            sae.edit(8, to=1.0, position=-1),
            sae.edit(9, to=1.0, position=-1),
            sae.keep_only([0, 4, 6]),
            sae.keep_only([0, 4, 6], keep_error=False),
            sae.splice(keep_error=False),
        ],
    )


@pytest.mark.parametrize("architecture", ["jumprelu", "topk"])
def test_edits_of_features_while_tokens_are_generated(case, architecture):
    sae = attached(case, architecture)
    check(case, [sae.edit(3, to=5.0, scope="generated"), sae.edit([1, 2], to=4.0, scope="all"), sae.keep_only([1, 2], scope="all")], generate=4)


@pytest.mark.parametrize("name", ["resid_pre", "attn_out", "mlp_out", "head_z"])
def test_every_site_an_sae_can_have(case, name):
    sae = attached(case, "standard", name)
    direction = torch.randn(sae.site.width(case.adapter.card), dtype=torch.float64)
    before = hb.Edit(sae.site, direction, "add", -1)  # what the encoder sees includes edits before
    check(case, [sae.edit(3, to=2.0), (before, sae.edit(3, scale=2.0)), sae.splice(keep_error=False)], reads=[sae.site])


def test_with_the_error_term_and_nothing_edited_the_logits_are_the_plain_run_s(case):
    sae = attached(case)
    prompts = [case.adapter.encode("a prompt")]
    plain, spliced = case.adapter.run(Request(prompts, [Row(0), Row(0, (sae.splice(),))], readout=Readout(logits=True))).readout.logits
    assert (plain - spliced).abs().max() < 1e-10


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_encode_and_reconstruct_are_saelens_own(case, architecture):
    sae = attached(case, architecture, name="head_z")
    reading = case.adapter.run(Request([case.adapter.encode("a prompt")], [Row(0)], [Read(sae.site, slice(None))])).readings[0]
    heads = reading.values.unflatten(-1, (case.adapter.card.n_heads, -1))
    acts = sae.sae.encode(heads)
    assert torch.equal(sae.encode(reading.values), acts) and acts.count_nonzero() > 0
    assert torch.equal(sae.reconstruct(reading.values), sae.sae.decode(acts).flatten(1))
