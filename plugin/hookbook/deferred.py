"""Numbers that are not here yet: what a recipe computes with while the model is elsewhere.

A recipe asks a remote model for states, does arithmetic on them, and asks again. So that all of it is one job, its
tensors are promises: a `Deferred` knows its shape, and every torch function applied to it is noted on a `Tape`. When the
recipe is done, the tape is sent, and what the result holds is filled in. Planning works alike, with a tape that is
never sent. What needs a number (a text to show, an `if`) waits in a `Later`.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import resolve_name

from hookbook.errors import HookbookError, Refused, RemoteError
from hookbook.travel.names import find

_FACTS = (
    "shape",
    "dtype",
    "layout",
    "ndim",
    "requires_grad",
    "is_leaf",
    "grad",
    "grad_fn",
    "is_sparse",
    "is_quantized",
    "names",
    "nbytes",
    "itemsize",
    "is_cuda",
    "is_meta",
)


class Deferred(Tensor):
    """A tensor whose numbers come later; its shape and dtype are known."""

    tape: Tape
    slot: int
    number: Tensor | None

    @staticmethod
    def of(tape: Tape, shape: Any, dtype: torch.dtype) -> Deferred:
        """A new promise on a tape."""
        self = torch.empty(shape, dtype=dtype, device="meta").as_subclass(Deferred)
        self.tape, self.slot, self.number = tape, tape.slots, None
        tape.slots += 1
        tape.living.append(weakref.ref(self))
        return self

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Deferred({list(self.shape)}, {self.dtype})"

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.unbind(0))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tapes = {id(x.tape): x.tape for x in _deferred((args, kwargs)) if x.number is None}
        if not tapes:  # they have arrived
            return func(*known(args), **known(kwargs))
        name = getattr(func, "__name__", "")
        if name == "__get__" and getattr(func, "__self__", None) is Tensor.device:
            return torch.device("cpu")
        if name in ("cpu", "to") and (name == "cpu" or not any(isinstance(x, torch.dtype) for x in [*args[1:], *kwargs.values()])):
            return args[0]
        if name == "to":
            dtype = next(x for x in [*args[1:], *kwargs.values()] if isinstance(x, torch.dtype))
            func, args, kwargs = Tensor.type, (args[0], dtype), {}
        if name == "__get__" and getattr(getattr(func, "__self__", None), "__name__", "") in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        full = resolve_name(func) or ""
        if name == "__setitem__" or (name.endswith("_") and not name.startswith("__")) or "out" in kwargs or find(full) != func:
            raise Refused(
                f"{full or func} with numbers that are not here yet",
                "only functions that return new tensors can be sent",
                "use torch.stack, cat or where",
            )
        if len(tapes) > 1:  # of two models: the first one's are fetched now
            *_, last = tapes.values()
            args, kwargs = here(args, last), here(kwargs, last)
        *_, tape = tapes.values()
        args, kwargs = known(args), known(kwargs)
        try:
            with torch._C.DisableTorchFunctionSubclass():
                shape = func(*_meta(args), **_meta(kwargs))
        except (RuntimeError, NotImplementedError, TypeError) as error:
            if "meta" not in str(error).lower() and "data-dependent" not in str(error).lower():
                raise
            shape = NotImplemented
        if isinstance(shape, (Tensor, tuple, list)) and not isinstance(shape, torch.Size) and name not in ("size", "stride"):
            return tape.note("op", {"name": sys.intern(full), "args": args, "kwargs": kwargs}, shape)
        if isinstance(shape, (torch.Size, torch.dtype, torch.layout, int, bool, str, tuple)) and name not in (
            "item",
            "__bool__",
            "__float__",
            "__int__",
            "__index__",
        ):
            return shape
        raise Refused(
            f"the numbers of a tensor, by {name or func}",
            "they come when the job is done",
            "decide on them in a function given to hookbook.deferred.later",
        )


class Elsewhere(Protocol):
    """A model that is elsewhere, as a tape sees it."""

    verified: set[str]

    def size(self, tape: Tape, wanted: Sequence[Deferred], /) -> int:
        """How many bytes a tape is when it is sent."""
        ...

    def fetch(self, tape: Tape, wanted: Sequence[Deferred], /) -> dict[int, Tensor]:
        """Send a tape and wait for what is wanted of it."""
        ...

    def handle(self, tape: Tape, value: Any, job: str, /) -> object:
        """A job that goes on."""
        ...


class Tape:
    """What was asked of one model, in order.

    Args:
        model: Which; None for a plan.
    """

    def __init__(self, model: Elsewhere | None = None) -> None:
        self.model = model
        self.slots = 0
        self.steps: list[tuple[str, dict[str, Any], list[int], list[list[int]]]] = []
        """Kind, arguments, and slot and shape of every output."""
        self.conditions: list[tuple[Deferred, HookbookError]] = []
        self.living: list[weakref.ref[Deferred]] = []
        self.verified: set[str] = set()
        """What is known of the model once the conditions hold."""
        self.progress: bool | None = None
        """Whether the job's states are shown; None: yes."""
        self.grad = False
        """Whether a step needs gradients."""

    def note(self, kind: str, data: dict[str, Any], like: Any) -> Any:
        """Add a step; `like` is what it returns, in shape: a tensor, or a tuple of tensors."""
        if any(x.tape is not self and x.number is None for x in _deferred(data)):
            data = here(data, self)
        many = like if isinstance(like, (tuple, list)) else [like]
        out = [None if x is None else Deferred.of(self, x.shape, x.dtype) for x in many]
        self.steps.append((kind, data, [-1 if x is None else x.slot for x in out], [[] if x is None else list(x.shape) for x in out]))
        if not isinstance(like, (tuple, list)):
            return out[0]
        return type(like)(out) if type(like) is not tuple and isinstance(like, tuple) and not hasattr(like, "_fields") else tuple(out)

    def errand(self, wanted: Sequence[Deferred]) -> dict[str, Any]:
        """What travels: plain data, with `{"slot": n}` in place of promises."""
        slots = [x.slot for x in (*wanted, *(condition for condition, _ in self.conditions))]
        return {"steps": _packed(self.steps, {}), "wanted": sorted(set(slots)), "grad": self.grad}

    def ship(self, wanted: Sequence[Deferred]) -> None:
        """Run what was noted, and give what is wanted its numbers.

        Raises:
            RemoteError: The job failed.
            HookbookError: A condition does not hold.
        """
        assert self.model is not None
        self.arrive(self.model.fetch(self, wanted), wanted)

    def arrive(self, numbers: dict[int, Tensor], wanted: Sequence[Deferred]) -> None:
        """Give what is wanted its numbers, if the conditions hold."""
        for condition, error in self.conditions:
            if not bool(numbers[condition.slot].all()):
                raise error
        self.conditions = []  # they hold
        for x in wanted:
            x.number = numbers[x.slot]
        if self.model is not None:
            self.model.verified |= self.verified


@dataclass(frozen=True)
class Later:
    """What is computed when numbers are here: `fn(*args)`, with a function of a module and arguments that may hold promises."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]


def later(fn: Callable[..., Any], *args: Any) -> Any:
    """`fn(*args)`, at once if all numbers are here."""
    return Later(fn, args) if any(True for _ in _deferred(args, waiting=True)) else fn(*known(args))


def hold(condition: Any, error: HookbookError) -> None:
    """Raise `error` unless `condition` holds, now or when numbers are here."""
    if isinstance(condition, Deferred) and condition.number is None:
        condition.tape.conditions.append((condition, error))
    elif not bool(condition):
        raise error


class Recording:
    """Tapes by model, and the results of recipes that wait for them."""

    def __init__(self, dry: bool = False) -> None:
        self.dry = dry
        """Nothing is sent."""
        self.tapes: dict[int, Tape] = {}
        self.results: list[Any] = []
        self.sent: list[tuple[int, int]] = []
        """Of each job that would be sent before the last one the bytes up and down."""


_recording: ContextVar[Recording | None] = ContextVar("recording", default=None)


def tape(model: Elsewhere) -> Tape:
    """The open tape of a model."""
    found = _recording.get()
    assert found is not None, "nothing is recorded"
    return found.tapes.setdefault(id(model), Tape(model))


def current() -> Recording | None:
    """Who notes what remote models are asked."""
    return _recording.get()


@contextmanager
def recording(dry: bool = False) -> Iterator[Recording]:
    """Inside, what remote models are asked is noted; if `dry`, it is never sent."""
    record = Recording(dry)
    token = _recording.set(record)
    try:
        yield record
    finally:
        _recording.reset(token)


def settle(value: Any, record: Recording) -> Any:
    """`value` with its numbers: every tape is sent, its promises are filled in and what waited is computed. Data classes are filled in
    place."""
    for one in list(record.tapes.values()):
        wanted = {x.slot: x for x in _deferred(value, waiting=True) if x.tape is one and x.number is None}
        if wanted or one.conditions:
            try:
                one.ship(list(wanted.values()))
            except RemoteError as error:
                if error.job and one.model is not None:
                    error.handle = one.model.handle(one, value, error.job)
                raise
    return known(value)


def known(value: Any) -> Any:
    """`value` with the numbers that have arrived."""
    if isinstance(value, Deferred):
        return value if value.number is None else value.number
    if isinstance(value, Later):
        return later(value.fn, *value.args)
    if isinstance(value, (str, int, float, Tensor, type(None))):
        return value
    if isinstance(value, dict):
        return {key: known(item) for key, item in value.items()}
    if isinstance(value, list) or (isinstance(value, tuple) and type(value) is tuple):
        return type(value)(known(item) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            old = getattr(value, field.name)
            promised = any(True for _ in _deferred(old, waiting=True, arrived=True))  # asked first: data classes in it are filled in place
            new = known(old)
            if new is not old and promised:
                object.__setattr__(value, field.name, new)
    return value


def here(value: Any, tape: Tape | None = None) -> Any:
    """`value` with its numbers, which are fetched if they are not here; but for those of one tape."""
    record = _recording.get()
    if record is not None and record.dry:
        return known(value)
    for one in {id(x.tape): x.tape for x in _deferred(value) if x.number is None and x.tape is not tape}.values():
        one.ship([x for x in (ref() for ref in one.living) if x is not None and x.number is None])
        one.steps = []  # nothing waits for them any more
    return known(value)


def fetch(value: Any) -> Any:
    """`value` with its numbers, by which a recipe decides what it asks next: of a model elsewhere they are a job of their own. In a plan
    they never come."""
    record, promises = _recording.get(), list(waiting(value))
    if record is None or not record.dry:
        here(promises)
        return known(value)
    for one in {id(x.tape): x.tape for x in promises}.values():
        if one.model is not None:
            mine = [x for x in promises if x.tape is one]
            record.sent.append((one.model.size(one, mine), sum(x.numel() * x.element_size() for x in mine)))
            one.steps = []
    return value


def waiting(value: Any) -> Iterator[Deferred]:
    """The promises that nested data, with its data classes, waits for."""
    return iter({(id(x.tape), x.slot): x for x in _deferred(value, waiting=True) if x.number is None}.values())


def _deferred(value: Any, waiting: bool = False, arrived: bool = False) -> Iterator[Any]:
    """The promises in nested data; those in `Later` and data classes if `waiting`; and if `arrived` every `Later`, too."""
    if isinstance(value, Deferred):
        if arrived or not waiting or value.number is None:
            yield value
    elif isinstance(value, (str, int, float, Tensor, type(None))):
        return
    elif isinstance(value, dict):
        for item in value.values():
            yield from _deferred(item, waiting, arrived)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _deferred(item, waiting, arrived)
    elif waiting and isinstance(value, Later):
        if arrived:  # what it waited for may have been filled in already, through another
            yield value
        yield from _deferred(value.args, waiting, arrived)
    elif waiting and is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _deferred(getattr(value, field.name), waiting, arrived)


def _meta(value: Any) -> Any:
    """Nested data with shapes in place of numbers."""
    if isinstance(value, Tensor):
        return value if value.is_meta else value.to("meta")
    if isinstance(value, dict):
        return {key: _meta(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return type(value)(_meta(item) for item in value)
    return value


def _packed(value: Any, seen: dict[int, Tensor]) -> Any:
    """Nested data as it travels; a tensor that is in it often, such as an SAE's weights, is one object and travels once."""
    if isinstance(value, Deferred):
        return {"slot": value.slot} if value.number is None else value.number
    if isinstance(value, Tensor):
        if id(value) not in seen:
            here = value.detach().cpu()
            seen[id(value)] = (
                here.clone() if here.untyped_storage().nbytes() > here.nbytes else here
            )  # a view would take all of its memory along
        return seen[id(value)]
    if isinstance(value, dict):
        return {key: _packed(item, seen) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return type(value)(_packed(item, seen) for item in value)
    return value
