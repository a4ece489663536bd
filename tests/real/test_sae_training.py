"""A minute's training on a real model, and states as sums of few features: the SAE that ships, beside its controls."""

from __future__ import annotations

import hookbook as hb
from tests.support.real import real


def test_a_short_training_gives_an_sae_that_fits():
    model = real("gemma-3-270m")
    french, english = map(list, hb.tasks.contrast("language_french"))
    training = hb.sae.train(
        model, french + english, site="resid_post.9", n_features=512, k=20, samples=51_200, batch=512, lr=1e-3, progress=False
    )
    assert training.loss_recovered[-1] > 0.5 and training.held_out_fvu[-1] < 0.5
    assert training.held_out_fvu[-1] < training.held_out_fvu[0] and training.fvu[-1] < 0.5 * training.fvu[0]


def test_few_features_explain_more_of_a_state_than_random_directions():
    sae = hb.sae.attach(real("gemma-3-270m"), hb.sae.demo())
    found = hb.sparse_coding(sae, hb.tasks.openings("news")[:40], ks=[1, 4, 16], states=64)
    assert (found.explained > found.random + 0.1).all() and (found.explained.diff() > 0).all()
