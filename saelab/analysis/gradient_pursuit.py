"""Gradient pursuit: codes of a fixed dictionary found by optimisation instead of by the encoder ("inference-time
optimisation", papers 2410.14670 and Blumensath and Davies 2008).

For y = x - b_dec, dictionary rows D and a number of steps for each token, from w = 0:

    r = y - w D        c = D r        S = {w > 0} and the largest c
    g = c on S, else 0        v = g D        w = max(0, w + (v r) / (v v) g)

Every step adds at most one feature, so a token has at most as many as it has steps. A feature that is clipped to 0
leaves S, and may come back. Cost: for each step one product ``[tokens, d] x [d, n_features]``, as many as the code has
entries; an encoder needs one in all.
"""

import torch
from torch import Tensor

from saelab.codes import Codes, concatenate
from saelab.kernels import spmm

_ENTRIES = 1 << 23
"""Correlations in memory at once."""


@torch.no_grad()
def gradient_pursuit(y: Tensor, dictionary: Tensor, steps: Tensor) -> Codes:
    """Non-negative codes of y ``[tokens, d]``, by rows of the dictionary ``[n_features, d]``.

    `steps` ``[tokens]`` int64 is the largest number of active features of each token. Memory: 32 MiB for correlations
    and ``tokens * max(steps)`` entries of 12 bytes.
    """
    size = max(1, _ENTRIES // len(dictionary))
    return concatenate([_pursue(*part, dictionary) for part in zip(y.split(size), steps.split(size), strict=True)])


def _pursue(y: Tensor, steps: Tensor, dictionary: Tensor) -> Codes:
    """The same for a few tokens. Slot i of a token has the feature that step i added; a feature that was clipped
    and comes back gets a new slot."""
    n_features, slots = len(dictionary), int(steps.max()) if len(steps) else 0
    w = y.new_zeros(len(y), slots)
    features = torch.zeros(len(y), slots, dtype=torch.long, device=y.device)

    def decoded(values: Tensor) -> Tensor:
        return spmm(Codes.from_topk(values, features, n_features), dictionary)

    for step in range(slots):
        r = y - decoded(w)
        c = r @ dictionary.T
        best = c.argmax(1)
        new = ~((features == best[:, None]) & (w > 0)).any(1)
        features[:, step] = torch.where(new, best, features[:, step])
        chosen = w > 0
        chosen[:, step] = new
        g = torch.where(chosen, c.gather(1, features), 0.0)
        v = decoded(g)
        length = (v * r).sum(1) / v.square().sum(1).clamp_min(1e-30)
        moved = (w + length[:, None] * g).clamp_min(0)
        w = torch.where((step < steps)[:, None], moved, w)
    return Codes.from_topk(w, features, n_features).compact()
