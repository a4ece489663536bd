"""Edits that stay: a direction taken out of all weights that write to the stream, as a folder that loads like any other model."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hookbook import storage
from hookbook.errors import ModelError, Refused
from hookbook.models.loading import load, wrap
from hookbook.vectors import Vector


def orthogonalize(model: Any, vector: Vector, folder: str | os.PathLike[str]) -> Path:
    """Write a model that cannot write a direction: `W - r r^T W` for every matrix and bias that writes to the stream.

    These are the embedding (and learned positions), attention's and the MLP's output projections. A tied unembedding is untied and stays
    as it was.

    Args:
        model: A TransformerBridge or an nnsight model on this machine, its adapter, or a name or folder for `hookbook.load`.
        vector: A direction of the stream, of any length; only its direction counts.
        folder: A new folder, for weights in the model's dtype, its config and the tokenizer; it appears whole or not at all.

    Returns:
        The folder.

    Raises:
        Refused: The model has no Hugging Face weights here, or a part that is not a plain matrix.
        ModelError: The folder exists, or the vector is of another width.

    Where nothing follows the projections (Llama, GPT-2), the new model is the old one under `hookbook.directional_ablation`. **Where a
    norm follows them (Gemma 2 and 3)** a matrix is made orthogonal to `g * r`, with `g` the norm's weight: what comes out of the norm then
    has no component along `r`, so nothing writes the direction; but the norm no longer counts the component in its scale, so the new model
    is not exactly the ablated one.

    Source: Arditi et al. 2024, arXiv:2406.11717.

    Differs: the paper has `r` itself for every matrix and says that weights and ablation are the same; where a norm follows, they are not,
    and matrices are made orthogonal to what the norm turns into `r`. Of a tied model the authors' code changes the unembedding with the
    embedding, here they are untied: the logits are those of ablation to 1.5e-6, theirs to 1.1e-2. Biases of what writes are changed here,
    not there. A bias for activation addition is not written: most families have none to write to.
    """
    path = Path(folder)
    if path.exists():
        raise ModelError(f"{path} exists", "an export does not overwrite", "name a new folder")
    adapter: Any = load(os.fspath(model), dtype="auto") if isinstance(model, (str, os.PathLike)) else wrap(model)
    names = next((names for key in ("where", "names") if hasattr(names := getattr(adapter, key, None), "writer_paths")), None)
    if adapter.remote or names is None:
        raise Refused(
            f"new weights of {adapter.card.model_id}",
            "this adapter holds no Hugging Face model",
            "give the name or folder it was loaded from",
        )
    if getattr(adapter.model, "compatibility_mode", False):
        raise Refused(
            f"new weights of {adapter.card.model_id}", "this bridge has processed weights", "give the name or folder it was loaded from"
        )
    if "embed_ln" in names.names.component_mapping:
        raise Refused(f"new weights of {adapter.card.model_id}", "a norm follows its embedding", "use hookbook.directional_ablation")
    if vector.values.shape != (adapter.card.d_model,) or not bool(vector.values.any()):
        raise ModelError(
            f"a direction of shape {list(vector.values.shape)}", f"this model's stream has width {adapter.card.d_model}", "use one of it"
        )
    new = _copy(names.module)
    writers = [names.writer_paths(name, layer) for layer in range(adapter.card.n_layers) for name in ("head_z", "mlp_act")]
    with torch.no_grad():
        _edit(new, writers, vector.values.double())
    with storage.whole_folder(path) as made:
        new.save_pretrained(made)
        adapter.tokenizer.save_pretrained(made)
    return path


def _copy(source: Any) -> Any:
    """A plain copy of a Hugging Face model, on the CPU, with an unembedding of its own; `source` may be inside a bridge."""
    config = copy.deepcopy(source.config)
    config.tie_word_embeddings = False
    with torch.device("meta"):
        new = type(source)(config)
    old = {key.replace("._original_component", ""): value for key, value in source.state_dict().items()}
    try:
        new.load_state_dict({key: old[key].detach().cpu().clone() for key in new.state_dict()}, assign=True)
    except (KeyError, RuntimeError) as error:
        raise Refused(
            f"a copy of {type(source).__name__}",
            f"its weights are not where its class has them ({error})",
            "give the name or folder it was loaded from",
        ) from error
    new.generation_config = copy.deepcopy(source.generation_config)
    return new


def _edit(new: Any, writers: list[tuple[str, str | None]], r: Tensor) -> None:
    """Take `r` out of what modules write, in place."""
    d_model = len(r)
    embeddings = {id(m): m for m in new.modules() if isinstance(m, torch.nn.Embedding)}
    for module in embeddings.values():
        if module.weight.shape[1] != d_model:
            raise Refused(
                "an embedding of another width",
                f"{list(module.weight.shape)} is projected before it reaches the stream",
                "edit the weights yourself",
            )
        _project(module.weight, -1, r)
    for path, norm in writers:
        module = new.get_submodule(path)
        out = {"Linear": 0, "Conv1D": -1}.get(type(module).__name__)  # transformers' Conv1D has [in, out]
        if out is None:
            raise Refused(f"new weights of {path}", f"a {type(module).__name__} is not a matrix", "use hookbook.directional_ablation")
        direction = r if norm is None else r * _gain(new.get_submodule(norm), norm, d_model)
        _project(module.weight, out, direction)
        if module.bias is not None:
            _project(module.bias, -1, direction)


def _gain(norm: Any, name: str, d_model: int) -> Tensor:
    """The weight of a norm, however it is kept: what it makes of ones."""
    norm = copy.deepcopy(norm).double()
    gain, x = norm(torch.ones(d_model, dtype=torch.float64)), torch.linspace(-1, 2, d_model, dtype=torch.float64)
    scaled = norm(x)
    if (scaled - gain * x / x.square().mean().sqrt()).abs().max() > 1e-3 * scaled.abs().max():
        raise Refused(
            f"new weights before {name}", "this norm does more than scale by the root mean square", "use hookbook.directional_ablation"
        )
    return gain.double()


def _project(weight: Tensor, dim: int, r: Tensor) -> None:
    """Take `r` out of one dimension."""
    unit = r / r.norm()
    wide = weight.detach().double().movedim(dim, -1)
    weight.copy_((wide - (wide @ unit)[..., None] * unit).movedim(-1, dim))
