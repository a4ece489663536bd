"""What training makes small, term by term; training by SAELens' own loop, with breaks and without; what is refused before any work."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from sae_lens import SAE
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer

import hookbook as hb
from hookbook.errors import DataError, HookbookError, Refused, ResultError, SiteError, TokenError
from hookbook.recipes.features import sae_training
from hookbook.sae import training
from hookbook.testing import toy

TEXTS = ["".join(random.Random(i).choices("abcdefgh ", k=20)) for i in range(60)]
SMALL = {"site": "resid_post.1", "n_features": 32, "samples": 6400, "batch": 64, "k": 4, "lr": 3e-3}
"""A hundred steps."""
LONG = {**SMALL, "samples": 64 * 2000}


def step_of(architecture, **settings):
    """An SAE of SAELens with random weights, a batch, and what SAELens' training step says of it."""
    kind, config = get_sae_training_class(architecture)
    sae = kind(config(d_in=16, d_sae=32, dtype="float64", **settings))
    generator = torch.Generator().manual_seed(0)
    for name, value in sae.state_dict().items():
        if value.dim():
            drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            value.copy_(drawn.abs() * 0.1 if name == "threshold" else drawn)
    x = torch.randn(50, 16, generator=generator, dtype=torch.float64)
    coefficients = {name: getattr(c, "value", c) for name, c in sae.get_coefficients().items()}
    dead = torch.arange(32) % 3 == 0
    asked = TrainStepInput(x, coefficients, dead, 0, False)
    with torch.no_grad():
        return sae.state_dict(), x, dead, sae.training_forward_pass(asked)


def close(said, *terms) -> bool:
    """Whether a step's loss is the sum of these terms, and each is SAELens' own."""
    whole = abs(float(said.loss) - sum(map(float, terms))) < 1e-5 * abs(float(said.loss))
    pairs = zip(said.losses.values(), terms, strict=True)
    return whole and all(abs(float(one) - float(term)) < 1e-5 * (1 + abs(float(one))) for one, term in pairs)


def test_the_loss_of_a_standard_sae():
    """Squared error, and the sum of activations, each as long as its decoder row, times a coefficient."""
    w, x, _, said = step_of("standard", l1_coefficient=3.0)
    f = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    x_hat = f @ w["W_dec"] + w["b_dec"]
    assert close(said, (x - x_hat).square().sum(-1).mean(), 3.0 * (f * w["W_dec"].norm(dim=-1)).sum(-1).mean())


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_the_loss_of_a_topk_sae(architecture):
    """Squared error with the k largest of each state (of a batch: k times as many as it has states), and what is left over, by features
    that are dead."""
    w, x, dead, said = step_of(architecture, k=5)
    size = w["W_dec"].norm(dim=-1)
    before = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * size
    least = (
        before.relu().flatten().sort(descending=True).values[5 * 50 - 1]
        if architecture == "batchtopk"
        else before.sort(-1).values[:, -5:-4]
    )
    f = before.relu() * (before >= least)
    assert f.count_nonzero() == 5 * 50 if architecture == "batchtopk" else (f > 0).sum(-1).max() == 5
    x_hat = f / size @ w["W_dec"] + w["b_dec"]
    n_dead, most = int(dead.sum()), 16 // 2
    among = before.masked_fill(~dead, -torch.inf)
    left = among * (among >= among.sort(-1).values[:, -min(n_dead, most), None])
    again = left.nan_to_num(0.0, 0.0, 0.0) / size @ w["W_dec"]
    assert close(said, (x - x_hat).square().sum(-1).mean(), min(n_dead / most, 1) * (again - (x - x_hat)).square().sum(-1).mean())


def test_the_loss_of_a_jumprelu_sae():
    """Squared error, and how many features are above their thresholds, times a coefficient."""
    w, x, _, said = step_of("jumprelu", l0_coefficient=2.0)
    before = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    f = before * (before > w["threshold"])
    x_hat = f @ w["W_dec"] + w["b_dec"]
    assert close(said, (x - x_hat).square().sum(-1).mean(), 2.0 * (before > w["threshold"]).sum(-1).double().mean())


@pytest.mark.parametrize("architecture", ["batchtopk", "topk", "jumprelu", "standard", "gated", "matryoshka_batchtopk"])
def test_a_training_is_saelens_own_loop(architecture, tmp_path):
    """The same batches through `SAETrainer.fit`: the same weights, bit for bit, saved as SAELens saves them."""
    more = {"k": 4} if "topk" in architecture else {}
    more |= {"matryoshka_widths": [8, 32]} if "matryoshka" in architecture else {}
    model = toy()
    found = hb.sae.train(model, TEXTS, architecture=architecture, **{k: v for k, v in SMALL.items() if k != "k"}, **more)
    assert found.steps[-1] == 100 == found.held_out_steps[-1] and len(found.steps) == 100 and len(found.loss_recovered) == 5
    learnt = [text for text in TEXTS if text not in held(found)]
    states = torch.cat([one[1:] for one in resid(model, learnt)])
    config = training.configured(found.site, 16, 32, architecture, more, {})
    trainer = training.trainer_of(config, states, samples=6400, batch=64, lr=3e-3, seed=0)
    factor = trainer.activation_scaler.scaling_factor
    shuffled = [states[training._batch(len(states), 64, step, 0)] for step in range(100)]
    assert (
        len(torch.cat([training._batch(len(states), 64, step, 0) for step in range(len(states) // 64)]).unique()) == len(states) // 64 * 64
    )
    theirs = SAETrainer(trainer.cfg, trainer.sae, iter(shuffled))
    theirs.activation_scaler.scaling_factor = factor
    theirs.fit().save_inference_model(tmp_path)
    own, mine = SAE.load_from_disk(tmp_path).state_dict(), found.attached.sae.state_dict()
    assert own.keys() == mine.keys() and all(torch.equal(own[name], mine[name]) for name in own)
    assert all(torch.equal(found.weights[name], value) for name, value in found.attached.sae.state_dict().items())


def resid(model, texts):
    """States of each text, one after the other."""
    return [
        model.run(hb.request.Request([model.encode(text)], [hb.request.Row(0)], [hb.request.Read("resid_post.1", slice(None))]))
        .readings[0]
        .values.float()
        for text in texts
    ]


def held(found):
    """The texts it was judged on: a twentieth, drawn with the seed."""
    order = torch.randperm(60, generator=torch.Generator().manual_seed(found.settings["seed"])).tolist()
    assert len(found.held_out_texts) == 3 and found.n_texts == 57
    assert [prompt.text for prompt in found.held_out_texts] == [TEXTS[i] for i in order[:3]]
    return [TEXTS[i] for i in order[:3]]


def test_it_is_judged_by_sae_report_on_texts_it_was_not_trained_on():
    model = toy()
    found = hb.sae.train(model, TEXTS, **SMALL)
    report = hb.sae_report(found.attached, held(found))
    assert (found.held_out_l0[-1], found.held_out_fvu[-1]) == (pytest.approx(report.l0), pytest.approx(report.fvu, rel=1e-6))
    assert found.loss_recovered[-1] == pytest.approx(report.loss_recovered, rel=1e-6)
    assert found.fvu[-5:].mean() < 0.8 * found.fvu[:5].mean() and found.held_out_fvu[-1] < found.held_out_fvu[0]
    frame = found.to_frame()
    assert len(frame) == 100 * (3 + len(found.losses)) + 5 * 3
    last = frame[(frame.texts == "held out") & (frame.step == 100)].set_index("metric").value
    assert last["loss recovered"] == pytest.approx(float(found.loss_recovered[-1]))
    # k features on a state in training; the mean loss is its terms
    assert (found.l0 - 4).abs().max() < 1e-6
    total = found.losses["mse_loss"] + found.losses["auxiliary_reconstruction_loss"]
    assert (found.losses["overall_loss"] - total).abs().max() < 1e-5 * total.max()


def test_a_saved_training_is_attached_again(tmp_path):
    model = toy()
    found = hb.sae.train(model, TEXTS, **SMALL)
    again = hb.SAETraining.load(found.save(tmp_path / "training"))
    with pytest.raises(ResultError, match="training.attach"):
        _ = again.attached
    assert again.attach(model).name == found.attached.name == found.sae
    found.attached.sae.save_model(tmp_path / "folder")
    assert hb.sae.attach(model, tmp_path / "folder").name == found.sae
    assert SAE.load_from_disk(tmp_path / "folder").cfg.metadata.hook_name == "blocks.1.hook_resid_post"


def test_the_model_draws_its_own_texts(monkeypatch):
    """As many tokens as were asked for, from the beginnings in turn; another seed draws others."""
    model = toy()
    monkeypatch.setattr(sae_training, "AT_ONCE", 8)
    more = {"tokens": 1200, "beginnings": ["ab", "cde"], "held_out": 0.1}
    found = hb.sae.train(model, **more, **SMALL)
    rows = -(-1200 // (64 - 4))
    assert found.n_texts + len(found.held_out_texts) == rows == 20
    prompts, texts = [model.encode("ab"), model.encode("cde")], []
    for start in (0, 8, 16):
        some = [hb.request.Row(i % 2) for i in range(start, min(start + 8, rows))]
        request = hb.request.Request(prompts, some, generate=60, sampling=hb.Sampling(start, top_k=400))
        drawn = model.run(request).tokens.tolist()
        texts += [[*prompts[row.prompt].ids, *(t for t in line if t >= 0)] for row, line in zip(some, drawn, strict=True)]
    same = hb.sae.train(model, texts, held_out=0.1, **SMALL)
    assert same.sae == found.sae and hb.sae.train(model, seed=1, **more, **SMALL).sae != found.sae


# what is kept


def interrupted(monkeypatch, model, folder, at):
    """A training that ends in the middle of a step, as by the user's hand."""
    step = SAETrainer.step

    def broken(self, batch):
        if self.n_training_steps == at:
            raise KeyboardInterrupt
        return step(self, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SAETrainer, "step", broken)
        hb.sae.train(model, TEXTS, checkpoint=folder, **SMALL)


@pytest.mark.parametrize("architecture", ["batchtopk", "topk", "jumprelu", "standard", "gated"])
def test_a_training_goes_on_with_the_same_weights(architecture, monkeypatch, tmp_path):
    model, more = toy(), {**SMALL, "architecture": architecture}
    if "topk" not in architecture:
        del more["k"]
    whole = hb.sae.train(model, TEXTS, **more)
    monkeypatch.setitem(SMALL, "architecture", architecture)
    if "topk" not in architecture:
        monkeypatch.delitem(SMALL, "k")
    seen = []
    for at in (3, 43, 88):
        interrupted(monkeypatch, model, tmp_path, at)
        seen.append(sorted(path.name for path in tmp_path.glob("*/step-*")))
    assert seen == [[], ["step-40"], ["step-85"]] and not list(tmp_path.glob("**/.*"))
    found = hb.sae.train(model, TEXTS, checkpoint=tmp_path, **SMALL)
    assert all(torch.equal(whole.weights[name], value) for name, value in found.weights.items())
    for name in ("steps", "fvu", "l0", "dead", "held_out_fvu", "held_out_l0", "loss_recovered"):
        assert torch.equal(getattr(whole, name), getattr(found, name)), name
    with monkeypatch.context() as patch:  # nothing is left to do
        patch.setattr(SAETrainer, "step", lambda *args: pytest.fail("it was done"))
        assert hb.sae.train(model, TEXTS, checkpoint=tmp_path, **SMALL).sae == whole.sae
    other = hb.sae.train(model, TEXTS, checkpoint=tmp_path, **{**SMALL, "lr": 1e-4})  # another training in the same folder
    assert other.sae != whole.sae and len(list(tmp_path.glob("*/step-*"))) == 2


def test_a_process_that_is_killed_goes_on_with_the_same_weights(tmp_path):
    script = (
        "import sys, hookbook as hb\nfrom hookbook.testing import toy\nfrom tests.unit.test_sae_training import LONG, TEXTS\n"
        "hb.sae.train(toy(), TEXTS, checkpoint=sys.argv[1], **LONG)"
    )
    folder, env = tmp_path / "kept", os.environ | {"OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen([sys.executable, "-c", script, str(folder)], env=env, stderr=subprocess.PIPE, text=True)
    while not list(folder.glob("*/step-*")):
        assert killed.poll() is None, killed.communicate()[1][-3000:]
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    last = max(int(path.name.removeprefix("step-")) for path in folder.glob("*/step-*"))
    assert killed.returncode == -signal.SIGKILL and last < 2000
    on, whole = hb.sae.train(toy(), TEXTS, checkpoint=folder, **LONG), hb.sae.train(toy(), TEXTS, **LONG)
    assert on.sae == whole.sae and all(torch.equal(on.weights[name], value) for name, value in whole.weights.items())
    assert torch.equal(on.fvu, whole.fvu) and len(on.fvu) == 200


def test_what_was_kept_and_is_broken_is_named(monkeypatch, tmp_path):
    model = toy()
    interrupted(monkeypatch, model, tmp_path, 43)
    (state,) = tmp_path.glob("*/step-40/trainer/trainer_state.pt")
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(DataError, match="step-40.*delete this folder"):
        hb.sae.train(model, TEXTS, checkpoint=tmp_path, **SMALL)


def test_everything_of_the_user_s_is_as_before(monkeypatch):
    """Random numbers, the default dtype, gradients off, inference mode; after an error as well."""
    model = toy()
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    model.model.train()
    state, python = torch.get_rng_state(), random.getstate()
    found = hb.sae.train(model, TEXTS, **SMALL)
    monkeypatch.setattr(training, "EVALUATIONS", 1)
    with torch.inference_mode():
        assert hb.sae.train(model, TEXTS, **SMALL).sae == found.sae
    with torch.no_grad():
        assert hb.sae.train(model, TEXTS, **SMALL).sae == found.sae and not torch.is_grad_enabled()
    interrupted(monkeypatch, model, None, 7)
    assert torch.equal(state, torch.get_rng_state()) and python == random.getstate()
    assert model.model.training and all(torch.equal(before[name], value) for name, value in model.model.state_dict().items())
    assert all(p.grad is None for p in model.model.parameters())
    model.model.eval()


def test_a_plan_counts_what_is_asked_of_the_model():
    model = toy()
    plan, found = hb.sae.train.plan(model, TEXTS, **SMALL), hb.sae.train(model, TEXTS, **SMALL)
    assert found.settings["cost"] == {name: getattr(plan, name) for name in found.settings["cost"]}
    assert plan.peak_bytes > 4 * 16 * found.n_tokens
    assert hb.sae.train.plan(model, tokens=1000, beginnings=["ab"], **SMALL).passes > 60


@pytest.mark.parametrize(
    ("error", "said", "change"),
    [
        (SiteError, "layers 0 to 2", {"site": "resid_post.9"}),
        (SiteError, "whole tensors", {"site": "head_z.1.0"}),
        (SiteError, "use one of embed", {"site": "attn_pattern.1"}),
        (SiteError, "use one of embed", {"site": "final_norm"}),
        (DataError, "neither texts nor tokens", {"texts": None}),
        (DataError, "give one", {"tokens": 100}),
        (DataError, "nothing is drawn", {"beginnings": ["ab"]}),
        (DataError, "samples=10", {"samples": 10}),
        (TokenError, "batch=0", {"batch": 0}),
        (TokenError, "n_features=1.5", {"n_features": 1.5}),
        (TokenError, "seed=-1", {"seed": -1}),
        (TokenError, "use a smaller one", {"seed": 1 << 40}),
        (DataError, "lr=0", {"lr": 0}),
        (DataError, "held_out=0.9", {"held_out": 0.9}),
        (DataError, "tokens to train on, in batches of 4096", {"batch": 4096, "samples": 8192}),
        (DataError, "use topk|Instead: topk", {"architecture": "topkk"}),
        (DataError, "l1_coefficient=1.*has no such setting", {"l1_coefficient": 1.0}),
        (DataError, "use topk_threshold_lr", {"topk_treshold_lr": 0.1}),
        (DataError, "d_in=3.*other arguments", {"d_in": 3}),
        (DataError, "k=33 of 32", {"k": 33}),
        (DataError, "k=True", {"k": True}),
        (DataError, "SAELens says", {"normalize_activations": "twice"}),
        (Refused, "whitening", {"normalize_activations": "covariance_whitening"}),
        (DataError, "1 texts of two tokens or more", {"texts": ["abc", "d"], "batch": 1}),
        (TokenError, "at least one", {"texts": []}),
        (TokenError, "tokens=0", {"texts": None, "tokens": 0}),
        (TokenError, "reads at most 64", {"texts": None, "tokens": 100, "beginnings": ["a" * 70]}),
        (TokenError, "give shorter ones", {"texts": None, "tokens": 100, "beginnings": ["a" * 63]}),
    ],
)
def test_bad_input_is_refused_before_any_work(error, said, change, monkeypatch, tmp_path):
    model = toy()
    monkeypatch.setattr(type(model), "forward", lambda *args, **more: pytest.fail("the model ran"))
    asked = {"texts": TEXTS, **SMALL, "checkpoint": tmp_path / "kept"} | change
    with pytest.raises(error, match=said) as found:
        hb.sae.train(model, **asked)
    assert isinstance(found.value, HookbookError) and not (tmp_path / "kept").exists()


def test_a_remote_model_is_refused_before_any_work():
    model = toy()
    model.remote = True
    for ask in (hb.sae.train, hb.sae.train.plan, hb.sae.train.submit):
        with pytest.raises(Refused, match="remote model.*load it here"):
            ask(model, TEXTS, **SMALL)
