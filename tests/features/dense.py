"""A feature database by its definition: every column is a plain formula on dense activations.

`write_database` writes one from made-up activations without saelab's writer; tests hold the writer to it, and the
explorer's tests read such databases.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from saelab.features.layout import (
    BINS,
    COLUMNS,
    FORMAT,
    LIST_LENGTH,
    LOGIT_BINS,
    MANIFEST,
    NEURONS,
    QUANTILES,
    SMALLEST_VALUE,
    TOP_PLACES,
    TOP_TOKENS,
    VERSION,
    arrays,
)


def write_database(
    folder: Path,
    z: np.ndarray,
    tokens: np.ndarray,
    vocabulary: list[bytes],
    *,
    special: tuple[int, ...] = (0,),
    d_in: int = 16,
    lens: bool = True,
    seed: int = 0,
    **facts: Any,
) -> Path:
    """Write the database of activations z ``[rows, context, n_features]`` of the text `tokens` ``[rows, context]``.

    The tokens in `special` are not ordinary: z is 0 on them. Weights are random. `facts` go into the manifest.
    """
    n_rows, context, n_features = z.shape
    rng = np.random.default_rng(seed)
    W_enc, W_dec = rng.standard_normal((2, n_features, d_in)).astype(np.float32)
    W_U = rng.standard_normal((len(vocabulary), d_in)).astype(np.float32) if lens else None
    ordinary = ~np.isin(tokens, special)
    z = (z * ordinary[..., None]).reshape(-1, n_features).astype(np.float32)
    found = facts_of(z, tokens, ordinary, vocabulary)
    columns = activity(z, tokens, ordinary) | weights(W_enc, W_dec, W_U)
    found |= {f"table.{name}": column for name, column in columns.items()}
    sizes = {
        "rows": n_rows,
        "context": context,
        "n_features": n_features,
        "entries": len(found["by_feature.places"]),
        "vocabulary": len(vocabulary),
        "vocabulary_bytes": len(found["vocabulary.bytes"]),
        "pairs": len(found["by_vocabulary.features"]),
    }
    folder.mkdir(parents=True)
    files = {}
    for name, (dtype, shape) in arrays(sizes).items():
        array = np.ascontiguousarray(found[name], dtype).reshape(shape)
        np.save(folder / f"{name}.npy", array)
        content = (folder / f"{name}.npy").read_bytes()
        files[f"{name}.npy"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "inputs": "0" * 64,
        **sizes,
        "n_tokens": int(ordinary.sum()),
        "never_active": int((z.max(0) == 0).sum()),
        "k": 8,
        "site": "blocks.2.hook_resid_post",
        "model": "demo",
        "d_in": d_in,
        "lens": "norm folded in" if lens else None,
        **facts,
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def facts_of(z: np.ndarray, tokens: np.ndarray, ordinary: np.ndarray, vocabulary: list[bytes]) -> dict[str, np.ndarray]:
    """The arrays of `layout.FACTS`; z is ``[places, n_features]``."""
    maxima = z.max(0)
    with np.errstate(invalid="ignore"):
        share = np.maximum(z / maxima, SMALLEST_VALUE).astype(np.float16)
    features, places = (z > 0).T.nonzero()
    by_token = (z > 0).nonzero()
    ids = tokens.flatten()
    mass = np.zeros((len(vocabulary), z.shape[1]))
    np.add.at(mass, ids, z.astype(np.float64))
    of_token = mass.nonzero()
    lengths = [len(token) for token in vocabulary]

    def offsets(counts: np.ndarray) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(counts)])

    return {
        "tokens": tokens,
        "by_feature.offsets": offsets((z > 0).sum(0)),
        "by_feature.places": places,
        "by_feature.values": share[places, features],
        "by_feature.maxima": maxima,
        "by_token.offsets": offsets((z > 0).sum(1)),
        "by_token.features": by_token[1],
        "by_token.values": share[by_token],
        "vocabulary.offsets": offsets(np.array(lengths)),
        "vocabulary.bytes": np.frombuffer(b"".join(vocabulary), np.uint8),
        "vocabulary.counts": np.bincount(ids[ordinary.flatten()], minlength=len(vocabulary)),
        "by_vocabulary.offsets": offsets((mass > 0).sum(1)),
        "by_vocabulary.features": of_token[1],
        "by_vocabulary.mass": mass[of_token],
    }


def activity(z: np.ndarray, tokens: np.ndarray, ordinary: np.ndarray) -> dict[str, np.ndarray]:
    """The columns of `layout.ACTIVITY`, feature by feature."""
    context, ids, keep = tokens.shape[1], tokens.flatten(), ordinary.flatten()
    n, n_features = int(keep.sum()), z.shape[1]
    table = _empty("ACTIVITY", n_features)
    active = (z > 0).astype(np.float64)
    counts = active.sum(0)
    together = active.T @ active
    both = np.sqrt(np.outer(counts * (n - counts), counts * (n - counts)))
    with np.errstate(invalid="ignore", divide="ignore"):
        phi = np.where(both > 0, (n * together - np.outer(counts, counts)) / both, 0)
        jaccard = together / (counts[:, None] + counts[None] - together)
    np.fill_diagonal(phi, 0)
    for f in range(n_features):
        a = z[keep, f].astype(np.float64)
        places = z[:, f].nonzero()[0]
        table["n_active"][f] = len(places)
        table["mass"][f] = a.sum()
        table["mean_square"][f] = (a**2).mean()
        centred = a - a.mean()
        if a.std() > 0:
            table["skew"][f] = (centred**3).mean() / a.std() ** 3
            table["kurtosis"][f] = (centred**4).mean() / a.std() ** 4
        if not len(places):
            continue
        table["quantiles"][f] = np.quantile(z[places, f], QUANTILES, method="inverted_cdf")
        bins = np.minimum((z[places, f] / z[:, f].max() * BINS).astype(int), BINS - 1)
        table["histogram"][f] = np.bincount(bins, minlength=BINS)
        table["first_place"][f], table["last_place"][f] = places[0], places[-1]
        mass = np.zeros(ids.max() + 1)
        np.add.at(mass, ids[places], z[places, f].astype(np.float64))
        shares = mass[mass > 0] / mass.sum()
        table["token_entropy"][f] = -(shares * np.log2(shares)).sum()
        top = [t for t in np.argsort(-mass, kind="stable")[:TOP_TOKENS] if mass[t] > 0]
        table["top_tokens"][f, : len(top)] = top
        table["top_token_shares"][f, : len(top)] = mass[top] / mass.sum()
        best: dict[int, int] = {}  # the strongest place of each row
        for place in places[np.argsort(-z[places, f], kind="stable")]:
            best.setdefault(int(place) // context, int(place))
        chosen = list(best.values())[:TOP_PLACES]
        table["top_places"][f, : len(chosen)] = chosen
        near = [g for g in np.argsort(-phi[f], kind="stable")[:LIST_LENGTH] if phi[f, g] > 0]
        table["coactive_neighbours"][f, : len(near)] = near
        table["coactive_phi"][f, : len(near)] = phi[f, near]
        table["coactive_jaccard"][f, : len(near)] = jaccard[f, near]
    return table


def weights(W_enc: np.ndarray, W_dec: np.ndarray, W_U: np.ndarray | None) -> dict[str, np.ndarray]:
    """The columns of `layout.WEIGHTS`; rows of W_enc and W_dec are features, rows of W_U ``[vocabulary, d]`` tokens.

    The final norm's gain is folded into W_U.
    """
    n_features = len(W_dec)
    table = _empty("WEIGHTS", n_features)
    table["encoder_norm"], table["decoder_norm"] = (np.linalg.norm(W, axis=1) for W in (W_enc, W_dec))
    unit_enc, unit_dec = (W / np.maximum(np.linalg.norm(W, axis=1, keepdims=True), 1e-12) for W in (W_enc, W_dec))
    table["encoder_decoder_cosine"] = (unit_enc * unit_dec).sum(1)
    for kind, unit in (("encoder", unit_enc), ("decoder", unit_dec)):
        cosines = unit @ unit.T
        np.fill_diagonal(cosines, -np.inf)
        near = np.argsort(-cosines, axis=1, kind="stable")[:, : min(LIST_LENGTH, n_features - 1)]
        table[f"{kind}_neighbours"][:, : near.shape[1]] = near
        table[f"{kind}_cosines"][:, : near.shape[1]] = np.take_along_axis(cosines, near, 1)
    neurons = np.argsort(-np.abs(W_dec), axis=1, kind="stable")[:, :NEURONS]
    n, largest = neurons.shape[1], np.take_along_axis(W_dec, neurons, 1)
    table["neurons"][:, :n], table["neuron_weights"][:, :n] = neurons, largest
    table["neuron_shares"][:, :n] = np.abs(largest) / np.maximum(np.abs(W_dec).sum(1, keepdims=True), 1e-12)
    if W_U is not None:
        logits = W_dec @ W_U.T
        for end, order in (("top", -logits), ("bottom", logits)):
            best = np.argsort(order, axis=1, kind="stable")[:, :LIST_LENGTH]
            table[f"{end}_logit_tokens"][:, : best.shape[1]] = best
            table[f"{end}_logits"][:, : best.shape[1]] = np.take_along_axis(logits, best, 1)
        table["logit_range"] = np.stack([logits.min(1), logits.max(1)], 1)
        for f in range(n_features):
            table["logit_histogram"][f] = np.histogram(logits[f], LOGIT_BINS, tuple(table["logit_range"][f]))[0]
    centred = unit_dec - unit_dec.mean(0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:2]
    axes *= np.sign(np.take_along_axis(axes, np.abs(axes).argmax(1)[:, None], 1))
    table["decoder_map"][:, : len(axes)] = centred @ axes.T
    return table


def _empty(of: str, n_features: int) -> dict[str, np.ndarray]:
    """Columns of zeros; lists of features, tokens, places and neurons are empty (-1)."""
    from saelab.features import layout

    table = {}
    for name, (dtype, *width) in getattr(layout, of).items():
        ids = dtype == "<i4" and not name.endswith("histogram")
        table[name] = np.full((n_features, *width), -1 if ids else 0, dtype)
    assert set(table) <= set(COLUMNS)
    return table


def made_up(n_rows: int, context: int, n_features: int, vocabulary: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Activations ``[rows, context, n_features]`` with Zipf densities, of which feature 7 is never active, and tokens.

    Most of a feature's activations lie on a few token ids of its own. Each row begins with the special token 0.
    """
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, vocabulary, (n_rows, context))
    tokens[:, 0] = 0
    density = 0.5 / (1 + np.arange(n_features)) ** 0.7
    own = rng.random((vocabulary, n_features)) < 3 / vocabulary
    chance = np.clip(density * (0.3 + 20 * own[tokens]), 0, 0.9)
    z = rng.exponential(1.0, chance.shape) * (rng.random(chance.shape) < chance) * rng.uniform(2, 12, n_features)
    z[..., min(7, n_features - 1)] = 0
    return z.astype(np.float32), tokens
