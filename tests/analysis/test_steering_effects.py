"""Effects of steering: at exactly the tokens that are reported, by exactly the change that is asked for, as by hand."""

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from saelab.analysis.result import rebuilt, stored, with_arrays
from saelab.analysis.settings import Intervention, SteeringSettings
from saelab.analysis.steering import steered
from saelab.analysis.steering_effects import steerable_features, steering_effects
from saelab.analysis.steering_report import CONTEXTS, MODES, SteeringEffects
from saelab.errors import SaelabError
from saelab.lm.model import LanguageModel
from saelab.sae.model import SparseAutoencoder
from tests.analysis.test_steering import SITES, autoencoder
from tests.tiny import KINDS, language_model, random_rows

SITE, ROWS = SITES[0], 12
SETTINGS = SteeringSettings(rows_per_forward=5, contexts=3, features=4, targets=5)


def activations(lm: LanguageModel, sae: SparseAutoencoder, rows: Tensor, site: str) -> tuple[Tensor, Tensor]:
    """x ``[rows, context, d_in]`` and dense codes, 0 at special tokens."""
    x = lm.activations(rows, [site])[site].float()
    z = sae.encode(x).to_dense().view(*rows.shape, -1)
    return x, z * lm.ordinary(rows)[..., None]


def spliced(lm: LanguageModel, row: Tensor, site: str, position: int, new: Tensor) -> Tensor:
    """Logits ``[context, vocabulary]`` of a row with the activation of one position replaced."""

    def replace(x: Tensor) -> Tensor:
        x = x.clone()
        x[int(lm.ordinary(row)[:position].sum())] = new
        return x

    return lm.spliced_logits(row[None], site, replace)[0].double()


@pytest.mark.parametrize(("kind", "site"), [*((kind, SITE) for kind in KINDS), ("gpt2", SITES[2])])
def test_effects_are_those_of_a_run_with_that_one_activation_changed(kind: str, site: str) -> None:
    lm, sae = language_model(kind), autoencoder(site)
    rows = random_rows(lm, ROWS)
    found = steering_effects(sae, lm, rows, site, SETTINGS)
    x, z = activations(lm, sae, rows, site)
    ordinary, scored = lm.ordinary(rows), lm.scored(rows)
    norm = x[ordinary].norm(dim=1).mean().item()
    assert len(set(found.features.tolist())) == 4 and found.tokens == ordinary.sum()
    assert found.share == pytest.approx((z.sum((0, 1)) / z.sum())[found.features].double().numpy(), rel=1e-5)
    for i, feature in list(enumerate(found.features.tolist()))[:2]:
        own = torch.where(scored, z[..., feature], 0.0)
        best = own.amax(1).argsort(dim=0, descending=True, stable=True)[:3]
        assert found.row[i, 0].tolist() == best.tolist()
        assert found.position[i, 0].tolist() == own.argmax(1)[best].tolist()
        values = {"add": 0.5 * norm / sae.W_dec[feature].norm().item(), "clamp": z[..., feature].max().item()}
        for (c, _), (m, mode) in ((c, m) for c in enumerate(CONTEXTS) for m in enumerate(MODES)):
            kl, logits, next_token, changed, length = [], [], [], [], []
            for r, p in zip(found.row[i, c].tolist(), found.position[i, c].tolist(), strict=True):
                assert scored[r, p]
                new = steered(sae, x[r, p][None], [Intervention(feature, mode, values.get(mode, 0.0))])[0]
                clean, other = lm.logits(rows[r : r + 1])[0, p].double(), spliced(lm, rows[r], site, p, new)[p]
                p_clean, p_other = clean.log_softmax(0), other.log_softmax(0)
                kl.append((p_clean.exp() * (p_clean - p_other)).sum().item())
                logits.append((other - clean).std(correction=0).item())
                next_token.append((p_other - p_clean)[rows[r, p + 1]].item())
                changed.append(float(clean.argmax() != other.argmax()))
                length.append((new - x[r, p]).norm().item())
            for name, values_ in (("kl", kl), ("logits", logits), ("next_token", next_token), ("changed", changed)):
                assert getattr(found, name)[i, c, m, 0] == pytest.approx(np.mean(values_), rel=2e-3, abs=1e-5), name
            assert found.length[i, c, m] == pytest.approx(np.mean(length), rel=1e-3, abs=1e-5)
        assert found.length[i, :, 0] == pytest.approx(0.5 * norm, rel=1e-3)
        assert found.length[i, 0, 2] > 0 and found.kl[i, 0, 2, 0] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_steered_positions_are_the_positions_that_are_reported(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the model reads at the site differs from the clean run at the reported tokens and nowhere else."""
    lm, sae = language_model(kind), autoencoder()
    rows = random_rows(lm, ROWS)
    seen: list[tuple[list[list[int]], list[float]]] = []
    original = lm.spliced_logits

    def recorded(text: Tensor, site: str, replace, **options: bool) -> Tensor:
        clean = lm.activations(text, [site])[site]
        new, keep = clean.clone(), lm.ordinary(text)
        new[keep] = replace(clean[keep])
        where = (new != clean).any(-1).nonzero().tolist()
        seen.append((where, (new - clean).norm(dim=-1).amax(1).tolist()))
        return original(text, site, lambda value: new[keep], **options)

    with monkeypatch.context() as patch:
        patch.setattr("saelab.lm.splice.SplicedRuns.shared", lambda self, rows: False)
        patch.setattr(lm, "spliced_logits", recorded)
        found = steering_effects(sae, lm, rows, SITE, SETTINGS)
    runs = iter(seen)
    assert len(seen) == 4 * 2 * 6
    for i in range(4):
        for c in range(2):
            places = [[n, p] for n, p in enumerate(found.position[i, c].tolist())]
            for mode in MODES:
                (where, lengths), (random_where, random_lengths) = next(runs), next(runs)
                if mode == "add" or (mode == "ablate" and c == 0):
                    assert where == random_where == places
                else:  # a feature that has its value already changes nothing
                    assert all(place in places for place in where + random_where)
                assert lengths == pytest.approx(random_lengths, rel=1e-3, abs=1e-5)


def test_steerable_features_are_active_in_enough_rows() -> None:
    lm, sae = language_model("gpt2"), autoencoder(SITE)
    rows = random_rows(lm, ROWS)
    _, z = activations(lm, sae, rows, SITE)
    rows_active = ((z > 0) & lm.scored(rows)[..., None]).any(1).sum(0)
    few = SteeringSettings(rows_per_forward=5, contexts=7)
    found = steerable_features(sae, lm, rows, SITE, few)
    assert found.tolist() == (rows_active >= 7).nonzero().squeeze(1).tolist() and 0 < len(found) < sae.n_features


def test_a_feature_that_is_strongest_at_the_end_of_a_row_is_steered_before_it() -> None:
    """The last token of a row, and one before a special token, have no next token to predict."""
    lm, sae = language_model("gpt2"), autoencoder()
    rows, one = random_rows(lm, ROWS), SteeringSettings(contexts=1, features=1)
    whole = steering_effects(sae, lm, rows, SITE, one)
    feature, (row, end) = int(whole.features[0]), (int(each[0, 0, 0]) for each in (whole.row, whole.position))
    rows = rows[:, : end + 1]  # the strongest token of all is now the last of its row
    _, z = activations(lm, sae, rows, SITE)
    own = torch.where(lm.scored(rows), z[..., feature], 0.0)
    assert z[row, end, feature] == z[..., feature].max() > own.max() > 0
    found = steering_effects(sae, lm, rows, SITE, one, features=[feature])
    place = int(found.row[0, 0, 0]), int(found.position[0, 0, 0])
    assert own[place] == own.max() and place != (row, end)


def test_the_score_is_the_rise_at_random_contexts_of_tokens_that_rise_at_own_ones() -> None:
    lm, sae = language_model("llama"), autoencoder()
    rows = random_rows(lm, ROWS)
    found = steering_effects(sae, lm, rows, SITE, SETTINGS, features=[7, 2])
    assert found.features.tolist() == [7, 2]
    x, _ = activations(lm, sae, rows, SITE)
    norm = x[lm.ordinary(rows)].norm(dim=1).mean()
    for i, feature in enumerate((7, 2)):
        change = 0.5 * norm * sae.W_dec[feature] / sae.W_dec[feature].norm()
        rises = []
        for c in range(2):
            pairs = zip(found.row[i, c].tolist(), found.position[i, c].tolist(), strict=True)
            each = [
                (spliced(lm, rows[r], SITE, p, x[r, p] + change) - lm.logits(rows[r : r + 1])[0])[p] for r, p in pairs
            ]
            rises.append(torch.stack(each).mean(0))
        assert set(found.targets[i, 0].tolist()) == set(rises[0].topk(5).indices.tolist())
        score = rises[1][found.targets[i, 0]].mean() - rises[1].mean()
        assert found.score[i, 0] == pytest.approx(score.item(), rel=1e-2, abs=1e-4)


def test_a_feature_that_writes_one_token_has_the_largest_score_and_the_error_is_kept() -> None:
    lm, sae = language_model("llama"), autoencoder("blocks.2.hook_resid_post")
    site, rows = "blocks.2.hook_resid_post", random_rows(lm, ROWS)
    sae.W_dec[5] = 3 * lm.unembedding[44] / lm.unembedding[44].norm()
    found = steering_effects(sae, lm, rows, site, SETTINGS, features=[5])
    assert 44 in found.targets[0, 0] and found.score[0, 0] > found.score[0, 1] > -1
    assert found.kl[0, 1, 2, 0] < found.kl[0, 0, 2, 0]  # at random contexts it is mostly inactive
    same = SteeringSettings(rows_per_forward=5, contexts=3, scale=1e-9)
    assert steering_effects(sae, lm, rows, site, same, features=[5]).kl[0, :, 0] == pytest.approx(0, abs=1e-9)


def test_figures_frame_plot_and_storage() -> None:
    lm, sae = language_model("gpt2"), autoencoder()
    found = steering_effects(sae, lm, random_rows(lm, ROWS), SITE, SETTINGS, seed=1)
    figures, frame = found.figures(), found.by_feature()
    name = "KL of clamp, random contexts, random direction (nats)"
    assert figures[name].value == pytest.approx(found.kl[:, 1, 1, 1].mean())  # type: ignore[union-attr]
    part = frame[(frame["mode"] == "clamp") & (frame["contexts"] == "random") & (frame["direction"] != "feature")]
    assert part["kl"].tolist() == found.kl[:, 1, 1, 1].tolist() and part["feature"].tolist() == found.features.tolist()
    assert len(found.plot().data) == 2 and len(found.to_frame()) == len(figures)  # type: ignore[arg-type]
    shares, effects = found.share.argsort().argsort(), found.logits[:, 0, 2, 0].argsort().argsort()
    assert found.share_against_effect().value == pytest.approx(np.corrcoef(shares, effects)[0, 1])
    values, arrays = stored(found)
    again = rebuilt(SteeringEffects, with_arrays(json.loads(json.dumps(values)), arrays))
    assert repr(again) == repr(found) and (again.kl == found.kl).all()
    same = steering_effects(sae, lm, random_rows(lm, ROWS), SITE, SETTINGS, seed=1)
    assert (same.position == found.position).all() and (same.score == found.score).all()


def test_what_cannot_be_steered_is_said() -> None:
    lm, sae = language_model("gpt2"), autoencoder()
    rows = random_rows(lm, 2)
    with pytest.raises(SaelabError, match="feature 99 is not active in 3 rows"):
        steering_effects(sae, lm, rows, SITE, SETTINGS, features=[99])
    with pytest.raises(SaelabError, match="no feature is active in 3 rows"):
        steering_effects(sae, lm, rows, SITE, SETTINGS)
    with pytest.raises(SaelabError, match="transcoder"):
        steering_effects(SparseAutoencoder(32, 8, 2, d_out=32), lm, rows, SITE)
    with pytest.raises(SaelabError, match="ordinary token followed by another"):
        steering_effects(sae, lm, torch.zeros(3, 8, dtype=torch.long), SITE)
