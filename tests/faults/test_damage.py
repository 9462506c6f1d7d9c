"""A cache whose files are not what was written: bytes flipped, cut off, missing, of another version."""

import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from saelab.activations.cache.layout import MANIFEST, UNFINISHED, Manifest, read_manifest
from saelab.activations.cache.reader import open_cache
from saelab.activations.cache.writer import check, rewrite
from saelab.errors import SaelabError
from saelab.runs.cache import cache as write_cache
from tests.activations.cache import made
from tests.faults.tools import (
    command,
    interrupt_after,
    made_by_command,
    read_an_epoch,
    stamps,
    the_one_error,
    tree,
)

FACTS = made.identity(gradients=True, lanes=2, dtype="bfloat16", tokens=400)
GRADIENTS = f"{made.SITE}/01-00000.gradients.safetensors"
ACTIVATIONS = f"{made.SITE}/00-00001.safetensors"
TOKENS = "tokens/01-00001.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of two sites, gradients, two lanes of two shards. Tests that damage it restore it."""
    folder = tmp_path_factory.mktemp("damage") / "cache"
    assert len(made.write(folder, FACTS).shards) == 4
    return folder


@pytest.fixture
def cache(whole: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "cache"))


def files(folder: Path) -> list[str]:
    return [path for shard in read_manifest(folder).shards for path in shard["files"]]


def flip(path: Path, at: int, mask: int = 0x01) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ mask]))


def faults(folder: Path, manifest: Manifest) -> dict[str, str]:
    """Messages of a verification, by shard."""
    return {shard["name"]: fault for shard, fault in check(folder, manifest, contents=True) if fault}


def assert_found(folder: Path, path: str) -> None:
    """Reading an epoch is an error, verifying finds one shard, and both name the file."""
    with pytest.raises(SaelabError) as error:
        read_an_epoch(folder)
    assert str(folder / path) in str(error.value) and "run `saelab cache` again" in str(error.value)
    (found,) = faults(folder, read_manifest(folder)).items()
    assert found[0] in path and str(folder / path) in found[1]


def assert_repaired(folder: Path, path: str, whole: Path) -> None:
    """Writing again gives the original bytes, and changes only files of the shard of `path`."""
    before = stamps(folder)
    made.write(folder, FACTS)
    assert tree(folder) == tree(whole)
    shard = Path(path).name.split(".")[0]
    after = stamps(folder)
    for other in after:
        assert (after[other] == before.get(other)) == (Path(other).name.split(".")[0] != shard), other
    assert read_an_epoch(folder) == read_manifest(folder).tokens


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(file=st.integers(0, 19), fraction=st.floats(0, 1, exclude_max=True), mask=st.sampled_from([0x01, 0x80, 0xFF]))
@example(file=0, fraction=0.0, mask=0x01)
@example(file=1, fraction=0.0, mask=0x80)
@example(file=7, fraction=0.9999999, mask=0x01)
@example(file=19, fraction=0.9999999, mask=0x80)
def test_a_flipped_byte_anywhere_is_found(whole: Path, file: int, fraction: float, mask: int) -> None:
    """Guaranteed: whichever bit of whichever file of a shard changes, reading an epoch is an error that names the file,
    and so is verifying; nothing is handed out as if it were the activations."""
    paths = files(whole)
    assert len(paths) == 20
    path = whole / paths[file]
    at = int(fraction * path.stat().st_size)
    content = path.read_bytes()
    flip(path, at, mask)
    try:
        assert_found(whole, paths[file])
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("path", [TOKENS, ACTIVATIONS, GRADIENTS])
def test_every_byte_of_a_header_counts(path: str, whole: Path) -> None:
    """Guaranteed: no byte of a file's header, its length and its padding included, may differ from what was written."""
    content = (whole / path).read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    try:
        for at in range(length):
            flip(whole / path, at)
            with pytest.raises(SaelabError, match="header"):
                read_an_epoch(whole)
            (whole / path).write_bytes(content)
    finally:
        (whole / path).write_bytes(content)


def first_byte(path: Path) -> None:
    flip(path, 0)


def last_byte(path: Path) -> None:
    flip(path, path.stat().st_size - 1)


def cut_by_one(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def cut_to_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def cut_to_nothing(path: Path) -> None:
    os.truncate(path, 0)


def one_byte_more(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 1)


def missing(path: Path) -> None:
    path.unlink()


def a_link_to_nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


DAMAGES = [
    first_byte,
    last_byte,
    cut_by_one,
    cut_to_half,
    cut_to_nothing,
    one_byte_more,
    missing,
    a_link_to_nowhere,
]


@pytest.mark.parametrize("path", [TOKENS, ACTIVATIONS, GRADIENTS])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_named_and_writing_again_repairs_only_it(
    damage: Callable[[Path], None], path: str, cache: Path, whole: Path
) -> None:
    """Guaranteed: a shard with a byte flipped, bytes cut off, bytes added or a file missing is an error that names the
    file, when the cache is read and when it is verified; writing again writes this shard and nothing else, and the
    cache then has the original bytes."""
    damage(cache / path)
    assert_found(cache, path)
    assert_repaired(cache, path, whole)


def test_several_damaged_shards_are_all_repaired(cache: Path, whole: Path) -> None:
    """Guaranteed: writing again repairs all damaged files, of one shard or of several."""
    last_byte(cache / TOKENS)
    missing(cache / ACTIVATIONS)
    cut_to_half(cache / GRADIENTS)
    first_byte(cache / GRADIENTS.replace("gradients.", ""))
    assert sorted(faults(cache, read_manifest(cache))) == ["00-00001", "01-00000", "01-00001"]
    made.write(cache, FACTS)
    assert tree(cache) == tree(whole)


def test_a_missing_folder_is_repaired(cache: Path, whole: Path) -> None:
    """Guaranteed: if all files of a site are missing, with their folder, reading is an error, and writing again writes
    the shards again."""
    shutil.rmtree(cache / made.SITE)
    with pytest.raises(SaelabError, match=f"{made.SITE}/00-00000"):
        open_cache(cache)
    made.write(cache, FACTS)
    assert tree(cache) == tree(whole)


def test_a_shard_cut_off_before_the_cache_is_finished_is_repaired(tmp_path: Path, whole: Path) -> None:
    """Guaranteed: if writing was interrupted and a finished shard is damaged, continuing writes it again."""
    interrupt_after(4, tmp_path / "cache", FACTS)
    cut_to_half(tmp_path / "cache" / made.SITE / "00-00000.safetensors")
    (tmp_path / "cache" / "tokens" / "00-00000.safetensors").unlink()
    made.write(tmp_path / "cache", FACTS)
    assert tree(tmp_path / "cache") == tree(whole)


@pytest.mark.parametrize("name", ["identity.json", "00-00000.json", "00-00001.json", "00-ended.json", "01-00000.json"])
def test_a_damaged_record_of_an_unfinished_cache_is_an_error(name: str, tmp_path: Path) -> None:
    """Guaranteed: a flipped byte anywhere in a record of an unfinished cache, or a part cut off, is an error that names
    the file and what to do. If that is to delete it, nothing is lost or doubled."""
    stop, folder = 13, tmp_path / "cache"
    whole = made.write(tmp_path / "whole", FACTS, stop=stop)
    assert [shard["name"] for shard in whole.shards] == ["00-00000", "00-00001", "01-00000", "01-00001"]
    interrupt_after(7, folder, FACTS, stop=stop)  # one lane has come to the end of its text, the other has not
    record = folder / UNFINISHED / name
    before = record.read_bytes()
    for at in range(len(before)):
        flip(record, at)
        with pytest.raises(SaelabError, match=f"{name}: damaged; delete "):
            made.write(folder, FACTS, stop=stop)
        flip(record, at)
    cut_to_half(record)
    with pytest.raises(SaelabError, match=f"{name}: damaged; delete "):
        made.write(folder, FACTS, stop=stop)
    if name != "identity.json":
        record.unlink()
        made.write(folder, FACTS, stop=stop)
        assert tree(folder) == tree(tmp_path / "whole")


def test_repair_from_another_text_changes_nothing(tmp_path: Path, cache: Path) -> None:
    """Guaranteed: if the text has changed in a way that its fingerprint does not show, a damaged shard is not written
    again from it, and the cache stays as it is."""
    facts, name = read_manifest(cache).identity, "00-00001"
    (cache / ACTIVATIONS).unlink()
    before = tree(cache)

    class Other(made.Rows):
        def __next__(self) -> np.ndarray:
            ids = super().__next__()
            ids[1] += 1
            return ids

    with pytest.raises(SaelabError, match=f"the text has changed: shard {name} cannot be written again"):
        list(rewrite(cache, read_manifest(cache), name, Other, made.forward(facts)))
    assert tree(cache) == before


def test_damage_is_found_while_training_reads(cache: Path) -> None:
    """Guaranteed: a byte that flips while a cache is being read is an error the next time the byte is read, not only
    when the cache is opened."""
    opened = open_cache(cache)
    with opened.batches(made.SITE, 64, seed=0, buffer_tokens=50) as batches:
        while batches.cursor.epoch == 0:
            next(batches)
        last_byte(cache / ACTIVATIONS)
        with pytest.raises(SaelabError, match=ACTIVATIONS):
            list(islice(batches, opened.tokens))
    with pytest.raises(SaelabError, match="checksum"):
        list(opened.in_order(made.SITE))


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_a_manifest_of_another_version_is_refused(version: object, cache: Path) -> None:
    """Guaranteed: a manifest of another version of the format is an error that says which version it is, when the cache
    is read and when it is written into; nothing in it is touched."""
    content = json.loads((cache / MANIFEST).read_bytes())
    (cache / MANIFEST).write_text(json.dumps(content | {"version": version}, indent=1) + "\n")
    before = stamps(cache)
    for use in (read_an_epoch, lambda folder: made.write(folder, FACTS)):
        with pytest.raises(SaelabError) as error:
            use(cache)
        assert str(cache / MANIFEST) in str(error.value) and f"version {version!r}" in str(error.value)
    assert stamps(cache) == before


@settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(fraction=st.floats(0, 1, exclude_max=True), mask=st.sampled_from([0x01, 0x80, 0xFF]), cut=st.booleans())
@example(fraction=0.0, mask=0x01, cut=True)
@example(fraction=0.9999999, mask=0x01, cut=True)
def test_a_damaged_manifest_is_refused(whole: Path, fraction: float, mask: int, cut: bool) -> None:
    """Guaranteed: a manifest with any byte flipped, or cut off anywhere, is an error that names it, unless its
    content is the same (a blank between its fields); nothing is read or written with it."""
    path = whole / MANIFEST
    content, manifest = path.read_bytes(), read_manifest(whole)
    at = int(fraction * len(content))
    if cut:
        path.write_bytes(content[:at])
    else:
        flip(path, at, mask)
    try:
        with suppress(SaelabError):
            assert read_manifest(whole) == manifest
            return  # its content is the same
        for use in (read_manifest, open_cache, lambda folder: made.write(folder, FACTS)):
            with pytest.raises(SaelabError, match=f"^{re.escape(str(path))}: "):
                use(whole)
    finally:
        path.write_bytes(content)


@pytest.fixture(scope="module")
def from_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config and the cache that the stage wrote from it."""
    folder = tmp_path_factory.mktemp("command")
    write_cache(made_by_command(folder), folder / "cache")
    return folder


def other_version(path: Path) -> None:
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))


@pytest.mark.parametrize(
    ("damage", "path"),
    [
        (last_byte, "blocks.0.attn.hook_z/00-00001.safetensors"),
        (cut_to_half, "blocks.1.hook_resid_post/00-00000.gradients.safetensors"),
        (missing, "tokens/00-00002.safetensors"),
        (other_version, MANIFEST),
        (cut_to_half, MANIFEST),
    ],
)
def test_the_commands_name_what_is_damaged(
    damage: Callable[[Path], None],
    path: str,
    from_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Guaranteed: `saelab cache --verify` of a damaged cache ends with exit code 2 and one message, which names the
    file; `saelab train` on it too, where it reads that file; `saelab cache` writes the shard again and nothing else, or
    refuses to touch a cache whose manifest it cannot go by."""
    cache = Path(shutil.copytree(from_model / "cache", tmp_path / "cache"))
    damage(cache / path)
    config, damaged, before = from_model / "config.json", tree(cache), stamps(cache)

    code, _, stderr = command(monkeypatch, capsys, "cache", "--verify", "--out", cache)
    assert code == 2 and the_one_error(stderr).startswith(f"error: {cache / path}: ")
    training = ("train", config, f"activations.cache={cache}", f"out={tmp_path / 'run'}")
    code, _, stderr = command(monkeypatch, capsys, *training)
    unread = path.startswith("blocks.0")  # the run's site is another
    assert code == 0 if unread else code == 2 and the_one_error(stderr).startswith(f"error: {cache / path}: ")
    assert tree(cache) == damaged and stamps(cache) == before

    code, _, stderr = command(monkeypatch, capsys, "cache", config, "--out", cache)
    if path == MANIFEST:
        assert code == 2 and the_one_error(stderr).startswith(f"error: {cache / path}: ")
        assert tree(cache) == damaged
        return
    assert code == 0 and f"{cache / path}: " in stderr and tree(cache) == tree(from_model / "cache")
    shard, after = Path(path).name.split(".")[0], stamps(cache)
    for other in after:
        assert (after[other] == before.get(other)) == (Path(other).name.split(".")[0] != shard), other
    code, stdout, _ = command(monkeypatch, capsys, "cache", "--verify", "--out", cache)
    assert code == 0 and "all as they were written" in stdout
