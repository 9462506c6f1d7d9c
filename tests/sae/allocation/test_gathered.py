"""The choice among the candidates of several processes is the dense rule's on the whole matrix, ties included."""

import pytest
import torch
from torch import Tensor

from saelab.ranks import Axis, Ranks
from saelab.sae import initial
from saelab.sae.allocation.candidates import Entries
from saelab.sae.allocation.gathered import keep, own_rule, strongest
from saelab.sae.allocation.rules import FeatureChoice, MutualChoice, Rule, Threshold, TokenChoice
from saelab.sae.model import SparseAutoencoder
from tests.threads import run_threads

TOKENS, FEATURES = 11, 13
CAPACITIES = torch.tensor([0, 1, 2, 3, 4, 11, 1, 0, 5, 2, 1, 1, 2])
RULES = [
    TokenChoice(3),
    TokenChoice(12),
    MutualChoice(2),
    MutualChoice(13),
    FeatureChoice(CAPACITIES, int(CAPACITIES.sum())),
    Threshold(torch.tensor([2.0])),
]


def whole_numbers(seed: int) -> Tensor:
    """Scores of which many tie."""
    return torch.randint(-2, 5, (TOKENS, FEATURES), generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("data", "features"), [(3, 1), (1, 3), (2, 2)])
def test_the_choice_equals_the_dense_rule(rule: Rule, dtype: torch.dtype, data: int, features: int) -> None:
    scores = whole_numbers(data).to(dtype)

    def own_choice(ranks: Ranks) -> tuple[slice, slice, Tensor]:
        tokens, own = ranks.data.part(TOKENS), ranks.features.part(FEATURES)
        here = scores[tokens, own]
        token, feature = (here > 0).nonzero(as_tuple=True)
        kept = keep(own_rule(rule, own), Entries(token, feature, here[token, feature]), TOKENS, ranks)
        chosen = torch.zeros_like(here, dtype=torch.bool)
        chosen[token[kept], feature[kept]] = True
        return tokens, own, chosen

    found = torch.zeros(TOKENS, FEATURES, dtype=torch.bool)
    for tokens, own, chosen in run_threads(own_choice, data=data, features=features):
        found[tokens, own] = chosen
    assert torch.equal(found, rule.mask(scores))


def test_the_strongest_of_a_token_are_found_where_they_are() -> None:
    values = torch.randn(TOKENS, FEATURES, generator=torch.Generator().manual_seed(0))

    def own_choice(ranks: Ranks) -> Tensor:
        return strongest(values[:, ranks.features.part(FEATURES)], 4, ranks.features)

    parts = run_threads(own_choice, features=3)
    expected = torch.zeros_like(values, dtype=torch.bool).scatter_(1, values.topk(4).indices, True)
    assert torch.equal(torch.cat(parts, 1), expected)


@pytest.mark.parametrize("rows", [50, 5000])  # one draw, and two
def test_processes_draw_the_rows_that_one_process_would(rows: int) -> None:
    def drawn(axis: Axis) -> Tensor:
        sae = SparseAutoencoder(6, rows, 2, ranks=Ranks(features=axis))
        torch.manual_seed(0)
        initial._draw(sae, sae.W_dec.data)
        return sae.W_dec.data

    assert torch.equal(torch.cat([drawn(Axis(rank, 3)) for rank in range(3)]), drawn(Axis()))
