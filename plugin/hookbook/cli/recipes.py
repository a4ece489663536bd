"""The recipes as commands."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from hookbook.cli.commands import (
    COMMANDS as COMMANDS,
    CONTRASTS,
    RELATIONS,
    TASKS,
    Call,
    Chat,
    Layers,
    Seed,
    add_to as add_to,
    begins,
    command,
    complete_models as complete_models,
    layers,
    models as models,
    no_empty,
    one_of,
    position,
)
from hookbook.sites import Site


@command(
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
            autocompletion=begins(lambda: ("TOKEN_IDENTITY", "ENTITY_DESCRIPTION")),
        ),
    ] = "TOKEN_IDENTITY",
    source_layers: Annotated[str, Option(help="all, or such as 0,4-8,-1 or mlp_out.3; a bare layer is a block's output.")] = "all",
    target_layers: Annotated[str, Option(help="same (where each state came from), all (every pair), or layers.")] = "same",
    source_position: Annotated[str, Option(help="An index, or a text of the prompt (its last token).")] = "-1",
    target_position: Annotated[str | None, Option(help="Likewise; otherwise the target's placeholder, or its last token.")] = None,
    generate: Annotated[int, Option(min=0, help="How many tokens to generate from each patch.")] = 0,
    k: Annotated[int, Option("-k", min=1, help="How many of the likeliest next tokens to keep.")] = 5,
    token: Annotated[
        list[str], Option(callback=no_empty, help="A token whose probability is wanted, with its leading space; may be given again.")
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


@command(
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
        Option(callback=no_empty, help="A token whose probability and rank are wanted, with its leading space; may be given again."),
    ] = [],
    chat: Chat = False,
) -> Call:
    settings: Any = dict(layers=layers(layers_), position=position(position_))
    import hookbook as hb

    return lambda model: hb.logit_lens(model, prompts, k=k, tokens=token, chat=chat, **settings)


@command(
    "task-vector",
    "The vector of a task at every layer: how often it makes the model answer without examples, beside controls.",
    "hookbook task-vector country_capital --other antonym",
    "hookbook task-vector antonym --mode difference --layers 8-12 --save antonym.safetensors",
)
def task_vector(
    task: Annotated[str, Argument(help="The name of a task that ships, or a JSON or CSV file of pairs.", autocompletion=TASKS)],
    other: Annotated[str | None, Option(help="Another task, whose vector is a control.", autocompletion=TASKS)] = None,
    layers_: Layers = "all",
    mode: Annotated[
        str, Option(help="replace (the query's state) or difference (which is added).", callback=one_of("replace", "difference"))
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


@command(
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
            autocompletion=RELATIONS,
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


@command(
    "backpatch",
    "Questions in two hops, with the state of each later layer put back at each earlier one: how many more are answered, beside controls.",
    "hookbook backpatch city_country country_capital -n 10",
    "hookbook backpatch -n 2 --position bridge --plot backpatch.png",
)
def backpatch(
    first: Annotated[
        str | None,
        Argument(help="The first relation, such as city_country; otherwise all that make questions.", autocompletion=RELATIONS),
    ] = None,
    second: Annotated[str | None, Argument(help="The second, such as country_capital.", autocompletion=RELATIONS)] = None,
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


@command(
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
            help="The name of a contrast that ships, or a JSON file with lists positive and negative.",
            autocompletion=CONTRASTS,
        ),
    ],
    prompt: Annotated[list[str], Option(help="What the model goes on from; may be given again.")],
    layers_: Layers = "all",
    strength: Annotated[list[float], Option(help="What the vector is multiplied by; may be given again.")] = [-2.0, -1.0, 1.0, 2.0],
    toward: Annotated[
        list[str], Option(callback=no_empty, help="A next token that should become likelier, with its leading space; may be given again.")
    ] = [],
    against: Annotated[list[str], Option(callback=no_empty, help="A next token that should become less likely; may be given again.")] = [],
    score: Annotated[
        str | None,
        Option(help="Instead of these, what generated texts are scored by: french or refusal.", callback=one_of("french", "refusal")),
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


@command(
    "neuron",
    "One neuron: where it is active, what it promotes, what is lost without it, and doses; beside random neurons and ones that add "
    "as much.",
    "hookbook neuron mlp_act.15.249 --contrast language_french",
    'hookbook neuron mlp_act.25.1120 -m smollm2-135m-instruct --texts texts.txt --prompt "Le chat dort sur le" --token " canap"',
)
def neuron(
    site: Annotated[str, Argument(help="The neuron, such as mlp_act.15.249.")],
    contrast: Annotated[
        str | None,
        Option(help="A contrast that ships, or a JSON file of one: its texts say where it is active.", autocompletion=CONTRASTS),
    ] = None,
    texts: Annotated[Path | None, Option(help="Instead: a file with a text in each line.")] = None,
    prompt: Annotated[
        list[str], Option(help="What the model goes on from; may be given again; otherwise the first halves of the first 20 texts.")
    ] = [],
    token: Annotated[
        list[str], Option(callback=no_empty, help="A token whose probability is wanted, with its leading space; may be given again.")
    ] = [],
    ablate: Annotated[
        str, Option(help="What it is set to: zero, mean or resample (over the texts).", callback=one_of("zero", "mean", "resample"))
    ] = "zero",
    generate: Annotated[int, Option(min=0, help="How many tokens to generate under each dose.")] = 0,
    k: Annotated[int, Option("-k", min=1, help="How many contexts each way, and promoted words.")] = 10,
    seed: Seed = 0,
) -> Call:
    if (contrast is None) == (texts is None):
        raise typer.BadParameter("which texts? Give one of --contrast and --texts")
    if Site.parse(site).unit is None:
        raise typer.BadParameter(f"{site} is no single neuron: write such as mlp_act.15.249")
    from hookbook import tasks

    if texts is not None:
        try:
            read = [line for line in texts.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise typer.BadParameter(f"--texts {texts}: {error}") from error
        if not read:
            raise typer.BadParameter(f"--texts {texts}: no text in it")
    else:
        read = [text for side in tasks.contrast(contrast) for text in side]
    import hookbook as hb

    settings: Any = dict(prompts=prompt or None, ablate=ablate, generate=generate, k=k, seed=seed)
    settings["reference"] = None if ablate == "zero" else read
    return lambda model: hb.neuron(model, site, read, token, **settings)
