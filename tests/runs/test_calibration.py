"""The text that thresholds are set on: not that of evaluation, and of many documents."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from saelab.activations.stream import ActivationBatch
from saelab.corpus import Corpus, CorpusSettings, open_corpus
from saelab.runs import calibration
from saelab.runs.calibration import CalibrationRows, calibrate, calibration_rows
from saelab.sae.model import SparseAutoencoder
from saelab.sae.thresholds import calibrate as thresholds_for

TOPICS, WORDS, FEATURES, CONTEXT = 40, 5, 80, 16
EVALUATED, CALIBRATED = 6000, 4000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """500 files of 200 words, each of one of 40 topics: four of five of its words belong to it."""
    made, rng = tmp_path_factory.mktemp("topics"), np.random.default_rng(0)
    for n in range(500):
        topic = np.where(rng.random(200) < 0.8, n % TOPICS, rng.integers(TOPICS, size=200))
        words = topic * WORDS + rng.integers(WORDS, size=200)
        (made / f"{n}.txt").write_text(" ".join(f"w{word}" for word in words))
    return made


def opened(folder: Path, context: int = CONTEXT) -> Corpus:
    vocabulary = {"<eos>": 0, "<unk>": 1} | {f"w{n}": n + 2 for n in range(TOPICS * WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<eos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    return open_corpus(CorpusSettings(str(folder), held_out=0.1), fast, context)


def activations(rows: Tensor) -> Tensor:
    """What a model that knows topics gives: one number for each feature, larger by 3 for those of the word's topic."""
    ids = rows[rows > 1]
    noise = torch.randn(len(ids), FEATURES, generator=torch.Generator().manual_seed(int(ids.sum())))
    return 1 + noise + 3 * ((ids - 2) // WORDS == torch.arange(FEATURES)[:, None] % TOPICS).T


def read(lm: Any, rows: np.ndarray, *_: Any) -> list[ActivationBatch]:
    nothing = torch.empty(0)
    return [ActivationBatch(activations(torch.from_numpy(rows)), nothing, nothing, nothing, None)]


def identity() -> SparseAutoencoder:
    sae = SparseAutoencoder(FEATURES, FEATURES, 2)
    for parameter in sae.parameters():
        parameter.data.zero_()
    sae.W_enc.data.copy_(torch.eye(FEATURES))
    return sae


def l0_after(rows: CalibrationRows, densities: Tensor, x: Tensor) -> float:
    sae: Any = identity()
    facts = calibrate(sae, None, rows, "site", densities)  # type: ignore[arg-type]
    used = [rows.held_out, rows.training[1::2], *([rows.training[::2]] if densities.ndim else [])]
    assert facts["calibration_tokens"] == sum(int((each > 1).sum()) for each in used)
    return sae.encode(x).firing_counts().sum().item() / len(x)


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "CALIBRATION_TOKENS", CALIBRATED)
    monkeypatch.setattr(calibration, "read_activations", read)


def test_l0_is_that_of_training_on_text_of_other_topics(folder: Path) -> None:
    """Held-out text of the few files that evaluation leaves gives features of all other topics too low thresholds."""
    corpus = opened(folder)
    x = activations(torch.from_numpy(corpus.held_out_rows(EVALUATED)))
    densities = torch.full((FEATURES,), 0.02, dtype=torch.float64)
    rows = calibration_rows(corpus, EVALUATED)
    l0 = 0.02 * FEATURES
    assert l0_after(rows, densities, x) == pytest.approx(l0, rel=0.03)
    assert l0_after(CalibrationRows(rows.held_out, rows.held_out), densities, x) > 1.2 * l0
    assert l0_after(rows, densities.mean(), x) == pytest.approx(l0, rel=0.03)


def test_thresholds_in_relation_to_each_other_are_quantiles_of_training_text(folder: Path) -> None:
    rows = calibration_rows(opened(folder), EVALUATED)
    densities = torch.linspace(0.01, 0.05, FEATURES, dtype=torch.float64)
    x = activations(torch.cat([rows.held_out, rows.training[1::2]]))
    sae: Any = identity()
    calibrate(sae, None, rows, "site", densities)  # type: ignore[arg-type]
    quantiles = thresholds_for(lambda x: x, [activations(rows.training[::2])], densities).threshold
    ratio = sae.threshold / quantiles
    torch.testing.assert_close(ratio, ratio.mean().expand(FEATURES), rtol=1e-5, atol=0.0)
    assert (x > sae.threshold).double().mean().item() == pytest.approx(densities.mean().item(), abs=1 / len(x))


def test_a_feature_that_is_silent_in_training_text_has_the_threshold_0(folder: Path) -> None:
    rows = calibration_rows(opened(folder), EVALUATED)
    sae: Any = identity()
    sae.b_enc.data[3] = -100
    calibrate(sae, None, rows, "site", torch.full((FEATURES,), 0.02))  # type: ignore[arg-type]
    assert sae.threshold[3] == 0 and sae.threshold.isfinite().all() and (sae.threshold > 0).sum() == FEATURES - 1


def test_evaluation_reads_none_of_the_rows_and_they_depend_on_the_corpus_only(folder: Path) -> None:
    said: list[str] = []
    corpus = opened(folder)
    rows = calibration_rows(corpus, EVALUATED, said.append)
    read, evaluated = corpus.held_out_rows(EVALUATED + CALIBRATED), len(corpus.held_out_rows(EVALUATED))
    wanted = 2 * math.ceil(CALIBRATED / (CONTEXT - 1) / 2)
    assert not said
    assert len(rows.training) == wanted and len(rows.held_out) == math.ceil(wanted / 2)
    place = {row.tobytes(): n for n, row in enumerate(read)}
    places = [place[row.tobytes()] for row in rows.held_out.numpy()]
    assert min(places) == evaluated and max(places) >= len(read) - 2
    again = calibration_rows(opened(folder), EVALUATED)
    assert torch.equal(again.training, rows.training)
    assert torch.equal(again.held_out, rows.held_out)

    trained_on = {tuple(row[5:9]) for row in corpus.train_rows(seed=0)}  # orders differ in where rows begin
    of_one_order = sum(tuple(row[5:9].tolist()) in trained_on for row in rows.training)
    assert 0 < of_one_order < len(rows.training)


def test_with_too_little_held_out_text_the_last_rows_are_used_and_it_is_said(folder: Path) -> None:
    said: list[str] = []
    corpus = opened(folder)
    every = corpus.held_out_rows(10**9)
    rows = calibration_rows(corpus, 10**6, said.append)
    assert torch.equal(rows.held_out, torch.from_numpy(every[-len(rows.held_out) :]))
    assert len(rows.held_out) == math.ceil(math.ceil(CALIBRATED / (CONTEXT - 1)) / 4)
    assert len(said) == 1 and "little held-out text" in said[0]


def test_all_of_a_short_training_text_is_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = opened(folder)
    everything = np.stack(list(corpus.train_rows(seed=0)))
    monkeypatch.setattr(calibration, "CALIBRATION_TOKENS", 10**6)
    found = calibration_rows(corpus, EVALUATED).training
    assert np.array_equal(found.numpy(), everything)
    monkeypatch.setattr(calibration, "CALIBRATION_TOKENS", len(everything) * (CONTEXT - 1) // 2)
    found = calibration_rows(corpus, EVALUATED).training
    assert len(found) == math.ceil(len(everything) / 2)
    place = {row.tobytes(): n for n, row in enumerate(everything)}
    assert set(np.diff([place[row.tobytes()] for row in found.numpy()])) <= {1, 2}
