"""The frames of all results: every column is in the table of columns, has its dtype, and means what the table says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pandas as pd
import pytest
import torch

import hookbook as hb
from hookbook.results import Result
from hookbook.show.tidy import COLUMNS, Over, column, controls, each, tidy
from hookbook.sites import SITES
from hookbook.testing import toy
from hookbook.tokens import Tokens
from tests.makers import kinds, result

KINDS = kinds()
MORE: dict[str, Callable[[Any], list[pd.DataFrame]]] = {
    "FeatureActivations": lambda made: [made.contrast(made)],
    "FeatureAttribution": lambda made: [made.top(3)],
    "KnowledgeNeurons": lambda made: [made.summary(), made.of(made.subjects[0])],
    "MLPMemories": lambda made: [made.layers_frame(), made.triggers(0, int(made.neurons[0, 0]))],
    "NeuronReport": lambda made: [made.dose(), made.activity(), made.examples(), made.promotes(), made.serves()],
    "RelationEdits": lambda made: [made.said_frame()],
}
"""Other frames of results whose columns are in the table, too."""
SHARES = {
    "accuracy",
    "faithfulness",
    "success",
    "auroc",
    "fixed",
    "kept",
    "lens",
    "described",
    "density",
    "quantile",
    "agreement",
    "changed",
    "validation",
    "zero_shot",
    "few_shot",
}
SHARES |= {"probability", "clean_probability"}


def frames(kind: str) -> list[Any]:
    made: Any = result(kind)
    return [made.to_frame(), *(frame for name, more in MORE.items() if kind.endswith(name) for frame in more(made))]


def prompts(made: Result) -> dict[str, Tokens]:
    """All prompts of a result by their texts."""
    values = [getattr(made, f.name) for f in fields(made)]
    listed = [one for value in values for one in (value if isinstance(value, tuple) else (value,))]
    return {one.text: one for one in listed if isinstance(one, Tokens)}


def within(values: Any, n: int) -> bool:
    return values.dropna().between(0, n - 1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_column_is_in_the_table_and_has_its_dtype(kind):
    for frame in frames(kind):
        assert len(frame) and list(frame.index) == list(range(len(frame))) and frame.columns.is_unique
        for name, dtype in frame.dtypes.items():
            known = column(str(name))
            assert known is not None, f"{name} is not in the table of columns"
            text = dtype == pd.Series(["a"]).dtype  # what pandas calls it
            assert text if known[0] == "str" else str(dtype) == known[0], (name, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_columns_mean_what_the_table_says(kind):
    made: Any = result(kind)
    card, texts = toy().card, prompts(made)
    for frame in frames(kind):
        for name in {"site", "target_site"} & {*frame}:
            assert {*frame[name].dropna()} <= {*SITES}
        for name in {"layer", "target_layer", "first_layer", "last_layer"} & {*frame}:
            assert within(frame[name], card.n_layers) and (kind == "Steering" or frame[name].notna().all())
        if "prompt" in frame:
            assert {*frame.prompt} == {*texts} or {*frame.prompt} < {*texts}
        if "position" in frame and "prompt" in frame:
            for text, at in zip(frame.prompt, frame.position, strict=True):
                assert 0 <= at < len(texts[text])
        if "position_token" in frame:
            want = [texts[text].strings[at] for text, at in zip(frame.prompt, frame.position, strict=True)]
            assert frame.position_token.tolist() == want
        if "rank" in frame and "logprob" in frame:
            k = made.token_ids.shape[-1]
            assert frame["rank"].tolist() == [*range(k)] * (len(frame) // k)
            falls = frame.logprob.diff()[frame["rank"] > 0]
            assert (falls <= 1e-6).all()
        for name in frame.filter(regex="^(own_|control_|random_)?logprob"):
            assert (frame[name] <= 1e-6).all(), name
        for name in SHARES & {*frame}:
            assert frame[name].dropna().between(0, 1 + 1e-9).all(), name
        for name in frame.filter(regex="^control "):
            assert frame[name].dropna().between(0, 1).all(), name
        for name in {"kl", "random_kl"} & {*frame}:
            assert (frame[name].dropna() >= -1e-6).all()
        if "vector" in frame:
            assert {*frame.vector} == {"none", "vector", "random"} and frame.site.isna().equals(frame.vector == "none")
        if "head" in frame:
            assert within(frame["head"], card.n_heads)
        if "control" in frame:
            assert frame.control.iloc[0] in ("patch", "edge", "largest", "neuron", "effective", "own")


@pytest.mark.hooked
def test_the_table_has_no_names_that_no_frame_has():
    names = [kind if isinstance(kind, str) else kind.values[0] for kind in KINDS]
    seen = {str(name) for kind in names for frame in frames(str(kind)) for name in frame}
    used = {key for key in COLUMNS for name in seen if column(name) is COLUMNS[key]}
    assert {*COLUMNS} - used == {"target_unit"}  # of heads and neurons, see below


def test_names_with_braces_are_of_anything_and_of_nothing_else():
    assert column("logprob") == COLUMNS["logprob"] and column("logprob  Paris") == COLUMNS["logprob {token}"]
    assert column("said composed") == COLUMNS["said {name}"] and column("said") == COLUMNS["said"]
    assert column("control") == COLUMNS["control"] and column("control random heads") == COLUMNS["control {name}"]
    for name in ("mine", "prompt 3", "rank{token}", "control_random x", ""):
        assert column(name) is None, name


def test_a_frame_has_a_row_for_each_cell():
    sites = [hb.Site("resid_post", 2), hb.Site("embed"), None]
    numbers = torch.arange(6.0).view(2, 3)
    frame = tidy(
        {"prompt": [toy().encode("ab"), toy().encode("c")], "site strength": [(site, 0.5) for site in sites]},
        score=numbers,
        kl=Over("site", numbers[0]),
        text=Over("prompt", ("x", "y")),
        mine=Over("", torch.tensor(7)),
        none=None,
        **each("logprob", ["p", "q"], "prompt", -numbers[:, :2]),
        **controls({"random": 0.25}),
    )
    assert (
        frame.prompt.tolist() == ["ab"] * 3 + ["c"] * 3
        and frame.site.tolist()[:2] == ["resid_post", "embed"]
        and frame.site.isna().sum() == 2
    )
    assert frame.layer.tolist()[0] == 2 and frame.layer.isna().sum() == 4 and frame.layer.dtype == "Int64"
    assert (
        frame.score.tolist() == [0, 1, 2, 3, 4, 5] and frame.kl.tolist() == [0, 1, 2] * 2 and frame.text.tolist() == ["x"] * 3 + ["y"] * 3
    )
    assert frame.mine.tolist() == [7] * 6 and "none" not in frame and frame["logprob q"].tolist() == [-1] * 3 + [-4] * 3
    assert frame["control random"].tolist() == [0.25] * 6 and "unit" not in frame


def test_a_head_is_the_unit_of_its_site():
    frame = tidy(
        {"site target_site": [(hb.Site("head_z", 1, 3), hb.Site("resid_pre", 2)), (hb.Site("head_z", 0), hb.Site("mlp_act", 0, 5))]}
    )
    assert list(frame) == ["site", "layer", "unit", "target_site", "target_layer", "target_unit"]
    assert frame.fillna(-1).values.tolist() == [["head_z", 1, 3, "resid_pre", 2, -1], ["head_z", 0, -1, "mlp_act", 0, 5]]


def test_a_frame_without_rows_keeps_its_columns():
    frame = tidy({"feature": []}, activation=torch.empty(0), label=[], mine=[])
    assert list(frame) == ["feature", "activation", "label", "mine"] and frame.empty and frame.feature.dtype == "Int64"


def test_values_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="column 'score' has 2 values over prompt, which have 3 places"):
        tidy({"prompt": ["a", "b", "c"]}, score=torch.zeros(2))
