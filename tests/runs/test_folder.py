"""A run folder: its names, reading it, and what may be replaced."""

import subprocess
import sys

import pytest

from saelab.errors import SaelabError
from saelab.runs import folder
from saelab.sae.checkpoint import load
from tests.app.synthetic_run import write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "a=1[x]*")


def test_finds_runs_at_any_level_with_their_finished_stages(tmp_path, run):
    write_run(tmp_path / "sweep" / "k32", features=False, evaluation=False)
    write_run(tmp_path / "first")
    (tmp_path / "not-a-run").mkdir()
    found = folder.find_runs(tmp_path)
    assert [(r.name, r.has_eval, r.has_features) for r in found] == [("first", True, True), ("sweep/k32", False, False)]
    assert [r.name for r in folder.find_runs(run)] == [run.name]
    assert folder.find_runs(tmp_path / "not-a-run") == []


def test_a_missing_folder_is_named():
    with pytest.raises(SaelabError, match="nowhere/at-all"):
        folder.find_runs("nowhere/at-all")


def test_settings_metrics_and_evaluation(run, tmp_path):
    assert "blocks.2" in folder.settings_text(run)
    assert folder.metrics(run)["fvu"].iloc[0] == 1.0 and "note" not in folder.metrics(run)
    assert (folder.evaluation(run) or {})["l0"] == 31.87
    bare = write_run(tmp_path / "bare", features=False, evaluation=False)
    assert folder.evaluation(bare) is None
    (bare / "metrics.jsonl").unlink()
    assert folder.metrics(bare).empty


def test_a_line_of_metrics_cut_off_by_a_kill_is_left_out_but_not_one_in_the_middle(tmp_path):
    run = write_run(tmp_path / "run", features=False)
    path = run / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-20])
    assert len(folder.metrics(run)) == len(whole.splitlines()) - 1
    path.write_text("{broken\n" + whole)
    with pytest.raises(SaelabError, match=r"metrics\.jsonl, line 1"):
        folder.metrics(run)


@pytest.mark.parametrize("content", [b"", b"not what it says", b"\xff\xfe\x00PAR1", b"[1, 2]"])
def test_a_corrupt_evaluation_is_named_and_the_stage_that_makes_it_treats_it_as_missing(tmp_path, content):
    run = write_run(tmp_path / "run")
    (run / "eval.json").write_bytes(content)
    with pytest.raises(SaelabError, match=rf"{run / 'eval.json'} .*`saelab eval {run}` makes it again"):
        folder.evaluation(run)
    assert folder.evaluation_inputs(run) is None
    (run / "train.json").write_bytes(content)
    assert folder.training_record(run) == {}
    (run / "features" / "manifest.json").write_bytes(content)
    assert folder.features_inputs(run) is None


def test_records_that_are_there_are_read(run):
    assert folder.training_record(run) == {"inputs": "0" * 64, "tokens": 10_000, "complete": True}
    assert folder.features_inputs(run) == "0" * 64


def test_folders_that_a_kill_left_under_their_old_name_are_found(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "sae").rename(tmp_path / "sae")
    with pytest.raises(SaelabError, match="not a run folder with a checkpoint"):
        folder.check_run(run)
    (tmp_path / "sae").rename(run / "sae")
    with pytest.raises(SaelabError, match=r"runn: .* there is no such folder. Nearest: run.$"):
        folder.check_run(tmp_path / "runn")
    with pytest.raises(SaelabError, match=r"runn: no checkpoint here: .* has run. Nearest: run.$"):
        load(tmp_path / "runn")
    for name in ("sae", "features"):
        (run / name).rename(run / f"{name}.old.tmp")
    folder.check_run(run)
    assert folder.weights(run) == run / "sae.old.tmp" / "sae_weights.safetensors"
    assert folder.find_runs(run)[0].has_features
    assert all(path.is_file() for path in folder.shown_files(run))


def test_looking_at_runs_loads_no_torch_and_no_tables(run):
    heavy = ["torch", "transformers", "transformer_lens", "datasets", "streamlit", "pandas", "pyarrow"]
    code = (
        "import sys\nfrom saelab.runs import folder\n"
        f"folder.find_runs({str(run)!r}); folder.evaluation({str(run)!r}); folder.settings_text({str(run)!r})\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
