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
    "overflow of half precision": (
        lambda: HALF.run(Request([HALF.encode("abc")], [Row(0, (hb.Edit("resid_post.1", GOOD * 1e5),))], (), Readout(k=1))),
        EditError,
        "overflows float16",
    ),
    "wrong width": (run(lambda: hb.Edit("resid_post.1", torch.ones(5))), EditError, "width is 16"),
    "whole numbers as a vector": (run(lambda: hb.Edit("resid_post.1", torch.ones(16, dtype=torch.long))), EditError, "floating point"),
    "unknown operation": (run(lambda: hb.Edit("resid_post.1", GOOD, "multiply")), EditError, "project_out"),
    "zero direction": (run(lambda: hb.Edit("resid_post.1", 0 * GOOD, "project_out")), EditError, "zero vector"),
    "vectors and span disagree": (run(lambda: hb.Edit("resid_post.1", torch.ones(3, 16), "set", slice(0, 2))), EditError, "3 vectors for 2 tokens"),
    "edit that would never fire": (run(lambda: hb.Edit("resid_post.2", GOOD), readout=None, reads=[Read(hb.Site("resid_post", 1))]), EditError, "never fire"),
    "edit that nothing reads": (run(lambda: hb.Edit("resid_post.1", GOOD), readout=None), EditError, "never fire"),
    "edit after everything that is read": (run(lambda: hb.Edit("resid_post.1", GOOD), readout=Readout(0, k=1)), EditError, "changes nothing"),
    "wanted tokens of the wrong shape": (run(readout=Readout(tokens=torch.zeros(3, 1, dtype=torch.long))), TokenError, "for 1 rows"),
    "wanted token out of range": (run(readout=Readout(tokens=torch.tensor([[-1]]))), TokenError, "ids 0 to 257"),
    "negative k": (run(readout=Readout(k=-1)), TokenError, "0 or more"),
    "negative generate": (run(generate=-1), TokenError, "0 or more"),
    "tokens as one text": (scope(tokens="xyz"), TokenError, "tokens="),
    "another tokenizer for a wrapped model": (lambda: hb.wrap(TOY, tokenizer=TOY.tokenizer), ModelError, "has its own"),
    "span of no numbers": (scope(source_position=slice(None, "a")), TokenError, "is not a span"),
    "row of no prompt": (run(rows=[Row(3)]), EditError, "prompts 0 to 0"),
    "readout after several tokens": (run(readout=Readout(slice(0, 2), k=1)), TokenError, "one position"),
    "too few positions": (run(rows=[Row(0), Row(0)], reads=[Read(hb.Site("resid_post", 1), Each((0,)))]), TokenError, "1 positions for 2 rows"),
    "unknown model offline": (lambda: hb.load("nobody/no-such-model"), ModelError, "HF_HUB_OFFLINE"),
    "unknown backend": (lambda: hb.load("gemma-3-270m", "jax"), ModelError, "transformer_lens"),
    "unknown dtype": (lambda: hb.load("gemma-3-270m", dtype="int4"), ModelError, "bfloat16"),
    "not a model": (lambda: hb.wrap(torch.nn.Linear(2, 2)), ModelError, "no adapter accepts it"),
    "remote": (lambda: hb.wrap(TOY, remote=True), Refused, "this machine"),
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
