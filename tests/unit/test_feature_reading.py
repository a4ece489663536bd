"""Reading features whose answers are known: planted features, perfect and useless SAEs, and what is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

import hookbook as hb
from hookbook.deferred import Deferred, Tape, known
from hookbook.errors import DataError, EditError, ModelError, Refused, TokenError
from hookbook.recipes.features.reading import Stream, auroc
from hookbook.request import Read, Request, Row
from hookbook.testing import toy
from tests.contract.test_sae import make_sae

TEXTS = ["abba cab", "a", "bad cab dab", "cc"]
LETTERS = "abcd "


def planted(**more) -> hb.sae.AttachedSAE:
    """Feature `i` is letter `i` at the embedding, twice as strong for each later letter, in numbers without rounding; the last two are
    never active."""
    model, n = toy(), len(LETTERS)
    sae = make_sae(model, "standard", "embed", None, d_sae=n + 2)
    with torch.no_grad():
        for value in sae.state_dict().values():
            value.zero_()
        rows = torch.eye(16, dtype=torch.float64)[:n]
        model.model.embed.weight[[model.encode(letter, bos=False).ids[0] for letter in LETTERS]] = rows
        sae.W_enc[:, :n] = rows.T * 2.0 ** torch.arange(n)
        sae.W_dec[:n] = rows / 2.0 ** torch.arange(n)[:, None]
    return hb.sae.attach(model, sae, **more)


def linear(sign: float) -> Any:
    """An SAE that gives `sign` times its input."""
    model = toy()
    sae = make_sae(model, "standard", d_sae=32)
    with torch.no_grad():
        for value in sae.state_dict().values():
            value.zero_()
        eye = torch.eye(16, dtype=torch.float64)
        sae.W_enc.copy_(torch.cat([eye, -eye], 1))
        sae.W_dec.copy_(sign * torch.cat([eye, -eye]))
    return hb.sae.attach(model, sae)


def test_planted_features_are_found_on_their_letters():
    sae = planted(labels={1: "the letter b"})
    found = hb.feature_activations(sae, TEXTS).to_frame()
    assert [LETTERS[i] for i in found.feature] == list("".join(TEXTS)) == found.position_token.tolist()
    assert found.activation.tolist() == pytest.approx([2.0**i for i in found.feature])
    assert {*found.label[found.feature == 1]} == {"the letter b"} and {*found.label[found.feature != 1]} == {""}
    contrast = hb.feature_activations(sae, ["ab"]).contrast(hb.feature_activations(sae, ["aadd"]))
    first, last = contrast.iloc[0], contrast.iloc[-1]
    assert (first.feature, last.feature) == (1, 3) and first.difference == pytest.approx(1.0) and last.difference == pytest.approx(-4.0)
    assert hb.feature_activations(sae, "abcd").contrast(hb.feature_activations(sae, "abcd")).difference.abs().max() == 0


def test_examples_of_equal_activations_are_of_the_earliest_texts_once_each():
    sae = planted()
    found = hb.feature_examples(sae, [*TEXTS, "bbb"], k=2, context=1, batch=2)
    frame: Any = found.to_frame()
    assert frame[frame.feature == 1][["text_index", "position", "context"]].values.tolist() == [[0, 2, "a«b»b"], [2, 1, "<s>«b»a"]]
    assert (
        found.texts.dtype == torch.long
        and frame[frame.feature == 2][["text_index", "position"]].values.tolist() == [[0, 6], [2, 5]]
        and not (frame.feature > 4).any()
    )
    assert (found.maxima[5:] == 0).all() and (found.density[5:] == 0).all() and found.quantiles[:, 5:].isnan().all()
    assert float(found.density[3]) == pytest.approx(2 / sum(map(len, (*TEXTS, "bbb")))) and found.maxima[:5].tolist() == pytest.approx(
        [1, 2, 4, 8, 16]
    )
    again = hb.sae.attach(sae.model, sae.sae, maxima=found.maxima)
    assert torch.equal(again.edit(2, times_max=2.0).value.shift.double(), 2 * found.maxima[[2]])  # type: ignore[union-attr]
    assert found.to_frame([6]).empty and len(found.to_frame([6]).columns) == 9 and "no examples" in found.view(6).html


def test_texts_are_pulled_a_batch_at_a_time(monkeypatch):
    sae, pulled, seen = planted(), [], []
    run = type(sae.model).run

    def count(self, request, **more):
        seen.append((len(pulled), len(request.prompts)))
        return run(self, request, **more)

    monkeypatch.setattr(type(sae.model), "run", count)
    hb.feature_examples(sae, (pulled.append(i) or "ab" for i in range(7)), batch=3)
    assert seen == [(3, 3), (6, 3), (7, 1)]
    alone = hb.feature_examples(sae, "ab")
    assert_equal_but(alone, hb.feature_examples(sae, [list(sae.model.encode("ab").ids)]), "settings")


def assert_equal_but(a: Any, b: Any, *names: str) -> None:
    assert all(
        torch.equal(x.nan_to_num(), vars(b)[key].nan_to_num())
        for key, x in vars(a).items()
        if isinstance(x, torch.Tensor) and key not in names
    )


def test_a_perfect_sae_a_useless_one_and_one_that_harms():
    perfect, wrong = hb.sae_report(linear(1.0), TEXTS), hb.sae_report(linear(-1.0), TEXTS)
    assert perfect.fvu == pytest.approx(0, abs=1e-20) and perfect.cosine == pytest.approx(1) and perfect.l0 == pytest.approx(16)
    assert perfect.loss_sae == pytest.approx(perfect.loss, abs=1e-12) and perfect.loss_recovered == pytest.approx(1) and perfect.fits
    assert not perfect.to_frame().verdict.str.contains("does not fit").any()
    assert wrong.cosine == pytest.approx(-1) and wrong.fvu > 1 and not wrong.fits
    assert "the mean state is closer" in wrong.to_frame().set_index("metric").verdict["FVU"] and "does not fit" in wrong.view().html
    nothing = hb.sae_report(linear(0.0), TEXTS)
    assert nothing.loss_sae == pytest.approx(nothing.loss_zero, abs=1e-12) and nothing.loss_recovered == pytest.approx(0, abs=1e-9)
    sae = linear(0.0)
    states = torch.cat([hb.feature_activations(linear(1.0), text).dense()[1:] for text in TEXTS])
    sae.sae.b_dec.data.copy_((states[:, :16] - states[:, 16:]).mean(0))
    assert hb.sae_report(sae, TEXTS, batch=3).fvu == pytest.approx(1, abs=1e-12)


def test_the_verdict_on_losses():
    harms = replace(hb.sae_report(linear(1.0), TEXTS), loss=2.0, loss_sae=5.0, loss_zero=4.0)
    assert harms.loss_recovered == -0.5 and not harms.fits and "worse than with zeros" in harms.to_frame().verdict.iloc[-1]
    vain = replace(harms, loss_zero=1.0)
    assert vain.fits and "zeros do no harm" in vain.to_frame().verdict.iloc[-1]
    none = replace(harms, loss_zero=2.0)
    assert none.loss_recovered != none.loss_recovered and none.fits


def test_special_tokens_in_a_text_are_left_alone():
    """The state of an end-of-text token in the middle is not replaced, not encoded, and what follows it is no target of it."""
    sae = linear(0.0)
    ids = [0, 70, 71, 1, 72, 73]
    report, seen = hb.sae_report(sae, [ids]), (1, 2, 4, 5)
    assert (report.n_tokens, report.n_targets) == (4, 3)
    tokens = sae.model.encode(ids)
    zero = hb.Edit(sae.site, 0.0, "set", seen)
    (reading,) = sae.model.run(Request([tokens], [Row(0, (zero,))], [Read(hb.Site("resid_post", 2), slice(None))])).readings
    logits = sae.model.readout(reading.values, logits=True).logits.log_softmax(-1)
    assert report.loss_zero == pytest.approx(-float(sum(logits[p, ids[p + 1]] for p in (1, 2, 4))) / 3)
    assert hb.feature_activations(sae, [ids]).read == (seen,)


def test_a_transcoder_is_judged_by_its_output():
    model = toy()
    sae = make_sae(model, "transcoder", d_out=16, apply_b_dec_to_input=False)
    attached = hb.sae.attach(model, sae, site="resid_pre.1", out="mlp_out.1")
    report = hb.sae_report(attached, TEXTS)
    prompts = [model.encode(text) for text in TEXTS]
    reads = [Read(hb.Site.parse(site), slice(1, None)) for site in ("resid_pre.1", "mlp_out.1")]
    x, y = (reading.values for reading in model.run(Request(prompts, [Row(i) for i in range(4)], reads)).readings)
    y_hat = sae.decode(sae.encode(x)).detach()
    assert report.fvu == pytest.approx(float((y - y_hat).square().sum() / (y - y.mean(0)).square().sum()))
    assert report.site == hb.Site("resid_pre", 1) and report.out == hb.Site("mlp_out", 1)


@pytest.mark.parametrize(
    "call,error,words",
    [
        (lambda sae: hb.feature_activations(sae.sae, "a"), ModelError, "hb.sae.attach"),
        (lambda sae: hb.feature_examples(sae.sae, "a"), ModelError, "hb.sae.attach"),
        (lambda sae: hb.sae_report(sae.sae, "a"), ModelError, "hb.sae.attach"),
        (lambda sae: hb.feature_activations(sae, []), TokenError, "at least one"),
        (lambda sae: hb.feature_activations(sae, [[0]]), TokenError, "special"),
        (lambda sae: hb.feature_activations(sae, "abc", position=0), TokenError, "special"),
        (lambda sae: hb.feature_activations(sae, "abc", position=9), TokenError, "no token 9"),
        (lambda sae: hb.feature_activations(sae, "abc").top(0), TokenError, "k of 1 or more"),
        (lambda sae: hb.feature_activations(sae, "abc").of(7), DataError, "features 0 to 6"),
        (lambda sae: hb.feature_activations(sae, "abc").dense(1), TokenError, "prompts 0 to 0"),
        (lambda sae: hb.feature_activations(sae, "abc").plot(k=0), TokenError, "k of 1 or more"),
        (lambda sae: hb.feature_examples(sae, []), TokenError, "at least one"),
        (lambda sae: hb.feature_examples(sae, iter(())), TokenError, "no texts"),
        (lambda sae: hb.feature_examples(sae, "a", k=0), TokenError, "k of 1 or more"),
        (lambda sae: hb.feature_examples(sae, "a", context=-1), TokenError, "context of 0 or more"),
        (lambda sae: hb.feature_examples(sae, "a", quantiles=[1.5]), DataError, "from 0 to 1"),
        (lambda sae: hb.feature_examples(sae, "a", batch=0), TokenError, "batch of 1 or more"),
        (lambda sae: hb.feature_examples(sae, "a", features=[9]), EditError, "features 0 to 6"),
        (lambda sae: hb.feature_examples(sae, "a").to_frame([9]), DataError, "features 0 to 6"),
        (lambda sae: hb.feature_examples(sae, "a").plot(feature=9), DataError, "features 0 to 6"),
        (lambda sae: hb.sae_report(sae, iter(())), TokenError, "no texts"),
        (lambda sae: hb.sae_report(sae, "a"), DataError, "longer texts"),
        (
            lambda sae: hb.sae_report(hb.sae.attach(sae.model, make_sae(sae.model, "standard", "final_norm", None)), "ab"),
            Refused,
            "final_norm",
        ),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call(planted())


def test_results_are_loaded_equal_and_drawn(tmp_path, plt):
    def same(html: str) -> str:
        return re.sub("circuits-vis-[0-9a-f-]+", "", html)

    sae = planted(labels={0: "a $ <b>"})
    results = [hb.feature_activations(sae, TEXTS), hb.feature_examples(sae, TEXTS, k=2), hb.sae_report(sae, TEXTS)]
    for result in results:
        loaded: Any = type(result).load(result.save(tmp_path / "one"))
        assert loaded.to_frame().equals(result.to_frame()) and same(loaded.view().html) == same(result.view().html)
        assert_equal_but(result, loaded)
        assert {k: v for k, v in vars(result).items() if not isinstance(v, torch.Tensor)} == {
            k: v for k, v in vars(loaded).items() if not isinstance(v, torch.Tensor)
        }
    active, examples, report = results
    ax = active.plot(prompt=2, k=3)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["4", "3", "2"] and ax.images[0].get_array().shape == (len(TEXTS[2]), 3)
    assert [bar.get_width() for bar in report.plot().patches] == pytest.approx(
        [1 - report.fvu, report.cosine, report.loss_recovered, 1 - report.dead]
    )
    assert len(examples.plot().collections[0].get_offsets()) == int((examples.density > 0).sum())
    bars = examples.plot(feature=4).patches
    assert sum(bar.get_height() for bar in bars) == round(float(examples.density[4]) * examples.n_tokens)
    assert all(bar.get_x() <= 16 * 1.03 for bar in bars) and any(
        bar.get_x() <= 16.0001 and bar.get_x() + bar.get_width() >= 15.9999 for bar in bars
    )
    assert "a $ &lt;b&gt;" in examples.view(0).html and "<b>" not in examples.view(0).html and "ColoredTokensMulti" in active.view().html


def test_plans_run_nothing():
    sae = planted()
    plan = hb.sae_report.plan(sae, ["abc", "de"], batch=1)
    assert (
        plan.climbs == 2
        and plan.unembedded == 3 * (2 + 1)
        and plan.unembedded == hb.sae_report(sae, ["abc", "de"], batch=1).settings["cost"]["unembedded"]
    )
    assert hb.feature_activations.plan(sae, TEXTS).climbs >= 1 and hb.feature_examples.plan(sae, TEXTS, batch=1).climbs == len(TEXTS)


def test_a_tensor_that_is_often_in_a_job_is_sent_once():
    tape, weights = Tape(), torch.randn(4)
    for _ in range(2):
        tape.note("op", {"args": [weights, weights[:2]]}, torch.empty(1))
    (_, one, *_), (_, other, *_) = tape.errand([])["steps"]
    assert one["args"][0] is other["args"][0] and one["args"][1] is not other["args"][1]
    assert torch.equal(one["args"][1], weights[:2]) and one["args"][1].untyped_storage().nbytes() == 8


def test_fields_that_wait_for_the_same_batches_are_all_filled_in():
    class Sums:
        total, largest = 0.0, 0.0

        def add(self, x: torch.Tensor) -> None:
            self.total, self.largest = self.total + float(x.sum()), max(self.largest, float(x.max()))

    tape, stream = Tape(), Stream(Sums())
    batches = [Deferred.of(tape, (2,), torch.float32) for _ in range(3)]
    for batch in batches:
        stream.add(batch)
    result = replace(hb.sae_report(linear(1.0), TEXTS), loss=stream.get("total"), settings={"largest": stream.get("largest")})
    for i, batch in enumerate(batches):
        batch.number = torch.tensor([1.0, i])
    known(result)
    assert result.loss == 6 and result.settings == {"largest": 2}


def test_auroc_counts_pairs_with_ties_as_half():
    first, second = torch.tensor([[1.0, 5.0, 2.0], [2.0, 7.0, 0.0]]), torch.tensor([[1.0, 1.0, 2.0], [3.0, 2.0, 2.0], [0.0, 3.0, 0.0]])
    naive = [sum((a > b) + (a == b) / 2 for a in first[:, i].tolist() for b in second[:, i].tolist()) / 6 for i in range(3)]
    assert auroc(first, second).tolist() == pytest.approx(naive)


def test_means_of_texts_and_how_well_they_tell_texts_apart():
    sae = hb.sae.attach(toy(), make_sae(toy()))
    one, other = hb.feature_activations(sae, ["ab", "cde", "good"]), hb.feature_activations(sae, ["xyz", "1 + 2"])
    features = torch.tensor([5, 0, 3])
    for side in (one, other):
        naive = torch.stack([side.dense(i)[list(side.read[i])].mean(0)[features] for i in range(len(side.prompts))])
        assert torch.allclose(side.by_text(features), naive.double(), atol=1e-12)
    frame: Any = one.contrast(other).set_index("feature")
    for feature in frame.index:
        a, b = (side.by_text(torch.tensor([feature]))[:, 0].tolist() for side in (one, other))
        assert frame.auroc[feature] == pytest.approx(sum((x > y) + (x == y) / 2 for x in a for y in b) / len(a) / len(b))
