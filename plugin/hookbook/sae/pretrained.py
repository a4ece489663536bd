"""SAEs as people have them: SAELens' own folders, those of Gemma Scope 2, and names of SAELens' table. SAELens loads them all; what it has
no disk loader for is brought into its words here."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from hookbook.errors import ModelError
from hookbook.sae.saelens import checked_sae, sae_lens_module

LAYOUTS = {
    ("cfg.json", "sae_weights.safetensors"): "SAELens",
    ("config.json", "params.safetensors"): "Gemma Scope 2",
}
"""Files that make a folder an SAE, and whose layout they are."""
HOOKS = {
    "output": "hook_resid_post",
    "self_attn.o_proj.input": "attn.hook_z",
    "pre_feedforward_layernorm.output": "hook_mlp_in",
    "post_feedforward_layernorm.output": "hook_mlp_out",
}
"""What Hugging Face calls a place inside a block of Gemma 3, and what SAELens calls it."""


def found(given: Any) -> Any:
    """An SAE of SAELens: the one given, that of a folder, or that of a release and an id; or `ModelError`."""
    if isinstance(given, (str, Path)):
        return of_folder(given)
    if isinstance(given, tuple) and len(given) == 2 and all(isinstance(part, str) for part in given):
        return of_release(*given)
    return checked_sae(given)


def of_folder(folder: str | Path) -> Any:
    """The SAE in a folder of one of the `LAYOUTS`, in float32 if its file has less."""
    sae_lens, path = sae_lens_module(), Path(folder)
    whose = next((whose for files, whose in LAYOUTS.items() if all((path / file).is_file() for file in files)), None)
    if whose is None:
        raise _no_folder(folder)
    try:
        sae = sae_lens.SAE.load_from_disk(path, **({"converter": gemma_scope_2} if whose == "Gemma Scope 2" else {}))
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise ModelError(
            f"{path} holds no SAE that SAELens can load",
            f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            "give a folder as save_model() or save_inference_model() of SAELens' SAEs write it, or as Gemma Scope 2 has it",
        ) from error
    return sae if sae.dtype.itemsize >= 4 else sae.to(torch.float32)


def of_release(release: str, sae_id: str) -> Any:
    """The SAE that SAELens' table calls so, or of any repository of the hub; wrong names are refused before anything is asked for."""
    sae_lens_module()
    from huggingface_hub import constants, try_to_load_from_cache
    from sae_lens import SAE
    from sae_lens.loading.pretrained_saes_directory import get_config_overrides, get_pretrained_saes_directory

    table = get_pretrained_saes_directory()
    if release not in table and "/" not in release:
        raise ModelError(f"no release {release!r}", "SAELens' table does not have it", _near(release, table))
    if release in table and sae_id not in table[release].saes_map:
        raise ModelError(f"no SAE {sae_id!r} in {release}", "SAELens' table does not have it", _near(sae_id, table[release].saes_map))
    known = table.get(release)
    repo, place = (known.repo_id, known.saes_map[sae_id]) if known else (release, sae_id)
    if constants.HF_HUB_OFFLINE and known and known.conversion_func == "gemma_3":
        # SAELens asks the hub for shapes even so, also if the files are in the hub's cache
        kept = try_to_load_from_cache(repo, f"{place}/params.safetensors")
        if isinstance(kept, str):
            sae = of_folder(Path(kept).parent)
            sae.cfg.metadata.neuronpedia_id = get_config_overrides(release, sae_id).get("neuronpedia_id")
            return sae
        raise _offline(release, sae_id, repo, place, "HF_HUB_OFFLINE is set, and its files are not in the cache")
    try:
        return SAE.from_pretrained(release, sae_id)
    except (OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise _offline(release, sae_id, repo, place, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error


def _offline(release: str, sae_id: str, repo: str, place: str, why: str) -> ModelError:
    instead = f"fetch the folder {place} of {repo} where there is a network, and give its path"
    return ModelError(f"SAELens cannot load {sae_id!r} of {release}", why, instead)


def _near(name: str, names: Any) -> str:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"use {' or '.join(map(repr, near))}" if near else f"use one of its {len(names)}, such as {next(iter(names))!r}"


def _no_folder(folder: str | Path) -> ModelError:
    """Why a folder is none of an SAE, with what was meant if that can be told."""
    path, wanted = Path(folder), "; ".join(f"{' and '.join(files)} ({whose})" for files, whose in LAYOUTS.items())
    if path.is_dir():
        inside = sorted({file.parent for files in LAYOUTS for file in path.rglob(files[1])})[:3]
        instead = (
            f"give one of the folders in it, such as {' or '.join(map(str, inside))}" if inside else "give the folder with these files"
        )
        return ModelError(f"no SAE in {path}", f"a folder of one has {wanted}", instead)
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    table, name = get_pretrained_saes_directory(), str(folder)
    if name in table:
        return ModelError(
            f"{name!r} as an SAE", "it is a release of several", f"give {(name, next(iter(table[name].saes_map)))!r}, or another id"
        )
    near = difflib.get_close_matches(name, table, n=1, cutoff=0.8)
    instead = f"give a folder, or a release and an id{f', such as {(near[0], next(iter(table[near[0]].saes_map)))!r}' if near else ''}"
    return ModelError(f"no folder {name!r}", "an SAE is a folder, a release with an id, or an object of SAELens", instead)


def gemma_scope_2(
    path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A folder of Gemma Scope 2 in SAELens' words: settings and weights, as SAELens' `gemma_3` loader gives them of the hub's files.

    It is a disk loader, as `SAE.load_from_disk(folder, converter=...)` takes it. SAELens has the same for the hub alone, and tells the site
    from the folder's name; here `config.json` says it.
    """
    from sae_lens.loading.pretrained_sae_loaders import load_safetensors_weights

    told = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    raw = load_safetensors_weights(Path(path) / "params.safetensors", device=device, dtype="float32")
    if told.get("architecture") != "jump_relu" or raw["w_dec"].dim() != 2:
        raise ValueError(
            f"architecture {told.get('architecture')!r} with a decoder of shape {list(raw['w_dec'].shape)}, not one JumpReLU SAE"
        )
    reads, writes = told["hf_hook_point_in"], told.get("hf_hook_point_out")
    transcoder = "pre_feedforward_layernorm" in reads
    kind = "jumprelu" if not transcoder else "jumprelu_skip_transcoder" if told.get("affine_connection") else "jumprelu_transcoder"
    model = "google/" + told["model_name"].removeprefix("google/").replace("-v3", "-3")
    d_in, d_sae = raw["w_enc"].shape
    settings = {
        "architecture": kind,
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": device,
        "model_name": model.replace("-pt", "") if "270m" in model else model,  # the only base model without that ending
        "hook_name": _hook(reads),
        "hook_head_index": None,
        "finetuning_scaling_factor": False,
        "sae_lens_training_version": None,
        "prepend_bos": True,
        "dataset_path": "monology/pile-uncopyrighted",
        "context_size": 1024,
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "hf_hook_name": reads,
    }
    if transcoder:
        settings |= {"hook_name_out": _hook(writes), "hf_hook_name_out": writes, "d_out": raw["w_dec"].shape[1]}
    weights = {name: raw[name.lower()] for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
    if "affine_skip_connection" in raw:
        weights["W_skip"] = raw["affine_skip_connection"].T.contiguous()  # stored from input to output
    return settings | (cfg_overrides or {}), weights


def _hook(name: Any) -> str:
    match = re.search(r"layers\.(\d+)\.(.+)$", name or "")
    if match is None or match[2] not in HOOKS:
        raise ValueError(f"hook name {name!r}, where layers.N.{' or layers.N.'.join(HOOKS)} is meant")
    return f"blocks.{match[1]}.{HOOKS[match[2]]}"
