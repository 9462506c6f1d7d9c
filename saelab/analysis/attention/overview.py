"""The heads of a model and the features of one layer's attention output, over held-out text, in one pass.

What each head attends to (scores.py), the families of features by what they read (families.py), and whether a head's
features do one thing or several (polysemantic.py). A feature is alive if it is active on at least `ALIVE` tokens.
`agreement` is the share of living features whose head with the largest decoder share is also the one with the largest
share of direct attribution.

Memory: a layer's pattern of one forward pass, 8 bytes per candidate feature and token id, 28 bytes x `RESAMPLES` per
feature. Intervals are over rows.
"""

import numpy as np
import torch
from torch import Tensor

from saelab.analysis.attention.families import FamilyShares, families
from saelab.analysis.attention.heads import head_shares, top_features
from saelab.analysis.attention.polysemantic import Profiles, polysemanticity
from saelab.analysis.attention.prompt import check_heads
from saelab.analysis.attention.report import ALIVE, CHANCE, FAMILIES, ONE_TASK, TOP, Attention
from saelab.analysis.attention.scores import HeadScores
from saelab.analysis.intervals import Interval, between, draws
from saelab.analysis.settings import AttentionSettings
from saelab.errors import SaelabError
from saelab.lm.attention import Heads, read_heads, recorded_heads, site_of
from saelab.lm.model import LanguageModel
from saelab.progress import Track, silent
from saelab.sae.model import SparseAutoencoder

RESAMPLES = 200


@torch.no_grad()
def attention(
    sae: SparseAutoencoder,
    lm: LanguageModel,
    rows: Tensor,
    settings: AttentionSettings,
    site: str | None = None,
    *,
    seed: int = 0,
    track: Track = silent,
) -> Attention:
    """The heads of `lm` and the features of `sae` on `rows` ``[rows, context]``.

    `site` defaults to the one the autoencoder was trained at. One full pass of the model with eager attention. Raises
    SaelabError if the site is not ``blocks.N.attn.hook_z``, or if the model's attention cannot be taken apart.
    """
    layer = check_heads(sae, lm, site)
    site = site_of(layer)
    layers = sorted(n for n in range(lm.shape().layers) if site_of(n) in lm.sites)
    if rows.shape[1] < 2 or not bool(lm.ordinary(rows[:, 1:]).any()):
        raise SaelabError("attention: the rows have no token after their first that is not special")
    n_heads = read_heads(lm, rows[:1], [layer])[0][layer].n_heads
    drawn = draws(len(rows), RESAMPLES, np.random.default_rng(seed))
    scores = HeadScores.empty(len(rows), layers, n_heads)
    found = FamilyShares.empty(sae.n_features, n_heads, drawn, settings.per_feature)
    shares = head_shares(sae.W_dec, n_heads)
    candidates = top_features(shares, min(3 * TOP, sae.n_features)).cpu().numpy()
    profiles = Profiles(np.unique(candidates), sae.n_features, lm.embeddings)
    counts, tokens = np.zeros(sae.n_features, np.int64), 0

    def parts(start: int) -> int:
        return rows[start : start + settings.rows_per_forward].numel()

    lm.measure([site_of(layers[-1]), site])
    for start in track(iter(range(0, len(rows), settings.rows_per_forward)), "attention", rows.numel(), parts):
        ids = rows[start : start + settings.rows_per_forward].to(lm.device).long()
        ordinary = lm.ordinary(ids)
        here: list[Heads] = []

        def take(n: int, heads: Heads, ids: Tensor = ids, start: int = start, here: list[Heads] = here) -> None:
            scores.add(ids, lm.ordinary(ids), n, heads, start)
            if n == layer:
                here.append(heads)

        with recorded_heads(lm, layers, take):
            z = lm.activations(ids, [site_of(layers[-1]), site])[site]
        for i in range(len(ids)):
            at = ordinary[i].nonzero().squeeze(1)
            if not len(at):
                continue
            codes = sae.encode(z[i, at].float())
            counts += codes.firing_counts().cpu().numpy()
            tokens += len(at)
            row, token_ids = Heads(*(part[i : i + 1].float() for part in here[0])), ids[i].cpu().numpy()
            features, sources = found.add(sae, ids[i], at, codes, row, start + i)
            profiles.add_read(token_ids, features.cpu().numpy(), sources.cpu().numpy())
            entries = ids[i, at][codes.row_of_entry()]
            profiles.add_active(*(t.cpu().numpy() for t in (entries, codes.features, codes.values.float())))
    return _result(layer, scores, found, shares.cpu().numpy(), candidates, profiles, counts, tokens)


def _result(
    layer: int,
    scores: HeadScores,
    found: FamilyShares,
    decoder_shares: np.ndarray,
    candidates: np.ndarray,
    profiles: Profiles,
    counts: np.ndarray,
    tokens: int,
) -> Attention:
    alive = counts >= ALIVE
    if not alive.any():
        raise SaelabError(f"attention: no feature is active on {ALIVE} of the {tokens} tokens; use more text")
    drawn = found.drawn[:, alive, :]
    with np.errstate(invalid="ignore"):  # a feature may be in no row of a resample
        drawn_reads = np.nanmean(drawn / drawn[..., :5].sum(-1, keepdims=True), 1)
    reads, family = found.shares()[alive].mean(0), families(found.shares())
    poly = polysemanticity(candidates, (profiles.active, profiles.read), alive)
    direct = found.head_shares()
    same = decoder_shares[alive].argmax(1) == direct[alive].argmax(1)
    n_rows, n_layers, n_heads, n_scores = scores.sums.shape
    sums, often = scores.sums.reshape(n_rows, n_layers * n_heads, n_scores), found.draws
    with np.errstate(invalid="ignore", divide="ignore"):
        resampled = np.tensordot(often, sums, 1) / (often @ scores.counts)[:, None]
    ends = np.quantile(resampled, [0.025, 0.975], axis=0) if len(often) else np.full((2, *sums.shape[1:]), np.nan)
    low, high = ends.reshape(2, n_layers, n_heads, n_scores)

    return Attention(
        site=site_of(layer),
        layer=layer,
        tokens=tokens,
        rows=n_rows,
        n_features=len(counts),
        alive=int(alive.sum()),
        layers=np.array(sorted(scores.layer_index)),
        scores=scores.mean(),
        low=low,
        high=high,
        chance={name: scores.chance_of(name) for name in CHANCE},
        reads={name: between(float(reads[i]), drawn_reads[:, i]) for i, name in enumerate(FAMILIES)},
        families=dict(zip(FAMILIES, family_shares(family[alive], families(drawn)), strict=True)),
        family=family,
        shares=found.shares(),
        counts=counts,
        decoder_shares=decoder_shares,
        direct_shares=direct,
        agreement=float(same.mean()),
        top=poly.features,
        clusters=poly.clusters,
        largest=poly.largest,
        polysemantic=poly.polysemantic,
        control=float((poly.control < ONE_TASK).mean()),
    )


def family_shares(family: np.ndarray, drawn: np.ndarray) -> list[Interval]:
    """The share of each family ``[features]``, with intervals over rows and features.

    `drawn` ``[resamples, features]`` are the families in each resample of the rows; the features are drawn too. A
    feature that is in no row of a resample does not count there. Rows that are drawn twice make features with few
    tokens look more one-sided than they are, so the intervals are centred.
    """
    n = len(family)
    often = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), len(drawn)) * (drawn >= 0)
    found = []
    for i in range(len(FAMILIES)):
        share = float((family == i).mean())
        with np.errstate(invalid="ignore"):
            resampled = (often * (drawn == i)).sum(1) / often.sum(1)
        found.append(between(share, (share + resampled - resampled.mean()).clip(0, 1) if len(drawn) else resampled))
    return found
