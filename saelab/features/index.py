"""Writes the feature database, from which every page reads: one pass over held-out text, stored as Parquet."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from saelab.encoded import encoded
from saelab.errors import SaelabError
from saelab.features.activity import Activity, ActivityBuilder
from saelab.features.layout import CONTEXTS, FEATURES, SUMMARY
from saelab.features.settings import FeatureSettings
from saelab.files import replace_folder, translate_errors, write_json
from saelab.lm.model import LanguageModel
from saelab.lm.selfcheck import in_residual_stream
from saelab.progress import Track, silent
from saelab.sae.model import SparseAutoencoder

BINS = 50
LIST_LENGTH = 10
"""Top and bottom logits, and neighbours, per feature."""


def build_features(
    sae: SparseAutoencoder,
    lm: LanguageModel,
    rows: Tensor,
    site: str,
    folder: Path,
    settings: FeatureSettings,
    inputs: str,
    *,
    track: Track = silent,
) -> dict[str, Any]:
    """Encode `rows` ``[rows, context]`` and write their feature database to `folder`, as `write_features` does.

    Raises SaelabError as `write_features` does, before anything is encoded, and if the rows have no ordinary token.
    """
    check_replaceable(folder)
    activity = ActivityBuilder(sae.n_features)
    for block in encoded(sae, lm, rows, site, settings.rows_per_forward, track=track):
        activity.add(block)
    return write_features(activity.build(), sae, lm, rows, site, folder, settings, inputs)


def write_features(
    activity: Activity,
    sae: SparseAutoencoder,
    lm: LanguageModel,
    rows: Tensor,
    site: str,
    folder: Path,
    settings: FeatureSettings,
    inputs: str,
) -> dict[str, Any]:
    """Write features.parquet, contexts.parquet and summary.json to `folder`; returns the summary.

    `activity` are the activations on `rows` ``[rows, context]``. `inputs` is recorded in the summary: a hash of what
    the tables were made from. An earlier database in `folder` is replaced once the new one is complete. Raises
    SaelabError if `folder` contains anything else or cannot be written.
    """
    check_replaceable(folder)
    vocabulary = _display(lm.tokenizer, len(lm.unembedding))
    columns = statistics(activity) | _top_logits(sae, lm, site, vocabulary) | _neighbours(sae.W_dec)
    contexts = _contexts_table(activity, rows.cpu(), settings, vocabulary)
    summary = {
        "inputs": inputs,
        "n_tokens": activity.n_tokens,
        "n_features": sae.n_features,
        "never_active": int((activity.offsets.diff() == 0).sum()),
        "k": sae.k,
        "site": site,
        "model": lm.name,
        "d_in": sae.d_in,
    }
    with translate_errors(folder), replace_folder(folder) as unfinished:
        # A reader of one feature decodes one row group, so those are small.
        _write(pa.table(columns), unfinished / FEATURES, row_group=1024)
        _write(contexts, unfinished / CONTEXTS, row_group=256 * settings.contexts)
        write_json(unfinished / SUMMARY, summary)
    return summary


def check_replaceable(folder: Path) -> None:
    """Raises SaelabError if `folder` holds anything but a feature database."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name not in (FEATURES, CONTEXTS, SUMMARY) and path.suffix != ".tmp":
            raise SaelabError(
                f"{folder}: holds {path.name}, which is no part of a feature database; choose another folder"
            )


def statistics(activity: Activity) -> dict[str, Any]:
    """Density, counts, mean and maximum over active tokens, and the histogram of activations, per feature.

    A feature's histogram sums to n_active, and n_active sums to the number of activations.
    """
    n, index = activity.n_features, activity.features.long()
    n_active = activity.offsets.diff()
    total = torch.zeros(n, dtype=torch.float64).index_add_(0, index, activity.values.double())
    largest = torch.zeros(n).scatter_reduce_(0, index, activity.values, "amax")
    bins = (activity.values / largest[index] * BINS).long().clamp_(max=BINS - 1)
    histogram = torch.bincount(index * BINS + bins, minlength=n * BINS)
    return {
        "feature": pa.array(range(n), pa.int32()),
        "density": (n_active.double() / activity.n_tokens).numpy(),
        "n_active": n_active.numpy(),
        "mean_activation": (total / n_active.clamp_min(1)).float().numpy(),
        "max_activation": largest.numpy(),
        "histogram": _lists(pa.array(histogram.numpy()), BINS, n),
    }


def strongest_entries(activity: Activity, context: int, per_feature: int) -> tuple[Tensor, Tensor]:
    """Each feature's strongest activations, one per row: (entry ``[m]``, rank within the feature ``[m]``), int64.

    Sorted by feature, then by falling activation; ties go to the earlier row and position.
    """
    by_value = torch.argsort(activity.values, descending=True, stable=True)
    n_rows = int(activity.positions.max()) // context + 1 if len(activity.positions) else 1
    group = activity.features.long() * n_rows + activity.positions // context
    by_group = by_value[torch.argsort(group[by_value], stable=True)]
    is_peak = torch.ones(len(by_group), dtype=torch.bool)
    is_peak[1:] = group[by_group][1:] != group[by_group][:-1]
    peaks = by_group[is_peak]
    peaks = peaks[torch.argsort(activity.values[peaks], descending=True, stable=True)]
    peaks = peaks[torch.argsort(activity.features[peaks], stable=True)]
    owner = activity.features[peaks].long()
    counts = torch.bincount(owner, minlength=activity.n_features)
    rank = torch.arange(len(peaks)) - (counts.cumsum(0) - counts)[owner]
    return peaks[rank < per_feature], rank[rank < per_feature]


def _contexts_table(activity: Activity, rows: Tensor, settings: FeatureSettings, vocabulary: list[str]) -> pa.Table:
    context = rows.shape[1]
    window = min(settings.window, context)
    peaks, rank = strongest_entries(activity, context, settings.contexts)
    feature, in_text = activity.features[peaks].long(), activity.positions[peaks]
    row, position = in_text // context, in_text % context
    start = (position - window * 2 // 3).clamp(0, context - window)  # text before a peak explains more
    shown = (row * context + start)[:, None] + torch.arange(window)

    size = rows.numel()
    keys = activity.features.long() * size + activity.positions  # sorted, as activity is
    shown_keys = (feature[:, None] * size + shown).flatten()
    found = torch.searchsorted(keys, shown_keys).clamp_max(max(0, len(keys) - 1))
    activations = torch.where(keys[found] == shown_keys, activity.values[found], 0.0) if len(keys) else torch.empty(0)

    strings = pa.array(vocabulary, pa.string()).take(pa.array(rows.flatten()[shown.flatten()].numpy()))
    return pa.table(
        {
            "feature": pa.array(feature.numpy(), pa.int32()),
            "rank": pa.array(rank.numpy(), pa.int16()),
            "row": pa.array(row.numpy(), pa.int32()),
            "position": pa.array(position.numpy(), pa.int32()),
            "activation": activity.values[peaks].numpy(),
            "peak": pa.array((position - start).numpy(), pa.int16()),
            "tokens": _lists(strings, window, len(peaks)),
            "activations": _lists(pa.array(activations.numpy()), window, len(peaks)),
        }
    )


@torch.no_grad()
def _top_logits(sae: SparseAutoencoder, lm: LanguageModel, site: str, vocabulary: list[str]) -> dict[str, pa.Array]:
    """The tokens whose logit each decoder row raises or lowers most: the product of W_dec and the unembedding.

    The final norm is left out, as in a plain logit lens. The lists are empty if the site is not `in_residual_stream`,
    because then the product means nothing.
    """
    unembedding = lm.unembedding.float()
    columns: dict[str, pa.Array] = {}
    fits = unembedding.shape[1] == sae.d_in and in_residual_stream(lm, site)
    n = min(LIST_LENGTH, len(unembedding)) if fits else 0
    tops: dict[str, list[Tensor]] = {"top": [], "bottom": []}
    ids: dict[str, list[Tensor]] = {"top": [], "bottom": []}
    for rows in sae.W_dec.float().split(256):
        logits = rows @ unembedding.T if fits else rows.new_empty(len(rows), 0)
        for end in tops:
            top = logits.topk(n, dim=1, largest=end == "top")
            tops[end].append(top.values.cpu())
            ids[end].append(top.indices.cpu())
    for end in tops:
        strings = pa.array(vocabulary, pa.string()).take(pa.array(torch.cat(ids[end]).flatten().numpy()))
        columns[f"{end}_logit_tokens"] = _lists(strings, n, sae.n_features)
        columns[f"{end}_logits"] = _lists(pa.array(torch.cat(tops[end]).flatten().numpy()), n, sae.n_features)
    return columns


@torch.no_grad()
def _neighbours(W_dec: Tensor) -> dict[str, pa.Array]:
    """For each feature, the other features whose decoder rows have the largest cosine with its own."""
    unit = torch.nn.functional.normalize(W_dec.float(), dim=1)
    n = min(LIST_LENGTH, len(unit) - 1)
    found, cosines = [], []
    for start in range(0, len(unit), 1024):
        block = unit[start : start + 1024] @ unit.T
        own = torch.arange(len(block), device=block.device)
        block[own, own + start] = -torch.inf
        top = block.topk(n, dim=1)
        found.append(top.indices.int().cpu())
        cosines.append(top.values.cpu())
    return {
        "neighbours": _lists(pa.array(torch.cat(found).flatten().numpy()), n, len(unit)),
        "neighbour_cosines": _lists(pa.array(torch.cat(cosines).flatten().numpy()), n, len(unit)),
    }


def _display(tokenizer: Any, size: int) -> list[str]:
    """Every token id below `size` as text: bytes that alone are not UTF-8 as U+FFFD, ids without a token as <id>."""
    n = len(tokenizer)
    pieces = tokenizer.convert_ids_to_tokens(list(range(n)))
    decoded = tokenizer.batch_decode([[i] for i in range(n)], clean_up_tokenization_spaces=False)
    # SentencePiece marks a leading space with U+2581, and decoding a single token loses it
    shown = [p.replace("\u2581", " ") if p and "\u2581" in p else d for p, d in zip(pieces, decoded, strict=True)]
    return shown + [f"<{i}>" for i in range(n, size)]


def _lists(flat: pa.Array, length: int, n: int) -> pa.Array:
    """`n` lists of equal `length`."""
    return pa.ListArray.from_arrays(pa.array([i * length for i in range(n + 1)], pa.int32()), flat)


def _write(table: pa.Table, path: Path, row_group: int) -> None:
    pq.write_table(table, path, compression="zstd", row_group_size=row_group)
