"""The forward passes of an nnsight model, here or on a server."""

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hookbook.travel.climb import Stop, enter
from hookbook.travel.kept import begin

PATTERN = "nn_functional_dropout_0"
"""The operation of transformers' eager attention that gives the pattern."""


class Passes:
    """What `Climb`, `readout` and `decode` need of a model.

    Args:
        model: The nnsight model.
        paths: Where things are in its module tree: `blocks`, `norm` and `head`, and by (name, layer) the sites that are used.
        inner: The names of the sites inside a block, in the order of the pass.
        positions: Whether its forward pass takes position ids.
        scale: What logits are multiplied by.
        cap: The soft cap of logits, or None.
        device: Where tokens go; None: nnsight knows.
        stop: What ends a pass early. In this process nnsight's own exception would leave every tensor of the trace in a reference cycle.
    """

    def __init__(self, model, paths, inner, positions, scale=1.0, cap=None, device=None, stop: type[Exception] = Stop):
        self.model = model
        self.paths = paths
        self.inner = inner
        self.positions = positions
        self.scale = scale
        self.cap = cap
        self.device = device
        self.stop = stop
        self.hooked = False
        """Whether the user has a hook on the last block."""
        self.fused_from: int | None = None
        """From how many keys on attention is fused; None: never."""
        self.shares = True
        """Whether a pass runs in this process. In a server's sandbox it does not: a cache is then a copy, and a pass cannot end early."""
        self.blocks = list(reach(model, paths["blocks"]))
        self.where = "cpu"
        """Where the last block's output was seen."""

    def forward(self, tokens, mask, climb, kept=None, keep=0):
        """See `hookbook.adapter.Adapter.forward`. Where no cache is shared, the tokens before are run again."""
        if isinstance(kept, dict):
            mask = torch.ones_like(torch.cat([kept["tokens"], tokens], 1)) if mask is None and kept["mask"] is not None else mask
            climb.shift(kept["tokens"].shape[1], mask)
            tokens, kept = torch.cat([kept["tokens"], tokens], 1), None
        if keep and not self.shares:
            self.forward(tokens, mask, climb)
            return {"tokens": tokens, "mask": mask}
        cache, kept = cache_of(climb, kept, keep)
        taken = inputs(tokens, mask, cache, self.positions, self.device)
        self.hooked = self.shares and bool(self.blocks[-1]._module._forward_hooks)
        config = self.model.config
        before = config._attn_implementation
        name = "sdpa" if before == "eager" and fuses(climb, taken, self.fused_from) else "eager" if looks_at_patterns(climb) else before
        try:
            if name != before:  # for one pass
                config._attn_implementation = name
            with self.model.trace(taken.pop("input_ids"), **taken):
                self.climb(climb)
                if self.shares:
                    raise self.stop
        except Stop:
            pass
        finally:
            if name != before:
                config._attn_implementation = before
        return checked(kept) if keep else None

    def climb(self, climb):
        """The body of a trace, in the order of the pass."""
        if climb.wants("embed"):
            self.visit(climb, "embed", None)
        for layer, block in enumerate(self.blocks[: climb.last + 1]):
            if not self.shares and layer < climb.last and climb.passes(layer):  # every look into another process takes its time
                continue
            args, kwargs = enter(climb, layer, *block.inputs)
            if layer == climb.last:
                return
            block.inputs = (args, kwargs)
            for name in self.inner:
                if climb.wants(name, layer):
                    self.visit(climb, name, layer)
        # nnsight sees an output before hooks of the user's have changed it: what they left is what the norm takes in
        output = reach(self.model, self.paths["norm"]).input if self.hooked else self.blocks[-1].output
        x = climb.boundary(len(self.blocks), output[0] if isinstance(output, tuple) else output)
        self.where = x.device
        if not self.shares:  # what is above is not needed
            self.blocks[-1].output = (x[:1, :1], *output[1:]) if isinstance(output, tuple) else x[:1, :1]

    def visit(self, climb, name, layer):
        """Show a site other than the stream to a climb."""
        site = reach(self.model, self.paths[name, layer])
        if name == "attn_pattern":  # what eager attention computes, after softmax and dropout
            source = site.source
            while PATTERN not in source.names:  # through the interface, and what a TransformerBridge of this family puts around it
                source = getattr(source, [op for op in source.names if "attention_" in op.lower()][-1]).source
            site = getattr(source, PATTERN)
        if name in ("head_z", "mlp_in", "mlp_act"):
            site.input = climb.visit(name, layer, site.input)
        elif isinstance(site.output, tuple):
            output = site.output
            site.output = (climb.visit(name, layer, output[0]), *output[1:])
        else:
            site.output = climb.visit(name, layer, site.output)

    def call(self, path, x):
        """What a module makes of a tensor."""
        if self.shares:
            return reach(self.model, path)(x)
        with self.model.trace(torch.tensor([[0]])):  # only inside one does a sandbox reach weights
            out = reach(self.model, path)(x)
        return out

    def final_norm(self, resid):
        """The final norm of the stream, `[n, d_model]`."""
        return self.call(self.paths["norm"], resid[:, None])[:, 0]

    def splits(self):
        """See `hookbook.adapter.Adapter.splits`."""
        return splits(reach(self.model, self.paths["head"])._module) if self.shares and not self.model._edits else 0

    def unembed(self, normed, words=None):
        """Logits `[n, d_vocab]` of what the final norm gave, or of some words."""
        if words is None:
            logits = self.call(self.paths["head"], normed[:, None])[:, 0]
        else:
            logits = part_of_linear(reach(self.model, self.paths["head"])._module, normed, words)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


def splits(head):
    """The number of words of an unembedding whose parts can be had: a plain linear layer whose weights are there, without a hook of
    anybody's."""
    hooked = head._forward_hooks or head._forward_pre_hooks or hasattr(head, "_hf_hook") or head.weight.is_meta
    return len(head.weight) if type(head) is torch.nn.Linear and not hooked else 0


def part_of_linear(head, x, part):
    """Some outputs of a linear layer."""
    return torch.nn.functional.linear(x, head.weight[part], None if head.bias is None else head.bias[part])


def reach(model, path):
    """A module of a tree by its path."""
    found = model
    for part in path.split("."):
        found = found[int(part)] if part.isdecimal() else getattr(found, part)
    return found


def inputs(tokens, mask, cache, positions, device=None):
    """Arguments of a forward pass. Positions count a row's own tokens; without padding the model counts by itself."""
    found = {"input_ids": tokens, "use_cache": cache is not None}
    if mask is not None:
        found["attention_mask"] = mask
        if positions:
            found["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
    if device is not None:
        found = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in found.items()}
    if cache is not None:
        found["past_key_values"] = cache
    return found


def looks_at_patterns(climb):
    """Whether somebody reads or edits patterns, so that attention must compute them."""
    return any(name == "attn_pattern" for name, _ in climb.inside())


def fuses(climb, taken, fused_from):
    """Whether a pass is to run attention that computes no patterns."""
    cache = taken.get("past_key_values")
    keys = taken["input_ids"].shape[1] + (0 if cache is None else cache.get_seq_length())
    return fused_from is not None and keys >= fused_from and not looks_at_patterns(climb)


def cache_of(climb, kept, keep):
    """A cache for a pass, and what it keeps; None if nothing was kept and nothing is to be. Every layer keeps all tokens, sliding windows
    are in the masks."""
    if kept is None and not keep:
        return None, None
    cache, kept = DynamicCache(), begin(climb, kept, climb.last)
    cache.layers += [layer_of(one, climb, keep) for one in kept]
    return cache, kept


def layer_of(one, climb, keep):
    """What one block kept, as transformers takes it. A class of our own would not arrive on a server as a subclass."""

    def update(key_states, value_states, *args, **kwargs):
        return tuple(one.update(climb, (key_states, value_states), keep))

    layer = DynamicLayer()
    layer.is_initialized, layer.get_seq_length, layer.update = True, one.n, update
    return layer


def checked(kept):
    """What a pass kept, if every block did."""
    empty = sum(not one.n() for one in kept)
    if empty:
        raise ValueError(f"a model whose blocks share or keep no keys and values: {empty} blocks kept nothing")
    return kept
