"""What every recipe puts into its result: what was asked for as plain data, and what it cost."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

import pytest
import torch

import hookbook as hb
from hookbook import recipe as recipes
from hookbook.engine import cost
from hookbook.recipe import MOST, NO_SETTINGS, recipe
from hookbook.request import Read, Readout, Request, Row
from hookbook.sites import Site
from hookbook.testing import ToyAdapter, toy
from hookbook.tokens import At
from hookbook.travel.errand import run_errand
from tests import makers
from tests.conftest import marked, require
from tests.unit.test_report import name_of

BY_HAND = {"Vector", "FeatureVector", "TaskSweep"}
"""What no recipe makes."""
MORE: dict[str, Any] = {
    "attribute_lens": lambda: hb.attribute_lens(toy(), makers.relation(toy()), ["ab"], position=At("a")),
    "change_answer": lambda: hb.change_answer(toy(), (found := makers.relation(toy())), "new", found.train[0][1], rank=3, max_new_tokens=2),
    "hooked-steer_feature": lambda: hb.steer_feature(makers.attached(), 3, ["ab"], to=[2.0], tokens=(["a"], ["b"])),
}
CALLS = marked(name for name in [*map(name_of, makers.kinds()), *MORE] if name.removeprefix("hooked-") not in BY_HAND)


@pytest.fixture(params=CALLS)
def call(request, monkeypatch) -> tuple[Any, dict[str, Any], Any]:
    """The recipe that a maker calls last, its arguments with their defaults, and the result."""
    seen: list[tuple[Any, dict[str, Any], Any]] = []

    def spied(one: Any) -> Any:
        def spy(*args: Any, **kwargs: Any) -> Any:
            bound = inspect.signature(one).bind(*args, **kwargs)
            bound.apply_defaults()
            seen.append((one, bound.arguments, one(*args, **kwargs)))
            return seen[-1][2]

        return spy

    for place, public in [*((hb, public) for public in hb.__all__), (hb.sae, "train")]:
        if hasattr(one := getattr(place, public), "plan"):
            monkeypatch.setattr(place, public, spied(one))
    result = (MORE.get(request.param) or makers.MAKERS[request.param.removeprefix("hooked-")])()
    one, arguments, last = seen[-1]
    assert last is result
    arguments = dict(arguments)
    return one, arguments | arguments.pop("settings", {}), result  # `settings` are further words


def plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return len(value) <= MOST and all(map(plain, value))
    return value is None or isinstance(value, (bool, int, float, str, Site, At, slice))


def test_a_result_says_what_was_asked_for_and_what_it_cost(call):
    one, arguments, result = call
    names = {field.name for field in fields(result)}
    for name, value in arguments.items():
        if name not in NO_SETTINGS and plain(value) and name not in names:
            assert name in result.settings, name
            if name.endswith("position"):
                assert result.settings[name] == str(value)
    assert not {"model", "sae", "progress", "checkpoint"} & result.settings.keys() - {"sae"}
    spent = result.settings["cost"]
    assert tuple(spent) == cost.FIELDS and all(type(n) is int for n in spent.values())
    assert spent["token_layers"] > 0 or one.__name__ == "relation_features"  # its vector may be given


def test_a_plan_counts_what_a_result_says(call):
    one, arguments, result = call
    plan, spent = one.plan(**arguments), result.settings["cost"]
    if one.__name__ == "relation_features":  # what each feature says is asked when it is known which are active
        assert (plan.climbs, plan.passes, plan.token_layers) == (spent["climbs"], spent["passes"], spent["token_layers"])
    elif one.__name__ in (
        "linear_relation",
        "feature_attribution",
        "feature_sweep",
        "neuron_attribution",
        "cumulative_ablation",
        "knowledge_neurons",
    ):
        assert all(getattr(plan, name) >= spent[name] for name in cost.FIELDS)  # which are known or active is not yet known
    elif arguments.get("generate") or arguments.get("max_new_tokens"):
        assert all(getattr(plan, name) >= spent[name] for name in cost.FIELDS)  # texts may end early
    else:
        assert {name: getattr(plan, name) for name in cost.FIELDS} == spent


def test_every_recipe_is_among_these():
    made = {name.removeprefix("hooked-") for name in MORE}
    text = inspect.getsource(makers) + inspect.getsource(makers.relation_features) + "hb.relation_features("
    missing = [name for name in hb.__all__ if hasattr(getattr(hb, name), "plan") and f"hb.{name}(" not in text and name not in made]
    assert missing == ["known"]  # which gives a task


# what is kept, and how


class Kept(hb.results.Result):
    def to_frame(self) -> Any: ...

    def plot(self, ax: Any = None) -> Any: ...


def kept(**arguments: Any) -> dict[str, Any]:
    from dataclasses import make_dataclass

    kind = make_dataclass("Kept", [("settings", dict[str, Any]), ("field", int)], bases=(Kept,), frozen=True, eq=False)

    @recipe
    def one(*, field: Any = 0, said: Any = 0, x: Any = None, position: Any = -1, progress: Any = None) -> Any:
        return kind(settings={"said": "by hand"}, field=field)

    return one(**arguments).settings


def test_what_is_plain_is_kept():
    nothing = dict.fromkeys(cost.FIELDS, 0)
    assert kept(field=3, said=4, progress=False) == {"said": "by hand", "x": None, "position": "-1", "cost": nothing}
    for value, as_kept in (
        ([1, "a", Site("resid_post", 1)], [1, "a", "resid_post.1"]),
        ((1.5, None, True), (1.5, None, True)),
        (range(3), [0, 1, 2]),
        (slice(1, None), "slice(1, None, None)"),
        (At("a"), str(At("a"))),
        (torch.arange(3).numpy()[1], 1),
        ([[0, 1], [2]], [[0, 1], [2]]),
    ):
        found = kept(x=value)["x"]
        assert found == as_kept and type(found) is type(as_kept)
    assert kept(position=At("a", "first"))["position"] == str(At("a", "first"))


@pytest.mark.parametrize("value", [torch.zeros(3), toy(), {"a": 1}, list(range(MOST + 1)), print, [toy()], hb.Task((("a", "b"),), "t")])
def test_data_is_not(value):
    assert "x" not in kept(x=value)


def test_what_ran_in_a_recipe_inside_counts_outside():
    model = toy()
    request = Request([model.encode("ab")], [Row(0)], [Read("resid_post.1")], Readout(k=1))

    with cost.counting() as outer:
        model.run(request)
        with cost.counting() as inner:
            model.run(request)
            model.readout(torch.zeros(2, 16, dtype=torch.float64), k=1)
    assert cost.total(*inner) == {"climbs": 1, "passes": 1, "token_layers": 9, "unembedded": 3, "vjps": 0}
    assert cost.total(*outer) == {"climbs": 2, "passes": 2, "token_layers": 18, "unembedded": 4, "vjps": 0}
    model.run(request)
    assert len(outer) == 3 and recipes.cost is cost


# a model that is elsewhere


class Passes:
    """The toy, as a job has it."""

    shares, where = True, "cpu"

    def __init__(self, model: ToyAdapter) -> None:
        self.toy = model
        self.model = type("M", (), {"_module": model.model})()

    def forward(self, tokens: Any, mask: Any, climb: Any, kept: Any = None, keep: int = 0) -> Any:
        return self.toy.forward(tokens, mask, climb, kept=kept, keep=keep)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.toy, name)


def far() -> Any:
    """The toy behind the noting of a remote model; its jobs run here."""
    require("nnsight")
    from hookbook.adapters.remote import RemoteAdapter

    class Far(RemoteAdapter):
        def __init__(self) -> None:
            self.near = toy()
            self.card, self.tokenizer, self.model = self.near.card, self.near.tokenizer, self.near.model
            self.verified, self.places = {"runs", "sublayers", "head_z"}, 0

        eos_ids = property(lambda self: self.near.eos_ids)

        def _tell(self, sites: Any) -> None: ...

        def ready(self) -> None: ...

        def refuses(self, site: Any) -> None: ...

        def splits(self) -> int:
            return 0

        def size(self, tape: Any, wanted: Any) -> int:
            return len(tape.steps)

        def fetch(self, tape: Any, wanted: Any) -> dict[int, torch.Tensor]:
            out: dict[int, torch.Tensor] = {}
            run_errand(Passes(self.near), tape.errand(wanted), out)
            return out

    return Far()


ASKED: dict[str, Any] = {
    "patchscope": lambda model: hb.patchscope(model, ["ab", "abcd"], target="cd?", target_layers="all", generate=2, tokens=["x"]),
    "logit_lens": lambda model: hb.logit_lens(model, ["ab", "cde"], position=slice(None)),
    "task_vector": lambda model: hb.task_vector(model, makers.task(), shots=2, n_prompts=4, queries=3, match="prefix"),
    "head_effects": lambda model: hb.head_effects(model, [said(), said()], **FEW),
    "generate": lambda model: hb.generate(model, ["ab", "c"], max_new_tokens=3),
    "backpatch": lambda model: hb.backpatch(model, [("ab", "c"), ("de", "f")]),
    "contrast_vector": lambda model: hb.contrast_vector(model, ["ab", "ac"], ["xf", "xg"], held_out=0),
    "jacobian": lambda model: hb.jacobian(model, ["ab", "cd"], Read("resid_post.2"), [Read("resid_post.0")], mean=True),
}


FEW: Any = {"shots": 2, "n_prompts": 3, "n_trials": 2}


def said() -> hb.Task:
    """A task of which the toy answers some behind two examples."""
    words = [a + b for a in "abcdef" for b in "xyz"]
    return hb.Task(tuple((word, "(p"[at % 2]) for at, word in enumerate(words)), "said", hb.tasks.Template("{}*", "{}", ";"))


def test_what_is_known_is_a_job_of_its_own():
    """Which queries are drawn depends on it. Jobs are counted beforehand, too; what one of them had is not run again by the next."""
    model, jobs = far(), []
    fetch = model.fetch
    model.fetch = lambda tape, wanted: jobs.append(len(tape.steps)) or fetch(tape, wanted)
    for known, n in ((True, 2), (False, 1)):
        jobs.clear()
        theirs = hb.head_effects(model, [said(), said()], known=known, **FEW)
        ours, plan = (
            hb.head_effects(toy(), [said(), said()], known=known, **FEW),
            hb.head_effects.plan(model, [said(), said()], known=known, **FEW),
        )
        assert len(jobs) == plan.jobs == n and (theirs.effects - ours.effects).abs().max() < 1e-6 < ours.effects.abs().max()
        assert plan.bytes_up == sum(jobs) and all(jobs)


@pytest.mark.parametrize("name", ASKED)
def test_of_a_model_elsewhere_settings_and_cost_are_the_same(name):
    theirs, ours = ASKED[name](far()), ASKED[name](toy())
    assert theirs.settings == ours.settings
    assert ours.settings["cost"]["token_layers"] > 0
