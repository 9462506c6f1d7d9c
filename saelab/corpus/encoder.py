"""Text to token ids."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from saelab.corpus.special import special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BATCH = 1 << 19
"""Characters per call of the tokenizer, which divides them among its own threads."""


class Encoder:
    """Token ids of plain text: nothing added, nothing cut off, and no text becomes a control token."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        from tokenizers import Tokenizer

        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state |= {"truncation": None, "padding": None}  # other uses of the tokenizer may have set them
        special = special_tokens(tokenizer)
        for added in state["added_tokens"]:
            added["special"] |= added["id"] in special  # so that text does not become it
        text = json.dumps(state, sort_keys=True)
        self._backend: Any = Tokenizer.from_str(text)  # a copy, so that the caller's tokenizer keeps its settings
        self._backend.encode_special_tokens = True
        ids: Any = tokenizer  # transformers types these attributes as anything that a special token may be
        first, last, unknown = ids.bos_token_id, ids.eos_token_id, ids.unk_token_id
        self.bos: int | None = last if first is None else first
        self.eos: int | None = first if last is None else last
        # Earlier versions took only the tokens with a name for special; without others the fingerprint is as it was.
        unnamed = sorted(special.keys() - set(tokenizer.all_special_ids))
        facts = f"{self.bos} {self.eos} {text}" + (f" {unnamed}" if unnamed else "")
        self.fingerprint = hashlib.blake2b(facts.encode(), digest_size=16).hexdigest()
        """Hash of all that decides the ids of a text and which of them are special."""
        self.n_ids: int = max(self._backend.get_vocab().values()) + 1
        control = special.copy()
        if unknown not in (self.bos, self.eos):
            control.pop(unknown, None)  # text that the tokenizer does not know rightly becomes this token
        self._control = frozenset(control)
        occur = [i for i in self._backend.get_vocab().values() if i not in self._control]
        self.last_id: int = max(i for i in (*occur, self.bos, self.eos) if i is not None)
        """The largest id in the rows of a text. Control tokens may have larger ids, but no text becomes one."""
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
        """`encode` for one text, with every name of a control token in it cut after its first character.

        Unigram and word-level models need this: to them the whole name is a word of their vocabulary.
        """
        cuts = [0, *(match.start() + 1 for match in self._spelt.finditer(text)), len(text)]
        parts = [text[start:stop] for start, stop in pairwise(cuts)]
        encodings = self._backend.encode_batch_fast(parts, add_special_tokens=False)
        return [i for encoding in encodings for i in encoding.ids if i not in self._control]
