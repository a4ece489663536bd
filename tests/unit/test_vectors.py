"""Vectors: arithmetic, what does not fit, files, and the way into other tools."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

import hookbook as hb
from hookbook.errors import EditError, ResultError, SiteError
from hookbook.testing import toy

TOY = toy()
A, B = torch.arange(16.0) - 5, torch.linspace(2, -3, 16)


def vector(values: torch.Tensor, site: str = "resid_post.1") -> hb.Vector:
    return hb.Vector.of(toy(), site, values, recipe="test", settings={"seed": 1})


@pytest.mark.parametrize(("mask", "rights"), [(0o022, 0o644), (0o077, 0o600)])
def test_a_file_has_the_rights_of_any_other(tmp_path, mask, rights):
    before = os.umask(mask)
    try:
        path = vector(A).save(tmp_path / "v.safetensors")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == rights


def test_arithmetic_is_that_of_the_numbers():
    a, b = vector(A), vector(B)
    for ours, want in ((a + b, A + B), (a - b, A - B), (3 * a, 3 * A), (a / 2, A / 2), (-a, -A), (a + b - a, B)):
        assert torch.allclose(ours.values, want) and ours.site == a.site and ours.card == a.card
    assert abs(a.cosine(b) - float(A @ B / A.norm() / B.norm())) < 1e-6 and abs(float(a.norm - A.norm())) < 1e-6
    left = a.project_out(b)
    assert abs(float(left.values @ B)) < 1e-4 and torch.allclose(left.values, A - (A @ B) / (B @ B) * B, atol=1e-5)
    assert (a + b).recipe == "(test + test)"


def test_what_does_not_fit_raises():
    a = vector(A)
    for other in (
        vector(A, "resid_pre.1"),
        vector(A, "resid_post.2"),
        replace(a, card=replace(a.card, model_id="another", weights=())),
        hb.Vector.of(toy(), "head_z.0.1", torch.ones(8)),
    ):
        with pytest.raises(SiteError, match="different spaces"):
            a + other
    with pytest.raises(EditError, match="width"):
        vector(torch.ones(5))
    with pytest.raises(EditError, match="NaN"):
        vector(A * float("nan"))
    with pytest.raises(TypeError):
        a + 3


def test_a_file_is_the_vector(tmp_path):
    a = vector(A)
    back = hb.Vector.load(a.save(tmp_path / "v.safetensors"))
    assert torch.equal(back.values, A) and (back.site, back.card, back.recipe, back.settings) == (a.site, a.card, a.recipe, a.settings)
    with pytest.raises(ResultError, match="is a Vector"):
        hb.Patchscope.load(tmp_path / "v.safetensors")


def test_an_edit_is_the_vector_in_a_run():
    from hookbook.request import Readout, Request, Row

    adapter = toy()
    tokens = adapter.encode("abc")
    a = vector(A)
    ours = adapter.run(Request([tokens], [Row(0, (a.edit("add", 2.0),))], (), Readout(logits=True)))
    want = adapter.run(Request([tokens], [Row(0, (hb.Edit("resid_post.1", 2 * A),))], (), Readout(logits=True)))
    assert torch.equal(ours.readout.logits, want.readout.logits)
    assert len(a.to_frame()) == 16 and a.plot() is not None and "resid_post.1" in a.view().html


def test_a_vector_of_another_model_is_refused_wherever_it_is_used(tmp_path):
    other = replace(TOY.card, model_id="somebody/another-toy", weights=())
    theirs = hb.Vector.load(replace(vector(A), card=other).save(tmp_path / "other.safetensors"))
    for use in (
        lambda: hb.generate(TOY, "ab", edits=[theirs.edit()]),
        lambda: hb.steer(TOY, theirs, "ab", tokens=(["a"], ["b"])),
        lambda: vector(A) + theirs,
    ):
        with pytest.raises(hb.HookbookError, match="another-toy"):
            use()
    mine = replace(theirs, card=replace(TOY.card, model_id="Publisher/Toy", backend="nnsight"))  # the same, by its full name
    assert hb.generate(TOY, "ab", edits=[mine.edit()], max_new_tokens=1).texts


def test_a_task_of_three_pairs_says_so():
    for call in (hb.task_vector, hb.function_vector, hb.compose):
        with pytest.raises(hb.errors.DataError, match="3 pairs of 'few'"):
            call(TOY, hb.Task((("a", "b"), ("c", "d"), ("e", "f")), "few"), **({"heads": 1} if call is hb.function_vector else {}))


def test_where_weights_are_not_seen_the_name_decides_whoever_published_it():
    """A package's model is kept under a name that ends with a part of its hash."""
    known = replace(toy().card, model_id="smollm2-135m-instruct-b179c9523d0e", weights=(("float32", "a"),))
    there = replace(known, model_id="HuggingFaceTB/SmolLM2-135M-Instruct", weights=(), remote=True)
    assert known.same_model(there) and there.same_model(known)
    for name in ("HuggingFaceTB/SmolLM2-360M-Instruct", "smollm2-135m", "mine/smollm2-135m-instruct-tuned"):
        assert not known.same_model(replace(there, model_id=name))
    assert not known.same_model(replace(known, weights=(("float32", "b"),)))
