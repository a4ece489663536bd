"""What a user does to a model between calls, and the call that is compared."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import peft
import torch
import transformers
from torch import nn

import hookbook as hb
from hookbook.reply import Reply
from hookbook.request import Read, Readout, Request, Row
from hookbook.testing import ToyAdapter
from tests.support.cases import Case, assert_plain


def blocks(case: Case) -> Any:
    """Its blocks, where hooks of users go."""
    model: Any = case.adapter.model
    if not case.name.startswith("nnsight"):
        return model.blocks
    return case.adapter.module.transformer.h if "gpt2" in case.name else case.adapter.module.model.layers  # type: ignore[union-attr]


def norm(case: Case) -> Any:
    """Its final norm."""
    model: Any = case.adapter.model
    if case.name == "toy":
        return model.norm
    if not case.name.startswith("nnsight"):
        return model.ln_final
    return case.adapter.module.transformer.ln_f if "gpt2" in case.name else case.adapter.module.model.norm  # type: ignore[union-attr]


def part(case: Case, name: str, layer: int) -> Any:
    """The module of a block whose output `attn_out` or `mlp_out` is."""
    model: Any = case.adapter.model
    if case.name == "toy":
        return getattr(model.blocks[layer], name)
    if case.name.startswith("hooked"):
        return getattr(model.blocks[layer], name.removesuffix("_out"))
    names: Any = case.adapter.names if case.name.startswith("bridge") else case.adapter.where  # type: ignore[union-attr]
    return case.adapter.module.get_submodule(names.path(name, layer))  # type: ignore[union-attr]


def moved(x: Any, how: str) -> Any:
    """What a hook makes of a block's or a norm's output."""
    if isinstance(x, tuple):
        return (moved(x[0], how), *x[1:])
    x, by = x.clone(), torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype)
    if how == "last":
        x[:, -1] += by
    elif how == "first":
        x[:, 0] += by
    elif how == "third":
        x[:, 2:3] += by
    elif how == "batch":
        x += 0.5 * x.mean(0, keepdim=True)
    elif how == "tokens":
        x += 0.5 * x.mean(1, keepdim=True)
    else:
        x += by
    return x


HOWS = ("all", "last", "first", "third", "batch", "tokens")
PROMPTS = ([5, 9, 30, 77, 41, 8], [5, 9, 30, 77, 200], [66, 12, 99])


def asked(case: Case, layers: tuple[int, int] = (1, 2)) -> Request:
    """Rows that share prompts, of several lengths, and so could share prefixes and be packed. `resid_pre` is after what a hook makes of a
    block's output, in plain runs, too."""
    prompts = [case.adapter.encode(list(ids)) for ids in PROMPTS]
    vector = torch.linspace(-2, 2, case.adapter.card.d_model)
    rows = [Row(i, (hb.Edit(f"resid_pre.{layer}", vector, position=-1),)) for i in range(3) for layer in layers] + [Row(0), Row(2)]
    rows.append(Row(1, (hb.Edit("resid_pre.1", vector.roll(3), position=2),)))
    return Request(prompts, rows, [Read("resid_pre.2", slice(None))], Readout(k=2, logits=True))


def equal(case: Case, request: Request, reply: Reply) -> None:
    assert_plain(case, request, reply, 1e-9 if case.adapter.card.dtype == "float64" else 2e-3)


def again(case: Case) -> hb.Adapter:
    """The same model in another wrapper."""
    return ToyAdapter(case.adapter.model) if case.name == "toy" else hb.wrap(case.adapter.model)


def in_threads(case: Case, requests: list[Request]) -> list[Reply]:
    """What calls beside each other give, each through a wrapper of its own."""
    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(lambda request: again(case).run(request, progress=False), requests))


def linear(case: Case) -> list[str]:
    """Where adapters of PEFT can go; a HookedTransformer keeps its weights in other modules."""
    kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)
    modules = case.adapter.module.named_modules()  # type: ignore[union-attr]
    return [name for name, m in modules if isinstance(m, kinds) and "lora_" not in name and "head" not in name and "unembed" not in name]


def adapted(case: Case, n: int) -> None:
    """A low-rank adapter beside one matrix, as `peft` leaves it: with dropout, if `n` is odd, and in training mode."""
    places = [name for name in linear(case) if not name.endswith(".base_layer")]
    if not places:
        return
    config = peft.LoraConfig(r=2, target_modules=[places[n % len(places)]], init_lora_weights=False, lora_dropout=0.1 * (n % 2))
    peft.inject_adapter_in_model(config, case.adapter.module, f"mine{len(linear(case)) - len(places)}")  # type: ignore[arg-type]
