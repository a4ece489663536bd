"""What a run depends on beside what is asked, looked at before each run: weights, hooks, training mode, dtype and device.

A model belongs to its user, who may have changed it since the last call. What is looked at is where torch keeps it, so that looking costs
about a millisecond: the modules and their hooks, the tensors with their pointers, versions and a few of their numbers.
"""

from __future__ import annotations

import inspect
import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hookbook.engine.seam import Backend
from hookbook.engine.weights import digests
from hookbook.errors import ModelError

LIBRARIES = {"torch", "transformers", "accelerate", "transformer_lens", "sae_lens", "nnsight", "peft", "bitsandbytes", "functools"}
"""Whose own hooks and forward methods are part of a model."""

SAMPLE = 8
"""How many numbers of each tensor are looked at before each run, evenly spaced."""

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

AGAIN = 0.5
"""Within one call of a recipe, after how many seconds a model is looked at again before the next run."""

_call: ContextVar[dict[State, float] | None] = ContextVar("call", default=None)
"""When each model was looked at last in the recipe's call that is open in this thread."""

_states: weakref.WeakKeyDictionary[Any, State] = weakref.WeakKeyDictionary()
_making = threading.Lock()


class State:
    """What is known of one underlying model, whatever wraps it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.depth = 0
        """How many uses of it are open, one in the other; counted under the lock."""
        self.ids: list[int] = []
        self.refs: list[Any] = []
        """Its modules and tensors, which are its user's to let go."""
        self.random: list[int] = []
        """Which modules may draw random numbers."""
        self.seen: tuple[Any, ...] = ()
        self.sample: list[Tensor] = []
        self.weights: tuple[tuple[str, str], ...] = ()
        self.hooks: tuple[str, ...] = ()
        """Hooks of the user's, by name; while there are any, rows run one at a time."""
        self.found: Any = None
        self.answers: dict[str, dict[str, Any]] = {}
        """What the model said to the questions of `hookbook.engine.selfcheck`, as it is now, on each backend."""
        self.said: set[str] = set()


def state(backend: Backend) -> State:
    """The state of the model behind a backend; all its wrappers share one."""
    key = backend.model if backend.remote or backend.module is None else backend.module
    with _making:
        return _states.setdefault(key, State())


def answers(backend: Backend) -> dict[str, Any]:
    """What the model behind a backend said to questions, on this backend: another may run it in another way."""
    return state(backend).answers.setdefault(backend.card.backend, {})


@contextmanager
def using(backend: Backend) -> Iterator[State]:
    """Look at a model, and let no other thread run it meanwhile.

    Raises:
        ModelError: It would give random numbers, or is in the middle of a run of the user's.
    """
    with locked(backend) as mine:
        mine.depth += 1
        try:
            seen, now = _call.get(), time.monotonic()
            if mine.depth == 1 and (seen is None or now - seen.get(mine, -AGAIN) >= AGAIN):  # not in the middle of a run
                look(backend, mine)
                if seen is not None:
                    seen[mine] = now
            yield mine
        finally:
            mine.depth -= 1


@contextmanager
def one_call() -> Iterator[None]:
    """Inside, the runs of one call of a recipe; those of recipes that it calls count to it."""
    outer = _call.get()
    token = _call.set({} if outer is None else outer)
    try:
        yield
    finally:
        _call.reset(token)


@contextmanager
def locked(backend: Backend) -> Iterator[State]:
    """Let no other thread run a model meanwhile."""
    mine = state(backend)
    with mine.lock:
        yield mine


def look(backend: Backend, mine: State, whole: bool = False) -> None:
    """Bring what is known of a model up to date; `whole`: look at every number of its weights.

    Raises:
        ModelError: See `using`.
    """
    backend.ready()
    if backend.remote or backend.module is None:
        return
    backend.check_free()
    parts = Parts(backend.roots)
    if parts.ids != mine.ids or any(ref() is None for ref in mine.refs):
        mine.ids, mine.refs, mine.seen = parts.ids, [weakref.ref(x) for x in (*parts.modules, *parts.tensors)], ()
        mine.random = [number for number, module in enumerate(parts.modules) if _may_be_random(module)]
    random = [parts.modules[number] for number in mine.random]
    parts.check_random(random)
    hooks = parts.hooks()
    if (found := [id(hook) for _, hook in hooks] + [str(hook) for hook in backend.edits]) != mine.found:
        mine.found, mine.answers = found, {}
        mine.hooks = tuple(f"{_name(hook)} at {parts.path(module)}" for module, hook in hooks) + tuple(backend.edits)
    for hook in mine.hooks:
        if hook not in mine.said:
            mine.said.add(hook)
            warnings.warn(f"{hook} is a hook on {backend.card.model_id}: while it is there, rows run one at a time", stacklevel=4)
    seen, sample = parts.seen(random), parts.sample()
    same = seen == mine.seen and all(map(torch.equal, sample, mine.sample))
    if not same or whole or not mine.weights:
        mine.weights = digests(backend.weights())
        mine.seen, mine.sample = seen, sample
    if not same:
        mine.answers = {}
    dtype, device = backend.runs_in()
    if (backend.card.weights, backend.card.dtype, backend.card.device) != (mine.weights, dtype, device):
        backend.card = replace(backend.card, weights=mine.weights, dtype=dtype, device=device)


class Parts:
    """The modules and tensors of a model, as they are now."""

    def __init__(self, roots: tuple[nn.Module, ...]) -> None:
        self.roots = roots
        self.modules: list[Any] = []
        known: set[int] = set()
        waiting: list[Any] = list(reversed(roots))
        while waiting:
            module = waiting.pop()
            if module is not None and id(module) not in known:
                known.add(id(module))
                self.modules.append(module)
                waiting.extend(module._modules.values())
        found = (x for module in self.modules for kept in (module._parameters, module._buffers) if kept for x in kept.values())
        self.tensors = list({id(x): x for x in found if x is not None and x.device.type != "meta"}.values())
        self.ids = [*map(id, self.modules), *map(id, self.tensors)]

    def hooks(self) -> list[tuple[nn.Module, Any]]:
        """Hooks and forward methods that are not a library's, and the modules they are on."""
        found = []
        for module in self.modules:
            own = module.__dict__
            for name in HOOKS:
                if own[name]:
                    found += [(module, hook) for hook in own[name].values() if _foreign(module, hook)]
            if "forward" in own and _foreign(None, own["forward"]):
                found.append((module, own["forward"]))
        return found

    def check_random(self, random: list[Any]) -> None:
        """Raise for a module that would draw random numbers."""
        for module in random:
            if module.training and (why := _random(module)):
                raise ModelError(
                    f"{self.path(module)} is in training mode",
                    f"its {why} would make every run another",
                    "call model.eval() first (of a bridge: bridge.original_model.eval(), too)",
                )

    def seen(self, random: list[Any]) -> tuple[Any, ...]:
        """Where each tensor is, how often it was written to, and which adapters of PEFT are switched on."""
        switches = [(x._disable_adapters, (*x.active_adapters,), (*x.merged_adapters,)) for x in random if hasattr(x, "merged_adapters")]
        return tuple((x.data_ptr(), 0 if x.is_inference() else x._version, x.dtype) for x in self.tensors), tuple(switches)

    def sample(self) -> list[Tensor]:
        """Some numbers of each tensor, one after the other, for each dtype."""
        groups: dict[Any, list[Tensor]] = {}
        with torch.no_grad():
            for x in self.tensors:
                if n := x.numel():
                    groups.setdefault((x.dtype, x.device), []).append(x.as_strided((min(n, SAMPLE),), (max(1, _span(x) // SAMPLE),)))
            return [torch.cat(views) for views in groups.values()]

    def path(self, module: nn.Module) -> str:
        """What a module is called in the model."""
        named = (name for root in self.roots for name, one in root.named_modules() if one is module)
        return next(named, "").replace("_original_component.", "").removesuffix("._original_component") or type(module).__name__


def _span(x: Tensor) -> int:
    """How far its numbers reach in memory."""
    return x.numel() if x.is_contiguous() else 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))


def _foreign(module: Any, hook: Any) -> bool:
    if type(module).__name__ == "HookPoint":  # whose hooks TransformerLens wraps
        return True
    own = inspect.unwrap(getattr(hook, "func", hook))
    home = type(own.__self__).__module__ if inspect.ismethod(own) else getattr(own, "__module__", None) or type(own).__module__
    return home.partition(".")[0] not in LIBRARIES


def _name(hook: Any) -> str:
    own = getattr(hook, "func", hook)
    name = own.__name__ if getattr(own, "__qualname__", "").endswith("full_hook") else getattr(own, "__qualname__", repr(own))
    return " ".join(name.split())[:80]


def _may_be_random(module: nn.Module) -> bool:
    names = [name.lower() for name in (*vars(module), type(module).__name__)]
    return hasattr(module, "merged_adapters") or any(word in name for name in names for word in ("drop", "jitter", "noise", "batchnorm"))


def _random(module: nn.Module) -> str:
    """What in a module in training mode is random; empty if nothing is."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return "batch normalisation"
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return f"dropout of {module.p:g}" if module.p else ""
    for name, value in vars(module).items():
        if isinstance(value, float) and value > 0 and any(word in name.lower() for word in ("drop", "jitter", "noise")):
            return f"{name} of {value:g}"
    return ""
