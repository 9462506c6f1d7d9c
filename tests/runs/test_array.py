"""A run whose activations come from an array: every stage works without a language model, and equals its formula."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

import saelab
from saelab.analysis.fidelity import Fidelity
from saelab.cli import app
from saelab.errors import SaelabError
from saelab.features.database import open_database
from saelab.files import remove_folder, write_json
from saelab.runs import folder
from saelab.runs.calibration import rows_to_calibrate_on
from saelab.runs.config import settings_from
from saelab.runs.job import Job, settings_of
from saelab.runs.live import open_live
from saelab.runs.plan import plan_evaluation, plan_index, plan_training
from saelab.runs.reopen import reopen
from saelab.runs.resume import states
from saelab.runs.summary import summarise

ROWS, WIDTH, HELD_OUT = 1200, 12, 300


def made_up(rows: int = ROWS, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """Rows that are sums of a few of 16 directions, and the strongest direction of each."""
    random = np.random.default_rng(seed)
    directions = random.standard_normal((16, WIDTH))
    codes = random.exponential(size=(rows, 16)) * (random.random((rows, 16)) < 0.15)
    noise = 0.05 * random.standard_normal((rows, WIDTH))
    return (codes @ directions + noise + 0.3).astype(np.float32), [f"kind {i}" for i in codes.argmax(1)]


def config_of(tmp_path: Path, **settings: Any) -> dict[str, Any]:
    values, labels = made_up()
    np.save(tmp_path / "points.npy", values)
    (tmp_path / "labels.txt").write_text("".join(f"{label}\n" for label in labels))
    return {
        "out": str(tmp_path / "run"),
        "device": "cpu",
        "activations": {"array": {"path": str(tmp_path / "points.npy"), "buffer_tokens": 400}},
        "corpus": {"held_out": HELD_OUT / ROWS},
        "sae": {"n_features": 32, "k": 3},
        "training": {"tokens": 6000, "batch": 100, "lr": 3e-3, "checkpoint": {"tokens": 1000, "keep": 9}},
    } | settings


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads no language model and no tokenizer."""

    def refused(*arguments: object, **options: object) -> None:
        raise AssertionError("a language model is loaded")

    for name in ("job.load_language_model", "job.open_corpus", "plan.outlined_language_model"):
        monkeypatch.setattr(f"saelab.runs.{name}", refused)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of mutual choice, so that thresholds are set, with labels."""
    folder = tmp_path_factory.mktemp("array")
    config = config_of(folder)
    config["activations"]["array"]["labels"] = str(folder / "labels.txt")
    config["sae"]["allocation"] = "mutual_choice"
    return saelab.run(config)


def held_out(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values[ROWS - HELD_OUT :]).float()


def test_the_short_form_needs_no_site(tmp_path: Path) -> None:
    tree = {"out": "runs/x", "activations": "some/points.npy"}
    settings = settings_from(tree)
    assert settings.activations.array is not None and settings.activations.array.path == "some/points.npy"
    assert settings.site == "points"
    assert settings_from(tree | {"site": "other"}).site == "other"
    assert settings_from(tree, ["activations.array.tensor=layer1"]).activations.array.tensor == "layer1"  # type: ignore[union-attr]
    for more, message in [
        ({"sae": {"affinity": "gradient"}}, "an array has none; use activation"),
        ({"activations": {"array": "x.npy", "cache": "y"}}, "there is a cache too"),
        ({"activations": ""}, "array.path: is empty"),
        ({"activations": {}}, "site: is required"),
    ]:
        with pytest.raises(SaelabError, match=message):
            settings_from(tree | more)


def test_evaluation_equals_its_formulas(run: Path) -> None:
    x, found, sae = held_out(made_up()[0]), folder.evaluation(run), saelab.load(run)
    assert found is not None and (found["tokens"], found["ce_tokens"]) == (HELD_OUT, 0)
    codes = sae.encode(x)
    dense, y = codes.to_dense(), sae.decode(codes, x)
    error = (x - y).double().square().sum() / (x.double() - x.double().mean(0)).square().sum()
    assert found["fvu"] == pytest.approx(error.item(), rel=1e-5) and found["fvu"] < 0.5
    assert found["l0"] == pytest.approx((dense > 0).sum(1).double().mean().item())
    assert found["cosine"] == pytest.approx(torch.cosine_similarity(x, y).double().mean().item(), rel=1e-5)
    assert found["never_active"] == int((dense == 0).all(0).sum())
    left_out = {"ce_clean", "ce_spliced", "kl", "delta_ce", "loss_recovered_zero", "loss_recovered_mean"}
    assert not left_out & found.keys() and found["c_dec"] is not None


def test_the_database_is_of_the_held_out_rows_and_their_labels(run: Path) -> None:
    values, labels = made_up()
    sae, database = saelab.load(run), open_database(run / "features")
    dense = sae.encode(held_out(values)).to_dense().detach().numpy()
    assert (database.first_row, database.of_array, database.origin) == (900, True, "the array points.npy")
    assert database.n_tokens == HELD_OUT and database.lens is None
    own = np.array(labels[ROWS - HELD_OUT :])
    assert database.vocabulary.window(np.asarray(database.facts.rows)[:, 0]) == own.tolist()
    np.testing.assert_array_equal(np.asarray(database.table["n_active"]), (dense > 0).sum(0))
    for feature in np.flatnonzero((dense > 0).any(0)).tolist():
        shares = {label: dense[own == label, feature].sum() / dense[:, feature].sum() for label in set(own)}
        for token in database.feature(feature).top_tokens:
            assert token.value == pytest.approx(shares[token.text], rel=1e-4)
        best = database.examples(feature, n=1)[0]
        assert best.row == dense[:, feature].argmax() and best.tokens == [own[best.row]]
        rows = [example.row for example in database.examples(feature)]
        assert rows == [example.row for example in database.examples(feature, distinct=True)]
        card = database.feature(feature)._repr_html_()
        assert f">row {900 + best.row}<" in card and "token ids" not in card and "same tokens" not in card


def test_a_stopped_training_goes_on_to_the_same_weights(run: Path, tmp_path: Path) -> None:
    """From a state in the middle of a group: weights and thresholds are equal to the bit."""
    again = tmp_path / "again"
    shutil.copytree(run, again)
    kept = states(again)[2]
    for state in states(again):
        if state != kept:
            remove_folder(state)
    record = folder.training_record(again)
    write_json(again / folder.TRAINING, record | {"complete": False})
    saelab.resume(again)
    whole, resumed = (load_file(path / "sae" / "sae_weights.safetensors") for path in (run, again))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert folder.training_record(again)["complete"] and "threshold" in whole


def test_a_training_starts_with_the_weights_of_another(run: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, training={"tokens": 100, "batch": 100, "lr": 1e-30})
    begun = saelab.train(config, [f"sae.init_from={run}", "sae.unit_norm=false", "sae.allocation=mutual_choice"])
    x, (ours, theirs) = held_out(made_up()[0]), (saelab.load(each) for each in (begun, run))
    torch.testing.assert_close(ours.pre_activations(x), theirs.pre_activations(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.W_dec, theirs.W_dec, rtol=1e-5, atol=1e-6)


def test_thresholds_are_set_on_rows_that_evaluation_does_not_read(tmp_path: Path) -> None:
    said: list[str] = []
    config = config_of(tmp_path, eval={"tokens": 100})
    rows = rows_to_calibrate_on(Job(settings_of(config), said.append))
    assert rows.held_out.flatten().tolist() == list(range(900, 1200)) and "also reads" in said[-1]
    assert rows.training.flatten().tolist() == list(range(900))


def test_up_to_date_stages_stay_and_other_content_is_noticed(tmp_path: Path) -> None:
    config, said = config_of(tmp_path), list[str]()
    run = saelab.run(config)
    saelab.run(config, say=said.append)
    assert sum("up to date" in line for line in said) == 3
    (tmp_path / "moved").mkdir()
    moved = shutil.move(tmp_path / "points.npy", tmp_path / "moved" / "points.npy")
    with pytest.raises(SaelabError, match="no such file"):
        saelab.evaluate(run)
    first = saelab.evaluate(run, [f"activations={moved}"])
    assert (run / "eval.json").is_file() and not list(run.glob("eval-*"))
    other, _ = made_up(seed=1)
    np.save(tmp_path / "points.npy", other)
    with pytest.raises(SaelabError, match=r"points.npy is not what it was in training.*name a copy.*activations=PATH"):
        saelab.evaluate(run)
    np.save(tmp_path / "other.npy", other)
    differs = saelab.evaluate(run, [f"activations={tmp_path / 'other.npy'}"])
    assert differs.fvu != first.fvu and len(list(run.glob("eval-*.json"))) == 1
    np.save(tmp_path / "narrow.npy", other[:, :5])
    with pytest.raises(SaelabError, match=r"points of narrow.npy is 5 wide, and the autoencoder in .* takes 12"):
        saelab.evaluate(run, [f"activations={tmp_path / 'narrow.npy'}"])


def test_rows_that_are_not_finite_stop_a_training_and_keep_its_state(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    values, _ = made_up()
    values[850, 2] = np.nan
    np.save(tmp_path / "points.npy", values)
    with pytest.raises(SaelabError, match=r"points\.npy: row 850 has NaN"):
        saelab.train(config)


def test_labels_are_read_before_the_training(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    (tmp_path / "few.txt").write_text("a\nb\n")
    for name, message in (("few.txt", r"few\.txt has 2 lines, and the array 1,200 rows"), ("none.txt", r"none\.txt")):
        with pytest.raises(SaelabError, match=message):
            saelab.run(config, [f"activations.array.labels={tmp_path / name}"])
        assert not (tmp_path / "run").exists()


def test_a_notebook_shows_the_array_of_a_run(run: Path) -> None:
    shown = repr(saelab.load(run))
    assert "array: points.npy" in shown and f"held-out rows: {HELD_OUT}" in shown and "model" not in shown


def test_a_batch_needs_as_many_rows(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    with pytest.raises(SaelabError, match=r"activations.array: .* holds 900 tokens, fewer than one batch.*lower"):
        saelab.train(config, ["training.batch=1000"])


def test_a_sweep_and_the_command_print_no_losses(tmp_path: Path) -> None:
    config = config_of(tmp_path, eval={"tokens": 100})
    path = tmp_path / "config.yaml"
    config["training"] = {"tokens": 1000, "batch": 100}
    path.write_text(json.dumps(config))
    result = CliRunner().invoke(app, ["sweep", str(path), "sweep.sae.k=[2,3]"], catch_exceptions=False)
    assert result.exit_code == 0 and "FVU" in result.output
    assert "delta CE" not in result.output and "loss recovered" not in result.output
    alone = saelab.run(config | {"out": str(tmp_path / "alone")}, ["sae.k=3"])
    both = [load_file(each / "sae" / "sae_weights.safetensors") for each in (alone, tmp_path / "run" / "k3")]
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])
    result = CliRunner().invoke(app, ["eval", str(alone)], catch_exceptions=False)
    assert "never active on 100 tokens" in result.output and " CE " not in result.output and "KL" not in result.output
    result = CliRunner().invoke(app, ["plan", str(path)], catch_exceptions=False)
    assert (
        result.exit_code == 0 and "cache" not in result.output and "weights" not in result.output.split("features")[0]
    )


def test_plans_have_no_model(tmp_path: Path) -> None:
    settings = settings_of(config_of(tmp_path))
    for plan in (plan_training(settings), plan_evaluation(settings), plan_index(settings)):
        names = {need.what for need in plan.needs}
        assert not names & {
            "model",
            "weights of the model",
            "pass of the model",
            "text",
            "tokenising",
            "runs of the model",
        }
    assert {"shuffle buffers", "sample"} <= {need.what for need in plan_training(settings).needs}


def test_what_needs_a_language_model_says_so(run: Path) -> None:
    calls: list[Callable[[], object]] = [
        lambda: saelab.analyse(run, "dead"),
        lambda: saelab.controls(run),
        lambda: reopen(run, "controls", (), lambda message: None),
        lambda: open_live(run),
        lambda: saelab.neuron_run(run / "config.yaml", [f"out={run}-neurons", "site=blocks.1.hook_resid_post"]),
    ]
    for call in calls:
        with pytest.raises(SaelabError, match=r"come from an array, .*points.npy, so there is no language model"):
            call()
    for explained in (saelab.explain, saelab.score):
        with pytest.raises(SaelabError, match="come from an array, so there is no text"):
            explained(run)
    with pytest.raises(SaelabError, match="is on disk already"):
        saelab.cache(run / "config.yaml", run.parent / "cache")


def test_the_summary_names_the_array(run: Path) -> None:
    found = summarise(run)
    assert (found.model, found.site, found.of_array, found.problem) == ("points.npy", "points", True, None)


def test_hashes_of_runs_with_a_model_do_not_know_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_from({"out": "x", "site": "blocks.0.hook_resid_post"})
    hashed: list[dict[str, Any]] = []
    monkeypatch.setattr("saelab.runs.job._hash", lambda parts: hashed.append(parts) or "")
    job = Job(settings)
    made = type("Made", (), {"fingerprint": "f", "attention": "sdpa"})
    vars(job).update(lm=made, corpus=made)
    job.training_inputs()
    assert hashed[0]["activations"] == {
        name: value
        for name, value in asdict(settings.activations).items()
        if name in ("stream", "cache", "special_tokens")
    }


def test_figures_without_losses_have_no_plot() -> None:
    none = dict.fromkeys(
        ("ce_clean", "ce_spliced", "ce_zero_ablated", "ce_mean_ablated", "ce_spliced_without_sinks", "kl"), float("nan")
    )
    found = Fidelity(
        "x",
        "inference",
        9,
        0,
        0.1,
        1.0,
        0.9,
        0,
        0.0,
        0.1,
        0.1,
        0.9,
        0,
        2,
        c_dec=None,
        counts=torch.tensor([3, 6]),
        **none,
    )
    assert "kl" not in found.to_dict() and "delta_ce" not in found.to_dict() and found.to_dict()["fvu"] == 0.1
    with pytest.raises(SaelabError, match="no loss was measured"):
        found.plot()
