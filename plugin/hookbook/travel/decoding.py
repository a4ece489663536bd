"""Decoding of all rows of a climb together, each from its own keys and values."""

import torch

from hookbook.travel.climb import Climb
from hookbook.travel.edits import apply_edit, group_edits
from hookbook.travel.layout import Layout
from hookbook.travel.readout import readout


def decode(model, kept, normed, todo, tick=None):
    """Let rows go on. Each step is a climb that forks.

    Rows of one prompt that said the same so far share a trunk, which they leave where they left it in the prompt, or
    where they were first edited since. Rows that ended are left out. Where a server keeps no keys and values for us,
    everything before is run again, with the edits that acted on it.

    Args:
        model: What has `forward`, `final_norm` and `unembed`.
        kept: Keys and values of the prompts' climb.
        normed: `[row, d_model]` after the final norm, at each row's last token.
        todo: `steps`; `ends`, the end tokens; `sampling` or None; `rows_at_once`, of logits; `last`, the number of blocks; `groups` and
            `joins`, of the prompts' layout; `pack`, rows in a row of the batch; of each trunk row `lengths` and `pads`; `ids`, `mask` and
            `width` of the prompts; for each row `items`, the edits of its prompt; and for each row `late`, the edits of generated tokens,
            as `group_edits` takes them, with `join`, `at` (positions, or None for all) and, of a pattern, `seen` (keys, or None for all).
        tick: Called on the way with the tokens times blocks that are done since.

    Returns:
        Tokens `[row, steps]`, -1 after a row's end, their log-probabilities, and passes, token-layers and rows unembedded.
    """
    steps, last, joins = todo["steps"], todo["last"], dict(todo["joins"])
    layout = Layout(todo["groups"], joins, last)
    trunk_of, rows = dict(layout.trunk_of), len(todo["late"])
    tokens, said = torch.full((rows, steps), -1), torch.zeros(rows, steps, dtype=torch.float64)
    again = isinstance(kept, dict)
    past = [list(items) for items in todo["items"]] if again else []
    out, alive, cost = [[] for _ in range(rows)], list(range(rows)), [0, 0, 0]
    for step in range(steps):
        cost[2] += len(alive)
        chosen, logprobs = choose(model, normed, step, alive, todo["sampling"], todo["rows_at_once"])
        ended = torch.isin(chosen, torch.tensor(todo["ends"], dtype=torch.long))
        some = torch.tensor(alive)[~ended]
        tokens[some, step], said[some, step] = chosen[~ended], logprobs[~ended].double()
        new = dict(zip(some.tolist(), chosen[~ended].tolist(), strict=True))
        alive = [i for i in alive if i in new]
        for i in alive:
            out[i].append(new[i])
        if step + 1 == steps or not alive:
            break
        acting = [
            (i, edit) for i in alive for edit in todo["late"][i] if edit["at"] is None or todo["lengths"][trunk_of[i]] + step in edit["at"]
        ]
        for i, edit in acting:
            if edit["join"] is not None:
                joins[i] = min(joins[i], edit["join"])
        groups = {}
        for i in alive:
            groups.setdefault((trunk_of[i], i if joins[i][0] < 0 else tuple(out[i])), []).append(i)
        before, layout = layout, Layout(list(groups.values()), joins, last)
        for layer in range(0 if again else last):
            kept[layer].take([before.at(layer, i) for i in layout.first[: layout.rows_at[layer]]])
        first = layout.first[: layout.n_trunk]
        mask = todo["mask"]
        if mask is not None:
            mask = torch.cat([mask[[trunk_of[i] for i in first]], torch.ones(len(first), step + 1, dtype=mask.dtype)], 1)
        column, place, inside, above = todo["width"] + step, {i: k for k, i in enumerate(alive)}, [], []
        for i, edit in acting:
            if edit["join"] is None:
                above.append({**edit, "row": place[i], "cols": [0]})
                continue
            item = {**edit, "row": layout.batch_row[i], "cols": [column if again else 0]}
            if "seen" in edit:
                pad = todo["pads"][trunk_of[i]]
                seen = range(column - pad + 1) if edit["seen"] is None else edit["seen"]
                item["keys"] = [[pad + key for key in seen if pad + key <= column]]
            (past[i] if again else inside).append(item)
        if again:
            inside = [{**item, "row": layout.batch_row[i]} for i in alive for item in past[i]]
        rows_of = torch.tensor([layout.batch_row[i] for i in alive])
        reads = {("resid_post", last - 1): [("next", rows_of, torch.full_like(rows_of, column if again else 0))]}
        base, pads = torch.tensor([trunk_of[i] for i in first]), mask == 0 if again and mask is not None else None
        climb = Climb(layout.n_trunk, layout.joining(), group_edits(inside), reads, last, pads, 1 if again else todo["pack"], base, tick)
        if again:
            whole = torch.cat([todo["ids"][[trunk_of[i] for i in first]], torch.tensor([out[i] for i in first])], 1)
            model.forward(whole, mask, climb)
        else:
            kept = model.forward(torch.tensor([[new[i]] for i in first]), mask, climb, kept=kept, keep=steps - step)
        normed = edited(model.final_norm(climb.found["next"]), above)
        cost[0] += 1
        cost[1] += climb.token_layers
    return tokens, said, torch.tensor(cost)


def edited(values, items):
    """`[n, width]` under edits, each of one of its rows."""
    if not items:
        return values
    values = values.clone()
    for groups in group_edits(items).values():
        for group in groups:
            apply_edit(values[:, None], group)
    return values


def choose(model, normed, step, rows, sampling, rows_at_once):
    """The next token of every row and its log-probability: the likeliest, or drawn.

    `sampling` has `draws` `[row, step]` in [0, 1), `temperature`, `top_k` and `top_p`.
    """
    if sampling is None:
        ids, logprobs, *_ = readout(model, normed, rows_at_once, k=1, normed=True)
        return ids[:, 0], logprobs[:, 0]
    draws = sampling["draws"][rows, step, None]
    chosen, logprobs, some = [], [], max(1, rows_at_once // 4)
    for start in range(0, len(normed), some):
        logits = model.unembed(normed[start : start + some]).double().cpu()
        values, ids = logits.topk(min(sampling["top_k"], logits.shape[-1]), -1) if sampling["top_k"] else logits.sort(-1, descending=True)
        probabilities = ((values - values[:, :1]) / sampling["temperature"]).softmax(-1)
        total = probabilities.cumsum(-1)
        allowed = (total - probabilities) < sampling["top_p"]  # the first that reaches top_p is the last
        total = (probabilities * allowed).cumsum(-1)
        draw = draws[start : start + some] * total[:, -1:]
        place = torch.searchsorted(total, draw, right=True).clamp(max=total.shape[-1] - 1)
        chosen.append(ids.gather(-1, place)[:, 0])
        logprobs.append((values.gather(-1, place) - logits.logsumexp(-1, keepdim=True))[:, 0])
    return torch.cat(chosen), torch.cat(logprobs)
