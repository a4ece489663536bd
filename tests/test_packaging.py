"""The package as others see it: names, what importing costs, and third-party adapters."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint, version
from pathlib import Path

import pytest

import hookbook as hb
from hookbook.models import loading
from hookbook.testing import ToyAdapter, ToyModel
from tests.support.needs import HOOKED, marked, require

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def modules() -> list[str]:
    return sorted(m.name for m in pkgutil.walk_packages(hb.__path__, "hookbook."))


def test_the_declared_packages_are_the_folders_on_disk():
    places = ((ROOT / "plugin/hookbook", "hookbook"), (ROOT / "adapters", "hookbook.adapters"), (ROOT / "recipes", "hookbook.recipes"))
    folders = {
        ".".join([name, *p.parent.relative_to(place).parts])
        for place, name in places
        for p in place.rglob("__init__.py")  # which does not follow the links
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == folders
    for name in ("adapters", "recipes"):
        link = ROOT / "plugin/hookbook" / name
        assert link.is_symlink() and link.resolve() == ROOT / name and not link.readlink().is_absolute()


@pytest.mark.parametrize("name", marked(modules()))
def test_every_module_imports_and_has_a_docstring(name):
    module = importlib.import_module(name)
    assert module.__doc__ or not Path(module.__file__).read_text().strip()


def test_public_names_are_what_is_there():
    for name in hb.__all__:
        assert getattr(hb, name) is not None
    assert set(hb.__all__) <= set(dir(hb))
    assert hb.__version__ == version("hookbook")
    with pytest.raises(AttributeError, match="no attribute 'patchscoop'"):
        hb.patchscoop  # noqa: B018


def test_no_module_or_folder_on_top_carries_the_name_of_a_public_function():
    """It would replace the function as soon as it is imported."""
    tops = {m.split(".")[1] for m in modules()}
    coming = {"neuron", "probe", "influence", "circuit", "atlas", "portrait", "watch", "ask"}
    assert {"engine", "errors"} <= tops and not tops & ({name for name, home in hb._HOME.items() if home} | coming)


def test_importing_hookbook_loads_no_model_library():
    code = (
        "import sys, hookbook; print(sorted({m.split('.')[0] for m in sys.modules} & "
        "{'torch', 'transformers', 'transformer_lens', 'nnsight', 'sae_lens', 'pandas', 'matplotlib'}))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_recipes_load_no_backend():
    code = (
        "import sys, hookbook; hookbook.patchscope, hookbook.load, hookbook.testing; "
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'transformer_lens', 'nnsight', 'sae_lens'}))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_neither_a_module_nor_the_doctor_imports_sae_lens():
    """It takes seconds, and TransformerLens 4 has no version of it."""
    names = [name for name in modules() if HOOKED or not name.endswith(".hooked")]
    code = (
        f"import importlib, sys; [importlib.import_module(name) for name in {names}]; from hookbook.cli import _doctor; _doctor(''); "
        "print('transformer_lens' in sys.modules, 'sae_lens' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()[-1] == "True False"


def test_recipes_do_not_import_adapters_and_plugin_only_where_it_wraps():
    recipes = list((ROOT / "recipes").rglob("*.py"))
    assert len(recipes) > 30
    for path in recipes:
        assert "hookbook.adapters" not in path.read_text()
    assert [p.name for p in (ROOT / "plugin/hookbook").rglob("*.py") if "hookbook.adapters" in p.read_text()] == ["loading.py"]


def test_a_third_party_adapter_is_found(monkeypatch):
    class Other(ToyModel):
        pass

    class OtherAdapter(ToyAdapter):
        @staticmethod
        def accepts(model):
            return isinstance(model, Other)

    monkeypatch.setattr(sys.modules[__name__], "OtherAdapter", OtherAdapter, raising=False)
    monkeypatch.setitem(sys.modules, "third_party", sys.modules[__name__])
    point = EntryPoint("other", "third_party:OtherAdapter", "hookbook.adapters")
    monkeypatch.setattr(loading, "entry_points", lambda group: [point] if group == "hookbook.adapters" else [])
    adapter = hb.wrap(Other())
    assert isinstance(adapter, OtherAdapter)
    assert hb.patchscope(adapter.model, "ab", target="cd", k=1).token_ids.shape == (1, 3, 1)
    with pytest.raises(hb.errors.ModelError):
        hb.wrap(ToyModel())


@pytest.mark.hooked
def test_generated_pages_are_up_to_date():
    for module in ("transformer_lens", "nnsight"):  # whose models are asked which sites they have
        require(module)
    namespace: dict = {"__file__": str(ROOT / "docs/generate.py"), "__name__": "generate"}
    exec((ROOT / "docs/generate.py").read_text(), namespace)
    for name, make in namespace["PAGES"].items():
        assert (ROOT / "docs/reference" / name).read_text() == make(), f"{name} is old: make docs"


def test_the_readme_shows_the_two_commands_and_names_that_exist():
    text = (ROOT / "README.md").read_text()
    assert "make demo" in text and "make test" in text
    import re

    guide = (ROOT / "docs/how-to/add-a-recipe.md").read_text()
    made = set(re.findall(r"(\w+) as \1\b", guide))  # which tests/test_guide.py makes
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("**/*.md")]:
        for name in re.findall(r"\bhb\.([A-Za-z_]+)", page.read_text()):
            assert hasattr(hb, name) or name in made, f"{page.name}: hb.{name}"
