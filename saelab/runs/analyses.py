"""The analyses of a run: `saelab analyse RUN NAME`, and their results in the run folder.

To add one, write `saelab/analysis/NAME.py` with its function and result, a section of settings in
`saelab/analysis/settings.py`, and an entry of `ANALYSES`.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saelab.activations.stream import provenance
from saelab.analysis.attention.overview import attention
from saelab.analysis.attention.report import Attention
from saelab.analysis.dark_matter import DarkMatter, dark_matter
from saelab.analysis.dead import Dead, dead
from saelab.analysis.model_diff import ModelDiff, model_diff
from saelab.analysis.result import Result, rebuilt, stored
from saelab.analysis.settings import (
    AttentionSettings,
    DarkMatterSettings,
    DeadSettings,
    ExplanationsSettings,
    ModelDiffSettings,
    SimilaritySettings,
    SteeringSettings,
)
from saelab.analysis.similarities import Other, Similarities, similarities
from saelab.analysis.steering_effects import steering_effects
from saelab.analysis.steering_report import SteeringEffects
from saelab.autointerp.embedders import sentence_transformer, tfidf
from saelab.autointerp.similarity import Described, ExplanationSimilarities, compare_explanations, described
from saelab.autointerp.store import EXPLANATIONS
from saelab.encoded import Block, encoded
from saelab.errors import SaelabError, SettingError, did_you_mean
from saelab.features.database import open_database
from saelab.files import expanded, locked, replace_folder, translate_errors, translate_read_errors, write_json
from saelab.lm.model import LanguageModel
from saelab.progress import Track, silent
from saelab.runs import folder
from saelab.runs.job import Job, Say, quiet, settings_of
from saelab.runs.reopen import reopen
from saelab.runs.resume import silent_for
from saelab.sae.checkpoint import load
from saelab.sae.model import SparseAutoencoder
from saelab.tensors import write_tensors


@dataclass(frozen=True)
class Subject:
    """What an analysis is made from: a run, its autoencoder, its language model and held-out text."""

    run: Path
    sae: SparseAutoencoder
    job: Job
    track: Track

    @property
    def lm(self) -> LanguageModel:
        return self.job.lm

    @property
    def site(self) -> str:
        return self.job.settings.site

    @cached_property
    def trained(self) -> dict[str, Any]:
        """The record of the training."""
        return folder.training_record(self.run)

    def held_out(self, tokens: int) -> Tensor:
        """The first held-out rows, of about `tokens` tokens, ``[rows, context]``: those of evaluation, if as many."""
        return self.job.held_out(tokens)

    def blocks(self, rows: Tensor, rows_per_forward: int) -> Iterator[Block]:
        """Activations and codes of `rows` at the run's site, as `saelab.encoded.encoded` yields them."""
        return encoded(self.sae, self.lm, rows, self.job.settings.sites, rows_per_forward, track=self.track)

    def other(self, run: str, setting: str) -> tuple[SparseAutoencoder, str]:
        """The autoencoder of another run on the same model, and its site. Raises SaelabError, which names `setting`."""
        path = Path(expanded(run, setting))
        folder.check_run(path)
        sae, site = load(path, self.lm.device), settings_of(path / folder.SETTINGS).site
        fingerprint = (sae.metadata.get("saelab") or {}).get("model_fingerprint")
        if fingerprint not in (None, json.loads(json.dumps(provenance(self.lm, self.job.corpus)))["weights"]):
            raise SaelabError(
                f"{setting}: {path} was trained on another model than {self.run}; name a run on the same one"
            )
        return sae, site


class Analysis(NamedTuple):
    result: type[Result]
    make: Callable[[Subject, Any], Result]
    """From the subject and the section `analysis.NAME` of the settings."""
    reads: Callable[[Any], Sequence[str]] = lambda settings: ()
    """Other runs whose weights the result depends on, given the same section."""
    files: Sequence[str] = ()
    """Files of all these runs that it depends on beside weights and text."""


def _dead(subject: Subject, settings: DeadSettings) -> Dead:
    rows = subject.held_out(settings.tokens)
    blocks = subject.blocks(rows, settings.rows_per_forward)
    ages = silent_for(subject.run)
    return dead(subject.sae, blocks, len(rows), settings, site=subject.site, silent_for=ages)


def _attention(subject: Subject, settings: AttentionSettings) -> Attention:
    rows = subject.held_out(settings.tokens)
    return attention(subject.sae, subject.lm, rows, settings, subject.site, track=subject.track)


def _dark_matter(subject: Subject, settings: DarkMatterSettings) -> DarkMatter:
    sources = {}
    for run in settings.sources:
        sae, site = subject.other(run, "analysis.dark_matter.sources")
        sources[site if site not in sources else str(run)] = (sae, site)
    wider = None
    if settings.wider is not None:
        wider, site = subject.other(settings.wider, "analysis.dark_matter.wider")
        if site != subject.site:
            raise SaelabError(f"analysis.dark_matter.wider: {settings.wider} is at {site}, not at {subject.site}")
    rows = subject.held_out(settings.tokens)
    return dark_matter(
        subject.sae, subject.lm, rows, subject.site, settings, sources=sources, wider=wider, track=subject.track
    )


def _runs_of_dark_matter(settings: DarkMatterSettings) -> list[str]:
    return [*settings.sources, *([] if settings.wider is None else [settings.wider])]


def _steering(subject: Subject, settings: SteeringSettings) -> SteeringEffects:
    rows = subject.held_out(settings.tokens)
    return steering_effects(subject.sae, subject.lm, rows, subject.site, settings, track=subject.track)


def _similarity(subject: Subject, settings: SimilaritySettings) -> Similarities:
    setting = "analysis.similarity.other"
    if not settings.other:
        raise SettingError(f"{setting}: name the runs to compare with: {setting}=[RUN, ...]")
    others = [Other(run, *subject.other(run, setting)) for run in settings.other]
    rows = subject.held_out(settings.tokens)
    name = str(subject.run)
    return similarities(subject.sae, subject.lm, rows, subject.site, others, settings, name=name, track=subject.track)


def _explanations(subject: Subject, settings: ExplanationsSettings) -> ExplanationSimilarities:
    setting = "analysis.explanations.other"
    if not settings.other:
        raise SettingError(f"{setting}: name the runs to compare with: {setting}=[RUN, ...]")
    own = _described(subject.run, subject.sae)
    given = sentence_transformer(settings.embed) if settings.embed is not None else None
    found = []
    for run in settings.other:
        sae, site = subject.other(run, setting)
        other = _described(Path(expanded(run, setting)), sae)
        by = settings.pair
        if by == "site":
            by = "decoder" if site == subject.site else "explanation"
        embed = given or tfidf([*own.texts.values(), *other.texts.values()])
        compared = compare_explanations(own, other, embed, by=by, threshold=settings.threshold, name=run, site=site)
        found.append(compared)
    embedder = "TF-IDF" if settings.embed is None else Path(settings.embed).name
    return ExplanationSimilarities(subject.site, len(own.texts), own.explainers, embedder, tuple(found))


def _model_diff(subject: Subject, settings: ModelDiffSettings) -> ModelDiff:
    rows = subject.held_out(settings.tokens)
    return model_diff(subject.sae, subject.blocks(rows, settings.rows_per_forward))


def _described(run: Path, sae: SparseAutoencoder) -> Described:
    """Raises SaelabError if there are no explanations."""
    inputs = str(open_database(folder.features(run)).arrays.manifest["inputs"])
    found = described(run / folder.AUTOINTERP, inputs, sae.W_dec.detach().float().cpu().numpy())
    if not found.texts:
        raise SaelabError(f"{run}: has no explanations; `saelab explain {run} --features 0:` makes them")
    return found


ANALYSES: dict[str, Analysis] = {
    "dead": Analysis(Dead, _dead),
    "attention": Analysis(Attention, _attention),
    "dark_matter": Analysis(DarkMatter, _dark_matter, _runs_of_dark_matter),
    "steering": Analysis(SteeringEffects, _steering),
    "similarity": Analysis(Similarities, _similarity, lambda settings: settings.other),
    "explanations": Analysis(
        ExplanationSimilarities,
        _explanations,
        lambda settings: settings.other,
        (f"{folder.AUTOINTERP}/{EXPLANATIONS}",),
    ),
    "model_diff": Analysis(ModelDiff, _model_diff),
}
"""By name; the name is also that of the section of settings, ``analysis.NAME``."""


def analyse(
    run: str | Path,
    name: str,
    overrides: Iterable[str] = (),
    *,
    force: bool = False,
    track: Track = silent,
    say: Say = quiet,
) -> Result:
    """The result of the analysis `name` of a run folder, which is stored in the folder.

    A stored result of the same weights, text and settings is returned, unless `force` asks for a new one. `overrides`
    may set `analysis.NAME.*` and the device. Raises SaelabError if there is no such analysis, as `saelab.evaluate`
    does, and for another text or model than in training.
    """
    run = Path(expanded(run, "RUN"))
    analysis = _analysis(name)
    overrides = list(overrides)
    for override in overrides:
        if override.startswith("analysis.") and not override.startswith((f"analysis.{name}.", f"analysis.{name}=")):
            raise SaelabError(f"{override}: has no effect on `{name}`; its settings are analysis.{name}.*")
    folder.check_run(run)
    with locked(run):
        opened = reopen(run, "analyse", overrides, say)
        settings = getattr(opened.job.settings.analysis, name)
        others = [Path(expanded(other, f"analysis.{name}")) for other in analysis.reads(settings)]
        for other in others:
            folder.check_run(other)
        inputs = " ".join(opened.job.result_inputs(each, settings) for each in (run, *others))
        inputs += "".join(f" {_digest(each / name)}" for each in (run, *others) for name in analysis.files)
        if not force and (folder.analysis(run, name) or {}).get("inputs") == inputs:
            say(f"{name}: up to date")
            return _read(run, name, analysis)
        result = analysis.make(Subject(run, opened.sae, opened.job, track), settings)
        opened.job.report_empty_documents()
        _write(run, name, result, {"inputs": inputs, "settings": asdict(settings)})
    return result


def read_analysis(run: str | Path, name: str) -> Result | None:
    """The stored result of the analysis `name` of a run folder; None if there is none.

    Raises SaelabError if there is no such analysis, or if the result is damaged.
    """
    run, analysis = Path(expanded(run, "RUN")), _analysis(name)
    return None if folder.analysis(run, name) is None else _read(run, name, analysis)


def _analysis(name: str) -> Analysis:
    if name not in ANALYSES:
        raise SaelabError(f"{name}: no such analysis ({', '.join(ANALYSES)}).{did_you_mean(name, ANALYSES)}")
    return ANALYSES[name]


def _digest(path: Path) -> str:
    """A hash of a file's content, "" if there is none."""
    if not path.is_file():
        return ""
    with translate_errors(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(run: Path, name: str, analysis: Analysis) -> Result:
    remedy = f"`saelab analyse {run} {name} --force` makes it again."
    path = folder.analysis_folder(run, name)
    with translate_read_errors(path, "a result", remedy, (KeyError, TypeError, ValueError, AttributeError)):
        return rebuilt(analysis.result, folder.analysis(run, name))


def _write(run: Path, name: str, result: Result, record: dict[str, Any]) -> None:
    figures, arrays = stored(result)
    path = run / folder.ANALYSES / name
    with translate_errors(run), replace_folder(path) as unfinished:
        write_json(unfinished / folder.FIGURES, record | figures)
        if arrays:
            tensors = {key: torch.from_numpy(array.copy()) for key, array in arrays.items()}
            write_tensors(unfinished / folder.ARRAYS, tensors)
