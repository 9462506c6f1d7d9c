"""Controls of a run: runs that differ from it only in what makes them controls, in the folder `controls` of the run.

    untrained        the autoencoder that the training started from
    directions       random unit vectors, each active on as many tokens of the text as the run's feature of its number
    neurons          the MLP neurons of the site's block, the k largest of each token; an autoencoder that does nothing
    frozen_decoder   trained as the run, except that the decoder keeps its random start (`sae.freeze`)
    frozen_encoder   the same for the encoder
    reseed1, ...     trained as the run from other initial weights (`sae.seed`)

They are read from the same text as the run's feature database, so that densities can be compared. The trained ones get
the same batches as the run, in one pass of the language model.

An autoencoder without a budget and without trained thresholds (ReLU) starts with half of its features active on a
token. Its untrained control gets one threshold for all features, with which its L0 is that of the run.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saelab.activations.stream import read_activations
from saelab.errors import SaelabError, SettingError, did_you_mean
from saelab.features.database import Database, open_database
from saelab.files import expanded, locked
from saelab.progress import Say, Track, quiet, silent
from saelab.runs import folder
from saelab.runs.calibration import calibrate, calibration_rows
from saelab.runs.config import RunSettings
from saelab.runs.job import Config, Job, settings_of
from saelab.runs.reopen import reopen
from saelab.runs.save import check_out, save_control, write_new_run
from saelab.runs.stages import index_together
from saelab.runs.sweep import train_together
from saelab.runs.train import starting_point
from saelab.sae.model import SparseAutoencoder
from saelab.sae.settings import AuxSettings, SaeSettings
from saelab.sae.thresholds import calibrate as thresholds_for
from saelab.sae.untrained import directions, neurons
from saelab.training.settings import ParallelSettings
from saelab.training.trainer import Trainer

RESEED = folder.RESEED
KINDS = ("untrained", "directions", "neurons", "frozen_decoder", "frozen_encoder", RESEED)
TRAINED = ("frozen_decoder", "frozen_encoder", RESEED)
UNTRAINED = ("directions", "neurons")
"""Those that need no training, and nothing that a training begins with; there are no others of an adopted run."""
SITE = "mlp.hook_post"
"""Where the neurons of a block are read."""


def controls(
    run: str | Path,
    overrides: Iterable[str] = (),
    kinds: Sequence[str] | None = None,
    *,
    reseeds: int = 2,
    force: bool = False,
    track: Track = silent,
    say: Say = quiet,
) -> list[Path]:
    """Make controls of a run, with their feature databases; returns their folders, in ``RUN/controls``.

    `kinds` are some of `KINDS`; None: those that there are for such a run. `overrides` are settings such as
    `training.tokens`, of what is trained. Of the kind `reseed` there are `reseeds`
    runs, with seeds after that of the run. Called again, it goes on where it was stopped or killed: what is finished
    stays. A control that was made from something else is replaced only with `force`. A signal stops it as it stops
    `train`.

    Raises SaelabError if `run` has no feature database or one of another text, for unknown kinds and other settings,
    if the model has no such neurons, if model or text are not those of the training, and if another process writes into
    the run; a training that fails does not stop the others, and an error at the end names it.
    """
    if kinds is not None and not kinds:
        raise SaelabError(f"kinds: none is named; choose from {', '.join(KINDS)}")
    for kind in kinds or ():
        if kind not in KINDS:
            raise SaelabError(f"kinds: there is no {kind!r} ({', '.join(KINDS)}).{did_you_mean(kind, KINDS)}")
    overrides = list(overrides)
    if overrides and kinds is not None and not set(kinds) & set(TRAINED):
        raise SettingError(f"{overrides[0]}: {', '.join(kinds)} are not trained, and have no settings; leave it out")
    path = Path(expanded(run, "RUN"))
    folder.check_run(path)
    with ExitStack() as locks:
        locks.enter_context(locked(path))
        made = _of_run(path, overrides, kinds, reseeds, track, say)
        for each in made:
            locks.enter_context(locked(each.path))
        for each in made:
            each.check(force)
        failed = train_together([each.job for each in made if each.make is None], force, track, say)
        for each in made:
            if each.make is not None and not each.finished:
                each.make(each)
        finished = [each for each in made if each.path not in failed]
        index_together([each.job for each in finished], track)
    if failed:
        listed = "; ".join(f"{path.name}: {error}" for path, error in failed.items())
        raise SaelabError(f"{path / folder.CONTROLS}: {len(failed)} of {len(made)} controls failed; {listed}")
    return [each.path for each in made]


def neuron_run(
    config: Config, overrides: Iterable[str] = (), *, force: bool = False, track: Track = silent, say: Say = quiet
) -> Path:
    """Make a run of the MLP neurons of the block of a config's site, with its feature database; returns its folder.

    The k largest neurons of each token are active, k as in the config. Nothing is trained. Raises SaelabError as `run`
    does, and if the model has no such neurons.
    """
    settings = settings_of(config, overrides)
    with locked(Path(settings.out)):
        made = _neurons(Job(settings, say), Path(settings.out), settings.sae.k)
        record = folder.training_record(made.path)
        if record and "control" not in record:
            raise SaelabError(f"{made.path}: has an autoencoder that was trained; choose another `out`")
        made.check(force)
        if made.make is not None and not made.finished:
            made.make(made)
        index_together([made.job], track)
    return made.path


@dataclass(frozen=True)
class _Control:
    """A control to be made."""

    kind: str
    job: Job
    inputs: str
    """What it is made from, as its record says."""
    make: "Callable[[_Control], None] | None" = None
    """Writes its checkpoint; None: it is trained."""

    @property
    def path(self) -> Path:
        return Path(self.job.settings.out)

    @property
    def finished(self) -> bool:
        complete = folder.training_record(self.path).get("complete")
        return bool(complete) and self.begun and folder.has_checkpoint(self.path)

    @property
    def begun(self) -> bool:
        """Whether its folder has it, whole or in part."""
        return folder.training_record(self.path).get("inputs") == self.inputs

    def check(self, force: bool) -> None:
        """Raises SaelabError if something else is in its folder that may not be replaced."""
        if not force and not self.begun and folder.training_record(self.path):
            raise SaelabError(
                f"{self.path}: was made from something else, such as other settings or another feature database; give "
                "--force to replace it, and with it what was explained and scored there"
            )
        check_out(self.job.settings, force or self.begun)

    def save(self, sae: SparseAutoencoder, facts: dict[str, Any] | None = None) -> None:
        job = self.job
        write_new_run(job.settings, inputs=self.inputs, force=True)
        save_control(job.settings, job.lm, job.corpus, sae, self.kind, self.inputs, facts)


def _of_run(
    run: Path, overrides: Iterable[str], kinds: Sequence[str] | None, reseeds: int, track: Track, say: Say
) -> list[_Control]:
    """The controls of a run."""
    database = open_database(folder.features(run))
    opened = reopen(run, "controls", overrides, say)
    job, sae = opened.job, opened.sae
    of_text = _same_text(run, database, job)
    base = replace(job.settings, features=of_text.features, parallel=ParallelSettings())
    base = replace(base, sae=replace(base.sae, init_from=None))  # a control begins with random weights
    still = replace(base, training=settings_of(run / folder.SETTINGS).training)  # of those that are not trained
    l0 = database.arrays.manifest["entries"] / database.n_tokens
    made, adopted = [], folder.adopted(run) is not None
    for kind in dict.fromkeys(KINDS if kinds is None else kinds):
        if adopted and kind not in UNTRAINED:
            if kinds is not None:
                raise SaelabError(
                    f"{kind}: there is none of {run}, which was adopted: saelab does not know how it was trained; name "
                    f"other --kinds ({', '.join(UNTRAINED)})"
                )
        elif kind == "neurons":
            k = base.sae.k if base.sae.allocation.name != "threshold" else max(1, round(l0))
            made.append(_neurons(_beside(job, still, run, kind), run / folder.CONTROLS / kind, k))
        elif kind == "directions" and len(job.settings.sites.all) > 1:
            # a direction lies at one site
            if kinds is not None:
                raise SaelabError(f"{kind}: there are none of {run}, which has {len(job.settings.sites.all)} sites")
            say(f"{kind}: left out: {run} has {len(job.settings.sites.all)} sites")
        elif kind == "directions":
            of = str(folder.features_inputs(run))
            make = partial(_make_directions, sae=sae, database=database, track=track)
            made.append(_Control(kind, _beside(job, still, run, kind), f"directions of {of}", make))
        elif kind == "untrained":
            here = _beside(job, still, run, kind)
            make = partial(_make_untrained, l0=l0, track=track)
            made.append(_Control(kind, here, f"start of {here.training_inputs()}", make))
        else:
            try:
                settings = _trained(base, kind, reseeds)
            except SettingError as error:
                if kinds is not None:
                    raise SaelabError(f"{kind}: there is none of {run}: {error}; name other kinds") from error
                say(f"{kind}: left out: {error}")
                continue
            for name, trained in settings.items():
                # resampling sets encoder and decoder rows, so nothing that is frozen can be resampled
                training = base.training if kind == RESEED else replace(base.training, resample=None)
                here = _beside(job, replace(base, sae=trained, training=training), run, name)
                made.append(_Control(name, here, here.training_inputs()))
    return made


def _beside(job: Job, settings: RunSettings, run: Path, name: str) -> Job:
    out = run / folder.CONTROLS / name
    return job.beside(replace(settings, out=str(out)), lambda message: job.say(f"{name}: {message}"))


def _same_text(run: Path, database: Database, job: Job) -> RunSettings:
    """The settings of the run with which `Job.held_out` gives the rows of its feature database."""
    settings, rows = job.settings, np.asarray(database.arrays["tokens"])
    for tokens in (settings.features.tokens, database.n_tokens):
        found = job.held_out(tokens).numpy()
        if np.array_equal(found, rows):
            return replace(settings, features=replace(settings.features, tokens=tokens))
    raise SaelabError(
        f"{run}: its feature database is of another text than its settings give; `saelab index {run}` makes it again"
    )


def _trained(base: RunSettings, kind: str, reseeds: int) -> dict[str, SaeSettings]:
    """Settings of the autoencoders that are trained for a kind, by name. Raises SettingError if they do not fit."""
    if kind == RESEED:
        seeds = range(1, reseeds + 1)
        return {f"{RESEED}{i}": replace(base.sae, seed=base.weights_seed + i) for i in seeds}
    aux = replace(base.sae.aux, lift=base.sae.aux.lift and kind != "frozen_encoder")  # it sets the encoder's biases
    return {kind: replace(base.sae, freeze=kind.removeprefix("frozen_"), aux=aux)}


def _neurons(job: Job, out: Path, k: int) -> _Control:
    """The neurons of the block of the job's site, as a run in `out`. Raises SaelabError if there are none."""
    block = ".".join(job.settings.site.split(".")[:2])
    if not block.startswith("blocks."):
        raise SaelabError(
            f"neurons: {job.settings.site} is in no block, so it has no neurons; name other --kinds, or another site"
        )
    site = f"{block}.{SITE}"
    d = job.lm.width(site)
    sae = SaeSettings(n_features=d, k=min(k, d), aux=AuxSettings("none"))
    settings = replace(job.settings, out=str(out), site=site, target=None, more_sites=(), second_model=None, sae=sae)
    inputs = f"neurons of {job.lm.fingerprint} at {site}, k {sae.k}"
    return _Control("neurons", job.beside(settings, job.say), inputs, lambda made: made.save(neurons(d, sae.k)))


def _make_directions(made: _Control, *, sae: SparseAutoencoder, database: Database, track: Track) -> None:
    """Random directions, with the thresholds that give each as many active tokens as the run's feature of its number.

    A threshold lies between two pre-activations on the text of the database. Where pre-activations are equal, as on the
    same beginnings of rows, the number may differ. Needs 16 bytes of memory for each entry of the database.
    """
    job, s = made.job, made.job.settings
    found = directions(sae.n_features, sae.b_dec.cpu(), s.weights_seed).to(job.lm.device)
    found.normalisation = sae.normalisation  # b_dec is in its units
    rows = np.asarray(database.arrays["tokens"])
    batches = read_activations(job.lm, rows, s.site, s.features.rows_per_forward)
    values = (batch.values for batch in track(batches, "thresholds", rows.size, len))
    n_active = torch.from_numpy(np.asarray(database.table["n_active"], np.float64))
    densities = (n_active + 0.5) / (database.n_tokens + 1)  # the threshold is then between two pre-activations
    found.threshold = thresholds_for(found.pre_activations, values, densities, database.n_tokens).threshold
    made.save(found)


def _make_untrained(made: _Control, *, l0: float, track: Track) -> None:
    """The autoencoder as training starts from it, with thresholds if inference needs them."""
    job, s = made.job, made.job.settings
    sae, inputs = starting_point(job, track)
    sae.take_in_affinity()
    densities = Trainer(sae, s.training, s.sae).trained().densities
    if s.sae.allocation.name == "threshold" and sae.log_threshold is None:
        densities = torch.tensor(l0 / sae.n_features, dtype=torch.float64)
    facts: dict[str, Any] = inputs.record()
    if densities is not None:
        rows = calibration_rows(job.corpus, s.eval.tokens, job.say)
        read = {"inputs": inputs.map, "within": inputs.within if inputs.largest_norms else None}
        forward = s.eval.rows_per_forward
        facts |= calibrate(sae, job.lm, rows, s.sites, densities, **read, rows_per_forward=forward, track=track)
    made.save(inputs.folded(sae), facts)
