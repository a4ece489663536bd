"""Patchscopes: read a hidden state by patching it into another prompt and letting the model speak.

A patchscope measures what a model can still say about a state once the state's own prompt is gone. What it shows is
what the target prompt and the model together make of the state: compare with the control (the same target, unpatched),
with states of other prompts, and with other target prompts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hookbook import prompts
from hookbook.adapter import Adapter
from hookbook.asking import check_asked, encode_prompts, grouped_texts, one_token, wanted_words
from hookbook.errors import EditError, SiteError, TokenError, check_prompt
from hookbook.maps import Affine, Map
from hookbook.recipe import ModelCard, later, recipe, wrap
from hookbook.request import Each, Edit, Read, Readout, Request, Row
from hookbook.results import Axes, DataFrame, Result, View
from hookbook.show.cells import grid_sections
from hookbook.show.plots import Cells, heat_map, samples, site_labels
from hookbook.show.text import ending
from hookbook.show.tidy import Over, each, spelled, tidy
from hookbook.sites import Site, layers_to_sites
from hookbook.tokens import Position, Tokens, decoded, prompts_of, vocabulary, words


@dataclass(frozen=True, eq=False)
class Patchscope(Result):
    """What a model said with each state patched in: `n` source prompts, `p` pairs of sites, the `k` likeliest tokens."""

    source_card: ModelCard
    target_card: ModelCard
    sources: tuple[Tokens, ...]
    """`[n]`: the source prompts as the model saw them."""
    source_positions: tuple[int, ...]
    """`[n]`"""
    targets: tuple[Tokens, ...]
    """The target prompts; one for all sources, or one for each."""
    target_positions: tuple[int, ...]
    pairs: tuple[tuple[Site, Site], ...]
    """`[p]`: where each state was read, and where it was written."""
    vocab: dict[int, str]
    """The text of every token id in this result."""
    token_ids: Tensor
    """`[n, p, k]`"""
    logprobs: Tensor
    """`[n, p, k]` in nats."""
    control_ids: Tensor
    """`[n, k]`: the target prompt without a patch."""
    control_logprobs: Tensor
    """`[n, k]`"""
    source_ids: Tensor
    """`[n]`: the likeliest next token of the source prompt at its position, unpatched."""
    source_tokens: tuple[str, ...]
    """`[n]`: the same as text."""
    precision: Tensor | None
    """`[n, p]`: whether the likeliest token is the source prompt's own (precision@1); None if the vocabularies differ."""
    surprisal: Tensor | None
    """`[n, p]`: `-log` of the probability which the source prompt's own run gives to the likeliest token, in nats."""
    wanted: tuple[str, ...]
    """`[m]`: the tokens asked for."""
    wanted_logprobs: Tensor
    """`[n, p, m]`"""
    control_wanted_logprobs: Tensor
    """`[n, m]`"""
    texts: tuple[tuple[str, ...], ...]
    """`[n][p]`: what was generated; empty if nothing was."""
    control_texts: tuple[str, ...]
    """`[n]`"""
    settings: dict[str, Any]

    def to_frame(self) -> DataFrame:
        """One row for each prompt, pair and rank.

        Columns: `prompt`, `position`, `site`, `layer` (of the source), `target_site`, `target_layer`, `rank`,
        `token`, `logprob`, `control_token`, `control_logprob`, `source_token`, `precision`, `surprisal`; with generation
        `text` and `control_text`; for each wanted token `t`, `logprob t` and `control_logprob t`.
        """
        nan = float("nan")
        return tidy(
            {"prompt position": [*zip(self.sources, self.source_positions, strict=True)], "site target_site": self.pairs}
            | {"rank": self.token_ids.shape[-1]},
            token=spelled(self.token_ids, self.vocab),
            logprob=self.logprobs,
            control_token=Over("prompt rank", spelled(self.control_ids, self.vocab)),
            control_logprob=Over("prompt rank", self.control_logprobs),
            source_token=Over("prompt", self.source_tokens),
            precision=Over("prompt site", nan if self.precision is None else self.precision),
            surprisal=Over("prompt site", nan if self.surprisal is None else self.surprisal),
            text=Over("prompt site", self.texts or None),
            control_text=Over("prompt", self.control_texts or None),
            **each("logprob", self.wanted, "prompt site", self.wanted_logprobs),
            **each("control_logprob", self.wanted, "prompt", self.control_wanted_logprobs),
        )

    def token(self, n: int, p: int, rank: int = 0) -> str:
        """The text of a token of prompt `n` and pair `p`."""
        return self.vocab[int(self.token_ids[n, p, rank])]

    @property
    def is_grid(self) -> bool:
        """Whether every source site meets every target site."""
        reads, writes = {read for read, _ in self.pairs}, {write for _, write in self.pairs}
        return len(writes) > 1 and len(self.pairs) == len(reads) * len(writes)

    def cells(self, prompt: int = 0) -> Cells:
        """Labels of rows and columns, names of the axes, and which (prompt, pair) is in each cell."""
        prompt = check_prompt(prompt, len(self.sources))
        if self.is_grid:
            reads, writes = (list(dict.fromkeys(side)) for side in zip(*self.pairs, strict=True))
            where = {pair: p for p, pair in enumerate(self.pairs)}
            cells = [[(prompt, where[read, write]) for write in writes] for read in reads]
            return site_labels(reads), site_labels(writes), "source layer", "target layer", cells
        reads, writes = zip(*self.pairs, strict=True)
        columns = site_labels(reads)
        if reads != writes and set(writes) != {Site("resid_post", self.target_card.n_layers - 1)}:
            columns = [f"{read}→{write}" for read, write in zip(columns, site_labels(writes), strict=True)]
        cells = [[(n, p) for p in range(len(self.pairs))] for n in range(len(self.sources))]
        return [ending(source.text, 30) for source in self.sources], columns, "prompt", "layer", cells

    def plot(self, ax: Axes | None = None, *, prompt: int = 0, value: str = "probability") -> Axes:
        """A heat map: source layer by target layer of one prompt, or prompt by layer; the likeliest token in each cell when it fits.

        Args:
            ax: Where to draw; None: a new figure.
            prompt: Which source prompt, if every source layer meets every target layer.
            value: `probability` (of the likeliest token), `surprisal`, or one of the wanted tokens (its probability).
        """
        rows, columns, row_name, column_name, cells = self.cells(prompt)
        values = torch.tensor([[self._value(n, p, value) for n, p in line] for line in cells])
        words = [[self.token(n, p) for n, p in line] for line in cells]
        names = (row_name, column_name, "surprisal (nats)" if value == "surprisal" else "probability")
        return heat_map(
            ax,
            values,
            words,
            rows,
            columns,
            names,
            upwards=self.is_grid,
            limits=None if value == "surprisal" else (0, 1),
            title=f"Patchscope{f' of {ending(self.sources[prompt].text, 60)!r}' if self.is_grid else ''}, {self.target_card.model_id}",
        )

    def _value(self, n: int, p: int, value: str) -> float:
        if value == "probability":
            return float(self.logprobs[n, p, 0].exp())
        if value == "surprisal" and self.surprisal is not None:
            return float(self.surprisal[n, p])
        if value in self.wanted:
            return float(self.wanted_logprobs[n, p, self.wanted.index(value)].exp())
        raise TokenError(f"no value {value!r} in this result", "", f"use one of {', '.join(['probability', 'surprisal', *self.wanted])}")

    def view(self, *, prompt: int = 0) -> View:
        """An interactive picture (circuitsvis) of what `plot` draws: choose a row and a column, see the likeliest tokens by probability,
        and what was generated."""
        return samples(self.cells(prompt), self.token, self.logprobs, self.texts)

    def sections(self) -> list[tuple[str, str, str]]:
        """What is in each cell, of the first prompts."""
        return grid_sections(self, [source.text for source in self.sources[: 5 if self.is_grid else 1]])


@recipe
def patchscope(
    model: Any,
    source: Any,
    *,
    target: Any = prompts.TOKEN_IDENTITY,
    source_layers: Any = "all",
    target_layers: Any = "same",
    source_position: Position = -1,
    target_position: Position | None = None,
    readout_position: Position = -1,
    map: Map | Affine | None = None,
    target_model: Any = None,
    generate: int = 0,
    k: int = 5,
    tokens: Sequence[str | int] = (),
    bos: bool | None = None,
    chat: bool = False,
    progress: bool | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Patchscope:
    """Patch states of source prompts into a target prompt, at any pairs of layers, and read what the model says next.

    In the paper's words: source `(S, i, M, l)`, target `(T, i*, f, M*, l*)`. The state `h` of `M(S)` at token `i` and
    layer `l` replaces, as `f(h)`, the state of `M*(T)` at token `i*` and layer `l*`. All pairs are one forked forward
    pass.

    Args:
        model: `M`: any model `hookbook.wrap` takes.
        source: `S`: a prompt, or a list of prompts (texts, or see `hookbook.tokens.encode`).
        target: `T`: a `hookbook.prompts.Target`, a prompt, or a list of one prompt for each source.
        source_layers: `l`: `"all"`, a layer, a site such as `"mlp_out.3"`, or a list; a bare layer is a block's output.
        target_layers: `l*`: `"same"` (each state goes back to the site it came from), `"all"` (every pair), or as above.
        source_position: `i`: `-1` the last token, an index, a text (its last token), or an `At`.
        target_position: `i*`: likewise; None: the target's placeholder, or the last token.
        readout_position: The token of the target prompt after which the next token is read, as above; generation always
            goes on from the last.
        map: `f`: None for the identity, an `Affine`, or a function of states `[n, d_source]`, the source and the target
            site that returns `[n, d_target]`.
        target_model: `M*`; None: the same model.
        generate: How many tokens to decode greedily after the target prompt; the patch acts in the prompt only.
        k: How many of the likeliest next tokens to keep.
        tokens: Tokens whose probability is wanted: texts as they would follow the target prompt, usually with a leading
            space, or ids.
        bos: See `hookbook.tokens.encode`.
        chat: Render the source prompts through the chat template.
        progress: Show a progress bar; None: for long work only.
        checkpoint: A folder that keeps what is finished; the same call goes on from there after a crash.

    Returns:
        A `Patchscope` with `token_ids` and `logprobs` `[n, pairs, k]` in nats, the unpatched target as control,
        precision@1 and surprisal against the unpatched source run, and texts if some were generated.

    Raises:
        SiteError, TokenError, EditError: Something asked for is not in a model or a prompt.
        Refused: A model cannot read or edit a site.

    Source: Ghandeharioun et al. 2024, arXiv:2401.06102, sections 3 and 4. Layers count block outputs from 0.

    Differs: states are what blocks write, never normed, so that at `l = l* = L - 1` the patch is before the final norm, which is the same
    as the authors' patch of the normed state after it. It is not where only `l` is the last layer: there the authors' code writes the
    normed state into the stream.

    Example:
        >>> from hookbook.testing import toy
        >>> out = patchscope(toy(), "ab", target="cd?", k=1)
        >>> out.to_frame()[["layer", "target_layer", "rank"]].values.tolist()
        [[0, 0, 0], [1, 1, 0], [2, 2, 0]]
    """
    reader, writer = wrap(model), wrap(model if target_model is None else target_model)
    sources = encode_prompts(reader, source, bos, chat)
    reads_at = [one_token(source_position, prompt) for prompt in sources]
    targets = _targets(writer, target, len(sources), bos, target_position, readout_position)
    pairs = _pairs(reader.card, writer.card, source_layers, target_layers)
    _check_map(map, reader.card, writer.card)
    asked = check_asked(writer, targets.prompts, tokens, k, generate, targets.says_at)
    for read, write in pairs:
        reader.require(read)
        writer.require(write)

    sites = tuple(dict.fromkeys(read for read, _ in pairs))
    *states, own = _states(reader, sources, reads_at, sites, progress, checkpoint)
    values = _mapped(map, dict(zip(sites, states, strict=True)), pairs, writer.card)
    request = _patches(targets, pairs, values, asked, k, generate)
    reply = writer.run(request, progress=progress, checkpoint=checkpoint)
    n, at = len(targets.prompts), targets.of
    ids, logprobs, wanted = (
        x[n:].unflatten(0, (len(sources), len(pairs))) for x in (reply.said.topk_ids, reply.said.topk_logprobs, reply.said.token_logprobs)
    )
    source_ids, precision, surprisal = _beside_own(reader, own, ids[..., 0], writer.card)
    return Patchscope(
        source_card=reader.card,
        target_card=writer.card,
        sources=tuple(sources),
        source_positions=tuple(reads_at),
        targets=tuple(targets.prompts),
        target_positions=tuple(targets.writes_at),
        pairs=tuple(pairs),
        vocab=later(vocabulary, writer, ids, reply.said.topk_ids[at]),
        token_ids=ids,
        logprobs=logprobs,
        control_ids=reply.said.topk_ids[at],
        control_logprobs=reply.said.topk_logprobs[at],
        source_ids=source_ids,
        source_tokens=later(words, reader, source_ids),
        precision=precision,
        surprisal=surprisal,
        wanted=wanted_words(writer, tokens),
        wanted_logprobs=wanted,
        control_wanted_logprobs=reply.said.token_logprobs[at],
        texts=later(grouped_texts, writer, reply.tokens[n:], len(pairs)) if reply.tokens is not None else (),
        control_texts=later(decoded, writer, reply.tokens[at]) if reply.tokens is not None else (),
        settings={"map": "identity" if map is None else type(map).__name__},
    )


@dataclass(frozen=True)
class _Targets:
    """Target prompts, and of each the token that is patched and the one after which is read."""

    prompts: list[Tokens]
    writes_at: list[int]
    says_at: list[int]
    of: list[int]
    """The number of each source's target."""


def _targets(writer: Adapter, target: Any, n: int, bos: bool | None, written: Position | None, read: Position) -> _Targets:
    """The target prompts of `n` sources, encoded and checked."""
    listed = [target] if isinstance(target, prompts.Target) else prompts_of(target, writer.tokenizer)
    coded = [writer.encode(t.text if isinstance(t, prompts.Target) else t, bos=bos) for t in listed]
    if len(coded) not in (1, n):
        raise TokenError(
            f"{len(coded)} target prompts for {n} source prompts", "a source needs a target", "give one target, or one for each source"
        )
    writes_at = [prompts.locate(t, prompt, written) for t, prompt in zip(listed, coded, strict=True)]
    says_at = [one_token(read, prompt) for prompt in coded]
    for first, last in zip(writes_at, says_at, strict=True):
        if last < first:
            raise TokenError(
                f"a patch of token {first} cannot reach token {last}", "tokens see only those before them", "read a later token"
            )
    return _Targets(coded, writes_at, says_at, [0] * n if len(coded) == 1 else list(range(n)))


def _check_map(map: Map | Affine | None, source: ModelCard, target: ModelCard) -> None:
    """Raise unless states of one model can be those of the other."""
    if map is None and source.d_model != target.d_model:
        raise EditError(
            f"states of width {source.d_model} for a model of width {target.d_model}",
            "the two models' streams differ",
            "give map=, such as Affine.fit(x, y) on states of both models",
        )
    if isinstance(map, Affine) and tuple(map.weight.shape) != (target.d_model, source.d_model):
        raise EditError(
            f"a map of shape {list(map.weight.shape)}",
            f"from width {source.d_model} to width {target.d_model} it is [{target.d_model}, {source.d_model}]",
            "transpose it, or fit it on these two models",
        )


def _states(
    reader: Adapter, sources: Sequence[Tokens], at: Sequence[int], sites: Sequence[Site], progress: bool | None, checkpoint: Any
) -> list[Tensor]:
    """The states `[n, d_source]` of each site, and last the end of the stream, at each source's token."""
    reads = [Read(site, Each(tuple(at))) for site in (*sites, Site("resid_post", reader.card.n_layers - 1))]
    reply = reader.run(Request(sources, [Row(n) for n in range(len(sources))], reads), progress=progress, checkpoint=checkpoint)
    return [reading.values for reading in reply.readings]


def _mapped(map: Map | Affine | None, states: dict[Site, Tensor], pairs: Sequence[tuple[Site, Site]], target: ModelCard) -> Tensor:
    """What is written, `[n, pair, d_target]`."""
    values = [states[read] if map is None else map(states[read], read, write) for read, write in pairs]
    for x in values:
        if x.shape != (n := len(states[pairs[0][0]]), target.d_model):
            raise EditError(
                f"the map gave shape {list(x.shape)}", f"for {n} states of a model whose width is {target.d_model}", "return [n, d_target]"
            )
    return torch.stack(values, 1)


def _patches(targets: _Targets, pairs: Sequence[tuple[Site, Site]], values: Tensor, asked: Tensor, k: int, generate: int) -> Request:
    """Every target as it is, and then, for each source and pair, with `values` `[n, pair, d_target]` written."""
    rows = [Row(t) for t in range(len(targets.prompts))]
    rows += [
        Row(t, (Edit(write, values[n, p], "set", targets.writes_at[t]),))
        for n, t in enumerate(targets.of)
        for p, (_, write) in enumerate(pairs)
    ]
    readout = Readout(Each(tuple(targets.says_at[row.prompt] for row in rows)), k, asked[[row.prompt for row in rows]])
    return Request(targets.prompts, rows, (), readout, generate)


def _beside_own(reader: Adapter, own: Tensor, ids: Tensor, target: ModelCard) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The source runs' own next tokens `[n]`; and, of one vocabulary, whether `ids` `[n, pair]` are these, and their surprisal."""
    source_ids = reader.readout(own, k=1).topk_ids[:, 0]
    if (reader.card.tokenizer, reader.card.d_vocab) != (target.tokenizer, target.d_vocab):
        return source_ids, None, None
    return source_ids, ids == source_ids[:, None], -reader.readout(own, tokens=ids).token_logprobs


def _pairs(source: ModelCard, target: ModelCard, source_layers: Any, target_layers: Any) -> list[tuple[Site, Site]]:
    reads = layers_to_sites(source_layers, source)
    if isinstance(target_layers, str) and target_layers == "same":
        for site in reads:
            if site.layer is not None and site.layer >= target.n_layers:
                raise SiteError(
                    f"no site '{site}' in the target model",
                    f"it has layers 0 to {target.n_layers - 1}",
                    "give target_layers, or fewer source_layers",
                )
        return [(site, site) for site in reads]
    return [(read, write) for read in reads for write in layers_to_sites(target_layers, target)]
