"""The `hookbook` command."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def main() -> None:
    """Entry point; says how to install what the command line needs."""
    try:
        import typer  # noqa: F401
        from rich.console import Console  # noqa: F401
    except ImportError:
        sys.exit('The hookbook command needs typer and rich. Instead: pip install "hookbook[cli]", or "hookbook[demo]" for the demo.')
    from hookbook.errors import HookbookError

    try:
        _app()()
    except HookbookError as error:
        Console(stderr=True).print(f"[bold red]{type(error).__name__}:[/] {error}", highlight=False)
        sys.exit(1)


def _app() -> Any:  # typer is imported only here
    import typer

    from hookbook.reproduce import SUITES

    app = typer.Typer(no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, help="Published interpretability methods as one call each.")

    @app.command()
    def demo(
        model: str = typer.Option("gemma-3-270m", help="A model name, as for hookbook.load."),
        backend: str = typer.Option("transformer_lens", help="transformer_lens or nnsight."),
        prompt: str = typer.Option("The Eiffel Tower is located in the city of", help="What the model reads."),
        name: str = typer.Option("Barack Obama", help="An entity that the model describes, layer by layer."),
        out: Path = typer.Option(Path("hookbook-demo.html"), help="Where the report is written."),
    ) -> None:
        """See what a real language model holds at every layer, computed by one forked forward pass.

        Example: hookbook demo --name "Serena Williams" --out serena.html
        """
        _demo(model, backend, prompt, name, out)

    @app.command()
    def doctor(model: str = typer.Argument("", help="A model name: compare every adapter with plain transformers on it.")) -> None:
        """Versions, models found here, and whether every adapter gives the numbers of plain transformers.

        Example: hookbook doctor gemma-3-270m
        """
        if not _doctor(model):
            raise typer.Exit(1)

    reproduce = typer.Typer(no_args_is_help=True, help="Published effects on a model of yours, each beside its controls.")
    app.add_typer(reproduce, name="reproduce")
    for suite in SUITES:
        _add(reproduce, suite)
    return app


def _add(commands: Any, suite: str) -> None:
    """A suite as a command."""
    import typer
    from typer.core import TyperCommand

    from hookbook import reproduce

    class SuiteCommand(TyperCommand):
        """Its help names the effects, and only its help: they take seconds to import."""

        def format_help(self, ctx: Any, formatter: Any) -> None:
            only: Any = next(option for option in self.params if option.name == "only")
            only.help = f"One effect; may be given again: {', '.join(reproduce.get(suite).effects)}."
            super().format_help(ctx, formatter)

    about, example = reproduce.SUITES[suite]

    @commands.command(
        suite,
        cls=SuiteCommand,
        help=f"{about} Exit code 1: something that was expected of the model does not hold.\n\n"
        f"Example: hookbook reproduce {suite} --model smollm2-135m-instruct --only {example}",
    )
    def command(
        model: str = typer.Option("gemma-3-270m", help="A model name, as for hookbook.load."),
        out: Path | None = typer.Option(None, help=f"A new folder for tables, pictures and report.html; otherwise hookbook-{suite}-MODEL."),
        only: list[str] = typer.Option([]),
        as_json: bool = typer.Option(False, "--json", help="Print the table as JSON, and nothing else."),
    ) -> None:
        if not _reproduce(suite, model, out or Path(f"hookbook-{suite}-{model.strip('/').replace('/', '-')}"), only, as_json):
            raise typer.Exit(1)


def _reproduce(name: str, model: str, out: Path, only: list[str], as_json: bool) -> bool:
    import json

    from rich.console import Console
    from rich.table import Table

    from hookbook import reproduce
    from hookbook.reproduce.suite import controls_text, number, run, verdict

    suite = reproduce.get(name)
    lines = run(suite, model, out, only)
    if as_json:
        print(json.dumps([line.cells() for line in lines], indent=1))
    else:
        console = Console()
        table = Table(title=f"{suite.title} in {model}", title_justify="left", caption=verdict(lines), caption_justify="left")
        for head in ("effect", "what", "measured", "controls", "the paper says", "holds here"):
            table.add_column(head, justify="right" if head == "measured" else "left", overflow="fold")
        for line in lines:
            holds = {"yes": "[green]yes[/]", "partly": "[yellow]partly[/]", "no": "[red]no[/]"}.get(line.holds, line.holds)
            table.add_row(line.effect, line.what, number(line.measured), controls_text(line), line.paper, holds)
        console.print(table)
        console.print(f"Report: {(out / 'report.html').resolve()}", highlight=False, soft_wrap=True)
    return all(line.holds == "yes" for line in lines if line.counts)


def _demo(model_name: str, backend: str, prompt: str, name: str, out: Path) -> None:
    import logging
    import time
    from contextlib import contextmanager

    from rich.console import Console
    from rich.table import Table

    import hookbook as hb
    from hookbook import packages, report
    from hookbook.results import show

    notes = Console(stderr=True)
    logging.basicConfig(level=logging.WARNING)

    @contextmanager
    def step(words: str) -> Iterator[None]:
        notes.print(f"[dim]{words} ...[/]", highlight=False)
        start = time.perf_counter()
        yield
        notes.print(f"[dim]  done in {time.perf_counter() - start:.1f} s[/]", highlight=False)

    first = model_name in packages.PACKAGES and not (packages.cache_folder() / "models").exists()
    with step(f"loading {model_name} through {backend}" + (" (converting it once, about a minute)" if first else "")):
        model = hb.load(model_name, backend)
    card = model.card
    pairs = card.n_layers**2
    with step(f"patching every layer's last state into every layer of the identity prompt: {pairs} runs in one climb"):
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
        title=top, title_justify="left", caption=f"unpatched, the description target says: {show(said.control_texts[0])[:60]!r}", caption_justify="left"
    )
    for head in ("layer", "patchscope", "p", "logit lens", "p", name[:room]):
        table.add_column(head, justify="right" if head in ("layer", "p") else "left", no_wrap=True)
    for layer, p in same.items():
        chances = [f"{float(result.logprobs[0, at, 0].exp()):.2f}" for result, at in ((grid, p), (lens, layer))]
        text = show(said.texts[0][layer].lstrip(": "))
        table.add_row(str(layer), show(grid.token(0, p))[:10], chances[0], show(lens.token(0, layer))[:10], chances[1], text[:room])
    console.print(table)

    cost, plain = grid.settings["cost"], pairs * len(grid.targets[0]) * card.n_layers
    saved = f"{pairs} runs cost {cost['token_layers']:,} token-layers in one climb; run one by one they cost {plain:,}, {plain / cost['token_layers']:.0f} times as many."
    console.print(saved, highlight=False)
    description = report.table(["layer", "description"], [[str(read.layer), said.texts[0][p]] for p, (read, _) in enumerate(said.pairs)])
    control = f" Unpatched, the target says {said.control_texts[0]!r}: what resembles it says nothing about the name."
    path = report.write(
        out,
        report.page(
            f"What {model_name} holds at every layer",
            [
                (
                    f"Token identity, every pair of layers: {prompt!r}",
                    "The state of the last token at a source layer replaces the state of “?” at a target layer of a prompt that "
                    f"repeats words; each cell shows the next token. {saved} Unpatched, the target says {show(grid.vocab[int(grid.control_ids[0, 0])])!r}.",
                    report.grid_table(grid),
                ),
                (
                    "The same states through the logit lens",
                    f"Straight to the final norm and the unembedding. From the layer below the last, the model's own answer is still {float(lens.kl[0, -2]):.1f} nats away; from the first, {float(lens.kl[0, 0]):.1f}.",
                    report.grid_table(lens),
                ),
                (
                    f"Entity description by layer: {name!r}",
                    "The state of the last token of the name replaces “x” at the same layer of a prompt that describes entities." + control,
                    description,
                ),
            ],
            f"hookbook {hb.__version__}; {card.model_id} through {card.backend}, {card.dtype}. Methods: Ghandeharioun et al. 2024, arXiv:2401.06102; nostalgebraist 2020.",
        ),
    )
    console.print(f"Report: {path.resolve()}", highlight=False, soft_wrap=True)


def _doctor(model: str) -> bool:
    from itertools import chain

    from rich.console import Console

    from hookbook import doctor

    console, fine = Console(), True
    for finding in chain(doctor.environment(), doctor.models(), doctor.check(model) if model else ()):
        mark = {None: " ", True: "[green]✓[/]", False: "[red]✗[/]"}[finding.ok]
        console.print(f"{mark} {finding.what}: {finding.value}", highlight=False, soft_wrap=True)
        fine = fine and finding.ok is not False
    return fine
