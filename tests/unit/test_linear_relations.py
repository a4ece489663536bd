"""Linear relations on the toy: closed forms of the map, results as they are kept and drawn, plans, and bad input."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache
from typing import Any

import pytest
import torch

import hookbook as hb
from hookbook.recipes.relations.subjects import least_squares
from hookbook.relations import Relation
from hookbook.testing import toy
from tests.contract.test_linear_relations import BETAS, LAYERS, SEED, TRAIN, planted

TOY = toy(dtype=torch.float64)
WIDTH = TOY.card.d_model


@cache
def relation() -> Relation:
    return planted(TOY)


@cache
def found() -> hb.LinearRelation:
    return hb.linear_relation(TOY, relation(), layers=LAYERS, betas=BETAS, n_train=TRAIN, seed=SEED)


@cache
def edits() -> hb.RelationEdits:
    return hb.edit_relation(TOY, found(), ranks=[1, 5, 16], changes=3, n_unrelated=1)


def with_weight(weight: torch.Tensor) -> hb.LinearRelation:
    return replace(found(), weight=weight.expand(3, -1, -1))


def drawn(seed: int = 0) -> torch.Tensor:
    return torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# the map


def test_the_inverse_of_a_whole_map_undoes_it():
    one = with_weight(drawn() + 9 * torch.eye(WIDTH))
    assert (one.inverse(WIDTH) @ one.weight[0] - torch.eye(WIDTH)).abs().max() < 1e-12
    moved = torch.linspace(-1, 1, WIDTH, dtype=torch.float64)
    back, into = one.factors(WIDTH)
    assert ((one.weight[0] @ (into @ (back @ moved))) - moved).abs().max() < 1e-12


@pytest.mark.parametrize("rank", [1, 4, 15, 16])
def test_a_rank_keeps_the_largest_singular_values(rank):
    weight = drawn(1)
    one, values = with_weight(weight), torch.linalg.svdvals(weight)
    kept = one.affine(1, rank=rank).weight / one.beta[1]
    assert torch.linalg.matrix_rank(kept) == rank
    assert (kept - weight).norm() == pytest.approx(
        float(values[rank:].norm()), abs=1e-12
    )  # Eckart and Young: no matrix of this rank is nearer
    assert (one.inverse(rank) - torch.linalg.pinv(kept, rtol=1e-12)).abs().max() < 1e-11
    assert torch.equal(one.affine(1, rank=rank).bias, one.bias[1])


def test_what_the_map_loses_stays_lost():
    """Of a map of low rank, as float32 keeps it, the inverse is that of the rank; of no map it is zero."""
    thin = (drawn(2)[:, :3] @ drawn(3)[:3]).float()
    assert torch.allclose(with_weight(thin).inverse(3), torch.linalg.pinv(thin, rtol=1e-5), atol=1e-5)
    exact = torch.zeros(WIDTH, WIDTH).index_put((torch.arange(3), torch.arange(3)), torch.tensor([4.0, 2.0, 1.0]))
    assert torch.equal(with_weight(exact).inverse(WIDTH), torch.linalg.pinv(exact))
    assert not with_weight(0 * exact).inverse(WIDTH).any()


def test_without_beta_the_map_says_its_bias():
    none = hb.linear_relation(TOY, relation(), layers=LAYERS, betas=[0], n_train=TRAIN, seed=SEED)
    states = drawn()
    for k, site in enumerate(none.sites):
        assert torch.equal(none(states, site), none.bias[k].double().expand(WIDTH, -1))
    assert torch.equal(none.faithfulness, none.controls["bias"]) and torch.equal(none.faithfulness, none.controls["random"])


def test_of_equal_betas_the_smallest_is_chosen_in_whatever_order_they_are_given():
    some = hb.linear_relation(TOY, relation(), layers=LAYERS, betas=[2, 1, 0.5, 1], n_train=TRAIN, seed=SEED)
    assert some.betas == BETAS and torch.equal(some.chosen_by, found().chosen_by) and torch.equal(some.beta, found().beta)
    first = [next(b for b, value in zip(BETAS, line, strict=True) if value == max(line)) for line in some.chosen_by.tolist()]
    assert some.beta.tolist() == first


def test_the_map_takes_states_of_any_shape():
    states = torch.linspace(-2, 2, 2 * 3 * WIDTH).view(2, 3, WIDTH)
    one = found()
    said = one(states, 1)
    assert said.shape == states.shape and torch.allclose(said, one.beta[1] * states @ one.weight[1].T + one.bias[1], atol=1e-6)
    assert torch.equal(one(states), one(states, one.best))


def test_the_same_seed_draws_the_same():
    again = hb.linear_relation(
        TOY,
        Relation(relation().pairs[::-1], "planted", templates=relation().templates, answer="{}"),
        layers=LAYERS,
        betas=BETAS,
        n_train=TRAIN,
        seed=SEED,
    )
    assert_same(again, found())
    other = hb.linear_relation(TOY, relation(), layers=[0], betas=BETAS, n_train=3, queries=5, seed=4)
    assert other.train != found().train and len(other.train) == 3 and len(other.validation) == len(other.test) == 5


# least squares


def test_least_squares_is_ridge_regression():
    draw = torch.Generator().manual_seed(0)
    x, y, new = (torch.randn(n, 4, generator=draw, dtype=torch.float64) for n in (9, 9, 3))
    for ridge in (0.01, 3.0):
        centred = x - x.mean(0)
        penalty = ridge * centred.pow(2).sum(1).mean()
        weight = torch.linalg.solve(centred.T @ centred + penalty * torch.eye(4, dtype=torch.float64), centred.T @ (y - y.mean(0)))
        assert (least_squares(x, y, new, ridge) - ((new - x.mean(0)) @ weight + y.mean(0))).abs().max() < 1e-12
    exact = hb.Affine.fit(x, y)
    site = hb.Site("resid_post", 0)
    assert (least_squares(x, y, new, 0) - exact(new, site, site)).abs().max() < 1e-12
    assert torch.equal(least_squares(x[:1], y[:1], new, 0.01), y[:1].expand(3, -1)), "one point has one value"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_precision(dtype):
    """What has no kernel in half precision is computed in float32."""
    adapter = toy(dtype=dtype)
    one = hb.linear_relation(adapter, planted(adapter), layers=["embed", *LAYERS], betas=BETAS, n_train=TRAIN, seed=SEED)
    assert one.weight.dtype == one.bias.dtype == torch.float32 and one.weight[2].any()
    assert hb.edit_relation(adapter, one, ranks=[1, 5], changes=2, n_unrelated=1).said.shape == (4, 4, 2)
    assert hb.attribute_lens(adapter, one, "abc").token_ids.shape == (1, 4, 5)
    assert hb.change_answer(adapter, one, "new", one.train[0][1], rank=2).control_texts[0]


# results


def assert_same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    for field in fields(a):
        one, other = getattr(a, field.name), getattr(b, field.name)
        if isinstance(one, dict) and field.name == "controls":
            assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        elif isinstance(one, torch.Tensor):
            assert one.dtype == other.dtype and torch.equal(one, other), field.name
        else:
            assert one == other, field.name


def test_results_are_saved_and_loaded(tmp_path):
    one, other = found(), edits()
    again = hb.LinearRelation.load(one.save(tmp_path / "relation"))
    assert_same(again, one)
    assert_same(hb.RelationEdits.load(other.save(tmp_path / "edits")), other)
    assert_same(hb.edit_relation(TOY, again, ranks=[1, 5, 16], changes=3, n_unrelated=1), other)
    assert one.weight.dtype == torch.float32 and one.weight.shape == (3, WIDTH, WIDTH)


def test_the_best_layer_is_the_first_that_validation_prefers():
    one = replace(
        found(), chosen_by=torch.tensor([[0.1, 0.2, 0.3], [0.6, 0.1, 0.1], [0.1, 0.1, 0.6]]), faithfulness=torch.tensor([1.0, 0.2, 0.9])
    )
    assert one.best_index == 1 and one.best == one.sites[1] and one.place() == 1
    assert one.place(-1) == 2 and one.place("resid_pre.0") == 0 and one.place(one.sites[1]) == 1
    frame = one.to_frame()
    assert frame.validation.tolist() == pytest.approx([0.3, 0.6, 0.6]) and [*zip(frame.site, frame.layer, strict=True)] == [
        ("resid_pre", 0),
        ("resid_post", 1),
        ("resid_post", 2),
    ]
    assert "<td class=number>0.6</td>" in one.view().html


def planned(said: list[list[list[int]]]) -> hb.RelationEdits:
    """Edits of two changes of validation and one of test, whose wanted tokens are 7, 8 and 9."""
    changes = (("a", "b", "c", "d"), ("e", "f", "g", "h"), ("i", "j", "k", "l"))
    sites = (hb.Site("resid_post", 0), hb.Site("resid_post", 1))
    half = torch.tensor([[0.5, 0.25], [0.125, 0.75]])
    return hb.RelationEdits(
        TOY.card,
        "planned",
        changes,
        2,
        sites,
        (1, 4),
        torch.tensor(said),
        torch.tensor([7, 8, 9]),
        {1: "x", 7: "d", 8: "h", 9: "l"},
        half,
        half[0],
        half + 1,
        half + 2,
        {},
    )


def test_the_best_edit_is_chosen_by_validation_alone():
    one = planned([[[1, 7], [1, 7]], [[1, 1], [1, 8]], [[9, 9], [9, 1]]])
    assert one.validation.tolist() == [[0, 0.5], [0, 1]] and one.success.tolist() == [[1, 1], [1, 0]]
    assert one.best_index == (1, 1) and one.best == (hb.Site("resid_post", 1), 4)
    other = planned([[[1, 7], [1, 7]], [[1, 1], [1, 8]], [[1, 1], [1, 1]]])
    assert other.best_index == (1, 1) and not other.success.any()
    assert planned([[[7, 7], [7, 7]], [[8, 8], [8, 8]], [[1, 1], [1, 9]]]).best_index == (0, 0), "of several the first"
    frame = one.said_frame()
    assert (
        frame.said.tolist() == ["d", "h", "x"]
        and frame.right.tolist() == [True, True, False]
        and frame.split.tolist() == ["validation"] * 2 + ["test"]
    )
    assert frame.wanted.tolist() == ["d", "h", "l"] and frame.object.tolist() == ["b", "f", "j"]
    row = one.to_frame().iloc[3]
    assert (row.site, row.layer, row.matrix_rank, row.validation, row.success) == ("resid_post", 1, 4, 1, 0)
    assert (row["control random"], row.kl, row.random_kl, row["control substituted"]) == (0.75, 1.75, 2.75, 0.25)
    assert "said" in one.view().html


@pytest.fixture
def curves():
    """What is drawn, by name, and the labels of the places."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def read(ax: Any) -> dict[str, list[float]]:
        assert ax.get_xlabel() and ax.get_ylabel()
        return {line.get_label(): [float(y) for y in line.get_ydata()] for line in ax.lines} | {
            "": [label.get_text() for label in ax.get_xticklabels()]
        }

    yield read
    plt.close("all")


def test_plots_of_a_relation(curves):
    one = found()
    whole = curves(one.plot())
    assert whole.pop("") == ["resid_pre.0", "resid_post.1", "resid_post.2"]
    assert whole == {"linear relation": one.faithfulness.tolist()} | {name: values.tolist() for name, values in one.controls.items()}
    chosen = replace(one, chosen_by=torch.tensor([[0.25, 0.25, 0.5], [0, 0, 0], [0.25, 0.75, 0.5]]))
    betas = curves(chosen.plot_betas())
    assert betas.pop("") == ["0.5", "1", "2"]
    assert list(betas) == ["layer resid_post.2", "layer resid_pre.0", "layer resid_post.1"] and betas["layer resid_post.2"] == [
        0.25,
        0.75,
        0.5,
    ]
    weight = torch.zeros(3, WIDTH, WIDTH)
    weight[1] = torch.diag(torch.arange(WIDTH, 0, -1).float())
    spectrum = curves(replace(one, weight=weight, chosen_by=torch.tensor([[0.0], [1.0], [0.5]])).plot_spectrum())
    assert spectrum["singular value"] == pytest.approx([n / WIDTH for n in range(WIDTH, 0, -1)])


def test_plots_of_edits(curves):
    one = planned([[[1, 7], [1, 7]], [[1, 1], [1, 8]], [[9, 9], [9, 1]]])
    layers = {"edit, rank 4": [1, 0], "random": [0.25, 0.75], "the other's state": [0.5, 0.25], "": ["0", "1"]}
    assert curves(one.plot()) == layers
    assert curves(one.plot_ranks()) == {"edit, layer 1": [1, 0], "random": [0.125, 0.75], "": ["1", "4"]}
    assert curves(one.plot_divergence()) == {"edit, rank 4": [1.25, 1.75], "random": [2.25, 2.75], "": ["0", "1"]}
