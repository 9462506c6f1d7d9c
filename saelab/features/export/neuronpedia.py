"""The batch-N.json files that SAEDashboard's NeuronpediaRunner writes and Neuronpedia's converter reads.

Field names, order and rounding are SAEDashboard's. What it computes from other data is empty here, as its own defaults
are: correlated neurons, the shares of attention heads, the decoder row itself.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saelab.errors import SaelabError
from saelab.features.database import Database, Feature
from saelab.features.examples import Example
from saelab.files import current_folder, read_json, replace_folder
from saelab.sae import layout as sae

FILES = r"batch-\d+\.json"
PER_BATCH = 128
"""Features in a file."""
WINDOW = 128
"""Most tokens of an example; Neuronpedia's own dashboards have this many."""
_TABLE_ROWS = 3


def write(database: Database, features: Sequence[int], path: Path) -> None:
    """Write the files to the folder `path`, which is replaced. Raises OSError, and SaelabError as `batch` does."""
    with replace_folder(path) as folder:
        for number, first in enumerate(range(0, len(features), PER_BATCH)):
            content = json.dumps(batch(database, features[first : first + PER_BATCH]))
            (folder / f"batch-{number}.json").write_text(content)


def batch(database: Database, features: Sequence[int]) -> dict[str, Any]:
    """The content of a file.

    Raises SaelabError if there is no such feature, or if the site is in no layer of the language model.
    """
    run = database.folder.resolve().parent
    return {
        "model_id": database.arrays.manifest["model"],
        "layer": layer(database),
        "sae_set": run.name,
        "sae_id_suffix": None,
        "features": [_feature(database, database.feature(index), _dataset(run)) for index in features],
    }


def layer(database: Database) -> int:
    """The layer of the database's site. Raises SaelabError if it is in none."""
    found = re.match(r"blocks\.(\d+)\.", database.site)
    if not found:
        raise SaelabError(f"{database.site} is in no layer, and this format files features by layer; try --to html")
    return int(found[1])


def _dataset(run: Path) -> str:
    """The text that the run's checkpoint names; "" without a checkpoint."""
    path = current_folder(run / sae.FOLDER) / sae.CONFIG
    metadata = read_json(path, "Train the run again.").get("metadata") if path.is_file() else None
    return str(metadata.get("dataset_path") or "") if isinstance(metadata, dict) else ""


def _feature(database: Database, feature: Feature, dataset: str) -> dict[str, Any]:
    correlated = _correlated(database, feature)
    return {
        "feature_index": feature.index,
        "neuron_alignment_indices": [neuron.index for neuron in feature.neurons],
        "neuron_alignment_values": _rounded([neuron.weight for neuron in feature.neurons]),
        "neuron_alignment_l1": _rounded([neuron.share for neuron in feature.neurons]),
        "correlated_neurons_indices": [],
        "correlated_neurons_l1": [],
        "correlated_neurons_pearson": [],
        "correlated_features_indices": [other for other, _, _ in correlated],
        "correlated_features_l1": _rounded([cosine for _, _, cosine in correlated]),
        "correlated_features_pearson": _rounded([pearson for _, pearson, _ in correlated]),
        "neg_str": _storable(token.text for token in feature.bottom_logits),
        "neg_values": _rounded([token.value for token in feature.bottom_logits]),
        "pos_str": _storable(token.text for token in feature.top_logits),
        "pos_values": _rounded([token.value for token in feature.top_logits]),
        "frac_nonzero": feature.density,
        "freq_hist_data_bar_values": _centres(0.0, feature.maximum, len(feature.histogram)),
        "freq_hist_data_bar_heights": feature.histogram.tolist(),
        "logits_hist_data_bar_heights": feature.logit_histogram.tolist(),
        "logits_hist_data_bar_values": _centres(*feature.logit_range, len(feature.logit_histogram)),
        "n_prompts_total": database.facts.rows.shape[0],
        "n_tokens_in_prompt": database.facts.rows.shape[1],
        "dataset": dataset,
        "decoder_weights_dist": [],
        "activations": _activations(database, feature),
        "vector": [],
    }


def _activations(database: Database, feature: Feature) -> list[dict[str, Any]]:
    """Top examples, in a group that -1 marks, and examples of each interval between deciles."""
    top = database.examples(feature.index, window=WINDOW)
    found = [_activation(example, -1, round(feature.maximum, 3), -1) for example in top]
    for low, high, share, examples in database.intervals(feature.index, window=WINDOW):
        found += [_activation(example, round(low, 3), round(high, 3), share) for example in examples]
    return found


def _activation(example: Example, low: float, high: float, share: float) -> dict[str, Any]:
    return {
        "bin_min": low,
        "bin_max": high,
        "bin_contains": share,
        "tokens": _storable(example.tokens),
        "values": _rounded(example.activations),
        "qualifying_token_index": example.index,
    }


def _correlated(database: Database, feature: Feature) -> list[tuple[int, float, float]]:
    """Other features with the largest Pearson correlation of activations over the N tokens, with it and the cosine.

    They are found among the co-active neighbours.
    """
    n, a = database.n_tokens, database.facts.activations(feature.index)
    found = []
    for neighbour in feature.neighbours["coactive"]:
        b = database.facts.activations(neighbour.feature)
        _, in_a, in_b = np.intersect1d(a.places, b.places, assume_unique=True, return_indices=True)
        x, y = a.values.astype(np.float64), b.values.astype(np.float64)
        product = x[in_a] @ y[in_b]
        covariance = product / n - x.sum() * y.sum() / n**2
        deviations = np.sqrt((x @ x / n - (x.sum() / n) ** 2) * (y @ y / n - (y.sum() / n) ** 2))
        found.append((neighbour.feature, covariance / deviations, product / np.sqrt((x @ x) * (y @ y))))
    return sorted(found, key=lambda each: -each[1])[:_TABLE_ROWS]


def _storable(tokens: Iterable[str]) -> list[str]:
    """The tokens without NUL, which Neuronpedia's database cannot store."""
    return [token.replace("\0", r"\x00") for token in tokens]


def _centres(low: float, high: float, bins: int) -> list[float]:
    return _rounded(low + (high - low) * (np.arange(bins) + 0.5) / bins)


def _rounded(values: np.ndarray | Sequence[float]) -> list[float]:
    return np.round(np.asarray(values, np.float64), 3).tolist()
