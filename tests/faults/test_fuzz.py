"""Whatever is wrong with a job (fuzz.py), the command answers with one message that names the cause.

500 cases run in this process, and 20 as processes of their own. Both are the same cases every time.
"""

import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from saelab import cli
from saelab.lm import load
from saelab.runs import job
from tests.faults.fuzz import CASES, Case, yaml_text
from tests.tiny import model_folder, text

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SECONDS = 60
"""Processor time after which a case counts as one that never ends; cases take tenths of a second."""
SAME = settings(  # without shrinking: a case is small as it is
    derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
)


def make_valid(folder: Path) -> Path:
    """Make `folder` with a valid job and all its results."""
    (folder / "book").mkdir(parents=True)
    (folder / "model").symlink_to(model_folder("gpt2"))
    for i in range(3):
        (folder / "book" / f"{i}.txt").write_text(text(8 * (i + 1)))
    (folder / "book.txt").write_text(text(40))
    (folder / "c.yaml").write_text(yaml_text({}))
    for command in (["run", "c.yaml"], ["cache", "c.yaml", "--out", "cache"]):
        code, _, errors = in_this_process(Case(command, []), folder)
        assert code == 0, errors
    return folder


def contain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the explorer end instead of taking the place of this process; load each model, and find its sites, once."""
    monkeypatch.setattr(os, "execv", lambda *_: sys.exit(0))
    monkeypatch.setattr(job, "load_language_model", cache(job.load_language_model))
    monkeypatch.setattr(load, "resolve_sites", cache(load.resolve_sites))


@contextmanager
def copied(valid: Path) -> Iterator[Path]:
    """A copy of the valid job; the folder above it is a temporary one as well."""
    with tempfile.TemporaryDirectory(dir=valid.parent) as above:
        yield Path(shutil.copytree(valid, Path(above) / "job", symlinks=True))


def in_this_process(case: Case, folder: Path) -> tuple[object, str, str]:
    """The exit code, or a traceback, and standard output and error of the command of `case` in `folder`."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for errors in ("strict", "backslashreplace"))

    def too_long(*_: object) -> None:
        raise TimeoutError(f"not finished after {SECONDS} s of processor time")

    code, arguments, before = 0, sys.argv, signal.signal(signal.SIGPROF, too_long)
    try:
        with chdir(folder), redirect_stdout(out), redirect_stderr(err):
            case.change()
            sys.argv = ["saelab", *case.arguments]
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            cli.main()
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        code = traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        sys.argv = arguments
    shown = []
    for stream in (out, err):
        stream.flush()
        shown.append(stream.buffer.getvalue().decode("utf-8", "replace"))  # type: ignore[attr-defined]
    return code, shown[0], shown[1]


def problem(case: Case, code: object, out: str, err: str) -> str | None:
    """What is wrong with the answer to a case; None if it is a result, or an error as it shall be."""
    if code not in (0, 2) or "Traceback" in out + err:
        return f"{code}\n{out}{err}"
    if code == 0 or "Usage: " in err:
        return None
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    if len(errors) != 1 or err.splitlines()[-1] != errors[0]:
        return f"not one error at the end: {err}"
    named = any(word and word.lower() in errors[0].lower() for word in case.blamed)
    return None if named else f"{case.blamed} not in {errors[0]}"


@pytest.fixture(scope="module")
def valid() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="saelab-fuzz-") as folder:
        yield make_valid(Path(folder) / "valid")


def test_whatever_is_wrong_is_one_message(valid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contain(monkeypatch)
    codes: Counter[object] = Counter()

    @settings(SAME, max_examples=500)
    @given(CASES)
    def check(case: Case) -> None:
        with copied(valid) as folder:
            code, out, err = in_this_process(case, folder)
        assert problem(case, code, out, err) is None
        codes[code] += 1

    check()
    assert codes[0] >= 100 and codes[2] >= 200  # cases get as far as results, and as far as errors


def test_whatever_is_wrong_is_one_message_of_a_process(valid: Path) -> None:
    cases: list[Case] = []

    @settings(SAME, max_examples=20)
    @given(CASES.filter(lambda case: case.arguments[0] != "app"))  # it serves until it is ended
    def draw(case: Case) -> None:
        cases.append(case)

    draw()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))

    def run(case: Case, folder: Path) -> str | None:
        command = [sys.executable, "-m", "saelab.cli", *case.arguments]
        environment = os.environ | {"PYTHONPATH": path}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=240, check=False)
        shown = [stream.decode(errors="replace") for stream in (done.stdout, done.stderr)]
        return problem(case, done.returncode, shown[0], shown[1])

    with tempfile.TemporaryDirectory(dir=valid.parent) as above, ThreadPoolExecutor(2) as pool:
        folders = [Path(shutil.copytree(valid, Path(above) / f"{i}" / "job", symlinks=True)) for i in range(len(cases))]
        for case, folder in zip(cases, folders, strict=True):
            with chdir(folder):
                case.change()
        assert [answer for answer in pool.map(run, cases, folders) if answer] == []
