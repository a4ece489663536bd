"""One result of every kind, of the toy model. A new kind without a maker fails `tests/unit/test_report.py`."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import fields
from functools import cache
from typing import Any

import torch

import hookbook as hb
from hookbook.recipes.vectors.task_sweep import TaskSweep
from hookbook.request import Each, Read
from hookbook.results import Result
from hookbook.testing import toy
from tests.support.needs import marked


def kinds() -> list[Any]:
    """The names of all results that hookbook has, as parameters of a test; those that need SAELens, which needs HookedTransformer, are
    marked."""
    import hookbook.recipes

    for module in pkgutil.walk_packages(hookbook.recipes.__path__, "hookbook.recipes."):
        importlib.import_module(module.name)
    importlib.import_module("hookbook.vectors")
    found, left = {}, [Result]
    while left:
        for kind in left.pop().__subclasses__():
            if kind.__module__.startswith("hookbook."):
                found[kind.__name__] = any(word in kind.__module__ for word in (".features.", ".relation_features"))
            left.append(kind)
    return [marked([f"hooked-{name}"])[0] if sae else name for name, sae in sorted(found.items())]


def task() -> hb.Task:
    from tests.contract.test_vectors import TASK

    return TASK


def attached(**more: Any) -> Any:
    from tests.contract.test_sae import make_sae

    return hb.sae.attach(toy(), make_sae(toy(), **more), labels={3: "北京 <b>", 5: "$x"})


def relation(model: Any) -> hb.LinearRelation:
    from tests.contract.test_linear_relations import BETAS, LAYERS, SEED, TRAIN, planted

    return hb.linear_relation(model, planted(model), layers=LAYERS, betas=BETAS, n_train=TRAIN, seed=SEED)


def hops(n: int = 3) -> Any:
    from tests.contract.test_two_hops import relations

    return hb.hops.chain(*relations(n))


def vector() -> hb.Vector:
    return hb.Vector.of(toy(), "resid_post.1", torch.arange(16.0), recipe="mine")


def directions() -> hb.ContrastVectors:
    return hb.contrast_vector(toy(), ["ab", "ac", "ad", "ae"], ["xf", "xg", "xh", "xi"], held_out=0.5, site="resid_pre")


def relation_features() -> Any:
    from tests.unit.test_feature_patchscopes import parts

    return parts()


MAKERS: dict[str, Any] = {
    "Backpatch": lambda: hb.backpatch(toy(), [("ab", "c"), ("de", "f")]),
    "Composition": lambda: hb.compose(toy(), task(), length=2, shots=2, n_prompts=3, queries=4, seed=5),
    "ContrastVectors": directions,
    "DirectionChoice": lambda: hb.select_direction(
        toy(), directions(), ["axe", "oak"], ["ship", "to"], tokens=["e", "o"], max_kl=9.0, filter=False, chat=False
    ),
    "FeatureActivations": lambda: hb.feature_activations(attached(), ["ab北", "cd"]),
    "FeatureAttribution": lambda: hb.feature_attribution(attached(), ["ab", "cd"], answer=["c", "d"], other="e", top=30),
    "FeatureBackpatch": lambda: hb.backpatch_features(attached(), [("ab", "c"), ("de", "f")], 2),
    "FeatureExamples": lambda: hb.feature_examples(attached(), ["ab北", "cde", "</script>"], k=2),
    "FeaturePatchscope": lambda: hb.feature_patchscope(attached(), [3, 5], target="say x", generate=2, tokens=["b"]),
    "FeatureSweep": lambda: hb.feature_sweep(
        attached(), ["ab", "cd"], features="active", strengths=[-1.0, 1.0], change="add", tokens=["c"]
    ),
    "FeatureVector": lambda: vector().decompose(attached(), k=6),
    "FunctionVectors": lambda: hb.function_vector(toy(), task(), heads=2, shots=2, n_prompts=3, n_trials=2, queries=3, known=False),
    "Generation": lambda: hb.generate(toy(), ["ab", "北"], edits=[vector().edit(scope="all")], max_new_tokens=3),
    "HeadEffects": lambda: hb.head_effects(toy(), task(), shots=2, n_prompts=3, n_trials=2, known=False),
    "HopKnockOut": lambda: hb.hop_knock_out(toy(n_ctx=128), hops(), edges=[("last", "bridge"), ("last", "entity")]),
    "HopReadability": lambda: hb.hop_readability(toy(n_ctx=128), hops(), generate=0),
    "InContextVectors": lambda: hb.in_context_vector(toy(), [("bad", "good"), ("sad", "glad"), ("no", "yes")]),
    "Jacobian": lambda: hb.jacobian(
        toy(), ["ab", "北京"], Read("resid_post.2"), [Read("resid_pre.1", Each((1, -2))), Read("resid_post.1", slice(2, 3))]
    ),
    "LinearRelation": lambda: relation(toy()),
    "LogitLens": lambda: hb.logit_lens(
        toy(), ["ab", "北京 $x"], tokens=["x"], languages={"one": ["a"], "$two": ["b"]}, position=slice(None)
    ),
    "CumulativeAblation": lambda: hb.cumulative_ablation(toy(), ["ab", "北"], ["c", "d"], ks=[1, 3], random=2),
    "KnowledgeNeurons": lambda: hb.knowledge_neurons(
        toy(), hb.relations.Relation((("a", "x"), ("be", "y")), "some", templates=("the {} is", "of {}")), facts=2, steps=2, wanted=(1, 4)
    ),
    "MLPMemories": lambda: hb.mlp_memories(toy(), ["abc", "北京 $x", "a b"], neurons=4, triggers=2, k=3, context=3),
    "NeuronAttribution": lambda: hb.neuron_attribution(toy(), ["ab", "北"], ["c", "d"], "e", top=5, random=4),
    "NeuronReport": lambda: hb.neuron(
        toy(), "mlp_act.1.3", ["abc", "北京 $x", "a b"], ["c"], k=2, context=2, random=1, matched=1, quantiles=[0.1, 0.9], generate=2
    ),
    "NeuronSearch": lambda: hb.find_neurons(
        toy(), ["ab", "abc", "abd", "aab"], ["xy", "xyz", "xz", "yy"], others={"digits": ["12", "123", "23", "31"]}
    ),
    "NeuronSweep": lambda: hb.neuron_sweep(toy(), ["ab", "北"], ["c", 7], layers=[0, "mlp_act.2.3"], distribution=True),
    "Patchscope": lambda: hb.patchscope(toy(), ["ab", "abcd"], target="cd?", target_layers="all", generate=2, tokens=["x"], k=4),
    "RelationEdits": lambda: hb.edit_relation(toy(), relation(toy()), ranks=[1, 5], changes=3, n_unrelated=1),
    "RelationFeatures": relation_features,
    "SAEReport": lambda: hb.sae_report(attached(), ["abc", "de", "good"]),
    "SAETraining": lambda: hb.sae.train(
        toy(), ["abc", "good day"], site="resid_post.1", n_features=24, samples=60, batch=2, k=3, held_out=0.5
    ),
    "SparseCoding": lambda: hb.sparse_coding(attached(), ["abc", "good day"], ks=[1, 2, 5]),
    "Steering": lambda: hb.steer(toy(), vector(), ["ab", "c"], tokens=(["a", "e"], ["b"]), strengths=[1, 2], generate=2),
    "TaskSweep": lambda: TaskSweep(**{f.name: getattr(result("TaskVectors"), f.name) for f in fields(TaskSweep)}),
    "TaskVectors": lambda: hb.task_vector(toy(), task(), shots=2, n_prompts=4, queries=3, seed=5),
    "TwoHops": lambda: hb.two_hops(toy(n_ctx=128), hops()),
    "Vector": vector,
}


@cache
def result(name: str) -> Result:
    """A result of a kind, made once."""
    return MAKERS[name.removeprefix("hooked-")]()
