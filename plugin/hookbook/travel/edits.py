"""What edits do to a tensor, and their grouping, so that edits of many rows are one operation."""

import torch

from hookbook.travel.features import OWN, changed


def take(x, rows):
    """Rows of a batch."""
    return x.index_select(0, rows.to(x.device))


def group_edits(items):
    """Edits by site, and among those by operation, in an order that keeps each row's own.

    Args:
        items: For each edit of a row a dict: `row` of the batch and `cols`; `site` (name, layer) and its `width`; `op`, `value`
            (`[width]`, `[cols, width]` or a number) and `to`; `unit` and `n_units` for one head or neuron. Of `attn_pattern`: `heads`,
            and `keys`, for each of `cols` the columns attended to. Of `features`, `value` is a dict: `code` (see
            `hookbook.travel.features`),
            `scale`, `shift`, `drop`; `kind`, the same for edits that can be one operation; `alike`, whether all of a kind have one code;
            and `seen`, the site an encoder reads if it is another one, or None.

    Returns:
        `{site: [group]}`, as `apply_edit` takes them.
    """
    found, nth = {}, {}
    for item in items:
        site, whole = item["site"], (item["row"], item["site"])
        n = nth.get(whole, 0)
        nth[whole] = n + 1
        kind = item["value"]["kind"] if item["op"] == "features" else ""
        found.setdefault(site, {}).setdefault((n, item["op"], "unit" in item, kind), []).append(item)
    grouped, looks = {}, {}
    for site, groups in found.items():
        make = _pattern_group if site[0] == "attn_pattern" else _group
        grouped[site] = [make(groups[key]) for key in sorted(groups)]
        for cell, group in enumerate(grouped[site]):
            if group.get("seen") is not None:
                group["cell"] = (*site, cell)
                looks.setdefault(tuple(group["seen"]), []).append(
                    {"op": "look", "rows": group["rows"], "cols": group["cols"], "cell": group["cell"]}
                )
    for site, groups in looks.items():  # what an encoder sees includes the edits there
        grouped[site] = grouped.get(site, []) + groups
    return grouped


def _group(items):
    first = items[0]
    counts = [len(item["cols"]) for item in items]
    group = {
        "op": first["op"],
        "rows": torch.tensor([item["row"] for item, n in zip(items, counts, strict=True) for _ in range(n)]),
        "cols": torch.tensor([column for item in items for column in item["cols"]]),
    }
    if "unit" in first:
        group["units"] = torch.tensor([item["unit"] for item, n in zip(items, counts, strict=True) for _ in range(n)])
        group["n_units"] = first["n_units"]
    values = [item["value"] for item in items]
    if first["op"] == "features":
        return {**group, **_features(values, counts)}
    if first["op"] == "scale":
        group["value"] = torch.tensor([value for value, n in zip(values, counts, strict=True) for _ in range(n)], dtype=torch.float64)
    else:
        group["value"], group["of"] = _distinct(values, counts, first["width"])
    if first["op"] == "clamp":
        group["to"] = torch.tensor([item["to"] for item, n in zip(items, counts, strict=True) for _ in range(n)], dtype=torch.float64)
    return group


def _distinct(values, counts, width):
    """Values, each once, `[m, width]`, and which of them each token of each edit takes, `[n]`: a vector that many share travels once."""
    lines, first, of, end = [], {}, [], 0
    for value, n in zip(values, counts, strict=True):
        key = id(value) if isinstance(value, torch.Tensor) else value
        if key not in first:
            value = value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float64)
            m = len(value) if value.dim() == 2 else 1
            lines.append(value.expand(m, width))
            first[key], end = (end, m), end + m
        start, m = first[key]
        of += [start] * n if m == 1 else range(start, start + n)
    return lines[0] if len(lines) == 1 else torch.cat(lines), torch.tensor(of)


def _features(values, counts):
    """Changes of features, each once, and which of them each token of each edit takes."""
    of, once = [], {}
    for value, n in zip(values, counts, strict=True):
        of += [once.setdefault(id(value), len(once))] * n
    first = values[0]
    distinct = list({id(value): value for value in values}.values())
    code = first["code"]
    if not first["alike"]:
        code = {
            key: torch.stack([value["code"][key] for value in distinct]) if key in OWN and part is not None else part
            for key, part in code.items()
        }
    changes = {key: torch.stack([value[key] for value in distinct]) for key in ("scale", "shift")}
    return {**changes, "code": code, "each": not first["alike"], "drop": first["drop"], "seen": first["seen"], "of": torch.tensor(of)}


def _pattern_group(items):
    lines, entries, keys, values = [], [], [], []
    for item in items:
        for head in item["heads"]:
            for column, chosen in zip(item["cols"], item["keys"], strict=True):
                entries += [len(lines)] * len(chosen)
                keys += chosen
                values += [item["value"]] * len(chosen)
                lines.append((item["row"], head, column))
    rows, heads, cols = torch.tensor(lines).unbind(1)
    return {
        "op": items[0]["op"],
        "rows": rows,
        "heads": heads,
        "cols": cols,
        "entries": torch.tensor(entries),
        "keys": torch.tensor(keys),
        "value": torch.tensor(values, dtype=torch.float64),
    }


def apply_edit(x, group):
    """Apply one group of edits to `x` in place; `hookbook.request.Edit` says what each operation is.

    A group has `rows`, `cols`, `op`, `value` (`[m, width]`, of which each takes the one that `of` `[n]` says, or `[n]` of numbers for
    `scale`) and `to` `[n]`. With `units` `[n]` and `n_units` it is about one head or neuron each. Of an attention pattern, `rows`, `heads`
    and `cols` name lines, and `entries`, `keys` and `value` say what changes in which of these lines. Of `features`, `looked` is what the
    encoder reads if that is not `x`; `hookbook.travel.features.changed` says the rest.
    """
    op = group["op"]
    if "entries" in group:
        _edit_pattern(x, group)
        return
    if "units" in group:
        x = x.unflatten(-1, (group["n_units"], -1))
        at = (group["rows"].to(x.device), group["cols"].to(x.device), group["units"].to(x.device))
    else:
        at = (group["rows"].to(x.device), group["cols"].to(x.device))
    if op == "features":
        old = x[at].to(torch.promote_types(x.dtype, torch.float32))
        x[at] = changed(old, group.get("looked", old), group).to(x.dtype)
        return
    # half precision leaves a residue of a projection behind, so the arithmetic is at least float32
    wide = x.dtype if op == "set" else torch.promote_types(x.dtype, torch.float32)
    value = group["value"].to(wide).to(x.device)
    if "of" in group:
        value = value[group["of"].to(x.device)]
    if op == "set":
        x[at] = value
        return
    old = x[at].to(wide)
    if op == "add":
        new = old + value
    elif op == "scale":
        new = old * value[:, None]
    elif op == "rotate":
        unit, towards = torch.nn.functional.normalize(old, dim=-1), torch.nn.functional.normalize(value, dim=-1)
        against = (-(unit * towards).sum(-1, keepdim=True)).clamp(min=0)
        new = old.norm(dim=-1, keepdim=True) * torch.nn.functional.normalize(unit + (1 + against) * value, dim=-1)
    else:
        unit = value / value.abs().amax(-1, keepdim=True)  # so that no length overflows
        unit = unit / unit.norm(dim=-1, keepdim=True)
        along = (old * unit).sum(-1, keepdim=True)
        to = group["to"].to(wide).to(x.device)[:, None] if op == "clamp" else 0.0
        new = old + (to - along) * unit
    x[at] = new.to(x.dtype)


def _edit_pattern(x, group):
    rows, heads, cols = (part.to(x.device) for part in (group["rows"], group["heads"], group["cols"]))
    entries, keys = group["entries"].to(x.device), group["keys"].to(x.device)
    lines = x[rows, heads, cols]
    value = group["value"].to(x.device, x.dtype)
    if group["op"] == "set":
        lines[entries, keys] = value
    elif group["op"] == "add":
        lines[entries, keys] += value
    elif group["op"] == "scale":
        lines[entries, keys] *= value
    else:
        lines[entries, keys] = 0
        left = lines.sum(-1, keepdim=True)
        lines = lines / torch.where(left > torch.finfo(x.dtype).tiny, left, 1)  # nothing is left to share
    x[rows, heads, cols] = lines
