"""Which scores of a run are still to be made: of each feature's explanation, and of another's as a control."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from saelab.autointerp.choice import strangers
from saelab.autointerp.contexts import contexts
from saelab.autointerp.jobs import Job
from saelab.autointerp.llm.protocol import Reply
from saelab.autointerp.records import SHUFFLED, Explanation, Score, score_key
from saelab.autointerp.scoring import SCORERS, Judges, Scorer
from saelab.autointerp.settings import ContextSettings
from saelab.autointerp.store import Explained, explanations, scores
from saelab.features.database import Database

Controls = dict[tuple[int, str, str], Explained]
"""Shuffled explanations by feature, and by explainer and kind of what they are the control of."""


def stored(folder: Path, inputs: str) -> tuple[dict[int, Explained], Controls]:
    """The latest explanation of each feature, and the shuffled ones; without the explainers' answers."""
    latest: dict[int, Explained] = {}
    shuffled: Controls = {}
    for found, of in explanations(folder, inputs):
        each = Explained(replace(found, answer=""), of)
        if found.kind.startswith(SHUFFLED):
            shuffled[found.feature, found.model, found.kind.removeprefix(SHUFFLED)] = each
        else:
            latest[found.feature] = each
    return latest, shuffled


def new_controls(database: Database, explained: Sequence[Explained], known: Controls) -> Controls:
    """For each explanation without a control that of the feature nearest in density, among those of the same kind."""
    groups: dict[tuple[str, str], list[Explained]] = {}
    for each in explained:
        if each.explanation.text:
            groups.setdefault((each.explanation.model, each.explanation.kind), []).append(each)
    found: Controls = {}
    for (model, kind), group in groups.items():
        density = database.table["density"][[each.explanation.feature for each in group]]
        partners = strangers(density, [each.explanation.text for each in group])
        for (own, of), partner in zip(group, partners, strict=True):
            if partner is not None and (own.feature, model, kind) not in known:
                other = group[partner].explanation
                note = f"the explanation of feature {other.feature}"
                control = replace(other, feature=own.feature, kind=SHUFFLED + kind, tokens=0, note=note)
                found[own.feature, model, kind] = Explained(control, of)
    return found


class Plan:
    """What is to be scored."""

    def __init__(
        self,
        database: Database,
        names: Sequence[str],
        latest: Mapping[int, Explained],
        controls: Controls,
        judges: Judges,
        folder: Path,
    ) -> None:
        """`names` are keys of `SCORERS`; scores in `folder` are not made again."""
        self.database, self.latest, self.controls, self.judges = database, latest, controls, judges
        self.scorers = [(SCORERS[name].record or name, SCORERS[name]) for name in dict.fromkeys(names)]
        known = scores(folder, str(database.arrays.manifest["inputs"]), judged=False)
        self.done = {(each.key, of) for each, of, asked in known if asked == judges.settings}

    def missing(self, feature: int) -> list[tuple[Explanation, Scorer]]:
        """The scores of a feature that are still to be made: of which explanation, and by what."""
        of, itself = self._settings(feature), Explanation(feature, "", "", "")
        found = []
        for name, scorer in self.scorers:
            for each in self._explanations(feature) if scorer.explained else [itself]:
                explanation = each.key if scorer.explained else ""
                if (score_key(feature, name, explanation, scorer.model(self.judges)), of) not in self.done:
                    found.append((each, scorer))
        return found

    def jobs(self, feature: int, write: Callable[[Score, ContextSettings], None]) -> Iterator[Job]:
        """The jobs that make and write the missing scores of a feature."""
        of = self._settings(feature)
        found = contexts(self.database, feature, of)
        for explanation, scorer in self.missing(feature):
            requests, make = scorer.asked(found, explanation, self.judges)
            yield Job(requests, partial(_finish, make, write, of))

    def _settings(self, feature: int) -> ContextSettings:
        return self.latest[feature].contexts if feature in self.latest else ContextSettings()

    def _explanations(self, feature: int) -> list[Explanation]:
        own = self.latest[feature].explanation if feature in self.latest else None
        if own is None or not own.text:
            return []
        control = self.controls.get((feature, own.model, own.kind))
        return [own, *([control.explanation] if control else [])]


def _finish(
    make: Callable[[Sequence[Reply]], Score],
    write: Callable[[Score, ContextSettings], None],
    of: ContextSettings,
    replies: Sequence[Reply],
) -> None:
    write(make(replies), of)
