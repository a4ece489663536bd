"""The doctor against plain transformers: tiny random models of every family pass, and an adapter that is broken at one site is told by
that site."""

from __future__ import annotations

import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM

from hookbook.models import doctor
from hookbook.sites import SITES, Site
from hookbook.testing import toy_tokenizer
from tests.support.needs import require

FAMILIES = runpy.run_path(str(Path(__file__).parents[2] / "docs/generate.py"))["families"]()
REFUSED = {
    "Qwen3-MoE": {("TransformerBridge", "mlp_act"), ("nnsight", "mlp_act")},
    "OPT": {("TransformerBridge", "attn_pattern"), ("TransformerBridge", "mlp_act"), ("nnsight", "mlp_act")},
    "GPT-J": {("TransformerBridge", "attn_pattern"), ("nnsight", "attn_pattern")},
}
"""As docs/reference/sites.md has it."""
FUSED_ON_BRIDGE = {"Llama", "Gemma 3", "Qwen3-MoE"}
"""Whose attention the bridge can leave to transformers."""


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """A name, and a folder with a model of it."""
    for module in ("transformer_lens", "nnsight"):
        require(module)
    folder = tmp_path_factory.mktemp("family")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(FAMILIES[request.param][0], dtype=torch.float32).save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return request.param, str(folder)


def test_every_site_of_every_family_is_what_plain_transformers_computes(family):
    name, folder = family
    found = list(doctor.check(folder))
    judged = [finding for finding in found if finding.ok is not None]
    assert all(finding.ok for finding in judged) and len(judged) == 6, found
    refused = {tuple(finding.what.split(": ")) for finding in found if finding.value.startswith("refused: ")}
    assert refused == REFUSED.get(name, set())
    for backend in ("TransformerBridge", "nnsight"):
        layered = sum(spec.layered and (backend, spec.name) not in refused for spec in SITES.values())
        (sites,) = [finding for finding in judged if finding.what == f"{backend}: {2 * layered + 2} sites of 2 layers"]
        assert sites.difference is not None and sites.difference < 1e-5
    long = {finding.what.split(":")[0]: finding.value.startswith("run sdpa") for finding in found if "passes of 128" in finding.what}
    assert long == {"TransformerBridge": name in FUSED_ON_BRIDGE, "nnsight": name != "GPT-J"}


def broken(monkeypatch, at: Site, factor: float) -> None:
    """A TransformerBridge whose reading of one site is scaled."""
    from hookbook.adapters.bridge import BridgeAdapter

    def run(self, request, **settings):
        reply = super(BridgeAdapter, self).run(request, **settings)
        return replace(reply, readings=tuple(replace(r, values=r.values * factor) if r.site == at else r for r in reply.readings))

    monkeypatch.setattr(BridgeAdapter, "run", run)


@pytest.mark.parametrize("name", SITES)
def test_a_reading_that_is_wrong_in_one_layer_is_named(monkeypatch, tiny_folder, name):
    at = Site(name, 1 if SITES[name].layered else None)
    broken(monkeypatch, at, 1.01)
    found = {finding.what.split(": ")[0]: finding for finding in doctor.check(str(tiny_folder("gemma3"))) if " sites of " in finding.what}
    bridge, traced = found["TransformerBridge"], found["nnsight"]
    assert bridge.ok is False and bridge.site == str(at) and bridge.value == f"{at} differs first, by 1.0e-02; 1 differ"
    assert abs(bridge.difference - 0.01) < 1e-4
    assert traced.ok is True


def test_what_is_below_the_tolerance_or_no_number_is_judged(monkeypatch, tiny_folder):
    at = Site("mlp_out", 2)
    for factor, ok in ((1 + 1e-4, True), (1 + 1e-2, False), (float("nan"), False)):
        with monkeypatch.context() as patch:
            broken(patch, at, factor)
            (sites,) = [
                finding
                for finding in doctor.check(str(tiny_folder("llama")))
                if finding.what.startswith("TransformerBridge") and " sites " in finding.what
            ]
            assert sites.ok is ok and (ok or sites.site == str(at))


def test_a_token_is_judged_by_its_own_size(monkeypatch, tiny_folder, tmp_path):
    """A first token that is 10,000 times as large hides nothing of the others."""
    from hookbook.adapters.bridge import BridgeAdapter

    model = AutoModelForCausalLM.from_pretrained(tiny_folder("gpt2"))
    with torch.no_grad():
        model.transformer.wpe.weight[0, 3] += 20_000
    model.save_pretrained(tmp_path)
    toy_tokenizer().save_pretrained(tmp_path)

    def run(self, request, **settings):
        reply = super(BridgeAdapter, self).run(request, **settings)
        other = [torch.where(r.positions == 0, 1, -1)[:, None] if r.site == Site("resid_post", 1) else 1 for r in reply.readings]
        return replace(reply, readings=tuple(replace(r, values=r.values * sign) for r, sign in zip(reply.readings, other, strict=True)))

    monkeypatch.setattr(BridgeAdapter, "run", run)
    bridge, traced = (finding for finding in doctor.check(str(tmp_path)) if " sites of " in finding.what)
    assert (bridge.ok, bridge.site) == (False, "resid_post.1") and bridge.difference == pytest.approx(2, rel=1e-3)
    assert traced.ok


def test_a_continuation_is_the_likeliest_whatever_the_checkpoint_would_do(tiny_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder("gpt2"))
    model.generation_config.repetition_penalty = 1.8
    model.save_pretrained(tmp_path)
    toy_tokenizer().save_pretrained(tmp_path)
    assert '"repetition_penalty": 1.8' in (tmp_path / "generation_config.json").read_text()
    assert [finding.ok for finding in doctor.check(str(tmp_path)) if "greedy" in finding.what] == [True, True]


def test_what_raises_is_a_finding(monkeypatch, tiny_folder, tmp_path):
    """A family without attention and MLPs; an adapter that fails halfway; no TransformerLens to name the modules."""
    from hookbook.adapters.bridge import BridgeAdapter

    MambaForCausalLM(MambaConfig(vocab_size=258, hidden_size=16, num_hidden_layers=2)).save_pretrained(tmp_path)
    toy_tokenizer().save_pretrained(tmp_path)
    (mamba,) = doctor.check(str(tmp_path))
    assert mamba.ok is False and "cannot be compared: KeyError" in mamba.value

    def run(self, request, **settings):
        raise RuntimeError("out of something")

    with monkeypatch.context() as patch:
        patch.setattr(BridgeAdapter, "run", run)
        failed, *others = (finding for finding in doctor.check(str(tiny_folder("gpt2"))) if finding.ok is not None)
    assert (failed.what, failed.value, failed.ok) == ("TransformerBridge", "cannot be run: RuntimeError: out of something", False)
    assert len(others) == 3 and all(finding.ok for finding in others)
    monkeypatch.setitem(sys.modules, "transformer_lens.factories.architecture_adapter_factory", None)
    (missing,) = doctor.check(str(tiny_folder("gpt2")))
    assert missing.ok is False and "hookbook[tl]" in missing.value


def test_of_what_follows_from_a_wrong_tensor_the_first_is_named(monkeypatch, tiny_folder):
    """A hook point before the norm instead of after it: nothing else moves. A hook that changes the pass: all that comes later does."""
    from hookbook.adapters.bridge import BridgeAdapter, Hooked

    point = BridgeAdapter._hook_point

    def other(self, name, layer):
        return self.blocks[2].mlp.hook_out if (name, layer) == ("mlp_out", 2) else point(self, name, layer)

    def changed(self, point, name, layer, climb):
        self.point, more = point, float((name, layer) == ("head_z", 2))
        point.add_hook(lambda x, hook: climb.visit(name, layer, x + more), level=self.LEVEL)

    wrong = ("gemma3", (BridgeAdapter, "_hook_point", other), "mlp_out.2", 1), ("llama", (Hooked, "__init__", changed), "head_z.2", 15)
    for arch, fault, at, number in wrong:
        with monkeypatch.context() as patch:
            patch.setattr(*fault)
            found = {
                finding.what: finding for finding in doctor.check(str(tiny_folder(arch))) if finding.what.startswith("TransformerBridge")
            }
        sites = next(finding for what, finding in found.items() if " sites of " in what)
        assert (sites.ok, sites.site) == (False, at) and sites.value.endswith(f"; {number} differ"), sites
        assert found["TransformerBridge: logits"].ok is (number == 1)


def test_logits_and_tokens_that_differ_are_told(monkeypatch, tiny_folder):
    from hookbook.adapters.tracing import TracingAdapter

    def run(self, request, **settings):
        reply = super(TracingAdapter, self).run(request, **settings)
        return replace(reply, readout=replace(reply.readout, logits=reply.readout.logits + 1), tokens=reply.tokens + 1)

    monkeypatch.setattr(TracingAdapter, "run", run)
    found = {finding.what: finding for finding in doctor.check(str(tiny_folder("llama"))) if finding.what.startswith("nnsight")}
    assert {what.split(": ")[1].split()[0]: finding.ok for what, finding in found.items() if "sites" not in what} == {
        "logits": False,
        "greedy": False,
        "passes": None,
    }


def test_a_model_that_no_adapter_takes_is_no_pass(monkeypatch, tiny_folder):
    def missing():
        raise ImportError("no module named x")

    monkeypatch.setattr(doctor, "_adapters", lambda *args: iter([("x", missing)]))
    found = list(doctor.check(str(tiny_folder("llama"))))
    assert [finding.ok for finding in found] == [None, False]
