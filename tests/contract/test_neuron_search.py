"""Neurons that tell texts apart, on every adapter: areas by comparing every pair of texts, shuffled classes, and a planted neuron."""

from __future__ import annotations

import pytest
import torch

import hookbook as hb
from hookbook.errors import DataError, SiteError
from hookbook.testing import toy

POSITIVE = ["ab abc", "a big cab", "bab", "abba ab", "cab", "abacab"]
NEGATIVE = ["xyz", "why zoo", "yo yo", "zz top x", "oxy", "foxy"]
DIGITS = ["12 3", "99", "1234", "55 555"]


def mean_acts(case, text: str) -> torch.Tensor:
    """`[layer, neuron]` over a text's tokens but BOS, of a plain run."""
    tokens = case.adapter.encode(text)
    sites = [hb.Site("mlp_act", layer) for layer in range(case.adapter.card.n_layers)]
    found = case.plain(tokens.ids, (), tuple(sites))[1]
    first = int(tokens.ids[0] == case.adapter.tokenizer.bos_token_id)
    return torch.stack([found[site][first:].mean(0) for site in sites]).double()


def area(first: list[torch.Tensor], second: list[torch.Tensor]) -> torch.Tensor:
    """Pair by pair."""
    wins = [(a > b).double() + 0.5 * (a == b).double() for a in first for b in second]
    return torch.stack(wins).mean(0)


def test_areas_are_those_of_all_pairs_of_texts(case):
    found = hb.find_neurons(case.adapter, POSITIVE, NEGATIVE, others={"digits": DIGITS}, seed=2)
    sets = [[mean_acts(case, text) for text in texts] for texts in (POSITIVE, NEGATIVE, DIGITS)]
    assert found.settings["texts"] == [3, 3, 3, 3, 2, 2]
    for means, some in zip((found.positive_means, found.negative_means, found.other_means[0]), sets, strict=True):
        assert (means - torch.stack(some).mean(0)).abs().max() < 1e-6

    # every choice of halves of the positive and negative texts that the areas could be of; pairs stay together
    def halves(n: int, size: int):
        return [some for some in torch.combinations(torch.arange(n), size).tolist()]

    def near(a: torch.Tensor, b: torch.Tensor) -> bool:
        return bool(((a - b).abs() < 1e-9).double().mean() > 0.97)  # equal but for rounding

    matches = [
        some
        for some in halves(6, 3)
        if near(found.auroc, area([sets[0][i] for i in some], [sets[1][i] for i in some]))
        and near(found.validation, *[area(*[[part[i] for i in range(6) if i not in some] for part in sets[:2]])])
    ]
    assert len(matches) == 1
    (kept,) = matches
    rest = [i for i in range(6) if i not in kept]
    for own, values in ((kept, found.other_auroc[0]), (rest, found.other_validation[0])):
        assert any(near(values, area([sets[0][i] for i in own], [sets[2][i] for i in some])) for some in halves(4, 2))
    least = torch.stack([found.validation, found.other_validation[0]])
    score = torch.where(found.validation >= 0.5, least, 1 - least).amin(0)
    assert torch.equal(found.score, score)
    order = score.flatten().argsort(descending=True, stable=True)[:5].tolist()
    assert found.best(5) == [f"mlp_act.{i // score.shape[1]}.{i % score.shape[1]}" for i in order]


def noise(n: int, seed: int) -> list[str]:
    """Texts of random letters."""
    drawn = torch.randint(27, (n, 12), generator=torch.Generator().manual_seed(seed))
    return ["".join("abcdefghijklmnoprstuvwxyz -"[i] for i in line) for line in drawn.tolist()]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_planted_neuron_is_among_the_first_whichever_way_it_goes(sign):
    """One that reads the difference of what its MLP is given in texts with and without the letter q."""
    adapter, without = toy(), noise(20, 1)
    texts = [text[:3] + "qqqqqq" + text[9:] for text in noise(20, 0)]
    read = [hb.request.Read("mlp_in.1", slice(1, None))]

    def state(text: str) -> torch.Tensor:
        return adapter.run(hb.request.Request([adapter.encode(text)], [hb.request.Row(0)], read)).readings[0].values.mean(0)

    apart = torch.stack([state(text) for text in texts]).mean(0) - torch.stack([state(text) for text in without]).mean(0)
    before = hb.find_neurons(adapter, texts, without)
    with torch.no_grad():
        adapter.model.blocks[1].mlp[0].weight[5] = 50 * sign * apart
        adapter.model.blocks[1].mlp[0].bias[5] = 0 if sign > 0 else 1000  # GELU leaves little of what is below 0
    found = hb.find_neurons(adapter, texts, without)
    assert found.score[1, 5] >= 0.95 and found.held_out[1, 5] > before.held_out[1, 5] + 0.2
    assert "mlp_act.1.5" in found.best(24) and found.told.double().mean() < 0.3
    assert (found.positive_means[1, 5] > found.negative_means[1, 5]) == (sign > 0)


def test_shuffled_classes_say_what_chance_gives():
    found = hb.find_neurons(toy(), noise(20, 0), noise(20, 1))
    assert found.shuffled.shape == (20, 2)
    assert found.shuffled[:, 0].mean() > 0.7 and abs(float(found.shuffled[:, 1].mean()) - 0.5) < 0.1, "judged on the other half"
    assert abs(found.best_held_out() - 0.5) < 0.15 and not found.told.any()


def test_what_is_found_is_listed_and_drawn():
    found = hb.find_neurons(toy(), POSITIVE, NEGATIVE, others={"digits": DIGITS})
    frame = found.to_frame(10)
    assert [f"mlp_act.{row.layer}.{row.unit}" for row in frame.itertuples()] == found.best(10)
    assert {"validation", "auroc", "control digits", "mean_activation", "other_mean_activation"} < {*frame}
    heights = [patch.get_width() for patch in found.plot().patches]
    assert sorted(heights) == sorted(found.told.sum(1).tolist())


@pytest.mark.parametrize(
    ("more", "error", "match"),
    [
        ({"positive": []}, DataError, "positive"),
        ({"negative": POSITIVE}, DataError, "the same"),
        ({"positive": POSITIVE[:3]}, DataError, "3 texts in the set 'positive'"),
        ({"others": {"digits": DIGITS[:2]}}, DataError, "2 texts in the set 'digits'"),
        ({"others": {"negative": DIGITS}}, DataError, "other names"),
        ({"held_out": 0.95}, DataError, "none is left"),
        ({"others": {"some": [*DIGITS[:3], POSITIVE[0]]}}, DataError, "both classes"),
        ({"layers": ["mlp_act.0.3"]}, SiteError, "all neurons"),
        ({"layers": ["resid_post.0"]}, SiteError, "resid_post.0"),
        ({"held_out": 0.0}, DataError, "held_out"),
        ({"held_out": 1.0}, DataError, "held_out"),
    ],
)
def test_bad_input_is_refused_before_work(more, error, match, monkeypatch):
    adapter = toy()
    monkeypatch.setattr(type(adapter), "forward", lambda *args, **kwargs: pytest.fail("something ran"))
    with pytest.raises(error, match=match):
        hb.find_neurons(adapter, **{"positive": POSITIVE, "negative": NEGATIVE} | more)
