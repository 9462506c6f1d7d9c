"""Attention sinks are measured before training, named, and left out if the settings say so."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import saelab
from saelab.activations.sinks import Concentration
from saelab.activations.source import SAMPLE_TOKENS
from saelab.activations.stream import ActivationBatch
from saelab.errors import SaelabError
from saelab.runs.inputs import Inputs, concentration_notes, first_inputs
from saelab.runs.job import Job, settings_of
from saelab.runs.resume import states
from saelab.sae.input_map import InputMap
from saelab.training.state import load_state
from saelab.training.trainer import Trainer
from tests.corpus.made import opened, tokenised, write
from tests.faults.tools import command
from tests.runs.test_stages import small
from tests.sae.interop.peers import numbers
from tests.tiny import CONTEXT, model_folder

SITE = "blocks.0.hook_resid_pre"  # before attention, which would carry the sinks to other positions
SINK_TOKEN = 17


def with_sinks(tmp_path: Path, *, cached: bool = False) -> dict[str, Any]:
    """A run on token ids without BOS, 32 a row; the first token of each row has a hundred times the norm of others."""
    model = tmp_path / "model"
    if not model.exists():
        shutil.copytree(model_folder("gpt2"), model)
        weights = load_file(model / "model.safetensors")
        weights["transformer.wte.weight"][SINK_TOKEN] *= 100
        save_file(weights, model / "model.safetensors", {"format": "pt"})
        rng = np.random.default_rng(0)
        rows = [[SINK_TOKEN, *rng.integers(18, 300, CONTEXT - 1).tolist()] for _ in range(300)]
        write(tmp_path / "ids.jsonl", rows, "input_ids")
    source = {"source": str(tmp_path / "ids.jsonl"), "held_out": 0.2}
    config = small(tmp_path) | {"site": SITE, "model": str(model), "corpus": source}
    if cached:
        write_as = {"dtype": "float32", "rows_per_forward": 8}
        folder = saelab.cache(config | {"cache": write_as}, tmp_path / "cache", tokens=5000)
        config["activations"] = {"cache": str(folder)}
    return config


def record(run: Path) -> dict[str, Any]:
    return json.loads((run / "train.json").read_text())


def test_sinks_are_said_before_training_with_their_cause_and_the_setting_and_recorded(tmp_path: Path) -> None:
    said: list[str] = []
    run = saelab.train(with_sinks(tmp_path), say=said.append)
    (note,) = [line for line in said if "attention sinks" in line]
    assert note.startswith("note: 3.1") and "does not begin with BOS" in note
    assert "activations.max_norm=10" in note and said.index(note) < len(said) - 1
    found = record(run)["first_activations"]
    assert found == saelab.load(run).metadata["saelab"]["first_activations"]
    assert found["sink_share"] == pytest.approx(1 / CONTEXT, rel=0.01) and found["sink_variance"] > 0.9
    assert saelab.load(run).metadata["prepend_bos"] is False


def test_a_run_without_sinks_says_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    run = saelab.train(small(tmp_path), say=said.append)
    assert not any("variance" in line for line in said)
    assert record(run)["first_activations"]["sink_share"] == 0 and saelab.load(run).metadata["prepend_bos"] is True


@pytest.mark.parametrize("cached", [False, True], ids=["stream", "cache"])
def test_tokens_above_max_norm_are_in_no_batch_scale_or_mean(
    tmp_path: Path, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, seen, said = with_sinks(tmp_path, cached=cached), [], []
    step = Trainer.step

    def recorded(trainer: Trainer, batch: Any) -> Any:
        if not seen:
            torch.testing.assert_close(trainer.sae.b_dec.detach().norm(), torch.tensor(0.0), atol=2.0, rtol=0)
        seen.append(batch.x)
        return step(trainer, batch)

    monkeypatch.setattr(Trainer, "step", recorded)
    run = saelab.train(config, ["activations.max_norm=10"], say=said.append)
    x, found = torch.cat(seen), record(run)
    assert x.norm(dim=1).max() < 3 * x.norm(dim=1).median()
    assert x.square().sum(1).mean().item() == pytest.approx(32, rel=0.05)  # the scale is that of the tokens left
    assert found["tokens"] == len(x) and found["left_out"] == pytest.approx(len(x) / (CONTEXT - 1), rel=0.05)
    if not cached:
        assert found["tokens"] + found["left_out"] == 6000
    assert found["first_activations"]["sink_variance"] > 0.9, "the record is of what the model gives"
    assert not any("attention sinks" in line for line in said)
    assert any(line.startswith(f"note: {found['left_out']:,} tokens with larger norms were left out") for line in said)
    plain = saelab.evaluate(saelab.train(config, [f"out={tmp_path / 'plain'}"]))
    better = saelab.evaluate(run)
    assert better.sinks == plain.sinks > 0 and better.sink_variance == plain.sink_variance > 0.9
    assert better.fvu_without_sinks < plain.fvu_without_sinks
    assert plain.fvu < better.fvu, "FVU alone prefers the autoencoder that learnt the sinks"


@pytest.mark.parametrize(
    ("cached", "inputs"),
    [(False, "scale"), (True, "centre"), (False, "whiten"), (False, "layer_norm")],
    ids=["stream", "cache", "whitened", "normalised"],
)
def test_a_killed_run_goes_on_with_the_same_inputs_bound_and_count(
    tmp_path: Path, cached: bool, inputs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, step = with_sinks(tmp_path, cached=cached), Trainer.step
    limits = ["activations.max_norm=10", f"activations.inputs={inputs}", "training.checkpoint.tokens=1000"]
    whole = saelab.train(config, [*limits, f"out={tmp_path / 'whole'}"])

    def killed(trainer: Trainer, batch: Any) -> Any:
        if trainer.steps == 12:
            raise KeyboardInterrupt
        return step(trainer, batch)

    monkeypatch.setattr(Trainer, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        saelab.train(config, [*limits, f"out={tmp_path / 'parts'}"])
    monkeypatch.setattr(Trainer, "step", step)
    parts = saelab.resume(tmp_path / "parts")
    for name in ("largest_norm", "left_out", "tokens", "input_scale", "first_activations"):
        assert record(parts)[name] == record(whole)[name] is not None, name
    weights = [load_file(run / "sae" / "sae_weights.safetensors") for run in (whole, parts)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    state, said = load_state(states(parts)[-1]), saelab.load(parts).metadata["saelab"]["inputs_of"]
    assert ("input_mean" in state, "input_whitening" in state) == (inputs in ("centre", "whiten"), inputs == "whiten")
    assert said == inputs and saelab.load(parts).normalisation == (inputs if inputs == "layer_norm" else None)
    with pytest.raises(SaelabError, match=r"activations.max_norm: is 10.* in the run, not 20"):
        saelab.resume(parts, ["activations.max_norm=20"])


def test_a_state_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    run = saelab.train(small(tmp_path))
    state = load_state(states(run)[-1])
    assert Inputs.from_state(state).state() == {name: state[name] for name in Inputs.from_state(state).state()}
    earlier = Inputs.from_state({"input_scale": 0.5})
    assert earlier.map.scale == 0.5 and earlier.largest_norms == () and earlier.left_out == 0


def test_thresholds_are_set_on_the_tokens_that_are_trained_on(tmp_path: Path) -> None:
    run = saelab.train(with_sinks(tmp_path), ["activations.max_norm=10", "sae.allocation=mutual_choice"])
    facts = saelab.load(run).metadata["saelab"]
    rows = saelab.calibration_rows(Job(settings_of(run / "config.yaml")).corpus, 1500)
    read = len(rows.held_out) + len(rows.training[1::2])
    assert facts["calibration_tokens"] == read * (CONTEXT - 1)


def test_an_evaluation_prints_fvu_without_sinks_if_there_are_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = saelab.train(with_sinks(tmp_path))
    code, out, _ = command(monkeypatch, capsys, "eval", run)
    found = json.loads((run / "eval.json").read_text())
    assert code == 0 and f"{found['sinks']:,} tokens, {100 * found['sink_variance']:.1f}% of the variance" in out
    assert "FVU without sinks" in out and f"{found['fvu_without_sinks']:.4f}" in out
    assert ("FVU without sinks", f"{found['fvu_without_sinks']:.4g}") in saelab.sae.summary.figures(saelab.load(run))
    plain = saelab.train(small(tmp_path), [f"out={tmp_path / 'plain'}"])
    code, out, _ = command(monkeypatch, capsys, "eval", plain)
    assert code == 0 and "sinks" not in out


def batches_of(*norms: list[float]) -> Iterator[ActivationBatch]:
    for batch in norms:
        x = torch.zeros(len(batch), 4)
        x[:, 1] = torch.tensor(batch)
        ids = torch.arange(len(batch))
        yield ActivationBatch(x, ids, ids, ids, 10 * x)


def test_a_batch_without_two_tokens_is_skipped_and_gradients_stay_with_their_tokens() -> None:
    inputs = Inputs(InputMap(2.0), (5.0,))
    batches = batches_of([9, 1, 2], [7, 8], [6, 3], [5, 4])
    found = [made for batch in batches if (made := inputs.batch(batch, torch.device("cpu"))) is not None]
    assert [batch.x[:, 1].tolist() for batch in found] == [[2, 4], [10, 8]]
    assert [batch.gradients[:, 1].tolist() for batch in found if batch.gradients is not None] == [[10, 20], [50, 40]]
    assert inputs.left_out == 4


def test_a_source_that_gives_only_larger_norms_ends_with_an_error() -> None:
    inputs, (large, fair) = Inputs(InputMap(1.0), (5.0,)), batches_of([9.0] * 1000, [1.0] * 1000)
    for batch in [fair, *[large] * (SAMPLE_TOKENS // 1000)] * 2:  # in a row there are too few
        inputs.batch(batch, torch.device("cpu"))
    with pytest.raises(SaelabError, match=r"^activations.max_norm: 33,000 tokens in a row have norms above 5"):
        inputs.batch(large, torch.device("cpu"))


@pytest.mark.parametrize("kind", ["crosscoder", "transcoder"])
def test_a_token_is_left_out_if_it_is_a_sink_at_any_site(tmp_path: Path, kind: str) -> None:
    """Norms of two sites of very different scale; the second is the target of a transcoder."""
    config = small(tmp_path) | {"activations": {"max_norm": 10.0}, "context": CONTEXT}
    other = "blocks.2.hook_resid_post"
    config |= {"more_sites": [other]} if kind == "crosscoder" else {"target": other}
    said: list[str] = []
    job = SimpleNamespace(settings=settings_of(config), origin=(None, None), say=said.append)
    first, second = numbers(200, 4, seed=0), 1000 * numbers(200, 3, seed=1)
    first[3] *= 100
    second[[5, 8]] *= 100
    values, target = (torch.cat([first, second], 1), None) if kind == "crosscoder" else (first, second)
    inputs, batch = first_inputs(values, job, target, (4, 3) if kind == "crosscoder" else (4,))  # type: ignore[arg-type]
    medians = [part.norm(dim=1).median().item() for part in (first, second)]
    assert inputs.largest_norms == pytest.approx([10 * each for each in medians])
    keep = (first.norm(dim=1) <= 10 * medians[0]) & (second.norm(dim=1) <= 10 * medians[1])
    assert (~keep).nonzero().flatten().tolist() == [3, 5, 8]
    torch.testing.assert_close(batch.x, inputs.map(values[keep]))
    for part in (batch.x.split((4, 3), 1)) if target is None else (batch.x, batch.target):
        assert part is not None and part.square().sum(1).mean().item() == pytest.approx(part.shape[1], rel=1e-4)
    stored = json.loads(json.dumps(inputs.record()))
    assert list(stored["first_activations"]) == [job.settings.site, other] and not said
    again = Inputs.from_state(stored)
    ids = torch.arange(200)
    made = again.batch(ActivationBatch(values, ids, ids, ids), torch.device("cpu"), target)
    assert made is not None and again.left_out == 3
    torch.testing.assert_close(made.x, batch.x)
    if made.target is not None:
        torch.testing.assert_close(made.target, batch.target)
    del config["activations"]["max_norm"]
    job.settings = settings_of(config)
    first_inputs(values, job, target, (4, 3) if kind == "crosscoder" else (4,))  # type: ignore[arg-type]
    assert [line.split("%")[0] for line in said] == [f"note: at {job.settings.site} 0.50", f"note: at {other} 1.00"]


@pytest.mark.slow
def test_thresholds_of_a_transcoder_are_set_on_the_tokens_that_are_trained_on(tmp_path: Path) -> None:
    """The sinks are at the target only, since the norm before the MLP hides them."""
    config = with_sinks(tmp_path) | {"site": "blocks.0.ln1.hook_out", "target": SITE}
    run = saelab.train(config, ["activations.max_norm=10", "sae.allocation=mutual_choice"])
    assert record(run)["left_out"] == pytest.approx(record(run)["tokens"] / (CONTEXT - 1), rel=0.05)
    rows = saelab.calibration_rows(Job(settings_of(run / "config.yaml")).corpus, 1500)
    read = len(rows.held_out) + len(rows.training[1::2])
    assert record(run)["calibration_tokens"] == read * (CONTEXT - 1)


def test_activations_that_are_all_zero_are_refused(tmp_path: Path) -> None:
    config = with_sinks(tmp_path)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    for name in ("wte", "wpe"):
        weights[f"transformer.{name}.weight"].zero_()
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(SaelabError, match=f"^{SITE}: the first .* activations are all 0"):
        saelab.train(config, ["model.self_check=false"])  # which would refuse the site before


def test_the_note_names_what_holds_the_variance(tmp_path: Path) -> None:
    corpus = opened(
        write(tmp_path / "ids.jsonl", tokenised(), "input_ids"), Job(settings_of("quickstart")).lm.tokenizer
    )
    assert corpus.begins_with_bos
    sinks, dimensions = concentration_notes(Concentration(1.0, 0.01, 0.95, 0.9, 8), corpus)
    assert "1.00% of the tokens" in sinks and "95.0%" in sinks and "BOS" not in sinks
    assert "8 of the dimensions hold 90.0%" in dimensions and "delta CE" in dimensions
    assert list(concentration_notes(Concentration(1.0, 0.001, 0.09, 0.4, 8), corpus)) == []


@pytest.mark.parametrize("value", ["1", "0", "-3", ".inf", ".nan"])
def test_a_bound_that_would_leave_out_half_of_the_tokens_is_refused(value: str, tmp_path: Path) -> None:
    with pytest.raises(SaelabError, match=r"activations\.max_norm: .* is not a number above 1"):
        settings_of(small(tmp_path), [f"activations.max_norm={value}"])
