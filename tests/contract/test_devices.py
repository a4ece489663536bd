"""Models whose weights are spread by accelerate, and dtypes: the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hookbook as hb
from hookbook.recipes.reading.jacobians import jacobian
from hookbook.request import Read, Readout, Request, Row
from hookbook.testing import toy_tokenizer

SPREAD = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "disk", "lm_head": "cpu"} | {
    f"model.layers.{i}": place for i, place in enumerate(("cpu", "disk", "cpu", "disk"))
}


def spread(backend: str, arch: str, folder: str, scratch: Any) -> hb.Adapter:
    from nnsight import TransformersModel
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # TransformerLens itself refuses disks, because its components read weights past accelerate's hooks
    places = {"": "cpu"} if backend == "bridge" else SPREAD
    module = AutoModelForCausalLM.from_pretrained(
        folder, device_map=places, offload_folder=str(scratch), attn_implementation="eager"
    ).eval()
    if backend == "bridge":
        return hb.wrap(TransformerBridge.boot_transformers(folder, hf_model=module, tokenizer=AutoTokenizer.from_pretrained(folder)))
    return hb.wrap(TransformersModel(module, tokenizer=toy_tokenizer()), toy_tokenizer())


@pytest.mark.parametrize("backend", ["bridge", "nnsight"])
@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_a_model_spread_over_devices_gives_the_same_numbers(tiny_folder, tmp_path, backend, arch):
    folder = str(tiny_folder(arch))
    plain, split = hb.load(folder, "nnsight", device="cpu"), spread(backend, arch, folder, tmp_path)

    def request(adapter: hb.Adapter) -> Request:
        prompts = [adapter.encode("The cat sat"), adapter.encode("Hi")]
        vector = torch.linspace(-1, 1, adapter.card.d_model)
        rows = [
            Row(0),
            Row(1, (hb.Edit("resid_post.1", vector, scope="all"),)),
            Row(0, (hb.Edit("attn_pattern.2", op="knock_out", keys=0),)),
        ]
        return Request(prompts, rows, [Read("head_z.3"), Read("attn_pattern.1"), Read("mlp_act.2.3")], Readout(logits=True), generate=4)

    want, got = plain.run(request(plain)), split.run(request(split))
    assert split.card.device == "cpu"
    assert (got.readout.logits - want.readout.logits).abs().max() < 1e-4 and got.generated == want.generated
    for a, b in zip(got.readings, want.readings, strict=True):
        assert (a.values - b.values).abs().max() < 1e-4
    ask = ([plain.encode("The cat")], Read("resid_post.3"), [Read("resid_post.0"), Read("mlp_out.2")])
    for a, b in zip(jacobian(split, *ask).matrices, jacobian(plain, *ask).matrices, strict=True):
        assert (a - b).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs_every_site_and_stays_near_float32(tiny_folder, dtype):
    folder = str(tiny_folder("gemma3"))
    for backend in ("transformer_lens", "nnsight"):
        replies = []
        for kind in ("float32", dtype):
            adapter = hb.load(folder, backend, dtype=kind, device="cpu")
            tokens = adapter.encode("The cat sat")
            rows = [Row(0)]
            for site in adapter.sites:
                knock = site.name == "attn_pattern"
                rows.append(Row(0, (hb.Edit(site, op="knock_out", keys=0) if knock else hb.Edit(site, 0.01),)))
            replies.append(adapter.run(Request([tokens], rows, [Read(site) for site in adapter.sites[-9:]], Readout(logits=True))))
        wide, half = replies
        assert torch.isfinite(half.readout.logits).all()
        assert (half.readout.logits - wide.readout.logits).abs().max() / wide.readout.logits.abs().max() < 0.05
        for a, b in zip(half.readings, wide.readings, strict=True):
            assert a.values.dtype == getattr(torch, dtype) and (a.values.float() - b.values).abs().max() < 0.05 * (1 + b.values.abs().max())
