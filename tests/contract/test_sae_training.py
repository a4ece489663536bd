"""Training an SAE on every adapter, given the raw model: on the model's states at its site, and nothing of the user's is changed."""

from __future__ import annotations

import pytest
import torch

import hookbook as hb

TEXTS = ["a prompt", "another, longer", "and one more", "x y", "the last of them"]


def hooks(module: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in module.modules())


@pytest.mark.parametrize("name", ["resid_post", "head_z", "mlp_act"])
def test_an_sae_is_trained_on_the_model_s_own_states(case, name):
    """With a rate of nearly nothing an SAE stays what it begins as, and its decoder's bias is the mean state: of every token that is not
    special, of the texts that are not held out."""
    adapter, site = case.adapter, hb.Site(name, 1)
    raw, tokenizer = (adapter, adapter.tokenizer) if case.name == "toy" else (adapter.model, adapter.tokenizer)
    model = raw if case.name == "toy" else hb.wrap(raw, tokenizer)
    module = adapter.module
    hb.logit_lens(model, TEXTS[0])  # at its first pass a TransformerBridge puts hooks of its own
    before = {key: value.clone() for key, value in module.state_dict().items()}
    mode, n_hooks, special, side = module.training, hooks(module), tokenizer.all_special_ids, tokenizer.padding_side
    found = hb.sae.train(model, TEXTS, site=site, n_features=24, samples=64, batch=8, k=4, lr=1e-9, held_out=0.2)
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    assert (module.training, hooks(module), tokenizer.padding_side) == (mode, n_hooks, side)
    assert len(found.held_out_texts) == 1 and found.n_texts == 4 and found.attached.site == site
    held = TEXTS[torch.randperm(5, generator=torch.Generator().manual_seed(0)).tolist()[0]]
    states = []
    for text in TEXTS:
        ids = adapter.encode(text).ids
        if text != held:
            states += [x for x, token in zip(case.plain(ids, (), (site,))[1][site], ids, strict=True) if token not in special]
    assert found.n_tokens == len(states)
    mean = torch.stack(states).mean(0)
    assert (found.weights["b_dec"].double() - mean).abs().max() < 1e-5 * (1 + mean.abs().max())
    report = hb.sae_report(hb.sae.attach(model, found.attached.sae), [held])
    assert float(found.loss_recovered[-1]) == pytest.approx(report.loss_recovered)
