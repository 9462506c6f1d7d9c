"""Does a judge answer the same whatever it is shown?

Of its answers to questions of one form, about as many windows, some with an activation and some without in random
order, the most frequent one and its share, with Wilson's interval. Right answers differ, so that even a judge who
recognises one window with an activation in eight gives no answer to more than three questions in four. One whose share
is above `MOST`, with 95% confidence, judges nothing, and its score says nothing of the features. Answers about another
feature's explanation are left out: that nothing fits may be right there.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from saelab.analysis.intervals import Interval
from saelab.autointerp.metrics import wilson

ANSWERS, _SAME = "answers", "same answer "
"""Names of figures of a score: how many answers, and how many like the most frequent one, which ends the name."""
MOST = 0.8


class Same(NamedTuple):
    """The most frequent answer of a judge."""

    answer: str
    """Such as ``0, 1, 0, 1, 0``."""
    share: Interval
    """The share of questions that it answers so."""

    @property
    def constant(self) -> bool:
        return self.share.low > MOST

    def __str__(self) -> str:
        return f"the judge gives the same answers whatever it is shown: {self.answer} to {self.share.value:.0%}"


def same_answer_figures(answers: Iterable[str]) -> dict[str, float]:
    """Figures of a score from its answers to such questions; none without answers."""
    counts = Counter(answers)
    if not counts:
        return {}
    answer, most = max(counts.items(), key=lambda each: (each[1], each[0]))
    return {ANSWERS: float(counts.total()), f"{_SAME}{answer}": float(most)}


class Answers:
    """The answers of several scores by one judge, counted from their figures."""

    def __init__(self) -> None:
        self._counts, self._total = Counter[str](), 0.0

    def add(self, figures: Mapping[str, float]) -> None:
        self._total += figures.get(ANSWERS, 0)
        self._counts.update({name: int(n) for name, n in figures.items() if name.startswith(_SAME)})

    def most_frequent(self) -> Same | None:
        """The most frequent answer; None if there are no answers.

        Of each score only the most frequent one is known, so that the share is too small, unless it is near 1.
        """
        if not self._counts:
            return None
        name, n = max(self._counts.items(), key=lambda each: (each[1], each[0]))
        return Same(name.removeprefix(_SAME), wilson(n, int(self._total)))


def warning(figures: Mapping[str, float]) -> str:
    """That the judge of one score answers the same whatever it is shown; "" if it does not, or too few are known."""
    answers = Answers()
    answers.add(figures)
    found = answers.most_frequent()
    return str(found) if found is not None and found.constant else ""
