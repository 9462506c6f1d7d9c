"""The real command: killed while it writes, and in several processes under torchrun."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from saelab.activations.cache.layout import IDENTITY, UNFINISHED
from saelab.activations.cache.reader import open_cache
from tests.faults.tools import finished_shards_are_whole, made_by_command, read_an_epoch, tree

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
    "OMP_NUM_THREADS": "1",  # torchrun's default, and so for all here: sums depend on it in their last bits
    "MKL_NUM_THREADS": "1",
}
COMMAND = ["-m", "saelab.cli", "cache"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *COMMAND]


def start(arguments: list[object]) -> subprocess.Popen[str]:
    """Start a process group, so that a kill reaches all its processes."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(arguments: list[object], code: int = 0) -> str:
    """The text on stderr; the command must end with `code`."""
    process = start(arguments)
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == code, stderr
    return stderr


def kill_when(seen: Callable[[], bool], arguments: list[object]) -> None:
    """SIGKILL to the process and all it started, as soon as `seen`; it must not have ended before."""
    process = start(arguments)
    try:
        while not seen():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.002)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.communicate()


def records(folder: Path) -> int:
    return len(list((folder / UNFINISHED).glob("??-*.json")))


def test_the_command_killed_three_times_ends_in_the_same_bytes(tmp_path: Path) -> None:
    """Guaranteed: `saelab cache`, killed at its beginning, after its first shard and later, keeps every finished shard,
    continues, and ends with the bytes of a cache that was never interrupted."""
    config = made_by_command(tmp_path, lanes=2)
    arguments: list[object] = [*COMMAND, config, "--tokens", "30e3", "--out"]
    run([*arguments, tmp_path / "whole"])
    shards = len(open_cache(tmp_path / "whole").manifest.shards)
    assert shards > 30
    folder = tmp_path / "cache"
    kill_when((folder / UNFINISHED / IDENTITY).exists, [*arguments, folder])
    done = records(folder)
    assert done < shards // 3
    kill_when(lambda: records(folder) > done, [*arguments, folder])
    kill_when(lambda: records(folder) > shards // 2, [*arguments, folder])
    assert shards // 2 < finished_shards_are_whole(folder) // 5 < shards
    run([*arguments, folder])
    assert tree(folder) == tree(tmp_path / "whole")
    assert read_an_epoch(folder) >= 30_000


def test_two_processes_write_what_one_does(tmp_path: Path) -> None:
    """Guaranteed: with the same `cache.lanes`, two processes of torchrun write the same cache as one, byte by byte,
    also if they are killed while they write and a single process continues. Every token is there once."""
    config = made_by_command(tmp_path, lanes=2)
    arguments: list[object] = [config, "--tokens", "20e3", "--out"]
    run([*COMMAND, *arguments, tmp_path / "one"])
    run([*TORCHRUN, *arguments, tmp_path / "two"])
    whole = tree(tmp_path / "one")
    assert tree(tmp_path / "two") == whole
    folder = tmp_path / "killed"
    kill_when(lambda: records(folder) > 8, [*TORCHRUN, *arguments, folder])
    finished_shards_are_whole(folder)
    run([*COMMAND, *arguments, folder])
    assert tree(folder) == whole
    cache = open_cache(tmp_path / "two")
    assert {shard["name"][:2] for shard in cache.manifest.shards} == {"00", "01"}
    places = [
        place
        for batch in cache.in_order(next(iter(cache.sites)))
        for place in zip(batch.rows.tolist(), batch.positions.tolist(), strict=True)
    ]
    assert len(set(places)) == len(places) == cache.tokens >= 20_000


def test_more_processes_than_lanes_is_a_clear_error(tmp_path: Path) -> None:
    """Guaranteed: two processes on one lane of text end with a message that says what to set; nothing is written."""
    stderr = run([*TORCHRUN, made_by_command(tmp_path), "--out", tmp_path / "cache"], code=1)
    assert stderr.count("error: ") == stderr.count("error: cache.lanes: is 1, but torchrun started 2 processes") == 1
    assert "set cache.lanes=2" in stderr and not (tmp_path / "cache").exists()


def test_an_error_in_one_process_ends_the_others_without_a_traceback(tmp_path: Path) -> None:
    """Guaranteed: if one of two processes ends with an error, the other ends too, without a traceback."""
    config = made_by_command(tmp_path, lanes=2)
    run([*COMMAND, config, "--tokens", "2000", "--out", tmp_path / "cache"])
    stderr = run([*TORCHRUN, config, "--tokens", "3000", "--out", tmp_path / "cache"], code=1)
    assert "holds a cache of something else: its tokens 2000, not 3000" in stderr
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "gloo" not in stderr, stderr


def test_two_commands_at_once_on_one_cache(tmp_path: Path) -> None:
    """Guaranteed: while one process writes a cache, another that should write it ends with exit code 2 and says
    why; the first is not disturbed."""
    config = made_by_command(tmp_path)
    arguments: list[object] = [*COMMAND, config, "--tokens", "20e3", "--out", tmp_path / "cache"]
    first = start(arguments)
    while not (tmp_path / "cache" / UNFINISHED / IDENTITY).exists():
        assert first.poll() is None, first.communicate()[1]
        time.sleep(0.002)
    os.kill(first.pid, signal.SIGSTOP)
    try:
        assert "another process is writing into it" in run(arguments, code=2)
    finally:
        os.kill(first.pid, signal.SIGCONT)
    assert first.communicate(timeout=240)[1] is not None and first.returncode == 0
    assert read_an_epoch(tmp_path / "cache") >= 20_000
