"""A cache holds the model's values at every ordinary token once, however often its writing was interrupted."""

import json
import os
from collections.abc import Callable, Mapping
from itertools import count, islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from saelab.activations.cache import layout
from saelab.activations.cache.layout import Manifest
from saelab.activations.cache.reader import open_cache
from saelab.activations.cache.writer import begin, check, finish, rewrite, write_lane
from saelab.activations.stream import Pass
from saelab.errors import SaelabError
from saelab.files import locked
from tests.activations.cache.made import BOS, CONTEXT, SITE, SITES, Rows, contents, forward, identity, values, write


def stored(folder: Path, manifest: Manifest, site: str, name: str = "activations") -> tuple[dict, torch.Tensor]:
    """The origins and the values of all shards, in order."""
    suffix = "" if name == "activations" else f".{name}"
    origins = [load_file(folder / "tokens" / f"{shard['name']}.safetensors") for shard in manifest.shards]
    tensors = [load_file(folder / site / f"{shard['name']}{suffix}.safetensors")[name] for shard in manifest.shards]
    return {key: torch.cat([o[key] for o in origins]) for key in layout.ORIGIN}, torch.cat(tensors)


@pytest.mark.parametrize("special_tokens", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_token_is_stored_once_with_its_values(dtype: str, special_tokens: bool, tmp_path: Path) -> None:
    facts = identity(dtype=dtype, gradients=True, special_tokens=special_tokens)
    manifest = write(tmp_path, facts)
    n_rows = sum(shard["rows"] for shard in manifest.shards)
    ids = torch.from_numpy(np.stack([next(rows) for rows in [Rows(0)] for _ in range(n_rows)]))
    kept = torch.ones_like(ids, dtype=torch.bool) if special_tokens else ids != BOS
    row, position = kept.nonzero(as_tuple=True)
    for salt, (site, d_in) in enumerate(SITES.items()):
        origin, x = stored(tmp_path, manifest, site)
        for name, expected in (("rows", row), ("positions", position), ("tokens", ids[kept])):
            assert torch.equal(origin[name].long(), expected.long())
        full = values(ids[kept], d_in, salt)
        assert torch.equal(x, full.to(getattr(torch, dtype)))
        _, g = stored(tmp_path, manifest, site, "gradients")
        assert torch.equal(g, (full.flip(1) / 1000).to(torch.float32 if dtype == "float32" else torch.bfloat16))


@pytest.mark.parametrize("stop", [1, 4, 13, 12, 24])
def test_the_cache_ends_with_the_text(stop: int, tmp_path: Path) -> None:
    manifest = write(tmp_path, identity(tokens=10**9), stop=stop)
    assert sum(shard["rows"] for shard in manifest.shards) == stop
    origin, _ = stored(tmp_path, manifest, SITE)
    assert origin["rows"].max() == stop - 1


def test_without_a_token_there_is_no_cache(tmp_path: Path) -> None:
    with pytest.raises(SaelabError, match="no token to store"):
        write(tmp_path, stop=0)
    assert not (tmp_path / layout.MANIFEST).exists()


@pytest.mark.parametrize(
    ("what", "message"),
    [("special", "rows one after the other hold special"), ("nan", "nothing to store: all tokens of")],
)
@pytest.mark.parametrize("lanes", [1, 2])
def test_an_endless_text_that_gives_nothing_ends_with_a_message(
    what: str, message: str, lanes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("stream", "cache.writer"):
        monkeypatch.setattr(f"saelab.activations.{module}.BARREN_ROWS", 40)
    facts, read = identity(nonfinite="skip", tokens=10**9, lanes=lanes), [0]

    def run(block: np.ndarray) -> Pass:
        """Nothing to keep after the first ten passes."""
        read[0] += len(block)
        kept, found, slopes = forward(facts)(block)
        if read[0] <= 40:
            return Pass(kept, found, slopes)
        if what == "nan":
            return Pass(kept, {site: value * torch.nan for site, value in found.items()}, slopes)
        return Pass(torch.zeros_like(kept), {site: value[:0] for site, value in found.items()}, slopes)

    with pytest.raises(SaelabError, match=message):
        write(tmp_path, facts, run)
    assert read[0] == 80


def test_a_cache_with_empty_shards_is_read_as_one_without(tmp_path: Path) -> None:
    facts = identity(passes_per_shard=1, tokens=200)

    def run(block: np.ndarray) -> Pass:
        kept, found, slopes = forward(facts)(block)
        if block[0, 1] % 2:
            return Pass(kept, found, slopes)
        return Pass(torch.zeros_like(kept), {site: value[:0] for site, value in found.items()}, slopes)

    manifest = write(tmp_path, facts, run)
    assert {0} < {shard["tokens"] for shard in manifest.shards}
    with open_cache(tmp_path).batches(SITE, 50, seed=0, buffer_tokens=100) as batches:
        tokens = sum(len(batch) for batch in islice(batches, 20))
        assert tokens > manifest.tokens and batches.cursor.epoch > 0
    assert sum(map(len, open_cache(tmp_path).in_order(SITE))) == manifest.tokens


@pytest.mark.parametrize("lanes", [2, 3])
def test_lanes_may_be_written_in_any_order(lanes: int, tmp_path: Path) -> None:
    facts = identity(lanes=lanes)
    manifest = write(tmp_path / "one", facts)
    begin(tmp_path / "many", facts)
    for lane in reversed(range(lanes)):
        for _ in write_lane(tmp_path / "many", facts, lane, Rows, forward(facts)):
            pass
    finish(tmp_path / "many", facts)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")
    origin, _ = stored(tmp_path / "one", manifest, SITE)
    pairs = list(zip(origin["rows"].tolist(), origin["positions"].tolist(), strict=True))
    assert len(set(pairs)) == len(pairs) and {row % lanes for row, _ in pairs} == set(range(lanes))
    assert manifest.tokens >= facts["tokens"] > manifest.tokens - lanes * facts["rows_per_forward"] * CONTEXT


@pytest.mark.parametrize("passes", [0, 1, 2, 3, 4, 7, 11])
def test_writing_resumed_after_a_failure_gives_the_same_bytes(passes: int, tmp_path: Path) -> None:
    write(tmp_path / "whole")
    ran = 0

    def fails(block: np.ndarray) -> Pass:
        nonlocal ran
        if ran == passes:
            raise RuntimeError("the model broke")
        ran += 1
        return forward(identity())(block)

    with pytest.raises(RuntimeError, match="the model broke"):
        write(tmp_path / "broken", run=fails)
    assert len(list((tmp_path / "broken" / layout.UNFINISHED).glob("0*.json"))) == passes // 3
    again = 0

    def counts(block: np.ndarray) -> Pass:
        nonlocal again
        again += 1
        return forward(identity())(block)

    manifest = write(tmp_path / "broken", run=counts)
    assert contents(tmp_path / "whole") == contents(tmp_path / "broken")
    total = sum(shard["rows"] for shard in manifest.shards) // identity()["rows_per_forward"]
    assert again <= total - passes // 3 * 3, "no finished shard is made again"


def test_an_error_in_the_text_is_raised_and_finished_shards_stay(tmp_path: Path) -> None:
    class Bad(Rows):
        def __next__(self) -> np.ndarray:
            if self.row == 40:
                raise SaelabError("corpus: bad row")
            return super().__next__()

    facts = identity()
    begin(tmp_path, facts)
    with pytest.raises(SaelabError, match="bad row"):
        for _ in write_lane(tmp_path, facts, 0, Bad, forward(facts)):
            pass
    assert len(list((tmp_path / layout.UNFINISHED).glob("0*.json"))) == 3
    write(tmp_path)
    write(tmp_path.parent / "whole")
    assert contents(tmp_path) == contents(tmp_path.parent / "whole")


def with_nan(facts: Mapping[str, Any], token: int, site: str, what: str, value: float):
    """A model whose `what` at `site` holds `value` wherever the token id is `token`."""

    def run(block: np.ndarray) -> Pass:
        result = forward(facts)(block)
        ids = torch.from_numpy(block)[result.kept]
        of = result.activations if what == "activations" else result.gradients
        of[site][ids == token, 3] = value
        return result

    return run


BAD = int(list(islice(Rows(0), 18))[17][5])
"""A token id that occurs in the text."""


def first_occurrence(token: int) -> tuple[int, int]:
    """Row and position of the first occurrence of a token id."""
    for row, ids in enumerate(Rows(0)):
        if token in ids:
            return row, ids.tolist().index(token)
    raise AssertionError


@pytest.mark.parametrize("what", ["activations", "gradients"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_an_error_that_says_where(what: str, value: float, tmp_path: Path) -> None:
    facts = identity(gradients=True)
    site = list(SITES)[1]
    row, position = first_occurrence(BAD)
    message = rf"{site}: made up gives NaN or infinite {what} at row {row}, position {position}, as torch.float32"
    with pytest.raises(SaelabError, match=message):
        write(tmp_path, facts, with_nan(facts, BAD, site, what, value))
    assert not (tmp_path / layout.MANIFEST).exists()


def test_a_value_that_the_dtype_cannot_hold_is_not_finite(tmp_path: Path) -> None:
    facts = identity(dtype="float16")
    row, position = first_occurrence(BAD)
    message = rf"row {row}, position {position}, as torch.float16 stores them; a wider dtype"
    with pytest.raises(SaelabError, match=message):
        write(tmp_path, facts, with_nan(facts, BAD, SITE, "activations", 1e6))


def test_large_finite_values_whose_sum_overflows_are_stored(tmp_path: Path) -> None:
    facts = identity()
    manifest = write(tmp_path, facts, with_nan(facts, BAD, SITE, "activations", 3e38))
    assert not sum(shard["skipped"] for shard in manifest.shards)


def test_skipped_tokens_are_in_no_file_and_are_counted(tmp_path: Path) -> None:
    facts = identity(nonfinite="skip", gradients=True)
    manifest = write(tmp_path, facts, with_nan(facts, BAD, SITE, "gradients", float("nan")))
    plain = write(tmp_path.parent / "plain", identity(gradients=True))
    origin, x = stored(tmp_path, manifest, SITE)
    everything, _ = stored(tmp_path.parent / "plain", plain, SITE)
    count = int((everything["tokens"] == BAD).sum())
    assert count and sum(shard["skipped"] for shard in manifest.shards) == count
    assert BAD not in origin["tokens"].tolist() and torch.isfinite(x).all()
    assert torch.equal(x, values(origin["tokens"], SITES[SITE], 0)), "remaining values still belong to their tokens"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "its seed 0, not 1"),
        ({"corpus": {"text": "1"}}, "its corpus.text '0', not '1'"),
        ({"sites": {SITE: 8}}, r"its sites\.blocks\.1\.attn\.hook_z 12, not None"),
        ({"tokens": 2000}, "its tokens 1000, not 2000"),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_a_cache_of_something_else_is_not_touched(changes, message: str, finished: bool, tmp_path: Path) -> None:
    facts = identity()
    begin(tmp_path, facts)
    for _ in write_lane(tmp_path, facts, 0, Rows, forward(facts)):
        pass
    if finished:
        finish(tmp_path, facts)
    before = contents(tmp_path)
    with pytest.raises(SaelabError, match=message):
        begin(tmp_path, identity(**changes))
    assert contents(tmp_path) == before


def test_before_a_shard_is_finished_another_cache_may_be_written(tmp_path: Path) -> None:
    """The advice in an error message, such as `cache.nonfinite=skip`, works in the same folder."""
    facts = identity()
    with pytest.raises(SaelabError, match="NaN"):
        write(tmp_path / "cache", facts, with_nan(facts, int(next(Rows(0))[3]), SITE, "activations", float("nan")))
    other = identity(seed=1, sites={SITE: 8})
    write(tmp_path / "cache", other)
    write(tmp_path / "whole", other)
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")
    assert not (tmp_path / "cache" / list(SITES)[1]).exists()


def test_a_cache_is_finished_only_when_every_lane_is(tmp_path: Path) -> None:
    facts = identity(lanes=2)
    begin(tmp_path, facts)
    for _ in write_lane(tmp_path, facts, 1, Rows, forward(facts)):
        pass
    with pytest.raises(SaelabError, match="lane 0 is not finished"):
        finish(tmp_path, facts)


def test_a_folder_that_is_not_a_cache_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SaelabError, match="exists and is not an activation cache"):
        begin(tmp_path, identity())
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_only_one_writer_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(SaelabError, match="another process is writing"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_a_shard_written_again_on_another_machine_is_recorded_in_the_manifest(tmp_path: Path) -> None:
    facts = identity()
    manifest = write(tmp_path, facts)
    before = contents(tmp_path)
    name = manifest.shards[2]["name"]

    def slightly_other(block: np.ndarray) -> Pass:
        result = forward(facts)(block)
        return result._replace(activations={site: x + 1e-3 for site, x in result.activations.items()})

    for _ in rewrite(tmp_path, manifest, name, Rows, slightly_other):
        pass
    after = contents(tmp_path)
    changed = {path for path in before if before[path] != after[path]}
    assert changed == {layout.MANIFEST, *(f"{site}/{name}.safetensors" for site in SITES)}
    assert all(fault is None for _, fault in check(tmp_path, layout.read_manifest(tmp_path), contents=True))


def test_a_shard_is_not_written_again_from_another_text(tmp_path: Path) -> None:
    manifest = write(tmp_path)

    def shorter(lane: int, start: Mapping[str, Any] | None) -> Rows:
        return Rows(lane, start, stop=13)

    with pytest.raises(SaelabError, match="the text has changed"):
        for _ in rewrite(tmp_path, manifest, manifest.shards[1]["name"], shorter, forward(identity())):
            pass


def test_memory_is_for_two_shards_at_most(tmp_path: Path) -> None:
    """The size of the buffers is a shard's, or less if fewer tokens are requested."""
    from saelab.activations.cache.shard import Shards

    for tokens, passes in ((10**9, 3), (10, 2)):
        with Shards(tmp_path, identity(), tokens) as shards:
            shard = shards.next("00-00000", 0, 0, {})
            assert all(len(column) == passes * 4 * CONTEXT for columns in shard.columns.values() for column in columns)


def test_the_record_of_a_shard_says_where_to_resume(tmp_path: Path) -> None:
    facts = identity()
    begin(tmp_path, facts)
    for _ in write_lane(tmp_path, facts, 0, Rows, forward(facts)):
        pass
    records = [json.loads(path.read_bytes()) for path in sorted((tmp_path / layout.UNFINISHED).glob("0*.json"))]
    for record, following in pairwise(records):
        assert record["next"] == following["start"] == {"row": following["first_row"]}


class Call(NamedTuple):
    """A system call with its beginning and end: it is before another call if it ended when the other began."""

    name: str
    path: str
    """The first argument, or the new name for a replace."""
    inode: int
    """Inode of the file or folder that is written, synced or renamed."""
    folder: int
    """Inode of the folder of a replace's new name."""
    began: int
    ended: int

    def before(self, other: "Call") -> bool:
        return self.ended < other.began


def calls_of(work: Callable[[], Any]) -> list[Call]:
    """The calls by which `work` changes the disk, in any thread."""
    ticks, calls = count(), list[Call]()

    def noted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            path, inode, folder = "", 0, 0
            if name in ("write", "fsync"):
                inode = os.fstat(arguments[0]).st_ino
            elif name == "replace":
                path, inode = str(arguments[1]), os.stat(arguments[0]).st_ino
                folder = os.stat(Path(path).parent).st_ino
            began = next(ticks)
            result = original(*arguments, **named)
            calls.append(Call(name, path or str(arguments[0]), inode, folder, began, next(ticks)))
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("write", "fsync", "replace", "unlink", "rmdir"):
            patch.setattr(os, name, noted(name, getattr(os, name)))
        work()
    return calls


def test_nothing_has_its_name_before_it_is_on_the_disk(tmp_path: Path) -> None:
    """Only a loss of power shows which bytes are on the disk and which are still in the system's memory; a kill, as in
    tests/faults/test_kill.py, does not. So this test looks at the order of the calls."""
    manifests: list[Manifest] = []
    calls = calls_of(lambda: manifests.append(write(tmp_path, identity(gradients=True, lanes=2))))
    renames = {str(Path(call.path).relative_to(tmp_path)): call for call in calls if call.name == "replace"}
    synced = [call for call in calls if call.name == "fsync"]
    removed = [call for call in calls if call.name in ("unlink", "rmdir")]
    shards = {f"{layout.UNFINISHED}/{shard['name']}.json": shard["files"] for shard in manifests[0].shards}
    files = {path for of_shard in shards.values() for path in of_shard}
    first = f"{layout.UNFINISHED}/{layout.IDENTITY}"
    assert len(shards) > 4 and set(renames) == {first, *shards, *files, layout.MANIFEST}
    assert len(renames) == sum(call.name == "replace" for call in calls) and len(removed) > len(shards)

    for path, rename in renames.items():
        writes = [call for call in calls if call.name == "write" and call.inode == rename.inode]
        whole = [sync for sync in synced if sync.inode == rename.inode and all(w.before(sync) for w in writes)]
        assert writes and any(sync.before(rename) for sync in whole), f"{path} had its name before its bytes"

    def name_is_kept(rename: Call, then: Call) -> bool:
        """Whether the folder is on the disk, with the new name in it, before `then`."""
        return any(rename.before(sync) and sync.inode == rename.folder and sync.before(then) for sync in synced)

    manifest = renames[layout.MANIFEST]
    for record, of_shard in shards.items():
        for path in of_shard:
            assert name_is_kept(renames[path], renames[record]), f"{record} was there before the name of {path}"
        assert name_is_kept(renames[first], renames[record]), f"{record} was there before the name of {first}"
        assert name_is_kept(renames[record], manifest), f"the manifest was there before the name of {record}"
    for call in removed:
        assert name_is_kept(manifest, call), f"{call.path} was removed before the cache was whole"
    root = tmp_path.stat().st_ino  # without its folders' names on the disk, a shard is lost
    assert any(sync.inode == root and sync.before(renames[next(iter(shards))]) for sync in synced)
