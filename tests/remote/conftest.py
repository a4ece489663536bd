"""The server that runs, and one model there and here."""

from __future__ import annotations

import json
from typing import Any

import pytest

import hookbook as hb
from tests.remote.calls import weightless
from tests.remote.server import STATE, Server


@pytest.fixture(scope="session")
def server() -> Server:
    """The one that runs."""
    state = json.loads(STATE.read_text())
    found = Server(state["sandbox"])
    found.pids, found.ports = state["pids"], state["ports"]
    return found


@pytest.fixture(scope="session")
def remote(server) -> Any:
    return hb.wrap(weightless(), remote=True)


@pytest.fixture(scope="session")
def local() -> hb.Adapter:
    return hb.load("smollm2-135m-instruct", "nnsight")
