"""How likely a model finds a text after another: what surprisal and intervention scores are made of."""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from saelab.autointerp.llm.protocol import BaseModel


def log_probabilities(base: BaseModel, pairs: Sequence[tuple[str, str]]) -> tuple[list[np.ndarray], int]:
    """For each pair the log-probabilities of the second text's tokens after the first text, in nats, ``[tokens]``.

    Also returns how many tokens the model read. No log-probabilities mean that the pair does not fit into the model's
    context. A token with characters of both texts counts as one of the second text. Equal pairs are read once, and so
    get equal numbers to the bit.
    """
    distinct = list(dict.fromkeys(pairs))
    found, read = {}, 0
    for pair, (tokens, values) in zip(distinct, base.logprobs([a + b for a, b in distinct]), strict=True):
        ends = accumulate(map(len, tokens))
        found[pair] = np.array([value for value, end in zip(values, ends, strict=True) if end > len(pair[0])])
        read += len(tokens)
    return [found[pair] for pair in pairs], read


def count_of_unfit(windows: int, of: int) -> str:
    """The note on windows that do not fit; "" if all do."""
    return f"{windows} of {of} windows do not fit into the model's context with the prompt" if windows else ""
