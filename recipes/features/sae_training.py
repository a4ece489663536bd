"""Training a sparse autoencoder on a user's model: SAELens' trainer, on states that the model has on texts of one's own or of its own.

What an SAE is, and what is made small in its training, term by term, is on the page "Train a sparse autoencoder".
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hookbook import sae as saes, tasks
from hookbook.asking import encode_prompts
from hookbook.engine import cost
from hookbook.errors import DataError, Refused, ResultError, SiteError, TokenError, check_counts
from hookbook.recipe import ModelCard, recipe, wrap
from hookbook.recipes.features.sae_report import sae_report
from hookbook.request import Each, Read, Request, Row, Sampling
from hookbook.results import Axes, DataFrame, Result, View
from hookbook.sae import AttachedSAE, training
from hookbook.sae.saelens import centred, sae_lens_module
from hookbook.show.plots import COLOURS, drawing
from hookbook.show.tidy import tidy
from hookbook.sites import Site
from hookbook.tokens import Tokens

DRAWN, AT_ONCE = 128, 32
"""Tokens of a text that the model is made to write, and how many texts it writes at once, which are kept together."""
SITES = ("embed", "resid_pre", "head_z", "attn_out", "mlp_in", "mlp_act", "mlp_out", "resid_post")
"""Where an SAE can be trained."""


@dataclass(frozen=True, eq=False)
class SAETraining(Result):
    """An SAE, and how it got there: the error and the sparsity of batches in training, and of held-out texts as well what the model loses
    with the reconstruction in place of its states."""

    card: ModelCard
    sae: str
    """What the SAE is called, with a fingerprint of its weights."""
    site: Site
    n_texts: int
    """How many texts it was trained on."""
    n_tokens: int
    """How many states it was trained on, without those of special tokens."""
    held_out_texts: tuple[Tokens, ...]
    """The texts it was judged on."""
    steps: Tensor
    """`[n]`: after how many steps a batch was looked at."""
    fvu: Tensor
    """`[n]`: of these batches the fraction of variance unexplained: 0 is perfect, 1 is the mean state."""
    l0: Tensor
    """`[n]`: how many features were active on a state, in the mean."""
    dead: Tensor
    """`[n]`: the share of features that were not active for an eighth of the training."""
    losses: dict[str, Tensor]
    """`[n]` each: what was made small, and its terms by SAELens' names, in SAELens' scale, where a state has the length `sqrt(width)` in
    the mean."""
    held_out_steps: Tensor
    """`[m]`: after how many steps the SAE was judged, as it would be used then."""
    held_out_fvu: Tensor
    """`[m]`: as `fvu`, of held-out texts; see `hb.sae_report`."""
    held_out_l0: Tensor
    """`[m]`: as `l0`."""
    loss_recovered: Tensor
    """`[m]`: 1 if the reconstruction does no harm to the model's predictions, 0 if as much as zeros; see `hb.sae_report`."""
    weights: dict[str, Tensor]
    """Of the SAE, by SAELens' names."""
    config: dict[str, Any]
    """Its settings, as SAELens writes them."""
    settings: dict[str, Any]

    @cached_property
    def attached(self) -> AttachedSAE:
        """The SAE at its site of the model it was trained on. Of a training that was loaded from a file: `attach(model)`."""
        raise ResultError("the model of a training from a file", "a file has numbers alone", "attach it: training.attach(model)")

    def attach(self, model: Any) -> AttachedSAE:
        """The SAE at its site of a model; see `hb.sae.attach`."""
        sae = sae_lens_module().SAE.from_dict(self.config)
        sae.load_state_dict(self.weights)
        return saes.attach(model, sae)

    def to_frame(self) -> DataFrame:
        """One row for each number: `step`, `texts` (`training` or `held out`), `metric`, `value`."""
        seen = {"FVU": self.fvu, "L0": self.l0, "dead": self.dead, **self.losses}
        held = {"FVU": self.held_out_fvu, "L0": self.held_out_l0, "loss recovered": self.loss_recovered}
        rows = [
            (step, texts, metric, value)
            for texts, steps, known in (("training", self.steps, seen), ("held out", self.held_out_steps, held))
            for metric, values in known.items()
            for step, value in zip(steps.tolist(), values.tolist(), strict=True)
        ]
        return tidy({"step texts metric value": rows})

    def plot(self, ax: Axes | None = None) -> Axes:
        """Error (left) and sparsity (right) over the steps: lines of batches in training, dots of held-out texts, with the loss recovered
        beside the dots."""
        with drawing(ax, (7, 3.5), f"Training an SAE of {self.site}, {self.card.model_id}") as ax:
            right = ax.twinx()
            right.spines["right"].set_visible(True)
            for at, axes, name, seen, held in (
                (0, ax, "FVU", self.fvu, self.held_out_fvu),
                (1, right, "L0", self.l0, self.held_out_l0),
            ):
                axes.plot(self.steps.tolist(), seen.tolist(), color=COLOURS[at], label=name, linewidth=1.5)
                axes.plot(self.held_out_steps.tolist(), held.tolist(), "o", color=COLOURS[at], label=f"{name}, held out", markersize=4)
                axes.set_ylabel("variance unexplained (FVU)" if not at else "features active (L0)", color=COLOURS[at])
                axes.set_ylim(bottom=0)
            for step, height, share in zip(
                self.held_out_steps.tolist(), self.held_out_fvu.tolist(), self.loss_recovered.tolist(), strict=True
            ):
                ax.annotate(f"{share:.2f}", (step, height), (0, -11), textcoords="offset points", ha="center", fontsize=7)
            ax.set_xlabel("steps (dots: held-out texts, with the loss recovered)")
        return ax

    def view(self) -> View:
        """The held-out numbers of the trained SAE, and what it was trained on."""
        frame: Any = self.to_frame()
        last = frame[(frame["texts"] == "held out") & (frame["step"] == int(self.held_out_steps[-1]))]
        said = (
            f"An SAE of {self.config['d_sae']} features ({self.config['architecture']}) at {self.site} of {self.card.model_id}, trained on "
            f"{self.n_tokens:,} states of {self.n_texts} texts in {int(self.steps[-1])} steps; judged on {len(self.held_out_texts)} others."
        )
        return View.table(last, said)


@recipe
def train(
    model: Any,
    texts: Any = None,
    *,
    site: Site | str,
    tokens: int | None = None,
    beginnings: Sequence[str] | None = None,
    bos: bool | None = None,
    n_features: int = 2048,
    architecture: str = "batchtopk",
    samples: int = 500_000,
    batch: int = 2048,
    lr: float = 4e-4,
    held_out: float = 0.05,
    seed: int = 0,
    progress: bool | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> SAETraining:
    """Train an SAE on a model's states with SAELens' trainer, and judge it on held-out texts; `training.attached` is ready for use.

    Args:
        model: Any model `hookbook.wrap` takes, on this machine. It, its tokenizer and its mode are as before afterwards.
        texts: Prompts, as all recipes take them; or None, with `tokens`.
        site: Whose states: any whole tensor of the stream, of attention's heads, or of the MLP, such as `resid_post.9`.
        tokens: The model itself writes about so many: it goes on from `beginnings`, at most 128 tokens a text, each drawn among the 400
            likeliest.
        beginnings: Of these texts, in turn; None: the openings that ship (`hb.tasks.openings`).
        bos: Whether texts begin with a beginning-of-sequence token; None: as the tokenizer does. Special tokens are never trained on.
        n_features: How many features the SAE has.
        architecture: Of SAELens: `batchtopk` (which becomes a JumpReLU SAE), `topk`, `jumprelu`, `standard`, `gated`, or
            `matryoshka_batchtopk`.
        samples: How many states are shown, in batches of `batch`, each of them several times if there are fewer.
        lr: The largest learning rate.
        held_out: The share of the texts that it is judged on and not trained on, at least one.
        seed: Of the SAE's first weights, the order of states, the held-out texts, and what is drawn.
        progress: See `hookbook.patchscope`.
        checkpoint: A folder that keeps what is done: texts, states and steps. The same call with it goes on where it was, after a crash as
            well, and ends with the same weights, bit for bit (with as many threads).
        settings: Of the architecture, by SAELens' names: `k=32` of the TopK ones, `l1_coefficient=1.0` of a standard SAE,
            `l0_coefficient=1.0` of JumpReLU.

    Returns:
        `SAETraining`: curves, the SAE's weights, and `attached`. `training.attached.sae.save_model(folder)` is a folder that
        `hb.sae.attach` and SAELens take.

    Raises:
        Refused: A remote model: its states would have to come here. Or the model cannot read or edit the site.
        ModelError: sae-lens is not installed.
        SiteError: No site of this model at which an SAE can be trained.
        DataError: Neither or both of `texts` and `tokens`, too little of them, or settings that SAELens does not have.
        TokenError: A text that cannot be read, or counts that are none.

    Source: Bricken et al. 2023, "Towards Monosemanticity"; BatchTopK: Bussmann et al. 2024, arXiv:2412.06410; TopK: Gao et al. 2024,
    arXiv:2406.04093; JumpReLU: Rajamanoharan et al. 2024, arXiv:2407.14435. Steps, losses and schedules are SAELens'.

    Differs: the decoder's bias begins as the mean state; the threshold of a BatchTopK SAE follows faster in short trainings, which SAELens'
    default would leave near 0; states are held in memory, in float32.

    Example:
        training = hb.sae.train(model, tokens=20_000, site="resid_post.9", checkpoint="my-sae")
        training.plot()
        training.attached.edit(3, to=0)
    """
    adapter = wrap(model)
    if adapter.remote:
        raise Refused(
            "training an SAE on a remote model", "all states would have to come here, and the SAE to go there at each look", "load it here"
        )
    where = Site.parse(site).check(adapter.card)
    if where.name not in SITES or where.unit is not None:
        raise SiteError(f"an SAE of {where}", "SAEs are trained on whole tensors of one vector a token", f"use one of {', '.join(SITES)}")
    adapter.require(where)
    check_counts(n_features=n_features, samples=samples, batch=batch)
    check_counts(0, seed=seed)
    if seed >= 1 << 32:
        raise TokenError(f"seed={seed}", "", "use a smaller one")
    for name, number, most in (("lr", lr, 1.0), ("held_out", held_out, 0.5)):
        if not isinstance(number, Real) or isinstance(number, bool) or not 0 < number <= most:
            raise DataError(f"{name}={number!r}", "", f"use a number above 0, and at most {most:g}")
    if (texts is None) == (tokens is None):
        raise DataError("texts and tokens" if tokens else "neither texts nor tokens", "one of them says what to train on", "give one")
    if texts is not None and beginnings is not None:
        raise DataError("beginnings of texts that are given", "nothing is drawn", "leave beginnings out, or give tokens instead of texts")
    if samples < batch:
        raise DataError(f"samples={samples} in batches of {batch}", "this is no step", "show more, or make batches smaller")
    special = frozenset(adapter.tokenizer.all_special_ids)
    known = {
        "model_name": adapter.card.model_id,
        "hook_name": where.hook_name,
        "prepend_bos": adapter.encode("a", bos=bos).ids[0] in special,
        "exclude_special_tokens": True,
        "dataset_path": "sampled from the model itself" if texts is None else None,
        "model_from_pretrained_kwargs": {"center_writing_weights": True} if centred(adapter) else None,
    }
    config = training.configured(where, where.width(adapter.card), n_features, architecture, settings, known)
    folder = None if checkpoint is None else Path(checkpoint)
    prompts = _drawn(adapter, tokens, beginnings, bos, seed, progress, folder) if texts is None else encode_prompts(adapter, texts, bos)
    learnt, judged = _halves(prompts, special, held_out, seed)
    places = tuple(tuple(p for p, token in enumerate(prompt.ids) if token not in special) for prompt in learnt)
    n = sum(map(len, places))
    if n < batch:
        raise DataError(
            f"{n} tokens to train on, in batches of {batch}", "a batch has each once", "give more text, or make batches smaller"
        )
    request = Request(learnt, [Row(i) for i in range(len(learnt))], [Read(where, Each(places))])
    states = adapter.run(request, progress=progress, checkpoint=folder and folder / "states").readings[0].values
    if (account := cost.account()) is not None:
        return _planned(adapter, states, config, judged, batch, account)
    states = states.detach().float().cpu()
    if not states.isfinite().all():
        raise DataError(f"states with NaN or infinity at {where}", "nothing could be learnt from them", "load the model in float32")

    def judge(sae: Any) -> dict[str, float]:
        found = sae_report(saes.attach(adapter, sae), judged, progress=False)
        return {"fvu": float(found.fvu), "l0": float(found.l0), "loss_recovered": float(found.loss_recovered)}

    asked = {"samples": samples, "batch": batch, "lr": lr, "seed": seed}
    kept = folder and folder / training.fingerprint(states, config.to_dict(), asked, [prompt.ids for prompt in judged])
    with torch.inference_mode(False):
        trainer = training.trainer_of(config, states, **asked, device=adapter.card.device)
        log = training.fit(trainer, states, judge, seed=seed, folder=kept, progress=progress)
        attached = saes.attach(adapter, training.inference(trainer))
    seen, held = ({name: torch.tensor([row[name] for row in rows]) for name in rows[0]} for rows in (log.batches, log.judged))
    result = SAETraining(
        card=adapter.card,
        sae=attached.name,
        site=where,
        n_texts=len(learnt),
        n_tokens=n,
        held_out_texts=tuple(judged),
        steps=seen.pop("step").long(),
        fvu=seen.pop("fvu"),
        l0=seen.pop("l0"),
        dead=seen.pop("dead"),
        losses=seen,
        held_out_steps=held["step"].long(),
        held_out_fvu=held["fvu"],
        held_out_l0=held["l0"],
        loss_recovered=held["loss_recovered"],
        weights={name: value.detach().cpu() for name, value in attached.sae.state_dict().items()},
        config=attached.sae.cfg.to_dict() | {"device": "cpu"},
        settings=dict(settings),
    )
    result.__dict__["attached"] = attached
    return result


def _drawn(
    adapter: Any, tokens: Any, beginnings: Sequence[str] | None, bos: bool | None, seed: int, progress: bool | None, folder: Path | None
) -> list[Tokens]:
    """Texts that the model writes, with their beginnings."""
    check_counts(tokens=tokens)
    listed = [text for name in ("english", "neutral", "news") for text in tasks.openings(name)] if beginnings is None else beginnings
    prompts = encode_prompts(adapter, listed, bos)
    each = min(DRAWN, adapter.card.n_ctx - max(map(len, prompts)))
    if each < 1:
        raise TokenError(f"beginnings of {max(map(len, prompts))} tokens", f"this model reads {adapter.card.n_ctx}", "give shorter ones")
    rows, found = [Row(i % len(prompts)) for i in range(-(-tokens // each))], []
    hidden = cost.account() is not None or progress is False
    for start in tqdm(range(0, len(rows), AT_ONCE), desc="texts", leave=False, disable=hidden, delay=0 if progress else 5):
        some = rows[start : start + AT_ONCE]
        request = Request(prompts, some, generate=each, sampling=Sampling((seed << 24) + start, top_k=400))
        drawn = adapter.run(request, progress=False, checkpoint=folder and folder / "texts").tokens
        if cost.account() is not None:  # a plan: as long as they can be
            drawn = torch.full((len(some), each), adapter.encode("a", bos=bos).ids[-1])
        said = [[token for token in line if token >= 0] for line in drawn.tolist()]
        found += [adapter.encode([*prompts[row.prompt].ids, *new]) for row, new in zip(some, said, strict=True)]
    return found


def _halves(prompts: list[Tokens], special: frozenset[int], share: float, seed: int) -> tuple[list[Tokens], list[Tokens]]:
    """Those to train on and those to judge by; of one token that is not special there is nothing to predict."""
    long = [prompt for prompt in prompts if sum(token not in special for token in prompt.ids) > 1]
    if len(long) < 2:
        raise DataError(f"{len(long)} texts of two tokens or more", "one is to train on, another to judge by", "give more texts")
    order = torch.randperm(len(long), generator=torch.Generator().manual_seed(seed)).tolist()
    cut = max(1, round(share * len(long)))
    return [long[i] for i in sorted(order[cut:])], [long[i] for i in order[:cut]]


def _planned(adapter: Any, states: Tensor, config: Any, judged: list[Tokens], batch: int, account: Any) -> Any:
    """What is asked of the model while the SAE is trained, and the memory of both."""
    from sae_lens.registry import get_sae_class

    kind, settings = get_sae_class(config.get_inference_config_class().architecture())
    sae = kind(settings(d_in=config.d_in, d_sae=config.d_sae, metadata=config.metadata))
    for _ in range(training.EVALUATIONS):
        sae_report(saes.attach(adapter, sae), judged)
    account.add((), peak_bytes=4 * (states.numel() + 4 * 2 * config.d_in * config.d_sae + 6 * batch * config.d_sae))
    return None
