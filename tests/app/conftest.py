import sys
from pathlib import Path

import pytest

from tests.app.synthetic_run import write_run

APP = Path(__file__).parents[2] / "app"
# As Streamlit does, put the folder of main.py on the path, to import the modules in it.
sys.path.insert(0, str(APP))


@pytest.fixture(scope="session")
def main_script() -> Path:
    return APP / "main.py"


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """A folder of runs: `whole`, with hostile text in its features, and `bare`, which was only trained."""
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "bare", features=False, evaluation=False)
    write_run(folder / "whole")
    return folder
