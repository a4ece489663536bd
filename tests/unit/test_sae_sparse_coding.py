"""How much few directions explain, beside naive pursuits, least squares and planted sums."""

from __future__ import annotations

import pytest
import torch

import hookbook as hb
from hookbook.controls import noise
from hookbook.errors import DataError, HookbookError, ModelError, TokenError
from hookbook.recipes.features.decomposition import pursue
from hookbook.recipes.features.sparse_coding import _shares, pursued
from hookbook.testing import toy
from tests.contract.test_sae import N, make_sae

TEXTS = ["a prompt", "another, longer", "and one more", "x y", "the last"]


def states_of(model, texts):
    """Of every token but the first."""
    found = []
    for text in texts:
        asked = hb.request.Request([model.encode(text)], [hb.request.Row(0)], [hb.request.Read("resid_post.1", slice(1, None))])
        found.append(model.run(asked).readings[0].values)
    return torch.cat(found)


def naive(rows, states, k):
    """One state after the other, refitted by least squares."""
    shares = []
    for x in states:
        chosen, values = pursue(rows, x, k, nonnegative=False)
        shares.append(1 - (x - values @ rows[chosen]).square().sum() / x.square().sum())
    return torch.stack(shares).mean()


def test_shares_are_those_of_a_pursuit_of_each_state():
    model = toy()
    raw = make_sae(model)
    found = hb.sparse_coding(hb.sae.attach(model, raw), TEXTS, ks=[1, 3, 6], states=1000)
    fit, x = states_of(model, TEXTS[::2]), states_of(model, TEXTS[1::2])
    assert (found.n_fit, found.n_states) == (len(fit), len(x))
    x, centred = x - fit.mean(0), fit - fit.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    axes = vectors.T[values.argsort(descending=True)]
    random = noise(N, 16, seed=0).double()
    for at, k in enumerate(found.ks):
        assert abs(found.explained[at] - naive(raw.W_dec.detach(), x, k)) < 1e-6
        assert abs(found.random[at] - naive(random, x, k)) < 1e-6
        assert abs(found.principal_axes[at] - naive(axes, x, k)) < 1e-6
        first = x - x @ axes[:k].T @ axes[:k]
        assert abs(found.principal_components[at] - (1 - first.square().sum(-1) / x.square().sum(-1)).mean()) < 1e-6
    frame = found.to_frame()
    assert frame.columns.tolist() == ["directions", "k", "explained"] and len(frame) == 12
    row = frame[(frame.directions == "random directions") & (frame.k == 3)]
    assert float(row.explained.iloc[0]) == pytest.approx(float(found.random[1]))


def test_planted_sums_are_explained_by_as_many_features_as_they_have():
    """States that are sums of three of 60 directions: three features explain all; three random ones or axes do not."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(60, 40, generator=generator, dtype=torch.float64), dim=-1)
    chosen = torch.stack([torch.randperm(60, generator=generator)[:3] for _ in range(100)])
    states = (rows[chosen] * torch.tensor([3.0, 2.0, 1.0])[:, None]).sum(1)
    own, other = pursued(rows, states, 40), pursued(noise(60, 40, seed=1), states, 40)
    assert (own[:, 2] > 1 - 1e-9).double().mean() > 0.8 and own[:, 2].mean() > 0.98 and other[:, 2].mean() < 0.6
    assert (own.diff(dim=-1) > -1e-12).all() and (own[:, -1] - 1).abs().max() < 1e-9  # as many as numbers: everything
    parallel = torch.cat([rows[:2], rows[:1] + 1e-9 * rows[1:2], torch.zeros(1, 40)])
    found = pursued(parallel.double(), states, 4)
    assert found.isfinite().all() and (found[:, -1] <= 1 + 1e-9).all()


def test_fewer_states_are_drawn_with_the_seed():
    sae = hb.sae.attach(toy(), make_sae(toy()))
    one, same, other = (hb.sparse_coding(sae, TEXTS, ks=[2], states=5, seed=seed) for seed in (0, 0, 1))
    assert one.n_states == 5 and torch.equal(one.explained, same.explained) and not torch.equal(one.explained, other.explained)


@pytest.mark.parametrize(
    ("error", "said", "change"),
    [
        (DataError, "from 1 to 16", {"ks": [17]}),
        (DataError, "ascend", {"ks": [2, 1]}),
        (DataError, "ascend", {"ks": []}),
        (TokenError, "ks=0", {"ks": [0]}),
        (TokenError, "states=0", {"states": 0}),
        (TokenError, "seed=-1", {"seed": -1}),
        (DataError, "one text", {"texts": "abc"}),
        (TokenError, "special", {"texts": ["abc", [0]]}),
        (ModelError, "attach", {"sae": make_sae(toy())}),
    ],
)
def test_bad_input_is_refused_before_any_work(error, said, change, monkeypatch):
    model = toy()
    asked = {"sae": hb.sae.attach(model, make_sae(model)), "texts": TEXTS, "ks": [1, 2]} | change
    monkeypatch.setattr(type(model), "forward", lambda *args, **more: pytest.fail("the model ran"))
    with pytest.raises(error, match=said) as found:
        hb.sparse_coding(asked.pop("sae"), asked.pop("texts"), **asked)
    assert isinstance(found.value, HookbookError)


def test_axes_that_few_states_do_not_have_explain_nothing():
    """Three states have two axes: whatever a solver gives as the third is no axis, and the shares stay where they are."""
    draw = torch.Generator().manual_seed(0)
    reading = torch.randn(6, 16, generator=draw)
    first, rows = torch.tensor([True] * 3 + [False] * 3), torch.randn(20, 16, generator=draw)
    shares = _shares(reading, first, torch.tensor([3, 4, 5]), rows, rows, 5)
    fit = reading[:3].double() - reading[:3].double().mean(0)
    left = reading[3:].double() - reading[:3].double().mean(0)
    inside = left @ torch.linalg.pinv(fit) @ fit
    want = (inside.square().sum(-1) / left.square().sum(-1)).mean()
    for line in shares[2:]:
        assert torch.allclose(line[1:], want.expand(4)) and line[0] < want
