"""Bad input raises its own error before the first forward pass, and says what, why and what to do instead."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

import hookbook as hb
from hookbook.errors import EditError, HookbookError, ModelError, Refused, SiteError, TokenError
from hookbook.prompts import Target
from hookbook.request import Each, Read, Readout, Request, Row
from hookbook.testing import ToyAdapter, toy

TOY, WIDE, HALF = toy(), toy(d_model=24), toy(dtype=torch.float16)
GOOD = torch.ones(16, dtype=torch.float64)


def scope(source="ab", **more) -> Callable[[], object]:
    return lambda: hb.patchscope(more.pop("model", TOY), source, **more)


def run(edit: Callable[[], hb.Edit] | None = None, **more) -> Callable[[], object]:
    def call() -> object:
        rows = more.pop("rows", None) or [Row(0, (edit(),) if edit else ())]
        return TOY.run(Request([TOY.encode("abc")], rows, **{"readout": Readout(k=1), **more}))

    return call


def edit(
    site: str, value: object = GOOD, op: str = "add", position: object = -1, *, run_more: dict | None = None, **more
) -> Callable[[], object]:
    """A run under one edit, made when it is called."""
    return run(lambda: hb.Edit(site, value, op, position, **more), **(run_more or {}))  # type: ignore[arg-type]


def read(site: str) -> Callable[[], object]:
    """A run that reads one site, named when it is called."""
    return lambda: TOY.run(Request([TOY.encode("abc")], [Row(0)], [Read(site)]))  # type: ignore[arg-type]


def half(**more) -> Callable[[], object]:
    """A run under one edit in half precision."""
    return lambda: HALF.run(Request([HALF.encode("abc")], [Row(0, (hb.Edit("resid_post.1", **more),))], (), Readout(k=1)))


def drawn(seed: object, **more) -> Callable[[], object]:
    """A run that draws two tokens."""
    return lambda: TOY.run(Request([TOY.encode("abc")], [Row(0)], generate=2, sampling=hb.Sampling(seed, **more)))  # type: ignore[arg-type]


BAD: dict[str, tuple[Callable[[], object], type[HookbookError], str]] = {
    "unknown site": (scope(source_layers="resid_pots.1"), SiteError, "write 'resid_post.1'"),
    "site that is no site": (scope(source_layers="one"), SiteError, "name.layer"),
    "layer out of range": (scope(source_layers=3), SiteError, "layers 0 to 2"),
    "target layer out of range": (scope(target_layers=7), SiteError, "layers 0 to 2"),
    "negative layer out of range": (scope(source_layers=-4), SiteError, "layers 0 to 2"),
    "no layers": (scope(source_layers=[]), SiteError, "list of layers"),
    "text not in the prompt": (scope(source_position="zz"), TokenError, "'zz' is not in the prompt"),
    "ambiguous text": (scope("abab", source_position="ab"), TokenError, "occurrence=0"),
    "no such occurrence": (scope(source_position=hb.At("ab", occurrence=1)), TokenError, "occurs 1 times"),
    "span where one token is meant": (scope("abc", source_position=hb.At("bc", "all")), TokenError, "one index"),
    "index out of range": (scope(source_position=9), TokenError, "has 3 tokens"),
    "position of no kind": (scope(source_position=1.5), TokenError, "is not a position"),
    "target position out of range": (scope(target_position=99), TokenError, "use -"),
    "patch after what is read": (scope(target="abc", readout_position=0), TokenError, "cannot reach token 0"),
    "two-token placeholder": (scope(target=Target("say éé", "éé")), TokenError, "one token of its own"),
    "placeholder not in the target": (lambda: Target("say it", "x"), TokenError, "placeholder 'x' is not in the prompt"),
    "attribute template without a place": (lambda: hb.prompts.attribute("The currency of x"), TokenError, "exactly one {}"),
    "empty prompt": (scope(""), TokenError, "the prompt is empty"),
    "no prompts": (scope([]), TokenError, "at least one"),
    "empty token ids": (lambda: TOY.encode(torch.tensor([], dtype=torch.long)), TokenError, "the prompt is empty"),
    "token id out of range": (scope([3, 9999]), TokenError, "ids 0 to 257"),
    "wanted word that is a list": (lambda: hb.logit_lens(TOY, "abc", tokens=[["d"]]), TokenError, "neither a text nor a token"),  # type: ignore[list-item]
    "prompt that is no prompt": (scope([3.5]), TokenError, "is not a prompt"),
    "prompt longer than the context": (scope("a" * 64), TokenError, "reads at most 64"),
    "target and decoding longer than the context": (scope(target="a" * 60, generate=9), TokenError, "reads at most 64"),
    "decoding longer than the context": (run(generate=99), TokenError, "reads at most 64"),
    "chat without a template": (scope(chat=True), TokenError, "no chat template"),
    "two targets for three sources": (scope(["a", "b", "c"], target=["d", "e"]), TokenError, "one for each source"),
    "wanted word of two tokens": (scope(tokens=["xy"]), TokenError, "needs one"),
    "wanted id out of range": (scope(tokens=[999]), TokenError, "ids 0 to 257"),
    "k of zero": (scope(k=0), TokenError, "k of 1 or more"),
    "models of different widths": (scope(target_model=WIDE), EditError, "give map="),
    "map of the wrong shape": (scope(map=hb.Affine(torch.zeros(16, 24), torch.zeros(16))), EditError, r"\[16, 16\]"),
    "map that gives NaN": (scope(map=lambda x, source, target: x * float("nan")), EditError, "NaN"),
    "map that gives the wrong width": (scope(map=lambda x, source, target: x[:, :3]), EditError, "width is 16"),
    "NaN in a vector": (run(lambda: hb.Edit("resid_post.1", GOOD * float("nan"))), EditError, "NaN"),
    "infinite factor": (run(lambda: hb.Edit("resid_post.1", float("inf"), "scale")), EditError, "NaN or infinity"),
    "overflow of half precision": (half(value=GOOD * 1e5), EditError, "overflows float16"),
    "number that overflows half precision": (half(value=1e6, op="set"), EditError, "overflows float16"),
    "clamp to what overflows half precision": (half(value=GOOD, op="clamp", to=1e6), EditError, "overflows float16"),
    "wrong width": (run(lambda: hb.Edit("resid_post.1", torch.ones(5))), EditError, "width there is 16"),
    "whole numbers as a vector": (run(lambda: hb.Edit("resid_post.1", torch.ones(16, dtype=torch.long))), EditError, "floating point"),
    "unknown operation": (run(lambda: hb.Edit("resid_post.1", GOOD, "multiply")), EditError, "project_out"),
    "zero direction": (run(lambda: hb.Edit("resid_post.1", 0 * GOOD, "project_out")), EditError, "zero vector"),
    "vectors and span disagree": (
        run(lambda: hb.Edit("resid_post.1", torch.ones(3, 16), "set", slice(0, 2))),
        EditError,
        "3 vectors for 2 tokens",
    ),
    "edit that would never fire": (
        run(lambda: hb.Edit("resid_post.2", GOOD), readout=None, reads=[Read(hb.Site("resid_post", 1))]),
        EditError,
        "never fire",
    ),
    "edit that nothing reads": (run(lambda: hb.Edit("resid_post.1", GOOD), readout=None), EditError, "never fire"),
    "edit after everything that is read": (
        run(lambda: hb.Edit("resid_post.1", GOOD), readout=Readout(0, k=1)),
        EditError,
        "changes nothing",
    ),
    "wanted tokens of the wrong shape": (run(readout=Readout(tokens=torch.zeros(3, 1, dtype=torch.long))), TokenError, "for 1 rows"),
    "wanted token out of range": (run(readout=Readout(tokens=torch.tensor([[-1]]))), TokenError, "ids 0 to 257"),
    "words of the wrong shape": (run(readout=Readout(token_logits=torch.zeros(3, 1, dtype=torch.long))), TokenError, "for 1 rows"),
    "words out of range": (run(readout=Readout(token_logits=torch.tensor([[258]]))), TokenError, "ids 0 to 257"),
    "negative k": (run(readout=Readout(k=-1)), TokenError, "0 or more"),
    "negative generate": (run(generate=-1), TokenError, "0 or more"),
    "half a token": (run(generate=1.5), TokenError, "not a whole number"),
    "half a likeliest token": (run(readout=Readout(k=1.5)), TokenError, "not a whole number"),  # type: ignore[arg-type]
    "half a token of a recipe": (scope(generate=1.5), TokenError, "not a whole number"),
    "k that is no number": (scope(k="5"), TokenError, "not a whole number"),
    "sampling of another kind": (run(generate=1, sampling={}), TokenError, "hb.Sampling"),
    "tokens as one text": (scope(tokens="xyz"), TokenError, "tokens="),
    "another tokenizer for a wrapped model": (lambda: hb.wrap(TOY, tokenizer=TOY.tokenizer), ModelError, "has its own"),
    "span of no numbers": (scope(source_position=slice(None, "a")), TokenError, "is not a span"),
    "row of no prompt": (run(rows=[Row(3)]), EditError, "prompts 0 to 0"),
    "readout after several tokens": (run(readout=Readout(slice(0, 2), k=1)), TokenError, "one position"),
    "too few positions": (
        run(rows=[Row(0), Row(0)], reads=[Read(hb.Site("resid_post", 1), Each((0,)))]),
        TokenError,
        "1 positions for 2 rows",
    ),
    "unknown model offline": (lambda: hb.load("nobody/no-such-model"), ModelError, "HF_HUB_OFFLINE"),
    "unknown backend": (lambda: hb.load("gemma-3-270m", "jax"), ModelError, "transformer_lens"),
    "unknown dtype": (lambda: hb.load("gemma-3-270m", dtype="int4"), ModelError, "bfloat16"),
    "head out of range": (edit("head_z.1.2", 1.0), SiteError, "this model has heads 0 to 1"),
    "neuron out of range": (read("mlp_act.1.32"), SiteError, "this model has neurons 0 to 31"),
    "head of a site without heads": (read("attn_out.1.0"), SiteError, "no heads or neurons"),
    "layer of a site without layers": (read("final_norm.2"), SiteError, "a model has one final_norm"),
    "site without its layer": (read("head_z"), SiteError, "layers count blocks from 0"),
    "vector of a whole site at one head": (edit("head_z.1.0", GOOD), EditError, "width there is 8"),
    "vector at one neuron": (edit("mlp_act.1.3", GOOD, "set"), EditError, "width there is 1"),
    "vector at all neurons": (edit("mlp_act.1", GOOD), EditError, "width there is 32"),
    "vector at a pattern": (edit("attn_pattern.1", GOOD, "set"), EditError, "takes one number"),
    "factor of several numbers": (edit("resid_post.1", GOOD, "scale"), EditError, "takes one number"),
    "direction in a pattern": (edit("attn_pattern.1", GOOD, "project_out"), EditError, "a pattern has no directions"),
    "clamp of a pattern": (edit("attn_pattern.1", GOOD, "clamp", to=1.0), EditError, "a pattern has no directions"),
    "number as a direction": (edit("resid_post.1", 1.0, "project_out"), EditError, "a vector is"),
    "direction left out": (edit("resid_post.1", 0.0, "clamp", to=2.0), EditError, "a vector is"),
    "several directions in one edit": (
        edit("resid_post.1", torch.ones(2, 16), "project_out", slice(0, 2)),
        EditError,
        "a direction is one vector",
    ),
    "rotation along nothing": (edit("resid_post.1", 0 * GOOD, "rotate"), EditError, "zero vector"),
    "rotation of one number": (edit("mlp_act.1.3", GOOD[:1], "rotate"), EditError, "one number has no directions"),
    "clamp to NaN": (edit("resid_post.1", op="clamp", to=float("nan")), EditError, "NaN or infinity"),
    "NaN as a number": (edit("resid_post.1", float("nan"), "set"), EditError, "NaN or infinity"),
    "infinite attention": (edit("attn_pattern.1", float("inf"), "add"), EditError, "NaN or infinity"),
    "knock_out away from a pattern": (edit("head_z.1", 0.0, "knock_out"), EditError, "only attn_pattern has keys"),
    "knock_out with a value": (edit("attn_pattern.1", 0.5, "knock_out"), EditError, "it sets attention to zero"),
    "keys away from a pattern": (edit("resid_post.1", keys=0), EditError, "only attn_pattern has keys"),
    "keys out of range": (edit("attn_pattern.1", 0.0, "set", keys=9), TokenError, "has 4 tokens"),
    "keys of no kind": (edit("attn_pattern.1", 0.0, "set", keys=1.5), TokenError, "is not a position"),
    "keys not in the prompt": (edit("attn_pattern.1", 0.0, "set", keys="zz"), TokenError, "'zz' is not in the prompt"),
    "empty keys": (edit("attn_pattern.1", 0.0, "set", keys=slice(0, 0)), TokenError, "is empty"),
    "keys after the token": (edit("attn_pattern.1", 0.0, "knock_out", 1, keys=slice(2, None)), EditError, "attention to later tokens"),
    "unknown scope": (edit("resid_post.1", scope="answer"), EditError, "use prompt, generated, all, or a tuple"),
    "scope that is a number": (edit("resid_post.1", scope=3), EditError, "use prompt, generated, all, or a tuple"),
    "scope that is nothing": (edit("resid_post.1", scope=None), EditError, "use prompt, generated, all, or a tuple"),
    "scope of no positions": (edit("resid_post.1", scope=()), EditError, "whole numbers of 0 or more"),
    "scope of negative positions": (edit("resid_post.1", scope=(-1,)), EditError, "whole numbers of 0 or more"),
    "scope of what are no numbers": (edit("resid_post.1", scope=(True, 1.0)), EditError, "whole numbers of 0 or more"),
    "scope with a position of its own": (edit("resid_post.1", position=0, scope="generated"), EditError, "leave position out"),
    "absolute positions with a position": (edit("resid_post.1", position="a", scope=(0, 1)), EditError, "leave position out"),
    "vectors of a span in every scope": (
        edit("resid_post.1", torch.ones(2, 16), "set", slice(0, 2), scope="all"),
        EditError,
        "other scopes take one",
    ),
    "scope of tokens nobody generates": (edit("resid_post.1", scope="generated"), EditError, "0 generated ones are fed back"),
    "scope of the one token that is not fed back": (
        edit("resid_post.1", scope="generated", run_more={"generate": 1}),
        EditError,
        "0 generated ones are fed back",
    ),
    "scope after everything": (edit("resid_post.1", scope=(7,), run_more={"generate": 3}), EditError, "2 generated ones are fed back"),
    "edit of a norm nobody reads": (
        edit("final_norm", run_more={"readout": None, "reads": [Read("resid_post.2")]}),
        EditError,
        "never fire",
    ),
    "edit of a norm at another token": (edit("final_norm", position=1), EditError, "changes nothing"),
    "edit of a later embedding": (
        edit("embed", run_more={"readout": None, "reads": [Read("resid_post.1", 0)]}),
        EditError,
        "changes nothing",
    ),
    "temperature of zero": (lambda: hb.Sampling(0, temperature=0.0), TokenError, "temperature above 0"),
    "negative temperature": (lambda: hb.Sampling(0, temperature=-1.0), TokenError, "temperature above 0"),
    "temperature that is no number": (lambda: hb.Sampling(0, temperature=float("nan")), TokenError, "temperature above 0"),
    "infinite temperature": (lambda: hb.Sampling(0, temperature=float("inf")), TokenError, "temperature above 0"),
    "negative top_k": (lambda: hb.Sampling(0, top_k=-1), TokenError, "top_k of 0 or more"),
    "top_p of zero": (lambda: hb.Sampling(0, top_p=0.0), TokenError, "top_p above 0"),
    "top_p above one": (lambda: hb.Sampling(0, top_p=1.1), TokenError, "at most 1"),
    "top_p that is no number": (lambda: hb.Sampling(0, top_p=float("nan")), TokenError, "at most 1"),
    "sampling without generating": (run(sampling=hb.Sampling(0)), TokenError, "nothing is drawn"),
    "half a token among the likeliest": (drawn(0, top_k=1.5), TokenError, "top_k"),
    "seed that is no number": (drawn("a"), TokenError, "seed"),
    "temperature as a text": (lambda: hb.Sampling(0, temperature="cold"), TokenError, "temperature"),  # type: ignore[arg-type]
    "gradients through generated tokens": (run(generate=2, grad=True), EditError, "a chosen token has no derivative"),
    "gradients of a vector that nobody asked for": (edit("resid_post.1", GOOD.clone().requires_grad_()), EditError, "ask with grad=True"),
    "value that is a text": (edit("resid_post.1", "much"), EditError, "resid_post.1"),
    "value that is nothing": (edit("resid_post.1", None), EditError, "resid_post.1"),
    "value that is a list": (edit("resid_post.1", [1.0] * 5), EditError, "resid_post.1"),
    "clamp to a text": (edit("resid_post.1", op="clamp", to="x"), EditError, "resid_post.1"),
    "not a model": (lambda: hb.wrap(torch.nn.Linear(2, 2)), ModelError, "no adapter accepts it"),
    "remote": (lambda: hb.wrap(TOY, remote=True), Refused, "only nnsight models"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, monkeypatch):
    call, error, words = BAD[name]
    passes = []
    forward = ToyAdapter.forward

    def counted(self, *args, **kwargs):
        passes.append(self)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(ToyAdapter, "forward", counted)
    with pytest.raises(error, match=words) as caught:
        call()
    assert caught.value.what and (caught.value.why or caught.value.instead)
    assert re.search(r"\.$", str(caught.value))
    if not name.startswith("map that gives"):  # what a map gives is known once the source was run
        assert not passes
