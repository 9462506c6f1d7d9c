"""Which token ids are special: marks of a row's structure (BOS, EOS, chat markers), not text.

One notion for the whole of saelab. Special tokens are in no training batch (unless `activations.special_tokens`), no
input scale, no figure and no feature database; they stay clean when activations are replaced; and text that spells one
does not become one. A token is special if

- the tokenizer names it: BOS, EOS, PAD, SEP, CLS, MASK, UNK, or an additional special token; or
- it is an added token that the tokenizer marks as special, named or not, such as ``<|eot_id|>``. Control pieces of
  SentencePiece are among these; or
- it is an added token spelt ``<|...|>``, marked or not: some tokenizers leave chat and fill-in-the-middle markers
  unmarked so that they show in decoded text.

All other added tokens are text: runs of blanks, HTML tags, ``<tool_call>``. So are bytes such as ``<0x0A>``. UNK stands
for text that the tokenizer cannot spell. The rows keep it, because the model reads it, but no figure counts it: it does
not say which text it was. Ids of the model's embedding that the tokenizer lacks are neither: no row may have them.
"""

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKER = re.compile("<[|\uff5c].+[|\uff5c]>")
"""The spelling of control tokens; DeepSeek's have the wide bar."""


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> dict[int, str]:
    """The special tokens of a tokenizer, by id."""
    named = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    added = ((i, token) for i, token in tokenizer.added_tokens_decoder.items() if _is_special(token))
    return {i: str(token) for i, token in (*named, *added)}


def special_ids(tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """The ids of `special_tokens`."""
    return frozenset(special_tokens(tokenizer))


def _is_special(added: Any) -> bool:
    return added.special or _MARKER.fullmatch(str(added)) is not None
