"""The details of features that circuit-tracer's page of an attribution graph shows: a JSON file per feature.

A graph names a feature by one number, the Cantor pairing of its layer and index, and that is the file's name.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saelab.features.database import Database
from saelab.features.examples import Example
from saelab.features.export.neuronpedia import layer
from saelab.files import replace_folder

FILES = r"\d+\.json"
WINDOW = 64


def write(database: Database, features: Sequence[int], path: Path) -> None:
    """Write the files to the folder `path`, which is replaced.

    Raises OSError, and SaelabError if there is no such feature or if the site is in no layer of the language model.
    """
    number = layer(database)
    with replace_folder(path) as folder:
        for index in features:
            (folder / f"{paired(number, index)}.json").write_text(json.dumps(details(database, index)))


def paired(first: int, second: int) -> int:
    """The Cantor pairing of two numbers, another number for every pair."""
    return (first + second) * (first + second + 1) // 2 + second


def details(database: Database, index: int) -> dict[str, Any]:
    """The content of a feature's file. Raises SaelabError if there is no such feature.

    `quantile_values` are the 100 percentiles of its activations; `histogram` has equal bins from `act_min`, which is 0,
    to `act_max`.
    """
    feature = database.feature(index)
    values = database.facts.activations(index).values
    top = database.examples(index, window=WINDOW, distinct=True)
    groups = [("Top activations", top)]
    for low, high, share, examples in database.intervals(index, window=WINDOW):
        groups.append((f"{low:.3g} to {high:.3g} ({share:.1%} of activations)", examples))
    percentiles = np.arange(1, 101) / 100
    return {
        "transcoder_id": database.folder.resolve().parent.name,
        "index": index,
        "examples_quantiles": [
            {"quantile_name": name, "examples": [_example(example) for example in examples]}
            for name, examples in groups
            if examples
        ],
        "top_logits": [token.text for token in feature.top_logits],
        "bottom_logits": [token.text for token in feature.bottom_logits],
        "act_min": 0.0,
        "act_max": feature.maximum,
        "quantile_values": np.quantile(values, percentiles, method="inverted_cdf").tolist() if len(values) else [],
        "histogram": feature.histogram.tolist(),
        "activation_frequency": feature.density,
    }


def _example(example: Example) -> dict[str, Any]:
    return {
        "tokens_acts_list": np.round(example.activations.astype(np.float64), 3).tolist(),
        "train_token_ind": example.index,
        "is_repeated_datapoint": False,
        "tokens": example.tokens,
    }
