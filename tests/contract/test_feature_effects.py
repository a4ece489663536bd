"""What features do, on every adapter: sweeps, attributions and backpatched features against naive loops through SAELens, closed forms and
finite differences."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import hookbook as hb
from hookbook.errors import DataError, EditError, ModelError, Refused, TokenError
from tests.contract.test_sae import N, attached
from tests.support.formulas import flat

PROMPTS = ["a prompt", "another, longer"]


def exact(case):
    return 1e-10 if case.name == "toy" or "gpt2" in case.name else 1e-6  # the others' norms compute in float32


def says(case, prompt, *edits):
    """Log-probabilities of the next token of one plain run through SAELens."""
    logits, _ = case.plain(prompt.ids, flat(edits, prompt))
    return logits[-1].log_softmax(-1)


def states(case, site, prompt):
    return case.plain(prompt.ids, (), (site,))[1][site]


@pytest.mark.parametrize("architecture", ["jumprelu", "topk"])
@pytest.mark.parametrize("change", ["to", "add", "scale", "times_max"])
def test_a_sweep_is_a_loop_of_plain_runs(case, architecture, change):
    sae = attached(case, architecture)
    if change == "times_max":
        sae = hb.sae.attach(case.adapter, sae.sae, maxima=torch.linspace(0.5, 3, N))
    prompts, strengths, word = sae.encode_prompts(PROMPTS), (0.5, -2.0), "c"
    on = [sae.sae.encode(states(case, sae.site, prompt)[-1:])[0].topk(2).indices.tolist() for prompt in prompts]
    off = next(i for i in range(N) if i not in on[0])
    found = hb.feature_sweep(
        sae, PROMPTS, features=[[on[0][0], off], on[1][:1]], strengths=strengths, change=change, position=[2, -1], tokens=[word, 7], k=3
    )
    assert (found.rows.tolist(), found.features.tolist(), found.wanted) == (
        [0, 0, 1],
        [on[0][0], off, on[1][0]],
        (word, case.adapter.tokenizer.decode([7])),
    )
    wanted = [case.adapter.tokenizer.convert_tokens_to_ids(word), 7]
    for at, (row, feature) in enumerate(zip(found.rows.tolist(), found.features.tolist(), strict=True)):
        plain = says(case, prompts[row])
        before = sae.sae.encode(states(case, sae.site, prompts[row])[[2, -1]])[:, feature].max()
        assert (found.activations[at] - before).abs() < exact(case)
        assert found.plain_ids[row].tolist() == plain.topk(3).indices.tolist()
        assert (found.plain_logprobs[row] - plain.topk(3).values).abs().max() < exact(case)
        assert (found.wanted_logprobs[row] - plain[wanted]).abs().max() < exact(case)
        for s, strength in enumerate(strengths):
            more: Any = {change: strength}
            changed = says(case, prompts[row], sae.edit(feature, position=[2, -1], **more))
            assert (found.kl[at, s] - (plain.exp() * (plain - changed)).sum()).abs() < exact(case)
            assert (found.changes[at, s] - (changed - plain)[wanted]).abs().max() < exact(case)
            assert found.token_ids[at, s].tolist() == changed.topk(3).indices.tolist()
            assert (found.logprobs[at, s] - changed.topk(3).values).abs().max() < exact(case)
    assert found.kl[[0, 2]].min() > 1e-8


def test_all_features_and_those_which_are_active(case):
    sae = attached(case)
    every, active = (hb.feature_sweep(sae, PROMPTS, features=features) for features in ("all", "active"))
    assert every.features.tolist() == [*range(N)] * 2 and every.kl.shape == (2 * N, 1)
    on = every.activations > 0
    assert 0 < on.sum() < 2 * N and torch.equal(active.rows, every.rows[on]) and torch.equal(active.features, every.features[on])
    assert (active.kl - every.kl[on]).abs().max() < exact(case) and every.kl[~on].abs().max() < 1e-8 < every.kl[on].min()
    for row, prompt in enumerate(active.prompts):
        acts = sae.sae.encode(states(case, sae.site, prompt)[-1:])[0]
        assert active.features[active.rows == row].tolist() == acts.nonzero()[:, 0].tolist()
    dropped = hb.feature_sweep(sae, PROMPTS, features=[3], keep_error=False)
    changed = says(case, dropped.prompts[0], sae.edit(3, to=0.0, position=-1, keep_error=False))
    plain = says(case, dropped.prompts[0])
    assert (dropped.kl[0, 0] - (plain.exp() * (plain - changed)).sum()).abs() < exact(case)


def test_a_planted_feature_is_at_the_top(case):
    """One whose decoder row is a token's readout direction, at the last block's output."""
    card = case.adapter.card
    sae = attached(case, "standard", layer=card.n_layers - 1)
    state = states(case, sae.site, sae.encode_prompts("a prompt")[0])[-1].requires_grad_()
    with torch.enable_grad():
        normed = case.adapter.final_norm(state[None])
        (direction,) = torch.autograd.grad(case.adapter.unembed(normed).log_softmax(-1)[0, 99], state)
    sae.sae.W_dec.data *= 1e-3
    sae.sae.W_dec.data[11] = 10 * direction / direction.norm()
    sae = hb.sae.attach(case.adapter, sae.sae)
    word = case.adapter.tokenizer.decode([99])
    found = hb.feature_sweep(sae, "a prompt", change="add", strengths=[-1.0, 0.1, 1.0], tokens=[99])
    down, little, up = found.changes[11, :, 0].tolist()
    assert down < 0 < little < up and up > 0.5 and found.changes[found.features != 11].abs().max() < 0.1
    assert found.top(1).feature.item() == found.top(1, by=word).feature.item() == 11


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated"])
@pytest.mark.parametrize("norm", ["none", "layer_norm"])
def test_attributions_are_autograd_through_saelens_and_effects_are_plain_runs(case, architecture, norm):
    sae = attached(case, architecture, normalize_activations=norm)
    found = hb.feature_attribution(sae, PROMPTS, answer=["c", "d"], other="e", top=10_000)
    prompts, ids = sae.encode_prompts(PROMPTS), [case.adapter.tokenizer.convert_tokens_to_ids(x) for x in "cde"]
    entries = {}
    for row, prompt in enumerate(prompts):
        plain = says(case, prompt)
        metric = plain[ids[row]] - plain[ids[2]]
        assert (found.metric[row] - metric).abs() < exact(case)
        for at in range(1, len(prompt)):  # the first is <s>
            x = states(case, sae.site, prompt)[at : at + 1].detach()
            with torch.enable_grad():
                acts = sae.sae.encode(x).detach().requires_grad_()
                made = sae.sae.decode(acts)  # once: a normalising SAE forgets the size
                error = x - made.detach()
                leaf = (made + error)[0]
                logits, _ = case.plain(prompt.ids, ((sae.site, at, hb.Edit(sae.site, leaf, "set"), []),), grad=True)
                said = logits[-1].log_softmax(-1)
                slopes, by_state = torch.autograd.grad(said[ids[row]] - said[ids[2]], [acts, leaf])
            mine = (found.error_rows == row) & (found.error_positions == at)
            assert mine.sum() == 1 and (found.errors[mine] - error[0] @ by_state).abs() < exact(case) * (
                error[0].norm() * by_state.norm()
            ).clamp(min=1)
            for feature in acts[0].nonzero()[:, 0].tolist():
                entries[row, at, feature] = (acts[0, feature].item(), slopes[0, feature].item(), metric.item(), prompt)
            if norm == "none":  # everything that the state is made of
                whole = (
                    found.attributions[(found.rows == row) & (found.positions == at)].sum() + found.errors[mine] + sae.sae.b_dec @ by_state
                )
                assert (whole - x[0] @ by_state).abs() < 10 * exact(case)
    assert len(entries) > 20
    keys = list(zip(found.rows.tolist(), found.positions.tolist(), found.features.tolist(), strict=True))
    assert keys == sorted(entries)
    for i, key in enumerate(keys):
        activation, slope, metric, prompt = entries[key]
        assert abs(found.activations[i] - activation) < exact(case) and abs(found.gradients[i] - slope) < 10 * exact(case)
        assert found.attributions[i] == found.activations[i] * found.gradients[i]
        if i % 5 == 0:
            said = says(case, prompt, sae.edit(key[2], to=0.0, position=key[1]))
            assert abs(found.effects[i] - (metric - (said[ids[key[0]]] - said[ids[2]]))) < exact(case)


def test_gradients_are_finite_differences_of_edits(case):
    sae = attached(case, "standard")
    found = hb.feature_attribution(sae, "a prompt", answer="c", exact=False)
    (prompt,), (token,) = found.prompts, case.adapter.tokenizer.convert_tokens_to_ids(["c"])
    assert found.effects.isnan().all() and math.isnan(found.correlation()) and found.others == ()
    step, tolerance = (1e-5, 1e-7) if exact(case) < 1e-9 else (1e-2, 1e-2)
    for i in range(0, len(found.features), 7):
        up, down = (
            says(case, prompt, sae.edit(int(found.features[i]), add=d, position=int(found.positions[i])))[token] for d in (step, -step)
        )
        assert abs(found.gradients[i] - (up - down) / (2 * step)) < tolerance * (1 + abs(found.gradients[i]))


def test_the_largest_attributions_are_those_measured_and_lists_are_measured_whole(case):
    sae = attached(case)
    every = hb.feature_attribution(sae, PROMPTS, answer="c", top=10_000)
    some = hb.feature_attribution(sae, PROMPTS, answer="c", top=3)
    assert torch.equal(some.features, every.features) and torch.equal(some.attributions, every.attributions)
    for row in range(2):
        mine = (some.rows == row).nonzero()[:, 0]
        best = mine[some.attributions[mine].abs().topk(3).indices]
        assert sorted((~some.effects[mine].isnan()).nonzero()[:, 0].tolist()) == sorted((best - mine[0]).tolist())
    known = ~some.effects.isnan()
    assert (some.effects[known] - every.effects[known]).abs().max() < exact(case)
    feature = int(every.features.mode().values)
    listed = hb.feature_attribution(sae, PROMPTS, answer="c", features=[feature], top=1)
    mine = every.features == feature
    assert len(listed.features) == mine.sum() > 1 and (listed.effects - every.effects[mine]).abs().max() < exact(case)
    last = hb.feature_attribution(sae, PROMPTS, answer="c", position=-1, exact=False)
    assert last.positions.unique().tolist() == sorted({len(prompt) - 1 for prompt in last.prompts})


def test_a_linear_readout_makes_attributions_exact(case):
    """At the last block's output only the norm stands before the logits: a planted feature along a direction in which a logit difference
    hardly bends."""
    card = case.adapter.card
    sae = attached(case, "standard", layer=card.n_layers - 1)
    sae.sae.W_dec.data *= 1e-4
    sae = hb.sae.attach(case.adapter, sae.sae)
    found = hb.feature_attribution(sae, PROMPTS, answer="c", other="d", position=-1)
    assert found.correlation() > 1 - 1e-3 and (found.attributions - found.effects).abs().max() < 1e-2 * found.effects.abs().max()


def test_a_transcoder_s_features_are_read_at_one_site_and_changed_at_another(case):
    """Attributions, which come from gradients, agree with what sweeps of small steps and of none do."""
    reads, writes = hb.Site("resid_pre", 1), hb.Site("mlp_out", 1)
    known = {"hook_name": reads.hook_name, "hook_name_out": writes.hook_name, "model_name": case.adapter.card.model_id}
    sae = attached(case, "transcoder", "resid_pre", metadata=known, d_out=writes.width(case.adapter.card), apply_b_dec_to_input=False)
    found = hb.feature_attribution(sae, "abcd", answer="c", position=-1)
    feature, at = found.features.tolist(), (sae.site, sae.out)
    assert at == (reads, writes) and len(feature) > 3
    step, tolerance = (1e-5, 1e-7) if exact(case) < 1e-9 else (1e-2, 1e-2)
    moved = hb.feature_sweep(sae, "abcd", features=feature, change="add", strengths=[step, -step], tokens=["c"]).changes[..., 0]
    slopes = (moved[:, 0] - moved[:, 1]) / (2 * step)
    assert (found.gradients - slopes).abs().max() < tolerance * (1 + slopes.abs().max()) and slopes.abs().min() > 0
    without = hb.feature_sweep(sae, "abcd", features=feature, tokens=["c"])
    assert (found.effects + without.changes[:, 0, 0]).abs().max() < exact(case) and (
        found.activations - without.activations
    ).abs().max() < exact(case)
    with pytest.raises(Refused, match="resid_post or resid_pre"):
        hb.backpatch_features(sae, [("a", "b")], 1)


@pytest.mark.parametrize("architecture", ["jumprelu", "topk"])
@pytest.mark.parametrize("name", ["resid_post", "resid_pre"])
def test_backpatched_features_are_a_naive_loop(case, architecture, name):
    sae = attached(case, architecture, name)
    questions, chosen, site = [("ab", "c"), ("other", "d"), ("de", "f")], [2, 9], sae.site
    found = hb.backpatch_features(sae, questions, chosen, source_layers="later" if name == "resid_post" else [0, 2], seed=3)
    sources = [*range(2, case.adapter.card.n_layers)] if name == "resid_post" else [0, 2]
    assert (
        found.pairs == tuple((source, 1) for source in sources)
        and found.features == (2, 9)
        and set(found.right) == {"patch", "shuffled", "random"}
    )
    seen = [{source: states(case, hb.Site(name, source), prompt)[-1] for source in (1, *sources)} for prompt in found.prompts]
    moved = 0.0
    for i, prompt in enumerate(found.prompts):
        x = seen[i][1]
        token = case.adapter.tokenizer.convert_tokens_to_ids("Ġ")  # answers follow after a space
        plain = says(case, prompt)
        assert (found.clean_logprobs[i] - plain[token]).abs() < exact(case) and found.clean_ids[i] == plain.argmax()
        for control in found.right:
            some = list(found.settings["random"]) if control == "random" else chosen
            assert not set(found.settings["random"]) & set(chosen)
            for p, source in enumerate(sources):
                y = seen[found.donors[i] if control == "shuffled" else i][source]
                new = x + (sae.sae.encode(y[None]) - sae.sae.encode(x[None]))[0, some] @ sae.sae.W_dec[some]
                logits, _ = case.plain(prompt.ids, ((site, len(prompt) - 1, hb.Edit(site, new.detach(), "set"), []),))
                said = logits[-1].log_softmax(-1)
                assert (found.logprobs[control][i, p] - said[token]).abs() < exact(case)
                assert found.token_ids[control][i, p] == said.argmax() and bool(found.right[control][i, p]) == (said.argmax() == token)
                moved = max(moved, float((said - plain).abs().max()))
    assert moved > 1e-3
    assert hb.FeatureBackpatch.load is not hb.Backpatch.load and found.summary().control.tolist() == ["patch", "shuffled", "random"]


def test_results_frame_draw_and_keep_themselves(case, plt, tmp_path):
    sae = attached(case)
    sae.sae.cfg.metadata.neuronpedia_id = "m/1-res"
    sae = hb.sae.attach(case.adapter, sae.sae, labels={2: "about <b>"})
    sweep = hb.feature_sweep(sae, PROMPTS, strengths=[0.0, 3.0], tokens=["c"])
    frame = sweep.to_frame()
    assert len(frame) == 2 * N * 2 and frame.iloc[4 + 1].to_dict() | {"prompt": 0} == {
        "prompt": 0, "feature": 2, "strength": 3.0, "activation": sweep.activations[2].item(),
        "kl": sweep.kl[2, 1].item(), "change c": sweep.changes[2, 1, 0].item(),
        "plain_token": sweep.vocab[int(sweep.plain_ids[0, 0])], "token": sweep.vocab[int(sweep.token_ids[2, 1, 0])],
        "logprob": sweep.logprobs[2, 1, 0].item(),
        "label": "about <b>", "link": "https://www.neuronpedia.org/m/1-res/2",
    }  # fmt: skip
    assert (
        sweep.top(3).kl.tolist() == sorted(frame.kl, reverse=True)[:3]
        and "about &lt;b&gt;" in sweep.view().html
        or 2 not in sweep.top(50).feature.tolist()
    )
    assert len(sweep.plot(prompt=1, n=4).lines) == 4
    one = hb.feature_sweep(sae, PROMPTS, tokens=["c"])
    bars: Any = one.plot(n=2, value="c").patches
    assert [bar.get_width() for bar in bars] == one.changes[:N, 0, 0][one.changes[:N, 0, 0].abs().topk(2).indices].tolist()
    found = hb.feature_attribution(sae, PROMPTS, answer="c")
    line, token = found.to_frame().iloc[-1], found.prompts[1].strings[int(found.positions[-1])]
    assert (line.prompt, line.position_token, line.attribution, line.feature) == (
        PROMPTS[1],
        token,
        found.attributions[-1].item(),
        int(found.features[-1]),
    )
    assert (
        found.top(2).attribution.abs().tolist() == found.attributions.abs().topk(2).values.tolist()
        and "neuronpedia.org/m/1-res" in found.view().html
    )
    dots: Any = found.plot().collections[0].get_offsets()
    assert len(dots) == (~found.effects.isnan()).sum() and "correlation" in plt.gca().get_title("left")
    assert hb.feature_attribution(sae, PROMPTS, answer="c", exact=False).plot().get_ylabel() == "attribution (nats)"
    patched = hb.backpatch_features(sae, [("ab", "c"), ("de", "f")], 2)
    assert patched.labels == {2: "about <b>"}
    for result in (sweep, found, patched):
        again = type(result).load(result.save(tmp_path / "x.safetensors"))
        assert vars(again).keys() == vars(result).keys() and again.to_frame().equals(result.to_frame())


def test_plans_run_nothing_and_count_what_runs(case):
    sae = attached(case)
    forks = hb.feature_sweep.plan(sae, PROMPTS, strengths=[0.0, 1.0])
    assert forks.unembedded == 2 * (2 * N + 1) and forks.climbs == 2
    assert hb.feature_sweep.plan(sae, PROMPTS, features="active").unembedded == 2 * (N + 1)  # at most
    planned = hb.feature_attribution.plan(sae, PROMPTS, answer="c", top=4)
    assert planned.vjps == 1 and planned.unembedded == 2 + 2 * 4
    assert hb.backpatch_features.plan(sae, [("ab", "c"), ("de", "f")], [1, 2]).unembedded == 2 + 2 * 3 * (case.adapter.card.n_layers - 2)


def test_a_checkpoint_resumes(case, tmp_path):
    sae = attached(case)
    first = hb.feature_sweep(sae, PROMPTS, checkpoint=tmp_path)
    files = sorted(tmp_path.iterdir())
    again = hb.feature_sweep(sae, PROMPTS, checkpoint=tmp_path)
    assert files and sorted(tmp_path.iterdir()) == files and torch.equal(first.kl, again.kl)


def test_what_is_refused(case):
    sae = attached(case)
    sweep: Any = hb.feature_sweep
    attribute: Any = hb.feature_attribution
    cases = [
        (lambda: sweep(case.adapter, "ab"), ModelError, "hb.sae.attach"),
        (lambda: attribute(sae.sae, "ab", answer="c"), ModelError, "hb.sae.attach"),
        (lambda: sweep(sae, "ab", change="set"), EditError, "change='set'"),
        (lambda: sweep(sae, "ab", strengths=[]), DataError, "no strengths"),
        (lambda: sweep(sae, "ab", k=0), TokenError, "k=0"),
        (lambda: sweep(sae, "ab", tokens="c"), TokenError, "a list of texts"),
        (lambda: sweep(sae, "ab", features="some"), EditError, "'all' or 'active'"),
        (lambda: sweep(sae, "ab", features=[]), DataError, "no features"),
        (lambda: sweep(sae, "ab", features=[N]), EditError, f"no feature {N}"),
        (lambda: sweep(sae, "ab", features=[[1], [2]]), DataError, "2 lists of features for 1 prompts"),
        (lambda: sweep(sae, "ab", change="times_max"), EditError, "times_max without maxima"),
        (lambda: attribute(sae, "ab", answer="cd"), TokenError, "2 tokens"),
        (lambda: attribute(sae, "ab", answer=["c", "d"]), DataError, "2 for 1 prompts"),
        (lambda: attribute(sae, "ab", answer="c", top=0), TokenError, "top=0"),
        (lambda: attribute(sae, [[0, 0]], answer=5), TokenError, "only special tokens"),
        (lambda: hb.backpatch_features(attached(case, name="mlp_out"), [("a", "b")], 1), Refused, "resid_post or resid_pre"),
        (lambda: hb.backpatch_features(sae, [("a", "b")], 1, source_layers=[1], controls=[]), DataError, "its own|own, so nothing"),
        (lambda: hb.backpatch_features(sae, [("a", "b")], [], controls=[]), DataError, "no features"),
        (lambda: hb.backpatch_features(sae, [("a", "b")], 1, controls=["swapped"]), DataError, "shuffled, random"),
        (lambda: hb.backpatch_features(sae, [("a", "b")], range(N - 1), controls=["random"]), DataError, "choose fewer"),
    ]
    for call, error, words in cases:
        with pytest.raises(error, match=words):
            call()
