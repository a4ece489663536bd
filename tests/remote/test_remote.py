"""Every recipe on a real server: the same numbers as here, one job for a call, small up and small down, and nothing lost when something
breaks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from nnsight import TransformersModel

import hookbook as hb
from hookbook.errors import RemoteError
from hookbook.remote import service as jobs
from hookbook.request import Read, Readout, Request, Row
from tests.contract.test_sae import N, make_sae
from tests.docs.fences import SERVER_PAGES, run_page
from tests.remote.server import STATE, Server

SANDBOX = os.environ["HOOKBOOK_TEST_SERVER"] == "sandbox"
REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROMPTS = ["The capital of France is", "Hello there, my"]
HOPS = hb.hops.chain("city_country", "country_capital", 3, shots=1)
trusted = pytest.mark.skipif(SANDBOX, reason="the same on both paths")


@pytest.fixture(scope="session")
def server() -> Server:
    """The one that runs."""
    state = json.loads(STATE.read_text())
    found = Server(state["sandbox"])
    found.pids, found.ports = state["pids"], state["ports"]
    return found


def weightless(repo: str = REPO) -> TransformersModel:
    return TransformersModel(repo, task="text-generation", tokenizer=repo, dtype="float32")


@pytest.fixture(scope="session")
def remote(server) -> Any:
    return hb.wrap(weightless(), remote=True)


@pytest.fixture(scope="session")
def local() -> hb.Adapter:
    return hb.load("smollm2-135m-instruct", "nnsight")


def same(ours: Any, theirs: Any) -> None:
    """Equal; numbers within 1e-4 of their size (the server has another kernel for attention, and no packed rows)."""
    assert type(ours) is type(theirs)
    if isinstance(ours, torch.Tensor):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        if ours.is_floating_point():
            assert torch.isclose(ours, theirs, rtol=1e-4, atol=1e-4, equal_nan=True).all()
        else:
            assert torch.equal(ours, theirs)
    elif isinstance(ours, (tuple, list)):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            same(a, b)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            if key != "cost":  # a sandbox runs earlier tokens again
                same(ours[key], theirs[key])
    elif isinstance(ours, float):
        assert abs(ours - theirs) <= 1e-4 * (1 + abs(theirs))
    elif not isinstance(ours, hb.ModelCard):
        assert ours == theirs


def fields(result: Any) -> dict[str, Any]:
    return {key: value for key, value in vars(result).items() if "card" not in key}


def made(model: hb.Adapter) -> hb.LinearRelation:
    """A relation whose map is noise, so that what uses it needs no gradients."""
    relation, draw = hb.relations.load("present_past"), torch.Generator().manual_seed(0)
    pairs = (("go", "went"), *(pair for pair in relation.pairs if pair[0] != "go"))
    sites, yes, half = (hb.Site("resid_post", 9), hb.Site("resid_post", 14)), torch.ones(4, dtype=torch.bool), torch.full((2,), 0.5)
    weight = torch.randn(2, 576, 576, generator=draw) / 24 + torch.eye(576)
    parts = {"train": pairs[:3], "validation": pairs[3:7], "test": pairs[7:11], "validation_known": yes, "test_known": yes}
    return hb.LinearRelation(
        card=model.card,
        relation="present_past",
        template=relation.templates[0],
        answer=relation.answer,
        sites=sites,
        weight=weight,
        bias=torch.randn(2, 576, generator=draw),
        betas=(1.0,),
        beta=2 * half,
        chosen_by=half[:, None],
        faithfulness=half,
        controls={},
        settings={},
        **parts,
    )


def sae(model: hb.Adapter, architecture: str = "jumprelu") -> hb.sae.AttachedSAE:
    """A random SAE of the stream in the middle, or a transcoder of the MLP there."""
    where, more = {"hook_name": "blocks.9.hook_resid_post"}, {}
    if "transcoder" in architecture:
        where, more = (
            {"hook_name": "blocks.9.mlp.hook_in", "hook_name_out": "blocks.9.hook_mlp_out"},
            {"d_out": 576, "apply_b_dec_to_input": False},
        )
    where |= {"neuronpedia_id": "nobody/9"}  # stands for the model, which has another name here than there
    more |= {"metadata": where, "dtype": "float32"}
    return hb.sae.attach(model, make_sae(model, architecture, **more), maxima=torch.ones(N))


RECIPES = {
    "steering by a feature": lambda model: hb.steer_feature(
        sae(model), 3, PROMPTS, times_max=[-9, 20], score=hb.scores.french_score, generate=4
    ),
    "features of an SAE while tokens are generated": lambda model: hb.generate(
        model,
        PROMPTS,
        edits=[sae(model).edit([1, 2], add=[9.0, -9.0], scope="all"), sae(model).splice(keep_error=False, position=2)],
        max_new_tokens=5,
    ),
    "features of a transcoder while tokens are generated": lambda model: hb.generate(
        model, PROMPTS, edits=[sae(model, "skip_transcoder").edit([1, 2], to=[9.0, -9.0], scope="all")], max_new_tokens=5
    ),
    "only some features of a TopK SAE": lambda model: hb.generate(
        model, PROMPTS, edits=[sae(model, "topk").keep_only([1, 2, 3])], max_new_tokens=5
    ),
    "logit lens": lambda model: hb.logit_lens(model, PROMPTS, tokens=[" Paris"]),
    "logit lens of several tokens and languages": lambda model: hb.logit_lens(
        model,
        PROMPTS,
        position=[-2, -1],
        layers=[3, "mlp_out.9", 28],
        tokens=[" Paris"],
        languages=[{"a": "Paris", "b": "the"}, {"a": "friend", "b": "name"}],
    ),
    "all pairs": lambda model: hb.patchscope(model, "The Eiffel Tower is in", target_layers="all", k=5),
    "descriptions": lambda model: hb.patchscope(
        model, ["Bob Dylan", "Barack Obama"], target=hb.prompts.ENTITY_DESCRIPTION, source_layers=[2, 9, 20], generate=6
    ),
    "generation": lambda model: hb.generate(
        model, PROMPTS, edits=[hb.Edit("resid_post.3", torch.linspace(-3, 3, 576), position=slice(None), scope="all")], max_new_tokens=6
    ),
    "task vector": lambda model: hb.task_vector(model, hb.tasks.load("singular_plural"), layers=[9, 21], shots=3, n_prompts=4, queries=5),
    "effects of heads": lambda model: hb.head_effects(
        model, [hb.tasks.load("singular_plural"), hb.tasks.load("present_past")], shots=3, n_prompts=4, n_trials=2
    ),
    "function vector": lambda model: hb.function_vector(
        model, hb.tasks.load("singular_plural"), heads=3, strength=4.0, layers=[9, 14], shots=3, n_prompts=4, n_trials=2, queries=4
    ),
    "sum of vectors": lambda model: hb.compose(model, hb.tasks.load("capitalize"), layers=[21], shots=3, n_prompts=4, queries=4),
    "contrast vectors": lambda model: hb.contrast_vector(
        model, *(texts[:6] for texts in hb.tasks.contrast("sentiment")), layers=[9, 21], position=[-1, slice(1, None)]
    ),
    "in-context vectors": lambda model: hb.in_context_vector(
        model, [("It is bad.", "It is good."), ("I am sad.", "I am glad."), ("No!", "Oh yes.")]
    ),
    "steering": lambda model: hb.steer(
        model,
        hb.Vector(model.card, hb.Site("resid_pre", 9), torch.linspace(-3, 3, 576)),
        PROMPTS,
        strengths=[-1, 2],
        score=hb.scores.french_score,
        generate=4,
    ),
    "steering towards words": lambda model: hb.steer(
        model,
        hb.Vector(model.card, hb.Site("mlp_out", 9), torch.linspace(-3, 3, 576)),
        PROMPTS,
        layers=[9, 20],
        tokens=([" Paris"], [" name"]),
    ),
    "two hops": lambda model: hb.two_hops(model, HOPS),
    "two hops by text": lambda model: hb.two_hops(model, HOPS[:2], generate=4),
    "two hops by layer": lambda model: hb.hop_readability(model, HOPS, layers=[2, 9, 20], generate=4),
    "backpatching": lambda model: hb.backpatch(model, HOPS, pairs=[(20, 4), (12, 9), (29, 0)], position="bridge"),
    "backpatching by text": lambda model: hb.backpatch(model, HOPS[:2], pairs=[(20, 4), (12, 9)], generate=4),
    "edits along a relation": lambda model: hb.edit_relation(model, made(model), ranks=[2, 5], changes=3, n_unrelated=1),
    "a changed answer": lambda model: hb.change_answer(model, made(model), "run", "went", rank=5, max_new_tokens=4),
    "what a relation reads elsewhere": lambda model: hb.attribute_lens(
        model, made(model), "They walk home", position="walk", tokens=[" walked"]
    ),
    "every feature and some strengths": lambda model: hb.feature_sweep(sae(model), PROMPTS[0], strengths=[-3.0, 9.0], tokens=[" Paris"]),
    "features backpatched": lambda model: hb.backpatch_features(sae(model), HOPS, [1, 2, 3], source_layers=[14, 20]),
    "features described": lambda model: hb.feature_patchscope(sae(model), [1, 2], strengths=[1.0], generate=4),
    "features": lambda model: hb.feature_activations(sae(model), PROMPTS),
    "features' examples": lambda model: hb.feature_examples(sae(model), (text for text in PROMPTS), k=2, context=2, batch=1),
    "a report on an SAE": lambda model: hb.sae_report(sae(model), PROMPTS, batch=1),
    "sampling": lambda model: hb.generate(model, PROMPTS, do_sample=True, seed=3, max_new_tokens=5, top_k=20),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_one_job_and_gives_what_it_gives_here(remote, local, name):
    before = remote.service.jobs
    plan_up = plan_down = None
    ours = RECIPES[name](remote)
    assert remote.service.jobs == before + 1
    same(fields(ours), fields(RECIPES[name](local)))
    if name == "all pairs":  # a model of 30 layers: 900 pairs
        plan = hb.patchscope.plan(remote, "The Eiffel Tower is in", target_layers="all", k=5)
        plan_up, plan_down = plan.bytes_up, plan.bytes_down
        assert plan.jobs == 1 and remote.service.jobs == before + 1
        assert remote.service.bytes_up <= 1.05 * plan_up < 60_000 and remote.service.bytes_down <= plan_down < 60_000


def test_another_model(local):
    remote, own = hb.wrap(weightless("google/gemma-3-270m"), remote=True), hb.load("gemma-3-270m", "nnsight")
    call = dict(target_layers="same", generate=4)
    same(fields(hb.patchscope(remote, "Toyota", **call)), fields(hb.patchscope(own, "Toyota", **call)))
    assert remote.service.jobs == 1


def request(model: hb.Adapter, patterns: bool) -> Request:
    """Every site but one read and edited, in prompt and generated tokens."""
    draw, n = torch.Generator().manual_seed(0), torch.tensor
    prompts = [model.encode(prompt) for prompt in PROMPTS]

    def vector(site: str) -> torch.Tensor:
        return torch.randn(hb.Site.parse(site).width(model.card), generator=draw)

    sites = [
        "resid_pre.2",
        "resid_post.4",
        "attn_out.3",
        "mlp_out.5",
        "mlp_in.4",
        "mlp_act.6",
        "head_z.7",
        "head_z.8.1",
        "embed",
        "final_norm",
    ]
    rows = [Row(0), Row(1), *(Row(i % 2, (hb.Edit(site, vector(site)),)) for i, site in enumerate(sites))]
    rows += [
        Row(0, (hb.Edit("mlp_act.3.7", 2.5, "set"),)),
        Row(1, (hb.Edit("resid_post.3", vector("resid_post.3"), "project_out", slice(None), scope="all"),)),
    ]
    rows += [
        Row(0, (hb.Edit("mlp_out.9", vector("mlp_out.9"), "add", scope="generated"),)),
        Row(1, (hb.Edit("final_norm", vector("final_norm"), scope="all"),)),
    ]
    reads = [Read("resid_post.9"), Read("head_z.2.0", slice(None)), Read("final_norm"), Read("embed", 0)]
    if patterns:
        rows += [
            Row(1, (hb.Edit("attn_pattern.4", op="knock_out", keys=0),)),
            Row(0, (hb.Edit("attn_pattern.4.1", 0.5, "scale", keys=1, scope="all"),)),
        ]
        reads += [Read("attn_pattern.6")]
    return Request(prompts, rows, reads, Readout(k=3, tokens=n([[1]] * len(rows)), logits=True), generate=6)


def test_every_site_scope_and_operation(remote, local):
    before = remote.service.jobs
    ours = remote.run(request(remote, patterns=not SANDBOX), progress=False)
    theirs = local.run(request(local, patterns=not SANDBOX), progress=False)
    assert remote.service.jobs == before + 1
    for a, b in zip(ours.readings, theirs.readings, strict=True):
        same((a.values, a.rows, a.positions), (b.values, b.rows, b.positions))
    same(ours.readout.topk_ids[:, 0], theirs.readout.topk_ids[:, 0])
    same(
        (ours.readout.logits, ours.readout.token_logprobs, ours.tokens),
        (theirs.readout.logits, theirs.readout.token_logprobs, theirs.tokens),
    )
    assert SANDBOX or ours.cost == theirs.cost


def test_arithmetic_on_states_happens_beside_the_model(remote, local):
    """A recipe of a user's: mean state of two prompts, without its projection on a third, added at another layer."""

    def run(model: hb.Adapter) -> tuple[torch.Tensor, torch.Tensor]:
        from hookbook import deferred

        with deferred.recording() as record:
            prompts = [model.encode(prompt) for prompt in (*PROMPTS, "cats and dogs")]
            (states,) = model.run(Request(prompts, [Row(i) for i in range(3)], [Read("resid_post.8")]), progress=False).readings
            mean, other = states.values[:2].mean(0), states.values[2]
            unit = other / other.norm()
            vector = mean - (mean @ unit) * unit
            out = model.run(Request(prompts[:1], [Row(0, (hb.Edit("resid_post.5", vector),))], (), Readout(k=3)), progress=False)
            return deferred.settle((vector.norm(), out.readout.topk_logprobs), record)

    before = remote.service.jobs
    same(run(remote), run(local))
    assert remote.service.jobs == before + 1 and remote.service.bytes_down < 3000  # the states stayed where they were


@trusted
def test_attention_is_knocked_out_where_the_key_is_trusted(remote, local):
    before = remote.service.jobs
    ours = hb.hop_knock_out(remote, HOPS[:2], k=1)
    assert remote.service.jobs == before + 1
    theirs = fields(hb.hop_knock_out(local, HOPS[:2], k=1))
    for name, value in fields(ours).items():
        same(*(x.nan_to_num(-1.0) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in (value, theirs[name])))


def test_jacobians_where_the_key_is_trusted(remote, local):
    of, wrt = Read("resid_post.6"), [Read("resid_post.0"), Read("resid_post.3")]
    if SANDBOX:
        with pytest.raises(RemoteError, match="gradients.*sandbox.*Instead: run the model here, or use a key the service trusts"):
            hb.jacobian(remote, PROMPTS, of, wrt)
        with pytest.raises(RemoteError, match="attention patterns.*sandbox"):
            remote.run(Request([remote.encode("ab")], [Row(0)], [Read("attn_pattern.6")]), progress=False)
        return
    before = remote.service.jobs
    for mean in (False, True):
        a, b = (hb.jacobian(model, PROMPTS, of, wrt, mean=mean) for model in (remote, local))
        same((a.output, a.inputs, a.matrices, a.products), (b.output, b.inputs, b.matrices, b.products))
    assert remote.service.jobs == before + 2


def test_relations_where_the_key_is_trusted(remote, local):
    call = dict(layers=[9, 21], n_train=2, queries=6)
    relation, before = hb.relations.load("present_past"), remote.service.jobs
    if SANDBOX:
        with pytest.raises(RemoteError, match="gradients.*sandbox"):
            hb.linear_relation(remote, relation, **call)
        return
    ours, theirs = fields(hb.linear_relation(remote, relation, **call)), fields(hb.linear_relation(local, relation, **call))
    assert remote.service.jobs == before + 1
    same(ours, theirs)


def test_attribution_to_features_where_the_key_is_trusted(remote, local):
    call = dict(answer=" Paris", features=[1, 2, 3])
    if SANDBOX:
        with pytest.raises(RemoteError, match="gradients.*sandbox"):
            hb.feature_attribution(sae(remote), PROMPTS[:1], **call)
        return
    before = remote.service.jobs
    ours, theirs = (fields(hb.feature_attribution(sae(model), PROMPTS[:1], **call)) for model in (remote, local))
    assert remote.service.jobs == before + 1
    same(ours, theirs)


def test_several_calls_in_one_job(remote, local):
    before = remote.service.jobs
    with hb.job(remote):
        lens, said = hb.logit_lens(remote, PROMPTS[0]), hb.generate(remote, "Hello", max_new_tokens=4)
        with pytest.raises(hb.errors.Refused, match="they come when the job is done"):
            lens.token_ids.tolist()
    assert remote.service.jobs == before + 1
    same(fields(lens), fields(hb.logit_lens(local, PROMPTS[0])))
    same(fields(said), fields(hb.generate(local, "Hello", max_new_tokens=4)))
    with pytest.raises(hb.errors.Refused, match="on this machine"), hb.job(local):
        pass
    with pytest.raises(hb.errors.TokenError), hb.job(remote):  # nothing is sent of a block that fails
        hb.logit_lens(remote, PROMPTS[0])
        hb.logit_lens(remote, "")
    assert remote.service.jobs == before + 1


def test_a_direction_is_found_chosen_and_added_in_one_job(remote, local):
    """Vectors that are still promises, through three recipes."""
    positive, negative = (list(texts[:4]) for texts in hb.tasks.contrast("sentiment"))

    def run(model: hb.Adapter) -> tuple[Any, Any]:
        found = hb.contrast_vector(model, positive, negative, layers=[5, 12], site="resid_pre", held_out=0)
        chosen = hb.select_direction(model, found, positive, negative, tokens=[" I"], chat=False, filter=False)
        return chosen, hb.steer(model, found.vector(12), PROMPTS, tokens=([" Paris"], [" name"]))

    before = remote.service.jobs
    with hb.job(remote):
        ours = run(remote)
    assert remote.service.jobs == before + 1
    for a, b in zip(ours, run(local), strict=True):
        a, b = fields(a), fields(b)
        same({k: v for k, v in a.items() if k not in ("discarded", "why")}, {k: v for k, v in b.items() if k not in ("discarded", "why")})
    assert ours[0].discarded and ours[0].to_frame() is not None


def test_a_submitted_call_is_picked_up_by_another_process(remote, local, tmp_path):
    handle = hb.patchscope.submit(remote, "Bob Dylan", source_layers=[3, 9], generate=3)
    handle.save(tmp_path / "handle")
    code = f"""
import hookbook as hb
from nnsight import TransformersModel
model = hb.wrap(TransformersModel({REPO!r}, task="text-generation", tokenizer={REPO!r}, dtype="float32"), remote=True)
hb.Handle.load({str(tmp_path / "handle")!r}, model).result(progress=False).save({str(tmp_path / "result")!r})
assert model.service.jobs == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    ours = hb.Patchscope.load(tmp_path / "result")
    same(fields(ours), fields(hb.patchscope(local, "Bob Dylan", source_layers=[3, 9], generate=3)))
    assert handle.result() is handle.result() and handle.status() == "COMPLETED"
    with pytest.raises(hb.errors.ResultError, match="a job of"):
        hb.Handle.load(tmp_path / "handle", local)


def length(texts: list[str]) -> float:
    return float(sum(map(len, texts)))


def test_submitted_scores_and_features(remote, local, tmp_path):
    """What is worked out here when the numbers come: a file keeps what hookbook itself does, and refuses the rest in words."""
    steering = dict(strengths=[-1, 2], generate=4)

    def vector(model: hb.Adapter) -> hb.Vector:
        return hb.Vector(model.card, hb.Site("resid_pre", 9), torch.linspace(-3, 3, 576))

    french = hb.steer.submit(remote, vector(remote), PROMPTS, score=hb.scores.french_score, **steering)
    again = hb.Handle.load(french.save(tmp_path / "french"), remote).result(progress=False)
    same(fields(again), fields(hb.steer(local, vector(local), PROMPTS, score=hb.scores.french_score, **steering)))
    own = hb.steer.submit(remote, vector(remote), PROMPTS, score=length, **steering)
    with pytest.raises(hb.errors.ResultError, match="waits for length.*functions of hookbook alone.*handle.result"):
        own.save(tmp_path / "own")
    same(fields(own.result(progress=False)), fields(hb.steer(local, vector(local), PROMPTS, score=length, **steering)))
    features = hb.feature_activations.submit(sae(remote), PROMPTS)
    with pytest.raises(hb.errors.ResultError, match="cannot keep.*handle.result"):
        features.save(tmp_path / "features")
    same(fields(features.result(progress=False)), fields(hb.feature_activations(sae(local), PROMPTS)))
    assert [path.name for path in tmp_path.iterdir()] == ["french"]


@pytest.fixture
def restored(server) -> Iterator[Server]:
    """A server whose front is replaced by the test; it is put back."""
    yield server
    server.stop("api", signal.SIGKILL)
    server.start_api()


@trusted
def test_a_wrong_key_is_refused_and_never_shown(restored, remote, monkeypatch, capfd):
    from nnsight import CONFIG

    restored.stop("api")
    restored.start_api(NDIF_POSTGRES_URL="postgresql://nobody@127.0.0.1:9/none")  # the server checks keys, in a database that is not there
    with pytest.raises(RemoteError, match="wants a key.*NDIF_API_KEY"):
        hb.logit_lens(remote, "ab")
    monkeypatch.setattr(CONFIG.API, "APIKEY", "not-a-key-at-all")
    with pytest.raises(RemoteError, match="refused the key") as raised:
        hb.logit_lens(remote, "ab")
    assert "not-a-key-at-all" not in str(raised.value) + raised.value.server + str(capfd.readouterr()) and "***" in str(raised.value)


@trusted
def test_a_version_the_server_does_not_take(restored, remote):
    restored.stop("api")
    restored.start_api(NDIF_MIN_NNSIGHT_VERSION="99.0")
    with pytest.raises(RemoteError, match="refused this version of nnsight or Python.*99.0"):
        hb.logit_lens(remote, "ab")


def test_what_the_server_raises_is_shown(remote, monkeypatch):
    import nnsight

    from hookbook import deferred

    monkeypatch.setattr(
        nnsight.ndif,
        "get_local_env",
        lambda: {"python_version": "3.11", "packages": {"nnsight": "0.7.0", "torch": "2.13.0", "transformers": "5.23.0"}},
    )

    with deferred.recording() as record:
        bad = deferred.tape(remote).note(
            "module", {"path": "model.layers.0.mlp.no_such", "x": torch.zeros(1, 576)}, torch.zeros(1, 576, device="meta")
        )
        with pytest.raises(RemoteError, match="no_such.*nnsight is 0.7.0 here and 0.8.1 there") as raised:
            deferred.settle([bad], record)
    assert "Traceback" in raised.value.server and "reach" in raised.value.server and raised.value.job


@trusted
def test_a_model_that_does_not_run_there(remote):
    hb.logit_lens(remote, "ab")  # which does
    lost = hb.wrap(weightless(), remote=True)
    lost.service.model.to_model_key = lambda: (
        "nnsight.modeling.transformers.TransformersModel:" + json.dumps({"repo_id": "nobody/nothing", "revision": "main"})
    )
    start = time.monotonic()
    with pytest.raises(RemoteError, match=f"nobody/nothing.*does not run on.*use one that does: .*{REPO}"):
        hb.logit_lens(lost, "ab", progress=False)
    assert time.monotonic() - start < 30


@trusted
def test_waiting_ends_after_the_time_that_was_given_and_the_job_goes_on(remote, local, monkeypatch):
    monkeypatch.setattr(remote.service, "timeout", 0.0)
    with pytest.raises(RemoteError, match="no result of job.*error.handle") as raised:
        hb.patchscope(remote, "Bob Dylan")
    monkeypatch.setattr(remote.service, "timeout", None)
    before = remote.service.jobs
    same(fields(raised.value.handle.result(progress=False)), fields(hb.patchscope(local, "Bob Dylan")))
    assert remote.service.jobs == before


@trusted
def test_a_server_that_dies_while_it_is_asked_loses_nothing(restored, remote, monkeypatch):
    monkeypatch.setattr(jobs, "PATIENCE", 8.0)
    want = hb.logit_lens(remote, PROMPTS)
    handle = hb.logit_lens.submit(remote, PROMPTS)
    while handle.status() != "COMPLETED":  # computed, and not fetched
        time.sleep(0.1)
    restored.stop("api", signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(RemoteError, match="silent.*goes on") as raised:
        handle.result(progress=False)
    assert time.monotonic() - start < 30 and raised.value.job == handle.job
    back = threading.Timer(2.0, restored.start_api)
    back.start()  # it comes back while we wait
    same(fields(handle.result(progress=False)), fields(want))
    back.join()
    lost = hb.patchscope.submit(remote, PROMPTS[0], target_layers="all")
    restored.stop("api", signal.SIGKILL)  # which holds the queue
    threading.Timer(2.0, restored.start_api).start()
    start = time.monotonic()
    with pytest.raises(RemoteError, match="does not move job .* on.*send it again"):
        lost.result(progress=False)
    assert time.monotonic() - start < 30


@trusted
def test_a_server_that_is_not_there(restored, remote):
    restored.stop("api", signal.SIGKILL)
    start, before = time.monotonic(), remote.service.jobs
    with pytest.raises(RemoteError, match="did not take the job"):
        hb.logit_lens(remote, PROMPTS)
    assert time.monotonic() - start < 30 and remote.service.jobs == before


@trusted
def test_a_model_that_dies_in_a_job_is_an_error(server, remote):
    handle = hb.patchscope.submit(remote, "Bob Dylan", target_layers="all", generate=30)
    deadline = time.monotonic() + 30
    while handle.status() != "RUNNING" and time.monotonic() < deadline:
        time.sleep(0.05)
    actors = [p for p in Path("/proc").iterdir() if p.name.isdigit() and b"ModelActor" in _line(p)]
    assert actors
    for actor in actors:
        os.kill(int(actor.name), signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(RemoteError):
        remote.service.timeout = 25.0
        try:
            handle.result(progress=False)
        finally:
            remote.service.timeout = None
    assert time.monotonic() - start < 30


def _line(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.skipif(os.environ.get("HOOKBOOK_TEST_SERVER") == "sandbox", reason="the page is written for a trusted key")
@pytest.mark.parametrize("page", SERVER_PAGES)
def test_the_python_of_a_page_runs(page, remote, server, monkeypatch, tmp_path):
    """As it is written, with this server for the public one and the model that it has for the large one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("NDIF_API_KEY", os.environ.get("NDIF_API_KEY", ""))
    monkeypatch.setattr("nnsight.TransformersModel", lambda repo, **more: weightless())
    run_page(page)
