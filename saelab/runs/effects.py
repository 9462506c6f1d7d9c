"""What steering one feature does, at contexts that a feature database knows: no pass over the text finds them.

    effects_of(open_live(run), open_database(run / "features"), feature=7)

The figures are those of `saelab.analysis.steering_effects`, except that the mean norm, of which `add` adds a share, is
taken over the rows of the random contexts and some more. Importing this file imports no torch.
"""

import numpy as np

from saelab.analysis.settings import SteeringSettings
from saelab.analysis.steering_report import PASSES, SteeringEffects
from saelab.errors import SaelabError
from saelab.features.database import Database
from saelab.runs.live import Live

RANDOM_ROWS = 32
"""Rows from which random contexts are drawn."""


def tokens_in_passes(database: Database, settings: SteeringSettings = SteeringSettings()) -> int:  # noqa: B008 (frozen)
    """Tokens that the model runs on for the effects of a feature, most of them above the site only."""
    return (2 * settings.contexts * PASSES + RANDOM_ROWS) * database.facts.rows.shape[1]


def effects_of(
    live: Live,
    database: Database,
    feature: int,
    settings: SteeringSettings = SteeringSettings(),  # noqa: B008 (frozen)
    seed: int = 0,
) -> SteeringEffects:
    """The effects of steering a feature of a run, at its strongest tokens in the database's text and at random ones.

    With fewer rows in which it is active than `settings.contexts`, fewer contexts. Raises SaelabError if there is none.
    """
    import torch

    from saelab.analysis.steering_effects import Chosen, effects_at

    rows, active = np.array(database.facts.rows), database.facts.activations(feature)
    width, numbers = rows.shape[1], np.random.default_rng(seed)

    def steerable(places: np.ndarray) -> np.ndarray:
        """Whether the token at each place and the next one are ordinary."""
        found, inverse = np.unique(places // width, return_inverse=True)
        return live.lm.scored(torch.from_numpy(rows[found]).long()).cpu().numpy()[inverse, places % width]

    known = steerable(active.places) if len(active.places) else np.zeros(0, bool)
    places, values = active.places[known].astype(np.int64), active.values[known]
    order = np.lexsort((places, -values))
    _, first = np.unique(places[order] // width, return_index=True)
    own = places[order][np.sort(first)][: settings.contexts]
    drawn = np.sort(numbers.permutation(len(rows))[:RANDOM_ROWS])
    everywhere = (drawn[:, None] * width + np.arange(width)).ravel()
    everywhere = everywhere[steerable(everywhere)]
    if not len(own) or len(everywhere) < len(own):
        raise SaelabError(f"feature {feature} is active on no token of this text that is followed by an ordinary one")
    random = numbers.choice(everywhere, len(own), replace=False)
    mass = database.table["mass"]
    with live.lock, torch.no_grad():
        text = torch.from_numpy(rows[drawn]).to(live.lm.device).long()
        x = live.lm.activations(text, [live.site])[live.site][live.lm.ordinary(text)]
        chosen = Chosen(
            features=[feature],
            places=np.stack([own, random])[None],
            largest=database.facts.maxima[[feature]],
            share=mass[[feature]] / mass.sum(),
            tokens=database.n_tokens,
            norm=float(x.float().norm(dim=1).mean()),
        )
        return effects_at(live.sae, live.lm, torch.from_numpy(rows), live.site, chosen, settings, seed=seed)
