import sys
from pathlib import Path

import pytest

from tests.app.synthetic_run import write_run

APP = Path(__file__).parents[2] / "app"
# Streamlit puts the folder of main.py on the path; the modules beside it are imported as it does.
sys.path.insert(0, str(APP))


@pytest.fixture(scope="session")
def main_script() -> Path:
    return APP / "main.py"


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """A folder of runs: `whole`, with hostile text in its features, and `bare`, which was trained and nothing else."""
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "bare", features=False, evaluation=False)
    write_run(folder / "whole")
    return folder
