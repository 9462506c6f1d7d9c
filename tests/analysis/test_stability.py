"""Stability across seeds: features that are in every run are found, and the others are not."""

import json

import numpy as np
import pytest

from saelab.analysis.matching import assign_decoders
from saelab.analysis.result import rebuilt, stored, with_arrays
from saelab.analysis.stability import Stability, stability
from saelab.errors import SaelabError


def decoders() -> list[np.ndarray]:
    """Three runs of 60, 60 and 80 features: 25 are in all of them, 10 more in the first two, the others in one."""
    rng = np.random.default_rng(0)
    common, two = rng.standard_normal((25, 40)), rng.standard_normal((10, 40))
    parts = [[common, two, 25], [common, two, 25], [common, 55]]
    found = []
    for *shared, alone in parts:
        rows = np.concatenate([*shared, rng.standard_normal((alone, 40))])
        found.append(rows + 0.15 * rng.standard_normal(rows.shape))
    return found


def test_features_of_every_run_are_found_whatever_their_order():
    runs = decoders()
    order = np.random.default_rng(1).permutation(60)
    found = stability([runs[0], runs[1][order], runs[2]], threshold=0.8)
    assert found.counterparts[0].tolist() == [2] * 25 + [1] * 10 + [0] * 25
    assert found.counterparts[1].tolist() == found.counterparts[0][order].tolist()
    assert found.counterparts[2].tolist() == [2] * 25 + [0] * 55
    assert [(p.first, p.second, p.share) for p in found.pairs] == [(0, 1, 35 / 60), (0, 2, 25 / 60), (1, 2, 25 / 60)]
    assert found.pairs[1].mean_cosine == pytest.approx(assign_decoders(runs[0], runs[2]).mean_cosine)
    figures = found.figures()
    assert figures["share with one in every other run"] == pytest.approx((25 / 60 + 25 / 60 + 25 / 80) / 3)
    assert figures["share with a counterpart, by chance"] == 0 and figures["runs"] == 3
    for pair in found.pairs:
        assert 0.2 < pair.mean_cosine_by_chance < pair.mean_cosine - 0.1
    assert len(found.to_pairs()) == 3 and len(found.plot().data) == 3
    figures, arrays = stored(found)
    again = rebuilt(Stability, with_arrays(json.loads(json.dumps(figures)), arrays))
    assert again.pairs == found.pairs and repr(again) == repr(found)


def test_seeds_that_share_nothing_are_at_chance():
    rng = np.random.default_rng(3)
    figures = stability([rng.standard_normal((150, 30)) for _ in range(2)], threshold=0.5).figures()
    for name, near in (("mean cosine of one-to-one pairs", 0.02), ("share with a counterpart", 0.08)):
        assert figures[name] == pytest.approx(figures[f"{name}, by chance"], abs=near)
    assert 0 < figures["share with a counterpart"] < 0.6


def test_a_single_run_is_refused():
    with pytest.raises(SaelabError, match="at least two"):
        stability([np.eye(3)])
