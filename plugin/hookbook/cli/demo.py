"""What `hookbook demo` does."""

from __future__ import annotations

import logging
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

import hookbook as hb
from hookbook.cli.output import load, step
from hookbook.show import html as report
from hookbook.show.cells import grid_table
from hookbook.show.text import show


def demo(model_name: str, backend: str, prompt: str, name: str, out: Path) -> None:
    """Print a table of what a model holds at every layer, and write a page."""
    logging.basicConfig(level=logging.WARNING)
    model = load(model_name, backend)
    card = model.card
    pairs = card.n_layers**2
    with step(f"patching every layer's last state into every layer of the identity prompt: {pairs} runs at once"):
        grid = hb.patchscope(model, prompt, target_layers="all")
    with step(f"describing {name!r} from the state of every layer"):
        said = hb.patchscope(model, name, target=hb.prompts.ENTITY_DESCRIPTION, generate=12)
    with step("logit lens"):
        lens = hb.logit_lens(model, prompt)

    same = {layer: p for p, (read, write) in enumerate(grid.pairs) if read == write and (layer := read.layer) is not None}
    console = Console()
    room = max(20, console.width - 54)  # for the description, beside the other columns
    top = f"What {model_name} holds at the last token of {prompt!r}, and of {name!r}"
    table = Table(
        title=Text(top),
        title_justify="left",
        caption=Text(f"unpatched, the description target says: {show(said.control_texts[0])[:60]!r}"),
        caption_justify="left",
    )
    for head in ("layer", "patchscope", "p", "logit lens", "p", name[:room]):
        table.add_column(Text(head), justify="right" if head in ("layer", "p") else "left", no_wrap=True)
    for layer, p in same.items():
        chances = [f"{float(result.logprobs[0, at, 0].exp()):.2f}" for result, at in ((grid, p), (lens, layer))]
        text = show(said.texts[0][layer].lstrip(": "))
        table.add_row(
            *map(Text, (str(layer), show(grid.token(0, p))[:10], chances[0], show(lens.token(0, layer))[:10], chances[1], text[:room]))
        )
    console.print(table)

    cost, plain = grid.settings["cost"], pairs * len(grid.targets[0]) * card.n_layers
    saved = (
        f"{pairs} runs cost {cost['token_layers']:,} token-layers in {cost['climbs']} climbs, one of which reads the states; run one by "
        f"one they cost {plain:,}, {plain / cost['token_layers']:.0f} times as many."
    )
    console.print(saved, highlight=False, markup=False)
    description = report.table(["layer", "description"], [[str(read.layer), said.texts[0][p]] for p, (read, _) in enumerate(said.pairs)])
    control = f" Unpatched, the target says {said.control_texts[0]!r}: what resembles it says nothing about the name."
    away = ""
    if card.n_layers > 1:
        away = (
            f" From the layer below the last, the model's own answer is still {float(lens.kl[0, -2]):.1f} nats away; "
            f"from the first, {float(lens.kl[0, 0]):.1f}."
        )
    path = report.write(
        out,
        report.page(
            f"What {model_name} holds at every layer",
            [
                (
                    f"Token identity, every pair of layers: {prompt!r}",
                    "The state of the last token at a source layer replaces the state of “?” at a target layer of a prompt that "
                    f"repeats words; each cell shows the next token. {saved} Unpatched, the target says "
                    f"{show(grid.vocab[int(grid.control_ids[0, 0])])!r}.",
                    grid_table(grid),
                ),
                (
                    "The same states through the logit lens",
                    "Straight to the final norm and the unembedding." + away,
                    grid_table(lens),
                ),
                (
                    f"Entity description by layer: {name!r}",
                    "The state of the last token of the name replaces “x” at the same layer of a prompt that describes entities." + control,
                    description,
                ),
            ],
            f"hookbook {hb.__version__}; {card.model_id} through {card.backend}, {card.dtype}. Methods: Ghandeharioun et al. 2024, "
            f"arXiv:2401.06102; nostalgebraist 2020.",
        ),
    )
    console.print(f"Report: {path.resolve()}", highlight=False, soft_wrap=True, markup=False)
