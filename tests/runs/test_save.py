"""The files of a run folder when a training begins, and when it has ended."""

from pathlib import Path

import pytest

import saelab
from saelab.errors import SaelabError
from saelab.runs import folder
from tests.runs.test_stages import small


def test_a_new_run_has_settings_and_an_incomplete_record(tmp_path: Path) -> None:
    settings = saelab.settings_of(small(tmp_path))
    with saelab.create_run(settings) as run:
        pass
    assert {path.name for path in run.iterdir()} == {folder.SETTINGS, folder.TRAINING}
    assert saelab.load_config(run / folder.SETTINGS) == settings
    assert folder.training_record(run) == {"inputs": None, "complete": False, "tokens": 0, "planned_tokens": 6000}
    (run / "mine.txt").write_text("")
    with pytest.raises(SaelabError, match=r"run exists; choose another"), saelab.create_run(settings):
        pass
    assert (run / "mine.txt").exists()
    with saelab.create_run(settings, force=True):
        assert {path.name for path in tmp_path.iterdir()} == {"book.txt", "run", ".run.lock"}
    assert not (run / "mine.txt").exists()


def test_a_new_checkpoint_removes_the_results_of_the_earlier_one(tmp_path: Path) -> None:
    run, more = saelab.run(small(tmp_path)), ["training.tokens=6600"]
    (found,) = folder.find_runs(run)
    assert found.has_eval and found.has_features and saelab.load(run).figures["fvu"] < 1
    saelab.resume(run, more)
    (found,) = folder.find_runs(run)
    assert not found.has_eval and not found.has_features and saelab.load(run).figures == {}
    assert "train.json" in {path.name for path in run.iterdir()} and not any(run.glob("*.tmp"))
    saelab.run(small(tmp_path), more)
    assert folder.find_runs(run)[0].has_eval and folder.training_record(run)["tokens"] == 6600
