"""What the remote tests ask of a model, there and here, and how they compare the answers."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from nnsight import TransformersModel
from torch import Tensor

import hookbook as hb
from hookbook import deferred
from hookbook.engine.cost import accounting
from tests.contract.test_sae import N, make_sae

SANDBOX = os.environ.get("HOOKBOOK_TEST_SERVER") == "sandbox"
trusted = pytest.mark.skipif(SANDBOX, reason="the same on both paths")
again = pytest.mark.whole if SANDBOX else pytest.mark.filterwarnings()
"""Of what happens on this side of the wire or in the server's front: always on the path of trusted keys, in a sandbox by `--whole`."""
REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROMPTS = ["The capital of France is", "Hello there, my"]
HOPS = hb.hops.chain("city_country", "country_capital", 3, shots=1)


def weightless(repo: str = REPO) -> TransformersModel:
    return TransformersModel(repo, task="text-generation", tokenizer=repo, dtype="float32")


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
    "neurons that tell texts apart": lambda model: hb.find_neurons(
        model, [*PROMPTS, "A cat", "The dog"], ["12", "1 2 3", "44", "5 6"], layers=[9, 25]
    ),
    "neurons taken out": lambda model: hb.neuron_sweep(
        model, PROMPTS, [" Paris"], layers=["mlp_act.9.3", "mlp_act.25.1120"], distribution=True
    ),
    "neurons as they are elsewhere": lambda model: hb.neuron_sweep(
        model, PROMPTS[0], [" Paris"], layers=["mlp_act.9.3", "mlp_act.9.5"], ablate="resample", reference=PROMPTS
    ),
    "keys and values of neurons": lambda model: hb.mlp_memories(model, PROMPTS, layers=[9, 25], neurons=5, triggers=2, k=3),
    "a report on a neuron": lambda model: hb.neuron(
        model, "mlp_act.25.1120", PROMPTS, [" Paris"], k=2, context=2, random=1, matched=0, quantiles=[0.1, 0.9], generate=2
    ),
    "features backpatched": lambda model: hb.backpatch_features(sae(model), HOPS, [1, 2, 3], source_layers=[14, 20]),
    "features described": lambda model: hb.feature_patchscope(sae(model), [1, 2], strengths=[1.0], generate=4),
    "features": lambda model: hb.feature_activations(sae(model), PROMPTS),
    "features' examples": lambda model: hb.feature_examples(sae(model), (text for text in PROMPTS), k=2, context=2, batch=1),
    "states as sums of features": lambda model: hb.sparse_coding(sae(model), PROMPTS, ks=[1, 4]),
    "a report on an SAE": lambda model: hb.sae_report(sae(model), PROMPTS, batch=1),
    "sampling": lambda model: hb.generate(model, PROMPTS, do_sample=True, seed=3, max_new_tokens=5, top_k=20),
}

IN_SANDBOX = (
    "features of a transcoder while tokens are generated",
    "features of an SAE while tokens are generated",
    "only some features of a TopK SAE",
    "function vector",
    "steering",
    "all pairs",
    "logit lens of several tokens and languages",
    "edits along a relation",
    "sampling",
    "neurons taken out",
    "a report on a neuron",
)
"""Recipes that a sandbox is asked for, too. They send every kind of step that any recipe sends (a test compares), and a step there does not
know which recipe sent it. `--whole` asks for all."""


def asked(model: hb.Adapter, name: str) -> set[str]:
    """The kinds of steps that a recipe would send, with what in them takes another way through the code that travels."""
    with accounting(), deferred.recording(dry=True) as record:
        RECIPES[name](model)
    found = set()
    for tape in record.tapes.values():
        for kind, data, *_ in tape.steps:
            given = {key for key, value in data.items() if value is not None and value is not False}
            if kind == "forward":
                climb = data["climb"]
                found |= {f"{kind}: {key}" for key in given & {"kept", "keep", "mask"}} | {f"{kind}: forks" for _ in climb["forks"]}
                found |= {f"{kind}: read {site}" for site, _ in climb["reads"]}
                edits = [(site, edit) for (site, _), groups in climb["edits"].items() for edit in groups]
            elif kind == "decode":
                found |= {f"{kind}: sampling"} if data["todo"]["sampling"] else {kind}
                edits = [(edit["site"][0], edit) for row in data["todo"]["late"] for edit in row]
            else:
                found |= {kind if kind in ("op", "module") else f"{kind}: {' '.join(sorted(given))}"}
                edits = []
            for site, edit in edits:
                found |= {f"{kind}: {edit['op']}", f"{kind}: at {site}"}
                if edit["op"] == "features":  # of a climb its own keys say what a feature's edit is, of decoding those of its value
                    change = edit if kind == "forward" else edit["value"]
                    parts = [
                        key
                        for key in ("gate", "gain", "centre", "skip", "k")
                        if isinstance(change["code"][key], Tensor) or change["code"][key]
                    ]
                    ways = [key for key in ("each", "alike", "drop") if change.get(key)] + ["elsewhere"] * (change["seen"] is not None)
                    found.add(f"{kind}: features, {' '.join(parts + ways)}")
    return found
