"""Who gets the budget: pure functions from pre-activations to the entries that stay.

token_choice is TopK (Gao et al. 2024, arXiv 2406.04093): every token keeps its k largest pre-activations.
"""

import torch
from torch import Tensor

from saelab.codes import Codes


def token_choice(pre: Tensor, k: int) -> Codes:
    """The k largest pre-activations of each token, those at or below zero with value 0.

    pre ``[tokens, n_features]`` -> codes with exactly k entries per token; a token with fewer than k positive
    pre-activations has entries of value 0, which count for nothing (`Codes.compact` drops them).
    """
    values, features = torch.topk(pre, k, dim=1, sorted=False)
    return Codes.from_topk(values.relu_(), features, pre.shape[1])
