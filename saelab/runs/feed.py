"""Opens the activations that a run trains on: from the language model, a cache or an array, as its settings say."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from saelab.activations.array.rows import Array
from saelab.activations.cache.layout import difference
from saelab.activations.cache.reader import Cache, open_cache
from saelab.activations.settings import ArraySource, CacheSource
from saelab.activations.source import SAMPLE_TOKENS, FromCache, FromModel, Source
from saelab.activations.stream import provenance
from saelab.errors import SaelabError
from saelab.progress import Track
from saelab.runs.config import RunSettings
from saelab.runs.job import Job


def open_source(
    job: Job, track: Track, start: Mapping[str, Any] | None = None, *, beside: Sequence[Job] = ()
) -> Source:
    """The activations of `job`, with gradients if its affinity needs them.

    With `start`, a `Source.state`, the source continues from that state. With other jobs `beside` it, which differ in
    autoencoder and site, the source has the activations of all their `sites_of`. All processes of the job get the
    same batches: they share out the passes of the model, and each reads the whole of a cache or array. Raises
    SaelabError if the cache is damaged, or if it was made for something else: the message names the difference.
    """
    settings, sites = job.settings, sites_of([job, *beside])
    gradients = any(each.settings.sae.needs_gradients for each in (job, *beside))
    stored, source = job.array, settings.activations.array or settings.activations.cache
    if isinstance(source, CacheSource):
        stored = open_cache_for(job, source)
    if stored is not None and source is not None:
        _check_batches(job, stored, source)
        return FromCache(
            stored,
            sites,
            batch_tokens=settings.training.batch,
            seed=settings.seed,
            buffer_tokens=cache_group_tokens(settings, source),
            gradients=gradients,
            device=job.model.device,
            start=start,
        )
    return FromModel(
        job.lm,
        job.corpus,
        sites,
        settings.activations.stream,
        batch_tokens=settings.training.batch,
        seed=settings.seed,
        gradients=gradients,
        special_tokens=settings.activations.special_tokens,
        sample_tokens=min(SAMPLE_TOKENS, settings.training.tokens),
        start=start,
        ranks=job.ranks.every,
        track=track,
        say=job.say,
    )


def sites_of(jobs: Sequence[Job]) -> list[str]:
    """The sites of some jobs, each once, in the order in which `open_source` puts them side by side."""
    return list(dict.fromkeys(site for job in jobs for site in job.settings.sites.all))


def open_cache_for(job: Job, source: CacheSource) -> Cache:
    """The cache at `source`. Raises SaelabError if its activations are not those that `job` itself would compute."""
    cache = open_cache(source.path)
    special = job.settings.activations.special_tokens
    differs = difference(cache.identity, provenance(job.lm, job.corpus, special_tokens=special))
    if differs:
        raise SaelabError(
            f"activations.cache: {source.path} was made for something else than this run trains on: its {differs}"
        )
    return cache


def _check_batches(job: Job, stored: Cache | Array, source: CacheSource | ArraySource) -> None:
    """Raises SaelabError if a cache or array does not fill a batch; notes if its tokens repeat or its batches are
    smaller."""
    tokens, batch_tokens = job.settings.training.tokens, job.settings.training.batch
    kind, more = ("cache", "cache more") if isinstance(source, CacheSource) else ("array", "use a longer array")
    if stored.tokens < batch_tokens:
        raise SaelabError(
            f"activations.{kind}: {source.path} holds {stored.tokens:,} tokens, fewer than one batch has; {more}, or "
            f"set `training.batch` (now {batch_tokens:,}) lower"
        )
    if stored.tokens < tokens:
        job.say(f"note: {tokens:,} tokens are trained on and the {kind} holds {stored.tokens:,}, so they repeat")

    group = stored.tokens / math.ceil(stored.tokens / cache_group_tokens(job.settings, source))
    mean = group / math.ceil(group / batch_tokens)
    if mean < 0.95 * batch_tokens:
        job.say(
            f"note: the {kind}'s {stored.tokens:,} tokens are cut into batches of {mean:,.0f}, not {batch_tokens:,}, "
            f"so that training takes fewer; {more}, or choose another `training.batch`"
        )


def cache_group_tokens(settings: RunSettings, source: CacheSource | ArraySource) -> int:
    """Largest number of tokens of a group: 16 batches at least, so that equal batches are almost whole."""
    return max(source.buffer_tokens, 16 * settings.training.batch)
