"""Several processes that share out the passes of the model get what one process gets, bit for bit."""

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from saelab.activations.needs import gathered_need, pass_need
from saelab.activations.settings import StreamSettings
from saelab.activations.source import FromModel
from saelab.activations.stream import ActivationBatch
from saelab.corpus import CorpusSettings, open_corpus
from saelab.errors import SaelabError
from saelab.lm.load import load_language_model
from saelab.lm.model import LanguageModel
from saelab.lm.settings import ModelSettings
from saelab.memory import peak_bytes
from saelab.ranks import ALONE, Ranks, layout
from saelab.training.traffic import activation_traffic
from tests.activations.going_on import same, walk
from tests.corpus.made import TEXTS, tokenised, write
from tests.threads import ThreadAxis, run_threads
from tests.tiny import CONTEXT, model_folder

BATCH, N = 40, 30
SITE = "blocks.1.hook_resid_post"
SITES = [SITE, "blocks.0.hook_mlp_out"]

Opened = Callable[[Ranks], FromModel]


@functools.cache
def models(kind: str) -> list[LanguageModel]:
    """A model for each of four processes: threads must not share one, because a pass sets hooks on its modules."""
    return [load_language_model(ModelSettings(str(model_folder(kind))), "cpu") for _ in range(4)]


def opening(path: Path, start: dict[str, Any] | None = None, **options: Any) -> Opened:
    """A function that opens the source for a process."""
    lms, context = models(options.pop("kind", "gpt2")), options.pop("context", CONTEXT)
    stream = StreamSettings(options.pop("buffer", 3 * BATCH), options.pop("rows_per_forward", 3))
    chosen = {"site": SITE, "batch_tokens": BATCH, "seed": 3, "sample_tokens": 500} | options

    def opened(ranks: Ranks) -> FromModel:
        lm = lms[ranks.every.rank]
        corpus = open_corpus(CorpusSettings(str(path), held_out=0.1), lm.tokenizer, context)
        return FromModel(lm, corpus, stream=stream, start=start, ranks=ranks.every, **chosen)

    return opened


def walked(opened: Opened, n: int = N) -> Callable[[Ranks], tuple[list[str], list[ActivationBatch]]]:
    return lambda ranks: walk(opened(ranks), n)


def check_as_one(opened: Opened, processes: int, n: int = N) -> list[str]:
    """The states of one process, once those and the batches of several are seen to be the same."""
    states, batches = walked(opened, n)(ALONE)
    for found_states, found in run_threads(walked(opened, n), data=processes):
        assert found_states == states
        assert all(map(same, found, batches))
    return states


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("site", [SITE, SITES], ids=["one site", "two sites"])
def test_batches_and_states_are_those_of_one_process(
    tmp_path: Path, site: str | list[str], processes: int, gradients: bool
) -> None:
    path = write(tmp_path / "a.jsonl", TEXTS[:60])
    check_as_one(opening(path, site=site, gradients=gradients, buffer=7 * BATCH), processes)


@pytest.mark.parametrize("rows_per_forward", [1, 5, 64])
def test_an_epoch_may_end_between_and_within_the_passes_of_a_round(tmp_path: Path, rows_per_forward: int) -> None:
    """Some 900 tokens: 4 passes of 5 rows take most of an epoch, and one of 64 rows several."""
    path = write(tmp_path / "a.jsonl", TEXTS[:14])
    states = check_as_one(opening(path, buffer=5 * BATCH, rows_per_forward=rows_per_forward), 4, 60)
    assert json.loads(states[-1])["epoch"] >= 1


@pytest.mark.parametrize(("times", "rows_per_forward"), [(10, 1), (1, 1)], ids=["long epochs", "epochs of 2 rows"])
def test_passes_that_give_nothing_change_no_state(tmp_path: Path, times: int, rows_per_forward: int) -> None:
    """A row in three has ordinary tokens: groups end before a pass that gives nothing, and rounds take many epochs."""
    rows = [[0, 1, 0, 1], [0, 1, 1, 0], [0, 5, 6, 1]] * times
    path = write(tmp_path / "a.jsonl", rows, "input_ids")
    opened = opening(path, kind="llama", context=4, rows_per_forward=rows_per_forward, buffer=4, batch_tokens=2)
    for processes in (2, 4):
        check_as_one(opened, processes)


@pytest.mark.parametrize("gradients", [False, True])
def test_a_state_continues_on_another_number_of_processes(tmp_path: Path, gradients: bool) -> None:
    path = write(tmp_path / "a.jsonl", TEXTS[:30])
    options = {"gradients": gradients, "buffer": 5 * BATCH}
    states, batches = run_threads(walked(opening(path, **options)), data=2)[1]
    for at in (4, 5, 17):
        resumed = walked(opening(path, json.loads(states[at]), **options), N - at)
        for found_states, found in (resumed(ALONE), *run_threads(resumed, data=3)):
            assert found_states == states[at:]
            assert all(map(same, found, batches[at:]))


def test_the_sample_is_that_of_one_process_and_changes_nothing(tmp_path: Path) -> None:
    opened = opening(write(tmp_path / "a.jsonl", TEXTS[:60]), sample_tokens=700)

    def sampled(ranks: Ranks) -> tuple[torch.Tensor, list[ActivationBatch]]:
        source = opened(ranks)
        return source.sample(), walk(source, N)[1]

    sample, batches = sampled(ALONE)
    for found_sample, found in run_threads(sampled, data=4):
        assert torch.equal(found_sample, sample)
        assert all(map(same, found, batches))


def test_each_process_runs_the_model_on_its_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of two passes: in 20 groups one process runs 40, and each of four runs 10."""
    passes: list[LanguageModel] = []
    run = LanguageModel.activations
    monkeypatch.setattr(LanguageModel, "activations", lambda lm, *rest: passes.append(lm) or run(lm, *rest))
    path = write(tmp_path / "ids.jsonl", tokenised(200, CONTEXT), "input_ids")
    options = {"special_tokens": True, "rows_per_forward": 2, "buffer": 4 * CONTEXT, "batch_tokens": CONTEXT}
    walked(opening(path, **options), 80)(ALONE)
    assert len(passes) == 40
    passes.clear()
    run_threads(walked(opening(path, **options), 80), data=4)
    assert [passes.count(lm) for lm in models("gpt2")] == [10] * 4


@pytest.mark.parametrize("gradients", [False, True])
def test_a_batch_exchanges_what_the_plan_says(tmp_path: Path, gradients: bool) -> None:
    """Ten batches take 50 passes of 3 x 32 tokens: 13 rounds of four, of which two passes are read ahead."""
    path = write(tmp_path / "ids.jsonl", tokenised(200, CONTEXT), "input_ids")
    options = {"special_tokens": not gradients, "batch_tokens": 480, "buffer": 480, "gradients": gradients}
    opened = opening(path, site=SITES, **options)

    def sent(ranks: Ranks) -> float:
        source, axis = opened(ranks), ranks.every
        assert isinstance(axis, ThreadAxis)
        tokens = 0
        for _ in range(10):
            tokens += len(next(source))
        return sum(size for _, size in axis.sent) / tokens

    said = activation_traffic(2 * 32, 480, 4, gradients, layout(4, 1))
    for found in run_threads(sent, data=2, features=2):
        assert said.bytes == pytest.approx(480 * found, rel=0.06)


@pytest.mark.parametrize("gradients", [False, True])
def test_memory_is_a_group_and_the_passes_of_all(tmp_path: Path, gradients: bool) -> None:
    lm, rows, n_sites = models("gpt2")[0], 20, 3
    sites = [f"blocks.{i}.hook_resid_post" for i in range(n_sites)]
    path = write(tmp_path / "a.jsonl", TEXTS)
    opened = opening(path, site=sites, rows_per_forward=rows, gradients=gradients)
    each = (8 if gradients else 4) * 32 * n_sites + 24
    run_threads(walked(opened, 1), data=4)  # what a model's first pass measures is no part of this

    def planned(processes: int) -> int:
        own = pass_need(lm, sites, rows, CONTEXT, "memory", gradients=gradients)
        gathered = gathered_need(lm, sites, rows, CONTEXT, own, processes, gradients=gradients)
        assert (gathered.bytes > 0) == (processes > 8)
        return own.bytes + gathered.bytes + 3 * BATCH * each

    def peak(ranks: Ranks) -> int:
        return peak_bytes(lambda: walk(opened(ranks), 1))

    assert peak(ALONE) <= planned(1)
    assert max(run_threads(peak, data=4)) <= planned(4)
    assert planned(101) - planned(100) == rows * CONTEXT * each


def test_nan_is_the_same_error_on_all_processes_after_the_same_batches(tmp_path: Path) -> None:
    """The row is in a later pass of a round of four, and the batches of the passes before it are given."""
    ids = [[18 if token == 17 else token for token in row] for row in tokenised(40, CONTEXT)]
    ids[20][9] = 17
    path = write(tmp_path / "a.jsonl", ids, "input_ids")
    opened = opening(path, site="blocks.0.hook_resid_pre", batch_tokens=20, buffer=20)

    def until_the_error(ranks: Ranks) -> tuple[str, int]:
        source, batches = opened(ranks), 0
        try:
            while True:
                next(source)
                batches += 1
        except SaelabError as error:
            return str(error), batches

    embeddings = [lm.model.get_parameter("transformer.wte.weight") for lm in models("gpt2")]
    before = embeddings[0][17].clone()
    try:
        for embedding in embeddings:
            embedding.data[17] = torch.nan
        message, batches = until_the_error(ALONE)
        found = re.search(r"NaN or infinite activations at row (\d+), position 9", message)
        assert found is not None
        assert int(found[1]) // 3 % 4 > 0
        assert batches > 3
        assert run_threads(until_the_error, data=4) == [(message, batches)] * 4
    finally:
        for embedding in embeddings:
            embedding.data[17] = before


@pytest.mark.parametrize("rows_per_forward", [1, 10])
def test_rows_that_give_nothing_are_the_same_error_on_all_processes(tmp_path: Path, rows_per_forward: int) -> None:
    path = write(tmp_path / "a.jsonl", [[0, 1, 1, 0], [0, 0, 1, 1], [0, 1, 0, 1]], "input_ids")
    opened = opening(path, kind="llama", context=4, rows_per_forward=rows_per_forward)
    seen: list[str] = []

    def fails(ranks: Ranks) -> None:
        with pytest.raises(SaelabError, match="its training rows hold special tokens only") as error:
            opened(ranks)
        seen.append(str(error.value))

    fails(ALONE)
    run_threads(fails, data=4)
    assert len(seen) == 5
    assert len(set(seen)) == 1
