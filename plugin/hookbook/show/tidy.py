"""Long and tidy frames, and what their columns mean: a name means one thing in the frames of all results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hookbook.sites import Site
from hookbook.tokens import Tokens

if TYPE_CHECKING:
    import pandas as pd

COLUMNS: dict[str, tuple[str, str]] = {
    # where
    "prompt": ("str", "the text of the prompt"),
    "position": ("int64", "a token of the prompt: its index, from 0, in the prompt's own tokens"),
    "position_token": ("str", "the text of the token at `position`"),
    "place": ("str", "a token of each prompt, by a rule or a name: `-1`, `last`, `bridge`"),
    "site": ("str", "the name of a tensor, without its layer; nothing if there is none"),
    "layer": ("Int64", "the block of `site`, or of the block's output where no site is named, from 0; nothing if no block has it"),
    "unit": ("Int64", "a head or a neuron of `site`; no column if whole tensors are meant"),
    "target_site": ("str", "as `site`, of what is written where something else is read"),
    "target_layer": ("Int64", "as `layer`, of what is written"),
    "target_unit": ("Int64", "as `unit`, of what is written"),
    "first_layer": ("Int64", "the first of a window of layers; `layer` is its centre"),
    "last_layer": ("Int64", "the last of it"),
    "head": ("int64", "a head of attention, from 0"),
    "dimension": ("int64", "which number of a vector, from 0"),
    # what was said
    "rank": ("int64", "the rank of `token` among the likeliest; 0 is the likeliest"),
    "token": ("str", "the text of a token that may come next"),
    "logprob": ("float64", "its log-probability in nats; of `text`, where that is all there is, the sum over its tokens"),
    "logprob {token}": ("float64", "the log-probability of a token that was asked for"),
    "rank {token}": ("int64", "its rank; 0 is the likeliest"),
    "change {token}": ("float64", "by how much its log-probability grows"),
    "logit_change {token}": ("float64", "by how much its logit grows"),
    "language {name}": ("float64", "the log-probability of all tokens of a language together"),
    "text": ("str", "what was generated"),
    "own_token": ("str", "the likeliest next token of the model itself"),
    "own_logprob": ("float64", "the log-probability that the model itself gives `token`"),
    "source_token": ("str", "the likeliest next token of the source prompt by itself"),
    "plain_token": ("str", "the likeliest next token without the change"),
    "control_token": ("str", "the token of the same rank without an edit"),
    "control_logprob": ("float64", "as `logprob`, without an edit"),
    "control_logprob {token}": ("float64", "as `logprob {token}`, without an edit"),
    "control_text": ("str", "what is generated without an edit"),
    "random_token": ("str", "the token of the same rank with a random direction of the same length"),
    "random_logprob": ("float64", "its log-probability"),
    "random_logprob {token}": ("float64", "as `logprob {token}`, with the random direction"),
    "random_text": ("str", "what is generated with the random direction"),
    "probability": ("float64", "the mean probability of the first token of what is looked for"),
    "clean_probability": ("float64", "the same without an edit"),
    "entropy": ("float64", "of the next token's distribution, in nats"),
    "kl": ("float64", "the divergence in nats of the next token's distribution from the model's own to the one of this row"),
    "random_kl": ("float64", "the same with noise of the edit's length"),
    "precision": ("boolean", "whether the likeliest token is the source prompt's own; nothing if the vocabularies differ"),
    "surprisal": ("float64", "minus the log-probability that the source prompt's own run gives to the likeliest token, in nats"),
    "score": ("float64", "what the recipe was asked to measure of the next token or the text"),
    # what was done
    "vector": ("str", "what was added: the `vector`, a `random` one of its length, or `none`"),
    "control": ("str", "what was done: the method itself, by its name (`patch`, `edge`), or a control"),
    "control {name}": ("float64", "a control: what the frame measures (`accuracy`, `faithfulness`, `success`, `auroc`) with that instead"),
    "strength": ("float64", "how much of it, in the recipe's measure"),
    "dose": ("float64", "what a neuron is set to"),
    "matrix_rank": ("int64", "the rank of the matrix that was inverted"),
    "beta": ("float64", "the factor of the relation's matrix"),
    "edge": ("str", "the attention that is cut: from whom to what"),
    "task": ("str", "the name of a task"),
    # how well it works
    "validation": ("float64", "what the frame measures, on the data that choose the site"),
    "accuracy": ("float64", "the share of test queries that are answered"),
    "zero_shot": ("float64", "the same without the vector"),
    "few_shot": ("float64", "the same with examples in the prompt instead"),
    "faithfulness": ("float64", "the share of known test objects that the map says"),
    "known": ("int64", "how many of the test objects the model says itself"),
    "asked": ("int64", "how many test objects there are"),
    "success": ("float64", "the share of test changes after which the model says the other answer"),
    "auroc": ("float64", "how often the number of a text of one class is above that of a text of the other; 0.5 by chance"),
    "indirect_effect": ("float64", "by how much a head alone raises the answer's probability, in the mean"),
    "fixed": ("float64", "the share of questions that were not answered, and now are"),
    "kept": ("float64", "the share of questions that were answered, and still are"),
    "n": ("int64", "of how many questions these are shares and means"),
    "lens": ("float64", "the share of questions whose `name` is likeliest by the logit lens"),
    "described": ("float64", "the share whose `name` is in the model's description of the state"),
    "ablation": ("float64", "the mean log-odds of the tokens on positive prompts without the direction"),
    "addition": ("float64", "the mean log-odds on negative prompts with the direction added"),
    "discarded": ("str", "why a candidate is out; empty if it is not"),
    # vectors
    "norm": ("float64", "the length of the vector"),
    "positive_norm": ("float64", "the mean length of the states of positive texts"),
    "negative_norm": ("float64", "of those of negative texts"),
    "mean_norm": ("float64", "the length of the mean difference"),
    "matrix_norm": ("float64", "the Frobenius norm of a Jacobian"),
    "input_norm": ("float64", "the length of the state of which it is the derivative"),
    "product_norm": ("float64", "the length of the Jacobian times this state"),
    "output_norm": ("float64", "the length of the output"),
    "mean_cosine": ("float64", "the cosine of the vector and the mean difference"),
    # features of an SAE
    "feature": ("Int64", "the number of a feature; nothing in rows that are of none"),
    "label": ("str", "what it was said to be about, where somebody did"),
    "link": ("str", "its page on Neuronpedia, if the release has them"),
    "activation": ("float64", "its activation in the plain run, or the neuron's"),
    "feature_rank": ("int64", "its rank among the features of a token; 0 is the most active"),
    "mean_activation": ("float64", "the mean over the tokens that were read"),
    "density": ("float64", "the share of these on which it is active"),
    "other_mean_activation": ("float64", "as `mean_activation`, on the other texts"),
    "other_density": ("float64", "as `density`, on the other texts"),
    "difference": ("float64", "`mean_activation` less `other_mean_activation`"),
    "example": ("int64", "which example of a feature; 0 has the largest activation"),
    "context": ("str", "the tokens around, with the one that is meant «marked»"),
    "text_index": ("int64", "which of the texts that were read, from 0"),
    "coefficient": ("float64", "by what a feature's decoder row is multiplied in the sum"),
    "share": ("float64", "the part of the vector's squared length that the feature explains"),
    "cosine": ("float64", "of a feature's decoder row and the vector"),
    "gradient": ("float64", "the derivative of the metric by the activation"),
    "attribution": ("float64", "activation times gradient"),
    "effect": ("float64", "by how much what is measured falls without the feature or token of the row; NaN if it was not measured"),
    "part": ("str", "what adds to the sum: a `feature`, or what is beside features"),
    "contribution": ("float64", "how much it adds, in logits"),
    "says": ("str", "the likeliest tokens of the part alone"),
    "directions": ("str", "of what sums are made: an SAE's `features`, or a control"),
    "k": ("int64", "how many directions are summed, or neurons are taken out"),
    "quantile": ("float64", "which quantile of a neuron's activations, as a share of all tokens"),
    "beyond": ("int64", "on how many tokens a quantile rests: those at least as far out"),
    "next_token": ("str", "the token that comes next in the text"),
    "norm_token": ("str", "the word that a row of the output projection promotes most through the norms that the model applies"),
    "value_rank": ("int64", "the rank of `next_token` among the words that the row promotes; 0 is the first; of a layer the median"),
    "agreement": ("float64", "the share of neurons whose row promotes most what comes next after their first trigger"),
    "through": ("str", "how a row of the output projection is read: as it is (`raw`), or through the `norms` that the model applies"),
    "end": ("str", "whether what is listed is promoted `most` or `least`"),
    "changed": ("float64", "the share of prompts after which the likeliest token is another"),
    "explained": ("float64", "the share of a state's squared length, less the mean state, that the sum explains, in the mean"),
    "step": ("int64", "after how many steps of the training"),
    "texts": ("str", "what was looked at: a batch in `training`, or what was `held out`"),
    # questions, facts, numbers
    "chain": ("str", "the two relations of a question"),
    "entity": ("str", "what the first relation is asked of"),
    "bridge": ("str", "its object, of which the second is asked"),
    "answer": ("str", "the object of that"),
    "composed": ("bool", "whether the question in two hops is answered"),
    "first": ("bool", "whether its first hop is"),
    "second": ("bool", "whether its second hop is"),
    "entity_shortcut": ("bool", "whether the answer comes without the entity's name"),
    "relation_shortcut": ("bool", "whether it comes without the first relation"),
    "said {name}": ("str", "the likeliest next token of that question"),
    "name": ("str", "what is looked for"),
    "subject": ("str", "of whom a relation is asked"),
    "object": ("str", "what the model says of it"),
    "wanted": ("str", "what it should say instead"),
    "said": ("str", "what it said"),
    "right": ("bool", "whether that is what is wanted"),
    "split": ("str", "whether it chose something (`validation`) or not (`test`)"),
    "metric": ("str", "what was measured"),
    "value": ("float64", "the number of the row's `metric` or `dimension`"),
    "verdict": ("str", "what is wrong with it; empty if nothing is"),
    "meaning": ("str", "what it is"),
}
"""Of every column of a result's frame its dtype and what it means. What stands in braces is a name of the result's own; nothing
is written `NaN` or `<NA>`."""


def column(name: str) -> tuple[str, str] | None:
    """Dtype and meaning of a column, such as `logprob` or, of a token that was asked for, `logprob  Paris`; None of one that is not
    hookbook's."""
    first = name.partition(" ")[0]
    return COLUMNS.get(name) or next((COLUMNS[key] for key in COLUMNS if name != first and key.startswith(f"{first} {{")), None)


class Over(NamedTuple):
    """Values over some axes only, in the order of the axes; they are repeated over the others."""

    axes: str
    """Names, with spaces between."""
    values: Any


def each(name: str, keys: Sequence[str], over: str, values: Tensor) -> dict[str, Over]:
    """Columns `name key`: one for each place of the last axis of values `[*over, key]`."""
    return {f"{name} {key}": Over(over, values[..., at]) for at, key in enumerate(keys)}


def controls(values: Mapping[str, Any]) -> dict[str, Any]:
    """Columns `control NAME`, of values by name."""
    return {f"control {name}": one for name, one in values.items()}


def at_tokens(prompts: Sequence[Tokens], rows: Tensor, positions: Tensor) -> list[tuple[Tokens, int, str]]:
    """Labels of an axis `prompt position position_token`: of each place `[m]` its prompt, its token's index and its text."""
    return [(prompts[row], at, prompts[row].strings[at]) for row, at in zip(rows.tolist(), positions.tolist(), strict=True)]


def spelled(ids: Tensor, vocab: Mapping[int, str]) -> list[str]:
    """The texts of token ids, in their order."""
    return [vocab[i] for i in ids.flatten().tolist()]


def tidy(axes: Mapping[str, Sequence[Any] | int], /, **columns: Any) -> pd.DataFrame:
    """One row for each cell of the product of named axes, the last one changing fastest.

    Args:
        axes: Of each axis its labels, which are a column; or how many places it has, which are counted from 0. An axis called by several
            words has as many columns, and a tuple of labels at each place; elsewhere its first word is its name.
        columns: By name numbers or texts, as tensors or nested sequences: over all axes, or `Over` some; one alone is everywhere; None
            is no column.

    Of prompts the text is kept. Sites give two columns, the tensor's name and `layer` (of `target_site`, `target_layer`), and a third,
    `unit`, if single heads or neurons are among them. Columns of `COLUMNS` get their dtype.

    Example:
        >>> sites = [Site("resid_post", 0), Site("resid_post", 1)]
        >>> tidy({"site": sites, "rank": 2}, logprob=torch.tensor([[-1.0, -2.0], [-3.0, -4.0]]), kl=Over("site", [0.5, 0.25]))
                 site  layer  rank  logprob    kl
        0  resid_post      0     0     -1.0  0.50
        1  resid_post      0     1     -2.0  0.50
        2  resid_post      1     0     -3.0  0.25
        3  resid_post      1     1     -4.0  0.25
    """
    import pandas as pd

    sizes = {names.split()[0]: labels if isinstance(labels, int) else len(labels) for names, labels in axes.items()}
    cells: dict[str, Any] = {}
    for name, given in [*_labels(axes), *columns.items()]:
        over, values = given if isinstance(given, Over) else Over(" ".join(sizes), given)
        if values is not None:
            cells |= _columns(name, _spread(name, _flat(values), over.split(), sizes))
    return pd.DataFrame({name: pd.Series(values, dtype=_dtype(name, values)) for name, values in cells.items()})


def _labels(axes: Mapping[str, Sequence[Any] | int]) -> Iterator[tuple[str, Over]]:
    """The columns of axes, each over its own."""
    for names, labels in axes.items():
        first, *more = names.split()
        rows = [(label,) for label in (range(labels) if isinstance(labels, int) else labels)] if not more else labels
        assert not isinstance(rows, int)
        yield from ((name, Over(first, [row[at] for row in rows])) for at, name in enumerate((first, *more)))


def _flat(values: Any) -> list[Any]:
    if isinstance(values, Tensor):
        return values.flatten().tolist()
    return [x for one in values for x in _flat(one)] if isinstance(values, (list, tuple)) else [values]


def _spread(name: str, values: list[Any], over: list[str], sizes: Mapping[str, int]) -> list[Any]:
    """Values over some axes, in every row; one alone is everywhere."""
    own = [size if axis in over else 1 for axis, size in sizes.items()]
    if len(values) != prod(own):
        if len(values) != 1:
            raise ValueError(f"column {name!r} has {len(values)} values over {' '.join(over)}, which have {prod(own)} places")
        own = [1] * len(own)
    at = torch.arange(len(values)).view(own).expand(*sizes.values())
    return [values[i] for i in at.flatten().tolist()]


def _columns(name: str, values: list[Any]) -> dict[str, list[Any]]:
    """Values as they are written: of prompts the text, of sites the parts of their names."""
    if not any(isinstance(value, Site) for value in values):
        return {name: [value.text if isinstance(value, Tokens) else value for value in values]}
    parts = {"site": "name", "layer": "layer", "unit": "unit"}
    made = {f"{name.removesuffix('site')}{part}": [getattr(value, of, None) for value in values] for part, of in parts.items()}
    return {key: column for key, column in made.items() if not key.endswith("unit") or any(x is not None for x in column)}


def _dtype(name: str, values: list[Any]) -> str | None:
    """What pandas is told: nothing of texts, which it knows better, and of names that are not hookbook's."""
    kind, _ = column(name) or (None, "")
    return ("object" if not values else None) if kind in ("str", None) else kind
