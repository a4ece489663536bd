"""Vectors as features, patchscopes of features, and features in a relation's map, on every adapter against plain runs and SAELens' own
decoder."""

from __future__ import annotations

import pytest
import torch

import hookbook as hb
from tests.contract.test_linear_relations import BETAS, LAYERS, SEED, TRAIN, at, greedy, planted, run
from tests.contract.test_sae import attached
from tests.support.formulas import flat

TARGET = hb.prompts.Target("ab: one, cd: two, x", "x")


def state(case, text, site):
    return case.plain(case.adapter.encode(text).ids, (), (site,))[1][site][-1]


@pytest.mark.parametrize("name", ["resid_post", "head_z"])
def test_states_and_differences_as_features(case, name):
    sae = attached(case, name=name)
    a, b = (state(case, text, sae.site) for text in ("a prompt", "another, longer"))
    v, w = (hb.Vector(case.adapter.card, sae.site, x) for x in (a, b))
    found = v.decompose(sae, method="encode")
    acts = sae.encode(a[None])
    assert torch.equal(found.values, acts[0, found.features]) and len(found.features) == acts.count_nonzero() > 0
    assert (found.fit - sae.sae.decode(acts).flatten()).abs().max() < 1e-10 and (found.fit + found.residual - a).abs().max() < 1e-10
    for nonnegative in (True, False):
        fit = (v - w).decompose(sae, k=6, nonnegative=nonnegative)
        dense = torch.zeros(1, sae.n_features, dtype=torch.float64).index_put((torch.tensor([0]), fit.features), fit.values)
        assert (fit.fit - (sae.sae.decode(dense) - sae.sae.decode(0 * dense)).flatten()).abs().max() < 1e-10
        assert float(fit.shares.sum()) == pytest.approx(float(1 - (a - b - fit.fit).norm() ** 2 / (a - b).norm() ** 2), abs=1e-10)
        assert bool((fit.values < 0).any()) is not nonnegative and 0.1 < float(fit.explained) < 1
    both = found - w.decompose(sae, method="encode")
    assert (both.fit - (sae.reconstruct(a[None]) - sae.reconstruct(b[None]))[0]).abs().max() < 1e-10
    made = both.to_vector()
    assert made.site == sae.site and (made.values - both.fit).abs().max() < 1e-5 * both.fit.abs().max()


@pytest.mark.parametrize("op", ["set", "add"])
def test_patchscopes_of_features_are_a_loop_of_plain_runs(case, op):
    adapter, sae = case.adapter, attached(case)
    tokens = sae.encode_prompts(TARGET.text)[0]
    where, features, strengths = TARGET.position(tokens), [5, 2], [0.5, 3.0]
    ask = {"target": TARGET, "strengths": strengths, "op": op, "generate": 3, "k": adapter.card.d_vocab, "tokens": ["a", 7]}
    sites = [hb.Site("resid_post", 1), hb.Site("resid_pre", 1)]
    found = hb.feature_patchscope(sae, features, target_layers=["resid_post.1", "resid_pre.1"], seed=4, **ask)
    own = case.plain(tokens.ids, (), tuple(sites))
    noise = torch.randn(adapter.card.d_model, generator=torch.Generator().manual_seed(4)).double()
    letter = adapter.encode("x" + "a").ids[-1]
    assert found.pairs == tuple((site, strength) for site in sites for strength in strengths)
    for m, row in enumerate([*sae.sae.W_dec.detach()[features], noise]):
        for p, (site, strength) in enumerate(found.pairs):
            norm = own[1][site][where].norm()
            edits = flat((hb.Edit(site, strength * norm * row / row.norm(), op, where),), tokens)
            known = case.plain(tokens.ids, edits)[0][-1].log_softmax(-1)
            ids, logprobs, wanted, text = (
                (found.token_ids[m, p], found.logprobs[m, p], found.wanted_logprobs[m, p], found.texts[m][p])
                if m < 2
                else (found.random_ids[p], found.random_logprobs[p], found.random_wanted_logprobs[p], found.random_texts[p])
            )
            assert abs(float(found.norms[p] - norm)) < 1e-10
            assert (logprobs - known[ids]).abs().max() < 1e-6 and torch.equal(ids.sort().values, torch.arange(len(known)))
            assert (wanted - known[[letter, 7]]).abs().max() < 1e-6
            assert text == adapter.tokenizer.decode(greedy(case, tokens.ids, edits, 3))
    known = own[0][-1].log_softmax(-1)
    assert (found.control_logprobs - known[found.control_ids]).abs().max() < 1e-9 and (
        found.control_wanted_logprobs - known[[letter, 7]]
    ).abs().max() < 1e-9
    assert found.control_texts == (adapter.tokenizer.decode(greedy(case, tokens.ids, (), 3)),)
    assert (found.logprobs[0] - found.logprobs[1]).abs().max() > 1e-3 < (found.logprobs[:, 0] - found.logprobs[:, 1]).abs().max()
    same = hb.feature_patchscope(sae, features, seed=4, **ask)
    assert torch.equal(same.token_ids, found.token_ids[:, :2]) and same.texts == tuple(line[:2] for line in found.texts)


@pytest.fixture(scope="module")
def relation(case):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hookbook.recipes.relations.linear_relations.plain", lambda x: x.detach())
        return hb.linear_relation(case.adapter, planted(case.adapter), layers=LAYERS, betas=BETAS, n_train=TRAIN, seed=SEED)


def test_features_of_a_relation_sum_to_the_logits_of_its_output(case, relation):
    adapter, sae = case.adapter, attached(case)
    subject, answer = relation.test[0]
    others = [other for other in dict.fromkeys(y for _, y in (*relation.train, *relation.validation, *relation.test)) if other != answer]
    found = hb.relation_features(relation, sae, subject, answer=answer, k=3)
    exact = 1e-10 if case.name == "toy" or "gpt2" in case.name else 1e-5  # the others' norms compute in float32
    asked = relation.ask(subject, answer)
    ids = adapter.encode(asked.text).ids
    last = hb.Site("resid_post", adapter.card.n_layers - 1)
    s = run(case, asked, (), (sae.site,))[1][sae.site][at(asked)]
    weight, bias, beta = (getattr(relation, name)[relation.place(sae.site)] for name in ("weight", "bias", "beta"))
    wanted = [adapter.encode(y, bos=False).ids[0] for y in (answer, *others)]

    def logits(output):
        said = case.plain(ids, ((last, len(ids) - 1, hb.Edit(last, output, "set"), []),))[0][-1][wanted]
        return said[0] - said[1:].mean()

    output = beta * weight @ s + bias
    assert found.against == tuple(others) and len(set(wanted)) == len(wanted)
    assert float(found.total) == pytest.approx(float(logits(output)), abs=exact * 10)
    parts = [found.contributions.sum(), found.decoder_bias, found.error, found.bias, found.constant]
    assert float(sum(parts)) == pytest.approx(float(found.total), abs=1e-10)
    acts = sae.sae.encode(s[None])[0]
    assert torch.equal(found.activations, acts[found.features]) and len(found.features) == acts.count_nonzero() > 0
    assert found.contributions.abs().diff().max() <= 0

    norm, probe = adapter.final_norm, torch.linspace(-1, 2, len(output), dtype=torch.float64)[None]
    centred = bool((norm(probe + 1) - norm(probe)).abs().max() < 1e-3)

    def unscaled(x):
        """The final norm without its scale and bias."""
        size = (x - centred * x.mean()).pow(2).mean().sqrt()
        return (norm(1e3 * x[None] / size) - norm(0 * x[None])) * size

    def part_of_logits(x):
        """What a part of the output adds to the difference, under the norm's scale of the whole."""
        scale = (norm(output[None]) - norm(0 * output[None])).norm() / unscaled(output).norm()
        said = (adapter.unembed(scale * unscaled(x)) - adapter.unembed(0 * unscaled(x)))[0, wanted].detach()
        return float(said[0] - said[1:].mean())

    for i, feature in enumerate(found.features.tolist()):
        part = beta * weight @ (acts[feature] * sae.sae.W_dec.detach()[feature])
        assert float(found.contributions[i]) == pytest.approx(part_of_logits(part), rel=1e-4, abs=1e-4)
        said = case.plain(ids, ((last, len(ids) - 1, hb.Edit(last, part / acts[feature], "set"), []),))[0][-1].log_softmax(-1)
        assert (found.token_logprobs[i] - said.topk(3).values).abs().max() < 1e-6
        assert (said[found.token_ids[i]] - said.topk(3).values).abs().max() < 1e-6
    error = beta * weight @ (s - sae.reconstruct(s[None])[0])
    assert float(found.error) == pytest.approx(part_of_logits(error), rel=1e-4, abs=1e-4)
    assert float(found.bias) == pytest.approx(part_of_logits(bias), rel=1e-4, abs=1e-4)
    given = hb.relation_features(relation, sae, hb.Vector(adapter.card, sae.site, s), answer=answer, k=3)
    assert (given.contributions - found.contributions).abs().max() < 1e-9 and torch.equal(given.features, found.features)
