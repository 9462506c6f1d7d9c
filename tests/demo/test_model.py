"""The shipped language model loads offline through the bridge and is as good as its README says."""

import json
import re
from pathlib import Path

import pytest
import torch

from saelab import demo
from saelab.lm.load import load_language_model
from saelab.lm.model import LanguageModel
from saelab.lm.settings import ModelSettings

MEASURED = json.loads(demo.MEASURED.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return load_language_model(ModelSettings("demo"), "cpu")


def loss(lm: LanguageModel, rows: torch.Tensor) -> float:
    """Nats per token where both the input and the target are ordinary."""
    total = count = 0.0
    for block in rows.split(16):
        keep = lm.ordinary(block)
        keep = keep[:, :-1] & keep[:, 1:]
        log_probabilities = lm.logits(block)[:, :-1][keep].log_softmax(-1)
        total -= log_probabilities.gather(1, block[:, 1:][keep][:, None]).double().sum().item()
        count += int(keep.sum())
    return total / count


def test_the_loss_on_the_frozen_sample_is_the_one_measured(lm: LanguageModel) -> None:
    sample = json.loads(demo.HELD_OUT_SAMPLE.read_text(encoding="utf-8"))
    rows = torch.tensor(sample["rows"])
    assert rows.shape == (64, 256) and "PSF" in sample["licence"]
    assert bool((rows[:, 0] == lm.tokenizer.bos_token_id).all())
    assert loss(lm, rows) == pytest.approx(MEASURED["sample_loss"], rel=0.02)


def test_the_loss_on_this_interpreters_library_is_bounded(lm: LanguageModel) -> None:
    from saelab.corpus import CorpusSettings, open_corpus

    rows = open_corpus(CorpusSettings("demo"), lm.tokenizer, 256).held_out_rows(100_000)
    assert loss(lm, torch.from_numpy(rows[:100]).long()) < 1.15 * MEASURED["held_out_loss"]


def test_the_held_out_library_is_large_enough_to_report_dead_features(lm: LanguageModel) -> None:
    from saelab.corpus import CorpusSettings, open_corpus

    rows = torch.from_numpy(open_corpus(CorpusSettings("demo"), lm.tokenizer, 256).held_out_rows(10**9))
    assert int(lm.ordinary(rows).sum()) >= 300_000


def test_a_repeated_segment_is_predicted_from_its_first_copy(lm: LanguageModel) -> None:
    """Induction: the loss on the second copy of a random segment, which nothing but the first copy can explain."""
    segment = torch.randint(1, 4096, (16, 100), generator=torch.Generator().manual_seed(1))
    rows = torch.cat([torch.zeros(16, 1, dtype=torch.long), segment, segment], 1)
    losses = -lm.logits(rows)[:, :-1].log_softmax(-1).gather(2, rows[:, 1:, None]).squeeze(2)
    first, second = losses[:, 1:100].mean().item(), losses[:, 101:].mean().item()
    assert first > 8.0  # ln 4096 = 8.3: random tokens cannot be foreseen
    assert second < 0.75 * first
    assert second == pytest.approx(MEASURED["induction"]["random_second"], rel=0.15)


def test_the_model_is_small_and_its_readme_tells_the_measured_figures() -> None:
    weights = demo.MODEL / "model.safetensors"
    assert weights.stat().st_size <= 10_000_000
    readme = (Path(demo.__file__).parent / "README.md").read_text(encoding="utf-8")
    numbers = [MEASURED["held_out_loss"], MEASURED["bits_per_byte"], *MEASURED["induction"].values()]
    for number in numbers:
        assert re.search(rf"\b{number:.2f}", readme), f"README does not tell {number:.2f}"
    assert f"{MEASURED['training_tokens']:,}" in readme and MEASURED["python"] in readme
    config = json.loads((demo.MODEL / "config.json").read_text())
    assert (
        config["num_hidden_layers"],
        config["hidden_size"],
        config["num_attention_heads"],
        config["vocab_size"],
    ) == (4, 256, 8, 4096)
