"""What neurons see on many texts, and what they write: contexts, quantiles with how many tokens they rest on, and the words that they
promote."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hookbook.adapter import Adapter
from hookbook.tokens import Tokens


def first_half(tokens: Tokens) -> Tokens:
    """A text up to its middle, so that its next token is open."""
    n = min(len(tokens), len(tokens) // 2 + 1)
    text = tokens.text[: tokens.offsets[n - 1][1]] if tokens.offsets else "".join(tokens.strings[:n])
    return replace(tokens, text=text, ids=tokens.ids[:n], strings=tokens.strings[:n], offsets=tokens.offsets and tokens.offsets[:n])


def quantiles(values: Tensor, levels: Sequence[float]) -> Tensor:
    """`[neuron, level]` of values `[t, neuron]`, between two of them by a straight line."""
    return torch.stack([torch.quantile(column, torch.tensor(levels, dtype=values.dtype)) for column in values.T])


def beyond(levels: Sequence[float], n: int) -> list[int]:
    """On how many of `n` tokens a quantile rests: those on its rarer side, it among them."""
    places = [level * (n - 1) for level in levels]
    return [math.floor(place) + 1 if 2 * place < n - 1 else n - math.ceil(place) for place in places]


def examples(values: Tensor, where: Sequence[Sequence[int]], prompts: Sequence[Tokens], k: int, context: int) -> tuple[Tensor, ...]:
    """The tokens on which one neuron is highest and lowest, at most one of a text each way.

    Args:
        values: `[t]`: its activations, text after text.
        where: The tokens of each text that they are of.
        prompts: The texts.
        k: How many of each.
        context: How many tokens before and after.

    Returns:
        Of `e` examples, the highest first and then the lowest: texts, positions and activations `[e]`, token ids and activations around
        them `[e, 2 * context + 1]`; there -1 is no token, and a token that was not looked at has 0.
    """
    each = values.split([len(some) for some in where])
    found = []
    for sign in (1, -1):
        best = torch.stack([(sign * some).max() if len(some) else some.new_tensor(-math.inf) for some in each])
        found += [(i, sign) for i in best.argsort(descending=True, stable=True)[:k].tolist() if best[i] > -math.inf]
    texts, positions, activations, ids, near = [], [], [], [], []
    for i, sign in found:
        at = int((sign * each[i]).argmax())
        middle = where[i][at]
        known = dict(zip(where[i], each[i].tolist(), strict=True))
        around = range(middle - context, middle + context + 1)
        texts.append(i)
        positions.append(middle)
        activations.append(each[i][at])
        ids.append([prompts[i].ids[p] if 0 <= p < len(prompts[i]) else -1 for p in around])
        near.append([known.get(p, 0.0) for p in around])
    shape = (len(found), 2 * context + 1)
    return (
        torch.tensor(texts, dtype=torch.long),
        torch.tensor(positions, dtype=torch.long),
        torch.stack(activations),
        torch.tensor(ids, dtype=torch.long).view(shape),
        torch.tensor(near, dtype=values.dtype).view(shape),
    )


def written(adapter: Adapter, layer: int, neurons: Tensor) -> tuple[Tensor, Tensor]:
    """What neurons of a layer add to the stream for each unit of activation, `[m, d_model]`: their rows of the output projection, and the
    same through the norm after the MLP, if there is one, but for the scale that this has at a token, which all neurons share."""
    project, norm = adapter.writer("mlp_act", layer)
    one = torch.nn.functional.one_hot(neurons, adapter.card.d_mlp).to(getattr(torch, adapter.card.dtype))
    with torch.no_grad():
        values = project(one) - project(torch.zeros_like(one[:1]))
        return values, values if norm is None else norm(values) * values.float().pow(2).mean(-1, keepdim=True).sqrt().to(values.dtype)


def through_norms(adapter: Adapter, values: Tensor) -> Tensor:
    """Directions of the stream through the final norm, without its bias."""
    with torch.no_grad():
        return adapter.final_norm(values) - adapter.final_norm(torch.zeros_like(values))


def promoted(adapter: Adapter, values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The words that directions of the stream `[m, d_model]` promote most and least: ids and logits `[m, 2, k]`, without biases."""
    with torch.no_grad():
        logits = (adapter.unembed(values) - adapter.unembed(torch.zeros_like(values[:1]))).float()
    both = torch.stack([logits, -logits], 1).topk(min(k, adapter.card.d_vocab))
    return both.indices, both.values * torch.tensor([1.0, -1.0])[:, None]
