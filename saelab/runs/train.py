"""The training stage: from a config, or from the last state of a run, to a run folder with a checkpoint."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saelab.activations.cache.layout import difference
from saelab.activations.sites import Sites
from saelab.activations.stream import side_by_side
from saelab.errors import SaelabError, SettingError
from saelab.files import expanded, locked, translate_errors, write_whole
from saelab.lm.load import resolve_device
from saelab.progress import Track, silent
from saelab.runs import folder
from saelab.runs.config import RunSettings
from saelab.runs.feed import open_source
from saelab.runs.from_hub import load
from saelab.runs.inputs import Inputs, first_inputs
from saelab.runs.job import Config, Job, Say, check_spread, quiet, settings_of
from saelab.runs.log import check_log
from saelab.runs.loop import Failures, Training, site_columns, train_all
from saelab.runs.plan import checked_plan, plan_training
from saelab.runs.resume import last_state, resumable, resumed_settings, states
from saelab.runs.save import check_out, write_new_run, write_settings
from saelab.runs.unread import note_unread
from saelab.sae.init_from import notes_on_start, start_from
from saelab.sae.input_map import InputMap
from saelab.sae.model import Batch, SparseAutoencoder
from saelab.sae.new import bare_autoencoder, new_autoencoder, widths_of
from saelab.sae.normalisation import NORMALISATIONS
from saelab.torchrun import processes, restarted
from saelab.training.distributed import connected, mesh_shape, own_device
from saelab.training.state import check_common
from saelab.training.trainer import Trainer


def train(
    config: Config, overrides: Iterable[str] = (), *, force: bool = False, track: Track = silent, say: Say = quiet
) -> Path:
    """Train an autoencoder as `config` says; returns the run folder.

    An existing run folder is never overwritten without `force`. Ctrl-C, SIGTERM and SIGHUP finish the step and save the
    state, from which `resume` continues; then Ctrl-C raises KeyboardInterrupt, and the others SystemExit with 143 and
    129. Raises SaelabError for bad settings, text, models and activations, and if another process writes into the run.

    Under torchrun each process calls it, and they train together as `parallel` says. If torchrun starts them again,
    they go on from the last state.
    """
    with _processes(settings_of(config, overrides), say, track) as (job, track):
        return go_on(job, track) if restarted() and _begun(job) else begin(job, force, track)


def resume(
    run: str | Path,
    overrides: Iterable[str] = (),
    *,
    config: Config | None = None,
    track: Track = silent,
    say: Say = quiet,
) -> Path:
    """Continue the training in the folder `run` from its last state, or restart it if there is none; returns `run`.

    On a CPU with as many threads the result equals an uninterrupted training to the bit. `overrides` may raise
    `training.tokens` and change the device, the log and the interval of states. Raises SaelabError for any other
    difference, also in `config`, and if model, text or cache are not those of the run. Signals are as in `train`.
    """
    run = Path(expanded(run, "RUN"))
    if not (run / folder.SETTINGS).is_file() or not (run / folder.TRAINING).is_file():
        raise SaelabError(f"{run}: not a run folder (`saelab train CONFIG` makes one)")
    folder.check_trained(run)
    settings = settings_of(run / folder.SETTINGS if config is None else config, overrides)
    with _processes(resumed_settings(run, replace(settings, out=str(run))), say, track) as (job, track):
        return go_on(job, track)


@contextmanager
def _processes(settings: RunSettings, say: Say, track: Track) -> Iterator[tuple[Job, Track]]:
    """Yields the part of a training that this process has, and its `track`; only the first process speaks and writes.

    In the block no other command may write into the run folder.
    """
    check_spread(settings, processes().world)
    with connected(settings.parallel, resolve_device(own_device(settings.device))) as ranks:
        if not ranks.first:
            say, track = quiet, silent
        with locked(Path(settings.out)) if ranks.first else nullcontext():
            yield Job(settings, say, ranks), track


def _begun(job: Job) -> bool:
    """Whether the first process finds the training of `job` in its run folder."""
    same = folder.training_record(Path(job.settings.out)).get("inputs") == job.training_inputs()
    return bool(job.ranks.every.largest(same and job.ranks.first)[0])


def begin(job: Job, force: bool, track: Track) -> Path:
    """Train `job` from its beginning. Its run folder must be locked."""
    note_unread([job.settings], job.say)
    return _only(begin_all([job], force, track, job.say), job)


def begin_all(jobs: Sequence[Job], force: bool, track: Track, say: Say) -> Failures:
    """Train jobs, which may differ in autoencoder and site, from their beginning on the same batches.

    Their run folders must be locked; `say` speaks for all. Returns the runs that failed; raises as `train_all` does.
    """
    job, ranks = jobs[0], jobs[0].ranks
    _check_shares(jobs)

    def check() -> None:
        for each in jobs:
            check_out(each.settings, force)
            _check_start(each)
        check_log(job.settings.training)
        checked_plan(lambda: plan_training(*(each.settings for each in jobs), loaded=job.loaded), say)

    ranks.once(check)
    source = open_source(job.beside(job.settings, say), track, beside=jobs[1:])
    trainings: list[Training] = []
    failed: Failures = {}
    sample, columns = source.sample(), site_columns(jobs)
    for sites in dict.fromkeys(each.settings.sites for each in jobs):
        here = [each for each in jobs if each.settings.sites == sites]
        first, target = _at(sites, sample, columns)
        widths = [stop - start for start, stop in (columns[site] for site in sites.inputs)]
        try:
            inputs, scaled = first_inputs(first, here[0], target, widths)
        except SaelabError as error:
            failed |= dict.fromkeys((Path(each.settings.out) for each in here), error)
            continue
        for each in here:
            try:
                sae = _initial(each, scaled, inputs, widths)
            except SaelabError as error:
                failed[Path(each.settings.out)] = error
                continue
            trainer = Trainer(sae, each.settings.training, each.settings.sae)
            trainings.append(Training(each, trainer, replace(inputs), torch.get_rng_state()))
        del first, target, scaled
    del sample  # the first step needs the memory
    for each in [training.job for training in trainings]:
        known = {"inputs": each.training_inputs(), "start": each.start}
        ranks.once(lambda each=each, known=known: write_new_run(each.settings, **known, force=force))
        ranks.every.together(lambda each=each: check_common(Path(each.settings.out)))
    if not trainings:
        source.close()
        return failed
    return failed | train_all(trainings, columns, source, track, say)


def _at(sites: Sites, values: Tensor, columns: Mapping[str, tuple[int, int]]) -> tuple[Tensor, Tensor | None]:
    """The activations that an autoencoder reads, and those at its target site, given those of all sites."""
    parts = {site: values[:, slice(*columns[site])] for site in sites.all}
    target = None if sites.target is None else parts[sites.target].contiguous()
    return side_by_side([parts[site] for site in sites.inputs]).contiguous(), target


def _initial(job: Job, sample: Batch, inputs: Inputs, site_widths: Sequence[int]) -> SparseAutoencoder:
    """The autoencoder that the training of `job` starts from, given the first of its `inputs` and their widths."""
    settings, seed = job.settings.sae, job.settings.weights_seed
    if settings.init_from is None:
        options = {"seed": seed, "site_widths": site_widths, "ranks": job.ranks}
        return new_autoencoder(settings, sample.x, target=sample.target, **options)
    torch.manual_seed(seed)
    scale = 1.0 if inputs.target_scale is None else inputs.target_scale
    assert isinstance(inputs.map, InputMap)  # `_check_start` refused a crosscoder
    return start_from(load(settings.init_from), settings, sample.x, inputs.map, scale, ranks=job.ranks)


def _check_start(job: Job) -> None:
    """Raises SaelabError if the training of `job` cannot start from its checkpoint, and says what it leaves out."""
    settings, sites = job.settings.sae, job.settings.sites
    if settings.init_from is None:
        return
    if sites.more:
        raise SettingError("sae.init_from: a crosscoder starts with random weights; leave out init_from or more_sites")
    widths = (job.model.width(site) for site in sites.all)
    inputs = job.settings.activations.inputs
    normalisation = inputs if inputs in NORMALISATIONS else None
    for note in notes_on_start(load(settings.init_from), settings, *widths, normalisation=normalisation):
        job.say(f"note: {note}")


def starting_point(job: Job, track: Track) -> tuple[SparseAutoencoder, Inputs]:
    """The autoencoder that the training of `job` starts from, and how activations become its inputs."""
    with closing(open_source(job, track)) as source:
        sites, columns = job.settings.sites, site_columns([job])
        first, target = _at(sites, source.sample(), columns)
    widths = [stop - start for start, stop in (columns[site] for site in sites.inputs)]
    inputs, scaled = first_inputs(first, job, target, widths)
    return _initial(job, scaled, inputs, widths), inputs


def go_on(job: Job, track: Track) -> Path:
    """Train `job` from the last state in its run folder, which must be locked."""
    run = Path(job.settings.out)
    if not states(run):
        # the weights of a script, or of an earlier version, are not replaced
        if folder.has_checkpoint(run) or folder.training_record(run).get("inputs") is None:
            raise SaelabError(
                f"{run}: has no state to go on from; `saelab train {run / folder.SETTINGS} --force` trains it again"
            )
        job.say(f"{run}: no state was saved so far; training starts again")
        return begin(job, True, track)
    return _only(go_on_all([job], track, job.say), job)


def go_on_all(jobs: Sequence[Job], track: Track, say: Say) -> Failures:
    """Train jobs, which may differ in autoencoder and site, from their last states, all at the same batch.

    Their run folders must be locked; `say` speaks for all. Returns the runs that failed; raises as `train_all` does.
    """
    job, position = jobs[0], None
    _check_shares(jobs)
    plan = [each.settings for each in jobs]

    def check() -> None:
        check_log(job.settings.training)
        checked_plan(lambda: plan_training(*plan, loaded=job.loaded, resumed=True), say)

    job.ranks.once(check)
    trainings: list[Training] = []
    failed: Failures = {}
    for each in jobs:
        try:
            training, position = _resumed(each)
        except SaelabError as error:
            failed[Path(each.settings.out)] = error
            continue
        if not training.trainer.finished:
            trainings.append(training)
        elif folder.training_record(training.run).get("complete"):
            done = f"{training.trainer.tokens:,} tokens"
            each.say(f"{training.run}: all {done} are trained on; training.tokens=N trains on more")
        else:  # it was stopped after the last step
            with resumable(training.run, job.ranks):
                training.finish(track)
    for training in trainings:
        training.job.say(f"{training.run}: training continues after {training.trainer.tokens:,} tokens")
        job.ranks.once(partial(_take_up, training))
    if not trainings:
        return failed
    first, *others = going = [training.job for training in trainings]
    source = open_source(first.beside(first.settings, say), track, position, beside=others)
    return failed | train_all(trainings, site_columns(going), source, track, say)


def _check_shares(jobs: Sequence[Job]) -> None:
    """Raises SaelabError if the processes are not as many as `jobs` say, or if one would have nothing to do."""
    for job in jobs:
        settings, (data, features) = job.settings, mesh_shape(job.settings.parallel, job.ranks.every.size)
        if settings.training.batch < data:
            raise SaelabError(
                f"training.batch: {settings.training.batch} tokens are fewer than the {data} processes that share them"
            )
        if settings.sae.n_features < features:
            raise SaelabError(
                f"sae.n_features: {settings.sae.n_features} are fewer than the {features} processes that share them"
            )


def _take_up(training: Training) -> None:
    """Write settings and log of a training that goes on."""
    run = training.run
    with translate_errors(run):
        write_settings(run, training.job.settings)
        write_whole(run / folder.METRICS, _lines_before(run / folder.METRICS, training.trainer.steps))


def _resumed(job: Job) -> tuple[Training, dict[str, Any]]:
    """The training of `job` as its last state left it, and the position in the source."""
    settings, run, device = job.settings, Path(job.settings.out), job.model.device
    widths = widths_of(settings.sites, {site: job.model.width(site) for site in settings.sites.all})
    sae = bare_autoencoder(settings.sae, *widths, ranks=job.ranks).to(device)
    trainer = Trainer(sae, settings.training, settings.sae)
    state = last_state(run, device, trainer.own_rows)
    differs = difference(state["provenance"], job.provenance())
    if differs:
        raise SaelabError(f"{run}: was trained on something else than its settings name now: its {differs}")
    trainer.load_state_dict(state.pop("trainer"))  # frees its copy of the weights
    return Training(job, trainer, Inputs.from_state(state), state["rng"], state["seconds"]), state["source"]


def _only(failed: Failures, job: Job) -> Path:
    """The run folder of `job`. Raises its error if it is among those that failed."""
    for error in failed.values():
        raise error
    return Path(job.settings.out)


def _lines_before(metrics: Path, steps: int) -> str:
    """The log of the first `steps` steps, without lines that a killed training wrote after its last state."""
    if not metrics.is_file():
        return ""
    kept = []
    for line in metrics.read_bytes().splitlines():
        try:
            if json.loads(line)["step"] >= steps:
                break
        except (ValueError, KeyError, TypeError):  # cut off by the kill, or damaged
            break
        kept.append(line.decode() + "\n")
    return "".join(kept)
