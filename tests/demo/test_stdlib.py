"""The demo's corpus: each text once, on one side, the same for everybody who has the same library."""

import hashlib

import pytest

from saelab.demo.stdlib import MAX_SHARED, read_stdlib
from saelab.errors import SaelabError


@pytest.fixture(scope="module")
def library():
    return read_stdlib()


def words(seed: str, n: int = 200) -> str:
    """Source-like text that shares nothing with that of another seed."""
    return " ".join("w" + hashlib.sha256(f"{seed} {i}".encode()).hexdigest()[:8] for i in range(n))


@pytest.fixture
def folder(tmp_path):
    for index in range(60):
        (tmp_path / f"module_{index}.py").write_text(words(str(index)))
    return tmp_path


def test_sides_share_no_name_and_no_text(library):
    assert not library.train.keys() & library.held_out.keys()
    assert not set(library.train.values()) & set(library.held_out.values())
    files = [text for name, text in {**library.train, **library.held_out}.items() if name.endswith(".py")]
    assert len(files) == len(set(files))


def test_tables_tests_and_packages_are_left_out(library):
    names = [*library.train, *library.held_out]
    assert not [n for n in names if n.startswith(("encodings/", "test/")) or "/tests/" in n or "site-packages" in n]
    assert any(name.startswith("pydoc_data/topics/") for name in names)
    assert "pydoc_data/topics.py" not in names


def test_there_is_enough_held_out_text_for_the_reported_figures(library):
    characters = sum(map(len, library.held_out.values()))
    assert characters > 4 * 300_000, "some 4 characters a token"
    assert characters < 0.5 * sum(map(len, library.train.values()))


def test_dropped_files_are_the_near_copies(library):
    assert all(share > MAX_SHARED for share in library.dropped.values())
    assert not library.dropped.keys() & library.held_out.keys()


def test_a_held_out_copy_of_training_text_is_dropped(folder):
    before = read_stdlib(folder)
    assert not before.dropped and before.train and before.held_out
    copied, original = next(iter(before.held_out)), next(iter(before.train.values()))
    (folder / copied).write_text(original + words("a little more", 10))
    after = read_stdlib(folder)
    assert after.dropped.keys() == {copied}
    assert after.train == before.train


def test_the_tests_of_the_library_only_ever_join_training(folder):
    before = read_stdlib(folder)
    (folder / "test").mkdir()
    for index in range(30):
        (folder / "test" / f"test_{index}.py").write_text(words(f"test {index}"))
    assert read_stdlib(folder) == before
    after = read_stdlib(folder, tests=True)
    assert after.held_out == before.held_out
    assert after.train.keys() - before.train.keys() == {f"test/test_{index}.py" for index in range(30)}


def test_adding_a_file_moves_no_other(folder):
    before = read_stdlib(folder)
    (folder / "new.py").write_text(words("new"))
    after = read_stdlib(folder)
    assert before.train.items() <= after.train.items() and before.held_out.items() <= after.held_out.items()


def test_a_library_without_sources_says_what_to_do(tmp_path):
    with pytest.raises(SaelabError, match="another corpus") as error:
        read_stdlib(tmp_path / "python311.zip")
    assert "python311.zip" in str(error.value)
