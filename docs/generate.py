"""Writes the pages of docs/reference that come from the code; a test checks that they are up to date."""

from __future__ import annotations

import inspect
import re
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import hookbook as hb
from hookbook.adapter import Adapter
from hookbook.engine import selfcheck
from hookbook.errors import HookbookError, ModelError, Refused
from hookbook.models.loading import load, wrap
from hookbook.show.tidy import COLUMNS
from hookbook.sites import SITES, Site
from hookbook.testing import toy, toy_tokenizer

sys.path.insert(0, str(Path(__file__).parent))
import layers  # noqa: E402

REFERENCE = Path(__file__).parent / "reference"
BACKENDS = ("TransformerBridge", "HookedTransformer", "nnsight", "toy")


def families() -> dict[str, tuple[Any, dict[str, Any] | None]]:
    """Of each family a small Hugging Face config, and what makes a HookedTransformer like it, if it can be."""
    import transformers as t

    names = {"vocab_size": 258, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    small = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, **names)
    wide = dict(intermediate_size=32, initializer_range=0.25, **small)
    grouped = dict(num_key_value_heads=2, head_dim=4, **wide)
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, decoder_sparse_step=1)
    windows = dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=4)
    rotary = dict(positional_embedding_type="rotary", rotary_dim=4)
    gated = dict(normalization_type="RMS", final_rms=True, gated_mlp=True, act_fn="silu", n_key_value_heads=2, **rotary)
    return {
        "GPT-2": (t.GPT2Config(n_embd=16, n_layer=2, n_head=4, n_positions=64, initializer_range=0.25, **names), {"act_fn": "gelu"}),
        "Llama": (t.LlamaConfig(**grouped), gated),
        "Gemma 3": (t.Gemma3TextConfig(**windows, **grouped), gated | {"use_normalization_before_and_after": True}),
        "GPT-NeoX": (t.GPTNeoXConfig(use_parallel_residual=True, **wide), {"act_fn": "gelu", "parallel_attn_mlp": True, **rotary}),
        "Qwen3-MoE": (t.Qwen3MoeConfig(**experts, **grouped), gated | {"num_experts": 4, "experts_per_token": 2}),
        "OPT": (t.OPTConfig(ffn_dim=32, word_embed_proj_dim=16, init_std=0.25, **small), None),
        "GPT-J": (t.GPTJConfig(n_embd=16, n_layer=2, n_head=4, n_positions=64, rotary_dim=4, initializer_range=0.25, **names), None),
    }


def adapters(*backends: str) -> Iterator[tuple[str, str, Adapter]]:
    """Backend, family and adapter of a tiny random model of each, on these backends."""
    if "toy" in backends:
        yield "toy", "toy", toy()
    if not set(backends) - {"toy"}:
        return
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    for family, (config, own) in families().items():
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
            toy_tokenizer().save_pretrained(folder)
            for name, backend in {"TransformerBridge": "transformer_lens", "nnsight": "nnsight"}.items():
                if name in backends:
                    yield name, family, load(folder, backend, device="cpu")
            if own is not None and "HookedTransformer" in backends:
                from transformer_lens import HookedTransformer, HookedTransformerConfig

                sizes = {"n_layers": 2, "d_model": 16, "n_heads": 4, "d_head": 4, "d_mlp": 32, "n_ctx": 64, "d_vocab": 258}
                cfg = HookedTransformerConfig(seed=0, device="cpu", original_architecture=family, model_name=family, **sizes, **own)
                yield "HookedTransformer", family, wrap(HookedTransformer(cfg, tokenizer=AutoTokenizer.from_pretrained(folder)))


def refusal(adapter: Adapter, site: Site) -> HookbookError | None:
    """Why a site of a model cannot be read and edited, or None: what `Adapter.run` would say before it runs anything."""
    try:
        adapter.require(site)
        selfcheck.check(adapter, {site})
    except (Refused, ModelError) as error:
        return error
    return None


def written(name: str) -> str:
    """How a site is written, of block L."""
    return f"{name}.L" if SITES[name].layered else name


def sites() -> str:
    """The table of sites, and who has which."""
    units = {"head": "one head: `{}.L.H`", "neuron": "one neuron: `{}.L.N`", None: ""}
    rows = [
        f"| `{written(s.name)}` | {units[s.unit].format(s.name)} | {s.shape} | `{s.hook_name.format(layer='L')}` | {s.meaning} |"
        for s in SITES.values()
    ]
    notes: list[str] = []
    asked: dict[str, list[str]] = defaultdict(list)
    without: dict[tuple[str, str], list[str]] = defaultdict(list)
    for backend, family, adapter in adapters(*BACKENDS):
        asked[backend].append(family)
        for name, spec in SITES.items():
            error = refusal(adapter, Site(name, 0 if spec.layered else None))
            if error is not None:
                note = f"{error.what.replace(f'{name}.0', name)}: {error.why}; {error.instead}."
                notes += [note] * (note not in notes)
                without[name, backend].append(f"{family} ({notes.index(note) + 1})")
    said = {key: f"not of {', '.join(families)}" for key, families in without.items()}
    having = [f"| `{written(name)}` | {' | '.join(said.get((name, backend), 'yes') for backend in BACKENDS)} |" for name in SITES]
    return "\n".join([
        "# Sites", "",
        "A site names one tensor of the forward pass; those of a block name the block `L`, counted from 0, and may name one head or neuron "
        "in it. Rows are in the order of the pass.", "",
        "| site | part | shape | TransformerLens | meaning |", "|---|---|---|---|---|", *rows, "",
        "`resid_post.L` is `resid_pre.(L+1)`. On models with post-norms (Gemma 2 and 3) `attn_out` and `mlp_out` are what joins the "
        "stream, after the norm. "
        "`final_norm` is `ln_final.hook_out` of a TransformerBridge; HookedTransformer has no such hook point, and gets it from the "
        "norm itself. "
        "Nor has it one of `mlp_in`, which it gets from the MLP; a TransformerBridge of OPT calls it `blocks.L.mlp.in.hook_in`. "
        "SAELens' `SAETransformerBridge` has few of these names: `Adapter.hook_name` and `vector.fwd_hooks(model)` say what a model "
        "has.", "",
        "## Who has which", "",
        "A model is asked when it is first used: what is written at a site must reach the stream as it should, and what a block adds "
        "must be the sum of its parts. Else the site is refused by name, before anything is edited. "
        "This is what tiny random models say:", "",
        f"| site | {' | '.join(BACKENDS)} |", "|---" * (1 + len(BACKENDS)) + "|", *having, "",
        *(f"- {backend}: {', '.join(asked[backend])}." for backend in BACKENDS if asked[backend] != [backend]), "",
        *(f"{i + 1}. {note}" for i, note in enumerate(notes)), "",
    ])  # fmt: skip


def columns() -> str:
    """The table of columns of frames."""
    rows = [f"| `{name}` | `{kind}` | {meaning} |" for name, (kind, meaning) in COLUMNS.items()]
    return "\n".join([
        "# Columns of frames", "",
        "`result.to_frame()` gives one row for each cell, and a name means the same in the frames of all results. Sites are "
        "[here](sites.md); names in braces are the result's own: `logprob {token}` is `logprob  Paris` for the token ` Paris`, with its "
        "space. The docstring of each `to_frame` says which columns it has. "
        "Of texts the dtype is what your pandas calls them; `Int64` and `boolean` may have `<NA>`, numbers `NaN`.", "",
        "| column | dtype | meaning |", "|---|---|---|", *rows, "",
    ])  # fmt: skip


REMEDIES = {
    "DataError": "see which pairs or texts it names; `hb.tasks.names()` and `hb.relations.names()` list what ships",
    "EditError": "compare the value's shape with the site's, and the position with the prompt's tokens (`print(model.encode(prompt))`)",
    "ModelError": (
        "load it with `hb.load`, or wrap a TransformerBridge, a HookedTransformer or an nnsight model; `hookbook doctor MODEL` asks a "
        "model everything"
    ),
    "Refused": "do what the message says after `Instead`; [sites](sites.md) lists what which family cannot do",
    "RemoteError": "if it has a `handle`, the job goes on: `error.handle.result()` waits again, `error.handle.save(path)` keeps it",
    "ResultError": "load it with the class that wrote it, such as `hb.Patchscope.load`; a damaged file has to be made again",
    "SiteError": "write `name.layer`, such as `resid_post.10`; [sites](sites.md) lists the names, the model's card the layers",
    "TokenError": "look at how the prompt is cut (`print(model.encode(prompt))`); a word often needs its leading space",
}


def errors() -> str:
    """The table of errors."""
    kinds = sorted(HookbookError.__subclasses__(), key=lambda e: e.__name__)
    rows = [f"| `{e.__name__}` | {(e.__doc__ or '').strip().rstrip('.')} | {REMEDIES[e.__name__]} |" for e in kinds]
    return "\n".join([
        "# Errors", "",
        "Every error says what happened, why, and what to do instead (`error.what`, `error.why`, `error.instead`), and is raised before "
        "the first forward pass where it can be known. All are `HookbookError`s.", "",
        "| error | meaning | what to do |", "|---|---|---|", *rows, "", "::: hookbook.errors", "",
    ])  # fmt: skip


def paragraph(recipe: Any, head: str) -> str:
    """One paragraph of a recipe's docstring, such as `Source`, on one line."""
    found = re.search(rf"^{head}: (.+?)(?:\n\n|\Z)", inspect.getdoc(recipe) or "", re.M | re.S)
    if found is None:
        raise ValueError(f"the docstring of {recipe.__module__}.{recipe.__name__} has no paragraph `{head}:`")
    return " ".join(found[1].split()).replace("|", "\\|")


def recipe_names() -> list[str]:
    """Every recipe, in the order of the API pages; one is called by a longer name."""
    return [name for _, names in TOPICS.values() for name in names if is_recipe(name) or name == TRAIN]


def recipe_of(name: str) -> Any:
    """A recipe by its name on the API pages."""
    return hb.sae.train if name == TRAIN else getattr(hb, name)


def called(name: str) -> str:
    """What a recipe is called after `hb.`."""
    return "sae.train" if name == TRAIN else name


def is_recipe(name: str) -> bool:
    """Whether a public name is a recipe, not its result."""
    return name[0].islower() and hb._HOME.get(name, "").startswith("recipes.")


def chapter(name: str) -> tuple[str, list[str]]:
    """A chapter's title, which its folder's docstring begins with, and its names: each recipe before what it gives."""
    title = (import_module(f"hookbook.recipes.{name}").__doc__ or "").partition(":")[0]
    own = [public for public, home in hb._HOME.items() if home.startswith(f"recipes.{name}.")]
    files = list(dict.fromkeys(hb._HOME[public] for public in own))
    own.sort(key=lambda public: (files.index(hb._HOME[public]), not is_recipe(public)))
    return title, own + BESIDE.get(name, [])


def linked(text: str) -> str:
    """arXiv numbers as links."""
    return re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def recipes() -> str:
    """The table of recipes, their papers, and where they depart from them."""
    page = {name: file for file, (_, names) in TOPICS.items() for name in names}
    rows = [
        f"| [`hb.{called(name)}`](api/{page[name]}.md#hookbook.{name}) | {linked(paragraph(recipe_of(name), 'Source'))} | "
        f"{paragraph(recipe_of(name), 'Differs')} |"
        for name in recipe_names()
    ]
    return "\n".join([
        "# Recipes and their papers", "",
        "Every recipe follows the definition of a paper, section by section, or of the authors' code where the two disagree. Where ours "
        "is another, it says so here and in its docstring. "
        "What each method measures, and what it does not: [what the methods measure](../explanation/what-the-methods-measure.md).", "",
        "| call | source | differs |", "|---|---|---|", *rows, "",
    ])  # fmt: skip


TRAIN = "recipes.features.sae_training.train"
"""The recipe that is called `hb.sae.train`."""
CHAPTERS = {home.split(".")[1] for home in hb._HOME.values() if home.startswith("recipes.")}
BESIDE = {
    "reading": ["Affine"],
    "vectors": ["Vector", "recipes.vectors.task_sweep.TaskSweep"],
    "relations": ["relations"],
    "hops": ["hops"],
    "features": [TRAIN, "sae"],
}
"""What is shown on a chapter's page beside its recipes and their results."""
TOPICS: dict[str, tuple[str, list[str]]] = {
    "models": ("Models", ["load", "wrap", "ModelCard", "Plan", "job", "Handle"]),
    **{name: chapter(name) for name in sorted(CHAPTERS)},
    "requests": ("Requests, sites, tokens", ["request", "reply", "sites", "tokens"]),
    "data": ("Prompts, tasks, scores", ["prompts", "tasks", "scores"]),
    "results": ("Results and pictures", ["results", "show.view.View", "show.plots"]),
    "elsewhere": ("Other tools", ["interop"]),
    "own": (
        "Your own recipe or backend",
        ["recipe.Recipe", "recipe.recipe", "deferred.later", "deferred.hold", "Adapter", "engine.seam.Backend", "asking", "controls"]
        + ["testing"],
    ),
}
"""The pages of the API: file, title, and names of the package or of modules, whose public names are all shown. What a chapter has, the
table of public names says."""


def api(file: str) -> str:
    """One page of the API; mkdocstrings fills it."""
    title, names = TOPICS[file]
    return "\n".join([f"# {title}", "", *(f"::: hookbook.{name}\n" for name in names)])


PAGES = {
    "sites.md": sites,
    "columns.md": columns,
    "errors.md": errors,
    "recipes.md": recipes,
    "../images/layers.svg": layers.picture,
} | {f"api/{file}.md": partial(api, file) for file in TOPICS}


def main() -> None:
    """Write the generated pages."""
    (REFERENCE / "api").mkdir(parents=True, exist_ok=True)
    for name, make in PAGES.items():
        (REFERENCE / name).write_text(make(), encoding="utf-8")


if __name__ == "__main__":
    main()
