"""What the scores of a run ask: a language model, an embedder, and the run's own model, which only some scores load."""

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from saelab.autointerp import lexical
from saelab.autointerp.contexts import Contexts
from saelab.autointerp.embedders import Embedder, of_database, sentence_transformer
from saelab.autointerp.llm.protocol import BaseModel, Client
from saelab.autointerp.scoring import SCORERS, Judges
from saelab.autointerp.settings import ScoreSettings
from saelab.errors import SettingError, did_you_mean
from saelab.features.database import Database
from saelab.progress import Say
from saelab.runs.explained import Opened

if TYPE_CHECKING:
    from saelab.autointerp.steered_text import SteeredTexts
    from saelab.lm.model import LanguageModel
    from saelab.sae.model import SparseAutoencoder


def check(scores: Sequence[str], client: Client) -> None:
    """Raises SettingError if there is no such score, or if `client` is the offline judge and cannot make one."""
    if not scores:
        raise SettingError(f"scores: none is named; choose from {', '.join(SCORERS)}")
    for name in scores:
        if name not in SCORERS:
            raise SettingError(f"scores: there is no {name!r} ({', '.join(SCORERS)}).{did_you_mean(name, SCORERS)}")
        if SCORERS[name].needs_model and client.name == lexical.NAME:
            raise SettingError(f"scores: {name} needs a language model as judge; name one, or leave it out")


def judges(
    opened: Opened,
    scores: Sequence[str],
    client: Client,
    embed: str | None,
    base: BaseModel | None,
    settings: ScoreSettings,
    say: Say,
) -> Judges:
    """What these scores ask. `embed`: a sentence-transformers model, None: TF-IDF. `base`: None: the run's model."""
    base, steered = _subject_judges(opened, scores, base, settings, say)
    return Judges(client, *_embedder(opened.database, embed), settings, base, steered)


def _subject_judges(
    opened: Opened, scores: Sequence[str], base: BaseModel | None, settings: ScoreSettings, say: Say
) -> tuple[BaseModel | None, Callable[[Contexts], "SteeredTexts"] | None]:
    """What gives log-probabilities, `base` or the run's language model, and steered texts; None if not needed."""
    steering = any(SCORERS[name].needs_steering for name in scores)
    if not steering and not (base is None and any(SCORERS[name].needs_base for name in scores)):
        return base, None
    from saelab.autointerp.llm.local import LocalModel  # with torch
    from saelab.autointerp.steered_text import steered_texts

    found = subject(opened.run, say)

    @lru_cache(maxsize=1)  # serves the explanation and its control
    def steered(c: Contexts) -> "SteeredTexts":
        return steered_texts(c, *found, settings.steering)

    return base or LocalModel(found.lm), steered if steering else None


def _embedder(database: Database, embed: str | None) -> tuple[Embedder, str]:
    """The embedder and its name."""
    if embed is not None:
        return sentence_transformer(embed), Path(embed).name

    @cache
    def fitted() -> Embedder:  # at the first use: it takes seconds
        return of_database(database)

    def embedder(texts: Sequence[str]) -> np.ndarray:
        return fitted()(texts)

    return embedder, "TF-IDF"


class Subject(NamedTuple):
    """What a run studies."""

    sae: "SparseAutoencoder"
    lm: "LanguageModel"
    site: str


def subject(run: Path, say: Say) -> Subject:
    """The autoencoder, the language model and the site of a run."""
    from saelab.runs.reopen import reopen  # with torch

    opened = reopen(run, "analyse", [], say)
    return Subject(opened.sae, opened.job.lm, opened.job.settings.site)
