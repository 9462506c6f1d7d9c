"""Answers on disk, by the key of their request: an SQLite file.

A file of lines would need the place of each line in memory, or a pass over the file for each key; here memory does not
grow with the number of answers. Each answer is a transaction of its own, so that a process that is killed leaves whole
answers only: SQLite drops what it finds half-written in its log (NAME-wal) when the file is opened again.
"""

import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from saelab.autointerp.llm.protocol import Reply
from saelab.errors import SaelabError, brief
from saelab.files import make_folder, translate_errors

_FORM = 1
"""Number of the table's form, kept in the file."""


class Cache:
    """Replies by key. May be used from several threads."""

    def __init__(self, database: sqlite3.Connection, name: str) -> None:
        self._database, self._name = database, name
        self._lock = threading.Lock()

    def get(self, key: str) -> Reply | None:
        """The reply to the request with this key; None if there is none."""
        found = self._run("SELECT reply FROM replies WHERE key = ?", key)
        return _decoded(found[0][0]) if found else None

    def put(self, key: str, reply: Reply) -> None:
        """Keep a reply; a later crash of the process does not lose it."""
        self._run("INSERT OR REPLACE INTO replies VALUES (?, ?)", key, _encoded(reply))

    def _run(self, statement: str, *values: str) -> list[tuple[str]]:
        with self._lock, _translated(self._name):
            return self._database.execute(statement, values).fetchall()


@contextmanager
def open_cache(path: Path | None) -> Iterator[Cache]:
    """The cache in the file `path`, made if it is missing; None: one in a temporary file, gone after the block.

    Raises SaelabError if the file is no such cache, if another process has opened it, or if it cannot be written.
    """
    if path is not None:
        with translate_errors(path.parent):
            make_folder(path.parent)
    name = "the temporary cache of answers" if path is None else str(path)
    with _translated(name):
        # autocommit; threads take turns under the cache's lock
        database = sqlite3.connect(path or "", isolation_level=None, check_same_thread=False, timeout=0.2)
    try:
        with _translated(name):
            database.execute("PRAGMA locking_mode = EXCLUSIVE")  # needs no shared memory, which NFS does not have
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = NORMAL")  # after a power failure the last answers may be missing
            (form,) = database.execute("PRAGMA user_version").fetchone()
            (tables,) = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if not tables:
                database.execute("CREATE TABLE replies (key TEXT PRIMARY KEY, reply TEXT) WITHOUT ROWID")
                database.execute(f"PRAGMA user_version = {_FORM}")
                form = _FORM
        if form != _FORM:
            raise SaelabError(f"{name}: is no cache of answers of this version of saelab; move it away")
        yield Cache(database, name)
    finally:
        database.close()


@contextmanager
def _translated(name: str) -> Iterator[None]:
    """Turn SQLite's errors into a SaelabError that begins with `name`."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorname", "")
        advice = {
            "SQLITE_BUSY": "another process is using it; wait for it, or end it",
            "SQLITE_FULL": "the disk is full: make room and run again to continue",
            "SQLITE_NOTADB": "it is no cache of answers; move it away",
            "SQLITE_CORRUPT": "it is damaged; move it away, and its requests are sent again",
        }
        problem = advice.get(code, f"{brief(error)}; see to the permissions of its folder, or move the file away")
        raise SaelabError(f"{name}: cannot be used: {problem}") from error


def _encoded(reply: Reply) -> str:
    """JSON in plain ASCII, as the text may have half a surrogate pair, which no encoding of SQLite has."""
    return json.dumps([reply.text, reply.logprobs, reply.prompt_tokens, reply.answer_tokens], separators=(",", ":"))


def _decoded(text: str) -> Reply:
    answer, logprobs, prompt_tokens, answer_tokens = json.loads(text)
    if logprobs is not None:
        logprobs = tuple(tuple((token, float(p)) for token, p in alternatives) for alternatives in logprobs)
    return Reply(answer, logprobs, prompt_tokens, answer_tokens)
