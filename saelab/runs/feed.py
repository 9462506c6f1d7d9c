"""The batches that a run trains on, from wherever its settings say."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from saelab.activations.cache.layout import difference
from saelab.activations.cache.reader import Cache, open_cache
from saelab.activations.settings import CacheSource
from saelab.activations.stream import ActivationBatch, provenance, read_activations, shuffled_batches
from saelab.corpus import Corpus
from saelab.errors import SaelabError
from saelab.progress import Track
from saelab.runs.config import RunSettings
from saelab.runs.job import Job

SAMPLE_TOKENS = 32_768
"""Activations that b_dec, the input scale and the encoder's first scale are set from."""


@dataclass(frozen=True)
class Feed:
    """Where a run starts from, and what it is trained on."""

    sample: Tensor
    """The first activations, `SAMPLE_TOKENS` or few more, ``[tokens, d_in]`` float32."""
    batches: Iterator[ActivationBatch]
    """Shuffled, of at most ``training.batch`` tokens, without end; the sample's tokens are among them."""


def open_feed(job: Job, track: Track) -> Feed:
    """The activations of `job`, with gradients where its affinity needs them.

    Raises SaelabError where the cache is damaged, or was made for something else: the message names what differs.
    """
    source = job.settings.activations.cache
    return _from_stream(job, track) if source is None else _from_cache(job, source)


def open_cache_for(job: Job, source: CacheSource) -> Cache:
    """The cache at `source`, if it holds what `job` would make itself."""
    cache = open_cache(source.path)
    special = job.settings.activations.special_tokens
    differs = difference(cache.identity, provenance(job.lm, job.corpus, special_tokens=special))
    if differs:
        raise SaelabError(
            f"activations.cache: {source.path} was made for something else than this run trains on: its {differs}"
        )
    return cache


def _from_cache(job: Job, source: CacheSource) -> Feed:
    settings = job.settings
    cache, wanted, batch_tokens = open_cache_for(job, source), settings.training.tokens, settings.training.batch
    if cache.tokens < batch_tokens:
        raise SaelabError(
            f"activations.cache: {source.path} holds {cache.tokens:,} tokens, fewer than one batch has; cache more, or "
            f"set `training.batch` (now {batch_tokens:,}) lower"
        )
    if cache.tokens < wanted:
        job.say(f"note: {wanted:,} tokens are trained on and the cache holds {cache.tokens:,}: they come again")

    together = shuffled_together(settings, source)
    group = cache.tokens / math.ceil(cache.tokens / together)
    mean = group / math.ceil(group / batch_tokens)
    if mean < 0.95 * batch_tokens:
        job.say(
            f"note: the cache's {cache.tokens:,} tokens are cut into batches of {mean:,.0f}, not {batch_tokens:,}, so "
            "that fewer are trained on; cache more, or choose another `training.batch`"
        )

    def batches() -> Iterator[ActivationBatch]:
        with cache.batches(
            settings.site,
            batch_tokens,
            seed=settings.seed,
            buffer_tokens=together,
            gradients=settings.sae.needs_gradients,
        ) as read:
            yield from read

    endless = batches()
    head, held = [], 0
    while held < min(SAMPLE_TOKENS, cache.tokens):
        head.append(next(endless))
        held += len(head[-1])
    sample = torch.cat([batch.values for batch in head]).to(job.lm.device).float()
    return Feed(sample, chain(_drain(head), endless))


def shuffled_together(settings: RunSettings, source: CacheSource) -> int:
    """Tokens of a group: no batch is larger, and none much smaller where a group has many."""
    return max(source.buffer_tokens, 16 * settings.training.batch)


def _from_stream(job: Job, track: Track) -> Feed:
    settings, stream = job.settings, job.settings.activations.stream
    read = read_activations(
        job.lm,
        _rows(job),
        settings.site,
        stream.rows_per_forward,
        gradients=settings.sae.needs_gradients,
        special_tokens=settings.activations.special_tokens,
    )
    wanted = min(max(stream.buffer_tokens, SAMPLE_TOKENS), settings.training.tokens)

    def first() -> Iterator[ActivationBatch]:
        held = 0
        while held < wanted:
            batch = next(read)
            held += len(batch)
            yield batch

    head = list(track(first(), "first buffer", wanted, len))
    sample = torch.cat([batch.values for batch in head[: 1 + SAMPLE_TOKENS // len(head[0])]])[:SAMPLE_TOKENS]
    rest = chain(_drain(head), read)
    return Feed(sample, shuffled_batches(rest, settings.training.batch, stream.buffer_tokens, settings.seed))


def _drain(batches: list[ActivationBatch]) -> Iterator[ActivationBatch]:
    """The batches in order, each let go of as it leaves."""
    batches.reverse()
    while batches:
        yield batches.pop()


def _rows(job: Job) -> Iterator[np.ndarray]:
    """Rows without end: epoch after epoch, each in an order of its own."""
    corpus: Corpus = job.corpus
    epoch = 0
    while True:
        ordinary = job.settings.activations.special_tokens
        for row in corpus.train_rows(seed=job.settings.seed, epoch=epoch):
            ordinary = ordinary or not corpus.special_ids.issuperset(row.tolist())
            yield row
        if not ordinary:  # another epoch would bring no more
            raise SaelabError("corpus: its training rows hold special tokens only, so there is nothing to train on")
        epoch += 1
        job.say(f"the corpus came to its end: epoch {epoch + 1} begins")
