"""Jobs on a server that runs nnsight's remote protocol (NDIF): sent, waited for, and picked up again.

A job is posted once and asked for over plain HTTP, so that a connection that drops costs nothing: asking resumes, in this
process or in another one.
"""

from __future__ import annotations

import io
import pickle
import re
import sys
import time
from typing import Any

import httpx
import nnsight
import torch
from nnsight.intervention.backends.remote import RemoteBackend
from nnsight.intervention.interleaver import EarlyStopException
from nnsight.schema.request import RequestModel
from nnsight.schema.response import ResponseModel, Status
from torch import Tensor
from tqdm.auto import tqdm
from zstandard import ZstdDecompressor

from hookbook.errors import RemoteError
from hookbook.travel.errand import run_errand
from hookbook.travel.passes import Passes

PATIENCE = 20.0
"""Seconds without any answer of the server after which waiting ends; the job itself goes on."""

STATES = ("RECEIVED", "QUEUED", "PROVISIONING", "DEPLOYING", "DISPATCHED", "RUNNING", "COMPLETED")


def unpacked(content: bytes, compressed: bool, host: str) -> Any:
    """What a server sent, if it is numbers: nnsight's own loading would run whatever stands in a pickle.

    Raises:
        RemoteError: It is something else.
    """
    try:
        return torch.load(
            io.BytesIO(ZstdDecompressor().decompress(content) if compressed else content), map_location="cpu", weights_only=True
        )
    except pickle.UnpicklingError as error:
        raise RemoteError(
            f"{host} sent something else than numbers", "it would have to be run to be read", "ask whoever runs the server"
        ) from error


class Service:
    """One model on one server.

    Args:
        model: The nnsight model, whose weights are not needed.
        host: A URL; None: the one nnsight is configured for.
    """

    timeout: float | None = None
    """Seconds after which waiting for a job ends; None: as long as the server answers."""

    def __init__(self, model: Any, host: str | None = None) -> None:
        self.model = model
        self.host = (host or nnsight.CONFIG.API.HOST).rstrip("/")
        self.jobs = 0
        """How many jobs were sent."""
        self.bytes_up = self.bytes_down = 0
        """Of the last job."""

    def payload(self, passes: Passes, errand: dict[str, Any]) -> bytes:
        """What is sent: the steps, and the functions that run them, as source."""
        nnsight.register("hookbook")  # else an installed package is sent by name, and the server has none
        model, paths, inner = self.model, dict(passes.paths), passes.inner
        positions, scale, cap = passes.positions, passes.scale, passes.cap
        backend = _Keep(model.to_model_key(), host=self.host)
        with model.session(backend=backend):
            out = nnsight.save({})
            run_errand(Passes(model, paths, inner, positions, scale, cap, None, EarlyStopException), errand, out)  # noqa: F821
        return backend.blob

    def send(self, blob: bytes) -> str:
        """Post a job; its number.

        Raises:
            RemoteError: The server did not take it.
        """
        backend = self._backend()
        request = RequestModel(model_key=self.model.to_model_key(), compress=backend.compress, env=backend.env)
        headers = {
            **self._headers(backend),
            "ndif-timestamp": repr(time.time()),
            "nnsight-version": nnsight.__version__,
            "python-version": sys.version,
        }
        try:
            with httpx.Client(timeout=httpx.Timeout(10.0, read=PATIENCE, write=60.0)) as client:
                answer = client.post(
                    f"{self.host}/request",
                    data={"data": request.metadata()},
                    files={"blob": ("request", blob, "application/octet-stream")},
                    headers=headers,
                )
        except httpx.HTTPError as error:
            raise RemoteError(
                f"{self.host} did not take the job", f"{type(error).__name__}: {error}", "see whether the server is up: nnsight.status()"
            ) from error
        if answer.status_code >= 400:
            raise self._refused(answer, backend)
        self.jobs += 1
        self.bytes_up = len(blob)
        return ResponseModel.model_validate_json(answer.text).id

    def status(self, job: str) -> ResponseModel | None:
        """The last status of a job; None before there is one."""
        backend = self._backend()
        with httpx.Client(timeout=httpx.Timeout(5.0, read=PATIENCE)) as client:
            answer = client.get(f"{self.host}/response/{job}", headers=self._headers(backend))
        if answer.status_code == 404:
            return None
        if answer.status_code in (401, 403):
            raise self._refused(answer, backend)
        answer.raise_for_status()
        return ResponseModel.model_validate_json(answer.text)

    def wait(self, job: str, progress: bool | None = None) -> dict[int, Tensor]:
        """Wait for a job and fetch what it gives.

        Raises:
            RemoteError: It failed; or the server is silent, or the time is over, and the job goes on.
        """
        start = heard = time.monotonic()
        pause, state, lost = 0.05, "", None
        with tqdm(total=len(STATES), desc="job", leave=False, disable=progress is False, bar_format="{desc} {bar} {elapsed}") as bar:
            while True:
                try:
                    found = self.status(job)
                    result = None if found is None or found.status != Status.COMPLETED else self._result(found)
                    heard = time.monotonic()
                except httpx.HTTPError as error:
                    if time.monotonic() - heard > PATIENCE:
                        what = f"{self.host} has been silent for {PATIENCE:.0f} s"
                        raise RemoteError(what, f"{type(error).__name__}: {error}", _LATER, job=job) from error
                    time.sleep(1.0)
                    lost = time.monotonic() + PATIENCE  # whoever comes back may have forgotten the job
                    continue
                if found is not None and found.status == Status.ERROR:
                    raise self._failed(job, found)
                if result is not None:
                    return result
                if found is not None and found.status.value != state:
                    state, lost = found.status.value, None
                    bar.n = STATES.index(state) if state in STATES else bar.n
                    bar.set_description(f"job {job[:8]} {state.lower()}")
                if lost is not None and time.monotonic() > lost or found is None and time.monotonic() - start > PATIENCE:
                    raise RemoteError(
                        f"{self.host} does not move job {job} on",
                        "it forgot the job when it was restarted, as far as can be seen",
                        "send it again",
                        job=job,
                    )
                if self.timeout is not None and time.monotonic() - start > self.timeout:
                    raise RemoteError(
                        f"no result of job {job} after {self.timeout:g} s", f"it is {state.lower() or 'not queued'}", _LATER, job=job
                    )
                time.sleep(pause)
                pause = min(2.0, pause * 1.2)

    def _result(self, found: ResponseModel) -> dict[int, Tensor]:
        """What a finished job gave, downloaded."""
        backend = self._backend()
        if isinstance(found.data, (bytes, bytearray)):
            content = bytes(found.data)
        else:
            with httpx.Client(timeout=httpx.Timeout(10.0, read=PATIENCE)) as client:
                answer = client.get(str(found.data))
            answer.raise_for_status()
            content = answer.content
        self.bytes_down = len(content)
        saved = unpacked(content, backend.compress, self.host)
        (out,) = [value for value in (saved or {}).values() if isinstance(value, dict)]
        return out

    def _backend(self) -> RemoteBackend:
        backend = RemoteBackend(self.model.to_model_key(), host=self.host, env=self.model._remoteable_get_env())
        backend.display.enabled = False
        return backend

    def _headers(self, backend: RemoteBackend) -> dict[str, str]:
        return {"ndif-api-key": backend.api_key} if backend.api_key else {}

    def _clean(self, text: str) -> str:
        """Without the key, whoever put it there."""
        key = self._backend().api_key
        return text.replace(key, "***") if key else text

    def _refused(self, answer: httpx.Response, backend: RemoteBackend) -> RemoteError:
        try:
            body = answer.json()
            detail = str(body.get("detail", body)) if isinstance(body, dict) else str(body)
        except ValueError:
            detail = answer.text[:500]
        detail = self._clean(detail).rstrip(".")
        if answer.status_code in (401, 403) or "api key" in detail.lower():
            return RemoteError(
                f"{self.host} refused the key" if backend.api_key else f"{self.host} wants a key",
                detail,
                "set NDIF_API_KEY, or call nnsight.login()",
            )
        if answer.status_code == 400 and "version" in detail.lower():
            return RemoteError(f"{self.host} refused this version of nnsight or Python", detail, "see nnsight.compare()")
        return RemoteError(f"{self.host} refused the job ({answer.status_code})", detail, "see nnsight.status()")

    def _failed(self, job: str, found: ResponseModel) -> RemoteError:
        text = self._clean(found.description or "no description")
        lines = [line for line in text.strip().splitlines() if line.strip()]
        last = lines[-1].strip().rstrip(".") if lines else "no description"
        gone = (
            r"not (yet )?(deployed|running|available)|no such model|could not be (deployed|found)|"
            r"failed to (deploy|load|evaluate)|huggingface_hub"
        )
        if "run_errand" not in text and re.search(gone, text, re.I):
            return RemoteError(
                f"{self.model.to_model_key()} does not run on {self.host}",
                last,
                f"use one that does: {self._running()}",
                job=job,
                server=text,
            )
        if refused := re.findall(r"refused: (.+?) \| (.+?) \| (.+)", text):  # the last one is the error, others are source
            return RemoteError(*(words.strip().rstrip(".") for words in refused[-1]), job=job, server=text)
        drift = self._drift()
        why = f"{last}; {drift}" if drift else last
        return RemoteError(f"job {job} failed on {self.host}", why, "see error.server for the server's traceback", job=job, server=text)

    def _drift(self) -> str:
        """How the server's versions of what matters differ from ours, as far as it says; nnsight's comparison."""
        try:
            with httpx.Client(timeout=httpx.Timeout(3.0, read=5.0)) as client:
                found = nnsight.ndif.EnvComparison(nnsight.ndif.get_local_env(), client.get(f"{self.host}/env").json())
        except (httpx.HTTPError, ValueError, AttributeError):
            return ""
        return ", ".join(
            f"{name} is {versions['local']} here and {versions['remote']} there"
            for name, versions in sorted(found.critical_mismatches.items())
        )

    def _running(self) -> str:
        """The models a server runs, as far as it says."""
        try:
            with httpx.Client(timeout=httpx.Timeout(3.0, read=5.0)) as client:
                found = client.get(f"{self.host}/status").json().get("deployments", {})
            names = sorted({value.get("repo_id") or key for key, value in found.items() if value.get("application_state") == "RUNNING"})
            return ", ".join(names) or "it says that none does"
        except (httpx.HTTPError, ValueError, AttributeError):
            return "nnsight.status() lists them"


_LATER = "the job goes on: error.handle.result() waits for it again, and error.handle.save(path) keeps it for another process"


class _Keep(RemoteBackend):
    """Serializes a session and sends nothing."""

    blob = b""

    def __call__(self, tracer: Any = None) -> None:
        self.display.enabled = False
        self.blob = self._serialize(tracer)
