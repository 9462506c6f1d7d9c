"""The source that a run's settings name, from its beginning or from a state, as another process would open it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from saelab.activations.source import FromCache, FromModel, Source
from saelab.activations.stream import ActivationBatch
from saelab.errors import SaelabError
from saelab.lm.model import LanguageModel
from saelab.progress import silent
from saelab.ranks import ALONE, Ranks
from saelab.runs import feed
from saelab.runs.cache import cache
from saelab.runs.feed import open_source
from saelab.runs.job import Job, settings_of
from tests.activations.going_on import check_going_on, same, walk
from tests.runs.test_stages import small
from tests.threads import run_threads


def config(tmp_path: Path, kind: str, *, cached: bool, gradients: bool) -> dict[str, Any]:
    """Groups of 1,000 tokens from the model, of 3,200 from a cache, cut into batches of 200."""
    changes = {"activations": {"stream": {"buffer_tokens": 1000, "rows_per_forward": 8}}}
    chosen = small(tmp_path, kind) | changes
    if gradients:
        chosen["sae"] = {"n_features": 64, "k": 4, "affinity": "gradient"}
    if cached:
        write = {"rows_per_forward": 4, "shard_tokens": 1000, "dtype": "float32"}
        folder = cache(chosen | {"cache": write}, tmp_path / "cache", tokens=5000)
        chosen["activations"] = {"cache": str(folder)}
    return chosen


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("cached", [False, True], ids=["stream", "cache"])
@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox"])
def test_a_source_opened_again_continues_from_every_batch(
    tmp_path: Path, kind: str, cached: bool, gradients: bool
) -> None:
    chosen = config(tmp_path, kind, cached=cached, gradients=gradients)

    def opened(start: dict[str, Any] | None = None) -> Source:
        return open_source(Job(settings_of(chosen)), silent, start)

    source = opened()
    assert isinstance(source, FromCache if cached else FromModel)
    source.sample()
    batch = next(source)
    assert (batch.gradients is not None) == gradients
    source.close()
    check_going_on(opened, 12)


@pytest.mark.parametrize("cached", [False, True], ids=["stream", "cache"])
def test_two_processes_get_the_batches_of_one_and_share_the_passes_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    settings = settings_of(config(tmp_path, "gpt2", cached=cached, gradients=False))
    loaded = [Job(settings), Job(settings)]
    passes: list[LanguageModel] = []
    lms = [job.lm for job in loaded]
    run = LanguageModel.activations
    monkeypatch.setattr(LanguageModel, "activations", lambda lm, *rest: passes.append(lm) or run(lm, *rest))

    def batches(ranks: Ranks) -> list[ActivationBatch]:
        job, ready = Job(settings, ranks=ranks), loaded[ranks.every.rank]
        vars(job).update(lm=ready.lm, corpus=ready.corpus)
        return walk(open_source(job, silent), 12)[1]

    expected = batches(ALONE)
    alone = len(passes)
    assert (alone == 0) == cached
    passes.clear()
    for found in run_threads(batches, features=2):
        assert all(map(same, found, expected))
    assert all(passes.count(lm) == -(-alone // 2) for lm in lms)


@pytest.mark.parametrize("cached", [False, True], ids=["stream", "cache"])
def test_a_run_continues_without_the_sample_that_it_began_with(tmp_path: Path, cached: bool) -> None:
    job = Job(settings_of(config(tmp_path, "gpt2", cached=cached, gradients=False)))
    source = open_source(job, silent)
    sample = source.sample()
    assert sample.dtype == torch.float32 and sample.shape[1] == 32
    assert 5000 <= len(sample) < 5200 if cached else len(sample) == job.settings.training.tokens
    states, batches = walk(source, 40)
    again = open_source(job, silent, json.loads(states[7]))
    assert all(map(same, walk(again, 33)[1], batches[7:]))


def test_a_sample_is_no_larger_than_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(settings_of(config(tmp_path, "gpt2", cached=False, gradients=False)))
    monkeypatch.setattr(feed, "SAMPLE_TOKENS", 1234)
    assert len(open_source(job, silent).sample()) == 1234


def test_a_state_of_the_model_is_refused_by_a_cache(tmp_path: Path) -> None:
    live, stored = (
        Job(settings_of(config(tmp_path, "gpt2", cached=cached, gradients=False))) for cached in (False, True)
    )
    for one, other in ((live, stored), (stored, live)):
        with pytest.raises(SaelabError, match="use the earlier settings"):
            open_source(one, silent, open_source(other, silent).state())


def test_the_end_of_the_corpus_is_reported(tmp_path: Path) -> None:
    said: list[str] = []
    source = open_source(
        Job(settings_of(config(tmp_path, "gpt_neox", cached=False, gradients=False)), said.append), silent
    )
    while source.state()["epoch"] < 2:
        next(source)
    assert [line for line in said if "came to its end" in line] == [
        f"the corpus came to its end: epoch {n} begins" for n in (2, 3)
    ]
