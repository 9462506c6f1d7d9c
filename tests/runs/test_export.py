"""`saelab export`: where an export goes, what it may replace, and the mistakes it reports."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from saelab.errors import SaelabError
from saelab.files import locked
from saelab.runs.export import FORMS, export
from tests.app.synthetic_run import write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", n_features=12)


def content(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else path.rglob("*")
    return {str(file.relative_to(path)): file.read_bytes() for file in files if file.is_file()}


@pytest.mark.parametrize("to", FORMS)
def test_an_export_goes_into_the_run_and_is_the_same_elsewhere(run: Path, to: str, tmp_path: Path) -> None:
    path = export(run, to, "3,1-2,2")
    assert path == run / "exports" / FORMS[to].name and path.exists()
    other = export(run, to, "3,1,2", out=tmp_path / "elsewhere" / "x")
    assert content(other) == content(path)
    assert [file.name for file in (tmp_path / "elsewhere").iterdir()] == ["x"]
    assert [file.name for file in (run / "exports").iterdir()] == [FORMS[to].name]


def test_features_are_in_the_order_in_which_they_are_named_and_all_by_default(run: Path, tmp_path: Path) -> None:
    assert pq.read_table(export(run, "parquet", "3,1-2,2"))["feature"].to_pylist() == [3, 1, 2]
    assert pq.read_table(export(run, "parquet", out=tmp_path / "all"))["feature"].to_pylist() == list(range(12))
    assert pq.read_table(export(run, "parquet", "3:5,1", force=True))["feature"].to_pylist() == [3, 4, 1]
    files = export(run, "neuronpedia", "7,4")
    assert [f["feature_index"] for f in json.loads((files / "batch-0.json").read_text())["features"]] == [7, 4]


@pytest.mark.parametrize("to", FORMS)
def test_an_earlier_export_is_replaced_only_with_force(run: Path, to: str) -> None:
    path = export(run, to, "1-3")
    before = content(path)
    with pytest.raises(SaelabError, match="exists; choose another, or give --force to replace it"):
        export(run, to, "5")
    assert content(path) == before
    assert export(run, to, "5", force=True) == path
    assert content(path) != before
    if path.is_dir():
        assert len(content(path)) == 1


@pytest.mark.parametrize("to", ["neuronpedia", "circuit-tracer"])
def test_a_folder_that_is_no_export_is_never_replaced(run: Path, to: str, tmp_path: Path) -> None:
    for folder in (run, tmp_path):
        before = content(folder)
        with pytest.raises(SaelabError, match="exists and is not a folder of such an export"):
            export(run, to, "1", out=folder, force=True)
        assert content(folder) == before


def test_a_folder_is_never_replaced_by_a_file(run: Path) -> None:
    with pytest.raises(SaelabError, match="exists and is not a file like"):
        export(run, "csv", out=run.parent, force=True)


@pytest.mark.parametrize("name", ["config.yaml", "features", "features/table.csv", "exports/../sae"])
def test_the_files_of_the_run_itself_are_never_replaced(run: Path, name: str) -> None:
    before = content(run)
    for to in FORMS:
        with pytest.raises(SaelabError, match=r"--out: .* belongs to the run itself"):
            export(run, to, "1", out=run / name, force=True)
    assert content(run) == before


def test_no_file_of_another_run_or_of_another_kind_is_replaced(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    before = content(other)
    for name in ("config.yaml", "new.csv"):
        with pytest.raises(SaelabError, match=r"--out: .* is in another run"):
            export(run, "csv", out=other / name, force=True)
    assert content(other) == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SaelabError, match=r"notes.txt exists and is not a file like .*\.csv"):
        export(run, "csv", out=tmp_path / "notes.txt", force=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_failure_leaves_the_earlier_export(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for to, name in (
        ("html", "saelab.features.export.html.card"),
        ("neuronpedia", "saelab.features.database.intervals"),
    ):
        path = export(run, to, "1-3")
        before = content(path)

        def fail(*arguments: object, **settings: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(name, fail)
            with pytest.raises(SaelabError, match="the disk is full"):
                export(run, to, "4", force=True)
        assert content(path) == before and [file.name for file in path.parent.glob("*.tmp")] == []


def test_one_process_writes_into_a_run_at_a_time(run: Path, tmp_path: Path) -> None:
    with locked(run):
        with pytest.raises(SaelabError, match="another process is writing into it"):
            export(run, "csv")
        assert export(run, "csv", out=tmp_path / "table.csv").is_file()


@pytest.mark.parametrize(
    ("to", "features", "message"),
    [
        ("htm", None, r"--to: there is no 'htm'; choose html, .*Nearest: html\."),
        ("html", None, "--features: name the features of the page"),
        ("csv", "3-x", "--features: .*'3-x' is not a feature"),
        ("csv", "", "--features: "),
        ("csv", "3,12", "--features: There is no feature 12"),
        ("csv", "3-999999999999", "--features: There is no feature 999999999999"),
    ],
)
def test_a_mistake_names_the_option(run: Path, to: str, features: str | None, message: str) -> None:
    with pytest.raises(SaelabError, match=message):
        export(run, to, features)
    assert not (run / "exports").exists()


def test_a_run_without_a_database_is_an_error_that_names_the_command(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", features=False)
    with pytest.raises(SaelabError, match=f"`saelab index {run}` makes it"):
        export(run, "csv")


def test_the_command_prints_what_it_wrote_and_needs_no_torch(run: Path) -> None:
    code = (
        "import sys\nfrom saelab.cli import app\n"
        f"app(['export', {str(run)!r}, '--to', 'html', '--features', '2,5-6'], standalone_mode=False)\n"
        "print([name for name in ('torch', 'transformers', 'streamlit', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    path = run / "exports" / "features.html"
    assert done.stdout.splitlines() == [str(path), "[]"]
    assert [f"feature-{i}" for i in (2, 5, 6)] == re.findall(r"<section [^>]*id=\"([^\"]+)\"", path.read_text())
