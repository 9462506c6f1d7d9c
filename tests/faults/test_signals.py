"""Real commands that signals stop, and two commands on one run folder."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from saelab.activations.cache.layout import MANIFEST, UNFINISHED
from saelab.runs.config import load_config
from saelab.runs.resume import states
from saelab.signals import stopping
from tests.faults.tools import the_one_error
from tests.runs.test_stages import small

ROOT = Path(__file__).parents[2]
LOCKED = "another process is writing into it"


class Commands:
    """Starts `saelab` commands in forks of one process (commands.py)."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self.process, self.folder = process, folder
        self.count = 0

    def ask(self, **line: Any) -> int:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(line) + "\n")
        self.process.stdin.flush()
        (value,) = json.loads(self.process.stdout.readline()).values()
        return value

    def start(
        self, *arguments: object, cwd: Path, ignore: tuple[int, ...] = (), terminal: str | None = None
    ) -> "Command":
        self.count += 1
        (output := self.folder / f"{self.count}.txt").write_text("")
        pid = self.ask(
            arguments=list(map(str, arguments)), cwd=str(cwd), output=str(output), ignore=ignore, terminal=terminal
        )
        return Command(self, pid, output)


class Command:
    """A command that was started."""

    def __init__(self, commands: Commands, pid: int, output: Path) -> None:
        self.commands, self.pid, self.output = commands, pid, output

    def when(self, seen: Callable[[], bool]) -> "Command":
        """Returns as soon as `seen`."""
        for _ in range(6000):
            if seen():
                return self
            time.sleep(0.02)
        raise AssertionError(f"not seen; its output: {self.output.read_text()}")

    def end(self, number: int | None = None) -> tuple[int, str]:
        """Exit code and output, after sending the signal `number`."""
        if number is not None:
            os.kill(self.pid, number)
        code = self.commands.ask(wait=self.pid)
        return code, self.output.read_text()


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    with subprocess.Popen(
        [sys.executable, "-m", "tests.faults.commands"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield Commands(process, tmp_path_factory.mktemp("output"))
        assert process.stdin
        process.stdin.close()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A training that takes hours, unless a signal stops it."""
    settings = small(tmp_path) | {"training": {"tokens": 500_000_000, "batch": 200, "log_every": 1}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    return tmp_path / "config.json"


def logged(run: Path) -> Callable[[], bool]:
    """Whether training has begun in the folder `run`."""
    return lambda: (run / "metrics.jsonl").is_file() and (run / "metrics.jsonl").stat().st_size > 0


def is_stopped(run: Path) -> None:
    """The run is incomplete, with a state and a checkpoint, and nothing half-written or locked beside it."""
    assert not json.loads((run / "train.json").read_text())["complete"]
    assert states(run) and (run / "sae" / "cfg.json").is_file()
    assert not [path.name for path in run.parent.rglob("*") if path.name.endswith((".tmp", ".lock"))]


def test_signals_stop_a_training_and_nobody_else_writes_into_its_folder(
    commands: Commands, config: Path, tmp_path: Path
) -> None:
    """SIGTERM, SIGHUP and SIGINT finish the step, save and end with 143, 129 and 130; an ignored signal does nothing.
    While a command works on the run, every other one is refused; its settings and weights stay its own."""
    run, lock = tmp_path / "run", tmp_path / ".run.lock"
    first = commands.start("train", config, "seed=1", cwd=tmp_path, ignore=(signal.SIGHUP,)).when(lock.exists)
    code, output = commands.start("train", config, "seed=2", cwd=tmp_path).end()
    assert code == 2 and LOCKED in the_one_error(output)
    first.when(logged(run))
    os.kill(first.pid, signal.SIGHUP)  # as under nohup
    before = (run / "metrics.jsonl").stat().st_size
    first.when(lambda: (run / "metrics.jsonl").stat().st_size > before + 2000)
    code, output = first.end(signal.SIGTERM)
    assert code == 143 and f"`saelab train --resume {run}` goes on" in output
    assert load_config(run / "config.yaml").seed == 1
    is_stopped(run)

    lines = len((run / "metrics.jsonl").read_text().splitlines())
    again = commands.start("train", "--resume", run, cwd=tmp_path)
    again.when(lambda: len((run / "metrics.jsonl").read_text().splitlines()) > lines)
    for others in (
        ["train", config, "--force"],
        ["train", "--resume", run],
        ["run", config, "--force"],
        ["eval", run],
        ["index", run],
    ):
        code, output = commands.start(*others, cwd=tmp_path).end()
        assert code == 2 and LOCKED in the_one_error(output), others
    assert again.end(signal.SIGHUP)[0] == 129
    is_stopped(run)

    last = commands.start("run", config, "seed=1", cwd=tmp_path)
    last.when(lambda: "training continues" in last.output.read_text())
    code, output = last.end(signal.SIGINT)
    assert code == 130 and not (run / "eval.json").exists() and "Traceback" not in output
    is_stopped(run)


def test_a_closed_terminal_stops_a_training_with_its_state_saved(
    commands: Commands, config: Path, tmp_path: Path
) -> None:
    """The terminal takes no more output, so nothing may depend on writing to it."""
    terminal, child = pty.openpty()
    command = commands.start("train", config, cwd=tmp_path, terminal=os.ttyname(child))
    os.set_blocking(terminal, False)

    def seen() -> bool:
        with suppress(BlockingIOError):
            os.read(terminal, 1 << 16)  # or the terminal's buffer fills
        return logged(tmp_path / "run")()

    command.when(seen)
    os.close(child)
    os.close(terminal)
    assert command.end()[0] == 129
    is_stopped(tmp_path / "run")


@pytest.mark.parametrize(
    ("stage", "number", "code"),
    [("eval", signal.SIGTERM, 143), ("index", signal.SIGINT, 130)],
)
def test_a_stage_that_a_signal_stops_leaves_no_result(
    stage: str, number: int, code: int, commands: Commands, run: Path
) -> None:
    command = commands.start(stage, run, cwd=run.parent)
    command.when(lambda: "corpus: " in command.output.read_text())
    found, output = command.end(number)
    assert found == code and "Traceback" not in output and "error" not in output
    assert not (run / "eval.json").exists()
    assert {path.name for path in (run / "features").glob("*")} <= {"unfinished"}, "what `index` continues from"
    assert not list(run.parent.rglob("*.lock")) and not list(run.rglob("*.tmp"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose evaluation and features take long: they read many rows, one at a time."""
    import saelab

    folder = tmp_path_factory.mktemp("stages")
    config = small(folder) | {"eval": {"tokens": 20_000, "rows_per_forward": 1}}
    return saelab.train(config | {"features": {"tokens": 20_000, "rows_per_forward": 1}})


def test_a_cache_that_a_signal_stops_continues(commands: Commands, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    small_shards = ["cache.rows_per_forward=8", "cache.shard_tokens=256", "--tokens", "20000", "--out", out]
    command = commands.start("cache", config, *small_shards, cwd=tmp_path)
    command.when(lambda: any((out / UNFINISHED).glob("00-0*.json")))
    code, output = command.end(signal.SIGTERM)
    assert code == 143 and "finished shards are kept" in output and not (out / MANIFEST).exists()
    code, output = commands.start("cache", config, *small_shards, cwd=tmp_path).end()
    assert code == 0 and "continuing after them" in output and (out / MANIFEST).exists()


def test_a_signal_that_a_library_swallows_still_ends_the_command() -> None:
    """Some imports catch everything, and then fail in another way."""
    before = signal.getsignal(signal.SIGTERM)

    def command() -> None:
        with stopping():
            with suppress(SystemExit):
                os.kill(os.getpid(), signal.SIGTERM)
            raise RecursionError("half of a module is missing")

    with pytest.raises(SystemExit) as ended:
        command()
    assert ended.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
