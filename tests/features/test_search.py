"""Search equals brute force over every character, token and stored entry."""

import re
import tracemalloc
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from saelab.errors import SaelabError
from saelab.features import matching, search
from saelab.features.database import Database, open_database
from saelab.features.search import match_of
from tests.features.dense import made_up, write_database

SPECIAL = (0, 1)
UNITS = (
    *([word] for word in (b"import", b" num", b"py", b" the", b"The", b"\n", b"(", b" x", b"aa", b"a", b"...", b"\0")),
    [b"\xe6\x97", b"\xa5", "\u672c\u8a9e".encode()],
    [b"\xe6", b"\x97", b"\xa5"],
    ["\u65e5\u672c".encode()],
    [b" caf\xc3", b"\xa9"],
    [" CAF\u00c9".encode()],
    [b"\xf0\x9f\x91\xa8\xe2\x80", b"\x8d\xf0\x9f", b"\x91\xa9"],
    ["\U0001f98a".encode()],
    [" \u05e9\u05dc\u05d5\u05dd".encode()],
    ["Stra\u00dfe".encode(), b" STRASSE"],
    [b"", b"end", b""],
    [b" num", b"", b"py"],
    [b"\xff"],
    [b"lo" + 50 * b"ng"],
)
VOCABULARY = [b"<s>", b"<|sep|>", *dict.fromkeys(token for unit in UNITS for token in unit), b"unused", b" Import"]
CONTEXT = 24


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Database:
    """A text of every kind of token; feature 7 is never active."""
    rng = np.random.default_rng(3)
    rows = []
    for number in range(30):
        row = [0] if number % 2 else []
        while len(row) < CONTEXT:
            unit = UNITS[rng.integers(len(UNITS))]
            row += [1] if rng.random() < 0.1 else [VOCABULARY.index(token) for token in unit]
        rows.append(row[:CONTEXT])
    tokens = np.array(rows)
    density = np.geomspace(0.4, 0.003, 40)
    z = rng.exponential(1.0, (*tokens.shape, 40)) * (rng.random((*tokens.shape, 40)) < density) * 1e3
    z[..., 7] = 0
    return open_database(
        write_database(tmp_path_factory.mktemp("run") / "features", z, tokens, VOCABULARY, special=SPECIAL)
    )


class Stretch(NamedTuple):
    """The text between two special tokens."""

    text: str
    tokens: list[tuple[int, ...]]
    """The places of the tokens that have a byte of each character."""


@pytest.fixture(scope="module")
def stretches(database: Database) -> list[Stretch]:
    found = []
    for row, ids in enumerate(database.facts.rows.tolist()):
        parts: list[list[int]] = [[]]
        for position, token in enumerate(ids):
            if token in SPECIAL:
                parts.append([])
            else:
                parts[-1].append(position)
        for part in parts:
            owners = [row * CONTEXT + p for p in part for _ in VOCABULARY[ids[p]]]
            text = b"".join(VOCABULARY[ids[p]] for p in part).decode("utf-8", "surrogateescape")
            tokens, begin = [], 0
            for character in text:
                stop = begin + len(character.encode("utf-8", "surrogateescape"))
                tokens.append(tuple(dict.fromkeys(owners[begin:stop])))
                begin = stop
            found.append(Stretch(text, tokens))
    return found


def spans(text: str, query: str) -> list[tuple[int, int]]:
    """All substrings that are the query in any case, or the matches of a /regex/ by Python's own package."""
    if query[0] == query[-1] == "/" and len(query) > 2:
        return [match.span() for match in re.finditer(query[1:-1], text) if match.group()]
    folded = query.casefold()
    return [
        (i, j)
        for i in range(len(text))
        for j in range(i + 1, min(len(text), i + len(folded)) + 1)
        if text[i:j].casefold() == folded
    ]


@pytest.fixture(scope="module")
def dense(database: Database) -> np.ndarray:
    """All stored activations ``[places, n_features]``."""
    z = np.zeros((database.facts.rows.size, database.n_features))
    for feature in range(database.n_features):
        active = database.facts.activations(feature)
        z[active.places, feature] = active.values
    return z


def assert_is_brute_force(database: Database, stretches: list[Stretch], z: np.ndarray, query: str) -> int:
    """Returns the number of matches."""
    found = database.search(query)
    matched, n = set(), 0
    for stretch in stretches:
        for first, stop in spans(stretch.text, query):
            matched.add(tuple(sorted({place for owners in stretch.tokens[first:stop] for place in owners})))
            n += 1
    places = sorted({place for tokens in matched for place in tokens})
    on_match = z[places].sum(0)
    assert found.matches is not None and found.matches.n == n and found.shares is not None
    assert sorted(found.features) == np.flatnonzero(on_match).tolist()
    shares = on_match / np.maximum(z.sum(0), 1)
    np.testing.assert_allclose(found.shares, shares[found.features], rtol=2e-3)
    assert (np.diff(found.shares) <= 0).all() and (found.shares <= 1).all()
    ends = {(tokens[0], tokens[-1]) for tokens in matched if tokens}
    for index, feature in enumerate(found.features.tolist()):
        match = match_of(database.facts, found, index)
        assert match is not None
        assert match.place == places[int(z[places, feature].argmax())]  # the earliest of equals
        assert (match.first, match.last) in ends and match.first <= match.place <= match.last
    return n


def sampled(stretches: list[Stretch], n: int) -> list[str]:
    """Pieces of the text in any case."""
    rng = np.random.default_rng(1)
    texts = [s.text for s in stretches if s.text]
    queries = []
    while len(queries) < n:
        text = texts[rng.integers(len(texts))]
        start = int(rng.integers(len(text)))
        query = text[start : start + int(rng.integers(1, 14))]
        query = [query, query.upper(), query.lower(), query.swapcase()][rng.integers(4)]
        if not (query.startswith("/") or "\udc80" <= max(query) <= "\udcff"):
            queries.append(query)
    return queries


def test_a_search_equals_brute_force_over_all_stored_activations(
    database: Database, stretches: list[Stretch], dense: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name, value in ((matching, "CHUNK", 5 * CONTEXT), (search, "CHUNK", 50), (search, "ENTRIES", 100)):
        monkeypatch.setattr(module, name, value)  # several chunks even here
    queries = sampled(stretches, 100)
    assert sum(not query.isascii() for query in queries) > 20 < sum(len(query) > 6 for query in queries)
    for query in queries:
        assert assert_is_brute_force(database, stretches, dense, query) > 0


QUERIES = [
    "import numpy",
    "IMPORT NUMPY",
    "\u65e5",
    "\u65e5\u672c\u8a9e",
    "\u00e9",
    "caf\u00c9",
    "stra\u00dfe",
    "Strasse",
    "\U0001f468\u200d\U0001f469",
    "\u200d",
    "\u05e9\u05dc\u05d5\u05dd",
    "\0",
    "\n",
    " ",
    "aa",
    "...",
    "(",
    "//",
    "/",
    "<s>",
    "nothing has this",
    r"/import\s\w+/",
    r"/(?i)the/",
    "/the/",
    "/[\u3000-\u9fff]+/",
    "/./",
    "/(?s).*/",
    "/^import/",
    r"/py$/",
    "/x?/",
    r"/\b/",
    "/(?<=num)py/",
    "/(lo|ng)+/",
    r"/[^a]/",
    "/caf./",
]


@pytest.mark.parametrize("query", QUERIES)
def test_queries_equal_brute_force(database: Database, stretches: list[Stretch], dense: np.ndarray, query: str) -> None:
    n = assert_is_brute_force(database, stretches, dense, query)
    assert (n == 0) == (query in ("//", "/", "<s>", "nothing has this", r"/\b/"))


def test_tokens_are_searched_by_their_whole_text(database: Database, dense: np.ndarray) -> None:
    ids = database.facts.rows.reshape(-1)
    for query, tokens in {
        "the": [b" the", b"The"],
        " NUM ": [b" num"],
        "caf\u00e9": [" CAF\u00c9".encode()],
        "strasse": ["Stra\u00dfe".encode(), b" STRASSE"],
        "\u65e5\u672c": ["\u65e5\u672c".encode()],
        r"\xe6": [b"\xe6"],
        "unused": [b"unused"],
        "import": [b"import", b" Import"],
        "nothing": [],
    }.items():
        found = database.search(f"token:{query}")
        expected = sorted(VOCABULARY.index(token) for token in tokens)
        assert found.tokens is not None and found.tokens.tolist() == expected
        places = np.flatnonzero(np.isin(ids, expected))
        on_match = dense[places].sum(0)
        assert sorted(found.features) == np.flatnonzero(on_match).tolist()
        shares = (on_match / np.maximum(dense.sum(0), 1))[found.features]
        assert found.shares is not None and (np.diff(found.shares) <= 0).all()
        np.testing.assert_allclose(found.shares, shares, rtol=2e-3)
        for index, feature in enumerate(found.features.tolist()):
            place = places[dense[places, feature].argmax()]
            assert match_of(database.facts, found, index) == (place, place, place)


def test_promoted_tokens_are_searched_by_a_part_of_their_text(database: Database) -> None:
    tokens, logits = database.table["top_logit_tokens"], database.table["top_logits"]
    for query in ("num", "NUM", " num", "\u65e5", "\u00e9", "ss", "nothing", ":"):
        expected = {
            feature: max(best)
            for feature in range(database.n_features)
            if (
                best := [
                    logit
                    for token, logit in zip(tokens[feature].tolist(), logits[feature].tolist(), strict=True)
                    if query.casefold() in database.vocabulary.text(token).casefold()
                ]
            )
        }
        found = database.search(f"promotes:{query}")
        assert found.logits is not None and (np.diff(found.logits) <= 0).all()
        assert dict(zip(found.features.tolist(), found.logits.tolist(), strict=True)) == expected
        assert bool(expected) == (query not in ("nothing", ":"))
        assert not expected or match_of(database.facts, found, 0) is None


@pytest.mark.parametrize(
    ("query", "features"),
    [
        ("id:7", [7]),
        ("id: 7, 12,30 - 32", [7, 12, 30, 31, 32]),
        ("id:30-99", [*range(30, 40)]),
        ("id:30:99,:2,39:", [*range(30, 40), 0, 1]),
        ("id:5,4,5,3-5", [5, 4, 3]),
    ],
)
def test_features_are_found_by_index_in_the_order_of_the_query(
    database: Database, query: str, features: list[int]
) -> None:
    assert database.search(query).features.tolist() == features


def test_features_that_are_named_again_and_again_take_no_memory(database: Database) -> None:
    tracemalloc.start()
    assert database.search("id:" + ",".join(["0-39"] * 20_000)).features.tolist() == [*range(40)]
    assert tracemalloc.get_traced_memory()[1] < 3e6
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("", "The query is empty"),
        ("id:", "'id:' names nothing. Type more, as in id:7,12,40-50"),
        ("token: ", "'token: ' names nothing. Type more, as in token:import"),
        ("promotes:", "Type more, as in promotes:import"),
        ("id:40", "no feature 40 .* its features are 0 to 39"),
        ("id:50-60", "no feature 50 .* its features are 0 to 39"),
        ("id:9-3", "'9-3' is not a range of features: it ends before it begins"),
        ("id:9:3", "'9:3' is not a range of features: the end of first:end is not in it"),
        ("id:x", "'x' is not a feature"),
        ("id:1,,2", "'' is not a feature"),
        ("id:-3", "'-3' is not a feature"),
        ("a" * 1001, "1,001 characters, more than 1,000. Type a part"),
        ("/(/", r"/\(/ is not a regular expression: missing \) at position 1. Correct it"),
        ("/[a/", "unterminated character set"),
        ("/a{99999999999}/", "counts repeat more than 1,000,000 times"),
        ("/((a{1000}){1000}){1000}/", "counts repeat more than 1,000,000 times"),
        (f"/{'(' * 450}{')' * 450}/", "nested too deeply"),
        (r"/(?:\w|\w\w)+\d/", "takes too long: it has very many matches, or a repeat inside a repeat"),
    ],
)
def test_a_query_that_cannot_be_answered_says_what_to_do(
    database: Database, monkeypatch: pytest.MonkeyPatch, query: str, message: str
) -> None:
    monkeypatch.setattr(matching, "SECONDS_PER_STRETCH", 0.05)
    with pytest.raises(SaelabError, match=message):
        database.search(query)


def test_the_time_for_a_regular_expression_is_bounded_in_all(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matching, "SECONDS", -1.0)
    with pytest.raises(SaelabError, match=r"/\./ takes too long"):
        database.search("/./")
    assert len(database.search("a").features)


def test_without_logits_promotes_says_so(tmp_path: Path) -> None:
    z, tokens = made_up(4, 8, 9, 5)
    folder = write_database(tmp_path / "features", z, tokens, [b"<s>", b"a", b"b", b"c", b"d"], lens=False)
    with pytest.raises(
        SaelabError, match=r"promotes:a: the features of .* have no logits, because no linear map leads"
    ):
        open_database(folder).search("promotes:a")


@pytest.mark.parametrize("array", ["tokens", "vocabulary.offsets", "by_token.offsets", "by_token.features"])
@pytest.mark.parametrize("value", [-5, 2**30])
def test_a_damaged_array_is_one_error_that_names_it(tmp_path: Path, array: str, value: int) -> None:
    z, tokens = made_up(40, 8, 9, 5)
    folder = write_database(tmp_path / "features", z, tokens, [b"<s>", b"a", b"b", b"c", b"d"])
    damaged = np.load(folder / f"{array}.npy")
    damaged.reshape(-1)[1:-1] = value
    np.save(folder / f"{array}.npy", damaged)
    with pytest.raises(SaelabError, match=rf"{array}\.npy is damaged: .*`saelab index"):
        open_database(folder).search("/ab/")
