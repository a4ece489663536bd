"""SAELens' own models: the same as those they are made of, and refused while SAEs are spliced in."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

import hookbook as hb
from hookbook.errors import EditError, ModelError, Refused
from hookbook.request import Read, Readout, Request, Row
from hookbook.sites import SITES
from tests.support.needs import require
from tests.support.tiny import DTYPE, build, tiny_hooked

TEXTS = ("The cat sat on the mat", "Hi")
KINDS = ("bridge", "hooked")


def sae_model(kind: str, arch: str, tiny_folder: Any) -> Any:
    """A model of SAELens' class with the weights of the tiny one."""
    require("sae_lens")
    from sae_lens.analysis.hooked_sae_transformer import HookedSAETransformer
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    if kind == "bridge":
        return SAETransformerBridge.boot_transformers(str(tiny_folder(arch)), dtype=DTYPE, device="cpu")
    plain = tiny_hooked(arch, tiny_folder(arch))
    model = HookedSAETransformer(plain.cfg, tokenizer=plain.tokenizer)
    model.load_state_dict(plain.state_dict())
    return model


def sae(hook: str, **more: Any) -> Any:
    from sae_lens import StandardSAE, StandardSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    made = StandardSAE(StandardSAEConfig(d_in=16, d_sae=32, dtype="float64", metadata=SAEMetadata(hook_name=hook, **more)))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_gives_what_the_plain_model_gives(kind, arch, tiny_folder):
    ours, plain = hb.wrap(sae_model(kind, arch, tiny_folder)), build(f"{kind}-{arch}", tiny_folder)
    assert type(ours) is type(plain) and type(ours.model) is not type(plain.model) and ours.sites == plain.sites
    prompts, value = [plain.encode(text) for text in TEXTS], torch.linspace(-2, 2, plain.card.d_model, dtype=DTYPE)
    rows = [
        Row(0),
        *(Row(1, (hb.Edit(hb.Site(name, 1), value, "add"),)) for name in ("resid_pre", "attn_out", "mlp_in", "mlp_out", "resid_post")),
    ]
    request = Request(prompts, rows, [Read(site, slice(None)) for site in plain.sites], Readout(logits=True), generate=3)
    mine, theirs = ours.run(request), plain.run(request)
    assert torch.equal(mine.readout.logits, theirs.readout.logits) and mine.generated == theirs.generated  # type: ignore[union-attr]
    assert all(torch.equal(a.values, b.values) for a, b in zip(mine.readings, theirs.readings, strict=True))
    grids = [hb.patchscope(adapter, TEXTS[0], target="cat -> cat; x", target_layers="all", k=3) for adapter in (ours.model, plain.model)]
    assert grids[0].to_frame().equals(grids[1].to_frame()) and len(grids[0].to_frame()) > plain.card.n_layers**2


def of_class(name: str, arch: str, tiny_folder: Any) -> Any:
    kind, _, plain = name.partition(" ")
    return build(f"{kind}-{arch}", tiny_folder).model if plain else sae_model(kind, arch, tiny_folder)


NAMES = ("bridge", "hooked", "bridge plain", "hooked plain")


@pytest.mark.parametrize("arch", ["gpt2", "llama", "gemma3"])
@pytest.mark.parametrize("name", NAMES)
def test_hooks_with_the_names_that_a_model_has_are_hookbooks_own_edit(name, arch, tiny_folder):
    model = of_class(name, arch, tiny_folder)
    adapter = hb.wrap(model)
    tokens, lens = adapter.encode(TEXTS[0]), {"prepend_bos": False} if "hooked" in name else {}
    ids, clean = torch.tensor([tokens.ids]), adapter.run(Request([adapter.encode(TEXTS[0])], [Row(0)], (), Readout(logits=True)))
    refused = []
    for site in (hb.Site(name, 1 if spec.layered else None) for name, spec in SITES.items() if name != "attn_pattern"):
        vector = hb.Vector.of(adapter, site, torch.linspace(-2, 2, site.width(adapter.card)))
        if adapter.hook_name(site) is None:
            refused.append(site.name)
            with pytest.raises(Refused, match="no hook point"):
                vector.fwd_hooks(model)
            continue
        for op, position in (("add", -1), ("add", slice(-3, None)), ("set", slice(None)), ("set", -1)):
            edit = vector.edit(op, 1.5, position=position)
            want = adapter.run(Request([tokens], [Row(0, (edit,))], (), Readout(logits=True))).readout.logits  # type: ignore[union-attr]
            hooks = vector.fwd_hooks(model, strength=1.5, position=position, op=op)
            ours = model.run_with_hooks(ids, fwd_hooks=hooks, **lens)
            assert (ours[0, -1] - want[0]).abs().max() < 1e-6, (site, op, position)
            with model.hooks(fwd_hooks=vector.fwd_hooks(adapter, strength=1.5, position=position, op=op)):
                assert torch.equal(model(ids, **lens), ours)
            assert (want - clean.readout.logits).abs().max() > 1e-3, (site, op, position)  # type: ignore[union-attr]
    assert refused == {"hooked": ["final_norm"], "hooked plain": ["mlp_in", "final_norm"]}.get(name, [])


def test_the_names_of_other_models_do_nothing_on_a_bridge_of_sae_lens(tiny_folder):
    """Why `fwd_hooks` takes the model; should this end, `Site.hook_name` and the pages need not say so."""
    model, plain = sae_model("bridge", "llama", tiny_folder), build("bridge-llama", tiny_folder).model
    ids = torch.tensor([hb.wrap(model).encode(TEXTS[0]).ids])
    for name in ("resid_pre", "attn_out", "mlp_out", "resid_post"):
        hooks = hb.Vector.of(model, hb.Site(name, 1), torch.linspace(-2, 2, 16)).fwd_hooks(position=slice(None))
        assert torch.equal(model.run_with_hooks(ids, fwd_hooks=hooks), model(ids)), name
        assert (plain.run_with_hooks(ids, fwd_hooks=hooks) - plain(ids)).abs().max() > 0.01, name


def test_hooks_for_a_model_that_takes_none_or_another_are_refused(tiny_folder):
    bridge = build("bridge-llama", tiny_folder)
    vector = hb.Vector.of(bridge, "resid_post.1", torch.ones(16))
    with pytest.raises(EditError, match="a vector of"):
        vector.fwd_hooks(build("bridge-gpt2", tiny_folder).model)
    nnsight = build("nnsight-llama", tiny_folder)
    with pytest.raises(Refused, match="resid_post.1 of a TransformersModel as a TransformerLens hook: it has no hook point there"):
        hb.Vector.of(nnsight, "resid_post.1", torch.ones(16)).fwd_hooks(nnsight.model)
    model = sae_model("bridge", "llama", tiny_folder)
    model.add_sae(sae(hb.Site("resid_post", 1).hook_name))
    with pytest.raises(ModelError, match="SAEs spliced in"):
        vector.fwd_hooks(model)
    with pytest.raises(EditError, match="only add and set at a whole site"):
        hb.Vector.of(bridge, "attn_pattern.1", torch.ones(4)).fwd_hooks(bridge)


@pytest.mark.parametrize("spliced", ["resid_pre", "resid_post", "mlp_out", "transcoder"])
@pytest.mark.parametrize("kind", KINDS)
def test_saes_that_are_spliced_in_are_refused_before_and_after_wrapping(kind, spliced, tiny_folder):
    model = sae_model(kind, "llama", tiny_folder)
    adapter = hb.wrap(model)
    tokens = adapter.encode(TEXTS[0])
    clean = adapter.run(Request([tokens], [Row(0)], [], Readout(logits=True)))
    hook, more = (
        ("blocks.1.mlp.hook_in", {"hook_name_out": "blocks.1.hook_mlp_out"})
        if spliced == "transcoder"
        else (hb.Site(spliced, 1).hook_name, {})
    )
    model.add_sae(sae(hook, **more))
    saying = {"match": f"SAEs spliced in at {hook}.*call model.reset_saes"}
    with pytest.raises(ModelError, **saying):
        hb.wrap(model)
    for run in (
        lambda: adapter.run(Request([tokens], [Row(0)], [], Readout(logits=True))),
        lambda: adapter.run(
            Request([tokens], [Row(0)], [Read("mlp_out.1")])
        ),  # whose hook point may be gone, which is no reason to say that it never was
        lambda: adapter.run(Request([tokens], [Row(0)], generate=2)),
        lambda: adapter.readout(torch.ones(1, 16, dtype=DTYPE), k=1),
        lambda: hb.logit_lens(adapter, TEXTS[0]),
        lambda: hb.patchscope(model, TEXTS[0], target="cat -> cat; x"),
    ):
        with pytest.raises(ModelError, **saying):
            run()
    model.reset_saes()
    again = adapter.run(Request([tokens], [Row(0)], [Read("mlp_out.1"), Read("mlp_in.1")], Readout(logits=True)))
    assert torch.equal(again.readout.logits, clean.readout.logits)  # type: ignore[union-attr]


def test_a_model_that_was_spliced_when_it_was_first_run_is_not_remembered_as_one_that_cannot_be(tiny_folder):
    """What a model says of itself is kept; it must not be asked while SAEs are in it."""
    model = sae_model("bridge", "llama", tiny_folder)
    adapter = hb.wrap(model)
    model.add_sae(sae("blocks.0.hook_mlp_out"))
    request = Request([adapter.encode(TEXTS[0])], [Row(0)], [Read("mlp_out.0")])
    with pytest.raises(ModelError, match="reset_saes"):
        adapter.run(request)
    model.reset_saes()
    assert torch.equal(adapter.run(request).readings[0].values, build("bridge-llama", tiny_folder).run(request).readings[0].values)


def test_wrapping_a_transformer_lens_model_does_not_import_sae_lens(tiny_folder):
    require("transformer_lens")
    code = (
        f"import sys, hookbook as hb; hb.load({str(tiny_folder('llama'))!r}, device='cpu'); "
        "assert 'transformer_lens' in sys.modules; assert 'sae_lens' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
