"""Says what is installed, what works together, and whether every adapter gives the numbers of plain transformers."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from hookbook.errors import ModelError, Refused
from hookbook.sites import SITES, Site

if TYPE_CHECKING:
    from hookbook.adapter import Adapter

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

TOLERANCE = 1e-3
"""The largest difference that counts as none, over the token's largest value: float32, other implementations of attention, rounding that
grows along the layers."""

N_TOLD = 8
"""How many tokens are generated."""

PROMPTS = ("The capital of France is", "When Mary and John went to the store, John gave", "1, 2, 3, 4,")


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    what: str
    value: str
    ok: bool | None
    """None: for information."""
    site: str = ""
    """What was compared: a site, or `logits`; of several sites the first that differs, or else differs most."""
    difference: float | None = None
    """The largest of any token, over the largest value there."""


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
        yield Finding(
            package, found[package] + ("" if found[package].startswith(tuple(tried.split(" or "))) else f" (tried with {tried})"), None
        )
    lens, sae = found.get("transformer-lens", ""), found.get("sae-lens", "")
    if lens.startswith("4") and sae:
        yield Finding(
            "sae-lens with transformer-lens 4",
            "sae-lens imports HookedTransformer, which transformer-lens 4 removed: install transformer-lens<4",
            False,
        )
    if "nnsight" in found and not lens:
        yield Finding("nnsight without transformer-lens", 'module paths come from transformer-lens: pip install "hookbook[nnsight]"', False)


def models() -> Iterator[Finding]:
    """The models that need no network."""
    from hookbook.models.packages import PACKAGES, converted

    for name, package in PACKAGES.items():
        state = (
            ("installed, converted" if converted(name).exists() else "installed, converted when first loaded")
            if package.installed
            else f"not installed: {package.install}"
        )
        yield Finding(name, state, None)


def check(name: str, device: str = "cpu") -> Iterator[Finding]:
    """Compare every adapter of a model with plain transformers: every site of every layer, logits, a greedy continuation.

    Args:
        name: As for `hookbook.load`.
        device: Where to run.

    Yields:
        A finding for each adapter and quantity. Sites and logits are the same if at every token of a few prompts their largest difference
        is below `TOLERANCE` of that token's largest value; else the first site that differs, in the order of the forward pass, is named.
        Sites that an adapter refuses are named with its reason; what raises is a finding that says so.

    Raises:
        ModelError: The model cannot be found or loaded.
    """
    from transformers import GenerationConfig

    from hookbook.models.loading import load_module, wrap
    from hookbook.tokens import encode

    module, tokenizer, source = load_module(name, "float32", device)
    ends = module.generation_config
    module.generation_config = GenerationConfig(
        eos_token_id=ends.eos_token_id, pad_token_id=ends.pad_token_id
    )  # no penalty, no beams: the likeliest token
    try:
        plain = [_plain(module, encode(prompt, tokenizer).ids, device) for prompt in PROMPTS]
    except ImportError:
        yield Finding(name, 'no adapter could be compared: pip install "hookbook[tl]"', False)
        return
    except Exception as error:  # whatever an unknown family does instead, and however its library says so
        yield Finding(name, f"its blocks cannot be compared: {_said(error)}", False)
        return
    del module
    compared = False
    for backend, make in _adapters(name, source, device):
        try:
            adapter = wrap(make(), tokenizer)
        except (ImportError, ValueError) as error:
            yield Finding(backend, f"not available: {_said(error)}", None)
            continue
        except Exception as error:
            yield Finding(backend, f"cannot be made: {_said(error)}", False)
            continue
        compared = True
        try:
            yield from _compare(backend, adapter, plain)
        except Exception as error:
            yield Finding(backend, f"cannot be run: {_said(error)}", False)
        del adapter
    if not compared:
        yield Finding(name, 'no adapter could be compared: pip install "hookbook[tl]"', False)


def _said(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:120]


@dataclass(frozen=True)
class Plain:
    """What plain transformers computes for a prompt."""

    ids: tuple[int, ...]
    sites: dict[Site, Any]
    """`[pos, width]`, of a pattern `[pos, head, key]`."""
    logits: Any
    """`[d_vocab]` after the last token."""
    told: list[int]
    """What it says next, greedily."""


def _plain(module: Any, ids: tuple[int, ...], device: str) -> Plain:
    """Hooks of our own on the modules, and what transformers itself returns: no adapter has a part in it."""
    import torch

    tokens, found, handles = torch.tensor([ids], device=device), {}, []

    def keep(site: Site, x: Any) -> None:
        found[site] = (x[0] if isinstance(x, tuple) else x).reshape(len(ids), -1).cpu()

    for site, (path, taken) in _modules(module).items():
        part = module.get_submodule(path)
        hook: Any = (lambda m, args, site=site: keep(site, args)) if taken else (lambda m, args, out, site=site: keep(site, out))
        handles.append(part.register_forward_pre_hook(hook) if taken else part.register_forward_hook(hook))
    try:
        with torch.no_grad():
            out = module(tokens, output_hidden_states=True, output_attentions=True)
    finally:
        for handle in handles:
            handle.remove()
    found |= {Site("resid_pre", layer): x[0].cpu() for layer, x in enumerate(out.hidden_states[:-1])}
    found |= {Site("attn_pattern", layer): x[0].transpose(0, 1).cpu() for layer, x in enumerate(out.attentions)}
    with torch.no_grad():
        told = module.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=N_TOLD)
    return Plain(ids, found, out.logits[0, -1].cpu(), told[0, len(ids) :].tolist())


def _modules(module: Any) -> dict[Site, tuple[str, bool]]:
    """Of sites the module in plain transformers, as TransformerLens names it, and whether the site is what it takes, or else gives."""
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf
    from transformer_lens.model_bridge.sources.transformers import determine_architecture_from_hf_config

    config = module.config
    cfg = build_bridge_config_from_hf(config, determine_architecture_from_hf_config(config), "", module.dtype)
    names = ArchitectureAdapterFactory.select_architecture_adapter(cfg)
    mapping: Any = names.component_mapping
    parts = mapping["blocks"].submodules
    takes, gives = ("mlp", "mlp") if parts["mlp"].name is not None else ("mlp.in", "mlp.out")  # OPT has no module around its MLP
    of_block = {
        "head_z": ("attn.o", True),
        "attn_out": ("ln1_post" if "ln1_post" in parts else "attn", False),
        "mlp_in": (takes, True),
        "mlp_act": ("mlp.out", True),
        "mlp_out": ("ln2_post" if "ln2_post" in parts else gives, False),
        "resid_post": ("", False),
    }
    asked = {Site("embed"): ("embed", False), Site("final_norm"): ("ln_final", False)}
    for layer in range(cfg.n_layers):
        asked |= {Site(name, layer): (f"blocks.{layer}.{part}".rstrip("."), taken) for name, (part, taken) in of_block.items()}
    found = {}
    for site, (part, taken) in asked.items():
        try:
            path = names.translate_transformer_lens_path(part)
            module.get_submodule(path)
        except (KeyError, ValueError, AttributeError):
            continue  # an MLP of several experts has no neurons in one place
        found[site] = (path, taken)
    return found


def _compare(backend: str, adapter: Adapter, plain: list[Plain]) -> Iterator[Finding]:

    from hookbook.engine import planning, selfcheck
    from hookbook.request import Read, Readout, Request, Row

    prompts = [adapter.encode(prompt) for prompt in PROMPTS]  # one padded batch
    if [prompt.ids for prompt in prompts] != [p.ids for p in plain]:
        yield Finding(f"{backend}: tokens", "prompts are cut otherwise than plain transformers cuts them", False)
        return
    try:
        selfcheck.check(adapter)
    except ModelError as error:
        yield Finding(backend, str(error), False)
        return
    refused: dict[tuple[str, str], None] = {}
    sites = []
    every = (Site(name, layer) for name, spec in SITES.items() for layer in (range(adapter.card.n_layers) if spec.layered else [None]))
    for site in sorted(every, key=lambda site: site.order):
        try:
            adapter.require(site)
            selfcheck.check(adapter, {site})
        except Refused as error:
            refused[site.name, error.why] = None
            continue
        if site in plain[0].sites:
            sites.append(site)
        else:
            refused[site.name, "not compared, plain transformers has no module for it"] = None
    reads = [Read(site, slice(None)) for site in sites]
    reply = adapter.run(
        Request(prompts, [Row(i) for i in range(len(prompts))], reads, Readout(logits=True), generate=N_TOLD), progress=False
    )
    differences = {
        site: _difference(reading.values, [p.sites[site] for p in plain]) for site, reading in zip(sites, reply.readings, strict=True)
    }
    wrong = [site for site, difference in differences.items() if not difference < TOLERANCE]
    at = wrong[0] if wrong else max(sites, key=lambda site: differences[site])
    value = (
        f"{at} differs first, by {differences[at]:.1e}; {len(wrong)} differ" if wrong else f"within {differences[at]:.1e} (largest at {at})"
    )
    yield Finding(f"{backend}: {len(sites)} sites of {adapter.card.n_layers} layers", value, not wrong, str(at), differences[at])
    for name, why in refused:
        yield Finding(f"{backend}: {name}", f"refused: {why}", None, name)
    assert reply.readout is not None and reply.readout.logits is not None
    said = _difference(reply.readout.logits, [p.logits[None] for p in plain])
    yield Finding(
        f"{backend}: logits", f"within {said:.1e}" if said < TOLERANCE else f"differ by {said:.1e}", said < TOLERANCE, "logits", said
    )
    told = [list(out) for out in reply.generated]
    want = [[i for i in p.told if i not in adapter.eos_ids] for p in plain]
    yield Finding(
        f"{backend}: greedy continuation of {N_TOLD} tokens", "the same" if told == want else f"{told} is not {want}", told == want
    )
    fused = "run sdpa where nobody looks at patterns" if selfcheck.fuses(adapter) else "cannot run sdpa, or it gives other numbers"
    yield Finding(f"{backend}: passes of {planning.FUSED_FROM} tokens and more", fused, None)


def _difference(ours: Any, plain: list[Any]) -> float:
    """The largest difference of any token over its own largest value, or a hundredth of what most tokens have; keys that no shorter
    prompt has are 0 there."""
    import torch

    width = ours.shape[-1]
    want = torch.cat([torch.nn.functional.pad(x, (0, width - x.shape[-1])) if x.dim() == 3 else x for x in plain])
    if ours.shape != want.shape:
        return float("inf")
    largest = want.abs().flatten(1).amax(-1)
    return float(((ours.cpu() - want).abs().flatten(1).amax(-1) / largest.clamp(min=max(1e-2 * float(largest.median()), 1e-30))).max())


def _adapters(name: str, source: str, device: str) -> Iterator[tuple[str, Any]]:
    from hookbook.models.loading import bridge, load_module, tracing
    from hookbook.models.packages import PACKAGES

    def fresh() -> tuple[Any, Any]:
        return load_module(name, "float32", device)[:2]

    def hooked() -> Any:
        from transformer_lens import HookedTransformer

        load: Any = HookedTransformer.from_pretrained_no_processing
        module, tokenizer = fresh()
        known = PACKAGES[name.lower()].hub_name if name.lower() in PACKAGES else name
        try:
            return load(known, hf_model=module, tokenizer=tokenizer, device=device, dtype="float32")
        except ValueError as error:
            raise ModelError("HookedTransformer does not know this model", str(error).split(".")[0]) from error

    yield "TransformerBridge", lambda: bridge(*fresh(), source)
    yield "nnsight", lambda: tracing(*fresh(), source)
    yield "HookedTransformer", hooked
