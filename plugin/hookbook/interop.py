"""Vectors in the formats of other tools: control vector files (repeng, llama.cpp) and the objects of steering-vectors.

These tools add a vector to what a block gives, or its attention or MLP, at **every** token. The edit that does the same is
`vector.edit(position=slice(None), scope="all")`. Layers count blocks from 0 everywhere: `resid_post.L` is the stream leaving
block L, and so the `resid_pre` of the block after.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hookbook.adapter import Adapter
from hookbook.card import ModelCard
from hookbook.errors import EditError, Refused, ResultError, SiteError
from hookbook.models.loading import wrap
from hookbook.show.text import need
from hookbook.sites import Site, layers_to_sites
from hookbook.storage import whole
from hookbook.vectors import Vector

LAYER_TYPES = {"decoder_block": "resid_post", "self_attn": "attn_out", "mlp": "mlp_out"}
"""The sites of steering-vectors' layer types. What its norms give (`input_layernorm`, `post_attention_layernorm`) is no site."""

_WRITERS = {"attn_out": "head_z", "mlp_out": "mlp_act"}


def to_repeng(vectors: Vector | Iterable[Vector], path: str | os.PathLike[str]) -> Path:
    """Write a control vector: a GGUF file for repeng's `ControlVector.import_gguf` and llama.cpp's `--control-vector`.

    The tensor `direction.L`, `[d_model]` in float32, is added to `resid_post.L` by both. llama.cpp has none for block 0 and
    refuses a file with one; repeng takes it.

    Args:
        vectors: One, or several of one model at different layers, at `resid_post`, or at `resid_pre` of the block after.
        path: Where; missing folders are made. The file appears whole or not at all.

    Raises:
        SiteError: They are at other sites, of several models, or two are at one layer.
        Refused: The gguf package is not installed.

    Source: repeng 0.4.0, `ControlVector.export_gguf`; llama.cpp, `common_control_vector_load_one` and `llama_adapter_cvec`.
    """
    card, _, layers = _by_layer(vectors, ("resid_post",), "a control vector")
    gguf = need("gguf", "a control vector file", "gguf")
    with whole(path) as scratch:
        writer = gguf.GGUFWriter(scratch, "controlvector")
        writer.add_string("controlvector.model_hint", _model_type(card))
        writer.add_uint32("controlvector.layer_count", len(layers))
        for layer, vector in layers.items():
            writer.add_tensor(f"direction.{layer}", vector.values.detach().cpu().float().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return Path(path)


def from_repeng(model: Any, path: str | os.PathLike[str], *, model_type: str | None = None) -> dict[int, Vector]:
    """Read a control vector that repeng, llama.cpp's `cvector-generator` or `to_repeng` wrote.

    Args:
        model: The model it is for.
        path: The GGUF file.
        model_type: What the file says its model is, if that is not Hugging Face's `model_type` of this one: llama.cpp calls
            a Mistral `llama`.

    Returns:
        For each layer L that it has, the vector at `resid_post.L`.

    Raises:
        ResultError: The file cannot be read, is not a control vector, or is for another model.
        SiteError: It has a layer that the model has not.
        EditError: A vector has another width, NaN or infinity.
        Refused: The gguf package is not installed.
    """
    gguf = need("gguf", "a control vector file", "gguf")
    adapter = wrap(model)
    try:
        reader = gguf.GGUFReader(path)
        kind, hint = (field and field.contents() for field in map(reader.get_field, ("general.architecture", "controlvector.model_hint")))
        found = (
            {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors} if kind == "controlvector" else {}
        )
    except Exception as error:  # the reader meets a damaged file with whatever its bytes make of it
        raise ResultError(
            f"{path} cannot be read", f"{type(error).__name__}: {error}", "give a GGUF file that repeng or to_repeng wrote"
        ) from error
    wrong = [name for name in found if not re.fullmatch(r"direction\.(0|[1-9][0-9]*)", name)]
    if not found or wrong:
        why = (
            f"its architecture is {kind!r}"
            if kind != "controlvector"
            else f"it has {', '.join(wrong) or 'nothing'} where direction.L should be"
        )
        raise ResultError(f"{path} is no control vector", why, "give a GGUF file that repeng or to_repeng wrote")
    own = _model_type(adapter.card)
    if _letters(hint) != _letters(own if model_type is None else model_type):
        raise ResultError(
            f"{path} is for a model of type {hint!r}",
            f"{adapter.card.model_id} is of type {own!r}",
            f"load the model it is for, or pass model_type={hint!r} if it is another name of this one",
        )
    settings = {"file": Path(path).name, "model_type": hint}
    return _vectors(
        adapter, {int(name.removeprefix("direction.")): values.copy() for name, values in found.items()}, "resid_post", "repeng", settings
    )


def to_steering_vectors(model: Any, vectors: Vector | Iterable[Vector]) -> Any:
    """Vectors as a `SteeringVector` of steering-vectors: `with steering.apply(hf_model): ...` adds them at every token.

    Args:
        model: The model they are of, which says whether `attn_out` and `mlp_out` are what a module gives.
        vectors: One, or several at different layers: all at `resid_post` (or `resid_pre` of the block after), all at
            `attn_out`, or all at `mlp_out`.

    Raises:
        SiteError: They are at other sites, of several models or of another than `model`, or two are at one layer.
        Refused: steering-vectors is not installed; or a norm stands between the module and the site (Gemma 2 and 3).

    Source: steering-vectors 0.12.2, `SteeringVector.patch_activations`.
    """
    adapter = wrap(model)
    card, name, layers = _by_layer(vectors, tuple(LAYER_TYPES.values()), "a SteeringVector")
    if _key(card) != _key(adapter.card):
        raise SiteError(
            f"vectors of {card.model_id} for {adapter.card.model_id}", "they are directions in another space", "give the model they are of"
        )
    _check_module(adapter, name, layers)
    # its own requirements leave out transformers 5, with which it works
    library = need("steering_vectors", "a SteeringVector", "--no-deps steering-vectors && pip install scikit-learn")
    layer_type = next(kind for kind, site in LAYER_TYPES.items() if site == name)
    return library.SteeringVector({layer: vector.values.clone() for layer, vector in layers.items()}, layer_type)


def from_steering_vectors(model: Any, steering: Any) -> dict[int, Vector]:
    """A `SteeringVector` of steering-vectors, or its layers alone, as vectors.

    Args:
        model: The model it is for.
        steering: The object; or a dict of layers and tensors `[d_model]`, which are taken for those of its `decoder_block`.

    Returns:
        For each layer a vector, at the site of `LAYER_TYPES`.

    Raises:
        SiteError: Its layer type is no site, or it has a layer twice or one that the model has not.
        EditError: A vector has another width, NaN or infinity.
        Refused: A norm stands between the module and the site (Gemma 2 and 3).
    """
    adapter = wrap(model)
    layer_type = getattr(steering, "layer_type", "decoder_block")
    if layer_type not in LAYER_TYPES:
        raise SiteError(f"steering vectors at {layer_type!r}", "it is no site", f"use one of {', '.join(LAYER_TYPES)}")
    layers = getattr(steering, "layer_activations", steering)
    if not isinstance(layers, Mapping):
        raise SiteError(f"a {type(steering).__name__}", "it has no layers", "give a SteeringVector, or a dict of layers and tensors")
    name = LAYER_TYPES[layer_type]
    vectors = _vectors(adapter, layers, name, "steering-vectors", {"layer_type": layer_type})
    _check_module(adapter, name, vectors)
    return vectors


def _by_layer(vectors: Any, names: tuple[str, ...], what: str) -> tuple[ModelCard, str, dict[int, Vector]]:
    """Vectors of one model and one of these sites, by layer."""
    vectors = vectors.values() if isinstance(vectors, Mapping) else vectors
    every = list(vectors) if isinstance(vectors, Iterable) else [vectors]
    if not every or not all(isinstance(vector, Vector) for vector in every):
        raise SiteError(f"{what} of {every!r}"[:200], "it is made of vectors", "give a hookbook.Vector, or several")
    card = every[0].card
    if any(_key(vector.card) != _key(card) for vector in every):
        raise SiteError(f"{what} of several models", "they are directions in different spaces", "write one for each model")
    # the stream that enters a block is what the one before gave
    sites = [Site("resid_post", v.site.layer - 1) if v.site.name == "resid_pre" and v.site.layer else v.site for v in every]
    if not {site.name for site in sites} <= set(names) or len({site.name for site in sites}) > 1:
        given = ", ".join(str(vector.site) for vector in every)
        raise SiteError(f"{what} at {given}", f"it holds only {' or only '.join(names)}", "use hooks or edits for other sites")
    layers = {site.layer: vector for site, vector in zip(sites, every, strict=True) if site.layer is not None}
    if len(layers) < len(every):
        raise SiteError(f"{what} with several vectors at one layer", "it holds one for each", "add them up first")
    return card, sites[0].name, dict(sorted(layers.items()))


def _vectors(adapter: Adapter, layers: Mapping[Any, Any], name: str, recipe: str, settings: dict[str, Any]) -> dict[int, Vector]:
    found = {}
    for layer, values in layers.items():
        (site,) = layers_to_sites([layer], adapter.card, name)
        if site.name != name or site.layer in found:
            raise SiteError(f"layer {layer!r}", "each layer is one number, once", "give one vector for each layer")
        try:
            found[site.layer] = Vector.of(adapter, site, values, recipe=recipe, settings=settings)
        except (TypeError, RuntimeError) as error:
            raise EditError(f"{values!r} at {site}"[:200], str(error), "give a tensor [d_model]") from error
    if not found:
        raise SiteError("no layers were given", "there is nothing to add", "give one vector or more")
    return dict(sorted(found.items()))


def _check_module(adapter: Adapter, name: str, layers: Iterable[int]) -> None:
    """Raise if a site is not what the module of its layer type gives."""
    for layer in layers:
        adapter.require(Site(name, layer))
        if name in _WRITERS and adapter.writer(_WRITERS[name], layer)[1] is not None:
            raise Refused(
                f"{name}.{layer} of {adapter.card.architecture} as a SteeringVector",
                "it would be added before the norm, not after",
                "use resid_post",
            )


def _key(card: ModelCard) -> tuple[Any, ...]:
    return card.model_id, card.architecture, card.n_layers, card.d_model


def _model_type(card: ModelCard) -> str:
    """Hugging Face's `config.model_type`, which repeng writes; of an architecture that transformers has not, its name."""
    import transformers

    config = getattr(getattr(transformers, card.architecture, None), "config_class", None)
    return getattr(config, "model_type", "") or card.architecture


def _letters(model_type: Any) -> str:
    """What llama.cpp's and Hugging Face's names for an architecture mostly share: `gemma3` and `gemma3_text`."""
    return re.sub(r"_text$|[^a-z0-9]", "", str(model_type).lower())
