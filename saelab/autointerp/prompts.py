"""How windows of text are shown to a language model, and how its verdicts are read.

Text is data. Each window is a JSON string on one line, so that it can neither end its block nor start another, whatever
it says; the markers << and >> are ours, since those of the text are broken up. Verdicts are read from the end of the
answer only, outside of quotes, so that a window that is repeated in the answer is never taken for one.
"""

import json
import math
import re
from collections.abc import Collection, Sequence

from saelab.autointerp.llm.protocol import Reply
from saelab.features.examples import Example

_OPEN, _CLOSE = "\0", "\1"
"""Stand for << and >> while the text is made, and are left out of it."""
_NO_MARKERS = {ord(_OPEN): None, ord(_CLOSE): None}
MARKED = 0.3
"""Tokens above this share of the window's largest activation are marked."""


def strongest_tokens(example: Example, share: float = MARKED) -> tuple[int, ...]:
    """Indices of the tokens with an activation above `share` of the window's largest; none in a silent window."""
    bar = share * float(example.activations.max())
    return tuple(i for i, value in enumerate(example.activations.tolist()) if value > bar)


def window(tokens: Sequence[str], marked: Collection[int] = ()) -> str:
    """The text of a window as a JSON string, with << >> around each run of marked tokens."""
    parts: list[str] = []
    inside = False
    for i, token in enumerate(tokens):
        if (i in marked) != inside:
            parts.append(_CLOSE if inside else _OPEN)
            inside = not inside
        parts.append(token.translate(_NO_MARKERS))
    parts.append(_CLOSE if inside else "")
    # what the text itself has of << and >> is broken up, also where it meets a marker of ours
    text = re.sub("<(?=[<\0])", "< ", "".join(parts))
    text = re.sub(">(?=[>\1])", "> ", text).replace("\0<", "\0 <").replace("\1>", "\1 >")
    quoted = json.dumps(text.replace(_OPEN, "<<").replace(_CLOSE, ">>"), ensure_ascii=False)
    return quoted.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029").replace("\x85", "\\u0085")


def numbered(windows: Sequence[str]) -> str:
    """Windows, as `window` gives them, in lines that are numbered from 1."""
    return "\n".join(f"{number}: {text}" for number, text in enumerate(windows, 1))


_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_LIST = re.compile(r"\[([^\[\]]*)\]")


def verdicts(answer: str, n: int) -> list[bool] | None:
    """The last list of `n` zeros and ones in an answer, outside of quotes; None if there is none.

    Also read: true and false, yes and no, and a single verdict without brackets if n is 1.
    """
    bare = _QUOTED.sub('""', answer)
    lists = _LIST.findall(bare)
    parts = lists[-1].split(",") if lists else [bare.strip().rstrip(".").split()[-1]] if n == 1 and bare.strip() else []
    known = {"1": True, "0": False, "true": True, "false": False, "yes": True, "no": False}
    found = [known.get(part.strip().lower()) for part in parts]
    return [bool(each) for each in found] if len(found) == n and None not in found else None


def probabilities(reply: Reply, said: Sequence[bool]) -> list[float]:
    """The probability of a 1 at each verdict, from the log-probabilities of its digit; 0 or 1 if there are none.

    P(1) / (P(0) + P(1)), where each sums over the alternatives that contain the digit and not the other.
    """
    found: list[float] = []
    for alternatives in reply.logprobs or ():
        if not alternatives or _digit(alternatives[0][0]) is None:
            continue
        mass = {digit: sum(math.exp(p) for text, p in alternatives if _digit(text) == digit) for digit in (False, True)}
        found.append(mass[True] / (mass[False] + mass[True]))
    found = found[len(found) - len(said) :]  # digits of the reasoning come before the list
    agree = len(found) == len(said) and all((p >= 0.5) == verdict for p, verdict in zip(found, said, strict=True))
    return found if agree else [float(verdict) for verdict in said]


def _digit(token: str) -> bool | None:
    has = [digit in token for digit in "01"]
    return None if has[0] == has[1] else has[1]
