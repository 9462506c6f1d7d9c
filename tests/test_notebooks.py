"""The notebooks: stored without outputs, with short cells; executed without an error or a warning.

`make notebooks` runs only this file, the slow tests too. The executed notebooks are kept in build/notebooks.
"""

import ast
import json
import os
import re
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
IMPORTS = {"email", "numpy", "pandas", "pathlib", "plotly", "saelab", "shutil", "torch", "transformers"}
LONGEST = 12
"""Lines of a code cell."""
SECONDS = 600
"""That a cell may take on a busy machine; on an idle one each takes less than 60."""


def cells(path: Path, kind: str) -> list[str]:
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def test_there_are_notebooks_in_order() -> None:
    assert [path.name[0] for path in NOTEBOOKS] == list("123456")
    for path, following in pairwise(NOTEBOOKS):
        assert f"({following.name})" in cells(path, "markdown")[-1]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs_and_reads_well(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    assert text == json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", "as Jupyter writes it, for small diffs"
    assert not re.search(r"""["'\s(=]/(?:\w+/)+|[A-Z]:\\\\""", "".join(cells(path, "code"))), "an absolute path"
    first, *_ = notebook["cells"]
    assert first["cell_type"] == "markdown" and "take" in "".join(first["source"]), "how long it takes"
    for cell in notebook["cells"]:
        assert set(cell["metadata"]) <= {"tags"}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            assert len(cell["source"]) <= LONGEST
            assert all(len(line.rstrip("\n")) <= 130 for line in cell["source"])
    assert len(cells(path, "markdown")) >= len(cells(path, "code")) // 2, "prose between the cells"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_code_cell_parses_and_imports_what_a_user_has(path: Path) -> None:
    for source in cells(path, "code"):
        tree = ast.parse(source)
        assert isinstance(tree.body[-1], ast.Expr), "something to look at"
        if ".style" in source and "texts" in source:
            assert 'escape="html"' in source, "pandas' styles do not escape text by themselves"
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert {name.name.split(".")[0] for name in node.names} <= IMPORTS
            elif isinstance(node, ast.ImportFrom):
                assert str(node.module).split(".")[0] in IMPORTS


@pytest.mark.slow
@pytest.mark.parametrize("chosen", ["1345", "26"], ids=["on the shared run", "on runs of their own"])
def test_the_notebooks_run_one_after_the_other(chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in a kernel of its own, all of a group in one folder, where they find what an earlier one has left."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))  # without the start-up files of whoever runs this
    shutil.copy(ROOT / "notebooks" / "notebook.yaml", tmp_path)
    kept = ROOT / "build" / "notebooks"
    kept.mkdir(parents=True, exist_ok=True)
    for path in (path for path in NOTEBOOKS if path.name[0] in chosen):
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        client = nbclient.NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": str(tmp_path)}})
        try:
            client.execute()
        finally:
            nbformat.write(notebook, kept / path.name)
        for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
            errors = "".join(output.text for output in cell.outputs if output.get("name") == "stderr")
            assert not errors, f"{path.name}: {cell.source}\n{errors}"
            assert cell.outputs, f"{path.name}: nothing to look at after\n{cell.source}"
