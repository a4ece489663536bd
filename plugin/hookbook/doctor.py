"""Says what is installed, what works together, and whether every adapter gives the numbers of plain transformers."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from hookbook.errors import ModelError

TRIED = {
    "torch": "2.13",
    "transformers": "5.23",
    "transformer-lens": "3.9 or 4.3",
    "nnsight": "0.8",
    "sae-lens": "6.54",
    "pandas": "3.1",
    "safetensors": "",
    "circuitsvis": "1.43",
    "matplotlib": "3.11",
    "gguf": "0.19",
}
"""The versions the tests ran with."""

PROMPTS = ("The capital of France is", "When Mary and John went to the store, John gave a drink to", "1, 2, 3, 4,")


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    what: str
    value: str
    ok: bool | None
    """None: for information."""


def environment() -> Iterator[Finding]:
    """What is installed, and the combinations known to fail."""
    yield Finding("python", platform.python_version(), None)
    found = {}
    for package, tried in TRIED.items():
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            yield Finding(package, "not installed", None)
            continue
        yield Finding(package, found[package] + ("" if found[package].startswith(tuple(tried.split(" or "))) else f" (tried with {tried})"), None)
    lens, sae = found.get("transformer-lens", ""), found.get("sae-lens", "")
    if lens.startswith("4") and sae:
        yield Finding(
            "sae-lens with transformer-lens 4", "sae-lens imports HookedTransformer, which transformer-lens 4 removed: install transformer-lens<4", False
        )
    if "nnsight" in found and not lens:
        yield Finding("nnsight without transformer-lens", 'module paths come from transformer-lens: pip install "hookbook[nnsight]"', False)


def models() -> Iterator[Finding]:
    """The models that need no network."""
    from hookbook.packages import PACKAGES, cache_folder

    for name, package in PACKAGES.items():
        folder = cache_folder() / "models" / f"{name}-{package.sha256[:12]}"
        state = (
            ("installed, converted" if folder.exists() else "installed, converted when first loaded")
            if package.installed
            else f"not installed: {package.install}"
        )
        yield Finding(name, state, None)


def check(name: str, device: str = "cpu") -> Iterator[Finding]:
    """Compare every adapter of a model with plain transformers: logits, the stream at every layer, a greedy continuation.

    Args:
        name: As for `hookbook.load`.
        device: Where to run.

    Yields:
        A finding for each adapter and quantity; the largest difference, relative to the largest value, must be below 1e-3.
    """
    import torch

    from hookbook.loading import load_module, wrap

    module, tokenizer, source = load_module(name, "float32", device)
    plain: list[tuple[Any, Any, list[int]]] = []
    for prompt in PROMPTS:
        ids = torch.tensor([list(_ids(tokenizer, prompt))], device=device)
        with torch.no_grad():
            out = module(ids, output_hidden_states=True)
            told = module.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, temperature=None, top_k=None, top_p=None, max_new_tokens=8)
        plain.append((out.logits[0, -1].cpu(), torch.stack(out.hidden_states[:-1])[:, 0, -1].cpu(), told[0, ids.shape[1] :].tolist()))
    for backend, make in _adapters(name, source, device):
        try:
            adapter = wrap(make(), tokenizer)
        except (ImportError, ValueError) as error:
            yield Finding(backend, f"not available: {str(error).splitlines()[0][:90]}", None)
            continue
        yield from _compare(backend, adapter, plain)
        del adapter


def _compare(backend: str, adapter: Any, plain: list[tuple[Any, Any, list[int]]]) -> Iterator[Finding]:
    import torch

    from hookbook.request import Read, Readout, Request, Row
    from hookbook.sites import Site

    n_layers = adapter.card.n_layers
    reads = [Read(Site("resid_pre", layer)) for layer in range(n_layers)]
    prompts = [adapter.encode(prompt) for prompt in PROMPTS]  # one padded batch
    reply = adapter.run(Request(prompts, [Row(i) for i in range(len(prompts))], reads, Readout(logits=True), generate=8), progress=False)
    logits, streams = torch.stack([p[0] for p in plain]), torch.stack([p[1] for p in plain], 1)
    ours = torch.stack([reading.values.cpu() for reading in reply.readings])
    yield _difference(f"{backend}: logits", reply.readout.logits, logits)
    worst = next((layer for layer in range(n_layers) if _relative(ours[layer], streams[layer]) > 1e-3), None)
    yield _difference(f"{backend}: stream of {n_layers} layers" + ("" if worst is None else f", first differs at resid_pre.{worst}"), ours, streams)
    told = [list(out) for out in reply.generated]
    want = [[i for i in out if i not in adapter.eos_ids] for _, _, out in plain]
    yield Finding(f"{backend}: greedy continuation of 8 tokens", "the same" if told == want else f"{told} is not {want}", told == want)


def _relative(a: Any, b: Any) -> float:
    return float((a - b).abs().max() / b.abs().max())


def _difference(what: str, a: Any, b: Any) -> Finding:
    return Finding(what, f"{_relative(a, b):.1e}", _relative(a, b) < 1e-3)


def _ids(tokenizer: Any, prompt: str) -> tuple[int, ...]:
    from hookbook.tokens import encode

    return encode(prompt, tokenizer).ids


def _adapters(name: str, source: str, device: str) -> Iterator[tuple[str, Any]]:
    from hookbook.loading import load_module
    from hookbook.packages import PACKAGES

    def fresh() -> tuple[Any, Any]:
        return load_module(name, "float32", device)[:2]

    def bridge() -> Any:
        from transformer_lens.model_bridge import TransformerBridge

        module, tokenizer = fresh()
        return TransformerBridge.boot_transformers(source, hf_model=module, tokenizer=tokenizer, device=device)

    def nnsight() -> Any:
        from nnsight import TransformersModel

        module, tokenizer = fresh()
        return TransformersModel(module, tokenizer=tokenizer)

    def hooked() -> Any:
        from transformer_lens import HookedTransformer

        load: Any = HookedTransformer.from_pretrained_no_processing
        module, tokenizer = fresh()
        known = PACKAGES[name.lower()].hub_name if name.lower() in PACKAGES else name
        try:
            return load(known, hf_model=module, tokenizer=tokenizer, device=device, dtype="float32")
        except ValueError as error:
            raise ModelError("HookedTransformer does not know this model", str(error).split(".")[0]) from error

    yield "TransformerBridge", bridge
    yield "nnsight", nnsight
    yield "HookedTransformer", hooked
