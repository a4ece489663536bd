"""An adapter beside a plain reference for it, and the comparison of the two."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import hookbook as hb
from hookbook.reply import Reply
from hookbook.request import Request, position_of
from hookbook.tokens import resolve
from tests.support.formulas import flat, pattern_formula, unit_formula
from tests.support.tiny import DTYPE


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
