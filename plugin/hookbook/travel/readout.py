"""From the stream to what is said about the next token."""

import torch

BLOCK = 128
PART_BYTES = 8 << 20
"""How many bytes of logits a CPU works on while they are in its cache."""
FEW, APART = 1024, 64
"""Up to how many words are unembedded for all rows, if some of them want each; of more, for how many rows at once."""


def readout(model, resid, rows, k=0, tokens=None, logits=False, normed=False, words=None):
    """The likeliest tokens of each row, the log-probabilities of chosen ones, and the logits of chosen ones; on the CPU.

    Args:
        model: What has `final_norm`, `unembed` and `splits`.
        resid: `[n, d_model]`.
        rows: How many rows of logits are held at once.
        k: How many of the likeliest tokens.
        tokens: Token ids `[n, m]` that are wanted.
        logits: Whether the logits are wanted.
        normed: Whether `resid` went through the final norm.
        words: Token ids `[n, m]` whose logits are wanted.

    Returns:
        Ids `[n, k]`, their log-probabilities, those of `tokens` `[n, m]`, logits `[n, d_vocab]` or None, and those of `words` `[n, m]` or
        None.
    """
    said = None if words is None else of_words(model, resid, rows, words, normed)
    if said is not None and not k and tokens is None and not logits:
        nothing = said[:, :0]
        return nothing.long(), nothing, nothing, None, said
    top_ids, top_logprobs, logprobs, kept = [], [], [], []
    for start in range(0, len(resid), rows):
        some = resid[start : start + rows]
        wanted = torch.empty(len(some), 0, dtype=torch.long) if tokens is None else tokens[start : start + rows]
        some = some if normed else model.final_norm(some)
        if not logits and not torch.is_grad_enabled() and in_cache(model, some, k):
            width = model.splits()
            part = part_of(len(some), width, k)
            for kept_in, found in zip(
                (top_ids, top_logprobs, logprobs), in_parts(model, some, k, wanted.to(some.device), width, part), strict=True
            ):
                kept_in.append(found.cpu())
            continue
        values = model.unembed(some)
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        ranked = k or wanted.numel()
        top, ids = (
            topk(values, min(max(k, 1), values.shape[-1])) if ranked else (values[:, :0], torch.empty(len(values), 0, dtype=torch.long))
        )
        total = logsumexp(values, top[:, :1].detach()) if ranked else values[:, :1]
        top_ids.append(ids[:, :k].cpu())
        top_logprobs.append((top[:, :k] - total).cpu())
        logprobs.append((values.gather(-1, wanted.to(values.device)) - total).cpu())
        if logits:
            kept.append(values.cpu())
    return whole(top_ids), whole(top_logprobs), whole(logprobs), whole(kept) if kept else None, said


def of_words(model, resid, rows, words, normed=False):
    """Logits `[n, m]` of some words of each row `[n, m]`, from their rows of the unembedding; on the CPU. Where a backend gives none
    (`splits`), all are computed."""
    found, width = [], model.splits()
    few = width and len(words.unique()) <= FEW
    for start in range(0, len(resid), step := rows if few or not width else APART):
        some, wanted = resid[start : start + step], words[start : start + step].to(resid.device)
        some = some if normed else model.final_norm(some)
        if width:
            distinct, wanted = wanted.unique(return_inverse=True)
            values = model.unembed(some, distinct)
        else:
            values = model.unembed(some)
        values = values.gather(-1, wanted)
        found.append(values.to(torch.promote_types(values.dtype, torch.float32)).cpu())
    return whole(found)


def in_cache(model, normed, k):
    """Whether the vocabulary is worth being unembedded part by part: on a CPU, if there are parts, and more than two."""
    width = model.splits() if normed.device.type == "cpu" else 0
    return width // 2 > part_of(len(normed), width, k)


def lens(model, states, rows, k, tokens=None, ranked=0):
    """What each of several states says about the next token, and how far that is from what the last of them says; on the CPU.

    Args:
        model: What has `final_norm` and `unembed`.
        states: `[n, site, d_model]`, before the final norm; the last site is the end of the stream.
        rows: How many rows of logits are held at once, beside the ends of the stream among them.
        k: How many of the likeliest tokens.
        tokens: Token ids `[n, m]` that are wanted at every site.
        ranked: Of how many of these, the first, the rank is wanted.

    Returns:
        Ids `[n, site, k]`, their log-probabilities, and those which the end of the stream gives them; of `tokens` the log-probabilities
        `[n, site, m]` and of the first of them how many tokens are likelier `[n, site, ranked]`; the entropy and the divergence
        KL(end || site) `[n, site]`, in nats.
    """
    n, sites, _ = states.shape
    wanted = torch.empty(n, 0, dtype=torch.long) if tokens is None else tokens
    wide, deep, found = max(1, rows // sites), min(sites, rows), []
    for start in range(0, n, wide):
        some, asked, ends, parts = states[start : start + wide], wanted[start : start + wide].to(states.device), [], []
        for stop in range(sites, 0, -deep):  # from the end, with which the others are compared
            part = some[:, max(0, stop - deep) : stop]
            values = model.unembed(model.final_norm(part.flatten(0, 1)))
            values = values.to(torch.promote_types(values.dtype, torch.float32)).log_softmax(-1)
            top, ids = topk(values, min(k, values.shape[-1]))
            ends = ends or [line[-1].clone() for line in values.split(part.shape[1])]
            per_row = [
                judged(*each, ranked) for each in zip(values.split(part.shape[1]), ids.split(part.shape[1]), asked, ends, strict=True)
            ]
            alike = (x.unflatten(0, (len(some), -1)) for x in (ids, top))
            parts.append([x.cpu() for x in (*alike, *(torch.stack(column) for column in zip(*per_row, strict=True)))])
        found.append([torch.cat(column[::-1], 1) for column in zip(*parts, strict=True)])
    return [whole(column) for column in zip(*found, strict=True)]


def judged(logprobs, ids, wanted, end, ranked):
    """What `lens` returns after the likeliest tokens, of one row: log-probabilities `[site, d_vocab]`, likeliest `ids` `[site, k]`, and
    the end of the stream `[d_vocab]`."""
    said = logprobs[:, wanted]
    likelier = (
        torch.stack([(logprobs > said[:, at : at + 1]).sum(-1) for at in range(ranked)], -1) if ranked else torch.empty_like(ids[:, :0])
    )
    entropy, divergence = -(logprobs.exp() * logprobs).sum(-1), (end.exp() * (end - logprobs)).sum(-1)
    return end[ids], said, likelier, entropy, divergence.clamp(min=0)


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
