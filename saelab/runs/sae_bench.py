"""A run's evaluation as sae-bench 0.6 writes that of its core suite, so that its tables and plots take both.

Only figures of the same definition are filled in; the others are `ABSENT`, which is what sae-bench writes for a NaN.
All of saelab's own figures are under `eval_result_unstructured`.
"""

import math
import uuid
from pathlib import Path
from typing import Any

from saelab.analysis.decoder import mean_largest_cosine
from saelab.errors import SaelabError
from saelab.runs import folder
from saelab.runs.config import RunSettings
from saelab.runs.job import settings_of
from saelab.sae.checkpoint import load
from saelab.sae.interop.sae_bench import SaeBenchAutoencoder, SaeBenchConfig

ABSENT = -1.0
"""The value of a figure that saelab does not measure as sae-bench defines it."""
METRICS = {
    "model_behavior_preservation": ("kl_div_score", "kl_div_with_ablation", "kl_div_with_sae"),
    "model_performance_preservation": (
        "ce_loss_score",
        "ce_loss_with_ablation",
        "ce_loss_with_sae",
        "ce_loss_without_sae",
    ),
    "reconstruction_quality": ("explained_variance", "explained_variance_legacy", "mse", "cossim"),
    "shrinkage": ("l2_norm_in", "l2_norm_out", "l2_ratio", "relative_reconstruction_bias"),
    "sparsity": ("l0", "l1"),
    "token_stats": ("total_tokens_eval_reconstruction", "total_tokens_eval_sparsity_variance"),
    "misc_metrics": (
        "freq_over_1_percent",
        "freq_over_10_percent",
        "normalized_freq_over_1_percent",
        "normalized_freq_over_10_percent",
        "average_max_encoder_cosine_sim",
        "average_max_decoder_cosine_sim",
        "frac_alive",
    ),
}
"""The figures of sae-bench's core suite, by category; its schema needs all of them."""
SAE_ID = "custom_sae"
"""sae-bench's name of an autoencoder that is not from SAELens; its file is RELEASE_custom_sae_eval_results.json."""


def core(run: Path) -> dict[str, Any]:
    """The evaluation of the run folder `run` in the form of sae-bench's `CoreEvalOutput`.

    Raises SaelabError if the run was not evaluated, or without a language model, and for an autoencoder that sae-bench
    cannot evaluate.
    """
    found = folder.evaluation(run)
    if found is None:
        raise SaelabError(f"{run}: has no evaluation; `saelab eval {run}` makes it")
    if found.get("ce_clean") is None:
        raise SaelabError(f"{run}: its evaluation has no losses of a language model, and sae-bench's core suite has")
    settings, sae = settings_of(run / folder.SETTINGS), load(run)
    adapted = SaeBenchAutoencoder(sae, sae.metadata.get("model_name") or settings.model.name, settings.site)
    return {
        "eval_type_id": "core",
        "eval_config": _config(settings, adapted.cfg, found),
        "eval_id": str(uuid.uuid5(uuid.NAMESPACE_OID, str(found.get("inputs")))),
        "datetime_epoch_millis": int((run / folder.EVALUATION).stat().st_mtime * 1000),
        "eval_result_metrics": _metrics(found, adapted),
        "eval_result_details": [],
        "sae_bench_commit_hash": "written by saelab",
        "sae_lens_id": SAE_ID,
        "sae_lens_release_id": run.resolve().name,
        "sae_lens_version": None,
        "sae_cfg_dict": adapted.cfg.to_dict(),
        "eval_result_unstructured": {"saelab": found},
    }


def _config(settings: RunSettings, cfg: SaeBenchConfig, found: dict[str, Any]) -> dict[str, Any]:
    """sae-bench's `CoreEvalConfig`: the settings of saelab's evaluation."""
    rows = settings.eval.rows_per_forward
    batch = rows * settings.context

    def batches(tokens: int) -> int:
        return math.ceil(tokens / batch)

    return {
        "model_name": cfg.model_name,
        "llm_dtype": settings.model.dtype,
        "batch_size_prompts": rows,
        "n_eval_reconstruction_batches": batches(found["ce_tokens"]),
        "n_eval_sparsity_variance_batches": batches(found["tokens"]),
        "dataset": settings.corpus.source,
        "context_size": settings.context,
        "compute_kl": True,
        "compute_ce_loss": True,
        "compute_l2_norms": False,
        "compute_sparsity_metrics": True,
        "compute_variance_metrics": True,
        "compute_featurewise_density_statistics": False,
        "compute_featurewise_weight_based_metrics": True,
        "exclude_special_tokens_from_reconstruction": True,
        "verbose": False,
    }


def _metrics(found: dict[str, Any], adapted: SaeBenchAutoencoder) -> dict[str, dict[str, float]]:
    """sae-bench's `CoreMetricCategories`. docs/interop.md says why figures are absent."""
    known: dict[str, dict[str, float | None]] = {
        "model_behavior_preservation": {"kl_div_with_sae": found["kl"]},
        "model_performance_preservation": {
            "ce_loss_with_sae": found["ce_spliced"],
            "ce_loss_without_sae": found["ce_clean"],
        },
        "reconstruction_quality": {"cossim": found["cosine"]},
        "shrinkage": {},
        "sparsity": {"l0": found["l0"]},
        "token_stats": {
            "total_tokens_eval_reconstruction": found["ce_tokens"],
            "total_tokens_eval_sparsity_variance": found["tokens"],
        },
        "misc_metrics": {
            "average_max_encoder_cosine_sim": mean_largest_cosine(adapted.W_enc.T),
            "average_max_decoder_cosine_sim": mean_largest_cosine(adapted.W_dec),
            "frac_alive": 1 - found["never_active"] / found["n_features"],
        },
    }
    made = {}
    for category, names in METRICS.items():
        values = {name: known[category].get(name) for name in names}
        made[category] = {
            name: ABSENT if value is None or math.isnan(value) else value for name, value in values.items()
        }
    return made
