"""Results as short tables for a terminal: what was found, and its controls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len, set_cell_size
from rich.table import Table
from rich.text import Text

from hookbook.reproduce.suite import number
from hookbook.show.text import ending, show

if TYPE_CHECKING:
    from rich.console import RenderableType

    from hookbook.recipes.hops.backpatching import Backpatch
    from hookbook.recipes.neurons.report import NeuronReport
    from hookbook.recipes.reading.logit_lens import LogitLens
    from hookbook.recipes.reading.patchscopes import Patchscope
    from hookbook.recipes.relations.linear_relations import LinearRelation
    from hookbook.recipes.steering.steering import Steering
    from hookbook.recipes.vectors.task_vectors import TaskVectors

Tables = list["RenderableType"]
CELL = 11
"""The width of a token and its probability in a grid."""


def patchscope(result: Patchscope, width: int) -> Tables:
    """Of one prompt each layer's likeliest tokens and text; of every pair of layers, or of several prompts, a grid."""
    title = short(result.sources[0].text)
    drawn = [
        f"Unpatched, the target goes on with {said(result, result.control_ids[n, 0], result.control_logprobs[n, 0])}"
        for n in range(len(result.sources))
    ]
    if result.is_grid:
        return [
            part
            for n, source in enumerate(result.sources)
            for part in (_grid(result, width, f"source layer by target layer: {short(source.text)}", n), Text(drawn[n]))
        ]
    if len(result.sources) > 1:
        return [*_several(result, width), *map(Text, dict.fromkeys(drawn))]
    rows: list[list[str]] = []
    texts: Sequence[str] = result.texts[0] if result.texts else ()
    for p, name in enumerate(result.cells()[1]):
        tops = [result.token(0, p, r) for r in range(result.token_ids.shape[-1])]
        rows.append(
            [
                name,
                *_likeliest(tops, result.logprobs[0, p, 0], texts[p] if texts else None),
                *map(number, result.wanted_logprobs[0, p].exp()),
            ]
        )
    tops = [result.vocab[int(i)] for i in result.control_ids[0]]
    control = _likeliest(tops, result.control_logprobs[0, 0], result.control_texts[0] if result.texts else None)
    rows.append(["unpatched", *control, *map(number, result.control_wanted_logprobs[0].exp())])
    rest = "text" if texts else "then"
    heads = ["layer", "says", "p", rest, *(f"p{word}" for word in result.wanted)]
    return [table(title, heads, rows, mark=len(rows) - 1, fit=None if texts else (rest, width))]


def lens(result: LogitLens, width: int) -> Tables:
    """Of one prompt each layer's likeliest tokens, entropy and divergence; else a grid."""
    if len(result.rows) > 1:
        return _several(result, width)
    rows, own = [], f"The model itself goes on with {show(result.own_tokens[0])!r}"
    for s, name in enumerate(result.cells()[1]):
        wanted = [
            x
            for m in range(len(result.wanted))
            for x in (number(result.wanted_logprobs[0, s, m].exp()), str(int(result.wanted_ranks[0, s, m])))
        ]
        tops = [result.token(0, s, r) for r in range(result.token_ids.shape[-1])]
        rows.append([name, *_likeliest(tops, result.logprobs[0, s, 0]), number(result.entropy[0, s]), number(result.kl[0, s]), *wanted])
    heads = ["layer", "says", "p", "then", "entropy", "KL", *(head for word in result.wanted for head in (f"p{word}", "rank"))]
    return [table(short(result.prompts[0].text), heads, rows, fit=("then", width)), Text(own)]


def task_vector(result: TaskVectors, width: int) -> Tables:
    """Accuracy by layer beside the controls; the chosen layer is marked."""
    at, names = result.best_index, ["validation", "accuracy"]
    place = f"At {result.sites[at]}, chosen on validation pairs, the vector answers {float(result.accuracy[at]):.0%} of test queries"
    controls = [f"{name} {float(x[at]):.0%}" for name, x in result.controls.items()]
    levels = [f"without it {float(result.zero_shot):.0%}", f"with {result.settings['shots']} examples instead {float(result.few_shot):.0%}"]
    return [_sites(f"{result.task}, {result.mode}: accuracy", result, names, at), Text(f"{place}; {', '.join([*controls, *levels])}.")]


def relation(result: LinearRelation, width: int) -> Tables:
    """Faithfulness by layer beside lesser maps; the chosen layer is marked."""
    at, names = result.best_index, ["beta", "validation", "faithfulness"]
    known = f"of the {int(result.test_known.sum())} of {len(result.test)} test objects that the model says itself"
    place = f"At {result.best}, chosen on validation pairs, the map says {float(result.faithfulness[at]):.0%} {known}"
    controls = [f"{name} {float(x[at]):.0%}" for name, x in result.controls.items()]
    return [_sites(f"{result.relation}: faithfulness", result, names, at), Text(f"{place}; {', '.join(controls)}.")]


def backpatch(result: Backpatch, width: int) -> Tables:
    """The summary, and the pair of layers that was chosen."""
    frame, wrong = result.summary(), int((~result.clean).sum())
    rows = [[str(row[0]), *map(number, row[1:])] for row in frame.itertuples(index=False)]
    about = f"{wrong} of {len(result.answers)} questions were not answered; shares of these, over {len(result.pairs)} pairs of layers"
    found: Tables = [table(about, [str(name) for name in frame.columns], rows, mark=0)]
    if wrong > 1:
        best = result.best()
        found.append(
            Text(f"best: layer {best.source} to layer {best.target}, chosen on one half of them and judged on the other {best.n}.")
        )
    return found


def steer(result: Steering, width: int) -> Tables:
    """The mean score by site and strength beside a random vector's; and how the first prompt goes on."""
    vector, random, rows = result.scores.mean(0), result.random.mean(0), []
    for s, site in enumerate(result.sites):
        for i, strength in enumerate(result.strengths):
            text = [show(result.said[0][1 + s * len(result.strengths) + i])] if result.said else []
            rows.append([str(site), f"{strength:g}", number(vector[s, i]), number(random[s, i]), *text])
    rows.append(["none", "", number(result.base.mean()), "", *([show(result.said[0][0])] if result.said else [])])
    heads = ["site", "strength", "score", "random", *([short(result.prompts[0].text)] if result.said else [])]
    return [table(f"{result.metric}, mean over {len(result.prompts)} prompts", heads, rows, mark=len(rows) - 1)]


def neuron(result: NeuronReport, width: int) -> Tables:
    """Its largest contexts, the words it promotes, and what is lost without it and beside it; doses."""
    marked: Any = result.examples()
    near = [[number(row.activation), show(row.context)] for row in marked.itertuples() if row.example < len(marked) / 2][:5]
    words = [[one, *(" ".join(map(show, part.token[:6])) for _, part in rows.groupby("end", sort=False))] for one, rows in _groups(result)]
    means, shifts = result.kl.mean(1), result.changes.mean(1)
    rows = [
        [kind, name.removeprefix("mlp_act."), f"{float(means[i]):.2g}", number(result.changed[i]), *map(number, shifts[i])]
        for i, (kind, name) in enumerate(zip(result.kinds, result.names, strict=True))
    ]
    order = ", ".join(f"{kind} {number(x)}" for kind, x in zip(result.kinds, result.monotonicity(), strict=True))
    heads = ["", "neuron", "KL", "changed", *(f"log p{show(word)}" for word in result.wanted)]
    return [
        table(f"{result.site}: where it is highest, of {result.n_tokens:,} tokens", ["is", "at"], near, fit=("at", width)),
        table("what it promotes most and least", ["through", "most", "least"], words),
        table(f"without it, means over {len(result.prompts)} prompts", heads, rows, mark=0),
        Text(f"How orderly {result.wanted[-1]!r} follows the dose (rank correlation): {order}."),
    ]


def _groups(result: NeuronReport) -> Any:
    return result.promotes().groupby("through", sort=False)


def short(text: str) -> str:
    """The end of a prompt, on one line."""
    return ending(show(text), 200)


def said(result: Patchscope, token: Any, logprob: Any) -> str:
    """A token with its probability."""
    return f"{show(result.vocab[int(token)])!r} ({number(logprob.exp())})"


def table(
    title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], mark: int | None = None, fit: tuple[str, int] | None = None
) -> Table:
    """A table of texts; numbers to the right, one row marked.

    Args:
        fit: A column that is cut so that the table is no wider than this.
    """
    drawn = Table(title=Text(title), title_justify="left")
    for at, head in enumerate(heads):
        numbers = all(row[at].lstrip("-").replace(".", "", 1).isdecimal() for row in rows if row[at] not in ("", number(float("nan"))))
        drawn.add_column(Text(head), justify="right" if numbers else "left", overflow="fold")
    for at, row in enumerate(rows):
        drawn.add_row(*map(Text, row), style="bold" if at == mark else None)
    if fit is not None:
        cut = heads.index(fit[0])
        others = sum(max(cell_len(row[at]) for row in [heads, *rows]) + 3 for at in range(len(heads)) if at != cut)
        for cell in drawn.columns[cut].cells:
            if isinstance(cell, Text):
                cell.truncate(max(8, fit[1] - others - 4), overflow="ellipsis")
    return drawn


def _sites(title: str, result: TaskVectors | LinearRelation, names: Sequence[str], mark: int) -> Table:
    """Some columns of a result's frame, which has a row for each site, and its controls."""
    layers = [site.layer for site in result.sites]
    sites = result.sites if len({*layers} - {None}) < len(layers) else layers
    values = result.to_frame()[[*names, *(f"control {name}" for name in result.controls)]].itertuples(index=False)
    rows = [[str(site), *map(number, line)] for site, line in zip(sites, values, strict=True)]
    return table(title, ["layer", *names, *result.controls], rows, mark)


def _likeliest(tops: Sequence[str], logprob: Any, text: str | None = None) -> list[str]:
    """The likeliest token and its probability, and what was generated or else the tokens that come next."""
    return [set_cell_size(show(tops[0]), 14).rstrip(), number(logprob.exp()), " ".join(map(show, tops[1:])) if text is None else show(text)]


def _several(result: Patchscope | LogitLens, width: int) -> Tables:
    """Layers down, and prompts, or the tokens of each prompt, across."""
    _, _, kind, _, _ = result.cells()
    prompts = range(1) if kind == "prompt" else range(len(getattr(result, "prompts", ())))
    return [_grid(result, width, f"layer by {kind}", n, across=True) for n in prompts]


def _grid(result: Patchscope | LogitLens, width: int, title: str, prompt: int, across: bool = False) -> Table:
    """The likeliest token of each cell and its probability; of columns that do not fit every second, or third, is shown."""
    rows, columns, row_name, column_name, cells = result.cells(prompt)
    if across:
        rows, columns, row_name, cells = columns, rows, column_name, list(zip(*cells, strict=True))
    step = -(-len(columns) // max(1, (width - 10) // (CELL + 3)))
    drawn = Table(title=Text(title + (f" (every {step}; --csv has all)" if step > 1 else "")), title_justify="left")
    drawn.add_column(row_name.removesuffix(" layer"), justify="right")
    for name in columns[::step]:
        drawn.add_column(Text(show(name)[-CELL:]), no_wrap=True, min_width=CELL, max_width=CELL)
    for name, line in zip(rows, cells, strict=True):
        drawn.add_row(Text(name), *(_cell(result, n, p) for n, p in list(line)[::step]))
    return drawn


def _cell(result: Patchscope | LogitLens, n: int, p: int) -> Text:
    chance = float(result.logprobs[n, p, 0].exp())
    word = show(result.token(n, p).strip() or result.token(n, p))
    share = "nan" if chance != chance else "1.0" if chance >= 0.995 else f"{chance:.2f}"[1:]
    return Text.assemble(set_cell_size(word, CELL - 4), " ", (share, "dim"))
