"""SAELens' own models: the same as those they are made of, and refused while SAEs are spliced in."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

import hookbook as hb
from hookbook.errors import ModelError
from hookbook.request import Read, Readout, Request, Row
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
