"""Steering on the toy model: closed forms in float64, the selection rule on planted numbers, scores of texts, and bad input."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import hookbook as hb
from hookbook.errors import DataError, EditError, HookbookError, ModelError, Refused, SiteError, TokenError
from hookbook.recipes.steering.contrast_vectors import _auroc
from hookbook.recipes.steering.refusal_direction import _discarded, _log_odds, _why
from hookbook.testing import toy
from hookbook.travel.edits import apply_edit

TOY = toy()
POSITIVE, NEGATIVE = ["good day", "goodly sum", "a good egg", "good"], ["bad day", "badly sum", "a bad egg", "bad"]
VECTOR = hb.Vector.of(TOY, "resid_post.1", torch.linspace(-2, 3, 16))


def states(texts: list[str], site: str, tokens: slice) -> torch.Tensor:
    from hookbook.request import Read, Request, Row

    found = []
    for text in texts:
        reading = TOY.run(Request([TOY.encode(text)], [Row(0)], [Read(hb.Site.parse(site), slice(None))])).readings[0]
        found.append(reading.values[tokens].mean(0))
    return torch.stack(found)


def test_a_contrast_vector_is_the_difference_of_means():
    found = hb.contrast_vector(TOY, POSITIVE, NEGATIVE, layers=[0, 2], position=[-1, -2], held_out=0)
    for p, position in enumerate((-1, -2)):
        for s, site in enumerate(("resid_post.0", "resid_post.2")):
            only = slice(-1, None) if position == -1 else slice(-2, -1)
            high, low = states(POSITIVE, site, only), states(NEGATIVE, site, only)
            assert torch.allclose(found.values[p, s], (high.mean(0) - low.mean(0)).float(), atol=1e-6)
            assert torch.allclose(found.norms[:, p, s], torch.stack([high.norm(dim=-1).mean(), low.norm(dim=-1).mean()]).float())
            assert torch.equal(found.vector(site, position).values, found.values[p, s])
    assert found.auroc.isnan().all() and found.vector(0, -1).site == hb.Site("resid_post", 0)


def test_a_span_is_the_mean_of_its_tokens_without_the_beginning():
    for span, same in ((slice(None), slice(1, None)), (range(0, 3), slice(1, 3)), (slice(1, None), slice(1, None))):
        found = hb.contrast_vector(TOY, POSITIVE, NEGATIVE, layers="mlp_out.1", position=span, held_out=0)
        want = states(POSITIVE, "mlp_out.1", same).mean(0) - states(NEGATIVE, "mlp_out.1", same).mean(0)
        assert torch.allclose(found.values[0, 0], want.float(), atol=1e-6)
    alone = hb.contrast_vector(
        TOY, POSITIVE, NEGATIVE, layers=1, position=0, held_out=0
    )  # asked for by itself it is kept: the same in every text
    assert alone.values.abs().max() < 1e-6


def test_held_out_texts_make_no_vector_and_tell_classes_apart_better_than_chance():
    letters = "abcdefghijklmnop"
    positive, negative = [letter + "!" for letter in letters], [letter + "?" for letter in letters]
    found = hb.contrast_vector(TOY, positive, negative, held_out=0.25)
    assert found.settings["texts"] == [12, 12, 4, 4]
    assert (found.auroc == 1).all() and (found.shuffled < 0.8).all() and (found.shuffled > 0.2).all()
    some = [hb.contrast_vector(TOY, positive[:i] + positive[i + 1 :], negative, held_out=0).values for i in (0, 1)]
    assert not torch.allclose(found.values, some[0])
    again = hb.contrast_vector(TOY, positive, negative, held_out=0.25)
    assert torch.equal(found.values, again.values) and torch.equal(found.shuffled, again.shuffled)
    assert len(found.to_frame()) == 3 and found.plot() is not None and "shuffled" in found.view().html


def test_the_share_of_pairs_in_order_by_hand():
    axis = torch.tensor([3.0, 1.0, 2.0, 0.0, 1.0], dtype=torch.float64)[
        None, None, :, None
    ]  # prompts 0 and 1 are held out against 2, 3 and 4
    weights = torch.tensor([[1.0, 0, 0, 0, 0]], dtype=torch.float64)
    assert float(_auroc(axis, weights, torch.tensor([[0, 1]]), torch.tensor([[2, 3, 4]]))) == pytest.approx((3 + 1 + 0.5) / 6)


def test_in_context_vectors_are_the_authors_principal_component_and_mean():
    pairs = [("bad day", "good day"), ("sad", "glad"), ("no way", "yes"), ("ugly", "nice one")]
    found = hb.in_context_vector(TOY, pairs)
    sites = ["resid_pre.0", *(f"resid_post.{layer}" for layer in range(3))]
    x, y = (torch.cat([states([pair[i] for pair in pairs], site, slice(-1, None)) for site in sites], 1) for i in (0, 1))
    data = y - x
    centred = data - data.mean(0)
    u, s, v = torch.linalg.svd(centred, full_matrices=False)
    component = v[0] * torch.sign(u[u[:, 0].abs().argmax(), 0])
    want = (component + data.mean(0)).reshape(4, 16)[1:]
    assert torch.allclose(found.values.double(), want, atol=1e-6) and torch.allclose(
        found.means.double(), data.mean(0).reshape(4, 16)[1:], atol=1e-6
    )
    assert float(found.explained) == pytest.approx(float(s[0] ** 2 / (s**2).sum()))
    assert abs(float((want - found.means.double()).norm())) <= 1 + 1e-6
    edits = found.edits(0.3)
    assert [str(edit.site) for edit in edits] == ["mlp_out.0", "mlp_out.1", "mlp_out.2"] and all(
        edit.op == "rotate" and edit.scope == "all" for edit in edits
    )
    assert all(abs(float(edit.value.norm()) - 0.3) < 1e-6 for edit in edits)  # type: ignore[union-attr]
    assert hb.generate(TOY, "ab", edits=edits, max_new_tokens=2).edits and len(found.to_frame()) == 3 and found.plot() is not None


@pytest.mark.parametrize("lam", [0.1, 2.0])
def test_a_rotation_is_the_published_formula_and_keeps_the_length(lam):
    draw = torch.Generator().manual_seed(0)
    x, v = torch.randn(5, 3, 16, generator=draw, dtype=torch.float64), torch.randn(16, generator=draw, dtype=torch.float64)
    x[0, 0] = -7 * v  # the cosine to -v is 1 here, and 0 counts where it is negative
    x[1, 1] = 0
    lambda_sim = 1 + torch.nn.functional.cosine_similarity(x, -v, dim=-1).clamp(min=0)[..., None]
    y = lam * lambda_sim * v / v.norm()
    want = torch.nn.functional.normalize(torch.nn.functional.normalize(x, dim=-1) + y, dim=-1) * x.norm(dim=-1, keepdim=True)
    rows, cols = torch.arange(5).repeat_interleave(3), torch.arange(3).repeat(5)
    ours = x.clone()
    apply_edit(ours, {"op": "rotate", "rows": rows, "cols": cols, "value": (lam * v / v.norm()).expand(15, 16)})
    assert (ours - want).abs().max() < 1e-12 and (ours.norm(dim=-1) - x.norm(dim=-1)).abs().max() < 1e-12
    assert (ours[1, 1] == 0).all()


def test_log_odds_are_those_of_all_tokens_together():
    p = torch.tensor([[0.2, 0.3], [0.0, 1e-12]], dtype=torch.float64)
    want = [0.0, math.log(1e-8 + 1e-12) - math.log(1 + 1e-8 - 1e-12)]
    assert _log_odds(p.log()).tolist() == pytest.approx(want)


def test_the_selection_rule_on_planted_numbers():
    nan = float("nan")
    ablation = [-1.0, -5.0, -4.0, -9.0, nan, -3.0]
    addition = [2.0, -0.1, 1.0, 3.0, 1.0, nan]
    kl = [0.05, 0.01, 0.1, 0.11, 0.0, 0.0]
    every = torch.tensor([ablation, addition, kl], dtype=torch.float64)[:, None]
    real = torch.zeros(1, 6, dtype=torch.bool)
    (why,) = _discarded(every, real, [0, 1, 2, 3, 4, 5], 16, 0.1)
    assert [bool(w) for w in why] == [False, True, False, True, True, True]
    assert all("rounding noise" in w for w in _discarded(every, ~real, [0, 1, 2, 3, 4, 5], 16, 0.1)[0])
    assert "addition" in why[1] and "KL" in why[3] and why[4] == why[5] == "not a number"
    assert all("not below" in w for w in _discarded(every, real, [8] * 6, 8, 0.1)[0])
    assert not _discarded(every, real, [7] * 6, 8, 0.1)[0][0]
    values = torch.arange(6.0 * 16).reshape(1, 6, 16)
    six = toy(n_layers=6)
    choice = hb.DirectionChoice(
        six.card,
        tuple(hb.Site("resid_pre", i) for i in range(6)),
        ("-1",),
        values,
        every[0],
        every[1],
        every[2],
        (why,),
        (values[0, 0], values[0, 0]),
        "",
        "",
        {},
    )
    assert choice.best is not None and choice.best.site.layer == 2  # the lowest of those left
    assert _why(every, real, torch.tensor([3, 3]), [0, 1, 2, 3, 4, 5], 16, 0.1) == ""
    assert _why(every, real, torch.tensor([3, 3]), [5] * 6, 4, 0.1) == "every candidate is discarded"
    assert "no positive prompt" in _why(every, real, torch.tensor([0, 3]), [0] * 6, 16, 0.1)


def test_selection_measures_what_its_runs_give():
    found = hb.contrast_vector(TOY, POSITIVE, NEGATIVE, site="resid_pre", position=[-1, -2], held_out=0)
    ours = hb.select_direction(TOY, found, ["axe", "oak"], ["ship", "to"], tokens=["e", "o"], max_kl=9.0, filter=False, chat=False)
    ids = [TOY.encode("eo").ids[1:]][0]

    def run(text: str, edits: list[hb.Edit]) -> torch.Tensor:
        from hookbook.request import Readout, Request, Row

        reply = TOY.run(Request([TOY.encode(text)], [Row(0, tuple(edits))], (), Readout(logits=True)))
        return reply.readout.logits[0].log_softmax(-1)  # type: ignore[union-attr]

    def odds(logprobs: torch.Tensor) -> float:
        p = float(logprobs[list(ids)].exp().sum())
        return math.log(p + 1e-8) - math.log(1 - p + 1e-8)

    assert all("layer 2 is not below 2" in line[2] for line in ours.discarded)  # of three layers, int(0.8 * 3) and above
    for p, position in enumerate((-1, -2)):
        for s in range(2):
            vector = found.vector(s, position)
            ablate, add = hb.directional_ablation(vector), [vector.edit(position=slice(None), scope="all")]
            assert float(ours.ablation[p, s]) == pytest.approx(sum(odds(run(text, ablate)) for text in ("axe", "oak")) / 2, abs=1e-9)
            assert float(ours.addition[p, s]) == pytest.approx(sum(odds(run(text, add)) for text in ("ship", "to")) / 2, abs=1e-9)
            clean, changed = ([run(text, edits) for text in ("ship", "to")] for edits in ([], ablate))
            kl = sum(float((a.exp() * (a - b)).sum()) for a, b in zip(clean, changed, strict=True)) / 2
            assert float(ours.kl[p, s]) == pytest.approx(kl, abs=1e-9)
    none = hb.select_direction(TOY, found, ["axe", "oak"], ["ship", "to"], tokens=["e", "o"], chat=False)
    assert none.best is None and "without edits" in none.why  # the toy never says either: all log-odds are below 0
    assert len(none.to_frame()) == 6 and none.why in none.view().html


@pytest.mark.parametrize(("n_layers", "left"), [(5, 4), (6, 4), (12, 9), (18, 14), (30, 24)])
def test_layers_are_discarded_from_where_the_authors_discard_them(n_layers, left):
    model = toy(n_layers=n_layers)
    found = hb.contrast_vector(model, POSITIVE, NEGATIVE, site="resid_pre", held_out=0)
    ours = hb.select_direction(model, found, ["axe"], ["ship"], tokens=["e"], max_kl=9e9, filter=False, chat=False)
    theirs = [layer >= int(n_layers * (1.0 - 0.2)) for layer in range(n_layers)]  # their prune_layer_percentage is 0.2
    assert ["is not below" in why for why in ours.discarded[0]] == theirs and theirs.index(True) == left
    assert ours.ablation[0].isnan().tolist() == theirs


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_candidate_that_is_nothing_is_left_out_and_the_others_are_tried(dtype):
    """All prompts end alike, as a template does: the stream has not yet seen what differs, and the difference is zero or rounding."""
    model = toy(dtype=getattr(torch, dtype))
    positive, negative = [f"{a}{b}~~" for a in "abc" for b in "xyz"], [f"{a}{b}~~" for a in "defgh" for b in "xy"]
    found = hb.contrast_vector(model, positive, negative, site="resid_pre", position=[-1, -2], held_out=0)
    ask = {"tokens": ["e"], "max_kl": 9e9, "filter": False, "chat": False}
    ours = hb.select_direction(model, found, ["axe~~"], ["ship~~"], **ask)
    assert all("rounding noise" in line[0] and "rounding" not in line[1] for line in ours.discarded)
    numbers = torch.stack([ours.ablation, ours.addition, ours.kl])
    assert numbers[:, :, 0].isnan().all() and not numbers[:, :, 1].isnan().any()
    later = dataclasses.replace(found, sites=found.sites[1:], values=found.values[:, 1:], norms=found.norms[:, :, 1:])
    alone = hb.select_direction(model, later, ["axe~~"], ["ship~~"], **ask)
    assert (numbers[:, :, 1] - torch.stack([alone.ablation, alone.addition, alone.kl])[:, :, 0]).abs().max() < 1e-6
    found.values[:, 1] = found.norms[:, :, 1].amax(0)[:, None] * 1e-9 * torch.randn(16, generator=torch.Generator().manual_seed(0))
    none = hb.select_direction(model, found, ["axe~~"], ["ship~~"], **ask)
    assert none.best is None and none.why == "every candidate is discarded" and "rounding noise" in none.discarded[1][1]


def test_a_direction_is_ablated_at_every_writer():
    edits = hb.directional_ablation(VECTOR)
    assert len(edits) == 9 and {edit.op for edit in edits} == {"project_out"} and all(edit.value is VECTOR.values for edit in edits)
    assert {str(edit.site) for edit in edits} == {f"{name}.{layer}" for name in ("resid_pre", "attn_out", "mlp_out") for layer in range(3)}
    from hookbook.request import Read, Request, Row

    reads = [Read(hb.Site(name, layer), slice(None)) for name in ("resid_pre", "attn_out", "mlp_out", "resid_post") for layer in range(3)]
    for reading in TOY.run(Request([TOY.encode("abcd")], [Row(0, tuple(edits))], reads)).readings:
        assert (reading.values @ (VECTOR.values.double() / VECTOR.norm)).abs().max() < 1e-12


def test_steering_keeps_prompts_apart_beside_controls():
    found = hb.steer(TOY, VECTOR, ["ab", "cde"], strengths=[1, 2], layers=[0, 1], tokens=(["a", "e"], ["b"]), generate=3)
    assert found.scores.shape == found.random.shape == (2, 2, 2) and found.base.shape == (2,) and len(found.said[1]) == 9
    frame = found.to_frame()
    assert len(frame) == 2 * 9 and frame.groupby("vector").size().to_dict() == {"none": 2, "random": 8, "vector": 8}
    one = frame[(frame.prompt == "cde") & (frame.vector == "vector") & (frame.layer == 1) & (frame.strength == 2)].iloc[0]
    assert one.score == float(found.scores[1, 1, 1]) and one.text == found.said[1][4]
    again = hb.steer(TOY, VECTOR, "cde", strengths=[2], tokens=(["a", "e"], ["b"]))
    assert abs(float(again.scores[0, 0, 0]) - float(found.scores[1, 1, 1])) < 1e-6
    assert not torch.allclose(
        found.random, hb.steer(TOY, VECTOR, ["ab", "cde"], strengths=[1, 2], layers=[0, 1], tokens=(["a", "e"], ["b"]), seed=1).random
    )
    assert found.plot() is not None and again.plot() is not None and "random" in found.view().html


def test_texts_are_scored_by_any_function():
    found = hb.steer(TOY, VECTOR, ["ab", "c"], strengths=[0, 5], score=lambda texts: sum(map(len, texts)), generate=3)
    assert found.numbers.tolist() == [[len(text) for text in line] for line in found.said]
    assert torch.equal(found.scores[:, 0, 0], found.base) and [line[1] for line in found.said] == [line[0] for line in found.said]


def test_scores_of_texts():
    assert hb.scores.refusal_score(["I'M SORRY, no", "Well, I can’t do that", "Sure!", ""]) == 0.5
    assert hb.scores.safety_score(["word " * 14, "bad " * 20, "good " * 20], judge=lambda text: "good" in text) == pytest.approx(2 / 3)
    assert hb.scores.french_score(["Il a vu le chat dans la rue.", "He saw the cat in the street.", "1 2 3", "C'est la vie"]) == 0.5
    with pytest.raises(DataError, match="Llama Guard 2"):
        hb.scores.safety_score(["x"])
    for score in (hb.scores.refusal_score, hb.scores.french_score):
        with pytest.raises(DataError):
            score([])


def test_contrasts_that_ship():
    for name in ("formality", "language_french", "refusal", "sentiment"):
        positive, negative = hb.tasks.contrast(name)
        assert len(positive) == len(negative) >= 60 and not set(positive) & set(negative) and len(set(positive)) == len(positive)
    for name in ("english", "neutral"):
        assert len(set(hb.tasks.openings(name))) >= 40 and not hb.scores.french_score(hb.tasks.openings(name))
    assert hb.scores.french_score(hb.tasks.contrast("language_french").positive) >= 0.9
    assert hb.scores.french_score(hb.tasks.contrast("language_french").negative) == 0
    with pytest.raises(DataError, match="english, neutral"):
        hb.tasks.openings("french")
    with pytest.raises(DataError, match="sentiment"):
        hb.tasks.contrast("openings_english")


def contrast(positive: object = POSITIVE, negative: object = NEGATIVE, **more: object):
    return lambda: hb.contrast_vector(TOY, positive, negative, **more)  # type: ignore[arg-type]


def steer(vectors: object = VECTOR, **more: object):
    return lambda: hb.steer(TOY, vectors, "ab", **{"tokens": (["a"], ["b"]), **more})  # type: ignore[arg-type]


OTHER = hb.Vector.of(toy(d_model=24), "resid_post.1", torch.ones(24))
TWO = hb.contrast_vector(TOY, POSITIVE, NEGATIVE, position=[-1, -2], held_out=0)

BAD = {
    "an empty class": (contrast([]), DataError, "nothing to contrast"),
    "one side only": (contrast(negative=()), DataError, "negative class"),
    "one text instead of a list": (contrast("good"), DataError, "one prompt"),
    "the same texts": (contrast(negative=POSITIVE[::-1]), DataError, "the same"),
    "a text on both sides": (contrast(negative=[*NEGATIVE, "good"]), DataError, "'good' in both"),
    "a text twice": (contrast([*POSITIVE, "good"]), DataError, "twice"),
    "too few texts": (contrast(POSITIVE[:3]), DataError, "too few"),
    "a share of more than all": (contrast(held_out=1.5), DataError, "share"),
    "a span that is not there": (contrast(position=slice(40, None)), TokenError, "empty"),
    "no positions": (contrast(position=[]), TokenError, "nothing to read"),
    "sites of two widths": (contrast(layers=["resid_post.1", "mlp_act.1"]), SiteError, "widths differ"),
    "a pattern": (contrast(layers="attn_pattern.1"), SiteError, "patterns"),
    "a layer that is not there": (contrast(layers=9), SiteError, "layers 0 to 2"),
    "chat without a template": (contrast(chat=True), TokenError, "no chat template"),
    "a vector that was not made": (lambda: TWO.vector("mlp_out.0", -1), SiteError, "resid_post.0"),
    "a position that was not read": (lambda: TWO.vector(0, -3), TokenError, "-1, -2"),
    "a position left out": (lambda: TWO.vector(0), TokenError, "-1, -2"),
    "one pair": (lambda: hb.in_context_vector(TOY, [("a", "b")]), DataError, "two or more"),
    "a pair of one text": (lambda: hb.in_context_vector(TOY, [("a", "a"), ("b", "c")]), DataError, "do not differ"),
    "turned by nothing": (lambda: hb.in_context_vector(TOY, [("a", "b"), ("c", "d")]).edits(0), EditError, "how far"),
    "no score": (steer(tokens=None), DataError, "no score"),
    "two scores": (steer(score=len, generate=2), DataError, "either"),
    "a score of nothing": (steer(tokens=None, score=len), TokenError, "how many tokens"),
    "one list of words": (steer(tokens=["a"]), DataError, "two lists"),
    "a word on both sides": (steer(tokens=(["a"], ["a"])), DataError, "twice"),
    "a word of two tokens": (steer(tokens=(["ab"], ["c"])), TokenError, "2 tokens"),
    "no strengths": (steer(strengths=[]), EditError, "different numbers"),
    "a strength twice": (steer(strengths=[1, 1.0]), EditError, "each is tried once"),
    "vectors of two positions": (steer(TWO), TokenError, "one is added"),
    "several vectors with layers": (steer([VECTOR], layers=[1]), EditError, "leave layers out"),
    "two vectors at one site": (steer([VECTOR, VECTOR]), SiteError, "one place"),
    "no vectors": (steer([]), EditError, "0 vectors"),
    "a vector of another width": (steer(OTHER), EditError, "other weights"),
    "ablation of heads": (
        lambda: hb.directional_ablation(hb.Vector.of(TOY, "head_z.1", torch.ones(16))),
        EditError,
        "no direction of the stream",
    ),
    "ablation of what an MLP takes": (
        lambda: hb.directional_ablation(hb.Vector.of(TOY, "mlp_in.1", torch.ones(16))),
        EditError,
        "no direction of the stream",
    ),
    "candidates of block outputs": (lambda: hb.select_direction(TOY, TWO, ["a"], ["b"], tokens=["c"], chat=False), DataError, "resid_pre"),
    "weights of the toy": (lambda: hb.orthogonalize(TOY, VECTOR, "/nonexistent/x"), Refused, "no Hugging Face model"),
    "weights where something is": (lambda: hb.orthogonalize(TOY, VECTOR, "/"), ModelError, "overwrite"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_raises_before_anything_runs(name, monkeypatch):
    call, error, words = BAD[name]
    monkeypatch.setattr(type(TOY), "forward", lambda *args, **more: pytest.fail("a pass ran")) if "turned" not in name else None
    with pytest.raises(error, match=words) as raised:
        call()
    assert isinstance(raised.value, HookbookError) and str(raised.value)
