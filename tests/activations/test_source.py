"""A source opened with a state gives the batches of an uninterrupted one from there on, bit for bit."""

import json
from collections.abc import Callable, Iterator
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saelab.activations.cache.reader import open_cache
from saelab.activations.settings import StreamSettings
from saelab.activations.source import FromCache, FromModel, Source
from saelab.activations.stream import ActivationBatch, read_activations
from saelab.corpus import Corpus, CorpusSettings, encoder, files, open_corpus
from saelab.corpus import rows as corpus_rows
from saelab.errors import SaelabError, SettingError
from saelab.memory import peak_bytes
from saelab.progress import T
from tests.activations.cache import made
from tests.activations.going_on import check_going_on, same, walk
from tests.corpus.made import TEXTS, tokenised, write
from tests.tiny import CONTEXT, language_model

SITE = "blocks.1.hook_resid_post"
BATCH = 40

CORPORA: dict[str, Callable[[Path], Path]] = {
    "one text": lambda folder: write(folder / "a.txt", TEXTS[:60]),
    "texts": lambda folder: write(folder / "texts", TEXTS[:60]),
    "jsonl": lambda folder: write(folder / "a.jsonl", TEXTS[:60]),
    "token ids": lambda folder: write(folder / "ids.jsonl", tokenised(40, CONTEXT), "input_ids"),
    "short documents": lambda folder: write(folder / "short.jsonl", [text[:12] for text in TEXTS]),
    "less than a group": lambda folder: write(folder / "few.jsonl", TEXTS[:6]),
}


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts and windows of a corpus so small that its rows come from several of each."""
    monkeypatch.setattr(files, "PART", 1 << 11)
    monkeypatch.setattr(corpus_rows, "WINDOW", 1 << 11)
    monkeypatch.setattr(encoder, "BATCH", 1 << 10)


def corpus_of(path: Path | str, context: int = CONTEXT, kind: str = "gpt2") -> Corpus:
    return open_corpus(CorpusSettings(str(path), held_out=0.1), language_model(kind).tokenizer, context)


def from_model(corpus: Corpus, start: dict[str, Any] | None = None, **options: Any) -> FromModel:
    stream = StreamSettings(options.pop("buffer", 3 * BATCH), options.pop("rows_per_forward", 3))
    chosen = {"site": SITE, "batch_tokens": BATCH, "seed": 3, "sample_tokens": 500} | options
    return FromModel(language_model("gpt2"), corpus, stream=stream, start=start, **chosen)


def places(batches: list[ActivationBatch]) -> list[tuple[int, int]]:
    return [pair for batch in batches for pair in zip(batch.rows.tolist(), batch.positions.tolist(), strict=True)]


# -- from the model


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("buffer", [2 * BATCH, 7 * BATCH], ids=["passes of a group's size", "groups of several passes"])
@pytest.mark.parametrize("kind", CORPORA)
def test_from_every_batch_of_the_model_on_the_rest_is_the_same(
    tmp_path: Path, kind: str, buffer: int, gradients: bool
) -> None:
    path = CORPORA[kind](tmp_path)

    def opened(start: dict[str, Any] | None = None) -> Source:
        return from_model(corpus_of(path), start, buffer=buffer, gradients=gradients)

    check_going_on(opened, 16)


@pytest.mark.parametrize("rows_per_forward", [1, 5, 64])
def test_from_every_batch_on_across_epochs(tmp_path: Path, rows_per_forward: int) -> None:
    """A corpus of some 900 tokens: an epoch has 4 to 5 groups, or a pass of the model several epochs."""
    path = write(tmp_path / "a.jsonl", TEXTS[:14])
    said: list[str] = []

    def opened(start: dict[str, Any] | None = None) -> Source:
        return from_model(corpus_of(path), start, buffer=5 * BATCH, rows_per_forward=rows_per_forward, say=said.append)

    states, _ = walk(opened(), 60)
    assert json.loads(states[-1])["epoch"] >= 1 and said[0] == "the corpus came to its end: epoch 2 begins"
    check_going_on(opened, 60)


def test_the_demo_goes_on_too() -> None:
    corpus = corpus_of("demo")
    states, batches = walk(from_model(corpus), 9)
    for at in range(9):
        assert all(map(same, walk(from_model(corpus, json.loads(states[at])), 9 - at)[1], batches[at:]))


def read_in_order(corpus: Corpus, passes: int) -> Iterator[ActivationBatch]:
    epochs = (corpus.train_rows(seed=3, epoch=epoch) for epoch in range(10**9))
    rows = islice(chain.from_iterable(epochs), 3 * passes)
    return read_activations(language_model("gpt2"), rows, SITE, rows_per_forward=3)


@pytest.mark.parametrize("kind", CORPORA)
def test_a_group_is_what_is_read_next_and_every_ordinary_token_comes_once_an_epoch(tmp_path: Path, kind: str) -> None:
    corpus, lm, group = corpus_of(CORPORA[kind](tmp_path)), language_model("gpt2"), 7 * BATCH
    n_epochs = 3
    rows = [torch.from_numpy(np.stack(list(corpus.train_rows(seed=3, epoch=epoch)))) for epoch in range(n_epochs)]
    n = sum(int(lm.ordinary(part).sum()) for part in rows) // group * group
    batches = list(islice(from_model(corpus, buffer=group), n // BATCH))
    assert all(len(batch) == BATCH for batch in batches)
    expected = [tuple(pair) for pair in lm.ordinary(torch.cat(rows)).nonzero().tolist()]
    assert len(expected) - group < n <= len(expected)
    for at in range(0, n, group):
        found = places(batches[at // BATCH : (at + group) // BATCH])
        assert sorted(found) == expected[at : at + group] and found != expected[at : at + group]
    ids = torch.cat(rows)
    values = torch.zeros(*ids.shape, 32)
    for part in read_in_order(corpus, -(-len(ids) // 3)):
        inside = part.rows < len(ids)
        values[part.rows[inside], part.positions[inside]] = part.values[inside]
    for batch in batches:
        assert torch.equal(batch.tokens, ids[batch.rows, batch.positions])
        assert torch.equal(batch.values, values[batch.rows, batch.positions])


def test_the_order_depends_only_on_the_seed(tmp_path: Path) -> None:
    corpus = corpus_of(CORPORA["jsonl"](tmp_path))
    first = places(walk(from_model(corpus), 30)[1])
    assert places(walk(from_model(corpus), 30)[1]) == first
    assert places(walk(from_model(corpus, rows_per_forward=8), 30)[1]) == first, "not on the size of passes"
    assert places(walk(from_model(corpus, seed=4), 30)[1]) != first


def test_special_tokens_come_if_asked(tmp_path: Path) -> None:
    corpus = corpus_of(CORPORA["jsonl"](tmp_path))
    check_going_on(lambda start=None: from_model(corpus, start, special_tokens=True), 10)
    (first, second) = islice(from_model(corpus, special_tokens=True, buffer=2 * BATCH), 2)
    assert sorted(places([first, second])) == [(n // CONTEXT, n % CONTEXT) for n in range(2 * BATCH)]


@pytest.mark.parametrize("sample", [30, 120, 1000])
def test_a_sample_is_the_first_that_is_read_and_changes_nothing(tmp_path: Path, sample: int) -> None:
    """Smaller than a group, as large, and larger: what is read ahead of a group is not lost and does not move it."""
    corpus = corpus_of(CORPORA["jsonl"](tmp_path))
    source = from_model(corpus, sample_tokens=sample)
    before = source.state()
    found = source.sample()
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.cat([part.values for part in read_in_order(corpus, 20)])[:sample])
    assert source.state() == before and torch.equal(source.sample(), found)
    states, batches = walk(source, 40)
    plain_states, plain = walk(from_model(corpus), 40)
    assert states == plain_states and all(map(same, batches, plain))


def test_a_state_is_small_and_does_not_change_with_its_source(tmp_path: Path) -> None:
    source = from_model(corpus_of(CORPORA["jsonl"](tmp_path)))
    states, texts = [], []
    for _ in source:
        states.append(source.state())
        texts.append(json.dumps(states[-1]))
        if len(states) == 20:
            break
    assert texts == [json.dumps(state) for state in states] and max(map(len, texts)) < 7 * CONTEXT + 1000
    states[-1]["rows"].clear()
    assert json.dumps(source.state()) == texts[-1]


def test_states_of_something_else_are_refused(tmp_path: Path) -> None:
    corpus = corpus_of(CORPORA["jsonl"](tmp_path))
    source = from_model(corpus)
    next(source)
    state = source.state()
    for wrong, message in [
        ({}, "has nothing instead of"),
        ({"epoch": 0, "group": 0, "offset": 0}, "has epoch, group, offset instead of"),
        (state | {"offset": 1}, "no batch of 40 tokens begins at 1"),
        (state | {"offset": 3 * BATCH}, f"no batch of 40 tokens begins at {3 * BATCH}"),
        (state | {"used": 10**6}, "after 1000000 activations of a forward pass that gives"),
        (state | {"epoch": 1}, "belongs to other rows"),
        (state | {"rows": state["rows"] | {"window": 7}}, "is damaged"),
    ]:
        with pytest.raises(SaelabError, match=message):
            from_model(corpus, wrong)
    with pytest.raises(SaelabError, match="belongs to other rows"):
        from_model(corpus, state, seed=4)
    with pytest.raises(SaelabError, match="no batch of 60 tokens begins at 40"):
        from_model(corpus, state, batch_tokens=60)
    with pytest.raises(SaelabError, match="belongs to other rows"):
        from_model(corpus_of(write(tmp_path / "other.jsonl", TEXTS[:61])), state)


def test_nan_is_named_by_row_and_position_also_after_going_on(tmp_path: Path) -> None:
    site = "blocks.0.hook_resid_pre"  # later, attention carries it to earlier positions too: 0 * NaN is NaN
    ids = [[18 if token == 17 else token for token in row] for row in tokenised(40, CONTEXT)]
    ids[20][9] = 17
    corpus = corpus_of(write(tmp_path / "a.jsonl", ids, "input_ids"))
    bad = [n for n, row in enumerate(corpus.train_rows(seed=3)) if row[9] == 17]
    embedding = language_model("gpt2").model.get_input_embeddings().weight
    before = embedding[17].clone()
    try:
        embedding.data[17] = torch.nan
        message = rf"{site}: .* NaN or infinite activations at row {bad[0]}, position 9"
        source, states = from_model(corpus, site=site), []
        with pytest.raises(SaelabError, match=message):  # noqa: PT012
            while True:
                states.append(source.state())
                next(source)
        assert len(states) > 3
        with pytest.raises(SaelabError, match=message):
            list(islice(from_model(corpus, states[-2], site=site), 60))
    finally:
        embedding.data[17] = before


@pytest.mark.parametrize(
    ("rows", "gradients", "message"),
    [
        ([[0, 1, 1, 0], [0, 0, 1, 1], [0, 1, 0, 1]], False, "hold special tokens only, so there is nothing"),
        ([[0, 5, 1, 0], [0, 0, 1, 7], [0, 8, 0, 1]], True, "special tokens only, or the last that the loss"),
    ],
)
@pytest.mark.parametrize("rows_per_forward", [1, 2, 10])
def test_rows_that_give_nothing_end_with_a_message(
    tmp_path: Path, rows: list[list[int]], gradients: bool, message: str, rows_per_forward: int
) -> None:
    corpus = corpus_of(write(tmp_path / "a.jsonl", rows, "input_ids"), context=4, kind="llama")
    stream = StreamSettings(100, rows_per_forward)
    with pytest.raises(SaelabError, match=message):
        FromModel(language_model("llama"), corpus, SITE, stream, batch_tokens=10, seed=0, gradients=gradients)


def test_a_long_text_that_gives_nothing_ends_within_its_first_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saelab.activations.stream.BARREN_ROWS", 60)
    barren = [[0, 5 + n, 1, 0] for n in range(200)]  # no position has a loss
    corpus = corpus_of(write(tmp_path / "a.jsonl", barren, "input_ids"), context=4, kind="llama")

    def opened(said: list[str]) -> Source:
        stream, lm = StreamSettings(100, 8), language_model("llama")
        return FromModel(lm, corpus, SITE, stream, batch_tokens=10, seed=0, gradients=True, say=said.append)

    said: list[str] = []
    with pytest.raises(SaelabError, match="corpus: 64 rows one after the other hold special tokens only, or the last"):
        opened(said)
    assert not said  # no epoch has ended
    endless = (np.array(row, dtype=np.int32) for row in cycle(barren))
    with pytest.raises(SaelabError, match="rows one after the other"):
        next(read_activations(language_model("llama"), endless, SITE, 8, gradients=True))


def test_rows_that_give_nothing_between_others_are_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saelab.activations.stream.BARREN_ROWS", 60)
    rows = [np.array([0, 5, 6, 1] if n % 59 == 58 else [0, 1, 0, 1], dtype=np.int32) for n in range(590)]
    batches = list(read_activations(language_model("llama"), iter(rows), SITE, 1))
    assert [batch.rows.tolist() for batch in batches] == [[n, n] for n in range(58, 590, 59)]


def test_rows_too_short_for_a_loss_are_refused_at_once(tmp_path: Path) -> None:
    short = corpus_of(write(tmp_path / "a.txt", TEXTS[:60]), context=2)
    with pytest.raises(SettingError, match=r"context: 2 leaves room for one token after BOS.*; set context=3 or more"):
        from_model(short, gradients=True)
    assert len(next(from_model(short)))  # without gradients a row has a use
    from_model(corpus_of(write(tmp_path / "b.txt", TEXTS[:60]), context=3), gradients=True)


def test_an_epoch_with_a_single_token_is_enough(tmp_path: Path) -> None:
    rows = [[0, *(1 - (n >> bit & 1) for bit in range(3))] for n in range(8)] + [[0, 5, 0, 1], [0, 6, 1, 0]]
    corpus = corpus_of(write(tmp_path / "a.jsonl", rows, "input_ids"), context=4, kind="llama")

    def opened(start: dict[str, Any] | None = None) -> Source:
        return FromModel(
            language_model("llama"), corpus, SITE, StreamSettings(4, 1), batch_tokens=2, seed=0, start=start
        )

    assert all(set(batch.tokens.tolist()) <= {5, 6} for batch in islice(opened(), 6))
    check_going_on(opened, 6)


@pytest.mark.parametrize("gradients", [False, True])
def test_memory_is_a_group_a_pass_and_a_batch(tmp_path: Path, gradients: bool) -> None:
    """The tensors alive at once while two groups are read and handed out. What a pass holds is measured by itself."""
    corpus = corpus_of(write(tmp_path / "a.jsonl", TEXTS))
    lm, d_in, n_rows, group = language_model("gpt2"), 32, 3, 100 * BATCH
    rows = list(corpus.train_rows(seed=3))[: 2 * group // (CONTEXT - 1)]

    def one_pass(rows: list[np.ndarray]) -> None:
        for _ in read_activations(lm, rows, SITE, n_rows, gradients=gradients):
            pass

    largest = max(peak_bytes(lambda at=at: one_pass(rows[at : at + n_rows])) for at in range(0, len(rows), n_rows))
    each = (8 if gradients else 4) * d_in + 24
    sampled = 500 * 4 * d_in

    def run() -> None:
        source = from_model(corpus, buffer=group, gradients=gradients)
        source.sample()
        for _ in range(200):
            next(source)

    assert sampled < largest
    assert group * each < peak_bytes(run) <= group * each + largest


def test_progress_counts_the_first_group_only(tmp_path: Path) -> None:
    counted: list[tuple[str, int, int]] = []

    def track(items: Iterator[T], label: str, total: int, size: Callable[[T], int]) -> Iterator[T]:
        done = 0
        for item in items:
            done += size(item)
            yield item
        counted.append((label, total, done))

    source = from_model(corpus_of(CORPORA["jsonl"](tmp_path)), track=track)
    source.sample()
    walk(source, 20)
    ((label, total, done),) = counted
    assert (label, total) == ("first buffer", 3 * BATCH) and total <= done < total + 3 * CONTEXT


def test_a_closed_source_gives_no_batch(tmp_path: Path) -> None:
    source = from_model(corpus_of(CORPORA["jsonl"](tmp_path)))
    next(source)
    source.close()
    with pytest.raises(RuntimeError):
        next(source)


# -- from a cache


@pytest.mark.parametrize("gradients", [False, True])
def test_from_every_batch_of_a_cache_on_the_rest_is_the_same(tmp_path: Path, gradients: bool) -> None:
    """1,000 tokens in several shards and groups of 200: 60 batches cross shards, groups and two ends of an epoch."""
    made.write(tmp_path, made.identity(gradients=True, lanes=2))

    def opened(start: dict[str, Any] | None = None) -> Source:
        return FromCache(
            open_cache(tmp_path),
            made.SITE,
            batch_tokens=BATCH,
            seed=3,
            buffer_tokens=200,
            gradients=gradients,
            start=start,
        )

    assert len(open_cache(tmp_path).manifest.shards) > 3
    states, batches = walk(opened(), 60)
    cursors = [json.loads(state) for state in states]
    assert {cursor["epoch"] for cursor in cursors} == {0, 1, 2} and len({cursor["group"] for cursor in cursors}) > 3
    assert all((batch.gradients is not None) == gradients for batch in batches)
    check_going_on(opened, 60)


def test_a_caches_sample_is_its_first_batches_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saelab.activations.source.SAMPLE_TOKENS", 333)
    made.write(tmp_path, made.identity(dtype="bfloat16"))

    def opened() -> FromCache:
        return FromCache(open_cache(tmp_path), made.SITE, batch_tokens=BATCH, seed=3, buffer_tokens=200)

    source = opened()
    before = source.state()
    sample = source.sample()
    assert source.state() == before == {"epoch": 0, "group": 0, "offset": 0}
    states, batches = walk(source, 40)
    plain_states, plain = walk(opened(), 40)
    assert states == plain_states and all(map(same, batches, plain))
    assert batches[0].values.dtype == torch.bfloat16 and sample.dtype == torch.float32
    assert 333 <= len(sample) < 333 + BATCH
    assert torch.equal(sample, torch.cat([batch.values for batch in batches])[: len(sample)].float())


def test_a_state_of_something_else_than_this_cache_is_refused(tmp_path: Path) -> None:
    made.write(tmp_path)
    for wrong, message in [
        ({"epoch": 0, "row": 0, "rows": {}, "used": 0, "group": 0, "offset": 0}, "has epoch, group, offset, row"),
        ({}, "has nothing instead of epoch, group, offset"),
        ({"epoch": 0, "group": 99, "offset": 0}, "there is no group 99"),
    ]:
        with pytest.raises(SaelabError, match=message):
            FromCache(open_cache(tmp_path), made.SITE, batch_tokens=BATCH, seed=3, buffer_tokens=200, start=wrong)
