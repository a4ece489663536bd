"""Vectors as features: planted sums of decoder rows, non-negative least squares beside scipy's, arithmetic, files and bad input."""

from __future__ import annotations

import pytest
import torch
from pandas.testing import assert_frame_equal
from scipy.optimize import nnls as scipy_nnls

import hookbook as hb
from hookbook.errors import DataError, EditError, ModelError, Refused, SiteError, TokenError
from hookbook.recipes.features.decomposition import ENOUGH, nnls, pursue
from hookbook.testing import toy
from tests.contract.test_sae import make_sae

TOY = toy(dtype=torch.float64)
SITE = hb.Site("resid_post", 1)
WIDTH, WIDE = TOY.card.d_model, 200


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sized(**more):
    """A random SAE whose rows have many lengths."""
    sae = make_sae(TOY, **more)
    with torch.no_grad():
        sae.W_dec *= torch.linspace(0.2, 5, len(sae.W_dec), dtype=torch.float64)[:, None]
    return sae


def vector(values: torch.Tensor, **more) -> hb.Vector:
    return hb.Vector(TOY.card, SITE, values, **more)


# the pursuit


@pytest.mark.parametrize("signs", [(1, 1, 1), (1, -1, 1)])
def test_a_sum_of_three_rows_is_recovered(signs):
    rows = draw(500, WIDE) * torch.linspace(0.1, 9, 500, dtype=torch.float64)[:, None]
    at, coefficients = [17, 480, 256], torch.tensor([60.0, 2.0, 4.0], dtype=torch.float64) * torch.tensor(signs)
    chosen, values = pursue(rows, coefficients @ rows[at], 20, nonnegative=False)
    found = dict(zip(chosen.tolist(), values.tolist(), strict=True))
    assert found == pytest.approx(dict(zip(at, coefficients.tolist(), strict=True)), abs=1e-10)
    chosen, values = pursue(rows, coefficients @ rows[at], 20, nonnegative=True)
    assert (values >= 0).all()
    if min(signs) > 0:
        assert dict(zip(chosen.tolist(), values.tolist(), strict=True)) == pytest.approx(found, abs=1e-10)
    else:
        assert values[chosen == 480].sum() == 0 and len(chosen) == 20


def test_a_pursuit_is_a_loop_of_least_squares():
    """By numpy; the row most along the residual for its length, then all coefficients again."""
    import numpy as np

    rows, target = draw(60, 30) * torch.rand(60, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), draw(30, seed=2)
    unit = (rows / rows.norm(dim=1, keepdim=True)).numpy()
    for nonnegative in (False, True):
        chosen, left = [], target.numpy()
        for _ in range(8):
            along = unit @ left if nonnegative else np.abs(unit @ left)
            along[chosen] = -np.inf
            chosen.append(int(along.argmax()))
            part = rows[chosen].numpy().T
            want = scipy_nnls(part, target.numpy())[0] if nonnegative else np.linalg.lstsq(part, target.numpy(), rcond=None)[0]
            left = target.numpy() - part @ want
        found, values = pursue(rows, target, 8, nonnegative)
        assert found.tolist() == chosen and values.numpy() == pytest.approx(want, abs=1e-10)


def test_a_pursuit_ends_when_nothing_is_left_or_nothing_points_along():
    rows = torch.eye(6, dtype=torch.float64)
    target = torch.tensor([3.0, 2, 1, 0, 0, -2], dtype=torch.float64)
    assert pursue(rows, target, 9, nonnegative=True)[0].tolist() == [0, 1, 2]
    assert pursue(rows, target, 2, nonnegative=True)[0].tolist() == [0, 1]
    assert sorted(pursue(rows, target, 9, nonnegative=False)[0].tolist()) == [0, 1, 2, 5]
    small = torch.tensor([1.0, 0.99 * ENOUGH**0.5, 0, 0, 0, 0], dtype=torch.float64)
    assert pursue(rows, small, 9, nonnegative=True)[0].tolist() == [0]
    assert pursue(rows, small * torch.tensor([1, 1.02, 1, 1, 1, 1]), 9, nonnegative=True)[0].tolist() == [0, 1]
    dead = torch.cat([torch.zeros(1, 6, dtype=torch.float64), rows])
    assert pursue(dead, target, 9, nonnegative=True)[0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("shape", [(1, 5), (5, 5), (20, 40), (40, 20), (60, 10)])
@pytest.mark.parametrize("seed", range(5))
def test_non_negative_least_squares_are_scipy_s(shape, seed):
    rows, target = draw(*shape, seed=seed), draw(shape[1], seed=100 + seed)
    if seed > 2:  # alike rows, of which many leave again
        rows = rows + 2 * draw(shape[1], seed=50)
    ours, theirs = nnls(rows, target), torch.from_numpy(scipy_nnls(rows.T.numpy(), target.numpy())[0])
    assert (ours >= 0).all() and (ours - theirs).abs().max() < 1e-10
    gain = rows @ (target - ours @ rows)
    assert (gain < 1e-10).all() and (gain * ours).abs().max() < 1e-10  # of Karush, Kuhn and Tucker


def test_non_negative_least_squares_of_the_same_row_twice_and_of_nothing_along():
    row = draw(1, 7)
    assert float(nnls(torch.cat([row, row]), 3 * row[0]).sum()) == pytest.approx(3, abs=1e-12)
    assert nnls(torch.cat([row, row]), -row[0]).tolist() == [0, 0]


# vectors


def test_shares_of_a_pursuit_sum_to_what_is_explained():
    for nonnegative in (False, True):
        found = vector(draw(WIDTH, seed=3)).decompose(sized(), k=5, nonnegative=nonnegative)
        frame = found.to_frame()
        assert 0.2 < float(found.explained) < 1 - 1e-3 and frame.share.sum() == pytest.approx(float(found.explained), abs=1e-12)
        assert frame.coefficient.abs().is_monotonic_decreasing and (frame.coefficient.min() < 0) is not nonnegative
        assert (found.rows @ found.residual).abs().max() < 1e-10


def test_values_are_times_rows_of_the_decoder():
    sae = sized()
    v = vector(draw(WIDTH, seed=4), recipe="mine")
    found = v.decompose(hb.sae.attach(TOY, sae, labels={i: f"about {i}" for i in range(0, 24, 2)}), k=4)
    rows = sae.W_dec.detach()[found.features]
    assert torch.equal(found.rows, rows) and (found.fit - found.values @ rows).abs().max() < 1e-12
    assert (found.to_vector().values - found.fit).abs().max() < 1e-6 and found.to_vector().site == SITE
    assert float(found.residual_norm) == pytest.approx(float((v.values - found.values @ rows).norm()))
    frame = found.to_frame()
    assert frame.label.tolist() == [f"about {i}" if i % 2 == 0 else "" for i in found.features.tolist()]
    assert frame.cosine.tolist() == pytest.approx([float(row @ v.values / row.norm() / v.values.norm()) for row in rows])
    assert frame.share.tolist() == pytest.approx(
        [float(x * (row @ v.values) / v.values.norm() ** 2) for x, row in zip(found.values, rows, strict=True)]
    )
    assert found.recipe == "mine" and found.settings == {"k": 4, "nonnegative": True}


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk", "gated"])
def test_an_encoded_state_is_decoded_activations_and_an_error(architecture):
    sae = sized(architecture=architecture)
    v = vector(3 * draw(WIDTH, seed=5))
    found = v.decompose(sae, method="encode", k=1)
    acts = sae.encode(v.values[None])[0]
    assert 1 < len(found.features) == int((acts > 0).sum()) and torch.equal(found.values, acts[found.features])
    assert (found.fit - sae.decode(acts[None])[0]).abs().max() < 1e-12 and found.residual_norm > 0.1
    assert (found.fit + found.residual - v.values).abs().max() < 1e-12


def test_a_decoder_that_makes_rows_of_unit_length():
    sae = sized(architecture="topk", rescale_acts_by_decoder_norm=True)
    v = vector(3 * draw(WIDTH, seed=6))
    found = v.decompose(sae, method="encode")
    assert (found.fit - sae.decode(sae.encode(v.values[None]))[0]).abs().max() < 1e-12
    assert (v.decompose(sae, k=4).rows.norm(dim=1) - 1).abs().max() < 1e-12


# arithmetic


def test_arithmetic_in_feature_space_is_that_of_fits():
    sae = sized()
    a, b = vector(draw(WIDTH, seed=7)), vector(draw(WIDTH, seed=8))
    for method in ("pursuit", "encode"):
        x, y = a.decompose(sae, method=method, k=4), b.decompose(sae, method=method, k=4)
        assert {*x.features.tolist()} != {*y.features.tolist()} and {*x.features.tolist()} & {*y.features.tolist()}
        for ours, vectors in ((x + y, (1, 1)), (x - y, (1, -1)), (2 * x - y / 4, (2, -0.25)), (-x, (-1, 0))):
            assert (ours.fit - (vectors[0] * x.fit + vectors[1] * y.fit)).abs().max() < 1e-12
            assert (ours.vector - (vectors[0] * a.values + vectors[1] * b.values)).abs().max() < 1e-12
            assert (ours.to_vector().values - ours.fit).abs().max() < 1e-5
            assert ours.values.abs().diff().max() <= 0 and torch.equal(ours.rows, sae.W_dec.detach()[ours.features])
            assert {*ours.features.tolist()} <= {*x.features.tolist()} | {*y.features.tolist()}
        assert not (x - x).fit.any() and len((x - x).features) == 0
        dense = torch.zeros(2, 24, dtype=torch.float64)
        dense[0, x.features], dense[1, y.features] = x.values, y.values
        assert x.cosine(y) == pytest.approx(float(torch.cosine_similarity(*dense, 0)), abs=1e-12) and x.cosine(3 * x) == pytest.approx(1)
    assert (
        (a + b).values - (a.decompose(sae, k=24, nonnegative=False) + b.decompose(sae, k=24, nonnegative=False)).to_vector().values
    ).abs().max() < 1e-2
    assert (x + a.decompose(sae)).method == "encode and pursuit"


# results


def test_a_result_goes_through_a_file_and_is_drawn(tmp_path, plt):
    sae = make_sae(TOY)
    sae.cfg.metadata.neuronpedia_id = "gpt2-small/1-res"
    found = vector(draw(WIDTH, seed=9), recipe="mine").decompose(
        hb.sae.attach(TOY, sae, labels={i: "<b>" for i in range(24)}), k=6, nonnegative=False
    )
    again = hb.FeatureVector.load(found.save(tmp_path / "x.safetensors"))
    assert all(torch.equal(getattr(again, name), getattr(found, name)) for name in ("features", "values", "rows", "vector", "offset"))
    assert again.card == found.card and again.links == found.links
    assert_frame_equal(again.to_frame(), found.to_frame(), rtol=1e-12)  # a product's last bit depends on where its numbers lie in memory
    axes = found.plot(n=5)
    assert [bar.get_width() for bar in axes.patches] == found.values[:5].tolist()
    assert axes.get_yticklabels()[0].get_text() == f"{int(found.features[0])} <b>"
    html = found.view().html
    assert f'href="https://www.neuronpedia.org/gpt2-small/1-res/{int(found.features[0])}"' in html and "<b>" not in html
    assert (found - found).plot() is not None


def transcoder():
    return make_sae(
        TOY,
        "transcoder",
        d_out=WIDTH,
        apply_b_dec_to_input=False,
        metadata={"hook_name": "blocks.1.hook_resid_pre", "hook_name_out": "blocks.1.hook_mlp_out"},
    )


def test_a_transcoder_s_rows_are_of_its_output():
    v = hb.Vector(TOY.card, hb.Site("mlp_out", 1), draw(WIDTH))
    for sae in (transcoder(), hb.sae.attach(TOY, transcoder(), same_model=True)):
        found = v.decompose(sae, k=3)
        assert torch.equal(found.rows, transcoder().W_dec.detach()[found.features])
        with pytest.raises(Refused, match="transcoder"):
            v.decompose(sae, method="encode")
        with pytest.raises(SiteError, match="different spaces"):
            vector(draw(WIDTH)).decompose(sae)


BAD = {
    "no such method": (lambda v: v.decompose(make_sae(TOY), method="omp"), DataError, "use pursuit"),
    "no features": (lambda v: v.decompose(make_sae(TOY), k=0), TokenError, "1 or more"),
    "another site": (lambda v: v.decompose(make_sae(TOY, layer=2)), SiteError, "different spaces"),
    "another site, attached": (lambda v: v.decompose(hb.sae.attach(TOY, make_sae(TOY, layer=2))), SiteError, "different spaces"),
    "no SAE": (lambda v: v.decompose(torch.zeros(3)), ModelError, "SAEs are SAELens'"),
    "the zero vector": (lambda v: (v - v).decompose(make_sae(TOY)), EditError, "zero vector"),
    "states of one size": (
        lambda v: v.decompose(make_sae(TOY, normalize_activations="layer_norm"), method="encode"),
        Refused,
        "cannot be added up",
    ),
    "states of one length": (
        lambda v: v.decompose(make_sae(TOY, normalize_activations="constant_norm_rescale"), method="encode"),
        Refused,
        "use pursuit",
    ),
    "two SAEs": (lambda v: v.decompose(make_sae(TOY)) + v.decompose(make_sae(TOY, seed=1)), SiteError, "one SAE"),
    "cosine with two SAEs": (lambda v: v.decompose(make_sae(TOY)).cosine(v.decompose(make_sae(TOY, seed=1))), SiteError, "one SAE"),
    "cosine with a vector": (lambda v: v.decompose(make_sae(TOY)).cosine(v), EditError, "feature space"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_says_what_to_do(name):
    call, error, said = BAD[name]
    with pytest.raises(error, match=said):
        call(vector(3 * draw(WIDTH)))


def test_another_model_is_refused():
    other = hb.Vector(toy(d_model=24, dtype=torch.float64).card, SITE, draw(24))
    with pytest.raises((SiteError, ModelError)):
        other.decompose(make_sae(TOY))
    elsewhere = hb.Vector(hb.ModelCard(**{**TOY.card.to_dict(), "model_id": "another", "weights": ()}), SITE, draw(WIDTH))
    with pytest.raises(SiteError, match="different spaces"):
        elsewhere.decompose(hb.sae.attach(TOY, make_sae(TOY)))
    with pytest.raises(ModelError, match="another"):
        elsewhere.decompose(make_sae(TOY))
    with pytest.raises(TypeError):
        vector(draw(WIDTH)).decompose(make_sae(TOY)) + 1
