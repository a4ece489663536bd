"""Patchscopes of features, and features of relations: planted answers, files, pictures, plans and bad input."""

from __future__ import annotations

from dataclasses import fields
from functools import cache

import pytest
import torch

import hookbook as hb
from hookbook.errors import DataError, EditError, ModelError, Refused, SiteError, TokenError
from hookbook.testing import toy
from tests.contract.test_linear_relations import BETAS, LAYERS, SEED, TRAIN, planted
from tests.contract.test_sae import make_sae

TOY = toy(dtype=torch.float64)
LAST = hb.Site("resid_post", TOY.card.n_layers - 1)


@cache
def attached(**more) -> hb.sae.AttachedSAE:
    return hb.sae.attach(TOY, make_sae(TOY, **more), labels={3: "three", 5: "<i>five"})


@cache
def relation() -> hb.LinearRelation:
    return hb.linear_relation(TOY, planted(TOY), layers=LAYERS, betas=BETAS, n_train=TRAIN, seed=SEED)


def scope(sae=None, features=(3, 4), **more):
    return hb.feature_patchscope(sae or attached(), features, **{"target": "say x", "generate": 2, **more})


def parts(sae=None, subject=None, **more):
    pair = relation().test[0]
    return hb.relation_features(relation(), sae or attached(), subject or pair[0], **{"answer": pair[1], **more})


def same(ours, theirs):
    for field in fields(theirs):
        a, b = getattr(ours, field.name), getattr(theirs, field.name)
        assert torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b, field.name


# patchscopes of features


def test_a_direction_that_says_a_token_says_it_where_it_is_long():
    """At the last site the final norm reads the direction alone."""
    sae, token = make_sae(TOY, layer=LAST.layer), 42
    with torch.no_grad():
        sae.W_dec[3] = 0.01 * TOY.model.norm.weight * TOY.model.unembed.weight[token]
    found = hb.feature_patchscope(hb.sae.attach(TOY, sae), 3, target="abc", strengths=[-1, 1, 5], generate=1, tokens=[token])
    assert found.wanted_logprobs[0, 1] > max(found.random_wanted_logprobs[:, 0].max(), found.control_wanted_logprobs.max()) + 0.3
    assert found.wanted_logprobs[0, 0] < found.random_wanted_logprobs.min()
    assert abs(float(found.wanted_logprobs[0, 1] - found.wanted_logprobs[0, 2])) < 1e-4, "the norm sees no length"


def test_a_strength_of_nothing_added_is_the_control():
    found = scope(op="add", strengths=[0, 1], tokens=["a"])
    assert (
        torch.equal(found.token_ids[:, 0], found.control_ids.expand(2, -1))
        and (found.logprobs[:, 0] - found.control_logprobs).abs().max() < 1e-12
    )
    assert (found.wanted_logprobs[:, 1] - found.control_wanted_logprobs).abs().min() > 1e-6
    assert {line[0] for line in found.texts} == {*found.control_texts} == {found.random_texts[0]}


def test_a_patchscope_of_features_goes_through_a_file_and_is_drawn(tmp_path, plt):
    found = scope(features=[5, 3, 4], tokens=["a"], target_layers=[0, 1], strengths=[1, 2])
    same(hb.FeaturePatchscope.load(found.save(tmp_path / "x.safetensors")), found)
    frame = found.to_frame()
    assert len(frame) == 3 * 4 * 5 and frame.label.unique().tolist() == ["<i>five", "three", ""]
    line = frame[
        (frame.feature == 3) & (frame.site == "resid_post") & (frame.layer == 1) & (frame.strength == 2) & (frame["rank"] == 1)
    ].iloc[0]
    assert (line.token, line.logprob, line.text) == (found.token(1, 3, 1), float(found.logprobs[1, 3, 1]), found.texts[1][3])
    assert (line.random_token, line.random_text) == (found.vocab[int(found.random_ids[3, 1])], found.random_texts[3])
    assert (line.control_token, line.control_text) == (found.vocab[int(found.control_ids[1])], found.control_texts[0])
    assert line["logprob a"] == float(found.wanted_logprobs[1, 3, 0]) and line["random_logprob a"] == float(
        found.random_wanted_logprobs[3, 0]
    )
    for value, numbers in (
        ("probability", (found.logprobs[..., 0], found.random_logprobs[:, 0])),
        ("a", (found.wanted_logprobs[..., 0], found.random_wanted_logprobs[:, 0])),
    ):
        axes = found.plot(value=value)
        want = torch.cat([numbers[0], numbers[1][None]]).exp()
        assert (torch.from_numpy(axes.images[0].get_array().data) - want).abs().max() < 1e-12
        assert [label.get_text() for label in axes.get_yticklabels()] == ["5 <i>five", "3 three", "4", "random"]
    assert "resid_post.1 2" in found.view().html and "</i>" not in found.view().html
    assert "text" not in scope(generate=0).to_frame() and scope(generate=0).texts == ()


def test_a_transcoder_s_directions_go_where_it_writes():
    config = {"hook_name": "blocks.1.hook_resid_pre", "hook_name_out": "blocks.1.hook_mlp_out"}
    sae = make_sae(TOY, "transcoder", d_out=16, apply_b_dec_to_input=False, metadata=config)
    found = scope(hb.sae.attach(TOY, sae))
    assert {site for site, _ in found.pairs} == {hb.Site("mlp_out", 1)}
    assert {site for site, _ in scope(hb.sae.attach(TOY, sae), target_layers=0).pairs} == {hb.Site("mlp_out", 0)}


# features of a relation


def test_a_state_of_one_feature_is_answered_by_it():
    """Planted: an SAE whose rows are axes, a state of two of them."""
    sae = make_sae(TOY, "standard", apply_b_dec_to_input=False)
    with torch.no_grad():
        for name, value in sae.state_dict().items():
            value.zero_()
            if name.startswith("W"):
                value.view(value.shape).fill_diagonal_(1)
    state = torch.zeros(16, dtype=torch.float64).index_fill(0, torch.tensor([3, 7]), 2.0)
    found = parts(hb.sae.attach(TOY, sae), hb.Vector(TOY.card, hb.Site("resid_post", 1), state))
    assert {*found.features.tolist()} == {3, 7} and found.activations.tolist() == [2, 2]
    assert not found.decoder_bias and not found.error
    affine = relation().affine(1)
    logits = TOY.unembed(TOY.final_norm((affine.weight @ state.float() + affine.bias).double()[None]))[0].detach()
    first = {y: TOY.encode(y, bos=False).ids[0] for y in (found.answer, *found.against)}
    others = torch.stack([logits[first[y]] for y in found.against]).mean()
    assert float(found.contributions.sum() + found.bias + found.constant) == pytest.approx(
        float(logits[first[found.answer]] - others), abs=1e-5
    )
    frame = found.to_frame()
    assert (
        frame.contribution.sum() == pytest.approx(float(found.total), abs=1e-10)
        and frame.part.tolist()[:2] == ["feature"] * 2
        and len(frame) == 6
    )


def test_against_chooses_the_others():
    every, one = parts(), parts(against=["~"])
    assert one.against == ("~",) and len(every.against) > 1 and abs(float(every.total - one.total)) > 1e-3


def test_features_of_a_relation_go_through_a_file_and_are_drawn(tmp_path, plt):
    found = parts(k=2)
    same(hb.RelationFeatures.load(found.save(tmp_path / "x.safetensors")), found)
    axes = found.plot(n=2)
    widths = [bar.get_width() for bar in axes.patches]
    assert widths[:2] == found.contributions[:2].tolist() and sum(widths) == pytest.approx(float(found.total - found.constant), abs=1e-9)
    assert f"{float(found.total):.2f} logits" in found.view().html


# plans and bad input


def test_plans_run_nothing(monkeypatch):
    relation(), attached().name
    monkeypatch.setattr(TOY, "forward", None)
    plan = hb.feature_patchscope.plan(attached(), [3, 4], target="say x", generate=2)
    assert plan.passes > 0
    assert hb.relation_features.plan(relation(), attached(), relation().test[0][0], answer=relation().test[0][1]).passes > 0
    with pytest.raises(EditError, match="0 to 23"):
        hb.feature_patchscope.plan(attached(), [99])


def transcoder():
    config = {"hook_name": "blocks.1.hook_resid_post", "hook_name_out": "blocks.2.hook_mlp_out"}
    return hb.sae.attach(TOY, make_sae(TOY, "transcoder", d_out=16, apply_b_dec_to_input=False, metadata=config))


BAD = {
    "an SAE that is not attached": (lambda: scope(make_sae(TOY)), ModelError, "hb.sae.attach"),
    "no such feature": (lambda: scope(features=24), EditError, "0 to 23"),
    "no features": (lambda: scope(features=[]), EditError, "one or more"),
    "no strengths": (lambda: scope(strengths=[]), EditError, "different numbers"),
    "no such operation": (lambda: scope(op="scale"), EditError, "set or add"),
    "two targets": (lambda: scope(target=["a", "b"]), TokenError, "for each"),
    "a site of another width": (lambda: scope(target_layers="mlp_act.1"), SiteError, "16 wide"),
    "no such layer": (lambda: scope(target_layers=7), SiteError, "layers 0 to 2"),
    "tokens that are no list": (lambda: scope(tokens="a"), TokenError, "tokens=\\['a'\\]"),
    "nothing kept": (lambda: scope(k=0), TokenError, "1 or more"),
    "too long": (lambda: scope(generate=99), TokenError, "at most 64"),
    "relation: not attached": (lambda: parts(make_sae(TOY)), ModelError, "hb.sae.attach"),
    "relation: a layer without a map": (lambda: parts(attached(name="resid_pre")), SiteError, "it has resid_pre.0"),
    "relation: a transcoder": (lambda: parts(transcoder()), Refused, "use an SAE of resid_post.1"),
    "relation: states of one size": (lambda: parts(attached(normalize_activations="layer_norm")), Refused, "cannot be added up"),
    "relation: no others": (lambda: parts(against=[]), DataError, "against="),
    "relation: against itself": (lambda: parts(against=[relation().test[0][1], "~"]), DataError, "leave the other one out"),
    "relation: a state of elsewhere": (
        lambda: parts(subject=hb.Vector.of(TOY, "resid_post.0", torch.ones(16))),
        SiteError,
        "give a state there",
    ),
    "relation: nothing kept": (lambda: parts(k=0), TokenError, "1 or more"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_says_what_to_do(name, monkeypatch):
    relation(), attached()
    call, error, said = BAD[name]
    if "one size" not in name:  # which only its numbers tell
        monkeypatch.setattr(TOY, "forward", None)
    with pytest.raises(error, match=said):
        call()


def test_a_relation_of_another_model_or_a_remote_one_is_refused(monkeypatch):
    other = toy(d_model=24, dtype=torch.float64)
    monkeypatch.setattr(other, "card", hb.ModelCard(**{**other.card.to_dict(), "model_id": "another"}))
    with pytest.raises(EditError, match="another stream"):
        hb.relation_features(relation(), hb.sae.attach(other, make_sae(other)), "ab", answer="c")
    monkeypatch.setattr(TOY, "remote", True)
    with pytest.raises(Refused, match="load the model here"):
        parts()
