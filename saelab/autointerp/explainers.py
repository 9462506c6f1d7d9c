"""The ways to explain a feature: what each asks about it, the explanation from the replies, and how many succeed.

lexical, default, contrastive ...   when the feature is active (`lexical.py`, `explain.py`)
effect                              what comes after it: the tokens that steering it makes likelier (`steered_text.py`)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from saelab.autointerp import explain as prompt
from saelab.autointerp import lexical
from saelab.autointerp.contexts import Contexts
from saelab.autointerp.evidence import near_misses, top_logits
from saelab.autointerp.llm.protocol import Client, Reply, Request
from saelab.autointerp.records import EFFECT, Explanation
from saelab.autointerp.scorers import intervention
from saelab.errors import SettingError
from saelab.features.database import Database

if TYPE_CHECKING:
    from saelab.autointerp.steered_text import Raised  # with torch

NO_WINDOWS = "there are no windows to explain it from"
NO_RISE = "steering it makes no token likelier"
AGAIN = 0.7
"""Temperature at which a language model explains a feature again; at 0 its answer would be the same."""

_EXPLAINED, _FEW, _NO_WINDOWS, _NO_EFFECT, _UNREADABLE = range(1, 6)

Asked = tuple[Sequence[Request], Callable[[Sequence[Reply]], Explanation]]
"""The questions, none if nobody is asked, and the explanation from the replies."""


@dataclass(frozen=True)
class Explainer:
    kind: str
    """`Explanation.kind`"""
    model: str
    """`Explanation.model`"""
    _ask: Callable[[Contexts], Asked]

    def asked(self, contexts: Contexts, attempt: int) -> Asked:
        """The questions about a feature, for its first explanation (`attempt` 0) or a further one."""
        if contexts.explain:
            requests, make = self._ask(contexts)
        else:
            requests, make = (), lambda _: Explanation(contexts.feature, "", self.kind, self.model, note=NO_WINDOWS)
        if attempt:
            requests = [replace(each, seed=attempt, temperature=AGAIN) for each in requests]

        def finish(replies: Sequence[Reply]) -> Explanation:
            found = make(replies)
            return replace(found, note=found.note or contexts.lacking, attempt=attempt)

        return requests, finish


def of_contexts(database: Database, client: Client, *, contrastive: bool = False, reasoning: bool = False) -> Explainer:
    """Explains when a feature is active, offline if `client` is the offline judge.

    Raises SettingError if that one is to be `contrastive` or `reasoning`.
    """
    if client.name == lexical.NAME:
        if contrastive or reasoning:
            raise SettingError("contrastive, reasoning: need a language model; name one with llm, or leave them out")
        return Explainer(lexical.NAME, lexical.NAME, lambda c: ((), lambda _: lexical.explain(c)))
    kind = ("contrastive" if contrastive else "default") + ", reasoning" * reasoning

    def asked(c: Contexts) -> Asked:
        misses = near_misses(database, c) if contrastive else ()
        logits = top_logits(database, c.feature)
        request = prompt.request(c, top_logits=logits, near_misses=misses, reasoning=reasoning)
        return (request,), lambda replies: prompt.explanation(c, replies[0], kind, client.name)

    return Explainer(kind, client.name, asked)


def of_effects(client: Client, raised: "Callable[[Contexts], Raised]", kl: float) -> Explainer:
    """Explains what comes after a feature, from the tokens that rise; `kl` is the one that steering is tuned to."""

    def asked(c: Contexts) -> Asked:
        found = raised(c)
        if not found.mean:
            return (), lambda _: Explanation(c.feature, "", EFFECT, client.name, note=NO_RISE)
        note = "; ".join(filter(None, (c.lacking, found.tuned.missed(kl))))
        if client.name == lexical.NAME:
            return (), lambda _: replace(intervention.lexical_explanation(c, found), note=note)
        request = intervention.request(found)
        return (request,), lambda r: replace(prompt.explanation(c, r[0], EFFECT, client.name), note=note)

    return Explainer(EFFECT, client.name, asked)


class Explanations(NamedTuple):
    """Features that `explain` was asked for, counted."""

    explainer: str
    explained: int
    """Those with an explanation, the earlier ones too."""
    new: int
    """Those that were explained now, or tried."""
    few: int
    """Those explained from fewer windows than asked for, or with another such note."""
    no_windows: int
    """Those not explained as there are no windows to explain them from."""
    no_effect: int
    """Those whose effect is not explained, as steering them makes no token likelier."""
    unreadable: int
    """Those not explained as the answer could not be read."""
    tokens: int
    """Tokens of all prompts and answers, the earlier ones too."""

    def __str__(self) -> str:
        no_effect = f", {self.no_effect:,} without an effect" * bool(self.no_effect)
        return (
            f"{self.explained:,} features explained by {self.explainer}, {self.few:,} of them from fewer windows than "
            f"asked for; not explained: {self.no_windows:,} without windows{no_effect}, {self.unreadable:,} whose "
            f"answer could not be read"
        )


class Made:
    """The outcome for each feature, the latest one, and the tokens of all."""

    def __init__(self, features: np.ndarray) -> None:
        """`features` ``[n]`` rise."""
        self.features = features
        self.attempts = np.full(len(features), -1)
        """The last attempt to explain each feature; -1: none."""
        self.outcomes = np.zeros(len(features), np.uint8)
        self.tokens = 0

    def add(self, found: Explanation) -> None:
        """Count an explanation, unless it is of another feature."""
        i = int(np.searchsorted(self.features, found.feature))
        if i < len(self.features) and self.features[i] == found.feature:
            self.attempts[i] = max(self.attempts[i], found.attempt)
            without = {NO_WINDOWS: _NO_WINDOWS, NO_RISE: _NO_EFFECT}.get(found.note, _UNREADABLE)
            self.outcomes[i] = (_FEW if found.note else _EXPLAINED) if found.text else without
            self.tokens += found.tokens

    def next_attempt(self, again: bool) -> int:
        """The attempt that every feature is brought to."""
        most = int(self.attempts.max())
        return most + bool((self.attempts == most).all()) if again and most >= 0 else 0

    def counted(self, explainer: str, new: int) -> Explanations:
        n = np.bincount(self.outcomes, minlength=_UNREADABLE + 1).tolist()
        return Explanations(
            explainer=explainer,
            explained=n[_EXPLAINED] + n[_FEW],
            new=new,
            few=n[_FEW],
            no_windows=n[_NO_WINDOWS],
            no_effect=n[_NO_EFFECT],
            unreadable=n[_UNREADABLE],
            tokens=self.tokens,
        )
