"""What loads what: a command that only reads never loads a model library, the core loads with torch alone."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import saelab

HEAVY = {"transformers", "transformer_lens", "datasets", "einops", "pandas", "pyarrow"}
HEAVY |= {"pydantic", "typer", "rich", "yaml"}


def loaded(code: str) -> set[str]:
    """Top-level modules in sys.modules after running `code` in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


def test_the_numerical_core_needs_torch_numpy_and_safetensors_alone() -> None:
    found = loaded("import saelab.kernels, saelab.sae.checkpoint, saelab.training.trainer, saelab.codes")
    assert "torch" in found
    assert not found & HEAVY


def test_transformer_lens_comes_with_a_model_only() -> None:
    found = loaded("import saelab.runs.stages, saelab.cli, saelab.lm.model")
    assert "transformer_lens" not in found and "transformers" not in found


def test_explaining_and_scoring_need_no_torch_and_load_clients_when_they_are_used() -> None:
    found = loaded("import saelab.runs.autointerp, saelab.cli_autointerp")
    assert not found & {"torch", "transformers", "openai", "sklearn", "pandas", "pyarrow", "plotly"}


def test_import_saelab_is_light() -> None:
    found = loaded("import time; begin = time.monotonic(); import saelab; assert time.monotonic() - begin < 1")
    assert not found & {"torch", "numpy", *HEAVY}


@pytest.mark.parametrize("name", saelab.__all__)
def test_public_names_are_there(name: str) -> None:
    public = getattr(saelab, name)
    assert callable(public) and name in dir(saelab)
    assert public.__name__ == name and public.__module__.startswith("saelab.")


def test_public_names_are_known_to_type_checkers_too() -> None:
    (block,) = (node for node in ast.parse(Path(saelab.__file__).read_text("utf-8")).body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert sorted(name.name for node in imports for name in node.names) == sorted(saelab.__all__)


def test_public_names_are_no_names_of_modules() -> None:
    """Importing the module would put it in the place of the function of its name."""
    modules = {path.stem for path in Path(saelab.__file__).parent.iterdir()}
    assert not modules & set(saelab.__all__)


@pytest.mark.parametrize("name", saelab.__all__)
def test_public_names_are_documented(name: str) -> None:
    """Each has a docstring of its own or is a section of settings; the documentation names what analyses a notebook."""
    public = getattr(saelab, name)
    assert public.__doc__
    if public.__module__.startswith("saelab.analysis."):
        text = (Path(saelab.__file__).parents[1] / "docs" / "analysis.md").read_text("utf-8")
        assert re.search(rf"\b{name}\b", text), "docs/analysis.md names it"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError):
        saelab.no_such_name  # noqa: B018
