"""Rows of token ids from the documents of a source, in an order that a seed decides; a part is held out.

The documents of one side of the split are read in windows of `WINDOW` characters; each window is shuffled, tokenised
and packed. Every window of training text has a random generator of its own, so that reading can resume after any row.
Four facts decide what follows a row: where its window begins, the window's number, the document that the row ends in,
and the tokens left over from the documents before that one.
"""

import hashlib
import json
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from saelab.corpus.documents import Cursor, Document, Lane, Source
from saelab.corpus.encoder import Encoder
from saelab.corpus.packing import pack_document
from saelab.corpus.settings import CorpusSettings
from saelab.corpus.sources import open_source
from saelab.corpus.special import special_ids
from saelab.corpus.usable import one_side, patience, with_content
from saelab.errors import SaelabError, SettingError, printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ORDER = 1
"""Version of how documents are ordered and packed. Increase it with every change: a cache may be half written."""
WINDOW = 1 << 22
"""Characters of documents that are shuffled together in memory; a token id counts as 4."""
LOOKED_AT = 100
"""Rows of token ids that are looked at to find whether such rows begin with BOS."""


class _Position(NamedTuple):
    """A position between two rows: all that decides which rows follow."""

    source: Cursor | None = None
    """Where in the source the current window of documents begins; None: at the source's beginning."""
    window: int = 0
    """The number of that window."""
    documents: int = 0
    """How many of the window's documents, in shuffled order, come before the current document."""
    before: Sequence[int] = ()
    """The tokens that those documents left over, fewer than `context`."""
    rows: int = 0
    """Rows made so far from `before` and the current document; 0 only before the very first row."""


class Rows(Iterator[np.ndarray]):
    """Rows of token ids, int32 ``[context]``, that can be resumed after any row. Made by `Corpus.train_rows`."""

    def __init__(
        self, rows: Iterator[tuple[np.ndarray, _Position]], position: _Position, of: Mapping[str, Any]
    ) -> None:
        self._rows = rows
        self._position = position
        self._of = of

    def __next__(self) -> np.ndarray:
        row, self._position = next(self._rows)
        return row

    def state(self) -> dict[str, Any]:
        """The current position: with it as `start`, `Corpus.train_rows` gives the rows that come next.

        JSON-able; at most some 6 bytes times the context, plus less than 1 KB. Resuming reads and shuffles the current
        window of documents again. Before that window it reads only the part of the source that the window begins in,
        and it tokenises nothing before the current document.
        """
        position = self._position._asdict() | {"before": " ".join(map(str, self._position.before))}
        text = json.dumps({**self._of, **position}, sort_keys=True)
        return {**json.loads(text), "check": _hash(text)}


def _read_state(state: Mapping[str, Any], of: Mapping[str, Any]) -> _Position:
    """The position that `Rows.state` saved. Raises SaelabError if it is damaged, or belongs to other rows than `of`."""
    facts = {name: value for name, value in state.items() if name != "check"}
    if state.get("check") != _hash(json.dumps(facts, sort_keys=True)):
        raise SaelabError("corpus: the saved position to resume from is damaged; start again without it")
    differing = [f"{name} {facts.get(name)}, not {value}" for name, value in of.items() if facts.get(name) != value]
    if differing:
        raise SaelabError(
            f"corpus: the saved position to resume from belongs to other rows ({'; '.join(differing)}); use the "
            "corpus, tokenizer and settings that it was saved with, or start again without it"
        )
    facts["before"] = [int(token) for token in facts["before"].split()]
    return _Position(**{name: facts[name] for name in _Position._fields})


def open_corpus(
    settings: CorpusSettings, tokenizer: "PreTrainedTokenizerFast", context: int, *, embeddings: int | None = None
) -> "Corpus":
    """The corpus of `settings` in rows of `context` token ids. Reads a few documents, to report problems early.

    Rows begin with BOS (EOS if the tokenizer has no BOS), and EOS follows each document (BOS if it has no EOS). Rows of
    a tokenised corpus are taken as they are. `embeddings` is the number of token ids that the model has an embedding
    for; the tokenizer may have more.

    Raises SaelabError if the source is missing, empty, not text or cannot be reached, or if its rows may have ids
    without an embedding; SettingError if `context` is below 2, or if a tokenised corpus has limits on the length of
    documents.
    """
    if context < 2:
        raise SettingError(f"context: {context} leaves no room for a token after BOS; it must be at least 2")
    return Corpus(open_source(settings), settings, tokenizer, context, embeddings)


class Corpus:
    """Rows of token ids from one source, for one tokenizer and context. Made by `open_corpus`."""

    def __init__(
        self,
        source: Source,
        settings: CorpusSettings,
        tokenizer: "PreTrainedTokenizerFast",
        context: int,
        embeddings: int | None = None,
    ) -> None:
        self.context = context
        self.about = source.about
        """A description of the source, for messages."""
        self.special_ids: frozenset[int] = special_ids(tokenizer)
        """Ids of BOS, EOS and other special tokens (special.py), which no metric counts."""
        self._source = source
        self._encoder = Encoder(tokenizer)
        self._n_ids = min(self._encoder.n_ids, embeddings or self._encoder.n_ids)
        if not source.tokenised and self._encoder.last_id >= self._n_ids:
            raise SaelabError(
                f"corpus: the model has embeddings for {self._n_ids} tokens and its tokenizer has "
                f"{self._encoder.n_ids}, of which text may give all up to {self._encoder.last_id}; use the tokenizer "
                "that the model was trained with"
            )
        self.bos: int | None = None if source.tokenised else self._encoder.bos
        """The id that is put before each row; None if the tokenizer has none, or if rows are taken as they are."""
        self._lengths = _lengths(settings)
        if self._lengths and source.tokenised:
            raise SettingError(
                f"corpus: {' and '.join(self._lengths)}: {self.about} holds token ids, whose rows are taken as they "
                "are; remove that setting"
            )
        self.identity: dict[str, Any] = {
            "order": ORDER,
            "held_out": settings.held_out,
            **self._lengths,
            **source.identity,
            "tokenizer": self._encoder.fingerprint,
            "context": context,
        }
        """The facts that decide the rows: equal facts give equal rows."""
        self.fingerprint: str = _hash(json.dumps(self.identity, sort_keys=True))
        """Hash of `identity`."""
        self._patience = patience(settings.held_out) if source.endless else math.inf
        self._read: dict[tuple[bool, Lane], tuple[int, int]] = {}
        """Documents and empty documents in the longest pass over each side and lane."""
        self._boundary = self._find_boundary(settings.held_out)
        self.begins_with_bos: bool = self._first_rows_begin_with_bos() if source.tokenised else self.bos is not None
        """Whether rows begin with BOS (EOS if the tokenizer has no BOS); judged by the first rows of token ids."""

    def __repr__(self) -> str:
        bos = "rows as they are" if self._source.tokenised else "no BOS" if self.bos is None else f"BOS {self.bos}"
        return f"Corpus({printable(self.about)}: context {self.context:,}, {bos})"

    def train_rows(
        self, *, seed: int, epoch: int = 0, lane: int = 0, lanes: int = 1, start: Mapping[str, Any] | None = None
    ) -> Rows:
        """One pass over the documents that are not held out: int32 ``[context]``, in an order set by (seed, epoch).

        The documents may be divided into `lanes` disjoint streams, each packed by itself: whole files of a Hub dataset
        if they divide evenly, else single documents, with each lane reading all of the text. `start` is a `Rows.state`
        of the same corpus, seed, epoch and lane: the rows continue from there.

        Raises SaelabError if `start` is damaged or belongs to other rows, at bad text, and if the whole text does not
        fill one row (one lane of several may be empty).
        """
        if not 0 <= lane < lanes:
            raise ValueError(f"lane {lane} is not one of {lanes}")
        of = {"corpus": self.fingerprint, "seed": seed, "epoch": epoch, "lane": lane, "lanes": lanes}
        position = _Position() if start is None else _read_state(start, of)
        rows = self._rows(f"train {seed} {epoch}", Lane(lane, lanes), position, held_out=False)
        if lanes == 1 and position.rows == 0:
            rows = self._at_least_one(rows)
        return Rows(rows, position, of)

    def empty_documents(self) -> str | None:
        """How many of the documents read so far are empty, for a message; None if none is.

        Counted in one pass over the text, the longest so far.
        """
        both = [[n for (side, _), n in self._read.items() if side == held_out] for held_out in (False, True)]
        read, empty = max((sum(n for n, _ in side), sum(n for _, n in side)) for side in both)
        if not empty:
            return None
        return f"{empty:,} of {read:,} documents are empty (null, missing or blank) and were left out"

    def held_out_rows(self, tokens: int) -> np.ndarray:
        """The first held-out rows with at least `tokens` ordinary tokens in all, or all rows if there are fewer.

        int32 ``[rows, context]``, the same on every call. Raises SaelabError if there are none.
        """
        special = np.array(sorted(self.special_ids), dtype=np.int32)
        rows: list[np.ndarray] = []
        missing, idle = tokens, 0
        for row, _ in self._rows("held out", Lane(), _Position(), held_out=True):
            rows.append(row)
            ordinary = int((~np.isin(row, special)).sum())
            missing -= ordinary
            if missing <= 0:
                return np.stack(rows)
            idle = 0 if ordinary else idle + 1
            if idle > self._patience:
                raise SaelabError(
                    f"corpus: {idle:,} held-out rows of {self.about} in a row hold special tokens only; use other text"
                )
        if not rows:
            raise self._too_short("held-out", "use more text, a larger `held_out` or a smaller `context`")
        return np.stack(rows)

    def _rows(
        self, name: str, lane: Lane, start: _Position, *, held_out: bool
    ) -> Iterator[tuple[np.ndarray, _Position]]:
        """The rows of one side from `start` on, each with the position after it; `name` seeds their order."""
        rng = random.Random(name)
        documents = self._documents(rng, lane, start.source, held_out)
        side = one_side(documents, self._boundary, held_out, self._patience, self.about)
        done, before, given = start.documents, list(start.before), start.rows
        useful = idle = 0  # documents that gave tokens, and documents since the last of them
        for number, (begin, window) in enumerate(_windows(side, start.source), start.window):
            if not held_out:  # held-out rows are always read from the beginning, so one generator is enough
                rng = random.Random(f"{name} {number}")
            rng.shuffle(window)
            for index, ids in enumerate(self._tokens(window[done:]), done):
                fits = self._lengths.get("min_tokens", 0) <= len(ids) <= self._lengths.get("max_tokens", len(ids))
                useful, idle = (useful + 1, 0) if fits and ids else (useful, idle + 1)
                if idle > self._patience + useful:
                    has = f"a length{self._within()}" if self._lengths else "a token"
                    raise SaelabError(
                        f"corpus: none of the last {idle:,} documents of {self.about} has {has}; use other text"
                        + (" or other limits" if self._lengths else "")
                    )
                if not fits:
                    continue
                rows, after = self._pack(before, ids)
                for n in range(given, len(rows)):
                    yield rows[n], _Position(begin, number, index, before, n + 1)
                before, given = after, 0
            done = 0

    def _documents(
        self, rng: random.Random, lane: Lane, start: Cursor | None, held_out: bool
    ) -> Iterator[tuple[Document, Cursor]]:
        """The documents of a lane that are not empty; counts the others."""

        def count(read: int, empty: int) -> None:
            self._read[held_out, lane] = max(self._read.get((held_out, lane), (0, 0)), (read, empty))

        return with_content(self._source.documents(rng, lane, start), self._patience, self.about, count)

    def _tokens(self, documents: Iterable[Document]) -> Iterator[list[int]]:
        """The token ids of each document."""
        if self._source.tokenised:
            return map(self._checked, documents)
        return self._encoder.encode(document.content for document in documents)

    def _pack(self, before: list[int], ids: list[int]) -> tuple[np.ndarray, list[int]]:
        """The rows that a document of `ids` completes, int32 ``[rows, context]``, and the tokens left over."""
        if self._source.tokenised:
            return np.array([ids], dtype=np.int32), []
        return pack_document(before, ids, self.context, bos=self._encoder.bos, eos=self._encoder.eos)

    def _checked(self, document: Document) -> list[int]:
        """The ids of a row of a tokenised corpus. Raises SaelabError if its length or one of its ids is wrong."""
        ids, n_ids = document.content, self._n_ids
        if len(ids) != self.context:
            raise SaelabError(
                f"corpus: {document.where()} holds {len(ids)} token ids and the context is {self.context}; the rows of "
                f"a tokenised corpus are taken as they are, all of one length: set `context: {len(ids)}`"
            )
        foreign = [i for i in ids if type(i) is not int or not 0 <= i < n_ids]
        if foreign:
            raise SaelabError(
                f"corpus: {document.where()} holds the token id {foreign[0]!r}, but the model has 0 to {n_ids - 1} "
                f"(its tokenizer, 0 to {self._encoder.n_ids - 1}); use a corpus that was tokenised for this model, or "
                "one of text"
            )
        return ids

    def _find_boundary(self, held_out: float) -> float:
        """Documents whose split position is below this are held out: `held_out`, moved if one side would be empty.

        Reads until both sides have a document, some 1 / `held_out` documents of a large corpus, or until there is no
        hope of it.
        """
        lowest, second, highest = 2.0, 2.0, -1.0  # of the split positions so far; duplicates share one
        documents = self._source.documents(random.Random("held out"), Lane(), None)
        for number, (document, _) in enumerate(with_content(documents, self._patience, self.about)):
            if number >= self._patience:
                break
            if self._source.tokenised:
                self._checked(document)
            position = document.split_position
            if position < lowest:
                lowest, second = position, lowest
            elif lowest < position < second:
                second = position
            highest = max(highest, position)
            if lowest < held_out <= highest:
                return held_out
        if highest < 0:
            raise SaelabError(f"corpus: {self.about} holds no text: its documents are empty (null, missing or blank)")
        if lowest == highest:
            raise SaelabError(
                f"corpus: {self.about} is a single document, or the same one repeated; use at least two different "
                "documents, because one is held out for evaluation"
            )
        return highest if highest < held_out else second

    def _first_rows_begin_with_bos(self) -> bool:
        documents = self._source.documents(random.Random("held out"), Lane(), None)
        first = islice(with_content(documents, self._patience, self.about), LOOKED_AT)
        return all(document.content[:1] == [self._encoder.bos] for document, _ in first)

    def _at_least_one(self, rows: Iterator[tuple[np.ndarray, _Position]]) -> Iterator[tuple[np.ndarray, _Position]]:
        """The same rows. Raises SaelabError if there are none."""
        first = next(rows, None)
        if first is None:
            raise self._too_short("training", "use more text or a smaller `context`")
        yield first
        yield from rows

    def _within(self) -> str:
        return f" within {' and '.join(self._lengths)}" if self._lengths else ""

    def _too_short(self, part: str, advice: str) -> SaelabError:
        return SaelabError(
            f"corpus: the {part} text{self._within()} of {self.about} does not fill one row of {self.context} tokens; "
            + advice
        )


def _lengths(settings: CorpusSettings) -> dict[str, int]:
    """The limits on a document's number of tokens that are set."""
    limits = {"min_tokens": settings.min_tokens, "max_tokens": settings.max_tokens}
    return {name: limit for name, limit in limits.items() if limit}


def _windows(
    documents: Iterable[tuple[Document, Cursor]], begin: Cursor | None
) -> Iterator[tuple[Cursor | None, list[Document]]]:
    """Documents in windows of `WINDOW` characters, each with the cursor at its beginning; the first is `begin`."""
    window: list[Document] = []
    size = 0
    for document, at in documents:
        window.append(document)
        size += len(document.content) if isinstance(document.content, str) else 4 * len(document.content)
        if size >= WINDOW:
            yield begin, window
            window, size, begin = [], 0, at
    if window:
        yield begin, window


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
