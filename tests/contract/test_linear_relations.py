"""Linear relations, edits along them and what they read elsewhere, on every adapter, against loops of plain runs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from string import ascii_letters, ascii_lowercase, digits, punctuation
from typing import Any

import pytest
import torch
from torch import Tensor

import hookbook as hb
from hookbook.recipes.relations.subjects import OTHERS, split
from hookbook.relations import Relation, Statement
from hookbook.request import Readout, Request, Row
from tests.support.cases import Case
from tests.support.formulas import flat

EXACT, SEED, TRAIN = 1e-10, 3, 2
BETAS, RANKS = (0.5, 1.0, 2.0), (1, 5, 16)
LAYERS = ["resid_pre.0", "resid_post.1", -1]
UNRELATED = ("Q {} R", "{} and so")


@cache
def planted(adapter: hb.Adapter, n_train: int = TRAIN, objects: int = 2, end: bool = False) -> Relation:
    """A relation of what the model says anyway behind arbitrary training pairs; the last subject of either part has another object.

    Args:
        objects: The fewest known objects of either part.
        end: The subject ends the prompt.
    """
    best: tuple[int, Relation | None] = (objects - 1, None)
    for mark in (*punctuation.replace("{", "").replace("}", ""), *digits, *ascii_letters):
        draw, template = random.Random(mark), f"say{mark}{{}}" if end else "{}" + mark
        subjects = sorted({"".join(draw.sample(ascii_lowercase, draw.randrange(2, 8))) for _ in range(20)})
        parts = split(Relation(tuple((x, "?") for x in subjects), "planted", templates=(template,), answer="{}"), n_train, None, SEED)
        train = tuple((x, draw.choice(ascii_lowercase)) for x, _ in parts[0])
        relation = Relation(train, "planted", templates=(template,), answer="{}")
        prompts = [adapter.encode(relation.ask(x, train, "?").text) for part in parts[1:] for x, _ in part]
        reply = adapter.run(Request(prompts, [Row(i) for i in range(len(prompts))], (), Readout(k=1)))
        tokens = reply.readout.topk_ids[:, 0].tolist()  # type: ignore[union-attr]
        pairs, known = list(train), []
        for part in parts[1:]:
            texts = [adapter.tokenizer.decode([tokens.pop(0)]) for _ in part]
            said = [y if len(y) == 1 and y.isascii() and y.isprintable() and y.strip() else "~" for y in texts]
            said[-1] = "~" if said[-1] != "~" else "^"
            pairs += [(x, y) for (x, _), y in zip(part, said, strict=True)]
            known.append([y for y, text in zip(said, texts, strict=True) if y == text])
        different = min(len({*some}) for some in known)
        if different > best[0]:
            best = different, Relation(tuple(pairs), "planted", templates=(template,), answer="{}")
        if different >= objects:
            break
    assert best[1] is not None, "this model says one thing to all"
    return best[1]


def run(case: Case, asked: Statement, edits: tuple = (), reads: tuple[hb.Site, ...] = (), grad: bool = False) -> tuple[Tensor, dict]:
    return case.plain(case.adapter.encode(asked.text).ids, edits, reads, grad)


def at(asked: Statement) -> int:
    """Of single bytes behind the beginning of a sequence: the subject's last token."""
    return asked.end


def edit(site: hb.Site, index: int, value: Tensor, op: str = "add") -> tuple:
    return ((site, index, hb.Edit(site, value, op), []),)  # type: ignore[arg-type]


def last(case: Case) -> hb.Site:
    return hb.Site("resid_post", case.adapter.card.n_layers - 1)


def state(case: Case, asked: Statement, site: hb.Site) -> tuple[Tensor, Tensor, int]:
    """The subject's state, the last output, and the token that is said."""
    logits, found = run(case, asked, (), (site, last(case)))
    return found[site][at(asked)], found[last(case)][-1], int(logits[-1].argmax())


def says(case: Case, asked: Statement, output: Tensor) -> int:
    """The token that the last block's output means at the end of the prompt."""
    ids = case.adapter.encode(asked.text).ids
    return int(case.plain(ids, edit(last(case), len(ids) - 1, output, "set"))[0][-1].argmax())


def expansion(case: Case, asked: Statement, site: hb.Site) -> tuple[Tensor, Tensor, Tensor]:
    """`W`, `F` and `s` at one prompt, every other position's state at the site held."""
    s, output, _ = state(case, asked, site)

    def last_output(value: Tensor) -> Tensor:
        return run(case, asked, edit(site, at(asked), value, "set"), (last(case),), grad=True)[1][last(case)][-1]

    return torch.autograd.functional.jacobian(last_output, s), output, s  # type: ignore[return-value]


@dataclass
class Found:
    case: Case
    relation: Relation
    result: hb.LinearRelation

    def asked(self, pairs: tuple) -> list[Statement]:
        return [self.relation.ask(x, self.result.train) for x, _ in pairs]

    def answer(self, subject: str) -> int:
        (answer,) = self.case.adapter.encode(self.relation.object_of(subject), bos=False).ids
        return answer


@pytest.fixture(scope="module")
def found(case) -> Iterator[Found]:
    """In the dtype of the model: results keep float32."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("linear_relations", "relation_edits"):
            patch.setattr(f"hookbook.recipes.relations.{module}.plain", lambda x: x.detach())
        relation = planted(case.adapter)
        yield Found(case, relation, hb.linear_relation(case.adapter, relation, layers=LAYERS, betas=BETAS, n_train=TRAIN, seed=SEED))


def test_pairs_are_parted_whatever_their_objects(found):
    parts = split(Relation(tuple((x, "?") for x, _ in found.relation.pairs), "planted", templates=("{}",)), TRAIN, None, SEED)
    ours = (found.result.train, found.result.validation, found.result.test)
    assert [[x for x, _ in part] for part in ours] == [[x for x, _ in part] for part in parts]
    assert {pair for part in ours for pair in part} == {*found.relation.pairs} and sum(map(len, ours)) == len(found.relation)
    for part, known in ((found.result.validation, found.result.validation_known), (found.result.test, found.result.test_known)):
        want = [
            state(found.case, asked, last(found.case))[2] == found.answer(x) for asked, (x, _) in zip(found.asked(part), part, strict=True)
        ]
        assert known.tolist() == want and True in want and False in want


def test_the_map_is_the_mean_of_expansions_of_plain_runs(found):
    case, result = found.case, found.result
    assert result.sites == (hb.Site("resid_pre", 0), hb.Site("resid_post", 1), last(case))
    for k, site in enumerate(result.sites):
        parts = [expansion(case, asked, site) for asked in found.asked(result.train)]
        weight = torch.stack([w for w, _, _ in parts]).mean(0)
        bias = torch.stack([f - w @ s for w, f, s in parts]).mean(0)
        assert (result.weight[k] - weight).abs().max() < EXACT * (1 + weight.abs().max())
        assert (result.bias[k] - bias).abs().max() < EXACT * (1 + bias.abs().max())
        assert weight.any() == (site != last(case)), "the last layer's subject is not heard at the last token"


def test_finite_differences_agree_with_the_map(found):
    case, result = found.case, found.result
    site, draw = result.sites[1], torch.Generator().manual_seed(0)
    # transformers' norms of these are float32 whatever the model's dtype
    rough = case.name.endswith(("llama", "gemma3")) and not case.name.startswith("hooked")
    step, bound = (1e-2, 1e-2) if rough else (1e-5, 1e-6)
    for _ in range(3):
        along = torch.randn(case.adapter.card.d_model, generator=draw, dtype=torch.float64)
        slopes = []
        for asked in found.asked(result.train):
            s = state(case, asked, site)[0]
            far, near = (
                run(case, asked, edit(site, at(asked), s + sign * step * along, "set"), (last(case),))[1][last(case)][-1]
                for sign in (1, -1)
            )
            slopes.append((far - near) / (2 * step))
        want = torch.stack(slopes).mean(0)
        assert (result.weight[1] @ along - want).norm() < bound * want.norm()


def test_of_one_expansion_the_map_gives_the_output_itself(case):
    relation = planted(case.adapter, 1, objects=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hookbook.recipes.relations.linear_relations.plain", lambda x: x.detach())
        result = hb.linear_relation(case.adapter, relation, layers="all", betas=(1,), n_train=1, seed=SEED)
    asked = relation.ask(result.train[0][0], result.train)
    assert asked.text == relation.templates[0].format(result.train[0][0]), "nothing is shown"
    for site in result.sites:
        s, output, _ = state(case, asked, site)
        assert (result(s, site) - output).abs().max() < EXACT * (1 + output.abs().max())
    assert torch.equal(result.faithfulness, result.controls["beta = 1"])


def test_at_the_end_of_prompt_and_model_the_map_is_the_identity(case):
    """A subject that ends the prompt is heard at the last layer, too."""
    result = hb.linear_relation(
        case.adapter, planted(case.adapter, 1, objects=1, end=True), layers=[0, -1], betas=(0.5, 1, 2), n_train=1, seed=SEED
    )
    assert torch.equal(result.weight[1], torch.eye(case.adapter.card.d_model)) and result.bias[1].abs().max() < 1e-6
    assert result.faithfulness[1] == result.controls["logit lens"][1] == result.controls["beta = 1"][1] == 1
    assert result.weight[0].any() and not torch.equal(result.weight[0], result.weight[1])


def ridge_solve(x: Tensor, y: Tensor, new: Tensor, ridge: float) -> Tensor:
    """Ridge regression in the primal."""
    centre, middle = x.mean(0), y.mean(0)
    x = x - centre
    weight = torch.linalg.solve(x.T @ x + ridge * x.pow(2).sum(1).mean() * torch.eye(x.shape[1], dtype=x.dtype), x.T @ (y - middle))
    return (new - centre) @ weight + middle


def test_faithfulness_and_its_controls_are_what_a_loop_finds(found, monkeypatch):
    case, relation, result = found.case, found.relation, found.result
    ridge = 0.2
    result = hb.linear_relation(case.adapter, relation, layers=LAYERS, betas=BETAS, n_train=TRAIN, seed=SEED, ridge=ridge)
    asked = {name: found.asked(getattr(result, name)) for name in ("train", "validation", "test")}
    known = {"validation": result.validation_known.tolist(), "test": result.test_known.tolist()}

    def share(part: str, outputs: Tensor) -> float:
        wanted = [found.answer(x) for x, _ in getattr(result, part)]
        right = [says(case, a, o) == w for a, o, w, ok in zip(asked[part], outputs, wanted, known[part], strict=True) if ok]
        return sum(right) / len(right)

    assert {*result.controls} == {"beta = 1", *OTHERS}
    for k, site in enumerate(result.sites):
        seen = {name: [state(case, a, site) for a in some] for name, some in asked.items()}
        s = {name: torch.stack([x for x, _, _ in some]) for name, some in seen.items()}
        o = {name: torch.stack([y for _, y, _ in some]) for name, some in seen.items()}
        weight, bias = result.weight[k], result.bias[k]
        chosen = [share("validation", beta * s["validation"] @ weight.T + bias) for beta in BETAS]
        assert result.chosen_by[k].tolist() == pytest.approx(chosen)
        beta = BETAS[chosen.index(max(chosen))]
        assert float(result.beta[k]) == beta
        assert float(result.faithfulness[k]) == pytest.approx(share("test", beta * s["test"] @ weight.T + bias))
        assert (result(s["test"], site) - (beta * s["test"] @ weight.T + bias)).abs().max() < EXACT * (1 + bias.abs().max())
        others = {
            "beta = 1": s["test"] @ weight.T + bias,
            "logit lens": s["test"],
            "shift": s["test"] + (o["train"] - s["train"]).mean(0),
            "bias": bias.expand_as(s["test"]),
            "least squares": ridge_solve(s["train"], o["train"], s["test"], ridge),
            "least squares, validation": ridge_solve(s["validation"], o["validation"], s["test"], ridge),
        }
        for name, outputs in others.items():
            assert float(result.controls[name][k]) == pytest.approx(share("test", outputs)), (name, site)
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(SEED + k)).double()
        noise *= weight.norm() / noise.norm()
        assert float(result.controls["random"][k]) == pytest.approx(share("test", beta * s["test"] @ noise.T + bias))
    frame = result.to_frame()
    assert frame.faithfulness.tolist() == result.faithfulness.tolist() and frame.validation.max() == frame.validation[result.best_index]
    assert set(frame.known) == {sum(known["test"])} and set(frame.asked) == {len(result.test)}


def moves(result: hb.LinearRelation, site: hb.Site, change: Tensor, rank: int) -> Tensor:
    """By numpy, of `W` cut to a rank."""
    import numpy as np

    u, s, v = np.linalg.svd(result.weight[result.sites.index(site)].double().numpy())
    cut = (u[:, :rank] * s[:rank]) @ v[:rank]
    return torch.from_numpy(np.linalg.pinv(cut, rcond=1e-15) @ change.numpy()) if cut.any() else torch.zeros_like(change)


def test_edits_are_what_a_loop_of_plain_runs_finds(found, monkeypatch):
    case, result, adapter = found.case, found.result, found.case.adapter
    asks, go = [], adapter.run
    monkeypatch.setattr(adapter, "run", lambda request, **more: asks.append(request) or go(request, **more))
    edits = hb.edit_relation(adapter, result, ranks=RANKS, changes=4, unrelated=UNRELATED, n_unrelated=2, seed=5)
    grid = len(edits.sites) * len(RANKS)
    tested = range(edits.n_validation, len(edits.changes))
    parts = {"validation": edits.changes[: edits.n_validation], "test": edits.changes[edits.n_validation :]}
    for part, changes in parts.items():
        every = {pair for pair, ok in zip(getattr(result, part), getattr(result, f"{part}_known").tolist(), strict=True) if ok}
        assert 0 < len(changes) <= 4 and len({x for x, *_ in changes}) == len(changes)
        assert all({(x, y), (other, wanted)} <= every and y != wanted for x, y, other, wanted in changes)
    # noise is drawn; that of each change, site and rank is looked up where it was sent
    (sent,) = [request for request in asks if request.readout is not None and any(row.edits for row in request.rows)]
    noise_rows = sent.rows[len(edits.changes) * grid :][: len(tested) * grid]

    statements = [found.relation.ask(x, result.train) for x, *_ in edits.changes]
    luck, swapped, own_kl, noise_kl = (torch.zeros(len(edits.sites), len(RANKS), dtype=torch.float64) for _ in range(4))
    for i, (_, _, other, wanted) in enumerate(edits.changes):
        asked, donor = statements[i], found.relation.ask(other, result.train)
        assert int(edits.wanted[i]) == found.answer(other) == adapter.encode(wanted, bos=False).ids[0]
        for k, site in enumerate(edits.sites):
            (_, output, _), (s_other, output_other, _) = state(case, asked, site), state(case, donor, site)
            if i in tested:
                swapped[k] += int(run(case, asked, edit(site, at(asked), s_other, "set"))[0][-1].argmax()) == found.answer(other)
            for j, rank in enumerate(RANKS):
                move = moves(result, site, output_other - output, rank)
                row = sent.rows[i * grid + k * len(RANKS) + j]
                assert (row.edits[0].value - move).abs().max() < 1e-7 * (1 + move.abs().max()) and row.edits[0].site == site
                assert int(edits.said[i, k, j]) == int(run(case, asked, edit(site, at(asked), move))[0][-1].argmax()), (site, rank)
                if i not in tested:
                    continue
                (drawn,) = noise_rows[(i - tested[0]) * grid + k * len(RANKS) + j].edits
                assert abs(float(drawn.value.norm() - move.norm())) < 1e-7 * (1 + float(move.norm()))
                assert not move.any() or abs(float(torch.cosine_similarity(drawn.value, move, 0))) < 0.99
                luck[k, j] += int(run(case, asked, edit(site, at(asked), drawn.value))[0][-1].argmax()) == found.answer(other)
                for sentence in UNRELATED if i in tested[:2] else ():
                    plain = Relation((edits.changes[i][:2],), templates=(sentence,)).ask(edits.changes[i][0])
                    clean = run(case, plain)[0][-1].log_softmax(-1)
                    for value, total in ((move, own_kl), (drawn.value, noise_kl)):
                        said = run(case, plain, edit(site, at(plain), value))[0][-1].log_softmax(-1)
                        total[k, j] += (clean.exp() * (clean - said)).sum() / len(tested[:2]) / len(UNRELATED)
    n = len(tested)
    assert (edits.random - luck / n).abs().max() < EXACT and (edits.substituted - swapped[:, 0] / n).abs().max() < EXACT
    assert (edits.divergence - own_kl).abs().max() < 1e-7 * own_kl.max() and (
        edits.random_divergence - noise_kl
    ).abs().max() < 1e-7 * noise_kl.max()
    right = (edits.said == edits.wanted[:, None, None]).double()
    assert torch.equal(edits.success, right[tested].mean(0)) and torch.equal(edits.validation, right[: edits.n_validation].mean(0))
    own = torch.tensor([found.answer(x) for x, *_ in edits.changes])
    assert torch.equal(edits.said[:, -1], own[:, None].expand(-1, len(RANKS))) and edits.divergence[:-1].min() > 1e-9
    if case.name not in ("bridge-gpt2", "nnsight-gpt2"):  # whose answers hang on the last token
        assert (edits.said[:, :-1] != own[:, None, None]).any()
    assert not edits.divergence[-1].any(), "the last layer's subject is not heard"


def greedy(case: Case, ids: tuple[int, ...], edits: tuple, n: int) -> tuple[int, ...]:
    out: list[int] = []
    while len(out) < n:
        token = int(case.plain((*ids, *out), edits)[0][-1].argmax())
        if token in case.adapter.eos_ids:
            break
        out.append(token)
    return tuple(out)


@pytest.mark.parametrize("twice", [False, True])
def test_a_changed_answer_goes_on_as_plain_decoding_does(found, twice):
    case, result, adapter = found.case, found.result, found.case.adapter
    (subject, own), *_ = result.pairs("test")
    other, wanted = next(pair for pair in (*result.train, *result.validation, *result.test) if pair[1] != own)
    asked, donor = (found.relation.ask(x, result.train) for x in (subject, other))
    site = result.sites[1]
    move = moves(result, site, state(case, donor, site)[1] - state(case, asked, site)[1], 5)
    sentence = f"{subject}, {{}} or {subject}" if twice else None
    if twice:
        asked = Relation(((subject, own),), templates=(sentence or "",)).ask(subject)
        assert asked.text.count(subject) == 3 and at(asked) == 2 * len(subject) + 2
    ask: dict[str, Any] = {"sentence": sentence, "layer": site, "rank": 5, "max_new_tokens": 5}
    out = result.edit(adapter, subject, wanted, **ask) if twice else hb.change_answer(adapter, result, subject, wanted, **ask)
    ids = adapter.encode(asked.text).ids
    want, control = greedy(case, ids, edit(site, at(asked), move), 5), greedy(case, ids, (), 5)
    assert out.ids == (want,) and out.control_ids == (control,) and want
    assert out.texts == (adapter.tokenizer.decode(want),) and out.control_texts == (adapter.tokenizer.decode(control),)
    assert out.prompts[0].text == asked.text


def test_what_the_map_reads_elsewhere_is_the_map_of_plain_states(found):
    case, result, adapter = found.case, found.result, found.case.adapter
    prompts, position = ["A longer one", "cde and"], -3
    whole = hb.attribute_lens(adapter, result, prompts, position=position, k=adapter.card.d_vocab, tokens=["x"])
    for n, text in enumerate(prompts):
        tokens = adapter.encode(text)
        where = len(tokens) + position
        for k, site in enumerate(result.sites):
            s = case.plain(tokens.ids, (), (site,))[1][site][where]
            output = result.beta[k] * (result.weight[k] @ s) + result.bias[k]
            said = case.plain(tokens.ids, flat((hb.Edit(last(case), output, "set", where),), tokens))[0][where].log_softmax(-1)
            assert (whole.logprobs[n, k] - said[whole.token_ids[n, k]]).abs().max() < 1e-9
            assert torch.equal(whole.token_ids[n, k].sort().values, torch.arange(adapter.card.d_vocab))
            assert abs(float(whole.wanted_logprobs[n, k, 0] - said[adapter.encode("x", bos=False).ids[0]])) < 1e-9
    some = hb.attribute_lens(adapter, result, prompts, position=position, layers=[1], k=4)
    assert some.token_ids.shape == (2, 1, 4) and torch.equal(some.token_ids[:, 0], whole.token_ids[:, 1, :4])
