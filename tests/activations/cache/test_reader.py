"""A cache is read completely, once per epoch, well shuffled, and again from any place in the same order."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelab.activations import blocks
from saelab.activations.blocks import Cursor
from saelab.activations.cache.layout import MANIFEST, Manifest, files_of, shard_name
from saelab.activations.cache.reader import Cache, open_cache
from saelab.activations.stream import ActivationBatch
from saelab.errors import SaelabError
from tests.activations.cache.made import SITE, SITES, identity, values, write


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    folder = tmp_path_factory.mktemp("reader") / "cache"
    write(folder, identity(gradients=True, tokens=3000, lanes=2))
    return open_cache(folder)


def places(batches: list[ActivationBatch]) -> list[tuple[int, int]]:
    return [pair for batch in batches for pair in zip(batch.rows.tolist(), batch.positions.tolist(), strict=True)]


def read(cache: Cache, batch_tokens: int, *, epochs: int = 1, **arguments) -> list[ActivationBatch]:
    """All batches from a place to the end of an epoch."""
    batches = []
    with cache.batches(SITE, batch_tokens, **{"seed": 0, "buffer_tokens": 500} | arguments) as shuffled:
        for batch in shuffled:
            batches.append(batch)
            if shuffled.cursor.epoch == epochs:
                return batches
    raise AssertionError


@settings(max_examples=15, deadline=None)
@given(batch_tokens=st.integers(1, 4000), buffer_tokens=st.integers(1, 4000), seed=st.integers(0, 2**63))
def test_an_epoch_has_every_token_once_with_its_values(cache, batch_tokens, buffer_tokens, seed) -> None:
    batches = read(cache, batch_tokens, seed=seed, buffer_tokens=buffer_tokens)
    assert set(Counter(places(batches)).values()) == {1}
    assert sum(map(len, batches)) == cache.tokens
    assert max(map(len, batches)) <= batch_tokens
    for batch in batches:
        assert torch.equal(batch.values, values(batch.tokens, SITES[SITE], 0)) and batch.gradients is None


def test_gradients_come_with_their_tokens(cache) -> None:
    for batch in read(cache, 64, gradients=True):
        assert batch.gradients is not None
        assert torch.equal(batch.gradients, values(batch.tokens, SITES[SITE], 0).flip(1) / 1000)


def test_in_order_is_the_order_written(cache) -> None:
    batches = list(cache.in_order(SITE, gradients=True))
    assert sum(map(len, batches)) == cache.tokens
    for lane in (0, 1):
        of_lane = [(row, position) for row, position in places(batches) if row % 2 == lane]
        assert of_lane == sorted(of_lane)
    assert all(torch.equal(batch.values, values(batch.tokens, SITES[SITE], 0)) for batch in batches)


@pytest.mark.parametrize("gradients", [False, True])
def test_from_any_place_the_rest_is_the_same(cache, gradients: bool) -> None:
    cursors, batches = [], []
    with cache.batches(SITE, 64, seed=5, buffer_tokens=500, gradients=gradients) as shuffled:
        for _ in range(2 * cache.tokens // 64):
            cursors.append(shuffled.cursor)
            batches.append(next(shuffled))
    assert cursors[-1].epoch >= 1 and len(set(cursors)) == len(cursors)
    for at in [0, 1, 7, 8, len(cursors) // 2, len(cursors) // 2 + 1, len(cursors) - 1]:
        with cache.batches(SITE, 64, seed=5, buffer_tokens=500, gradients=gradients, start=cursors[at]) as shuffled:
            for cursor, wanted in list(zip(cursors, batches, strict=True))[at:]:
                assert shuffled.cursor == cursor
                found = next(shuffled)
                assert torch.equal(found.values, wanted.values) and torch.equal(found.rows, wanted.rows)


def test_a_place_that_is_none_is_refused(cache) -> None:
    for start, message in ((Cursor(0, 99, 0), "no group 99"), (Cursor(0, 0, 3), "no batch of 64 tokens begins at 3")):
        with pytest.raises(SaelabError, match=message):
            read(cache, 64, start=start)


def test_the_order_follows_from_the_seed_alone(cache, monkeypatch) -> None:
    first = places(read(cache, 64))
    monkeypatch.setattr(blocks, "_AHEAD", 0)
    assert places(read(cache, 64)) == first
    assert places(read(cache, 50)) == first, "not from the size of the batches"
    assert places(read(cache, 64, seed=1)) != first
    second = places(read(cache, 64, epochs=2))[len(first) :]
    assert sorted(second) == sorted(first) and second != first


def test_groups_are_of_one_size_and_carry_nothing_over(cache) -> None:
    """That is why a cursor is all there is to know of a place: what is handed out in a group is that group's blocks."""
    in_order = [places([batch]) for batch in cache.in_order(SITE)]
    with cache.batches(SITE, 64, seed=0, buffer_tokens=500) as shuffled:
        groups = shuffled.groups(0)
        assert max(map(len, groups)) - min(map(len, groups)) <= 1 and max(map(len, groups)) * 50 <= 500
        found: list[list[tuple[int, int]]] = [[] for _ in groups]
        while shuffled.cursor.epoch == 0:
            group = shuffled.cursor.group
            found[group] += places([next(shuffled)])
    assert len(groups) > 4 and sorted(np.concatenate(groups).tolist()) == list(range(cache.n_blocks))
    for group, handed_out in zip(groups, found, strict=True):
        assert sorted(handed_out) == sorted(place for number in group for place in in_order[number])


def test_neighbours_are_far_apart_and_order_tells_nothing(tmp_path: Path) -> None:
    """Blocks of 50 tokens, groups of 40 blocks: two neighbours of a row share a batch of 64 about as often as chance
    says within a group (64 / 2000); where a token was written says nothing about when it is read (rank correlation)."""
    write(tmp_path, identity(tokens=40_000, sites={SITE: 8}))
    cache = open_cache(tmp_path)
    correlations, together = [], []
    for seed in range(5):
        batches = read(cache, 64, seed=seed, buffer_tokens=2000)
        order = places(batches)
        batch_of = {place: i for i, batch in enumerate(batches) for place in places([batch])}
        pairs = [(a, b) for a in order if (b := (a[0], a[1] + 1)) in batch_of]
        together.append(np.mean([batch_of[a] == batch_of[b] for a, b in pairs]))
        written = {place: i for i, place in enumerate(sorted(order))}
        correlations.append(np.corrcoef([written[place] for place in order], np.arange(len(order)))[0, 1])
    assert np.mean(together) < 2 * 64 / 2000
    assert np.abs(correlations).max() < 4 / np.sqrt(cache.n_blocks), "what shuffling whole blocks alone would give"


@pytest.mark.parametrize(("site", "message"), [("blocks.0.hook_resid_pst", "Nearest: blocks.0.hook_resid_post")])
def test_a_site_that_is_not_there(cache, site: str, message: str) -> None:
    with pytest.raises(SaelabError, match=message):
        cache.batches(site, 64, seed=0)


def test_gradients_that_are_not_there(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(SaelabError, match=r"holds no gradients; `cache\.gradients=true`"):
        open_cache(tmp_path).batches(SITE, 64, seed=0, gradients=True)


def test_a_cache_that_is_not_finished_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(SaelabError, match="no activation cache"):
        open_cache(tmp_path / "nowhere")
    (tmp_path / "unfinished").mkdir()
    with pytest.raises(SaelabError, match="not finished; `saelab cache` continues"):
        open_cache(tmp_path)


def test_a_read_that_fails_is_told_when_its_tokens_are_due(tmp_path: Path) -> None:
    """The next group is read while one is handed out: an error in it must not spoil what was good."""
    write(tmp_path, identity(tokens=3000))
    cache = open_cache(tmp_path)
    with cache.batches(SITE, 64, seed=0, buffer_tokens=500) as shuffled:
        last = cache._block(shuffled.groups(0)[-1][0])
    path = tmp_path / SITE / f"{last.shard['name']}.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) - (last.shard["tokens"] - last.start) * 32] ^= 1
    path.write_bytes(data)
    seen = 0
    with open_cache(tmp_path).batches(SITE, 64, seed=0, buffer_tokens=500) as shuffled:
        n_groups = len(shuffled.groups(0))
        with pytest.raises(SaelabError, match=rf"{path}: block {last.number} \(tokens"):  # noqa: PT012
            for batch in shuffled:
                seen += len(batch)
    assert cache.tokens > seen > cache.tokens * (n_groups - 1) / n_groups - 100


OPEN = """
import sys
from pathlib import Path
from saelab.activations.cache.reader import open_cache

def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = status("VmRSS")
cache = open_cache(sys.argv[1])
print(status("VmHWM") - before, status("VmRSS") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's account of a process")
def test_what_is_known_of_each_block_of_a_large_cache_takes_little_memory(tmp_path: Path) -> None:
    """Some 26 MB for 5 * 10^8 tokens, 46 MB while it is opened; the files have their length and take no room."""
    n, random = 130_560, np.random.default_rng(0)
    facts = identity(sites={"made.up": 768}, dtype="bfloat16", context=256, block_tokens=1024, tokens=5 * 10**8)
    shards = []
    for index in range(-(-facts["tokens"] // n)):
        name, entries = shard_name(0, index), {}
        for file in files_of(facts):
            path = tmp_path / file.path(name)
            path.parent.mkdir(exist_ok=True)
            path.touch()
            os.truncate(path, file.size(n))
            checksums = {"sha256": random.bytes(32).hex(), "blocks": random.bytes(8 * -(-n // 1024)).hex()}
            entries[file.path(name)] = {"bytes": file.size(n), **checksums}
        before = " ".join(map(str, random.integers(0, 50_000, 127)))  # half a row
        start = {"before": before, "window": index // 40, "documents": index % 100, "rows": 3, "check": "0" * 32}
        counts = {"tokens": n, "rows": 512, "skipped": 0, "first_row": 512 * index}
        shards.append({"name": name, **counts, "start": start, "files": entries})
    (tmp_path / MANIFEST).write_bytes(Manifest(facts, shards).to_bytes())
    said = subprocess.run([sys.executable, "-c", OPEN, str(tmp_path)], capture_output=True, text=True, check=True)
    peak, kept = map(int, said.stdout.split())
    assert 10e6 < kept < 40e6 and kept <= peak < 65e6, (peak, kept)
