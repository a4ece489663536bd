"""The forward passes of an nnsight model, here or on a server."""

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hookbook.travel.climb import Stop, enter

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
        self.shares = True
        """Whether a pass runs in this process. In a server's sandbox it does not: a cache is then a copy, and a pass cannot end early."""
        self.blocks = list(reach(model, paths["blocks"]))
        self.where = "cpu"
        """Where the last block's output was seen."""

    def forward(self, tokens, mask, climb, kept=None, keep=False):
        """See `hookbook.adapter.Adapter.forward`. Where no cache is shared, the tokens before are run again."""
        if isinstance(kept, dict):
            mask = torch.ones_like(torch.cat([kept["tokens"], tokens], 1)) if mask is None and kept["mask"] is not None else mask
            climb.shift(kept["tokens"].shape[1], mask)
            tokens, kept = torch.cat([kept["tokens"], tokens], 1), None
        if keep and not self.shares:
            self.forward(tokens, mask, climb)
            return {"tokens": tokens, "mask": mask}
        cache = cache_from(kept) if kept is not None or keep else None
        taken = inputs(tokens, mask, cache, self.positions, self.device)
        widen, n_kept = widener(cache, climb, keep), length(cache)
        config = self.model.config
        before = config._attn_implementation
        eager = before != "eager" and any(name == "attn_pattern" for name, _ in climb.inside())
        try:
            if eager:  # attention that computes its pattern, for one pass
                config._attn_implementation = "eager"
            with self.model.trace(taken.pop("input_ids"), **taken):
                self.climb(climb, widen, n_kept)
                if self.shares:
                    raise self.stop
        except Stop:
            pass
        finally:
            if eager:
                config._attn_implementation = before
        return kept_of(cache, climb.last) if keep else None

    def climb(self, climb, widen, n_kept):
        """The body of a trace, in the order of the pass."""
        if climb.wants("embed"):
            self.visit(climb, "embed", None)
        for layer, block in enumerate(self.blocks[: climb.last + 1]):
            if not self.shares and layer < climb.last and climb.passes(layer):  # every look into another process takes its time
                continue
            args, kwargs = enter(climb, layer, *block.inputs, n_kept=n_kept)
            if layer == climb.last:
                return
            widen(layer)
            block.inputs = (args, kwargs)
            for name in self.inner:
                if climb.wants(name, layer):
                    self.visit(climb, name, layer)
        output = self.blocks[-1].output
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
        if name in ("head_z", "mlp_act"):
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

    def unembed(self, normed):
        """Logits `[n, d_vocab]` of what the final norm gave."""
        logits = self.call(self.paths["head"], normed[:, None])[:, 0]
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


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


def cache_from(kept):
    """A cache that holds `kept`. Without a config every layer keeps all tokens; sliding windows are in the masks."""
    cache = DynamicCache()
    for i in range(len(kept or ())):
        keys, values = kept[i]
        kept[i] = None  # taken over
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def length(cache):
    """How many tokens a cache holds."""
    return cache.layers[0].keys.shape[-2] if cache is not None and cache.layers else 0


def kept_of(cache, n_layers):
    """Keys and values of the first layers, as `cache_from` takes them."""
    if len(cache.layers) < n_layers:
        raise ValueError(f"a model whose blocks share or keep no keys and values: {n_layers} blocks kept {len(cache.layers)}")
    return [(layer.keys, layer.values) for layer in cache.layers[:n_layers]]


def widener(cache, climb, keep):
    """Called before each block: gives its kept keys and values the rows of the batch, and frees those below."""

    def widen(layer):
        if cache is None:
            return
        if layer < len(cache.layers):
            entry = cache.layers[layer]
            entry.keys, entry.values = climb.widen(entry.keys), climb.widen(entry.values)
        if layer and not keep:
            below = cache.layers[layer - 1]
            below.keys, below.values = below.keys[:0].clone(), below.values[:0].clone()  # a view would keep all of it

    return widen
