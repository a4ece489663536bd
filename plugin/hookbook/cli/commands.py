"""What recipes need to be commands: options that they share, texts as layers and positions, and the run itself. A command prepares a call,
which finds bad input; then the model is loaded, the recipe runs, and its result is shown."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from hookbook.cli import output
from hookbook.errors import SiteError
from hookbook.sites import Site

Call = Callable[[Any], Any]
"""What a command does with a model."""


def begins(names: Callable[[], Sequence[str]]) -> Callable[[str], list[str]]:
    """Completion with names."""
    return lambda incomplete: [name for name in names() if name.startswith(incomplete)]


def models() -> list[str]:
    """The models that come as packages."""
    from hookbook.models.packages import PACKAGES

    return list(PACKAGES)


complete_models = begins(models)


def task_names() -> list[str]:
    from hookbook import tasks

    return tasks.names()


def relation_names() -> list[str]:
    from hookbook import tasks

    return [name for name in tasks.names() if "templates" in tasks.data(name)]  # hookbook.relations.names, without torch


def contrast_names() -> list[str]:
    from hookbook import tasks

    return tasks.contrasts()


TASKS, RELATIONS, CONTRASTS = map(begins, (task_names, relation_names, contrast_names))


def one_of(*names: str) -> Callable[[str | None], str | None]:
    """What checks an option whose value is one of a few."""

    def check(value: str | None) -> str | None:
        if value is not None and value not in names:
            raise typer.BadParameter(f"{value!r} is not {' or '.join(names)}")
        return value

    return check


def no_empty(tokens: list[str]) -> list[str]:
    if "" in tokens:
        raise typer.BadParameter("an empty text is no token")
    return tokens


def layers(text: str, *words: str) -> Any:
    """`all` and other words as they are; else a list of layers (`-1`), ranges of them (`4-8`, both included) and sites (`mlp_out.3`).

    Raises:
        SiteError: A part is none of these.
    """
    if text in ("all", *words):
        return text
    found: list[int | Site] = []
    for part in text.split(","):
        ends = re.fullmatch(r"(\d{1,4})-(\d{1,4})", part.strip())  # no model has more layers, and a range of them fits into memory
        if ends and int(ends[1]) <= int(ends[2]):
            found += range(int(ends[1]), int(ends[2]) + 1)
        elif re.fullmatch(r"-?\d{1,4}", part.strip()):
            found.append(int(part))
        elif "." in part:
            found.append(Site.parse(part.strip()))
        else:
            raise SiteError(
                f"{part.strip()!r} as a layer", "", "write all, or layers, ranges and sites with commas between: 0,4-8,-1 or resid_pre.3"
            )
    return found


def position(text: str, every: bool = True) -> Any:
    """`all`: every token, if that means something; else an index or a text."""
    if text == "all" and not every:
        raise typer.BadParameter("all as a position: one token is patched; give an index, or a text of the prompt")
    return slice(None) if text == "all" else int(text) if text.removeprefix("-").isdecimal() else text


Model = Annotated[str, Option("--model", "-m", help="A model name or a folder, as for hookbook.load.", autocompletion=complete_models)]
BACKENDS = ("transformer_lens", "nnsight")
DTYPES = ("float32", "float64", "bfloat16", "float16", "auto")
Backend = Annotated[str, Option(help=f"{' or '.join(BACKENDS)}.", callback=one_of(*BACKENDS), autocompletion=begins(lambda: BACKENDS))]
Layers = Annotated[str, Option("--layers", "--layer", help="all, or such as 0,4-8,-1 or resid_pre.3; a bare layer is a block's output.")]
Chat = Annotated[bool, Option("--chat", help="Render prompts through the chat template.")]
Seed = Annotated[int, Option(help="Of all that is drawn.")]


def _common(
    model: Model = "gemma-3-270m",
    backend: Backend = "transformer_lens",
    dtype: Annotated[str, Option(help="float32, float64, bfloat16, float16 or auto.", callback=one_of(*DTYPES))] = "float32",
    device: Annotated[str | None, Option(help="Such as cpu or cuda; a GPU if there is one.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print the tidy table as JSON, and nothing else.")] = False,
    as_csv: Annotated[bool, Option("--csv", help="Print the tidy table as CSV, and nothing else.")] = False,
    plot: Annotated[Path | None, Option(help="Write the picture: .png, .svg or .pdf.")] = None,
    save: Annotated[Path | None, Option(help="Write the result: .safetensors.")] = None,
    report: Annotated[Path | None, Option(help="Write a page: .html.")] = None,
    force: Annotated[bool, Option("--force", help="Overwrite files.")] = False,
) -> None:
    """What every command takes after its own."""


COMMANDS: dict[str, tuple[Callable[..., Call], str, tuple[str, ...]]] = {}
"""By name what prepares a call, what it does, and examples."""


def add_to(app: typer.Typer) -> None:
    """The recipes as commands of an app."""
    for name, (prepare, about, examples) in COMMANDS.items():
        app.command(name, help="\n\n".join([about, *(f"Example: {example}" for example in examples)]))(_runs(name, prepare))


def _runs(name: str, prepare: Callable[..., Call]) -> Callable[..., None]:
    """A command with its own options and the common ones."""

    def run(
        *,
        model: str,
        backend: str,
        dtype: str,
        device: str | None,
        as_json: bool,
        as_csv: bool,
        plot: Path | None,
        save: Path | None,
        report: Path | None,
        force: bool,
        **own: Any,
    ) -> None:
        out = output.Output.checked(as_json, as_csv, force, plot=plot, save=save, report=report)
        call = prepare(**own)
        loaded = output.load(model, backend, dtype, device)
        with output.step(name):
            result = call(loaded)
        from hookbook.cli import tables

        out.write(result, getattr(tables, name.replace("-", "_")))

    parts = [inspect.signature(part, eval_str=True).parameters.values() for part in (prepare, _common)]
    parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for part in parts for one in part]
    setattr(run, "__signature__", inspect.Signature(parameters))  # noqa: B010  a function has no such attribute for type checkers
    return run


def command(name: str, about: str, *examples: str) -> Callable[[Callable[..., Call]], Callable[..., Call]]:
    def add(prepare: Callable[..., Call]) -> Callable[..., Call]:
        COMMANDS[name] = (prepare, about, examples)
        return prepare

    return add
