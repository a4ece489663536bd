"""Effects of heads, function vectors and what judges them, on every adapter, against loops of plain runs."""

from __future__ import annotations

import random
from string import ascii_lowercase, ascii_uppercase, digits, punctuation

import pytest
import torch

import hookbook as hb
from hookbook.errors import DataError, EditError
from hookbook.tasks import Task, Template
from tests.support.cases import Case

SHOTS, PROMPTS, TRIALS = 2, 4, 3
LETTERS = Task(tuple((letter, letter.upper()) for letter in ascii_lowercase), "letters", Template("{}>", "{}", ";"))


def own_task(case: Case, n: int = 24) -> Task:
    """A task of what the model says anyway, so that answers are right, and under a vector often no more. It says letters after few
    characters."""
    best: dict[int, Task] = {}
    for mark in (*punctuation.replace("{", "").replace("}", ""), *digits, *ascii_uppercase):
        draw, pairs, template = random.Random(3), {}, Template("{}" + mark, "{}", ";")
        for _ in range(n):
            word = "".join(draw.sample(ascii_lowercase, 2))
            said = case.adapter.tokenizer.decode([int(case.plain(case.adapter.encode(template.query.format(word)).ids)[0][-1].argmax())])
            pairs[word] = said if len(said) == 1 and said.isascii() and said.isprintable() and said.strip() else "~"
        known = sum(said != "~" for said in pairs.values())
        best[known] = Task(tuple(pairs.items()), "own", template)
        if known > n // 2:
            break
    assert max(best), "this model says no letters"
    return best[max(best)]


def ids_of(case: Case, question: hb.tasks.Question) -> tuple[tuple[int, ...], int]:
    ids = case.adapter.encode(question.text).ids
    return ids, case.adapter.encode(question.text + question.answer).ids[len(ids)]


def mean_z(case: Case, task: Task) -> list[torch.Tensor]:
    sites = tuple(hb.Site("head_z", layer) for layer in range(case.adapter.card.n_layers))
    runs = [
        case.plain(ids_of(case, question)[0], (), sites)[1] for question in task.split(5).train.questions(shots=SHOTS, n=PROMPTS, seed=5)
    ]
    return [torch.stack([found[site][-1] for found in runs]).mean(0) for site in sites]


def test_effects_of_heads_are_what_a_loop_finds(case):
    adapter, task = case.adapter, own_task(case)
    card, means = adapter.card, mean_z(case, task)
    found = hb.head_effects(adapter, task, shots=SHOTS, n_prompts=PROMPTS, n_trials=TRIALS, known=False, seed=5)
    asked = task.split(5).train.questions(shots=SHOTS, n=TRIALS, seed=6, shuffled=True)
    want, before = torch.zeros(card.n_layers, card.n_heads, dtype=torch.float64), 0.0
    for question in asked:
        ids, answer = ids_of(case, question)
        clean = float(case.plain(ids)[0][-1].softmax(-1)[answer])
        before += clean / TRIALS
        for layer, z in enumerate(means):
            for head, value in enumerate(z.unflatten(0, (card.n_heads, -1))):
                site = hb.Site("head_z", layer, head)
                logits, _ = case.plain(ids, ((site, len(ids) - 1, hb.Edit(site, value, "set"), []),))
                want[layer, head] += (float(logits[-1].softmax(-1)[answer]) - clean) / TRIALS
    assert found.effects.shape == (1, card.n_layers, card.n_heads) and (found.mean.double() - want).abs().max() < 1e-6 < want.abs().max()
    assert float(found.misled[0]) == pytest.approx(before, abs=1e-6)
    order = want.flatten().argsort(descending=True).tolist()
    assert found.top(2) == [(at // card.n_heads, at % card.n_heads) for at in order[:2]]
    assert len(found.to_frame()) == want.numel()


def test_a_function_vector_is_the_sum_of_its_heads(case):
    adapter, task = case.adapter, own_task(case)
    card, means = adapter.card, mean_z(case, task)
    heads = [(0, 1), (card.n_layers - 1, 0)]
    ask = {"shots": SHOTS, "n_prompts": PROMPTS, "n_trials": TRIALS, "known": False, "queries": 6, "seed": 5}
    found = hb.function_vector(adapter, task, heads=heads, strength=3.0, **ask)
    with torch.no_grad():
        want = sum(3 * adapter.head_contributions(layer, means[layer][None])[0, head] for layer, head in heads)
        if adapter.writer("head_z", 0)[1] is None:  # no norm after attention: the output projection of everything but the head set to zero
            plain = 0
            for layer, head in heads:
                alone, project = torch.zeros_like(means[layer]), adapter.writer("head_z", layer)[0]
                part = slice(head * card.d_head, (head + 1) * card.d_head)
                alone[part] = means[layer][part]
                plain = plain + 3 * (project(alone[None])[0] - project(0 * alone[None])[0])
            assert (plain - want).abs().max() < 1e-9
    assert found.heads == tuple(heads) and (found.values[1].double() - want).abs().max() < 1e-5 * want.abs().max()

    parts, sites = task.split(5), found.sites

    def accuracy(questions, layer, value):
        right = 0
        for question in questions:
            ids, answer = ids_of(case, question)
            edits = () if value is None else ((sites[layer], len(ids) - 1, hb.Edit(sites[layer], value, "add"), []),)
            right += int(case.plain(ids, edits)[0][-1].argmax()) == answer
        return right / len(questions)

    test = parts.test.questions(n=6, seed=5)
    behind = parts.test.questions(parts.train, SHOTS, 6, seed=5, shuffled=True)
    layers = range(card.n_layers)
    assert found.accuracy.tolist() == pytest.approx([accuracy(test, layer, want) for layer in layers])
    assert found.misled["vector"].tolist() == pytest.approx([accuracy(behind, layer, want) for layer in layers])
    assert float(found.zero_shot) == pytest.approx(accuracy(test, 0, None))
    assert float(found.misled["none"][0]) == pytest.approx(accuracy(behind, 0, None))
    assert float(found.few_shot) == pytest.approx(accuracy(parts.test.questions(parts.train, SHOTS, 6, seed=5), 0, None))
    scanned = hb.function_vector(adapter, task, heads=2, **ask)
    assert scanned.heads == tuple(
        hb.head_effects(adapter, task, **{key: ask[key] for key in ("shots", "n_prompts", "n_trials", "known", "seed")}).top(2)
    )
    norm = found.values.norm(dim=-1)
    assert {*found.controls} == {"random heads", "random", "layer mean"} and torch.allclose(norm, norm[:1])


def test_only_answered_queries_count():
    """Of planted knowledge: the mean over the prompts whose query the model answers, and the pairs of a task that it answers."""
    from hookbook.testing import toy

    case = Case("toy", toy())
    task = own_task(case)
    task = Task((*task.pairs, ("qqq", "~~"), ("zzz", "~~")), "own", task.template)
    right = [
        (x, y)
        for x, y in task.pairs
        if int(case.plain(case.adapter.encode(task.template.prompt((), x)).ids)[0][-1].argmax()) == case.adapter.encode(y, bos=False).ids[0]
    ]
    assert hb.known(case.adapter, task, shots=0).pairs == tuple(right) and 0 < len(right) < len(task)
    wrong = Task(tuple((x, "\x7f") for x, _ in task.pairs), "wrong", task.template)
    with pytest.raises(DataError, match="answers none of 'wrong'"):
        hb.known(case.adapter, wrong, shots=0)
    with pytest.raises(DataError, match="answers none of 'wrong'"):
        hb.head_effects(case.adapter, [task, wrong], shots=2, n_prompts=3, n_trials=2)
    with pytest.raises(DataError, match="answers none of 'wrong'"):
        hb.function_vector(case.adapter, wrong, heads=1, shots=2, n_prompts=3, n_trials=2)


def test_trials_are_as_many_as_were_asked_for_and_all_of_known_pairs():
    """The pairs that are answered are found beforehand; means and trials draw from them, as often as they were asked for."""
    from hookbook.testing import toy

    case = Case("toy", toy())
    words = [a + b for a in "abcdef" for b in "xyz"]
    task = Task(tuple((word, "(p"[at % 2]) for at, word in enumerate(words)), "said", Template("{}*", "{}", ";"))
    train, card, n, trials = task.split(5).train, case.adapter.card, 7, 8

    def says(question):
        ids, answer = ids_of(case, question)
        return int(case.plain(ids)[0][-1].argmax()) == answer

    right = []
    for at, pair in enumerate(train.pairs[:trials]):  # each once, behind its own draw of examples
        (question,) = Task((pair,), "said", task.template).questions(train, SHOTS, seed=5 + at)
        right += [pair] * says(question)
    assert 0 < len(right) < trials < len(train)
    known = Task(tuple(right), "said", task.template)
    sites = tuple(hb.Site("head_z", layer) for layer in range(card.n_layers))
    runs = [case.plain(ids_of(case, question)[0], (), sites)[1] for question in known.questions(train, SHOTS, n, seed=5)]
    means = [torch.stack([found[site][-1] for found in runs]).mean(0) for site in sites]
    want, before = torch.zeros(card.n_layers, card.n_heads, dtype=torch.float64), 0.0
    for question in known.questions(train, SHOTS, trials, seed=6, shuffled=True):
        ids, answer = ids_of(case, question)
        clean = float(case.plain(ids)[0][-1].softmax(-1)[answer])
        before += clean / trials
        for layer, z in enumerate(means):
            for head, value in enumerate(z.unflatten(0, (card.n_heads, -1))):
                site = hb.Site("head_z", layer, head)
                logits, _ = case.plain(ids, ((site, len(ids) - 1, hb.Edit(site, value, "set"), []),))
                want[layer, head] += (float(logits[-1].softmax(-1)[answer]) - clean) / trials
    found = hb.head_effects(case.adapter, task, shots=SHOTS, n_prompts=n, n_trials=trials, seed=5)
    assert (found.mean.double() - want).abs().max() < 1e-6 < want.abs().max()
    assert float(found.misled[0]) == pytest.approx(before, abs=1e-6) and found.settings["pairs"] == [len(right)]
    ask = {"shots": SHOTS, "n_prompts": n, "n_trials": trials, "queries": 3, "seed": 5}
    assert (hb.function_vector(case.adapter, task, heads=2, **ask).effects.double() - want).abs().max() < 1e-6


def test_a_sum_of_vectors_is_made_of_its_parts(case):
    adapter = case.adapter
    task = own_task(case, 40)
    found = hb.compose(adapter, task, length=2, shots=2, n_prompts=3, queries=4, seed=5)
    train, layers = task.split(5).train, range(adapter.card.n_layers)
    copies = Task(tuple((x, x) for x, _ in train.pairs), train.name, train.template)
    sites = tuple(hb.Site("resid_post", layer) for layer in layers)

    def mean(source, item):
        states = []
        for question in hb.tasks.lists(source, item, length=2, n=8, seed=5).questions(shots=2, n=3, seed=5):
            found = case.plain(ids_of(case, question)[0], (), sites)[1]
            states.append(torch.stack([found[site][-1] for site in sites]))
        return torch.stack(states).mean(0)

    want = mean(train, "first") + mean(copies, "last") - mean(copies, "first")
    assert (found.values.double() - want).abs().max() < 1e-5 * want.abs().max()
    assert {*found.controls} == {"first answer", "last copy", "first copy", "direct", "random"} and found.task == "own:last"


@pytest.mark.parametrize(
    ("ask", "error", "match"),
    [
        ({"heads": 0}, EditError, "0 heads"),
        ({"heads": 4}, EditError, "as many others are the control"),
        ({"heads": [(9, 0)]}, EditError, "3 layers of 2 heads"),
        ({"heads": [(0, 0), (0, 0)]}, EditError, "name each once"),
        ({"n_trials": 0}, hb.errors.TokenError, "n_trials=0"),
        ({"shots": 40}, DataError, "40 pairs to show"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_runs(ask, error, match, monkeypatch):
    from hookbook.testing import ToyModel, toy

    adapter = toy()
    monkeypatch.setattr(ToyModel, "forward", lambda *args: pytest.fail("the model was run"))
    with pytest.raises(error, match=match):
        hb.function_vector(adapter, LETTERS, **{"shots": 2, "heads": 1, **ask})
