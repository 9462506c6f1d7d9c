"""The columns of the table that follow from the weights, without any text (`layout.WEIGHTS`).

Cosines and logits are computed tile by tile, so memory does not grow with n_features squared or with n_features x
vocabulary (`weight_bytes`). Numbers are float32 whatever the precision of the weights; covariances are float64.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from saelab.features.layout import LIST_LENGTH, LOGIT_BINS, NEURONS, WEIGHTS
from saelab.lm.lens import Lens
from saelab.sae.model import SparseAutoencoder
from saelab.sae.side_by_side import comparable_rows

_ROWS = 1024
"""Most features whose columns are computed at once."""
_CELLS = 2**25
"""Most cosines or logits in a tile, and most weights in a float32 copy of some rows: 134 MB."""


def weight_bytes(n_features: int, d_in: int, vocabulary: int) -> int:
    """Most bytes that `weight_columns` needs beside the weights, on the autoencoder's device."""
    rows, cells = _rows(d_in, vocabulary), min(_CELLS, n_features * max(n_features, d_in, vocabulary))
    # tile, sorted or copied parts of it; copies of rows; covariance, its eigenvectors and what finding them needs
    return max(12 * cells + 16 * rows * d_in, 40 * d_in**2) + 64 * n_features


@torch.no_grad()
def weight_columns(sae: SparseAutoencoder, lens: Lens | None) -> Iterator[dict[str, np.ndarray]]:
    """Yields the columns of consecutive features, feature 0 first.

    `lens` is the `direct_lens` of the site that the autoencoder reconstructs. Without it, or if it is of another width,
    columns of logits are empty. `encoder_decoder_cosine` is 0 if d_in and d_out differ. Rows of a crosscoder are those
    of training (`comparable_rows`).
    """
    if lens is not None and lens.width != sae.d_out:
        lens = None
    rows = _rows(max(sae.d_in, sae.d_out), 0 if lens is None else len(lens.unembedding))
    matrices = dict(zip(("encoder", "decoder"), comparable_rows(sae), strict=True))
    norms = {of: _norms(W, rows) for of, W in matrices.items()}
    mean, axes = _principal_axes(matrices["decoder"], norms["decoder"], rows)
    for first in range(0, sae.n_features, rows):
        block = slice(first, first + rows)
        units, columns = {of: _units(W[block], norms[of][block]) for of, W in matrices.items()}, {}
        for of, W in matrices.items():
            columns[f"{of}_norm"] = norms[of][block]
            columns[f"{of}_cosines"], columns[f"{of}_neighbours"] = _nearest(units[of], W, norms[of], first)
        if sae.d_in == sae.d_out:
            columns["encoder_decoder_cosine"] = (units["encoder"] * units["decoder"]).sum(1)
        decoder = matrices["decoder"][block].float()
        columns |= _neurons(decoder)
        columns |= {} if lens is None else _logits(lens, decoder)
        columns["decoder_map"] = (units["decoder"].double() - mean) @ axes
        yield {name: _column(name, columns.get(name), len(decoder)) for name in WEIGHTS}


def _rows(width: int, vocabulary: int) -> int:
    return max(1, min(_ROWS, _CELLS // max(width, vocabulary)))


def _norms(W: Tensor, rows: int) -> Tensor:
    """L2 norms of the rows of W; `rows` of them are copied at once."""
    return torch.cat([torch.linalg.vector_norm(part.float(), dim=1) for part in W.split(rows)])


def _units(rows: Tensor, norms: Tensor) -> Tensor:
    """Rows over their norms; rows that are 0 stay 0."""
    return rows.float() / norms.clamp_min(1e-12)[:, None]


def _nearest(unit: Tensor, W: Tensor, norms: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Cosines of normalised rows of W, from row `first` on, with their nearest other rows, and the numbers of these."""
    n = min(LIST_LENGTH, len(W) - 1)
    own = torch.arange(len(unit), device=W.device)
    cosines, found = unit.new_empty(len(unit), 0), own.new_empty(len(unit), 0)
    columns = max(1, _CELLS // max(len(unit), W.shape[1]))
    for start in range(0, len(W), columns):
        tile = unit @ _units(W[start : start + columns], norms[start : start + columns]).T
        here = (first + own >= start) & (first + own < start + columns)
        tile[own[here], first + own[here] - start] = -torch.inf
        values, numbers = _extreme(tile, n, largest=True)
        # earlier tiles come first, so of equal cosines the lower number stays first
        cosines, order = _extreme(torch.cat([cosines, values], 1), n, largest=True)
        found = torch.cat([found, numbers + start], 1).gather(1, order)
    return cosines, found


def _neurons(decoder: Tensor) -> dict[str, Tensor]:
    sizes, neurons = _extreme(decoder.abs(), NEURONS, largest=True)
    total = decoder.abs().sum(1, keepdim=True)
    weights = decoder.gather(1, neurons)
    return {"neurons": neurons, "neuron_weights": weights, "neuron_shares": (sizes / total).nan_to_num(0)}


def _logits(lens: Lens, decoder: Tensor) -> dict[str, Tensor]:
    at_head = lens.at_head(decoder.to(lens.gain.device))
    vocabulary, width = lens.unembedding.shape
    logits = at_head.new_empty(len(at_head), vocabulary)
    start = 0
    for rows in lens.unembedding.split(_CELLS // 16 // width + 1):
        logits[:, start : start + len(rows)] = at_head @ rows.float().T
        start += len(rows)
    top, top_tokens = _extreme(logits, LIST_LENGTH, largest=True)
    bottom, bottom_tokens = _extreme(logits, LIST_LENGTH, largest=False)
    return {
        "top_logits": top,
        "top_logit_tokens": top_tokens,
        "bottom_logits": bottom,
        "bottom_logit_tokens": bottom_tokens,
        "logit_range": torch.stack([bottom[:, 0], top[:, 0]], 1),
        "logit_histogram": torch.stack([torch.histc(row, LOGIT_BINS) for row in logits]),
    }


def _extreme(values: Tensor, n: int, *, largest: bool) -> tuple[Tensor, Tensor]:
    """The n largest or smallest values of each row, fewer if there are fewer, and their columns.

    The most extreme comes first; of equal ones, the lowest column.
    """
    found, columns = values.topk(min(n + 1, values.shape[1]), dim=1, largest=largest)
    tied = (found[:, 1:] == found[:, :-1]).any(1).nonzero().squeeze(1)  # topk gives equal values in any order
    for rows in tied.split(_CELLS // 8 // (values.shape[1] + 1) + 1):
        ordered, order = values[rows].sort(dim=1, descending=largest, stable=True)
        found[rows], columns[rows] = ordered[:, : found.shape[1]], order[:, : found.shape[1]]
    return found[:, :n], columns[:, :n]


def _principal_axes(W: Tensor, norms: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The mean of the normalised rows of W, ``[d]``, and their first two principal axes, ``[d, 2]``; float64.

    The largest loading of each axis is positive. In one dimension there is one axis.
    """
    d = W.shape[1]
    total, products = W.new_zeros(d, dtype=torch.float64), W.new_zeros(d, d, dtype=torch.float64)
    for start in range(0, len(W), rows):
        unit = _units(W[start : start + rows], norms[start : start + rows]).double()
        total += unit.sum(0)
        products.addmm_(unit.T, unit)
    mean = total / len(W)
    axes = torch.linalg.eigh(products.div_(len(W)).addr_(mean, mean, alpha=-1)).eigenvectors[:, -2:].flip(1)
    return mean, axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()


def _column(name: str, values: Tensor | None, n: int) -> np.ndarray:
    """A column in the dtype and width of `layout.WEIGHTS`; without a value it is -1 in lists of ids, else 0."""
    dtype, *width = WEIGHTS[name]
    of_ids = dtype == "<i4" and not name.endswith("histogram")
    column = np.full((n, *width), -1 if of_ids else 0, dtype)
    if values is not None:
        found = values.cpu().numpy()
        column[(slice(None), *map(slice, found.shape[1:]))] = found
    return column
