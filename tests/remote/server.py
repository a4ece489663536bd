"""A real NDIF server on this machine's loopback, without a GPU, a hub or a key.

    python -m tests.remote.server install     # once: an environment of its own in the cache folder, 1.7 GB
    python -m tests.remote.server up [--sandbox]
    python -m tests.remote.server down

It is the published package, `ndif`, with its API, queue, Ray controller, model actors and object store. Three things are
adapted, by the package's own extension points (`site/`): what it asks of CUDA, where weights come from (a small stand-in for the
hub that serves local folders), and two calls in which ndif and nnsight of these versions disagree.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from hookbook.models.packages import cache_folder, find

HOME = cache_folder() / "ndif-0.1.2"
STATE = HOME / "running.json"
SITE = Path(__file__).parent / "site"
MODELS = {"HuggingFaceTB/SmolLM2-135M-Instruct": "smollm2-135m-instruct", "google/gemma-3-270m": "gemma-3-270m"}
"""Repositories that are served, and the names of what they hold."""

WANTED = [
    "torch==2.13.0",
    "nnsight==0.8.1",
    "transformers==5.23.0",
    "ray[default]==2.60.0",
    "accelerate",
    "numpy",
    "zstandard",
    "peft",
    "pydantic",
    "redis",
    "click",
    "python-dotenv",
    "pyyaml",
    "boto3",
    "fastapi",
    "uvicorn[standard]",
    "gunicorn",
    "python-multipart",
    "moto[server]",
]


def python() -> Path:
    """The interpreter of the server's environment."""
    return HOME / "venv" / "bin" / "python"


def install() -> None:
    """Make the server's environment unless it is there."""
    if (HOME / "installed").exists():
        return
    if shutil.which("redis-server") is None:
        if os.geteuid() or shutil.which("apt-get") is None:
            sys.exit(
                "redis-server is not installed: NDIF keeps its queue there. Install it, for example with: apt-get install redis-server"
            )
        subprocess.run(["apt-get", "update", "-qq"], check=True)
        subprocess.run(["apt-get", "install", "-y", "-qq", "redis-server"], check=True)
    HOME.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "venv", HOME / "venv"], check=True)
    pip = [python(), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, WANTED[0]], check=True)
    subprocess.run([*pip, *WANTED], check=True)
    subprocess.run([*pip, "--no-deps", "--ignore-requires-python", "ndif==0.1.2"], check=True)  # it asks for Python 3.12 and runs on 3.11
    (HOME / "installed").touch()


class Server:
    """A server that was started; the processes are stopped by their numbers."""

    def __init__(self, sandbox: bool = False, key: str = "") -> None:
        self.sandbox = sandbox
        self.ports = {
            name: _free_port()
            for name in ("api", "redis", "store", "hub", "gcs", "client", "objects", "dashboard", "agent", "listen", "metrics")
        }
        self.pids: dict[str, int] = {}
        self.logs = HOME / "logs"

    @property
    def url(self) -> str:
        """Where clients go."""
        return f"http://127.0.0.1:{self.ports['api']}"

    @property
    def client(self) -> dict[str, str]:
        """The environment of a client."""
        return {
            "NDIF_HOST": self.url,
            "HF_ENDPOINT": f"http://127.0.0.1:{self.ports['hub']}",
            "HF_HOME": str(HOME / "hf"),
            "HF_HUB_OFFLINE": "0",
            **_QUIET,
        }

    def _environment(self) -> dict[str, str]:
        ports = self.ports
        own = {key: value for key, value in os.environ.items() if not key.startswith(("NDIF_", "RAY_", "HF_", "PYTHON", "VIRTUAL_ENV"))}
        return own | {
            "PATH": f"{python().parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(SITE),
            "NDIF_REDIS_URL": f"redis://127.0.0.1:{ports['redis']}",
            "NDIF_OBJECT_STORE_URL": f"http://127.0.0.1:{ports['store']}",
            "NDIF_OBJECT_STORE_ACCESS_KEY": "test",
            "NDIF_OBJECT_STORE_SECRET_KEY": "test",
            "NDIF_RAY_ADDRESS": f"ray://127.0.0.1:{ports['client']}",
            "NDIF_API_PORT": str(ports["api"]),
            "NDIF_API_URL": self.url,
            "NDIF_MODEL_IMPORT_PATH": "without_gpu.SandboxActor" if self.sandbox else "without_gpu.ModelActor",
            "NDIF_CONTROLLER_IMPORT_PATH": "without_gpu.ControllerActor",
            "NDIF_DEFAULT_DTYPE": "float32",
            "NDIF_DEFAULT_PADDING_BIAS": "0",
            "NDIF_AUTOSCALING_MAX_REPLICAS": "1",
            "NDIF_CONTROLLER_SYNC_INTERVAL_S": "600",
            "NDIF_HOST": "http://127.0.0.1:9",  # what runs on the server must not send jobs of its own
            "HF_ENDPOINT": f"http://127.0.0.1:{ports['hub']}",
            "HF_HOME": str(HOME / "hf"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "GRPC_ENABLE_FORK_SUPPORT": "0",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
            **_QUIET,
        }

    def _start(self, name: str, *command: Any, **environment: str) -> None:
        with open(self.logs / f"{name}.log", "wb") as log:
            process = subprocess.Popen(
                [str(part) for part in command],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=self._environment() | environment,
                start_new_session=True,
            )
        self.pids[name] = process.pid
        STATE.write_text(json.dumps({"pids": self.pids, "ports": self.ports, "sandbox": self.sandbox}))

    def up(self) -> Server:
        """Start everything; about twenty seconds."""
        self.logs.mkdir(parents=True, exist_ok=True)
        ports, binaries = self.ports, python().parent
        folders = [f"{repo}={find(name)}" for repo, name in MODELS.items()]
        try:
            scratch = ["--save", "", "--appendonly", "no", "--dir", HOME]
            self._start("redis", "redis-server", "--port", ports["redis"], "--bind", "127.0.0.1", *scratch)
            self._start("store", binaries / "moto_server", "-H", "127.0.0.1", "-p", ports["store"])
            self._start("hub", python(), Path(__file__).parent / "hub.py", ports["hub"], *folders)
            for name in ("redis", "store", "hub"):
                self._wait(name)
            resources = {"head": 10, "cuda_memory_bytes": 8_000_000_000, "cpu_memory_bytes": 8_000_000_000}
            self._start(
                "ray", binaries / "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--num-cpus=8", "--num-gpus=1",
                f"--resources={json.dumps(resources)}",
                f"--port={ports['gcs']}", f"--ray-client-server-port={ports['client']}", f"--object-manager-port={ports['objects']}",
                "--dashboard-host=127.0.0.1",
                f"--dashboard-port={ports['dashboard']}", f"--dashboard-agent-grpc-port={ports['agent']}",
                f"--dashboard-agent-listen-port={ports['listen']}",
                f"--metrics-export-port={ports['metrics']}", "--object-store-memory=300000000", f"--temp-dir={HOME / 'ray'}",
                "--disable-usage-stats", NDIF_SERVICE="ray",
            )  # fmt: skip
            for name in ("gcs", "client", "dashboard"):
                self._wait(name)
            controller = [python(), "-m", "ndif.services.ray.deployments.controller.controller"]
            with open(self.logs / "controller.log", "wb") as log:
                subprocess.run(
                    controller,
                    env=self._environment() | {"NDIF_SERVICE": "ray", "RAY_ADDRESS": f"127.0.0.1:{ports['gcs']}"},
                    stdout=log,
                    stderr=log,
                    check=True,
                )
            self.start_api()
        except BaseException:
            self.down()
            raise
        return self

    def start_api(self, **environment: str) -> None:
        """Start the part that clients talk to."""
        config = SITE / "gunicorn_config.py"
        self._start(
            "api",
            python().parent / "gunicorn",
            "--config",
            config,
            "--bind",
            f"127.0.0.1:{self.ports['api']}",
            "ndif.services.api.app:app",
            **{"NDIF_SERVICE": "api"} | environment,
        )
        self._wait("api")
        steady = 0
        for _ in range(240):  # what the last one left in the queue's memory says "connected" until this one connects
            try:
                urllib.request.urlopen(f"{self.url}/connected", timeout=3)
                steady += 1
            except (urllib.error.URLError, OSError):
                steady = 0
            if steady == 8:
                return
            time.sleep(0.5)
        raise RuntimeError(f"the server did not come up; see {self.logs}")

    def _wait(self, name: str) -> None:
        for _ in range(240):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.ports[name])) == 0:
                    return
            time.sleep(0.25)
        raise RuntimeError(f"{name} did not come up; see {self.logs}")

    def stop(self, name: str, how: int = signal.SIGTERM) -> None:
        """Stop one part, and what it started."""
        pid = self.pids.pop(name, None)
        if pid is None:
            return
        for number in (how, signal.SIGKILL):
            try:
                os.killpg(pid, number)
            except ProcessLookupError:
                break
            for _ in range(40):
                try:
                    if os.waitpid(pid, os.WNOHANG)[0]:
                        break
                except ChildProcessError:
                    if not Path(f"/proc/{pid}").exists():
                        break
                time.sleep(0.1)
        for process in _of_session(pid):
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def down(self) -> None:
        """Stop everything, also what a test has started again."""
        if STATE.exists():
            self.pids = json.loads(STATE.read_text())["pids"]
        for name in ("api", "ray", "hub", "store", "redis"):
            self.stop(name)
        STATE.unlink(missing_ok=True)


_QUIET = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _of_session(session: int) -> list[int]:
    """The processes of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and int((entry / "stat").read_text().rpartition(")")[2].split()[3]) == session:
                found.append(int(entry.name))
        except (OSError, IndexError):
            continue
    return found


def main() -> None:
    """The commands in this file's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["install", "up", "down"])
    parser.add_argument("--sandbox", action="store_true", help="run jobs as those of a key that is not trusted")
    chosen = parser.parse_args()
    if chosen.command == "install":
        install()
    elif chosen.command == "up":
        install()
        server = Server(chosen.sandbox).up()
        print(" ".join(f"{key}={value}" for key, value in server.client.items()))
    elif STATE.exists():
        state = json.loads(STATE.read_text())
        server = Server(state["sandbox"])
        server.pids, server.ports = state["pids"], state["ports"]
        server.down()


if __name__ == "__main__":
    main()
