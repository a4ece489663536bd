"""Nothing is lost when something breaks: a server that dies, refuses or is not there; and the page on servers."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import hookbook as hb
from hookbook.errors import RemoteError
from hookbook.remote import service as jobs
from tests.docs.fences import SERVER_PAGES, run_page
from tests.remote.calls import PROMPTS, REPO, fields, same, trusted, weightless
from tests.remote.server import Server


@pytest.fixture
def restored(server) -> Iterator[Server]:
    """A server whose front is replaced by the test; it is put back."""
    yield server
    server.stop("api", signal.SIGKILL)
    server.start_api()


@trusted
def test_a_wrong_key_is_refused_and_never_shown(restored, remote, monkeypatch, capfd):
    from nnsight import CONFIG

    restored.stop("api")
    restored.start_api(NDIF_POSTGRES_URL="postgresql://nobody@127.0.0.1:9/none")  # the server checks keys, in a database that is not there
    with pytest.raises(RemoteError, match="wants a key.*NDIF_API_KEY"):
        hb.logit_lens(remote, "ab")
    monkeypatch.setattr(CONFIG.API, "APIKEY", "not-a-key-at-all")
    with pytest.raises(RemoteError, match="refused the key") as raised:
        hb.logit_lens(remote, "ab")
    assert "not-a-key-at-all" not in str(raised.value) + raised.value.server + str(capfd.readouterr()) and "***" in str(raised.value)


@trusted
def test_a_version_the_server_does_not_take(restored, remote):
    restored.stop("api")
    restored.start_api(NDIF_MIN_NNSIGHT_VERSION="99.0")
    with pytest.raises(RemoteError, match="refused this version of nnsight or Python.*99.0"):
        hb.logit_lens(remote, "ab")


def test_what_the_server_raises_is_shown(remote, monkeypatch):
    import nnsight

    from hookbook import deferred

    monkeypatch.setattr(
        nnsight.ndif,
        "get_local_env",
        lambda: {"python_version": "3.11", "packages": {"nnsight": "0.7.0", "torch": "2.13.0", "transformers": "5.23.0"}},
    )

    with deferred.recording() as record:
        bad = deferred.tape(remote).note(
            "module", {"path": "model.layers.0.mlp.no_such", "x": torch.zeros(1, 576)}, torch.zeros(1, 576, device="meta")
        )
        with pytest.raises(RemoteError, match="no_such.*nnsight is 0.7.0 here and 0.8.1 there") as raised:
            deferred.settle([bad], record)
    assert "Traceback" in raised.value.server and "reach" in raised.value.server and raised.value.job


@trusted
def test_a_model_that_does_not_run_there(remote):
    hb.logit_lens(remote, "ab")  # which does
    lost = hb.wrap(weightless(), remote=True)
    lost.service.model.to_model_key = lambda: (
        "nnsight.modeling.transformers.TransformersModel:" + json.dumps({"repo_id": "nobody/nothing", "revision": "main"})
    )
    start = time.monotonic()
    with pytest.raises(RemoteError, match=f"nobody/nothing.*does not run on.*use one that does: .*{REPO}"):
        hb.logit_lens(lost, "ab", progress=False)
    assert time.monotonic() - start < 30


@trusted
def test_waiting_ends_after_the_time_that_was_given_and_the_job_goes_on(remote, local, monkeypatch):
    monkeypatch.setattr(remote.service, "timeout", 0.0)
    with pytest.raises(RemoteError, match="no result of job.*error.handle") as raised:
        hb.patchscope(remote, "Bob Dylan")
    monkeypatch.setattr(remote.service, "timeout", None)
    before = remote.service.jobs
    same(fields(raised.value.handle.result(progress=False)), fields(hb.patchscope(local, "Bob Dylan")))
    assert remote.service.jobs == before


@trusted
def test_a_server_that_dies_while_it_is_asked_loses_nothing(restored, remote, monkeypatch):
    monkeypatch.setattr(jobs, "PATIENCE", 8.0)
    want = hb.logit_lens(remote, PROMPTS)
    handle = hb.logit_lens.submit(remote, PROMPTS)
    while handle.status() != "COMPLETED":  # computed, and not fetched
        time.sleep(0.1)
    restored.stop("api", signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(RemoteError, match="silent.*goes on") as raised:
        handle.result(progress=False)
    assert time.monotonic() - start < 30 and raised.value.job == handle.job
    monkeypatch.setattr(jobs, "PATIENCE", 60.0)  # longer than a busy machine needs to start it
    back = threading.Timer(2.0, restored.start_api)
    back.start()  # it comes back while we wait
    same(fields(handle.result(progress=False)), fields(want))
    back.join()
    lost = hb.patchscope.submit(remote, PROMPTS[0], target_layers="all")
    restored.stop("api", signal.SIGKILL)  # which holds the queue
    threading.Timer(2.0, restored.start_api).start()
    start = time.monotonic()
    with pytest.raises(RemoteError, match="does not move job .* on.*send it again"):
        lost.result(progress=False)
    assert time.monotonic() - start < 200


@trusted
def test_a_server_that_is_not_there(restored, remote):
    restored.stop("api", signal.SIGKILL)
    start, before = time.monotonic(), remote.service.jobs
    with pytest.raises(RemoteError, match="did not take the job"):
        hb.logit_lens(remote, PROMPTS)
    assert time.monotonic() - start < 30 and remote.service.jobs == before


@trusted
def test_a_model_that_dies_in_a_job_is_an_error(server, remote):
    handle = hb.patchscope.submit(remote, "Bob Dylan", target_layers="all", generate=30)
    deadline = time.monotonic() + 30
    while handle.status() != "RUNNING" and time.monotonic() < deadline:
        time.sleep(0.05)
    actors = [p for p in Path("/proc").iterdir() if p.name.isdigit() and b"ModelActor" in _line(p)]
    assert actors
    for actor in actors:
        os.kill(int(actor.name), signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(RemoteError):
        remote.service.timeout = 25.0
        try:
            handle.result(progress=False)
        finally:
            remote.service.timeout = None
    assert time.monotonic() - start < 30


def _line(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.skipif(os.environ.get("HOOKBOOK_TEST_SERVER") == "sandbox", reason="the page is written for a trusted key")
@pytest.mark.parametrize("page", SERVER_PAGES)
def test_the_python_of_a_page_runs(page, remote, server, monkeypatch, tmp_path):
    """As it is written, with this server for the public one and the model that it has for the large one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("NDIF_API_KEY", os.environ.get("NDIF_API_KEY", ""))
    monkeypatch.setattr("nnsight.TransformersModel", lambda repo, **more: weightless())
    names = run_page(page)
    assert names["hb"] is hb and len(names) > 3, "a page's code leaves names, if it ran"
