"""Every recipe on a real server: the same numbers as here, one job for a call, small up and small down."""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

import hookbook as hb
from hookbook.errors import RemoteError
from hookbook.request import Read, Readout, Request, Row
from tests.remote.calls import HOPS, IN_SANDBOX, PROMPTS, RECIPES, REPO, SANDBOX, again, asked, fields, sae, same, trusted, weightless


@pytest.mark.parametrize("name", [name if name in IN_SANDBOX else pytest.param(name, marks=again) for name in RECIPES])
def test_a_recipe_is_one_job_and_gives_what_it_gives_here(remote, local, name):
    before = remote.service.jobs
    plan_up = plan_down = None
    ours = RECIPES[name](remote)
    assert remote.service.jobs == before + (2 if name in ("effects of heads", "function vector") else 1)  # what is known is asked first
    same(fields(ours), fields(RECIPES[name](local)))
    if name == "all pairs":  # a model of 30 layers: 900 pairs
        plan = hb.patchscope.plan(remote, "The Eiffel Tower is in", target_layers="all", k=5)
        plan_up, plan_down = plan.bytes_up, plan.bytes_down
        assert plan.jobs == 1 and remote.service.jobs == before + 1
        assert remote.service.bytes_up <= 1.05 * plan_up < 60_000 and remote.service.bytes_down <= plan_down < 60_000


@trusted
def test_what_a_sandbox_is_asked_for_goes_every_way_that_a_recipe_can():
    new = hb.wrap(weightless(), remote=True)  # as at the sandbox's start: of a model that has answered, what checks it is not asked again
    ways = {name: asked(new, name) for name in RECIPES}
    assert set(IN_SANDBOX) < set(ways) and len(set().union(*ways.values())) > 30
    assert not set().union(*ways.values()) - set().union(*(ways[name] for name in IN_SANDBOX)), "add a recipe to IN_SANDBOX"


@again
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
    ask = Readout(k=3, tokens=n([[1]] * len(rows)), logits=True, token_logits=n([[1, 7]] * len(rows)))
    return Request(prompts, rows, reads, ask, generate=6)


def test_every_site_scope_and_operation(remote, local):
    before = remote.service.jobs
    ours = remote.run(request(remote, patterns=not SANDBOX), progress=False)
    theirs = local.run(request(local, patterns=not SANDBOX), progress=False)
    assert remote.service.jobs == before + 1
    for a, b in zip(ours.readings, theirs.readings, strict=True):
        same((a.values, a.rows, a.positions), (b.values, b.rows, b.positions))
    same(ours.readout.topk_ids[:, 0], theirs.readout.topk_ids[:, 0])
    same(*((said.readout.logits, said.readout.token_logprobs, said.readout.token_logits, said.tokens) for said in (ours, theirs)))
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


def test_attribution_to_neurons_where_the_key_is_trusted(remote, local):
    call: dict[str, Any] = dict(answer=" Paris", other=" the", layers=[9, 25], top=0, random=6)
    with pytest.raises(hb.errors.Refused, match="exact effects of neurons"):
        hb.neuron_attribution(remote, PROMPTS[:1], **call | {"top": 5})
    if SANDBOX:
        with pytest.raises(RemoteError, match="gradients.*sandbox"):
            hb.neuron_attribution(remote, PROMPTS[:1], **call)
        return
    before = remote.service.jobs
    ours, theirs = (fields(hb.neuron_attribution(model, PROMPTS[:1], **call)) for model in (remote, local))
    assert remote.service.jobs == before + 1
    same(ours, theirs)


@again
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


@again
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


@trusted
def test_vectors_travel_there_and_back_by_name(remote, local):
    """Of a bridge, of nnsight and of the server, on each; weights on a server are not seen, which is said."""
    models = [hb.load("smollm2-135m-instruct"), local, remote]
    vectors = [hb.contrast_vector(model, ["I love it"], ["I hate it"], layers=[9], held_out=0).vector(9) for model in models]
    for model in models:
        for vector in vectors:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                same(
                    fields(hb.generate(model, "It is", edits=[vector.edit()], max_new_tokens=3)),
                    fields(hb.generate(local, "It is", edits=[vectors[1].edit()], max_new_tokens=3)),
                )
            told = any("go by its name" in str(one.message) for one in said)
            assert told == (vector.card.remote != model.card.remote)
    before = remote.service.jobs
    other = hb.load("gemma-3-270m", "nnsight")
    with pytest.raises(hb.errors.EditError, match="different spaces"):
        hb.generate(remote, "It is", edits=[hb.Vector.of(other, "resid_post.9", torch.ones(640)).edit()], max_new_tokens=3)
    tuned = replace(vectors[0], card=replace(local.card, model_id="mine/smollm2-tuned", weights=()))
    with pytest.raises(hb.errors.EditError, match="different spaces"):
        hb.generate(remote, "It is", edits=[tuned.edit()], max_new_tokens=3)
    assert remote.service.jobs == before


@again
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


@again
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
