"""Features of sparse autoencoders inside a forward pass: what their activations are, and what a change of them does to a tensor.

A code is a dict of tensors, of all features of an SAE or of some: `reads` `[m, d_in]`, the encoder's rows; `centre` `[d_in]`, taken from
the input before, or None; `gain` `[m]`, of what a row reads, or None; `bias` `[m]`; `gate` `[m]` and `threshold` `[m]`, or None: a feature
is active where what its row reads plus `gate` is above `threshold`; `k`, how many of the largest are active, or 0; `norm`, how inputs are
brought to one size: `none`, `layer_norm` or `constant_norm_rescale`; `writes` `[m, d_out]`, the decoder's rows; `offset` `[d_out]`, which
the decoder adds; and `skip` `[d_out, d_in]`, a transcoder's linear part, or None.
"""

import torch

ROWS = 1024
"""How many inputs are encoded at once."""


def sized(x, norm):
    """An input as an encoder takes it, and what its decoder multiplies by and adds to go back."""
    if norm == "layer_norm":
        mean = x.mean(-1, keepdim=True)
        x = x - mean
        std = x.std(-1, keepdim=True)
        return x / (std + 1e-5), std, mean
    if norm == "constant_norm_rescale":
        size = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        return x / size, size, 0.0
    return x, 1.0, 0.0


def activations(x, code, each=False):
    """Activations `[n, m]` of inputs `[n, d_in]`, which were brought to one size; `each` if `reads` is `[n, m, d_in]`, each input's own."""
    if code["centre"] is not None:
        x = x - code["centre"]
    read = (code["reads"] @ x[:, :, None])[:, :, 0] if each else x @ code["reads"].mT
    found = (read if code["gain"] is None else read * code["gain"]) + code["bias"]
    if code["k"]:
        values, places = found.topk(code["k"], -1)
        return torch.zeros_like(found).scatter(-1, places, values.relu())
    found = found.relu()
    if code["gate"] is not None:
        found = torch.where(read + code["gate"] > code["threshold"], found, 0)
    return found


def changed(old, seen, group):
    """`old` `[n, d_out]` when features become `scale` times what they are, plus `shift`.

    Args:
        old: The tensor that is edited.
        seen: `[n, d_in]` what the encoder reads: `old`, or a transcoder's input.
        group: `code`; `scale` and `shift` `[u, m]`, of which each token takes the one that `of` `[n]` says; `each`: whether every
            such has features of its own (`reads` `[u, m, d_in]` and so on); `drop`: whether what the SAE does not reconstruct is dropped.
    """
    return torch.cat([_changed(old[start : start + ROWS], seen[start : start + ROWS], start, group) for start in range(0, len(old), ROWS)])


def _changed(old, seen, start, group):
    wide, where = old.dtype, old.device
    of = group["of"][start : start + len(old)]
    code = {}
    for key, value in group["code"].items():
        if isinstance(value, torch.Tensor):
            value = value[of] if group["each"] and key in OWN else value
            value = value.to(wide).to(where)
        code[key] = value
    scale, shift = (group[key][of].to(wide).to(where) for key in ("scale", "shift"))
    x, size, mean = sized(seen.to(wide), code["norm"])
    found = activations(x, code, group["each"])
    if group["drop"]:
        new = (found * scale + shift) @ code["writes"] + code["offset"]
        new = new if code["skip"] is None else new + seen.to(wide) @ code["skip"].mT
        return new * size + mean
    more = found * (scale - 1) + shift
    return old + ((more[:, None] @ code["writes"])[:, 0] if group["each"] else more @ code["writes"]) * size


OWN = ("reads", "gain", "bias", "gate", "threshold", "writes")
"""What each feature has."""
