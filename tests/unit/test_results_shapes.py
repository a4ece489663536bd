"""A file whose tensors and lists do not fit each other is refused: what a result's docstrings call by one name has one size."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import hookbook as hb
from hookbook.errors import ResultError
from hookbook.results import _shapes
from tests.makers import kinds, result

FREE = {"FeatureExamples": {"histogram"}, "LogitLens": {"language_ids"}, "MLPMemories": {"prefixes"}}
"""Of any length: bins that are not empty; the tokens that count as a language, or come before a trigger."""


def wrong(x: Any) -> Iterator[Any]:
    """The same with a row less, flattened, transposed, and narrower."""
    if isinstance(x, Tensor) and x.numel() and x.dim():
        yield x[:-1] if len(x) > 1 else torch.cat([x, x])
        if x.dim() > 1:
            yield x.flatten()
            yield x[..., :-1] if x.shape[-1] > 1 else torch.cat([x, x], -1)
            if x.shape[0] != x.shape[1]:
                yield x.transpose(0, 1)
    elif isinstance(x, dict):
        yield from ({**x, name: other} for name, one in x.items() for other in wrong(one))
    elif isinstance(x, tuple) and x and all(isinstance(one, Tensor) for one in x):
        yield from ((*x[:-1], other) for other in wrong(x[-1]))
    elif isinstance(x, tuple) and x:
        yield x[:-1] if len(x) > 1 else x + x


@pytest.mark.parametrize("name", kinds())
def test_what_does_not_fit_is_not_loaded(name, tmp_path):
    made = result(name)
    kind, shapes, tried = type(made), _shapes(type(made)), 0
    kind.load(made.save(tmp_path / "right"))
    named = shapes.keys() | {"sites"} if any("site" in dims for several in shapes.values() for dims in several) else shapes.keys()
    for field in fields(made):
        if field.name in named - FREE.get(type(made).__name__, set()):
            for x in wrong(getattr(made, field.name)):
                try:
                    path = replace(made, **{field.name: x}).save(tmp_path / "wrong")
                except hb.HookbookError:  # refused when it is made
                    continue
                tried += 1
                with pytest.raises(ResultError, match="is damaged.*has shape"):
                    kind.load(path)
    assert tried or isinstance(made, hb.Vector) or not shapes


def test_tensors_that_were_changed_in_a_file_are_no_result_whatever_their_shapes(tmp_path):
    """A square that was transposed, one number, another dtype: and what was only written again is one."""
    made: Any = result("Patchscope")
    path = made.save(tmp_path / "right")
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    name = next(name for name, x in tensors.items() if x.dim() > 1 and x.is_floating_point())
    for change in (lambda x: x + (torch.arange(x.numel()) == 0).view(x.shape), lambda x: x.double(), lambda x: x):
        save_file(tensors | {name: change(tensors[name])}, tmp_path / "other", metadata)
        if torch.equal(change(tensors[name]), tensors[name]) and change(tensors[name]).dtype == tensors[name].dtype:
            assert torch.equal(type(made).load(tmp_path / "other").logprobs, made.logprobs)
        else:
            with pytest.raises(ResultError, match="damaged: its tensors are not those that were saved"):
                type(made).load(tmp_path / "other")
    relation: Any = result("LinearRelation")
    path = relation.save(tmp_path / "relation")
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    assert tensors["weight"].shape[-1] == tensors["weight"].shape[-2]
    save_file(tensors | {"weight": tensors["weight"].mT.contiguous()}, path, metadata)
    with pytest.raises(ResultError, match="not those that were saved"):
        hb.LinearRelation.load(path)


def test_the_card_counts_too(tmp_path):
    made: Any = result("HeadEffects")
    path = replace(made, card=replace(made.card, n_heads=made.card.n_heads + 1)).save(tmp_path / "one")
    with pytest.raises(ResultError, match="effects has shape"):
        hb.HeadEffects.load(path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_takes_nothing_is_said(tmp_path, monkeypatch, code):
    def full(*args: Any, **more: Any) -> None:
        raise OSError(code, "no more")

    made = result("ContrastVectors")
    monkeypatch.setattr("hookbook.storage.save_file", full)
    with pytest.raises(ResultError, match="one cannot be written.*no more.*another place"):
        made.save(tmp_path / "one")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    for write in (made.save, made.report):
        with pytest.raises(ResultError, match="cannot be written"):
            write(tmp_path / "file" / "one")
