"""Rows of token ids from the documents of a source, in an order drawn from a seed, with a part never trained on."""

import hashlib
import json
import random
import re
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from saelab.corpus.sources import CorpusSettings, Document, Source, open_source
from saelab.errors import SaelabError, SettingError
from saelab.packing import pack

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WINDOW = 1 << 22
"""Characters of documents that are shuffled among each other in memory; a token id counts as 4."""
BATCH = 1 << 19
"""Characters tokenised at once."""


def open_corpus(settings: CorpusSettings, tokenizer: "PreTrainedTokenizerFast", context: int) -> "Corpus":
    """The corpus of `settings` in rows of `context` token ids. Reads a few documents, to find early what is wrong.

    Rows begin with BOS (EOS where the tokenizer has no BOS) and have EOS after each document (BOS where it has no EOS);
    a tokenised corpus is taken as it is. Raises SaelabError if the source is missing, empty, not text or out of reach,
    SettingError for a `context` below 2.
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
        self._encoder = _Encoder(tokenizer)
        self.identity: dict[str, Any] = {
            "held_out": settings.held_out,
            **source.identity,
            "tokenizer": self._encoder.fingerprint,
            "context": context,
        }
        """The facts that decide what the rows are; equal facts, equal rows."""
        self.fingerprint: str = _hash(json.dumps(self.identity, sort_keys=True))
        """Hash of `identity`."""
        self._boundary = self._find_boundary(settings.held_out)

    def train_rows(self, *, seed: int, epoch: int = 0) -> Iterator[np.ndarray]:
        """One pass over the documents that are not held out: int32 ``[context]``, in an order set by (seed, epoch).

        Raises SaelabError where it meets bad text, and where all of the text does not fill one row.
        """
        found = False
        for row in self._rows(random.Random(f"train {seed} {epoch}"), held_out=False):
            found = True
            yield row
        if not found:
            raise self._too_short("training", "use more text or a smaller `context`")

    def held_out_rows(self, tokens: int) -> np.ndarray:
        """The first rows of held-out documents that hold at least `tokens` tokens, special ones not counted.

        int32 ``[rows, context]``; always the same, fewer if there are no more. Raises SaelabError if there are none.
        """
        special = np.array(sorted(self.special_ids), dtype=np.int32)
        rows: list[np.ndarray] = []
        missing = tokens
        for row in self._rows(random.Random("held out"), held_out=True):
            rows.append(row)
            missing -= int((~np.isin(row, special)).sum())
            if missing <= 0:
                return np.stack(rows)
        if not rows:
            raise self._too_short("held-out", "use more text, a larger `held_out` or a smaller `context`")
        return np.stack(rows)

    def _rows(self, rng: random.Random, *, held_out: bool) -> Iterator[np.ndarray]:
        side = (d for d in self._source.documents(rng) if (d.place < self._boundary) == held_out)
        documents = _shuffle(side, rng)
        if self._source.tokenised:
            return map(self._as_row, documents)
        texts = (document.content for document in documents)
        return pack(self._encoder.encode(texts), self.context, bos=self._encoder.bos, eos=self._encoder.eos)

    def _as_row(self, document: Document) -> np.ndarray:
        """The ids of one row of a tokenised corpus, int32 ``[context]``, checked."""
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
        return np.array(ids, dtype=np.int32)

    def _find_boundary(self, held_out: float) -> float:
        """The place below which documents are held out: `held_out`, moved where that would leave one side empty.

        Reads until both sides have a document, which a large corpus shows within some 1 / `held_out` documents.
        """
        lowest, second, highest = 2.0, 2.0, -1.0  # of the places met so far; duplicates share one
        for document in self._source.documents(random.Random("held out")):
            if self._source.tokenised:
                self._as_row(document)
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

    def _too_short(self, part: str, advice: str) -> SaelabError:
        return SaelabError(f"corpus: the {part} text of {self.about} fills no row of {self.context} tokens; {advice}")


class _Encoder:
    """Token ids of plain text: nothing added, nothing cut off, and no text becomes a control token."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        from tokenizers import Tokenizer

        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state |= {"truncation": None, "padding": None}  # which other uses of the tokenizer may have left behind
        text = json.dumps(state, sort_keys=True)
        self._backend: Any = Tokenizer.from_str(text)  # a copy, so that the caller's keeps its own settings
        self._backend.encode_special_tokens = True
        ids: Any = tokenizer  # its attributes are typed as all that any special token may be
        first, last, unknown = ids.bos_token_id, ids.eos_token_id, ids.unk_token_id
        self.bos: int | None = last if first is None else first
        self.eos: int | None = first if last is None else last
        self.fingerprint = _hash(f"{self.bos} {self.eos} {text}")
        self.n_ids: int = max(self._backend.get_vocab().values()) + 1
        control = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        if unknown not in (self.bos, self.eos):
            control.pop(unknown, None)  # what unknown text becomes, rightly
        self._control = frozenset(control)
        longest_first = sorted(control.values(), key=len, reverse=True)
        self._spelt = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def encode(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """Token ids of each text, in order; tokenised in batches."""
        batch: list[str] = []
        size = 0
        for text in texts:
            batch.append(text)
            size += len(text)
            if size >= BATCH:
                yield from self._encode_batch(batch)
                batch, size = [], 0
        yield from self._encode_batch(batch)

    def _encode_batch(self, texts: list[str]) -> Iterator[list[int]]:
        for text, encoding in zip(texts, self._backend.encode_batch_fast(texts, add_special_tokens=False), strict=True):
            ids = encoding.ids
            yield ids if self._control.isdisjoint(ids) else self._encode_in_parts(text)

    def _encode_in_parts(self, text: str) -> list[int]:
        """As `encode`, with the name of every control token cut after its first character.

        Unigram and word-level models need it: they find the whole name in their vocabulary, as if it were a word.
        """
        cuts = [0, *(match.start() + 1 for match in self._spelt.finditer(text)), len(text)]
        parts = [text[start:stop] for start, stop in pairwise(cuts)]
        encodings = self._backend.encode_batch_fast(parts, add_special_tokens=False)
        return [i for encoding in encodings for i in encoding.ids if i not in self._control]


def _shuffle(documents: Iterable[Document], rng: random.Random) -> Iterator[Document]:
    """The documents, shuffled within windows of `WINDOW` characters."""
    window: list[Document] = []
    size = 0
    for document in documents:
        window.append(document)
        size += len(document.content) if isinstance(document.content, str) else 4 * len(document.content)
        if size >= WINDOW:
            rng.shuffle(window)
            yield from window
            window, size = [], 0
    rng.shuffle(window)
    yield from window


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
