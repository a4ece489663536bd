"""Finding, loading and wrapping models."""

from __future__ import annotations

import copy
import importlib
import os
import sys
from importlib.metadata import entry_points
from typing import Any

from hookbook.adapter import Adapter
from hookbook.errors import ModelError, Refused
from hookbook.models import packages

# (adapter module, class, the library an object of its models comes from)
_BUILT_IN = (
    ("hookbook.adapters.bridge", "BridgeAdapter", "transformer_lens"),
    ("hookbook.adapters.hooked", "HookedAdapter", "transformer_lens"),
    ("hookbook.adapters.tracing", "TracingAdapter", "nnsight"),
)
BACKENDS = {"transformer_lens": "tl", "nnsight": "nnsight"}
"""The backends `load` knows, and the extra that installs each."""


def wrap(model: Any, tokenizer: Any = None, remote: bool | str = False) -> Adapter:
    """A model under hookbook's interface; the model itself is not changed.

    Args:
        model: A TransformerLens `TransformerBridge` or `HookedTransformer`, an nnsight `TransformersModel` or
            `LanguageModel`, a model of a third-party adapter (entry point group `hookbook.adapters`), or an adapter,
            which is returned as it is.
        tokenizer: Used instead of the model's own.
        remote: Run an nnsight model on a server: True for the one nnsight is configured for (NDIF), or a URL. Every recipe
            call is then one job. The model's weights are not needed here.

    Raises:
        ModelError: No adapter is for this model, or it cannot be used as it is.
    """
    if remote:
        return _wrap_remote(model, tokenizer, remote)
    if isinstance(model, Adapter):
        if tokenizer is not None:
            raise ModelError("a tokenizer for a model that is already wrapped", "it has its own", "wrap adapter.model with the tokenizer")
        model.look()
        return model
    for accepts, make in _adapters():
        if accepts(model):
            adapter = make(model, tokenizer)
            adapter.look()
            return adapter
    raise ModelError(
        f"a {type(model).__module__}.{type(model).__qualname__} is not a model hookbook knows",
        "no adapter accepts it",
        "give a TransformerBridge, a HookedTransformer, an nnsight TransformersModel, or a name to hookbook.load",
    )


def nnsight_blocks(model: Any) -> list[Any]:
    """The envoys of an nnsight model's blocks."""
    from hookbook.adapters.tracing import blocks_of

    return blocks_of(model)


def _wrap_remote(model: Any, tokenizer: Any, remote: bool | str) -> Adapter:
    if "nnsight" not in sys.modules or isinstance(model, Adapter):
        raise Refused(
            f"remote={remote!r} for a {type(model).__name__}", "only nnsight models run on a server", "give an nnsight TransformersModel"
        )
    from hookbook.adapters.remote import RemoteAdapter
    from hookbook.adapters.tracing import accepts

    if not accepts(model):
        raise Refused(
            f"remote={remote!r} for a {type(model).__name__}", "only nnsight models run on a server", "give an nnsight TransformersModel"
        )
    if isinstance(remote, str) and not remote.startswith(("http://", "https://")):
        raise ModelError(f"remote={remote!r}", "it is no URL", "write remote=True, or a URL that starts with http:// or https://")
    return RemoteAdapter(model, tokenizer, remote)


def _adapters() -> Any:
    """Pairs of (accepts, make). A backend's adapter is imported only if the backend is: else the model cannot be its."""
    for module, cls, library in _BUILT_IN:
        if library in sys.modules:
            try:
                found = importlib.import_module(module)
            except ImportError:
                continue  # TransformerLens 4 has no HookedTransformer; an nnsight without TransformerLens has no paths
            yield found.accepts, getattr(found, cls)
    for point in entry_points(group="hookbook.adapters"):
        found = point.load()
        yield found.accepts, found


def load(name: str, backend: str = "transformer_lens", *, dtype: str = "float32", device: str | None = None) -> Adapter:
    """Load a model by name and wrap it.

    Args:
        name: `gemma-3-270m` or `smollm2-135m-instruct`, found in their Python packages if installed; a local folder; or
            any other name, from the Hugging Face hub.
        backend: `transformer_lens` or `nnsight`.
        dtype: `float32`, `float64`, `bfloat16`, `float16`, or `auto`: the checkpoint's own.
        device: Such as `cpu` or `cuda`; None: a GPU if there is one.

    Raises:
        ModelError: The name, backend or dtype is unknown, or the model is neither here nor, offline, in the cache;
            or its files are broken, or the device is not there.
    """
    if backend not in BACKENDS:
        raise ModelError(f"no backend {backend!r}", "", f"use one of {', '.join(BACKENDS)}")
    if dtype not in ("float32", "float64", "bfloat16", "float16", "auto"):
        raise ModelError(f"no dtype {dtype!r}", "", "use float32, float64, bfloat16, float16 or auto")
    try:
        importlib.import_module(backend)
    except ImportError as error:
        raise ModelError(f"backend {backend!r} is not installed", str(error), f'pip install "hookbook[{BACKENDS[backend]}]"') from error
    module, tokenizer, source = load_module(name, dtype, device)
    return wrap((tracing if backend == "nnsight" else bridge)(module, tokenizer, source), tokenizer)


def tracing(module: Any, tokenizer: Any, source: str) -> Any:
    """An nnsight model of what `load_module` gives."""
    from nnsight import TransformersModel

    return TransformersModel(module, tokenizer=_apart(tokenizer))


def bridge(module: Any, tokenizer: Any, source: str) -> Any:
    """A TransformerBridge of what `load_module` gives.

    `TransformerBridge.boot_transformers` also loads the processor of a model that takes pictures, and installs torchvision if that fails.
    Texts need none.

    Raises:
        ModelError: TransformerLens does not know the architecture.
    """
    from transformer_lens.model_bridge.sources import build_bridge_from_module
    from transformer_lens.model_bridge.sources.transformers import determine_architecture_from_hf_config

    try:
        architecture = determine_architecture_from_hf_config(module.config)
        return build_bridge_from_module(module, architecture, hf_config=module.config, tokenizer=_apart(tokenizer), model_name=source)
    except ValueError as error:
        raise ModelError(
            f"{type(module).__name__} cannot be loaded as a TransformerBridge",
            _first_line(error),
            "use backend='nnsight', or another model",
        ) from error


def _apart(tokenizer: Any) -> Any:
    """A copy for a library that changes what it is given: nnsight the side of padding, TransformerLens the tokens that are missing.

    The vocabulary, which takes seconds to copy, is shared; unless TransformerLens would add an end token to it.
    """
    shared = [tokenizer.backend_tokenizer] if tokenizer.is_fast and tokenizer.eos_token is not None else []
    return copy.deepcopy(tokenizer, {id(part): part for part in shared})


def load_module(name: str, dtype: str, device: str | None = None) -> tuple[Any, Any, str]:
    """The Hugging Face model, its tokenizer, and where they were found."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ModelError(f"device {where!r} cannot be used", _first_line(error), "use cpu, or cuda where torch has it") from error
    source = str(packages.find(name))
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        # eager attention on every backend, as TransformerLens has it: patterns can be seen, and numbers agree
        module: Any = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype, dtype), attn_implementation="eager")
        module.to(where)
    except (OSError, ValueError) as error:
        if "AutoModelForCausalLM" in str(error):
            raise ModelError(
                f"model {name!r} cannot be loaded", "transformers takes it for no causal language model", "use one that is"
            ) from error
        offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") and not os.path.isdir(source)
        why = "HF_HUB_OFFLINE is set, and it is neither a package nor a folder nor in the hub's cache" if offline else _first_line(error)
        raise ModelError(
            f"model {name!r} was not found",
            why,
            f"use one of {', '.join(packages.PACKAGES)} (extra 'demo'), a local folder, or a hub name while online",
        ) from error
    except (SafetensorError, RuntimeError, ImportError) as error:
        raise ModelError(f"model {name!r} cannot be loaded", _first_line(error), f"look at the files in {source}") from error
    return module.eval(), tokenizer, source


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
