"""Text -> token ids."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BATCH = 1 << 19
"""Characters tokenised at once, by the tokenizer's own threads."""


class Encoder:
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
        self.fingerprint = hashlib.blake2b(f"{self.bos} {self.eos} {text}".encode(), digest_size=16).hexdigest()
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
