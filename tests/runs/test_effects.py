"""Effects of one feature at contexts from its database are those that the analysis of the same text finds."""

from pathlib import Path

import numpy as np
import pytest
import torch

from saelab.analysis.settings import SteeringSettings
from saelab.analysis.steering_effects import steering_effects
from saelab.errors import SaelabError
from saelab.features.database import Database, open_database
from saelab.features.token_bytes import token_bytes
from saelab.runs.effects import effects_of, tokens_in_passes
from saelab.runs.live import Live, open_live
from tests.features.dense import write_database
from tests.tiny import random_rows

SETTINGS = SteeringSettings(contexts=3)


@pytest.fixture(scope="module")
def live(trained_run: Path) -> Live:
    return open_live(trained_run)


@pytest.fixture(scope="module")
def rows(live: Live) -> torch.Tensor:
    return random_rows(live.lm, 24, 16)


def made(live: Live, rows: torch.Tensor, folder: Path, without: tuple[int, ...] = ()) -> Database:
    """A database of the run's features on `rows`, except those `without`, which are never active in it."""
    texts = [live.encode(row) for row in rows.tolist()]
    z = np.stack([np.stack([text.of(f) for f in range(64)], 1) for text in texts])
    z[..., list(without)] = 0
    vocabulary = token_bytes(live.lm.tokenizer, live.lm.embeddings)
    special = tuple(live.lm.special_ids.tolist())
    return open_database(write_database(folder / "features", z, rows.numpy(), vocabulary, special=special))


def test_contexts_and_effects_are_those_of_the_analysis(live: Live, rows: torch.Tensor, tmp_path: Path) -> None:
    database, scored = made(live, rows, tmp_path), live.lm.scored(rows).numpy()
    whole = steering_effects(live.sae, live.lm, rows, live.site, SETTINGS)
    for i, feature in list(enumerate(whole.features.tolist()))[:4]:
        found = effects_of(live, database, feature, SETTINGS)
        assert found.features.tolist() == [feature] and found.contexts == 3
        assert found.row[0, 0].tolist() == whole.row[i, 0].tolist()
        assert found.position[0, 0].tolist() == whole.position[i, 0].tolist()
        assert found.share[0] == pytest.approx(whole.share[i], rel=1e-3)
        for name in ("kl", "logits", "next_token", "changed"):  # clamp and ablate do not depend on the mean norm
            assert getattr(found, name)[0, 0, 1:, 0] == pytest.approx(
                getattr(whole, name)[i, 0, 1:, 0], rel=0.01, abs=1e-5
            )
        scored = live.lm.scored(rows).numpy()
        assert (
            scored[found.row[0], found.position[0]].all() and len(set(found.row[0, 1] * 16 + found.position[0, 1])) == 3
        )
    assert tokens_in_passes(database, SETTINGS) == (2 * 3 * 7 + 32) * 16


def test_a_rarely_active_feature_has_fewer_contexts_or_none(live: Live, rows: torch.Tensor, tmp_path: Path) -> None:
    database = made(live, rows[:5], tmp_path, without=(9,))
    with pytest.raises(SaelabError, match="feature 9 is active on no token"):
        effects_of(live, database, 9)
    feature = int(database.table["n_active"].argmax())
    assert 1 < effects_of(live, database, feature).contexts <= 5 < SteeringSettings().contexts
