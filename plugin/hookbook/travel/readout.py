"""From the stream to what is said about the next token."""

import torch

BLOCK = 128
PART_BYTES = 8 << 20
"""How many bytes of logits a CPU works on while they are in its cache."""


def readout(model, resid, rows, k=0, tokens=None, logits=False, normed=False):
    """The likeliest tokens of each row, and the log-probabilities of chosen ones; on the CPU.

    Args:
        model: What has `final_norm`, `unembed` and `splits`.
        resid: `[n, d_model]`.
        rows: How many rows of logits are held at once.
        k: How many of the likeliest tokens.
        tokens: Token ids `[n, m]` that are wanted.
        logits: Whether the logits are wanted.
        normed: Whether `resid` went through the final norm.

    Returns:
        Ids `[n, k]`, their log-probabilities, those of `tokens` `[n, m]`, and logits `[n, d_vocab]` or None.
    """
    top_ids, top_logprobs, logprobs, kept = [], [], [], []
    for start in range(0, len(resid), rows):
        some = resid[start : start + rows]
        wanted = torch.empty(len(some), 0, dtype=torch.long) if tokens is None else tokens[start : start + rows]
        some = some if normed else model.final_norm(some)
        if not logits and not torch.is_grad_enabled() and (width := model.splits()) // 2 > (part := part_of(len(some), width, k)):
            for kept_in, found in zip((top_ids, top_logprobs, logprobs), in_parts(model, some, k, wanted.to(some.device), width, part), strict=True):
                kept_in.append(found.cpu())
            continue
        values = model.unembed(some)
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        ranked = k or wanted.numel()
        top, ids = topk(values, min(max(k, 1), values.shape[-1])) if ranked else (values[:, :0], torch.empty(len(values), 0, dtype=torch.long))
        total = logsumexp(values, top[:, :1].detach()) if ranked else values[:, :1]
        top_ids.append(ids[:, :k].cpu())
        top_logprobs.append((top[:, :k] - total).cpu())
        logprobs.append((values.gather(-1, wanted.to(values.device)) - total).cpu())
        if logits:
            kept.append(values.cpu())
    return whole(top_ids), whole(top_logprobs), whole(logprobs), whole(kept) if kept else None


def part_of(n, width, k):
    """How many words of a vocabulary to unembed at once."""
    return max(PART_BYTES // (4 * n), 4 * BLOCK, 4 * k)


def in_parts(model, normed, k, wanted, width, part):
    """As `readout`, of `width` words `part` by `part`: the logits of all of them are never in memory."""
    said, top, top_ids, most, total = wanted, wanted, wanted, wanted, wanted
    for start in range(0, width, part):
        values = model.unembed(normed, slice(start, start + part))
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        here, ids = topk(values, min(max(k, 1), values.shape[1]))
        found = values.gather(-1, (wanted - start).clamp(0, values.shape[1] - 1))
        if not start:
            said, top, top_ids, most, total = found, here, ids, here[:, :1], torch.zeros_like(here[:, :1])
        else:
            said = torch.where(wanted >= start, found, said)
            top, order = torch.cat([top, here], 1).topk(min(max(k, 1), top.shape[1] + here.shape[1]), dim=-1)
            top_ids = torch.cat([top_ids, ids + start], 1).gather(-1, order)
        more = torch.maximum(most, here[:, :1])
        total = total * (most - more).exp() + (values - more).exp().sum(-1, keepdim=True)
        most = more
    total = total.log() + most
    return top_ids[:, :k], top[:, :k] - total, said - total


def whole(parts):
    """Parts of a tensor together, without a copy of a single one."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def topk(values, k):
    """`values.topk(k)`, of a wide vocabulary three times as fast on a CPU: among the blocks with the largest maxima alone."""
    n, width = values.shape
    blocks = width // BLOCK
    if not 0 < k < blocks // 4:
        top = values.topk(k, dim=-1)
        return top.values, top.indices
    where = values[:, : blocks * BLOCK].unflatten(-1, (blocks, BLOCK)).amax(-1).topk(k, dim=-1).indices
    ids = (where[..., None] * BLOCK + torch.arange(BLOCK, device=values.device)).flatten(1)
    ids = torch.cat([ids, torch.arange(blocks * BLOCK, width, device=values.device).expand(n, -1)], 1)
    top = values.gather(-1, ids).topk(k, dim=-1)
    return top.values, ids.gather(-1, top.indices)


def logsumexp(values, top):
    """`values.logsumexp(-1, keepdim=True)`, given each row's largest value; on a CPU in pieces that stay in its cache."""
    rows = max(1, (4 << 20) // (values.element_size() * values.shape[-1])) if values.device.type == "cpu" else len(values)
    parts = zip(values.split(rows), top.split(rows), strict=True)
    return torch.cat([(part - most).exp().sum(-1, keepdim=True).log() + most for part, most in parts])
