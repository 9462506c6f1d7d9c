"""A run's evaluation in the form of sae-bench's core suite."""

import json
import math
from pathlib import Path

import pytest

import saelab
from saelab.errors import SaelabError
from saelab.runs.export import export
from saelab.runs.sae_bench import ABSENT, METRICS, core
from tests.app.synthetic_run import SITE, write_run

FILLED = {
    "kl_div_with_sae": "kl",
    "ce_loss_with_sae": "ce_spliced",
    "ce_loss_without_sae": "ce_clean",
    "cossim": "cosine",
    "l0": "l0",
    "total_tokens_eval_reconstruction": "ce_tokens",
    "total_tokens_eval_sparsity_variance": "tokens",
}
"""Figures of sae-bench that are figures of an evaluation, by their names there."""
COMPUTED = {"frac_alive", "average_max_encoder_cosine_sim", "average_max_decoder_cosine_sim"}
SCHEMA = {
    "eval_type_id",
    "eval_config",
    "eval_id",
    "datetime_epoch_millis",
    "eval_result_metrics",
    "eval_result_details",
    "sae_bench_commit_hash",
    "sae_lens_id",
    "sae_lens_release_id",
    "sae_lens_version",
    "sae_cfg_dict",
    "eval_result_unstructured",
}
CONFIG = {
    "model_name",
    "llm_dtype",
    "batch_size_prompts",
    "n_eval_reconstruction_batches",
    "n_eval_sparsity_variance_batches",
    "dataset",
    "context_size",
    "compute_kl",
    "compute_ce_loss",
    "compute_l2_norms",
    "compute_sparsity_metrics",
    "compute_variance_metrics",
    "compute_featurewise_density_statistics",
    "compute_featurewise_weight_based_metrics",
    "exclude_special_tokens_from_reconstruction",
    "verbose",
}
"""The fields of `CoreEvalOutput` and `CoreEvalConfig` of sae-bench 0.6.0."""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = write_run(tmp_path / "k8", n_features=12, features=False)
    settings = path / "config.yaml"
    settings.write_text("out: k8\n" + settings.read_text())
    return path


def test_the_result_has_the_fields_of_the_schema_and_the_figures_of_the_evaluation(run: Path) -> None:
    path = export(run, "sae_bench")
    assert path == run / "exports" / "k8_custom_sae_eval_results.json"
    made = json.loads(path.read_text())
    assert made.keys() == SCHEMA and made["eval_config"].keys() == CONFIG
    assert made["sae_lens_release_id"] == "k8" and made["sae_lens_id"] == "custom_sae"
    assert made["sae_cfg_dict"]["hook_name"] == SITE and made["sae_cfg_dict"]["d_sae"] == 12
    evaluation = json.loads((run / "eval.json").read_text())
    assert made["eval_result_unstructured"] == {"saelab": evaluation}

    categories = made["eval_result_metrics"]
    assert {name: tuple(values) for name, values in categories.items()} == METRICS
    figures = {name: value for values in categories.values() for name, value in values.items()}
    for name, ours in FILLED.items():
        assert figures[name] == evaluation[ours]
    sae = saelab.load(run)
    assert figures["frac_alive"] == pytest.approx(1 - evaluation["never_active"] / 12)
    for name, rows in (("encoder", sae.W_enc), ("decoder", sae.W_dec)):
        unit = (rows / rows.norm(dim=1, keepdim=True)).double()
        largest = (unit @ unit.T).fill_diagonal_(-2).amax(1).mean().item()
        assert figures[f"average_max_{name}_cosine_sim"] == pytest.approx(largest, rel=1e-5)
    others = figures.keys() - FILLED.keys() - COMPUTED
    assert others and {figures[name] for name in others} == {ABSENT}
    assert not any(isinstance(value, float) and math.isnan(value) for value in figures.values())


def test_the_number_of_batches_covers_the_tokens(run: Path) -> None:
    config, evaluation = core(run)["eval_config"], json.loads((run / "eval.json").read_text())
    batch = config["batch_size_prompts"] * config["context_size"]
    for batches, tokens in (
        ("n_eval_reconstruction_batches", "ce_tokens"),
        ("n_eval_sparsity_variance_batches", "tokens"),
    ):
        assert (config[batches] - 1) * batch < evaluation[tokens] <= config[batches] * batch


def test_mistakes_are_reported(run: Path, tmp_path: Path) -> None:
    with pytest.raises(SaelabError, match="--to sae_bench is of the whole autoencoder"):
        export(run, "sae_bench", "1")
    evaluation = json.loads((run / "eval.json").read_text())
    (run / "eval.json").write_text(json.dumps(evaluation | {"ce_clean": None}))
    with pytest.raises(SaelabError, match="has no losses of a language model"):
        export(run, "sae_bench")
    (run / "eval.json").unlink()
    with pytest.raises(SaelabError, match="has no evaluation; `saelab eval"):
        export(run, "sae_bench")
    with pytest.raises(SaelabError, match="not a run folder with a checkpoint"):
        export(tmp_path / "missing", "sae_bench")
    assert not (run / "exports").exists() and not (tmp_path / "missing").exists()
