"""Back-patches and their controls on every adapter, against loops of plain runs; and what a result says of them."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from string import ascii_lowercase

import pytest
import torch

import hookbook as hb
from hookbook.controls import random_like
from hookbook.errors import DataError, SiteError, TokenError
from hookbook.recipes.hops.backpatching import BestPair, Rate
from hookbook.relations import Relation
from hookbook.tasks import Question
from tests.support.cases import Case

FIRST = Relation((("ab", "m"), ("cd", "n"), ("ef", "o"), ("gh", "p")), "first", templates=("{} in",), phrase="q{}r")
SECOND = Relation((("m", "5"), ("n", "6"), ("o", "7"), ("p", "8")), "second", templates=("t{}is",))


def says(case: Case, text: str) -> str:
    """The model's next character; nothing if it cannot be written."""
    said = case.adapter.tokenizer.decode([int(case.plain(case.adapter.encode(text).ids)[0][-1].argmax())])
    return said if said.isascii() and said.isprintable() and said.strip() else ""


def letters(case: Case) -> list[Question]:
    """Two questions with the answer that the model gives, and two without."""
    draw = random.Random(1)
    texts = ["".join(draw.sample(ascii_lowercase, draw.randint(2, 4))) for _ in range(400)]
    known = itertools.islice(((text, said) for text in texts if (said := says(case, text))), 2)
    return [
        Question(text, answer)
        for (text, said), other in zip(known, ("qr", "stu"), strict=True)
        for text, answer in ((text, said), (other, "~~"))
    ]


def states_of(case: Case, ids: tuple[int, ...]) -> list[torch.Tensor]:
    sites = tuple(hb.Site("resid_post", layer) for layer in range(case.adapter.card.n_layers))
    found = case.plain(ids, (), sites)[1]
    return [found[site] for site in sites]


def patched(case: Case, ids: tuple[int, ...], at: int, target: int, value: torch.Tensor) -> torch.Tensor:
    site = hb.Site("resid_post", target)
    return case.plain(ids, ((site, at, hb.Edit(site, value, "set"), []),))[0][-1]


def assert_is_a_loop(case: Case, found: hb.Backpatch, questions: list, places: list[int]) -> None:
    """Every pair of the patch and of every control, against plain runs."""
    adapter, n_layers = case.adapter, case.adapter.card.n_layers
    assert found.pairs == tuple((source, target) for source in range(n_layers) for target in range(source))
    ids = [adapter.encode(question.text).ids for question in questions]
    answers = [adapter.encode(question.text + question.answer).ids[len(some)] for question, some in zip(questions, ids, strict=True)]
    states = [states_of(case, some) for some in ids]
    own = torch.stack([torch.stack([layer[at] for layer in some]) for some, at in zip(states, places, strict=True)])
    noise = random_like(own.float().flatten(0, 1), found.settings["seed"]).unflatten(0, (len(ids), -1))
    assert (noise.norm(dim=-1) / own.norm(dim=-1) - 1).abs().max() < 1e-5
    for i, (some, at) in enumerate(zip(ids, places, strict=True)):
        clean = case.plain(some)[0][-1]
        assert int(found.clean_ids[i]) == int(clean.argmax()) and bool(found.clean[i]) == (int(clean.argmax()) == answers[i])
        assert abs(float(found.clean_logprobs[i]) - float(clean.log_softmax(-1)[answers[i]])) < 1e-10
        assert found.donors[i] != i and questions[found.donors[i]].answer != questions[i].answer
        for p, (source, target) in enumerate(found.pairs):
            runs = {
                "patch": (target, own[i, source]),
                "shuffled": (target, own[found.donors[i], source]),
                "random": (target, noise[i, source]),
                "swapped": (source, own[i, target]),
            }
            assert {*runs} == {*found.right}
            for name, (layer, value) in runs.items():
                logits = patched(case, some, at, layer, value)
                exact = 1e-10 if name != "random" else 1e-5  # its length is taken in single precision
                assert abs(float(found.logprobs[name][i, p]) - float(logits.log_softmax(-1)[answers[i]])) < exact, (name, i, source, target)
                if name != "random":
                    assert int(found.token_ids[name][i, p]) == int(logits.argmax())
                assert bool(found.right[name][i, p]) == (int(found.token_ids[name][i, p]) == answers[i])


def test_every_pair_at_the_last_token_is_a_plain_run(case):
    questions = letters(case)
    found = hb.backpatch(case.adapter, questions, seed=3)
    assert 0 < int(found.clean.sum()) < len(questions), "some are known"
    assert_is_a_loop(case, found, questions, [len(case.adapter.encode(q.text)) - 1 for q in questions])
    assert len({int(i) for ids in found.token_ids.values() for i in ids.flatten()}) > 2, "patches change what is said"


def test_every_pair_at_the_bridge_is_a_plain_run(case):
    questions = hb.hops.chain(FIRST, SECOND)
    found = hb.backpatch(case.adapter, questions, position="bridge", seed=4)
    places = [case.adapter.encode(q.text[: q.text.index("r") + 1]).ids.__len__() - 1 for q in questions]
    assert found.positions == tuple(places) and places != [len(case.adapter.encode(q.text)) - 1 for q in questions]
    assert_is_a_loop(case, found, questions, places)


def test_a_layer_patched_into_itself_changes_nothing(case):
    pairs = [(layer, layer) for layer in range(case.adapter.card.n_layers)]
    found = hb.backpatch(case.adapter, letters(case), pairs=pairs, controls=["swapped", "random"])
    for name in ("patch", "swapped"):
        assert (found.logprobs[name] - found.clean_logprobs[:, None]).abs().max() < 1e-10 and (
            found.token_ids[name] == found.clean_ids[:, None]
        ).all()
    assert (found.logprobs["random"] - found.clean_logprobs[:, None]).abs().max() > 1e-3
    assert found.region()["patch"] == Rate(0, 0) and found.region(answered=True)["patch"] == Rate(1, 1) and not found.donors


def test_answers_in_generated_text_are_those_of_plain_decoding(case):
    """The patch acts in the prompt only: its token is patched in every plain run, and what was decoded follows."""
    adapter, texts, steps = case.adapter, [question.text for question in letters(case)[::2]], 3

    def decode(ids: tuple[int, ...], edits=()) -> str:
        out: list[int] = []
        while len(out) < steps:
            token = int(case.plain((*ids, *out), edits)[0][-1].argmax())
            if token in adapter.eos_ids:
                break
            out.append(token)
        return adapter.tokenizer.decode(out)

    said: dict[tuple, list[str]] = {}
    for i, text in enumerate(texts):
        ids = adapter.encode(text).ids
        states = states_of(case, ids)
        said[i, -1, -1] = [decode(ids)]
        for source in range(adapter.card.n_layers):
            for target in range(source):
                site = hb.Site("resid_post", target)
                said[i, source, target] = [decode(ids, ((site, len(ids) - 1, hb.Edit(site, states[source][-1], "set"), []),))]
    parts = [text[at : at + 2] for i in range(2) for key, (text,) in reversed(said.items()) if key[0] == i for at in range(2)]
    answers = [next((part for part in parts if len(part.strip()) == 2 and part.isascii() and part.isprintable()), "~~")] * 2
    found = hb.backpatch(
        adapter, [Question(text, answer.swapcase()) for text, answer in zip(texts, answers, strict=True)], generate=steps, controls=[]
    )
    want = torch.tensor([[answers[i].lower() in said[i, s, t][0].lower() for s, t in found.pairs] for i in range(2)])
    assert (found.right["patch"] == want).all() and want.any() and {*found.right} == {"patch"}
    assert found.clean.tolist() == [answers[i].lower() in said[i, -1, -1][0].lower() for i in range(2)]


def planted() -> hb.Backpatch:
    """Six questions; 4 and 5 are answered. Pair (2, 1) fixes all the others; (2, 0) some, as the shuffled control does; (1, 0) breaks
    what is known."""
    from hookbook.testing import toy

    found = hb.backpatch(toy(), [(text, f"answer {text}") for text in "abcdef"], controls=["shuffled", "swapped"])
    assert found.pairs == ((1, 0), (2, 0), (2, 1))
    patch = torch.tensor([[0, 1, 1], [0, 0, 1], [0, 0, 1], [0, 0, 1], [0, 1, 1], [0, 1, 1]]).bool()
    shuffled = torch.tensor([[0, 1, 0]] * 2 + [[0, 0, 0]] * 4).bool()
    right = {"patch": patch, "shuffled": shuffled, "swapped": torch.zeros(6, 3).bool()}
    return replace(found, clean=torch.tensor([0, 0, 0, 0, 1, 1]).bool(), right=right, order=(5, 3, 0, 4, 2, 1))


def test_rates_of_planted_cells():
    found = planted()
    assert found.shares()["patch"].tolist() == [0, 0.25, 1] and found.shares(answered=True)["patch"].tolist() == [0, 1, 1]
    every, region = found.region(), found.region(sources=[2], targets=range(1))
    assert (
        every["patch"] == pytest.approx(Rate(1, 5 / 12))
        and every["shuffled"] == pytest.approx(Rate(0.5, 2 / 12))
        and every["swapped"] == Rate(0, 0)
    )
    assert region["patch"] == Rate(0.25, 0.25) and region["shuffled"] == Rate(0.5, 0.5)
    assert found.region(answered=True)["patch"] == pytest.approx(Rate(1, 4 / 6))
    assert found.best() == BestPair(2, 1, 1.0, {"patch": 1.0, "shuffled": 0.0, "swapped": 0.0}, 2)
    table = found.summary().set_index("control")
    assert table.loc["patch"].tolist() == pytest.approx([1, 5 / 12, 1, 4 / 6, 1])
    assert table.loc["shuffled"].tolist() == pytest.approx([0.5, 2 / 12, 0, 0, 2 / 5])
    lines = found.to_frame().values.tolist()
    assert (
        ["patch", 2, 0, 0.25, 1.0] in lines
        and ["shuffled", 2, 0, 0.5, 0.0] in lines
        and ["swapped", 0, 2, 0.0, 0.0] in lines
        and len(lines) == 9
    )


def test_the_best_pair_is_chosen_without_the_questions_that_judge_it():
    found = planted()
    patch = found.right["patch"].clone()
    patch[[1, 2], 2] = False  # the judging half of (3, 0, 2, 1)
    judged = replace(found, right={**found.right, "patch": patch}).best()
    assert (judged.source, judged.target, judged.chosen_at, judged.rates["patch"]) == (2, 1, 1.0, 0.0)
    with pytest.raises(DataError, match="1 questions that were not answered.*one half chooses"):
        replace(found, clean=torch.tensor([1, 1, 1, 1, 1, 0]).bool()).best()
    assert torch.tensor(replace(found, clean=torch.ones(6).bool()).summary()["any"].tolist()).isnan().all()
    with pytest.raises(SiteError, match="no pairs from layers"):
        found.region(sources=[0])
    with pytest.raises(DataError, match="no control 'random'"):
        found.plot(control="random")


def test_pictures_and_files(tmp_path):
    import matplotlib

    matplotlib.use("Agg")
    found = planted()
    patch, shuffled, swapped, *_ = found.plot_controls().axes
    assert torch.as_tensor(patch.images[0].get_array())[1].tolist() == [0.25, 1.0] and patch.images[0].get_clim() == shuffled.images[
        0
    ].get_clim() == (0.0, 1.0)
    assert [text.get_text() for text in swapped.get_yticklabels()] == ["0", "1"]
    assert "patch" in found.view().html and "<td class=number>0.25</td>" in found.view().html
    again = hb.Backpatch.load(found.save(tmp_path / "found"))
    assert again.summary().equals(found.summary()) and again.best() == found.best()


def test_a_donor_is_of_the_same_relations_where_there_is_one():
    from hookbook.testing import toy

    other = replace(hb.hops.chain(FIRST, SECOND, 1)[0], chain="alone")
    questions = [*hb.hops.chain(FIRST, SECOND), other, *hb.hops.chain(FIRST, replace(SECOND, name="third"))]
    for seed in range(3):
        found = hb.backpatch(toy(), questions, pairs=[(1, 0)], controls=["shuffled"], seed=seed)
        for i, donor in enumerate(found.donors):
            assert questions[donor].answer != questions[i].answer and (questions[donor].chain == questions[i].chain or i == 4)


def test_a_plan_counts_what_is_run():
    from hookbook.testing import toy

    questions = [("ab", "x"), ("cd", "y")]
    plan, cost = hb.backpatch.plan(toy(), questions), hb.backpatch(toy(), questions).settings["cost"]
    assert (plan.passes, plan.token_layers, plan.unembedded) == (cost["passes"], cost["token_layers"], cost["unembedded"])
    longer = hb.backpatch.plan(toy(), [(text, answer * 2) for text, answer in questions], generate=2)
    assert longer.token_layers > plan.token_layers


@pytest.mark.parametrize(
    ("questions", "ask", "error", "match"),
    [
        ([], {}, DataError, "no questions"),
        ([("ab", "x")], {}, DataError, "no other answer than that of 'ab'"),
        ([("ab", "x"), ("cd", "x")], {}, DataError, "no other answer than that of 'ab'"),
        (["ab"], {}, DataError, "'ab' is not a question|is not a question"),
        ([("ab", "x"), ("cd", "y")], {"position": "bridge"}, DataError, "the bridge of 'ab'.*has one hop"),
        ([("ab", "x"), ("cd", "y")], {"position": "a"}, TokenError, "'a' is not in the prompt 'cd'"),
        ([("ab", "x"), ("cd", "y")], {"position": slice(0, 2)}, TokenError, "is 2 tokens"),
        ([("ab", "x"), ("cd", "y")], {"generate": 2}, DataError, "so short a text"),
        ([("ab", "x"), ("cd", "y")], {"generate": -1}, TokenError, "generate=-1"),
        ([("ab", "x"), ("cd", "y")], {"controls": ["shuffle"]}, DataError, "give a list of some of"),
        ([("ab", "x"), ("cd", "y")], {"pairs": [(3, 0)]}, SiteError, "layers 0 to 2"),
        ([("ab", "x"), ("cd", "y")], {"pairs": []}, SiteError, "layers 0 to 2"),
        ([("ab", "x"), ("cd", "y")], {"pairs": "all"}, SiteError, "later to earlier"),
        ([("ab", "xx"), ("a" * 63, "yy")], {"generate": 8}, TokenError, "reads at most 64"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_runs(questions, ask, error, match, monkeypatch):
    from hookbook.testing import ToyModel, toy

    adapter = toy()
    monkeypatch.setattr(ToyModel, "forward", lambda *args: pytest.fail("the model was run"))
    with pytest.raises(error, match=match):
        hb.backpatch(adapter, questions, **ask)
