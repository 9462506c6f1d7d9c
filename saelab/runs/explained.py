"""What was explained and scored in runs: the features that a choice names, the controls beside a run, the table.

Reading needs no torch and no language model.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from saelab.autointerp.choice import chosen, matched
from saelab.autointerp.measured import Measured, measured
from saelab.autointerp.plan import stored
from saelab.autointerp.records import About
from saelab.autointerp.summary import ScoreTable, summarised
from saelab.errors import SaelabError
from saelab.features.database import open_database
from saelab.files import expanded
from saelab.progress import Say, quiet
from saelab.runs import folder

FEATURES = "random:200"
"""The features that are explained if none are named, and the run is no control."""
MATCHED = "matched:"
"""What a choice of features begins with that names a run: the features nearest in density to those explained there."""


class Opened:
    """A run's feature database, and the folder of its explanations and scores."""

    def __init__(self, run: str | Path) -> None:
        self.run = Path(expanded(run, "RUN"))
        if not self.run.is_dir():
            raise SaelabError(f"{self.run}: there is no such folder")
        if not (folder.has_features(self.run) or (self.run / folder.SETTINGS).is_file()):
            raise SaelabError(f"{self.run}: is no run folder: it has no {folder.SETTINGS} and no feature database")
        self.database = open_database(folder.features(self.run))
        if self.database.of_array:
            raise SaelabError(f"{self.run}: its activations come from an array, so there is no text to explain them by")
        self.folder = self.run / folder.AUTOINTERP
        self.inputs = str(self.database.arrays.manifest["inputs"])

    @property
    def text(self) -> str:
        """Identifies the text of the database."""
        return str(self.database.arrays.manifest["files"]["tokens.npy"]["sha256"])

    def measured(self, of: "Opened | None" = None) -> Measured:
        """Its scores; of a control, with `of` the run."""
        found = measured(self.run.name, self.folder, self.database)
        own = of is not None and folder.controlled(self.run) == of.run.absolute()
        return replace(found, reseed=own and self.run.name.startswith(folder.RESEED))


def features_of(opened: Opened, features: str | None, about: About = "context") -> list[int]:
    """The features that a choice names; without one `FEATURES`, or of a control those that match its run's.

    `about`: what the explanations in another run are about, whose features are matched.
    """
    if features is None:
        parent = folder.controlled(opened.run)
        features = FEATURES if parent is None else f"{MATCHED}{parent}"
    if not features.startswith(MATCHED):
        return chosen(opened.database, features)
    other = Opened(features.removeprefix(MATCHED))
    latest, _ = stored(other.folder, other.inputs, about)
    explained = latest.features[latest.explained]
    found = matched(np.asarray(opened.database.table["density"]), other.database.table["density"][explained])
    if not found:
        reason = "has no feature of a similar density" if len(explained) else "has no explanations; explain it first"
        raise SaelabError(f"features: {opened.run if len(explained) else other.run}: {reason}")
    return found


def table(run: str | Path, controls: Sequence[str | Path] | None = None) -> ScoreTable:
    """The table of all scores of a run, beside those of the runs `controls`, as `score` returns it.

    Raises SaelabError if there is no feature database, or if a file is damaged.
    """
    opened = Opened(run)
    return scores_of(opened, control_runs(opened, controls, quiet))


def scores_of(opened: Opened, others: Sequence[Opened]) -> ScoreTable:
    return summarised(opened.measured(), [each.measured(of=opened) for each in others])


def control_runs(opened: Opened, controls: Sequence[str | Path] | None, say: Say) -> list[Opened]:
    """The runs `controls`, or else the run's own controls, of which those without the text of the run are left out."""
    if controls is not None:
        others = [Opened(each) for each in controls]
        if any(each.run.resolve() == opened.run.resolve() for each in others):
            raise SaelabError(f"controls: {opened.run} is the run itself; name others")
        return others
    found, missing = [], []
    for path in folder.controls(opened.run):
        there = folder.has_features(path) and (control := Opened(path)).text == opened.text
        (found if there else missing).append(control if there else path.name)
    if missing:
        say(f"no features on the same text: {', '.join(missing)}; `saelab controls {opened.run}` makes them")
    return found
