"""What loads what: a command that only reads never loads a model library, the core loads with torch alone."""

import subprocess
import sys

import pytest


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
    text = {"transformers", "transformer_lens", "datasets", "einops", "pandas", "pyarrow"}
    assert not found & (text | {"pydantic", "typer", "rich", "yaml"})


def test_transformer_lens_comes_with_a_model_only() -> None:
    found = loaded("import saelab.runs.stages, saelab.cli, saelab.lm.model")
    assert "transformer_lens" not in found and "transformers" not in found


@pytest.mark.parametrize("name", ["load", "train", "run", "fidelity", "index", "evaluate", "Codes", "open_corpus"])
def test_public_names_are_there(name: str) -> None:
    import saelab

    assert callable(getattr(saelab, name)) and name in dir(saelab)


def test_an_unknown_name_is_an_attribute_error() -> None:
    import saelab

    with pytest.raises(AttributeError):
        saelab.no_such_name  # noqa: B018
