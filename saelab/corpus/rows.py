"""Rows of token ids from the documents of a source, in an order drawn from a seed, with a part never trained on.

The documents of one side of the split are read in windows of `WINDOW` characters; each window is shuffled, tokenised
and packed. Windows of training text are shuffled with a generator each, so that reading can go on anywhere: what
follows a row is decided by where its window begins, the window's number, the document that the row ends in, and the
tokens left over of the documents before that one.
"""

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from saelab.corpus.documents import Cursor, Document, Lane, Source
from saelab.corpus.encoder import Encoder
from saelab.corpus.packing import pack_document
from saelab.corpus.settings import CorpusSettings
from saelab.corpus.sources import open_source
from saelab.errors import SaelabError, SettingError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ORDER = 1
"""Of how documents are ordered and packed: to be counted up where that changes, for a cache may be half written."""
WINDOW = 1 << 22
"""Characters of documents that are shuffled among each other in memory; a token id counts as 4."""


class _Position(NamedTuple):
    """Between two rows: all that decides which ones follow."""

    source: Cursor | None = None
    """Where in the source the present window of documents begins; None: at its beginning."""
    window: int = 0
    """The number of that window."""
    documents: int = 0
    """How many documents of it, in the order drawn, come before the present one."""
    before: Sequence[int] = ()
    """Their last tokens, which are in no row by themselves: fewer than `context`."""
    rows: int = 0
    """How many rows these and the present document have given so far; 0 only before the first row of all."""


class Rows(Iterator[np.ndarray]):
    """Rows of token ids, int32 ``[context]``, that can tell where they are. Made by `Corpus.train_rows`."""

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
        """Where it is: with this as `start`, `Corpus.train_rows` gives the rows that would come next.

        JSON-able, some 6 bytes times the context at most and less than 1 KB beside that. To go on, the window of
        documents that it lies in is read again and shuffled as it was; nothing before that window is read, except of
        the part of the source that it begins in, and nothing before the present document is tokenised.
        """
        position = self._position._asdict() | {"before": " ".join(map(str, self._position.before))}
        text = json.dumps({**self._of, **position}, sort_keys=True)
        return {**json.loads(text), "check": _hash(text)}


def _read_state(state: Mapping[str, Any], of: Mapping[str, Any]) -> _Position:
    """The position that `Rows.state` told. Raises SaelabError where it is damaged, or of other rows than `of` says."""
    facts = {name: value for name, value in state.items() if name != "check"}
    if state.get("check") != _hash(json.dumps(facts, sort_keys=True)):
        raise SaelabError("corpus: the position from which rows should go on is damaged; begin again without it")
    differing = [f"{name} {facts.get(name)}, not {value}" for name, value in of.items() if facts.get(name) != value]
    if differing:
        raise SaelabError(
            f"corpus: the position from which rows should go on is of other rows ({'; '.join(differing)}); use the "
            "corpus, tokenizer and settings that it was made with, or begin again without it"
        )
    facts["before"] = [int(token) for token in facts["before"].split()]
    return _Position(**{name: facts[name] for name in _Position._fields})


def open_corpus(settings: CorpusSettings, tokenizer: "PreTrainedTokenizerFast", context: int) -> "Corpus":
    """The corpus of `settings` in rows of `context` token ids. Reads a few documents, to find early what is wrong.

    Rows begin with BOS (EOS where the tokenizer has no BOS) and have EOS after each document (BOS where it has no EOS);
    a tokenised corpus is taken as it is. Raises SaelabError if the source is missing, empty, not text or out of reach,
    SettingError for a `context` below 2, and where documents of a tokenised corpus should be left out by length.
    """
    if context < 2:
        raise SettingError(f"context: {context} leaves no room for a token after BOS")
    return Corpus(open_source(settings), settings, tokenizer, context)


class Corpus:
    """Rows of token ids from one source, for one tokenizer and context. Made by `open_corpus`."""

    def __init__(
        self, source: Source, settings: CorpusSettings, tokenizer: "PreTrainedTokenizerFast", context: int
    ) -> None:
        self.context = context
        self.about = source.about
        """What is read, in words."""
        self.special_ids: frozenset[int] = frozenset(tokenizer.all_special_ids)
        """Ids of BOS, EOS and the like, which are in no metric."""
        self._source = source
        self._encoder = Encoder(tokenizer)
        self.bos: int | None = None if source.tokenised else self._encoder.bos
        """The id that rows begin with; None where they have none, or are taken as they are."""
        self._lengths = _lengths(settings)
        if self._lengths and source.tokenised:
            raise SettingError(
                f"corpus: {' and '.join(self._lengths)}: {self.about} holds token ids, whose rows are taken as they "
                "are; leave that away"
            )
        self.identity: dict[str, Any] = {
            "order": ORDER,
            "held_out": settings.held_out,
            **self._lengths,
            **source.identity,
            "tokenizer": self._encoder.fingerprint,
            "context": context,
        }
        """The facts that decide what the rows are; equal facts, equal rows."""
        self.fingerprint: str = _hash(json.dumps(self.identity, sort_keys=True))
        """Hash of `identity`."""
        self._boundary = self._find_boundary(settings.held_out)

    def train_rows(
        self, *, seed: int, epoch: int = 0, lane: int = 0, lanes: int = 1, start: Mapping[str, Any] | None = None
    ) -> Rows:
        """One pass over the documents that are not held out: int32 ``[context]``, in an order set by (seed, epoch).

        The documents may be divided into `lanes` disjoint streams, each packed by itself: whole files of a Hub dataset
        where these can be dealt out evenly, else single documents, each lane reading all of the text. With `start`, a
        `Rows.state` told by rows of the same corpus, seed, epoch and lane, these are the rows that came next there.

        Raises SaelabError where `start` is damaged or of other rows, where bad text is met, and where all of the text
        does not fill one row; a lane of several may have none.
        """
        if not 0 <= lane < lanes:
            raise ValueError(f"lane {lane} is not one of {lanes}")
        of = {"corpus": self.fingerprint, "seed": seed, "epoch": epoch, "lane": lane, "lanes": lanes}
        position = _Position() if start is None else _read_state(start, of)
        rows = self._rows(f"train {seed} {epoch}", Lane(lane, lanes), position, held_out=False)
        if lanes == 1 and position.rows == 0:
            rows = self._at_least_one(rows)
        return Rows(rows, position, of)

    def held_out_rows(self, tokens: int) -> np.ndarray:
        """The first rows of held-out documents that hold at least `tokens` tokens, special ones not counted.

        int32 ``[rows, context]``; always the same, fewer if there are no more. Raises SaelabError if there are none.
        """
        special = np.array(sorted(self.special_ids), dtype=np.int32)
        rows: list[np.ndarray] = []
        missing = tokens
        for row, _ in self._rows("held out", Lane(), _Position(), held_out=True):
            rows.append(row)
            missing -= int((~np.isin(row, special)).sum())
            if missing <= 0:
                return np.stack(rows)
        if not rows:
            raise self._too_short("held-out", "use more text, a larger `held_out` or a smaller `context`")
        return np.stack(rows)

    def _rows(
        self, name: str, lane: Lane, start: _Position, *, held_out: bool
    ) -> Iterator[tuple[np.ndarray, _Position]]:
        """The rows of one side from `start` on, in an order drawn from `name`, each with the position behind it."""
        rng = random.Random(name)
        documents = self._source.documents(rng, lane, start.source)
        side = ((document, at) for document, at in documents if (document.place < self._boundary) == held_out)
        done, before, given = start.documents, list(start.before), start.rows
        for number, (begin, window) in enumerate(_windows(side, start.source), start.window):
            if not held_out:  # those are always read from the beginning: one generator does, and their order stays
                rng = random.Random(f"{name} {number}")
            rng.shuffle(window)
            for index, ids in enumerate(self._tokens(window[done:]), done):
                if not self._lengths.get("min_tokens", 0) <= len(ids) <= self._lengths.get("max_tokens", len(ids)):
                    continue
                rows, after = self._pack(before, ids)
                for n in range(given, len(rows)):
                    yield rows[n], _Position(begin, number, index, before, n + 1)
                before, given = after, 0
            done = 0

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
        """The ids of a row of a tokenised corpus, which are as many as the context and within the vocabulary."""
        ids, n_ids = document.content, self._encoder.n_ids
        if len(ids) != self.context:
            raise SaelabError(
                f"corpus: {document.where()} holds {len(ids)} token ids and the context is {self.context}; the rows of "
                f"a tokenised corpus are taken as they are, all of one length: set `context: {len(ids)}`"
            )
        foreign = next((i for i in ids if type(i) is not int or not 0 <= i < n_ids), None)
        if foreign is not None:
            raise SaelabError(
                f"corpus: {document.where()} holds the token id {foreign!r}, but the model's tokenizer has 0 to "
                f"{n_ids - 1}; use a corpus that was tokenised for this model, or one of text"
            )
        return ids

    def _find_boundary(self, held_out: float) -> float:
        """The place below which documents are held out: `held_out`, moved where that would leave one side empty.

        Reads until both sides have a document, which a large corpus shows within some 1 / `held_out` documents.
        """
        lowest, second, highest = 2.0, 2.0, -1.0  # of the places met so far; duplicates share one
        for document, _ in self._source.documents(random.Random("held out"), Lane(), None):
            if self._source.tokenised:
                self._checked(document)
            if document.place < lowest:
                lowest, second = document.place, lowest
            elif lowest < document.place < second:
                second = document.place
            highest = max(highest, document.place)
            if lowest < held_out <= highest:
                return held_out
        if highest < 0:
            raise SaelabError(f"corpus: {self.about} holds no text")
        if lowest == highest:
            raise SaelabError(
                f"corpus: {self.about} is a single document, or the same one repeated; at least two are needed, for "
                "one is held out to evaluate on"
            )
        return highest if highest < held_out else second

    def _at_least_one(self, rows: Iterator[tuple[np.ndarray, _Position]]) -> Iterator[tuple[np.ndarray, _Position]]:
        """The rows as they are. Raises SaelabError where there is none."""
        first = next(rows, None)
        if first is None:
            raise self._too_short("training", "use more text or a smaller `context`")
        yield first
        yield from rows

    def _too_short(self, part: str, advice: str) -> SaelabError:
        kept = f", documents left out by {' and '.join(self._lengths)} not counted" if self._lengths else ""
        return SaelabError(
            f"corpus: the {part} text of {self.about} fills no row of {self.context} tokens{kept}; {advice}"
        )


def _lengths(settings: CorpusSettings) -> dict[str, int]:
    """The limits that are set to how many tokens a document has."""
    limits = {"min_tokens": settings.min_tokens, "max_tokens": settings.max_tokens}
    return {name: limit for name, limit in limits.items() if limit}


def _windows(
    documents: Iterable[tuple[Document, Cursor]], begin: Cursor | None
) -> Iterator[tuple[Cursor | None, list[Document]]]:
    """Documents in windows of `WINDOW` characters, each with where it begins; the first one at `begin`."""
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
