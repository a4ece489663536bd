"""The recipes as commands. Each prepares a call, which finds bad input; then the model is loaded, the recipe runs, and its result is
shown."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from hookbook.cli import output
from hookbook.errors import SiteError
from hookbook.sites import Site

Call = Callable[[Any], Any]
"""What a command does with a model."""


def _begins(names: Callable[[], Sequence[str]]) -> Callable[[str], list[str]]:
    """Completion with names."""
    return lambda incomplete: [name for name in names() if name.startswith(incomplete)]


def models() -> list[str]:
    """The models that come as packages."""
    from hookbook.models.packages import PACKAGES

    return list(PACKAGES)


complete_models = _begins(models)


def _tasks() -> list[str]:
    from hookbook import tasks

    return tasks.names()


def _relations() -> list[str]:
    from hookbook import tasks

    return [name for name in tasks.names() if "templates" in tasks.data(name)]  # hookbook.relations.names, without torch


def _contrasts() -> list[str]:
    from hookbook import tasks

    return tasks.contrasts()


def _one_of(*names: str) -> Callable[[str | None], str | None]:
    """What checks an option whose value is one of a few."""

    def check(value: str | None) -> str | None:
        if value is not None and value not in names:
            raise typer.BadParameter(f"{value!r} is not {' or '.join(names)}")
        return value

    return check


def _no_empty(tokens: list[str]) -> list[str]:
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
Backend = Annotated[str, Option(help=f"{' or '.join(BACKENDS)}.", callback=_one_of(*BACKENDS), autocompletion=_begins(lambda: BACKENDS))]
Layers = Annotated[str, Option("--layers", "--layer", help="all, or such as 0,4-8,-1 or resid_pre.3; a bare layer is a block's output.")]
Chat = Annotated[bool, Option("--chat", help="Render prompts through the chat template.")]
Seed = Annotated[int, Option(help="Of all that is drawn.")]


def _common(
    model: Model = "gemma-3-270m",
    backend: Backend = "transformer_lens",
    dtype: Annotated[str, Option(help="float32, float64, bfloat16, float16 or auto.", callback=_one_of(*DTYPES))] = "float32",
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


def _command(name: str, about: str, *examples: str) -> Callable[[Callable[..., Call]], Callable[..., Call]]:
    def add(prepare: Callable[..., Call]) -> Callable[..., Call]:
        COMMANDS[name] = (prepare, about, examples)
        return prepare

    return add


@_command(
    "patchscope",
    "Read states by patching them into another prompt and letting the model speak.",
    'hookbook patchscope "The Eiffel Tower is located in the city of"',
    'hookbook patchscope "Barack Obama" --target ENTITY_DESCRIPTION --source-layers 2-10 --generate 12',
)
def patchscope(
    source: Annotated[list[str], Argument(help="Prompts whose states are read.")],
    target: Annotated[
        str,
        Option(
            help="What they are patched into: TOKEN_IDENTITY, ENTITY_DESCRIPTION, or a prompt, of which the last token is replaced.",
            autocompletion=_begins(lambda: ("TOKEN_IDENTITY", "ENTITY_DESCRIPTION")),
        ),
    ] = "TOKEN_IDENTITY",
    source_layers: Annotated[str, Option(help="all, or such as 0,4-8,-1 or mlp_out.3; a bare layer is a block's output.")] = "all",
    target_layers: Annotated[str, Option(help="same (where each state came from), all (every pair), or layers.")] = "same",
    source_position: Annotated[str, Option(help="An index, or a text of the prompt (its last token).")] = "-1",
    target_position: Annotated[str | None, Option(help="Likewise; otherwise the target's placeholder, or its last token.")] = None,
    generate: Annotated[int, Option(min=0, help="How many tokens to generate from each patch.")] = 0,
    k: Annotated[int, Option("-k", min=1, help="How many of the likeliest next tokens to keep.")] = 5,
    token: Annotated[
        list[str], Option(callback=_no_empty, help="A token whose probability is wanted, with its leading space; may be given again.")
    ] = [],
    chat: Chat = False,
) -> Call:
    reads, writes = layers(source_layers), layers(target_layers, "same")
    read, at = position(source_position, every=False), None if target_position is None else position(target_position, every=False)
    import hookbook as hb

    known = {name: one for name, one in vars(hb.prompts).items() if isinstance(one, hb.prompts.Target)}
    if target not in known and (meant := difflib.get_close_matches(target.upper().replace("-", "_"), known, 1, 0.85)):
        raise typer.BadParameter(f"--target {target}: a prompt like a name; for that one write {meant[0]}")
    settings: Any = dict(source_layers=reads, target_layers=writes, source_position=read, target_position=at, generate=generate)
    return lambda model: hb.patchscope(model, source, target=known.get(target, target), k=k, tokens=token, chat=chat, **settings)


@_command(
    "lens",
    "Read every layer through the final norm and the unembedding (logit lens).",
    'hookbook lens "The Eiffel Tower is located in the city of" --token " Paris"',
    'hookbook lens "The Eiffel Tower is located in the city of" --position all --csv',
)
def lens(
    prompts: Annotated[list[str], Argument(help="What the model reads.")],
    layers_: Layers = "all",
    position_: Annotated[str, Option("--position", help="An index, a text of the prompt (its last token), or all.")] = "-1",
    k: Annotated[int, Option("-k", min=1, help="How many of the likeliest tokens to keep.")] = 5,
    token: Annotated[
        list[str],
        Option(callback=_no_empty, help="A token whose probability and rank are wanted, with its leading space; may be given again."),
    ] = [],
    chat: Chat = False,
) -> Call:
    settings: Any = dict(layers=layers(layers_), position=position(position_))
    import hookbook as hb

    return lambda model: hb.logit_lens(model, prompts, k=k, tokens=token, chat=chat, **settings)


@_command(
    "task-vector",
    "The vector of a task at every layer: how often it makes the model answer without examples, beside controls.",
    "hookbook task-vector country_capital --other antonym",
    "hookbook task-vector antonym --mode difference --layers 8-12 --save antonym.safetensors",
)
def task_vector(
    task: Annotated[str, Argument(help="The name of a task that ships, or a JSON or CSV file of pairs.", autocompletion=_begins(_tasks))],
    other: Annotated[str | None, Option(help="Another task, whose vector is a control.", autocompletion=_begins(_tasks))] = None,
    layers_: Layers = "all",
    mode: Annotated[
        str, Option(help="replace (the query's state) or difference (which is added).", callback=_one_of("replace", "difference"))
    ] = "replace",
    shots: Annotated[int, Option(min=1, help="Examples in a prompt.")] = 10,
    n_prompts: Annotated[int, Option(min=1, help="Prompts over which the mean is taken.")] = 64,
    queries: Annotated[int, Option(min=1, help="The most queries that choose the layer, and that judge it.")] = 100,
    seed: Seed = 0,
) -> Call:
    settings: Any = dict(layers=layers(layers_), mode=mode, shots=shots, n_prompts=n_prompts, queries=queries, seed=seed)
    from hookbook import tasks

    asked, control = tasks.load(task), None if other is None else tasks.load(other)
    import hookbook as hb

    return lambda model: hb.task_vector(model, asked, other=control, **settings)


@_command(
    "relation",
    "A relation as one linear map (LRE) at every layer: how often it says the object of subjects it was not made of, beside lesser maps.",
    "hookbook relation country_capital --layers 4-12",
    "hookbook relation landmark_city --layers 8 --json",
)
def relation(
    relation_: Annotated[
        str,
        Argument(
            metavar="RELATION",
            help="The name of a relation that ships, or a JSON or CSV file of pairs.",
            autocompletion=_begins(_relations),
        ),
    ],
    template: Annotated[str, Option(help="A sentence with {} for the subject; otherwise the relation's own.")] = "",
    layers_: Layers = "all",
    n_train: Annotated[int, Option(min=1, help="Pairs to average over.")] = 5,
    queries: Annotated[
        int | None, Option(min=1, help="The most pairs that choose the layer, and that judge it; otherwise all others.")
    ] = None,
    ridge: Annotated[float, Option(min=0.0, help="Of least squares, a control.")] = 0.01,
    seed: Seed = 0,
) -> Call:
    settings: Any = dict(layers=layers(layers_), n_train=n_train, queries=queries, ridge=ridge, seed=seed)
    import hookbook as hb

    asked = hb.relations.load(relation_, template)
    return lambda model: hb.linear_relation(model, asked, **settings)


@_command(
    "backpatch",
    "Questions in two hops, with the state of each later layer put back at each earlier one: how many more are answered, beside controls.",
    "hookbook backpatch city_country country_capital -n 10",
    "hookbook backpatch -n 2 --position bridge --plot backpatch.png",
)
def backpatch(
    first: Annotated[
        str | None,
        Argument(help="The first relation, such as city_country; otherwise all that make questions.", autocompletion=_begins(_relations)),
    ] = None,
    second: Annotated[str | None, Argument(help="The second, such as country_capital.", autocompletion=_begins(_relations))] = None,
    n: Annotated[int, Option("-n", min=1, help="At most so many questions of two relations, drawn.")] = 5,
    shots: Annotated[int, Option(min=0, help="Other questions with their answers before each.")] = 0,
    position_: Annotated[
        str, Option("--position", help="The token that is patched: an index, a text, or bridge (the last of the first hop's phrase).")
    ] = "-1",
    generate: Annotated[
        int, Option(min=0, help="Look for the answer in so many generated tokens, as the paper does (10); 0: in the next token.")
    ] = 0,
    seed: Seed = 0,
) -> Call:
    if (first is None) != (second is None):
        raise typer.BadParameter("one relation: a question in two hops needs both, or neither for all that ship")
    at = position(position_, every=False)
    import hookbook as hb

    chosen: Any = (n,) if first is None else (first, second, n)
    questions = (hb.hops.questions if first is None else hb.hops.chain)(*chosen, shots=shots, seed=seed)
    return lambda model: hb.backpatch(model, questions, position=at, generate=generate, seed=seed)


@_command(
    "steer",
    "Add the direction between texts with something and texts without it, at every layer and strength, beside a random one of the same "
    "length.",
    'hookbook steer sentiment --layers 9,13 --prompt "The film was" --toward " good" --toward " great" --against " bad"',
    'hookbook steer language_french --position all --layer 5 --strength 1 --strength 2 --prompt "My brother" --score french --generate 12',
)
def steer(
    contrast: Annotated[
        str,
        Argument(
            help="The name of a contrast that ships, or a JSON file with lists positive and negative.", autocompletion=_begins(_contrasts)
        ),
    ],
    prompt: Annotated[list[str], Option(help="What the model goes on from; may be given again.")],
    layers_: Layers = "all",
    strength: Annotated[list[float], Option(help="What the vector is multiplied by; may be given again.")] = [-2.0, -1.0, 1.0, 2.0],
    toward: Annotated[
        list[str], Option(callback=_no_empty, help="A next token that should become likelier, with its leading space; may be given again.")
    ] = [],
    against: Annotated[list[str], Option(callback=_no_empty, help="A next token that should become less likely; may be given again.")] = [],
    score: Annotated[
        str | None,
        Option(help="Instead of these, what generated texts are scored by: french or refusal.", callback=_one_of("french", "refusal")),
    ] = None,
    generate: Annotated[int, Option(min=0, help="How many tokens to generate.")] = 0,
    position_: Annotated[
        str, Option("--position", help="Of the contrast, the token that is read: an index, a text, or all (their mean).")
    ] = "-1",
    site: Annotated[str, Option(help="What a bare layer means: resid_post is a block's output, resid_pre its input.")] = "resid_post",
    held_out: Annotated[float, Option(min=0.0, max=0.99, help="The share of texts that the vector is not made of.")] = 0.25,
    seed: Seed = 0,
    chat: Chat = False,
) -> Call:
    if (score is None) == (not toward or not against):
        raise typer.BadParameter("what counts? Give --toward and --against, or --score")
    if score is not None and (toward or against):
        raise typer.BadParameter("--score is without --toward and --against")
    if score is not None and not generate:
        raise typer.BadParameter("--score is of generated texts: give --generate")
    at = layers(layers_)
    Site.parse(f"{site}.0")
    import hookbook as hb

    texts = hb.tasks.contrast(contrast)
    counts: Any = dict(tokens=(toward, against)) if score is None else dict(score=getattr(hb.scores, f"{score}_score"))

    def call(model: Any) -> Any:
        found = hb.contrast_vector(
            model, *texts, layers=at, site=site, position=position(position_), held_out=held_out, seed=seed, chat=chat
        )
        return hb.steer(model, found, prompt, strengths=strength, generate=generate, seed=seed, chat=chat, **counts)

    return call
