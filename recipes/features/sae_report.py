"""Whether a sparse autoencoder fits the model that is run: what it misses of the model's states, and what that costs the model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hookbook.card import ModelCard
from hookbook.errors import DataError, Refused
from hookbook.recipe import recipe
from hookbook.recipes.features.reading import Stream, batches, chunks, readable
from hookbook.request import Each, Edit, Read, Request, Row
from hookbook.results import Result, View
from hookbook.sae import AttachedSAE, checked
from hookbook.show.plots import bars
from hookbook.show.tidy import tidy
from hookbook.sites import Site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False)
class SAEReport(Result):
    """How well an SAE reconstructs a model's states, and how well the model predicts with the reconstruction in their place. Losses are
    in nats."""

    card: ModelCard
    sae: str
    """What the SAE is called, with a fingerprint of its weights."""
    site: Site
    """What the encoder reads."""
    out: Site
    """What is reconstructed."""
    sae_dtype: str
    """The SAE's precision; the model's is in its card."""
    n_texts: int
    n_tokens: int
    """How many tokens were reconstructed."""
    n_targets: int
    """How many tokens were predicted."""
    l0: float
    """How many features are active on a token, in the mean."""
    fvu: float
    """The fraction of variance unexplained: the squared error over all tokens by that of the mean state."""
    cosine: float
    """Between states and reconstructions, in the mean."""
    dead: float
    """The share of features that no token activates."""
    loss: float
    """The model's own mean loss."""
    loss_sae: float
    """With the reconstruction in place of the states."""
    loss_zero: float
    """With zeros in place of the states."""
    settings: dict[str, Any]

    @property
    def loss_recovered(self) -> float:
        """`(loss_zero - loss_sae) / (loss_zero - loss)`: 1 if the reconstruction does no harm, 0 if as much as zeros. NaN if these do
        none."""
        return (self.loss_zero - self.loss_sae) / (self.loss_zero - self.loss) if self.loss_zero != self.loss else float("nan")

    @property
    def fits(self) -> bool:
        """Whether the SAE does better than knowing nothing: than the mean state at reconstructing, and than zeros at predicting."""
        return self.fvu <= 1 and (self.loss_zero <= self.loss or self.loss_recovered >= 0)

    def to_frame(self) -> pd.DataFrame:
        """One row for each number: `metric`, `value`, `verdict` (empty if there is nothing wrong), `meaning`."""
        misses = "does not fit: the mean state is closer than the reconstruction" if not self.fvu <= 1 else ""
        harms = "does not fit: the model predicts worse than with zeros" if self.loss_recovered < 0 else ""
        if self.loss_zero <= self.loss:
            harms = "says nothing: zeros do no harm here"
        rows = [
            ("tokens", self.n_tokens, "", "tokens that were reconstructed, without special ones"),
            ("L0", self.l0, "", "features active on a token, in the mean"),
            ("FVU", self.fvu, misses, "variance that the reconstruction misses: 0 is perfect, 1 is the mean state"),
            ("cosine", self.cosine, "", "between states and reconstructions, in the mean"),
            ("dead", self.dead, "", "share of features that none of these tokens activates"),
            ("loss", self.loss, "", "of the next token, in nats: the model as it is"),
            ("loss with SAE", self.loss_sae, "", "with the reconstruction in place of the states"),
            ("loss with zeros", self.loss_zero, "", "with zeros in place of the states"),
            ("loss recovered", self.loss_recovered, harms, "1 if the reconstruction does no harm, 0 if as much as zeros"),
        ]
        return tidy({"metric value verdict meaning": rows})

    def plot(self, ax: Axes | None = None) -> Axes:
        """Bars that are 1 for a perfect SAE: explained variance, cosine, loss recovered, and features that are active at all."""
        shares = {
            "explained variance": 1 - self.fvu,
            "cosine": self.cosine,
            "loss recovered": self.loss_recovered,
            "features active": 1 - self.dead,
        }
        title = f"SAE of {self.out}, {self.l0:.1f} features active on a token, {self.card.model_id}"
        ax = bars(ax, list(shares), torch.tensor(list(shares.values())), "1 for a perfect SAE", title=title)
        ax.bar_label(ax.containers[-1], fmt="%.3f", padding=3, fontsize=8)  # type: ignore[arg-type]
        ax.axvline(1, color="0.5", linestyle="--", linewidth=1)
        ax.margins(x=0.15)
        return ax

    def view(self) -> View:
        """The table, and what was measured."""
        said = (
            f"{self.card.model_id} in {self.card.dtype}, an SAE of {self.site} in {self.sae_dtype}: "
            f"it {'fits' if self.fits else 'does not fit'}."
        )
        return View.table(self.to_frame(), said)


@recipe
def sae_report(sae: AttachedSAE, texts: Any, *, batch: int = 16, progress: bool | None = None) -> SAEReport:
    """Measure an SAE on texts: sparsity, reconstruction, and the loss of the model that predicts from reconstructions.

    States of special tokens are left as they are, and what the model predicts from them is not counted.

    Args:
        sae: What `hb.sae.attach` gives.
        texts: A list of prompts, or anything that gives one after the other, which is read once. Of a remote model all are sent as one job.
        batch: How many texts are run at once.
        progress: Show a progress bar; None: for long work only.

    Returns:
        `SAEReport`; see its `to_frame()` and `fits`. Of a transcoder what is reconstructed is its output.

    Raises:
        ModelError: No attached SAE.
        TokenError: No texts, or one that cannot be read.
        DataError: No text has a token to predict.
        Refused: The model cannot read or edit the site, the SAE cannot be computed inside the model, or the site is after the stream.

    Source: the loss recovered as in Rajamanoharan et al. 2024, arXiv:2404.16014, with zeros as the worst; the other numbers as in Bricken
    et al. 2023, "Towards Monosemanticity", and SAELens' `run_evals` with special tokens ignored, whose `explained_variance` is `1 - fvu`.

    Differs: SAELens' zeros replace the states of special tokens, too.
    """
    adapter = checked(sae).model
    if sae.out.name == "final_norm":
        raise Refused(
            f"a report on an SAE of {sae.out}", "nothing comes after it but the unembedding", "use feature_activations and sae.reconstruct"
        )
    splice, end = sae.splice(keep_error=False), Site("resid_post", adapter.card.n_layers - 1)
    found, n, predicted = Stream(_Sums(sae)), 0, 0
    for prompts in batches(sae, texts, batch, progress):
        at = [readable(sae, prompt) for prompt in prompts]
        rows = [Row(i) for i in range(len(prompts))]
        rows += [Row(i, (replace(splice, position=where),)) for i, where in enumerate(at)]
        rows += [Row(i, (Edit(sae.out, 0.0, "set", where),)) for i, where in enumerate(at)]
        sites = tuple(dict.fromkeys((sae.site, sae.out, end)))
        reply = adapter.run(Request(prompts, rows, [Read(site, Each((*at, *at, *at))) for site in sites]), progress=False)
        states = dict(zip(sites, (reading.values for reading in reply.readings), strict=True))
        places = [(prompt, p) for prompt, where in zip(prompts, at, strict=True) for p in where]
        nth = [i for i, (prompt, p) in enumerate(places) if p + 1 < len(prompt)]
        if not nth:
            logprobs = torch.empty(0, 1)
        else:
            targets = torch.tensor([[prompt.ids[p + 1]] for prompt, p in (places[i] for i in nth)]).repeat(3, 1)
            chosen = torch.tensor([i + copy * len(places) for copy in range(3) for i in nth])
            logprobs = adapter.readout(states[end][chosen], tokens=targets).token_logprobs
        seen = states[sae.site][: len(places)]
        found.add(seen, seen if sae.out == sae.site else states[sae.out][: len(places)], logprobs)
        n, predicted = n + len(prompts), predicted + len(nth)
    if not predicted:
        raise DataError("no token to predict", "every text is one token long", "give longer texts")
    return SAEReport(
        card=adapter.card,
        sae=sae.name,
        site=sae.site,
        out=sae.out,
        sae_dtype=str(sae.sae.dtype).removeprefix("torch."),
        n_texts=n,
        n_targets=predicted,
        settings={},
        **{name: found.get(name) for name in ("n_tokens", "l0", "fvu", "cosine", "dead", "loss", "loss_sae", "loss_zero")},
    )


class _Sums:
    """The fields of `SAEReport` that need numbers, in float64."""

    def __init__(self, sae: AttachedSAE) -> None:
        self.sae = sae
        self.n_tokens, self.active, self.error, self.cosines = 0, 0, 0.0, 0.0
        self.mean, self.spread = torch.zeros(sae.out.width(sae.model.card), dtype=torch.float64), 0.0
        self.fired = torch.zeros(sae.n_features, dtype=torch.bool)
        self.losses, self.n_targets = torch.zeros(3, dtype=torch.float64), 0

    def add(self, states: Tensor, wanted: Tensor, logprobs: Tensor) -> None:
        """A batch's states at `site` and at `out`, `[n, width]`, and log-probabilities of targets `[3 * m, 1]`: plain, with the SAE, with
        zeros."""
        for start, some in chunks(self.sae, states):
            found, x_hat = self.sae.both(some)
            x, x_hat = wanted[start : start + len(some)].cpu().double(), x_hat.cpu().double()
            self.active += int(found.count_nonzero())
            self.fired |= (found != 0).any(0).cpu()
            self.error += float((x - x_hat).square().sum())
            self.cosines += float(torch.cosine_similarity(x, x_hat, dim=-1).sum())
            n, mean, apart = len(x), x.mean(0), x.mean(0) - self.mean
            self.spread += float((x - mean).square().sum() + apart.square().sum() * n * self.n_tokens / (n + self.n_tokens))
            self.n_tokens += n
            self.mean = self.mean + apart * n / self.n_tokens
        self.losses -= logprobs.double().reshape(3, len(logprobs) // 3).sum(1)
        self.n_targets += len(logprobs) // 3

    l0 = property(lambda self: self.active / self.n_tokens)
    fvu = property(lambda self: self.error / self.spread if self.spread else float("inf"))
    cosine = property(lambda self: self.cosines / self.n_tokens)
    dead = property(lambda self: 1 - float(self.fired.double().mean()))
    loss = property(lambda self: float(self.losses[0]) / self.n_targets)
    loss_sae = property(lambda self: float(self.losses[1]) / self.n_targets)
    loss_zero = property(lambda self: float(self.losses[2]) / self.n_targets)
