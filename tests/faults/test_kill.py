"""SIGKILL while a cache or a feature database is written."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from saelab.activations.cache.layout import MANIFEST
from saelab.activations.cache.reader import open_cache
from saelab.errors import SaelabError
from saelab.features import layout
from saelab.features.arrays import open_arrays
from saelab.files import current_folder
from tests.activations.cache.made import SITE, identity
from tests.faults.tools import finished_files, finished_shards_are_whole, stamps, tree

ROOT = Path(__file__).parents[2]
INSTANTS, KILLS = 25, 10
FACTS = identity(gradients=True, lanes=2, dtype="bfloat16", passes_per_shard=2)
"""Two sites, gradients, two lanes of five shards each."""
MANY_SHARDS = identity(
    gradients=True, lanes=2, dtype="bfloat16", passes_per_shard=1, rows_per_forward=2, block_tokens=8
)
"""The same in 36 shards."""
KILLED = {"signal": 9}

Write = Callable[..., dict[str, int]]


@contextmanager
def child(what: str) -> Iterator[Write]:
    """Yields a function that writes in another process, which is killed instead of its `calls`-th call."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    with subprocess.Popen(
        [sys.executable, "-m", "tests.faults.child", what],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin and process.stdout
        asked, answers = process.stdin, process.stdout

        def run(folder: Path, facts: dict[str, Any], calls: int | None = None) -> dict[str, int]:
            asked.write(json.dumps({"folder": str(folder), "facts": facts, "calls": calls}) + "\n")
            asked.flush()
            return json.loads(answers.readline())

        yield run
        asked.close()


@pytest.fixture(scope="module")
def write() -> Iterator[Write]:
    """Writes a cache."""
    with child("cache") as run:
        yield run


@pytest.fixture(scope="module")
def index() -> Iterator[Write]:
    """Writes a feature database of 30 rows in shards of 8."""
    with child("index") as run:
        yield run


def test_a_kill_at_any_instant_costs_only_the_unfinished_shards(write: Write, tmp_path: Path) -> None:
    """Guaranteed: whichever call of the system a writer is killed in, from its first to its last, what it left is
    refused as unfinished or is whole; shards with a record have the bytes recorded, and the next run does not touch
    them; after it the cache has the bytes of one that was never interrupted, and no file or folder more."""
    total = write(tmp_path / "whole", FACTS)["calls"]
    whole = tree(tmp_path / "whole")
    assert total > 4 * INSTANTS
    for k in (1 + round(i * (total - 1) / (INSTANTS - 1)) for i in range(INSTANTS)):
        folder = tmp_path / str(k)
        assert write(folder, FACTS, k) == KILLED
        finished_shards_are_whole(folder)
        kept, before = finished_files(folder), stamps(folder) if folder.exists() else {}
        if (folder / MANIFEST).exists():
            assert {path: content for path, content in tree(folder).items() if path in whole} == whole
        else:
            with pytest.raises(SaelabError, match=r"not finished|no activation cache"):
                open_cache(folder)
        assert "calls" in write(folder, FACTS)
        assert tree(folder) == whole, k
        after = stamps(folder)
        assert {path: after[path] for path in kept} == {path: before[path] for path in kept}, k


def test_kill_after_kill_on_one_cache(write: Write, tmp_path: Path) -> None:
    """Guaranteed: a writer killed 25 times on the same cache, at other points of a shard's making each time (lives of
    3, 6, 9, ... calls), gets on whenever it lives long enough for a shard, never loses one, and ends with the bytes of
    an uninterrupted one."""
    assert "calls" in write(tmp_path / "whole", MANY_SHARDS)
    folder, done = tmp_path / "cache", [0]
    for life in range(1, INSTANTS + 1):
        assert write(folder, MANY_SHARDS, 3 * life) == KILLED
        done.append(finished_shards_are_whole(folder))
        assert done[-1] >= done[-2]
    assert 0 < done[-1] < len(tree(tmp_path / "whole")) - 5
    assert "calls" in write(folder, MANY_SHARDS)
    assert tree(folder) == tree(tmp_path / "whole")


def test_lives_of_one_shard_each_come_to_an_end(write: Write, tmp_path: Path) -> None:
    """Guaranteed: however short the lives of a writer, as long as each is enough for one shard the cache gets finished,
    with the bytes of an uninterrupted one; a kill never makes the next life longer."""
    assert "calls" in write(tmp_path / "whole", FACTS)
    lives = 1
    while write(tmp_path / "cache", FACTS, 60) == KILLED:
        lives += 1
        assert lives < 30
    assert lives > 5 and tree(tmp_path / "cache") == tree(tmp_path / "whole")


def test_a_kill_during_repair_costs_nothing(write: Write, tmp_path: Path) -> None:
    """Guaranteed: whichever call a writer is killed in while it writes a damaged shard again, the shard is repaired by
    the next run, no other is touched meanwhile, and nothing is left over."""
    assert "calls" in write(tmp_path / "whole", FACTS)
    whole, damaged = tree(tmp_path / "whole"), f"{SITE}/01-00001.gradients.safetensors"
    folder = Path(shutil.copytree(tmp_path / "whole", tmp_path / "cache"))
    (folder / damaged).write_bytes(b"")
    total = write(folder, FACTS)["calls"]
    assert total > INSTANTS and tree(folder) == whole
    for k in range(1, total + 1):
        (folder / damaged).write_bytes(b"")
        before = stamps(folder)
        assert write(folder, FACTS, k) == KILLED
        touched = {path for path, stamp in stamps(folder).items() if before.get(path) != stamp}
        assert {Path(path).name.split(".")[0] for path in touched} <= {"01-00001"}
        assert "calls" in write(folder, FACTS)
        assert tree(folder) == whole, k


def rows_in_shards(unfinished: Path) -> int:
    """The row after the last finished shard in `unfinished`."""
    stops = [0]
    for path in unfinished.glob("*.safetensors"):
        with safe_open(path, "np") as file:
            stops.append(int(file.metadata()["stop"]))
    return max(stops)


@pytest.mark.parametrize("earlier", [False, True])
def test_an_index_killed_at_any_instant_goes_on_after_its_last_shard(
    index: Write, tmp_path: Path, earlier: bool
) -> None:
    """Guaranteed: whichever call of the system an index is killed in, the earlier database or the new one is found
    whole; the next run encodes only what is in no finished shard, and ends with the bytes of an uninterrupted one."""
    databases = []
    for seed in (1, 2):
        total = index(tmp_path / str(seed), {"seed": seed})["calls"]
        databases.append(tree(tmp_path / str(seed)))
    assert total > 3 * KILLS and databases[0] != databases[1]
    continued, found = set(), set()
    for k in (1 + round((i / (KILLS - 1)) ** 2 * (total - 1)) for i in range(KILLS)):  # most calls come after the pass
        folder = tmp_path / f"killed at {k}"
        if earlier:
            shutil.copytree(tmp_path / "1", folder)
        assert index(folder, {"seed": 2}, k) == KILLED
        there = tree(current_folder(folder))
        there = {name: there[name] for name in there if layout.UNFINISHED not in name}
        if there:
            found.add(databases.index(there))
            open_arrays(current_folder(folder)).verify()
        done = rows_in_shards(current_folder(folder) / layout.UNFINISHED)
        ended = index(folder, {"seed": 2})
        assert ended["first_row"] == done
        continued.add(done)
        assert tree(folder) == databases[1], k
        assert not folder.with_name(f"{folder.name}.tmp").exists()
    assert continued >= {0, 30} and len(continued) > 2 and found == ({0, 1} if earlier else {1})


def test_an_index_of_other_weights_begins_anew(index: Write, tmp_path: Path) -> None:
    """Guaranteed: what a killed index left is not used by one of other weights."""
    total = index(tmp_path / "2", {"seed": 2})["calls"]
    assert index(tmp_path / "killed", {"seed": 1}, total // 6) == KILLED
    assert rows_in_shards(tmp_path / "killed" / layout.UNFINISHED) > 0
    assert index(tmp_path / "killed", {"seed": 2})["first_row"] == 0
    assert tree(tmp_path / "killed") == tree(tmp_path / "2")
