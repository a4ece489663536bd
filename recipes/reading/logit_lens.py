"""The logit lens: what the final norm and the unembedding say about every layer's state.

It is the patchscope whose target is the source prompt itself and whose target layer is the last: the state skips every
block above it. It shows which tokens a state is already close to, not what later blocks would make of it. With words in
several languages it shows which language these tokens are of.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hookbook.adapter import Adapter
from hookbook.asking import encode_prompts, wanted_ids, wanted_words
from hookbook.errors import DataError, SiteError, TokenError, check_counts, check_prompt
from hookbook.recipe import ModelCard, later, recipe, wrap
from hookbook.request import Each, Read, Request, Row
from hookbook.results import Axes, DataFrame, Result, View
from hookbook.show.cells import grid_sections
from hookbook.show.plots import Cells, heat_map, lines, samples, site_labels
from hookbook.show.text import ending
from hookbook.show.tidy import Over, each, spelled, tidy
from hookbook.sites import Site, layers_to_sites
from hookbook.tokens import Position, Tokens, beginnings, resolve, vocabulary, words

SITES = ("embed", "resid_pre", "attn_out", "mlp_out", "resid_post")
"""What is in the stream, or added to it. The output of the final norm is not: it would be normed twice."""


@dataclass(frozen=True, eq=False)
class LogitLens(Result):
    """What the final norm and the unembedding say of states: `n` rows, each a prompt and a token of it, and the `k` likeliest tokens."""

    card: ModelCard
    prompts: tuple[Tokens, ...]
    """The prompts as the model saw them."""
    rows: tuple[tuple[int, int], ...]
    """`[n]`: which prompt, and which token of it was read."""
    sites: tuple[Site, ...]
    vocab: dict[int, str]
    """The text of every token id in this result."""
    token_ids: Tensor
    """`[n, site, k]`"""
    logprobs: Tensor
    """`[n, site, k]` in nats."""
    own_logprobs: Tensor
    """`[n, site, k]`: what the model itself, at the end of its stream, gives these tokens."""
    entropy: Tensor
    """`[n, site]` in nats (divide by ln 2 for bits)."""
    kl: Tensor
    """`[n, site]`: KL(model || lens) in nats, the divergence of the model's own next-token distribution from the lens's."""
    own_ids: Tensor
    """`[n]`: the model's own likeliest next token."""
    own_tokens: tuple[str, ...]
    """`[n]`: the same as text."""
    wanted: tuple[str, ...]
    """`[m]`: the tokens asked for."""
    wanted_logprobs: Tensor
    """`[n, site, m]`"""
    wanted_ranks: Tensor
    """`[n, site, m]`: how many tokens are likelier; 0 is the likeliest."""
    languages: tuple[str, ...]
    language_ids: Tensor
    """`[n, language, ...]`: the tokens that count as a language; -1 is none."""
    language_logprobs: Tensor
    """`[n, site, language]`: of all its tokens together."""
    settings: dict[str, Any]

    @property
    def precision(self) -> Tensor:
        """`[n, site]`: whether the likeliest token is the model's own (precision@1)."""
        return self.token_ids[..., 0] == self.own_ids[:, None]

    @property
    def surprisal(self) -> Tensor:
        """`[n, site]`: `-log` of the probability which the model itself gives to the likeliest token, in nats."""
        return -self.own_logprobs[..., 0]

    def token(self, n: int, site: int, rank: int = 0) -> str:
        """The text of a token of a row and a site."""
        return self.vocab[int(self.token_ids[n, site, rank])]

    def to_frame(self) -> DataFrame:
        """One row for each prompt, position, site and rank.

        Columns: `prompt`, `position`, `position_token`, `own_token` (the model's next), `site`, `layer`, `rank`, `token`, `logprob`,
        `own_logprob` (what the model gives the token), `entropy`, `kl`; for each wanted token `t`, `logprob t` and `rank t`; for each
        language `l`, `language l` (its log-probability).
        """
        prompts = [self.prompts[prompt] for prompt, _ in self.rows]
        read = [(one.text, at, one.strings[at], own) for one, (_, at), own in zip(prompts, self.rows, self.own_tokens, strict=True)]
        return tidy(
            {"prompt position position_token own_token": read, "site": self.sites, "rank": self.token_ids.shape[-1]},
            token=spelled(self.token_ids, self.vocab),
            logprob=self.logprobs,
            own_logprob=self.own_logprobs,
            entropy=Over("prompt site", self.entropy),
            kl=Over("prompt site", self.kl),
            **each("logprob", self.wanted, "prompt site", self.wanted_logprobs),
            **each("rank", self.wanted, "prompt site", self.wanted_ranks),
            **each("language", self.languages, "prompt site", self.language_logprobs),
        )

    def cells(self, prompt: int = 0) -> Cells:
        """What a picture has where: a row for each prompt if one token of each was read, and for each token of one prompt otherwise; a
        column for each site."""
        prompt = check_prompt(prompt, len(self.prompts))
        single = len(self.rows) == len(self.prompts)
        chosen = [n for n, (of, _) in enumerate(self.rows) if single or of == prompt]
        names = [
            ending(self.prompts[of].text, 30) if single else f"{at} {self.prompts[of].strings[at]}"
            for of, at in (self.rows[n] for n in chosen)
        ]
        where = [[(n, s) for s in range(len(self.sites))] for n in chosen]
        return names, site_labels(self.sites), "prompt" if single else "token", "layer", where

    def plot(self, ax: Axes | None = None, *, prompt: int = 0, value: str = "probability") -> Axes:
        """A heat map: prompts, or the tokens of one prompt, by layers; the likeliest token in each cell where it fits.

        Args:
            ax: Where to draw; None: a new figure.
            prompt: Which prompt, if several tokens of each were read.
            value: `probability` (of the likeliest token), `entropy`, `kl`, or a wanted token or a language (its probability).
        """
        rows, columns, row_name, column_name, where = self.cells(prompt)
        values, name = self._values(value)
        chosen = [line[0][0] for line in where]
        said = [[self.token(n, s) for n, s in line] for line in where]
        limits = None if value in ("entropy", "kl") else (0, 1)
        return heat_map(
            ax, values[chosen], said, rows, columns, (row_name, column_name, name), limits=limits, title=f"Logit lens, {self.card.model_id}"
        )

    def _values(self, value: str) -> tuple[Tensor, str]:
        """`[n, site]` to draw, and what it is."""
        if value in ("entropy", "kl"):
            return getattr(self, value), {"entropy": "entropy (nats)", "kl": "KL(model || lens) (nats)"}[value]
        named = {"probability": self.logprobs[..., 0]}
        named |= {name: self.language_logprobs[..., m] for m, name in enumerate(self.languages)}
        named |= {word: self.wanted_logprobs[..., m] for m, word in enumerate(self.wanted)}
        if value not in named:
            raise TokenError(f"no value {value!r} in this result", "", f"use one of {', '.join(['entropy', 'kl', *named])}")
        return named[value].exp(), "probability" if value == "probability" else f"probability of {value!r}"

    def plot_tokens(self, ax: Axes | None = None, *, value: str = "probability") -> Axes:
        """The wanted tokens by layer: the mean over all rows of their `probability`, or the median of their `rank`."""
        if not self.wanted:
            raise TokenError("no tokens to draw", "none were asked for", "give tokens= to logit_lens")
        if value not in ("probability", "rank"):
            raise TokenError(f"no value {value!r} of tokens", "", "use probability or rank")
        values = self.wanted_ranks.double().quantile(0.5, 0) if value == "rank" else self.wanted_logprobs.double().exp().mean(0)
        curves = dict(zip([repr(word) for word in self.wanted], values.unbind(-1), strict=True))
        ax = lines(
            ax,
            curves,
            ("layer", "median rank" if value == "rank" else "probability"),
            labels=site_labels(self.sites),
            title=f"Tokens through the logit lens, {self.card.model_id}",
        )
        if value == "rank":
            ax.set_yscale("symlog")
            ax.set_ylim(float(values.max()) + 1, 0)
        return ax

    def plot_languages(self, ax: Axes | None = None) -> Axes:
        """The probability of each language by layer: the mean over all rows, and a band of 1.96 standard errors around it."""
        if not self.languages:
            raise TokenError("no languages to draw", "none were asked for", "give languages= to logit_lens")
        chances = self.language_logprobs.double().exp()
        mean, n = chances.mean(0), len(chances)
        error = 1.96 * chances.std(0) / n**0.5 if n > 1 else torch.zeros_like(mean)
        curves = {name: mean[:, m] for m, name in enumerate(self.languages)}
        bands = {name: ((mean - error)[:, m].clamp(min=0), (mean + error)[:, m]) for m, name in enumerate(self.languages)}
        return lines(
            ax,
            curves,
            ("layer", "probability"),
            labels=site_labels(self.sites),
            bands=bands,
            title=f"Languages through the logit lens, {self.card.model_id}",
        )

    def view(self, *, prompt: int = 0) -> View:
        """An interactive picture (circuitsvis) of what `plot` draws: choose a row and a column, see the likeliest tokens by probability."""
        return samples(self.cells(prompt), self.token, self.logprobs)

    def sections(self) -> list[tuple[str, str, str]]:
        """What is in each cell, of the first prompts."""
        single = len(self.rows) == len(self.prompts)
        return grid_sections(self, [prompt.text for prompt in self.prompts[: 1 if single else 5]])


@recipe
def logit_lens(
    model: Any,
    prompts: Any,
    *,
    layers: Any = "all",
    position: Position = -1,
    k: int = 5,
    tokens: Sequence[str | int] = (),
    languages: Mapping[str, str | Sequence[str]] | Sequence[Mapping[str, str | Sequence[str]]] = (),
    bos: bool | None = None,
    chat: bool = False,
    progress: bool | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> LogitLens:
    """Read states through the final norm and the unembedding.

    Args:
        model: Any model `hookbook.wrap` takes.
        prompts: A prompt, or a list of prompts.
        layers: `"all"`, a layer, a site, or a list; a bare layer is a block's output. `attn_out` and `mlp_out` can be read, too: what they
            are said to be is their direction alone, since the norm gives them the length of a whole stream.
        position: The token or tokens to read: `-1` the last, an index, a text (its last token), an `At`, a list, or a slice
            (`slice(None)`: every token).
        k: How many of the likeliest tokens to keep.
        tokens: Tokens whose probability and rank are wanted: texts as they would follow the prompt up to the token read, usually with a
            leading space, or ids.
        languages: By language a word, or several; one such dict for all prompts, or one for each. A language's probability is the sum
            over the tokens with which its words can begin (`hookbook.tokens.beginnings`): every token that is a part of a word from its
            first character on, alone or after a space, and of characters that are not one token, those of their first bytes.
        bos, chat: See `hookbook.tokens.encode`.
        progress, checkpoint: See `hookbook.patchscope`.

    Returns:
        A `LogitLens` with a row for each prompt and token read; at the last block's output its numbers are the model's own.

    Raises:
        SiteError: A site is not in the model, or not in the stream.
        TokenError: A token, position or word cannot be used.
        DataError: Languages share a token, so that it would count twice, or their number is not that of the prompts.
        Refused: The model cannot read a site.

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens", with the final norm; the divergence as in Belrose et al. 2023,
    arXiv:2303.08112; languages as in Wendler et al. 2024, arXiv:2402.10588.

    Differs: Wendler et al. count entropy in bits, here it is in nats. For Chinese and Russian they always add the token of the first byte,
    here of a first character that is no token, in any language: 0.002 in probability. In byte-level vocabularies their notebook finds
    neither bytes nor what follows a space, here both count.

    Example:
        >>> from hookbook.testing import toy
        >>> lens = logit_lens(toy(), "abc", position=slice(None), k=1)
        >>> lens.token_ids.shape, bool(lens.precision[:, -1].all()), float(lens.kl[:, -1].max())
        (torch.Size([4, 3, 1]), True, 0.0)
    """
    adapter = wrap(model)
    card = adapter.card
    coded = encode_prompts(adapter, prompts, bos, chat)
    sites = layers_to_sites(layers, card)
    for site in sites:
        if site.name not in SITES:
            raise SiteError(
                f"a logit lens at {site}", "it reads what is in the stream, before the final norm", f"use one of {', '.join(SITES)}"
            )
    check_counts(k=k)
    rows = [(n, at) for n, prompt in enumerate(coded) for at in resolve(position, prompt)]
    wanted = wanted_ids(adapter, [coded[n] for n, _ in rows], tokens, [at for _, at in rows])
    names, language_ids = _language_ids(adapter, languages, len(coded))
    language_ids = language_ids[[n for n, _ in rows]]

    end = Site("resid_post", card.n_layers - 1)
    reads = [*(site for site in sites if site != end), end]
    distinct = {prompt: at for at, prompt in enumerate(dict.fromkeys(coded))}
    each = Each(tuple(resolve(position, prompt) for prompt in coded))
    request = Request(list(distinct), [Row(distinct[prompt]) for prompt in coded], [Read(site, each) for site in reads])
    reply = adapter.run(request, progress=progress, checkpoint=checkpoint)
    states = torch.stack([reading.values for reading in reply.readings], 1)
    said = adapter.lens(states, k=k, tokens=torch.cat([wanted, language_ids.clamp(min=0).flatten(1)], 1), ranked=len(tokens))
    chosen = [reads.index(site) for site in sites]
    token_ids, own_ids, known = said.topk_ids[:, chosen], said.topk_ids[:, -1, 0], said.token_logprobs[:, chosen]
    by_language = known[..., len(tokens) :]
    if names:
        nothing = torch.zeros(language_ids.shape).masked_fill(language_ids < 0, float("-inf"))
        by_language = (by_language.unflatten(-1, tuple(language_ids.shape[1:])) + nothing[:, None]).logsumexp(-1)
    return LogitLens(
        card=card,
        prompts=tuple(coded),
        rows=tuple(rows),
        sites=sites,
        vocab=later(vocabulary, adapter, token_ids, own_ids, language_ids),
        token_ids=token_ids,
        logprobs=said.topk_logprobs[:, chosen],
        own_logprobs=said.end_logprobs[:, chosen],
        entropy=said.entropy[:, chosen],
        kl=said.kl[:, chosen],
        own_ids=own_ids,
        own_tokens=later(words, adapter, own_ids),
        wanted=wanted_words(adapter, tokens),
        wanted_logprobs=known[..., : len(tokens)],
        wanted_ranks=said.token_ranks[:, chosen],
        languages=names,
        language_ids=language_ids,
        language_logprobs=by_language,
        settings={},
    )


def _language_ids(adapter: Adapter, languages: Any, n: int) -> tuple[tuple[str, ...], Tensor]:
    """The names of languages, and the tokens of each prompt's words, `[n, language, ...]`; -1 is none."""
    listed = [languages] * n if isinstance(languages, Mapping) else list(languages)
    if not any(listed):
        return (), torch.empty(n, 0, 0, dtype=torch.long)
    names = tuple(listed[0])
    if len(listed) != n or any(set(some) != set(names) for some in listed):
        raise DataError(
            f"words in languages for {len(listed)} of {n} prompts",
            "each prompt has words in the same languages",
            "give one dict, or one for each prompt",
        )
    found = []
    for some in listed:
        sets, seen = [], {}
        for name in names:
            given = [some[name]] if isinstance(some[name], str) else list(some[name])
            if not given:
                raise DataError(f"no words in {name}", "no token would count as this language", "give at least one")
            sets.append(sorted({i for word in given for i in beginnings(word, adapter.tokenizer)}))
            for i in sets[-1]:
                if i in seen:
                    text = adapter.tokenizer.decode([i])
                    raise DataError(
                        f"the token {text!r} begins words in {seen[i]} and in {name}",
                        f"{dict(some)} would count it twice",
                        "use other words",
                    )
                seen[i] = name
        found.append(sets)
    width = max(len(ids) for sets in found for ids in sets)
    return names, torch.tensor([[ids + [-1] * (width - len(ids)) for ids in sets] for sets in found])
