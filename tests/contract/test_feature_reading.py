"""Reading features on every adapter, against loops of plain runs through SAELens."""

from __future__ import annotations

import random
from string import ascii_lowercase
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import evals
from sae_lens.training.activation_scaler import ActivationScaler

import hookbook as hb
from hookbook.errors import DataError
from hookbook.recipes.features import reading
from tests.contract.test_sae import N, attached
from tests.support.cases import Case
from tests.support.formulas import flat

DRAW = random.Random(7)
TEXTS = ["".join(DRAW.choices(ascii_lowercase + "  ", k=DRAW.randint(1, 20))) for _ in range(9)]


def exact(case: Case) -> float:
    return 1e-10 if case.name == "toy" or "gpt2" in case.name else 1e-6  # the others' norms compute in float32


def states_of(case: Case, sae, text: str, site=None) -> tuple[tuple[int, ...], torch.Tensor]:
    ids = case.adapter.encode(text).ids
    assert ids[0] == 0  # the beginning of a sequence
    return ids, case.plain(ids, (), (site or sae.site,))[1][site or sae.site]


def activations_of(case: Case, sae, text: str) -> torch.Tensor:
    """`[pos, n_features]` by SAELens, one token after the other."""
    _, states = states_of(case, sae, text)
    return torch.stack([sae.sae.encode(x[None])[0] for x in states]).detach()


@pytest.mark.parametrize("architecture", ["jumprelu", "topk"])
def test_activations_are_saelens_own_of_plain_runs(case, architecture, monkeypatch):
    monkeypatch.setattr(reading, "CHUNK_BYTES", 5 * 8 * N)  # of five tokens
    sae = attached(case, architecture)
    found = hb.feature_activations(sae, TEXTS)
    wanted = [activations_of(case, sae, text) for text in TEXTS]
    read = torch.cat([x[1:] for x in wanted])
    assert found.n_tokens == len(read) and found.rows.tolist() == sorted(found.rows.tolist()) and (found.values != 0).all()
    for i, x in enumerate(wanted):
        x = x.clone()
        x[0] = 0  # the beginning of a sequence is not read
        assert (found.dense(i) - x).abs().max() < exact(case)
        assert torch.equal(found.of(3)[i], found.dense(i)[:, 3])
    assert (found.mean() - read.mean(0)).abs().max() < exact(case) and torch.equal(found.share(), (read > 0).double().mean(0))
    frame: Any = found.to_frame()
    assert len(frame) == int((read > 0).sum()) and {*found.prompts} == {case.adapter.encode(text) for text in TEXTS}
    for (row, at), some in frame.assign(row=found.rows.tolist()).groupby(["row", "position"]):
        best = wanted[row][at].topk(len(some))
        assert some.feature.tolist() == best.indices.tolist() and some.feature_rank.tolist() == list(range(len(some)))
        assert some.activation.tolist() == pytest.approx(best.values.tolist(), abs=exact(case)) and {*some.position_token} == {
            found.prompts[row].strings[at]
        }
    assert found.top(2).equals(frame[frame.feature_rank < 2].reset_index(drop=True))
    with_special, last = hb.feature_activations(sae, TEXTS, special=True), hb.feature_activations(sae, TEXTS, position=-1)
    assert (with_special.dense(0) - wanted[0]).abs().max() < exact(case) and with_special.n_tokens == len(read) + len(TEXTS)
    assert (torch.stack([last.dense(i)[-1] for i in range(len(TEXTS))]) - torch.stack([x[-1] for x in wanted])).abs().max() < exact(case)
    assert last.n_tokens == len(TEXTS)


def test_a_contrast_is_the_difference_of_means(case):
    sae = attached(case)
    one, other = hb.feature_activations(sae, TEXTS[:4]), hb.feature_activations(sae, TEXTS[4:])
    here, there = (torch.cat([activations_of(case, sae, text)[1:] for text in texts]) for texts in (TEXTS[:4], TEXTS[4:]))
    frame: Any = one.contrast(other)
    assert sorted(frame.feature) == torch.cat([here, there]).any(0).nonzero()[:, 0].tolist() and frame.difference.is_monotonic_decreasing
    row: Any
    for row in frame.itertuples():
        sides = [float(x) for part in (here, there) for x in (part[:, row.feature].mean(), (part[:, row.feature] > 0).double().mean())]
        assert [row.mean_activation, row.density, row.other_mean_activation, row.other_density] == pytest.approx(sides, abs=exact(case))
        assert row.difference == pytest.approx(sides[0] - sides[2], abs=exact(case))
    with pytest.raises(DataError, match="another feature"):
        one.contrast(hb.feature_activations(attached(case, seed=5), TEXTS[:1]))


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_examples_are_those_of_all_activations_at_once(case, batch):
    sae, k, context, levels = attached(case, "topk"), 3, 2, (0.0, 0.3, 0.5, 0.9, 1.0)
    wanted = [activations_of(case, sae, text) for text in TEXTS]
    found = hb.feature_examples(sae, (text for text in TEXTS), k=k, context=context, quantiles=levels, batch=batch)
    read = torch.cat([x[1:] for x in wanted])
    assert (found.n_texts, found.n_tokens) == (len(TEXTS), len(read))
    assert (found.maxima - read.amax(0)).abs().max() < exact(case) and torch.equal(found.density, (read > 0).double().mean(0))
    frame = found.to_frame()
    for feature in range(N):
        best = [
            (-float(x[1:, feature].max()), text, 1 + int(x[1:, feature].argmax()))
            for text, x in enumerate(wanted)
            if (x[1:, feature] > 0).any()
        ]
        best = sorted(best)[:k]
        mine = frame[frame.feature == feature]
        assert list(zip(mine.text_index, mine.position, strict=True)) == [(text, at) for _, text, at in best], feature
        assert mine.activation.tolist() == pytest.approx([-x for x, _, _ in best], abs=exact(case)) and mine.example.tolist() == list(
            range(len(best))
        )
        for at, (_, text, position) in zip(mine.index, best, strict=True):
            ids, places = case.adapter.encode(TEXTS[text]).ids, range(position - context, position + context + 1)
            inside = [0 <= p < len(ids) for p in places]
            assert found.contexts[at].tolist() == [ids[p] if ok else -1 for p, ok in zip(places, inside, strict=True)]
            near = [float(wanted[text][p, feature]) if ok and p else 0.0 for p, ok in zip(places, inside, strict=True)]
            assert found.context_activations[at].tolist() == pytest.approx(near, abs=exact(case))
            said = case.adapter.tokenizer.decode([ids[position]])
            assert f"«{said}»" in frame.context[at]
        values = read[:, feature][read[:, feature] > 0].numpy()
        for level, quantile in zip(levels, found.quantiles[:, feature].tolist(), strict=True):
            want = np.quantile(values, level, method="inverted_cdf") if len(values) else float("nan")
            assert want / 2 ** (1 / 32) - 1e-9 <= quantile <= want * 2 ** (1 / 32) + 1e-9 if len(values) else quantile != quantile
    assert torch.equal(found.features.unique(), found.density.nonzero()[:, 0]) and found.features.tolist() == sorted(
        found.features.tolist()
    )
    assert found.histogram[:, 2].sum() == (read > 0).sum()
    some = hb.feature_examples(sae, TEXTS, features=[5, 2], k=k, context=context, batch=batch)
    assert some.to_frame().reset_index(drop=True).equals(found.to_frame([2, 5]).reset_index(drop=True)) and torch.equal(
        some.maxima, found.maxima
    )


@pytest.mark.parametrize("name,layer", [("resid_post", 1), ("mlp_out", 0), ("resid_post", -1)])
def test_a_report_is_what_plain_runs_say(case, name, layer):
    sae = attached(case, name=name, layer=layer % case.adapter.card.n_layers)
    found = hb.sae_report(sae, TEXTS, batch=4)
    x, x_hat, active, losses = [], [], [], []
    for text in TEXTS:
        tokens = case.adapter.encode(text)
        ids, states = states_of(case, sae, text)
        acts = [sae.sae.encode(state[None]) for state in states[1:]]
        x += states[1:]
        x_hat += [sae.sae.decode(one)[0].detach() for one in acts]
        active += [one[0] > 0 for one in acts]
        edits = [(), (sae.splice(keep_error=False, position=slice(1, None)),), (hb.Edit(sae.site, 0.0, "set", slice(1, None)),)]
        runs = [case.plain(ids, flat(edit, tokens))[0].log_softmax(-1) for edit in edits]
        losses += [[-float(run[p, ids[p + 1]]) for run in runs] for p in range(1, len(ids) - 1)]
    x, x_hat, active, losses = (
        torch.stack(x),
        torch.stack(x_hat),
        torch.stack(active).double(),
        torch.tensor(losses, dtype=torch.float64).mean(0),
    )
    close = exact(case) * 100
    assert (found.n_texts, found.n_tokens, found.n_targets) == (len(TEXTS), len(x), len(x) - len(TEXTS))
    assert found.l0 == pytest.approx(float(active.sum(1).mean())) and found.dead == pytest.approx(1 - float(active.any(0).double().mean()))
    assert found.fvu == pytest.approx(float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()), abs=close)
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(x, x_hat).mean()), abs=close)
    assert [found.loss, found.loss_sae, found.loss_zero] == pytest.approx(losses.tolist(), abs=close)
    assert found.loss_recovered == pytest.approx(float((losses[2] - losses[1]) / (losses[2] - losses[0])), abs=1e-3)
    assert len({round(float(loss), 3) for loss in losses}) == 3


@pytest.mark.parametrize("architecture", ["jumprelu", "standard"])
def test_a_report_is_saelens_own_evaluation(hook_point_case, architecture):
    """On texts of one length, SAELens told to ignore the beginning of a sequence; its zeros replace that state, too."""
    case = hook_point_case
    sae, texts = attached(case, architecture), ["abcdef", "q w ert", "zzzzzz"]
    tokens = torch.tensor([case.adapter.encode(text).ids[:7] for text in texts])
    found = hb.sae_report(sae, tokens.tolist())
    of: Any = {"sae": sae.sae, "model": case.adapter.model, "activation_store": SimpleNamespace(get_batch_tokens=lambda n: tokens)}
    of |= {"activation_scaler": ActivationScaler(), "n_batches": 1, "eval_batch_size_prompts": 3, "ignore_tokens": [0], "model_kwargs": {}}
    asked: Any = {
        f"compute_{name}": True for name in ("l2_norms", "sparsity_metrics", "variance_metrics", "featurewise_density_statistics")
    }
    sparsity, by_feature = evals.get_sparsity_and_variance_metrics(**of, **asked)
    losses = evals.get_downstream_reconstruction_metrics(**of, compute_kl=False, compute_ce_loss=True)
    assert found.l0 == pytest.approx(sparsity["l0"]) and found.cosine == pytest.approx(sparsity["cossim"])
    assert 1 - found.fvu == pytest.approx(sparsity["explained_variance"])
    assert found.dead == pytest.approx(sum(x == 0 for x in by_feature["feature_density"]) / N)
    assert found.loss == pytest.approx(losses["ce_loss_without_sae"], abs=1e-5) and found.loss_sae == pytest.approx(
        losses["ce_loss_with_sae"], abs=1e-5
    )
    examples = hb.feature_examples(sae, tokens.tolist())
    assert examples.density.tolist() == pytest.approx(by_feature["feature_density"])
