"""The stage that writes a cache: runs a config's model over its text, in one process or in several under torchrun."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saelab.activations.cache.layout import BLOCK_TOKENS, MANIFEST, Manifest, read_manifest
from saelab.activations.cache.writer import begin, check, finish, rewrite, write_lane, written
from saelab.activations.stream import Pass, check_losses, provenance, run_model
from saelab.corpus.rows import Rows
from saelab.errors import SaelabError
from saelab.files import expanded, locked
from saelab.progress import Track, silent
from saelab.runs.job import Config, Job, Say, check_spread, quiet, settings_of
from saelab.runs.plan import checked_plan, plan_cache
from saelab.torchrun import processes
from saelab.training.distributed import connected
from saelab.training.settings import ParallelSettings

_AHEAD = 4
"""Number of passes whose rows are read ahead for a model on a GPU."""


def cache(
    config: Config,
    out: str | Path,
    overrides: Iterable[str] = (),
    *,
    tokens: int | None = None,
    track: Track = silent,
    say: Say = quiet,
) -> Path:
    """Write the activations of `tokens` tokens (default: training.tokens) into the folder `out`; returns the folder.

    Continues a cache that was interrupted. Verifies a finished cache and writes damaged shards again. Under torchrun
    each process writes lanes of its own, and the result is the same. Raises SaelabError if memory or disk are too
    small, or if the folder holds something else.
    """
    folder, (rank, world, local) = Path(expanded(out, "--out")), processes()
    settings = settings_of(config, overrides)
    if settings.activations.array is not None:
        raise SaelabError(f"activations: {settings.activations.array.path} is on disk already; train from it directly")
    requested = settings.training.tokens if tokens is None else tokens
    if requested < 1:
        raise SaelabError(f"tokens: {requested} is not a positive number")
    if settings.cache.lanes < world:
        raise SaelabError(
            f"cache.lanes: is {settings.cache.lanes}, but torchrun started {world} processes, which need a lane "
            f"each; set cache.lanes={world}"
        )
    check_spread(settings, world)
    _check_folder(folder)
    if rank:
        track, say = silent, quiet
    with connected(ParallelSettings()) as ranks:
        if ranks.first and not (folder / MANIFEST).exists():
            checked_plan(lambda: plan_cache(settings, folder, requested, local), say, lines=True)
        job = Job(settings, say, ranks)
        identity = cache_identity(job, requested)
        if identity["gradients"]:
            check_losses(job.corpus)
        with locked(folder) if ranks.first else nullcontext():
            finished = begin(folder, identity) if ranks.first else None
            ranks.every.barrier()
            if finished is None and not (folder / MANIFEST).exists():
                _write(job, folder, identity, range(rank, settings.cache.lanes, world), track)
            ranks.every.barrier()
            if ranks.first:
                manifest = finished or finish(folder, identity)
                _repair(job, folder, manifest, contents=finished is not None, track=track)
                _report(folder, manifest, requested, say)
            ranks.every.barrier()
    return folder


def verify(out: str | Path, *, track: Track = silent) -> Manifest:
    """The manifest of a finished cache. Raises SaelabError if a file does not match its sha256."""
    folder = Path(expanded(out, "--out"))
    manifest = read_manifest(folder)
    checked = track(
        check(folder, manifest, contents=True), "verifying", manifest.tokens, lambda item: item[0]["tokens"]
    )
    faults = [fault for _, fault in checked if fault]
    if faults:
        more = f" (and {len(faults) - 1} more shards)" if len(faults) > 1 else ""
        raise SaelabError(f"{faults[0]}{more}; `saelab cache` with the same CONFIG and --out {folder} repairs it")
    return manifest


def cache_identity(job: Job, tokens: int) -> dict[str, Any]:
    """The identity (FORMAT.md) of a cache that `job` writes."""
    settings, write = job.settings, job.settings.cache
    names = [Path(lm.name).name if Path(lm.name).is_dir() else lm.name for lm in job.lm.models]
    facts = (
        dict(zip(("model", "second_model"), names, strict=False))
        | provenance(job.lm, job.corpus, special_tokens=settings.activations.special_tokens)
        | {
            "sites": {site: job.lm.width(site) for site in write.sites or settings.sites.all},
            "dtype": write.dtype,
            "gradients": settings.writes_gradients,
            "seed": settings.seed,
            "rows_per_forward": write.rows_per_forward,
            "passes_per_shard": max(1, write.shard_tokens // (write.rows_per_forward * settings.context)),
            "block_tokens": BLOCK_TOKENS,
            "lanes": write.lanes,
            "nonfinite": write.nonfinite,
            "tokens": tokens,
        }
    )
    return json.loads(json.dumps(facts))  # equal to what the manifest gives back: lists instead of tuples


def _write(job: Job, folder: Path, identity: Mapping[str, Any], lanes: Iterable[int], track: Track) -> None:
    lanes = list(lanes)
    ahead = 0 if job.lm.device.type == "cpu" else _AHEAD
    passes = (
        added
        for lane in lanes
        for added in write_lane(folder, identity, lane, _rows(job), _forward(job, identity), ahead=ahead)
    )
    there = sum(written(folder, lane) for lane in lanes)
    if there:
        job.say(f"{folder}: {there:,} tokens are already written; continuing after them")
    share = identity["tokens"] * len(lanes) // identity["lanes"]
    for _ in track(passes, "caching", max(1, share - there), lambda added: added):
        pass
    job.report_empty_documents()


def _repair(job: Job, folder: Path, manifest: Manifest, *, contents: bool, track: Track) -> None:
    """Write damaged shards again; without `contents`, only missing files and wrong lengths count as damage."""
    checked = check(folder, manifest, contents=contents)
    if contents:
        checked = track(checked, "verifying", manifest.tokens, lambda item: item[0]["tokens"])
    for shard, fault in [(shard, fault) for shard, fault in checked if fault]:
        job.say(f"{fault}: writing shard {shard['name']} again")
        passes = rewrite(folder, manifest, shard["name"], _rows(job), _forward(job, manifest.identity))
        for _ in track(passes, f"shard {shard['name']}", shard["tokens"], lambda added: added):
            pass
        manifest = read_manifest(folder)


def _rows(job: Job) -> Callable[[int, Mapping[str, Any] | None], Rows]:
    seed, lanes = job.settings.seed, job.settings.cache.lanes

    def rows(lane: int, start: Mapping[str, Any] | None) -> Rows:
        return job.corpus.train_rows(seed=seed, lane=lane, lanes=lanes, start=start)

    return rows


def _forward(job: Job, identity: Mapping[str, Any]) -> Callable[[np.ndarray], Pass]:
    def forward(ids: np.ndarray) -> Pass:
        return run_model(
            job.lm,
            torch.from_numpy(ids),
            list(identity["sites"]),
            gradients=identity["gradients"],
            special_tokens=identity["special_tokens"],
        )

    return forward


def _report(folder: Path, manifest: Manifest, requested: int, say: Say) -> None:
    size = sum(facts["bytes"] for shard in manifest.shards for facts in shard["files"].values())
    say(f"{folder}: {manifest.tokens:,} tokens in {len(manifest.shards):,} shards, {size / 1e6:,.1f} MB")
    skipped = sum(shard["skipped"] for shard in manifest.shards)
    if skipped:
        say(f"note: {skipped:,} tokens with NaN or infinite values were left out")
    if manifest.tokens < requested:
        lanes = "" if manifest.identity["lanes"] == 1 else " of a lane"
        say(f"note: the text{lanes} ended before the requested {requested:,} tokens")


def _check_folder(folder: Path) -> None:
    """Raises SaelabError, before anything is loaded, if `folder` is not a folder and cannot be made."""
    try:
        there = folder.exists()
        parent = folder if there else next(path for path in folder.absolute().parents if path.exists())
    except OSError as error:
        raise SaelabError(f"{str(folder)[:80]}: cannot be a folder ({error.strerror}); choose another --out") from error
    if not parent.is_dir():
        raise SaelabError(f"{parent}: is not a folder; choose another --out")
    if not there and not os.access(parent, os.W_OK):
        raise SaelabError(f"{parent}: is not writable; choose another --out")
