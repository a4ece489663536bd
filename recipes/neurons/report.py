"""What is known of one neuron beside others: where it is active, what it writes, and what it does."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hookbook.errors import TokenError
from hookbook.recipe import ModelCard
from hookbook.results import Axes, DataFrame, Result, View
from hookbook.show.html import context_line, table
from hookbook.show.plots import lines
from hookbook.show.text import need
from hookbook.show.tidy import Over, each, spelled, tidy
from hookbook.sites import Site
from hookbook.tokens import Tokens


@dataclass(frozen=True, eq=False)
class NeuronReport(Result):
    """One neuron, and others of its layer beside it: `c` in all, itself first. Texts say where it is active; on `p` prompts it is measured
    what the model says of the next token without it, and with it at each of several doses."""

    card: ModelCard
    site: Site
    """The neuron."""
    neurons: Tensor
    """`[c]`: numbers of neurons of its layer."""
    kinds: tuple[str, ...]
    """`[c]`: `neuron`; `random`; `matched`: one of those that add most nearly as much to the stream on the prompts."""
    contributions: Tensor
    """`[c]`: how long what each adds to the stream is on the prompts' tokens, in the mean; through the norm after the MLP, if there is
    one, but for its scale, which all neurons share."""
    n_texts: int
    n_tokens: int
    """How many tokens of them count: all but special ones."""
    levels: tuple[float, ...]
    """`[level]`"""
    quantiles: Tensor
    """`[c, level]`: of the activations on these tokens."""
    beyond: Tensor
    """`[level]`: on how many tokens each quantile rests, those at least as far out; of few it says little."""
    activations: Tensor
    """`[e]`: examples, the tokens where it is highest, at most one of a text, and then those where it is lowest."""
    example_texts: Tensor
    """`[e]`: which text."""
    example_positions: Tensor
    """`[e]`: which token of it."""
    contexts: Tensor
    """`[e, 2 * context + 1]`: token ids around it, which is in the middle; -1 is none."""
    context_activations: Tensor
    """`[e, 2 * context + 1]`: the neuron there; 0 where nothing was read."""
    promoted_ids: Tensor
    """`[2, 2, k]`: words that its row of the output projection promotes most and least, first as it is, then through the norms."""
    promoted_logits: Tensor
    """`[2, 2, k]`: by how many logits for each unit of activation; through the norms, for a state of length 1 in each dimension."""
    prompts: tuple[Tokens, ...]
    """`[p]`"""
    positions: tuple[tuple[int, ...], ...]
    """`[p]`: the tokens at which neurons are set."""
    wanted: tuple[str, ...]
    """Next tokens that were asked for, and last the one that the neuron promotes most through the norms."""
    plain_ids: Tensor
    """`[p]`: the likeliest next token of the plain run."""
    plain_logprobs: Tensor
    """`[p, wanted]`"""
    values: Tensor
    """`[c]`: what each neuron is set to when it is taken out."""
    kl: Tensor
    """`[c, p]`: KL(plain || without it) of the next token, in nats."""
    token_ids: Tensor
    """`[c, p]`: the likeliest next token without it."""
    changes: Tensor
    """`[c, p, wanted]`: how much log-probabilities grow without it."""
    served_ids: Tensor
    """`[p, 5]`: words whose probability falls most without it."""
    served_effects: Tensor
    """`[p, 5]`: by how much."""
    doses: Tensor
    """`[c, dose]`: other values that each is set to."""
    dose_kl: Tensor
    """`[c, dose, p]`"""
    dose_ids: Tensor
    """`[c, dose, p]`"""
    dose_changes: Tensor
    """`[c, dose, p, wanted]`"""
    plain_texts: tuple[str, ...]
    """`[p]`: what is generated; empty if nothing was asked for."""
    texts: tuple[tuple[tuple[str, ...], ...], ...]
    """Of the neuron, the first random and the first matched one what is generated at each dose after each prompt; empty like these."""
    vocab: dict[int, str]
    """The text of every token id in this result."""
    settings: dict[str, Any]

    @property
    def names(self) -> list[str]:
        """Of each neuron, such as `mlp_act.25.1120`."""
        return [f"{self.site.whole}.{i}" for i in self.neurons.tolist()]

    @property
    def changed(self) -> Tensor:
        """`[c]`: on which share of the prompts the likeliest token changes without it."""
        return (self.token_ids != self.plain_ids).double().mean(1)

    def monotonicity(self, token: str | None = None) -> Tensor:
        """`[c]`: how orderly a word's log-probability follows the dose: Spearman's rank correlation, in the mean over prompts. 1: it always
        rises; 0: no order; NaN of fewer than two different doses.

        Args:
            token: One of `wanted`; None: what the neuron promotes most.
        """
        changes = self.dose_changes[..., self._wanted(token)]
        found = [
            [_spearman(doses, line[:, prompt]) for prompt in range(line.shape[1])] for doses, line in zip(self.doses, changes, strict=True)
        ]
        return torch.tensor(found, dtype=torch.float64).mean(1)

    def to_frame(self) -> DataFrame:
        """One row for each neuron and prompt: `site`, `layer`, `unit`, `control` (`neuron`, `random`, `matched`), `prompt`; without the
        neuron `kl`, `plain_token`, `token`, and `change TOKEN` of each wanted one."""
        return tidy(
            {"site layer unit control": self._rows(), "prompt": self.prompts},
            kl=self.kl,
            plain_token=Over("prompt", spelled(self.plain_ids, self.vocab)),
            token=spelled(self.token_ids, self.vocab),
            **each("change", self.wanted, "site prompt", self.changes),
        )

    def dose(self) -> DataFrame:
        """What a dose does, in the mean over prompts, one row for each neuron and dose: `site`, `layer`, `unit`, `control`, `dose`, `kl`,
        `changed` (on which share of the prompts the likeliest token is another), `change TOKEN` of each wanted one."""
        rows = [(*row, value) for row, doses in zip(self._rows(), self.doses.tolist(), strict=True) for value in doses]
        return tidy(
            {"site layer unit control dose": rows},
            kl=self.dose_kl.mean(2),
            changed=(self.dose_ids != self.plain_ids).double().mean(2),
            **each("change", self.wanted, "site", self.dose_changes.mean(2).flatten(0, 1)),
        )

    def activity(self) -> DataFrame:
        """One row for each neuron and quantile: `site`, `layer`, `unit`, `control`, `quantile`, `activation`, `beyond` (tokens)."""
        rows = {"site layer unit control": self._rows(), "quantile": list(self.levels)}
        return tidy(rows, activation=self.quantiles, beyond=Over("quantile", self.beyond))

    def examples(self) -> DataFrame:
        """Where it is highest and then lowest, one row for each example: `example`, `activation`, `context` (with the token «marked»),
        `text_index`, `position`."""
        marked = []
        for words in self._contexts():
            middle = len(words) // 2
            marked.append("".join((*words[:middle], f"«{words[middle]}»", *words[middle + 1 :])))
        return tidy(
            {"example": len(marked)},
            activation=self.activations,
            context=marked,
            text_index=self.example_texts,
            position=self.example_positions,
        )

    def promotes(self) -> DataFrame:
        """The words it promotes most (`end` is `most`) and least, one row for each: `through` (`raw` or `norms`), `end`, `rank`, `token`,
        `contribution`."""
        axes = {"through": ["raw", "norms"], "end": ["most", "least"], "rank": self.promoted_ids.shape[2]}
        return tidy(axes, token=spelled(self.promoted_ids, self.vocab), contribution=self.promoted_logits)

    def serves(self) -> DataFrame:
        """The different words whose probability falls most without it, one row for each: `token`, `n` (after how many prompts it is
        among the first five), `effect` (by how much it falls, summed over these), the largest first."""
        found: dict[int, list[float]] = {}
        for word, effect in zip(self.served_ids.flatten().tolist(), self.served_effects.flatten().tolist(), strict=True):
            if effect > 0:
                found.setdefault(word, []).append(effect)
        ordered = sorted(found.items(), key=lambda item: -sum(item[1]))
        counts, effects = [len(some) for _, some in ordered], [sum(some) for _, some in ordered]
        return tidy({"token": [self.vocab[word] for word, _ in ordered]}, n=counts, effect=effects)

    def plot(self, ax: Axes | None = None, *, token: str | None = None) -> Axes:
        """How a word's log-probability follows the dose, in the mean over prompts: the neuron's, and means of the others with their reach.

        Args:
            ax: Where to draw; None: a new figure.
            token: One of `wanted`; None: what the neuron promotes most.
        """
        at = self._wanted(token)
        word, means = self.wanted[at], self.dose_changes[..., at].mean(2)
        curves, bands = {}, {}
        for kind in dict.fromkeys(self.kinds):
            mine = means[[other == kind for other in self.kinds]]
            curves[self.names[0].removeprefix("mlp_act.") if kind == "neuron" else kind] = mine.mean(0)
            if kind != "neuron":
                bands[kind] = mine.amin(0), mine.amax(0)
        own = bool(self.settings["own_quantiles"])
        places = [f"{level:g}" for level in (self.levels if own else self.doses[0].tolist())]
        names = "set to this quantile of its activations" if own else "set to", f"change of log p({word!r}), nats"
        return lines(ax, curves, names, title=f"Neuron {self.site}, {self.card.model_id}", labels=places, bands=bands)

    def view(self) -> View:
        """Its examples, coloured by its activation, which shows under the pointer; then what it promotes, and what it does."""
        most = float(self.activations.abs().amax()) if len(self.activations) else 0.0
        contexts = zip(self._contexts(), self.context_activations.tolist(), self.activations.tolist(), strict=True)
        shown = "".join(context_line(f"{value:.4g}", words, near, most) for words, near, value in contexts)
        return View(shown) + View.table(self.promotes(), "What it promotes") + View.table(self.to_frame(), "Without it")

    def sections(self) -> list[tuple[str, str, str]]:
        """Quantiles, doses, the words it serves, and what was generated."""
        found = [
            ("Its activations", f"Of {self.n_tokens:,} tokens of {self.n_texts:,} texts.", View.table(self.activity(), "Quantiles").html),
            ("Doses", "What the model says when the neuron is set to a value.", View.table(self.dose(), "Means over prompts").html),
            ("What it serves", "Words that lose most probability without it.", View.table(self.serves(), "Words").html),
        ]
        if self.texts:
            head = ["prompt", "plain", *(f"{value:.4g}" for value in self.doses[0].tolist())]
            rows = [[p.text, self.plain_texts[i], *(line[i] for line in self.texts[0])] for i, p in enumerate(self.prompts)]
            found.append(("What is generated", "With the neuron at each dose at every token.", table(head, rows, "Texts")))
        return found

    def _rows(self) -> list[tuple[str, int | None, int, str]]:
        return [("mlp_act", self.site.layer, i, kind) for i, kind in zip(self.neurons.tolist(), self.kinds, strict=True)]

    def _contexts(self) -> list[list[str]]:
        return [[self.vocab.get(i, "") for i in line] for line in self.contexts.tolist()]

    def _wanted(self, token: str | None) -> int:
        if token is not None and token not in self.wanted:
            raise TokenError(f"token {token!r}", "nobody asked for it", f"use one of {', '.join(map(repr, self.wanted))}")
        return len(self.wanted) - 1 if token is None else self.wanted.index(token)


def _spearman(x: Tensor, y: Tensor) -> float:
    """Rank correlation; 0 of constant `y`, NaN of constant `x`."""
    if not float(x.max()) > float(x.min()):
        return math.nan
    frame: Any = need("pandas", "monotonicity()").DataFrame({"x": x.tolist(), "y": y.tolist()}).rank()
    return float(frame.x.corr(frame.y)) if float(y.max()) > float(y.min()) else 0.0
