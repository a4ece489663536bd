"""Errors say what happened, why, and what to do instead.

    HookbookError
    ├── SiteError     not a site, or not in this model
    ├── TokenError    a prompt, position or token that cannot be used
    ├── DataError     pairs or contrasts that cannot be used
    ├── EditError     an edit that cannot be applied, or that never fired
    ├── ModelError    a model that cannot be found, loaded or wrapped
    ├── ResultError   a file that is not a saved result, or not this kind of result, or cannot be written; a page that would be too large
    ├── RemoteError   a job that a server refused, failed or lost touch with
    └── Refused       an adapter cannot do what was asked

Bad input raises before the first forward pass.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any


class HookbookError(Exception):
    """Base of every error hookbook raises on purpose."""

    def __init__(self, what: str, why: str = "", instead: str = "") -> None:
        message = what + (f": {why}" if why else "") + "."
        if instead:
            message += f" Instead: {instead}."
        super().__init__(message)
        self.what, self.why, self.instead = what, why, instead


class SiteError(HookbookError, ValueError):
    """Not a site, or not in this model."""


class TokenError(HookbookError, ValueError):
    """A prompt, position or token that cannot be used."""


class DataError(HookbookError, ValueError):
    """Pairs or contrasts that cannot be used."""


class EditError(HookbookError, ValueError):
    """An edit that cannot be applied, or that never fired."""


class ModelError(HookbookError, ValueError):
    """A model that cannot be found, loaded or wrapped."""


class ResultError(HookbookError, ValueError):
    """A file that is not a saved result, or not this kind of result; a page that would be too large."""


class RemoteError(HookbookError, RuntimeError):
    """A job that a server refused, failed, or lost touch with."""

    def __init__(self, what: str, why: str = "", instead: str = "", *, job: str = "", server: str = "") -> None:
        super().__init__(what, why, instead)
        self.job, self.server = job, server
        self.handle: Any = None
        """A `hookbook.Handle` of the job, if it goes on."""


def check_counts(least: int = 1, /, **counts: Any) -> None:
    """Raise `TokenError` unless arguments are whole numbers of at least `least`."""
    for name, n in counts.items():
        whole = isinstance(n, Integral) and not isinstance(n, bool)
        if not whole or n < least:
            raise TokenError(f"{name}={n!r}", "" if whole else "it is not a whole number", f"use {name} of {least} or more")


def check_prompt(prompt: int, n: int) -> int:
    """The place of a prompt among the `n` of a result, from 0; `TokenError` if it has no such prompt."""
    if not -n <= prompt < n:
        raise TokenError(f"no prompt {prompt}", f"this result has prompts 0 to {n - 1}", "use one of them")
    return prompt % n


def check_feature(feature: int, n: int) -> int:
    """A feature of an SAE of `n`, or `DataError`."""
    if not 0 <= feature < n:
        raise DataError(f"no feature {feature}", f"this SAE has features 0 to {n - 1}", "use one of them")
    return feature


class Refused(HookbookError, NotImplementedError):
    """This adapter cannot do what was asked."""
