"""Training an SAE on states that are read already, by SAELens' trainer, through the steps that it offers to who drives it from outside:
so that a training can be watched, kept, and gone on with."""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hookbook import storage
from hookbook.errors import DataError, Refused
from hookbook.sae.saelens import sae_lens_module
from hookbook.sites import Site

ARCHITECTURES = ("batchtopk", "topk", "jumprelu", "standard", "gated", "matryoshka_batchtopk")
"""Of SAELens' trainable ones those whose features are computed inside the model, so that the loss recovered can be measured."""
FIXED = ("d_in", "d_sae", "dtype", "device", "reshape_activations", "metadata")
"""Settings of an architecture that follow from the model, the site and other arguments."""
LOOKS, CHECKPOINTS, EVALUATIONS = 200, 20, 5
"""How many batches are looked at in a training, how often it is kept, and how often it is judged on held-out texts."""
STEP = re.compile(r"step-(\d+)")


def configured(site: Site, width: int, n_features: int, architecture: str, settings: Mapping[str, Any], known: Mapping[str, Any]) -> Any:
    """The settings of an SAE of SAELens that is to be trained; `DataError` if SAELens would not take them."""
    sae_lens_module()
    from sae_lens.registry import get_sae_training_class
    from sae_lens.saes.sae import SAEMetadata

    if architecture not in ARCHITECTURES:
        near = difflib.get_close_matches(str(architecture), ARCHITECTURES, n=1)
        raise DataError(f"architecture={architecture!r}", f"those that can be trained here are {', '.join(ARCHITECTURES)}", *near[:1])
    kind: Any = get_sae_training_class(architecture)[1]
    names = sorted({f.name for f in fields(kind)} - {*FIXED})
    if unknown := sorted(settings.keys() - {*names}):
        near = difflib.get_close_matches(unknown[0], names, n=1)
        why = "it follows from the other arguments" if unknown[0] in FIXED else f"a {architecture} SAE of SAELens has no such setting"
        raise DataError(f"{unknown[0]}={settings[unknown[0]]!r}", why, f"use {near[0]}" if near else f"use some of {', '.join(names)}")
    chosen: dict[str, Any] = {"normalize_activations": "expected_average_only_in"} | ({"k": 32} if "k" in names else {}) | dict(settings)
    if "k" in chosen and not (_is_number(chosen["k"]) and 0 < chosen["k"] <= n_features):
        raise DataError(
            f"k={chosen['k']!r} of {n_features} features", "so many are active on a token", f"use a number from 1 to {n_features}"
        )
    if chosen["normalize_activations"] == "covariance_whitening":
        raise Refused("normalize_activations='covariance_whitening'", "whitening is not estimated here", "use expected_average_only_in")
    heads: dict[str, Any] = {"reshape_activations": "hook_z"} if site.name == "head_z" else {}
    try:
        config = kind(d_in=width, d_sae=n_features, metadata=SAEMetadata(**known), **heads, **chosen)
        with torch.random.fork_rng(devices=[]):
            get_sae_training_class(architecture)[0](config)
    except (ValueError, TypeError, AssertionError) as error:
        raise DataError(f"a {architecture} SAE with {chosen}", f"SAELens says: {error}", "see SAELens' training settings") from error
    return config


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


def trainer_of(config: Any, states: Tensor, *, samples: int, batch: int, lr: float, seed: int, device: str = "cpu") -> Any:
    """SAELens' trainer of a new SAE for states `[n, width]`, which starts from their mean and is scaled by their mean length.

    The rate rises over a twentieth of the steps and falls to 0 over the last quarter; features count as dead after an eighth of them
    without use.
    """
    from sae_lens.config import SAETrainerConfig
    from sae_lens.registry import get_sae_training_class
    from sae_lens.training.sae_trainer import SAETrainer

    steps, config = samples // batch, copy.deepcopy(config)
    if hasattr(config, "topk_threshold_lr"):  # a running mean that starts at 0: in few steps it would not reach the threshold
        config.topk_threshold_lr = max(config.topk_threshold_lr, min(1.0, 10 / steps))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sae = get_sae_training_class(config.architecture())[0](config)
    factor = None
    if config.normalize_activations == "expected_average_only_in":
        factor = config.d_in**0.5 / max(float(states.norm(dim=-1).double().mean()), 1e-12)
        sae.b_dec.data = states.double().mean(0).to(sae.b_dec) * factor
    asked = SAETrainerConfig(
        total_training_samples=steps * batch,
        train_batch_size_samples=batch,
        lr=lr,
        lr_end=lr,  # of no use for the schedule "constant", and needed
        lr_warm_up_steps=steps // 20,
        lr_decay_steps=steps // 4,
        dead_feature_window=min(1000, max(10, steps // 8)),
        device=device,
    )
    trainer = SAETrainer(asked, sae.to(device), iter(()))
    trainer.activation_scaler.scaling_factor = factor
    return trainer


@dataclass
class Log:
    """What was seen: a row for each batch that was looked at, and one for each judgement on held-out texts."""

    batches: list[dict[str, float]] = field(default_factory=list)
    judged: list[dict[str, float]] = field(default_factory=list)


def fit(
    trainer: Any,
    states: Tensor,
    judge: Callable[[Any], dict[str, float]],
    *,
    seed: int,
    folder: Path | None = None,
    progress: bool | None = None,
) -> Log:
    """Train on shuffled batches of states, from where the folder has it on: the same steps, to the last bit, with breaks or without.

    Args:
        trainer: See `trainer_of`; afterwards its SAE is trained, in the scale of its training. `inference` gives what is used.
        states: `[n, width]`
        judge: Of the SAE as it is then, what stands in a row of `Log.judged`.
        seed: Of the batches' order.
        folder: Keeps the last step that was kept; None: nothing is kept.
        progress: Show a bar; None: after some seconds.
    """
    size = trainer.cfg.train_batch_size_samples
    steps = trainer.cfg.total_training_samples // size
    log = Log() if folder is None else _resume(trainer, folder)
    looks, kept, judged = ({round(steps * i / n) for i in range(1, n + 1)} for n in (LOOKS, CHECKPOINTS, EVALUATIONS))
    bar = tqdm(
        total=steps, initial=trainer.n_training_steps, desc="SAE", unit="step", disable=progress is False, delay=0 if progress else 5
    )
    with bar, torch.enable_grad():
        while trainer.n_training_steps < steps:
            trainer.maybe_reset_sparsity()
            output = trainer.step(states[_batch(len(states), size, trainer.n_training_steps, seed)].float())
            trainer.n_training_steps += 1
            done = trainer.n_training_steps
            if done in looks:
                log.batches.append(_row(trainer, output))
                bar.set_postfix(FVU=f"{log.batches[-1]['fvu']:.3f}", L0=f"{log.batches[-1]['l0']:.1f}", refresh=False)
            if done in judged:
                log.judged.append({"step": done, **judge(inference(trainer))})
            if done in kept and folder is not None:
                _keep(trainer, log, folder)
            bar.update()
    trainer.set_final_sae_metadata()
    return log


def _batch(n: int, size: int, step: int, seed: int) -> Tensor:
    """Which states a step sees: every pass over them is shuffled anew."""
    each = n // size
    order = torch.randperm(n, generator=torch.Generator().manual_seed((seed << 20) + step // each))
    return order[step % each * size :][:size]


def _row(trainer: Any, output: Any) -> dict[str, float]:
    """SAELens' own numbers of a step."""
    known = trainer.build_train_step_log_dict(output, trainer.n_training_samples)
    losses = {name.removeprefix("losses/"): value for name, value in known.items() if name.startswith("losses/")}
    dead = known["sparsity/dead_features"] / trainer.sae.cfg.d_sae
    return {
        "step": trainer.n_training_steps,
        "fvu": 1 - known["metrics/explained_variance"],
        "l0": known["metrics/l0"],
        "dead": dead,
    } | losses


def _keep(trainer: Any, log: Log, folder: Path) -> None:
    """The trainer as SAELens keeps it, and the log; then what was kept before goes."""
    place = folder / f"step-{trainer.n_training_steps}"
    with storage.whole_folder(place) as scratch:
        trainer.save_checkpoint("trainer", base_path=scratch)
        (scratch / "log.json").write_text(json.dumps(vars(log)))
    for other in folder.iterdir():
        if STEP.fullmatch(other.name) and other != place:
            shutil.rmtree(other)


def _resume(trainer: Any, folder: Path) -> Log:
    """Put the trainer where the folder has it, if it has it anywhere."""
    there = [path for path in folder.glob("step-*") if STEP.fullmatch(path.name)]
    if not there:
        return Log()
    last = max(there, key=lambda path: int(path.name.removeprefix("step-")))
    try:
        trainer.sae.load_weights_from_checkpoint(last / "trainer")
        trainer.load_trainer_state(last / "trainer")
        return Log(**storage.load_json(last / "log.json"))
    except (OSError, ValueError, RuntimeError, LookupError, TypeError) as error:
        raise DataError(
            f"the training kept in {last}", f"{type(error).__name__}: {error}", "delete this folder: training starts anew"
        ) from error


def inference(trainer: Any) -> Any:
    """The SAE as SAELens saves it for use, with the scale of the states in its weights. The trainer keeps its own."""
    sae = copy.deepcopy(trainer.sae)
    if trainer.activation_scaler.scaling_factor is not None:
        sae.fold_activation_norm_scaling_factor(trainer.activation_scaler.scaling_factor)
    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        return sae_lens_module().SAE.load_from_disk(folder, device=str(trainer.sae.device))


def fingerprint(states: Tensor, *asked: Any) -> str:
    """Of the states, and of all else that a training depends on."""
    found = hashlib.sha256(json.dumps([list(states.shape), *asked], sort_keys=True, default=str).encode())
    for part in states.split(1 << 16):
        found.update(part.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
