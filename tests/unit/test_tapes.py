"""What is noted of a model that is elsewhere: promises, conditions, and what waits for numbers."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import hookbook as hb
from hookbook import deferred
from hookbook.deferred import Deferred, Tape, later
from hookbook.errors import Refused
from hookbook.request import Readout, Request, Row


def promise(*shape: int) -> Deferred:
    return Deferred.of(Tape(), shape, torch.float32)


def test_arithmetic_is_noted_with_its_shape():
    x = promise(4, 3)
    y = torch.stack([x, 2 * x], 1).mean(0)[0, :2] @ torch.ones(2, 5)
    assert (
        isinstance(y, Deferred) and y.shape == (5,) and y.dtype == torch.float32 and y.device.type == "cpu" and x.dim() == 2 and len(x) == 4
    )
    assert [step[1]["name"].split(".")[-1] for step in x.tape.steps] == ["mul", "stack", "mean", "__getitem__", "matmul"]
    values, ids = x.topk(2)
    assert values.shape == ids.shape == (4, 2) and ids.dtype == torch.long and x.topk(1).values.shape == (4, 1)


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x.tolist(),
        lambda x: float(x[0, 0]),
        lambda x: bool((x > 0).any()),
        lambda x: x.numpy(),
        lambda x: int(x.argmax()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.equal(x, x),
        lambda x: x.unique(),
        lambda x: 1 if x[0, 0] > 0 else 2,
        lambda x: x.add_(1),
        lambda x: torch.zeros(4, 3).copy_(x),
        lambda x: torch.zeros(4, 3).__setitem__(0, x[0]),
        lambda x: torch.add(x, 1, out=torch.zeros(4, 3)),
    ],
)
def test_a_number_that_is_not_here_is_never_made_up(use):
    with pytest.raises(Refused, match="they come when the job is done|only functions that return new tensors"):
        use(promise(4, 3))


def test_later_waits_for_numbers_and_no_longer():
    x = promise(2)
    waits = later(lambda a, b: (a.tolist(), b), x, 3)
    assert isinstance(waits, deferred.Later) and later(lambda b: b + 1, 3) == 4
    x.number = torch.tensor([1.0, 2.0])
    assert (
        deferred.known(waits) == ([1.0, 2.0], 3)
        and torch.equal(x + 1, torch.tensor([2.0, 3.0]))
        and deferred.known({"a": [x]})["a"][0] is x.number
    )


def test_what_waits_for_a_promise_inside_an_edit_is_filled_in():
    tape = Tape()
    vector = Deferred.of(tape, (2,), torch.float32)
    kept = Kept((later(str, hb.Edit("resid_post.1", vector)),))
    (condition, _) = tape.conditions[0]
    tape.arrive({vector.slot: torch.tensor([3.0, 4.0]), condition.slot: torch.tensor(True)}, [vector])
    assert deferred.known(kept) is kept and kept.edits == (str(hb.Edit("resid_post.1", torch.tensor([3.0, 4.0]))),)


@dataclass(frozen=True)
class Kept:
    """A result that says what was done."""

    edits: tuple


def test_conditions_hold_before_numbers_are_given():
    from hookbook.errors import EditError

    tape = Tape()
    x = Deferred.of(tape, (2,), torch.float32)
    hb.Edit("resid_post.1", x)  # whose numbers must be finite
    (condition, error) = tape.conditions[0]
    with pytest.raises(EditError, match="NaN or infinity"):
        tape.arrive({x.slot: torch.tensor([1.0, float("nan")]), condition.slot: torch.tensor(False)}, [x])
    assert x.number is None and isinstance(error, EditError)
    tape.arrive({x.slot: torch.ones(2), condition.slot: torch.tensor(True)}, [x])
    assert torch.equal(x.number, torch.ones(2))


def test_only_nnsight_models_go_elsewhere():
    from hookbook.testing import toy

    with pytest.raises(Refused, match="only nnsight models"):
        hb.wrap(toy(), remote=True)
    with pytest.raises(Refused, match="on this machine"), hb.job(toy()):
        pass
    with pytest.raises(hb.errors.RemoteError, match="asks 0 remote models.*submit a recipe on one remote model"):
        hb.logit_lens.submit(toy(), "ab")


def test_a_vector_that_many_rows_share_travels_once():
    """At all tokens of many rows: what is sent grows with indices, not with copies; and it is what single rows give."""
    from hookbook.testing import toy
    from hookbook.travel.edits import group_edits

    adapter, draw = toy(), torch.Generator().manual_seed(0)
    one, each = torch.randn(16, generator=draw, dtype=torch.float64), torch.randn(4, 16, generator=draw, dtype=torch.float64)
    prompt = adapter.encode("abc")
    values = [one, one, each, each[:1], 0.5, 0.5, each]
    items = [
        {"row": i, "cols": [0, 1, 2, 3], "site": ("resid_post", 0), "width": 16, "op": "add", "value": value, "to": 0.0}
        for i, value in enumerate(values)
    ]
    ((group,),) = group_edits(items).values()
    assert group["value"].shape == (1 + 4 + 1 + 1, 16) and group["of"].shape == (28,)
    rows = [Row(0, (hb.Edit("resid_post.0", value, "add", slice(None)),)) for value in values]
    together = adapter.run(Request([prompt], rows, (), Readout(logits=True))).readout.logits
    alone = torch.cat([adapter.run(Request([prompt], [row], (), Readout(logits=True))).readout.logits for row in rows])
    assert (together - alone).abs().max() < 1e-12 and len({round(float(x), 6) for x in together[:, 0]}) == 4
