"""A sweep's runs equal, to the bit, those trained and evaluated one by one, whatever stops it; what fails is named."""

import json
import re
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import saelab
from saelab.errors import SaelabError
from saelab.lm.model import LanguageModel
from saelab.runs import plan, train
from saelab.runs.grid import grid
from saelab.runs.job import Job
from saelab.runs.plan import fitting, plan_training
from saelab.runs.resume import states
from saelab.runs.sweep import sweep
from saelab.training.state import load_state
from saelab.training.trainer import Trainer
from tests.faults.tools import command
from tests.runs.test_resume import Ask, ask, assert_same, config_of

__all__ = ["ask"]  # a fixture

SITES = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
METHODS = ["mutual_choice", {"name": "feature_choice", "refresh": 7}]


def contents(run: Path) -> dict[str, Any]:
    """The parts of a run that must be equal: weights, facts, log without the speed, last state, evaluation."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("tokens_per_second")
    state = load_state(states(run)[-1])
    state.pop("seconds")
    weights = (run / "sae" / "sae_weights.safetensors").read_bytes()
    parts = {"weights": weights, "log": lines, "state": state}
    for name, path in (("config", run / "sae" / "cfg.json"), ("evaluation", run / "eval.json")):
        parts[name] = json.loads(path.read_text())
    return parts


def alone(run: Path) -> Path:
    """The run of a sweep, trained and evaluated alone."""
    settings = saelab.settings_of(run / "config.yaml")
    out = run.parent.with_name("alone") / run.name
    saelab.train(replace(settings, out=str(out)))
    saelab.evaluate(out)
    return out


def runs_in(out: Path) -> list[Path]:
    return sorted(path.parent for path in out.glob("*/train.json"))


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """30 steps; `sweep` and what it varies are added by the tests."""
    return config_of(tmp_path) | {"out": str(tmp_path / "sweep")}


def test_two_sites_and_two_allocations_equal_four_runs(config: dict[str, Any]) -> None:
    out = sweep(config | {"sweep": {"site": SITES, "sae.allocation": METHODS}})
    runs = runs_in(out)
    assert len(runs) == 4
    for run in runs:
        assert_same(contents(run), contents(alone(run)), run.name)


def test_runs_from_a_cache_share_a_pass_whether_or_not_they_need_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two seeds, learning rates and affinities. The model runs on held-out text only."""
    config = config_of(tmp_path, cached=True) | {"out": str(tmp_path / "sweep")}
    axes = {"sae.affinity": ["activation", "gradient"], "sae.seed": [None, 5], "training.lr": [1e-3, 3e-3]}
    said: list[str] = []
    out = sweep(config | {"sweep": axes}, say=said.append)
    assert not any("passes" in line for line in said)
    runs = runs_in(out)
    assert len(runs) == 8 and len({contents(run)["weights"] for run in runs}) == 8
    for run in (runs[0], runs[-1]):
        assert_same(contents(run), contents(alone(run)), run.name)
    plain = tmp_path / "plain"
    saelab.train(config, [f"out={plain}", "training.lr=1e-3", "seed=0"])
    weights = (plain / "sae" / "sae_weights.safetensors").read_bytes()
    assert weights == contents(out / "affinity_activation-seed_none-lr0.001")["weights"]


def test_runs_that_need_gradients_of_the_model_have_a_pass_of_their_own(config: dict[str, Any]) -> None:
    """Because positions without a gradient are left out of it, the others have other batches."""
    said: list[str] = []
    out = sweep(config | {"sweep": {"sae.affinity": ["activation", "gradient"]}}, say=said.append)
    assert any(line.startswith("note: 2 passes: ") for line in said)
    for run in runs_in(out):
        assert_same(contents(run), contents(alone(run)), run.name)


def test_sizes_that_leave_tokens_out_at_one_site_do_not_change_the_other(config: dict[str, Any]) -> None:
    """Batches then differ in size between sites; and so do the autoencoders' steps, whose buffers are shared."""
    config["activations"] |= {"max_norm": 1.15}
    axes = {"site": SITES, "sae.n_features": [48, 64], "sae.selection": ["float32", "bfloat16"]}
    out = sweep(config | {"sweep": axes}, ["training.tokens=2000"])
    left_out = {json.loads((run / "train.json").read_text())["left_out"] for run in runs_in(out)}
    assert len(left_out) == 2 and 0 not in left_out
    for run in runs_in(out)[::3]:
        assert_same(contents(run), contents(alone(run)), run.name)


def test_a_site_that_cannot_be_trained_on_does_not_change_the_others(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of the sites side by side has only zeros in the sample."""
    first, real = SITES[0], train.first_inputs

    def zeros(sample: torch.Tensor, job: Job, *target: torch.Tensor) -> Any:
        return real(sample * (job.settings.site != first), job, *target)

    with monkeypatch.context() as patch:
        patch.setattr(train, "first_inputs", zeros)
        with pytest.raises(SaelabError, match=f"1 of 2 runs failed.*{first}: {first}: the first .* are all 0"):
            sweep(config | {"sweep": {"site": SITES}})
    run = Path(config["out"]) / SITES[1]
    assert runs_in(Path(config["out"])) == [run]
    assert_same(contents(run), contents(alone(run)), run.name)


def test_the_model_is_paid_once(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    forward = LanguageModel._forward

    def counted(self: LanguageModel, ids: torch.Tensor) -> torch.Tensor:
        if type(ids) is torch.Tensor and ids.device.type == "cpu":  # a plan runs the model without numbers
            rows.append(len(ids))
        return forward(self, ids)

    monkeypatch.setattr(LanguageModel, "_forward", counted)
    cost = []
    for axes in ({"sae.k": [2]}, {"sae.k": [2, 4], "training.lr": [1e-3, 2e-3]}):
        rows.clear()
        sweep(config | {"sweep": axes, "out": config["out"] + str(len(axes))})
        cost.append(sum(n for n in rows if n > 4))
    spliced = 3 * -(-600 // 31)  # the tokens of the rows for CE once more for each further autoencoder
    assert cost[0] <= cost[1] <= cost[0] + 2 * spliced


def test_a_signal_stops_all_at_one_step_and_the_same_command_goes_on(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config["sweep"] = {"sae.k": [2, 4]}
    whole = sweep(config, [f"out={tmp_path / 'whole'}"])
    step, said = Trainer.step, []

    def stopped(self: Trainer, batch: Any) -> Any:
        found = step(self, batch)
        if self.steps == 7 and self.sae.k == 2:
            signal.raise_signal(signal.SIGINT)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stopped)
        with pytest.raises(KeyboardInterrupt):
            sweep(config, say=said.append)
    runs = runs_in(Path(config["out"]))
    assert [states(run)[-1].name for run in runs] == ["000000007"] * 2
    assert any("the same command goes on" in line for line in said)
    sweep(config)
    for run in runs:
        assert_same(contents(run), contents(whole / run.name), run.name)


@pytest.mark.slow
def test_killed_at_any_instant_the_same_command_goes_on(config: dict[str, Any], tmp_path: Path, ask: Ask) -> None:
    """SIGKILL before a rename: among the first folders, between the states of two runs, among the last files."""
    config["sweep"] = {"sae.allocation": ["token_choice", "mutual_choice"]}
    out, whole = tmp_path / "sweep", tmp_path / "whole"
    total = ask("sweep", whole, config, [f"out={whole}"])["renames"]
    for renames in (3, 20, 12, total // 3):
        assert ask("sweep", out, config, renames=renames)["code"] == -signal.SIGKILL
    assert ask("sweep", out, config)["code"] == 0
    assert [run.name for run in runs_in(out)] == [run.name for run in runs_in(whole)]
    for run in runs_in(out):
        assert_same(contents(run), contents(whole / run.name), run.name)
    assert (out / "sweep.json").read_bytes() == (whole / "sweep.json").read_bytes()


@pytest.mark.slow
def test_runs_at_different_states_go_on_in_groups_and_finished_ones_stay(
    config: dict[str, Any], tmp_path: Path, ask: Ask
) -> None:
    config["sweep"] = {"sae.k": [2, 4, 8]}
    out, whole, stop = tmp_path / "sweep", tmp_path / "whole", {"number": signal.SIGTERM}
    assert ask("sweep", whole, config, [f"out={whole}"])["code"] == 0
    reply = ask("sweep", out, config, step=7, **stop)
    assert reply["stopped"] == 143 and any("the same command goes on" in line for line in reply["messages"])
    assert [states(run)[-1].name for run in runs_in(out)] == ["000000007"] * 3
    assert ask("resume", out / "k4")["code"] == 0
    before = (out / "k4" / "train.json").stat().st_mtime_ns
    assert ask("resume", out / "k8", step=12, **stop)["stopped"] == 143
    said = ask("sweep", out, config)["messages"]
    assert "k4: is trained already" in said and any(line.startswith("note: 2 passes: ") for line in said)
    assert (out / "k4" / "train.json").stat().st_mtime_ns == before
    for run in runs_in(out):
        assert_same(contents(run), contents(whole / run.name), run.name)
    said = ask("sweep", out, config)["messages"]
    assert [line for line in said if "trained" in line] == [f"k{k}: is trained already" for k in (2, 4, 8)]


def test_a_run_that_fails_does_not_stop_the_others(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config["sweep"] = {"training.lr": [1e-3, 1e12, 2e-3]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, output, error = command(monkeypatch, capsys, "sweep", tmp_path / "config.json")
    assert code == 2 and "lr1e+12" in output and "failed" in output
    assert "lr1e+12: error: training: the gradient is not finite" in error
    assert "1 of 3 runs failed, the others are finished; lr1e+12: training: the gradient is not finite" in error
    out = Path(config["out"])
    summary = {line["run"]: line for line in json.loads((out / "sweep.json").read_text())["runs"]}
    assert "not finite" in summary["lr1e+12"]["failed"] and summary["lr1e+12"]["fvu"] is None
    for name in ("lr0.001", "lr0.002"):
        assert_same(contents(out / name), contents(alone(out / name)), name)
        assert summary[name]["fvu"] == contents(out / name)["evaluation"]["fvu"]
    page = (out / "sweep.html").read_text()
    assert "src=" not in "".join(re.findall("<script[^>]*>", page)) and "lr0.002" in page and "lr1e+12" not in page


def test_what_does_not_fit_at_once_is_trained_in_turns(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config["sweep"] = {"sae.n_features": [8190, 8191, 8192]}
    runs = [run.settings for run in grid(config, ["training.tokens=400"])]
    needed = [plan_training(*runs[:n], loaded=True).total("memory") for n in (1, 2, 3)]
    assert needed[1] + 10**6 < needed[2]
    free = (needed[1] + needed[2]) // 2
    monkeypatch.setattr(plan, "free_memory", lambda: free)
    assert fitting(runs, partial(plan_training, loaded=True)) == 2
    assert fitting(runs, plan_training) <= 2 and fitting(runs[:1], plan_training) == 1
    said: list[str] = []
    sweep(config, ["training.tokens=400"], say=said.append)
    assert [line for line in said if "at once" in line] == [
        "2 of 3 autoencoders at once, as memory allows",
        "1 of 3 autoencoders at once, as memory allows",
    ]
    assert len(runs_in(Path(config["out"]))) == 3


def test_a_folder_that_is_something_else_is_not_touched(config: dict[str, Any]) -> None:
    config["sweep"] = {"sae.k": [2, 4]}
    run = saelab.train({name: value for name, value in config.items() if name != "sweep"}, ["training.tokens=1000"])
    with pytest.raises(SaelabError, match="is a run, and a sweep is a folder of runs"):
        sweep(config)
    settings = replace(saelab.settings_of(run / "config.yaml"), out=str(run.with_name("other") / "k2"))
    saelab.train(settings, ["training.lr=1"])
    with pytest.raises(SaelabError, match=r"other/k2 exists; .* --force"):
        sweep(config, [f"out={run.with_name('other')}", "training.tokens=1000"])
    sweep(config, [f"out={run.with_name('other')}", "training.tokens=1000"], force=True)


def test_the_names_of_runs_say_what_varies(config: dict[str, Any]) -> None:
    axes = {
        "sae": {"k": [2, 4]},
        "training.lr": [1e-3],
        "sae.allocation": ["token_choice", {"name": "feature_choice", "capacity": "uniform"}],
        "site": SITES[:1],
        "sae.multi_topk": [True],
    }
    runs = grid(config | {"sweep": axes}, ["sweep.sae.k=[3,6]", "sae.n_features=32"])
    assert [run.name for run in runs] == [
        f"k{k}-lr0.001-allocation_{allocation}-blocks.0.hook_resid_post-multi_topk_true"
        for k in (3, 6)
        for allocation in ("token_choice", "feature_choice_uniform")
    ]
    assert runs[0].settings.out == f"{config['out']}/{runs[0].name}" and runs[-1].varies["sae.k"] == 6
    assert all(run.settings.sae.n_features == 32 for run in runs)
    plain = grid(config)
    assert [run.name for run in plain] == [""] and plain[0].settings.out == config["out"]


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"seed": [0, 1]}, r"sweep\.seed: .* also decides the order of the text.*; sweep\.sae\.seed varies"),
        ({"training.batch": [100, 200]}, r"sweep\.training\.batch: cannot vary, because .* the same batches"),
        ({"corpus": ["a", "b"]}, r"sweep\.corpus: cannot vary"),
        ({"sae.k": 4}, r"sweep\.sae\.k: must be a list"),
        ({"sae.k": [4, 4]}, r"sweep\.sae\.k: has the same value twice"),
        ({"sae.k": [4, 100]}, r"k100: sae\.k: 100 is not between 1 and n_features"),
        ({"sae.kk": [4]}, r"sae\.kk: no such setting"),
        ({"sae.aux": [{"name": "aux_k"}, "aux_k"]}, r"two runs would be named aux_aux_k"),
        ([1], r"sweep: must map names of settings to lists"),
    ],
)
def test_a_wrong_sweep_is_refused(config: dict[str, Any], axes: Any, message: str) -> None:
    with pytest.raises(SaelabError, match=message):
        grid(config | {"sweep": axes})


def test_a_sweep_is_not_trained_as_a_run_and_a_run_not_as_a_sweep(config: dict[str, Any]) -> None:
    with pytest.raises(SaelabError, match="sweep: describes several runs; `saelab sweep` trains them"):
        saelab.train(config | {"sweep": {"sae.k": [2, 4]}})
    with pytest.raises(SaelabError, match="sweep: the config has none"):
        sweep(config)
