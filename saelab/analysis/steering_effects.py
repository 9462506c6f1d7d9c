"""What steering single features does to predictions, beside random directions of the same length.

For each of some features, one token at a time is steered, at two kinds of contexts:

own          the tokens of the rows in which the feature's largest activation is largest, one per row
random       tokens drawn from all rows

in the modes of steering.py, with the error of the reconstruction kept:

add          adds `scale` times the mean norm of an activation along the decoder row: the same length for every feature
clamp        sets the feature to its largest activation in the text
ablate       sets it to 0

The prediction of the next token from the steered token is compared with that of the clean run:

kl           KL(clean || steered), nats
logits       root mean square, over the vocabulary, of the change of the logits less the mean change
next token   change of the log-probability of the token that follows in the text, nats
changed      share of contexts with another most likely token

Each stands beside the same figure for a random direction, drawn for the feature, that is added at the same tokens with
the same length as the feature's own change.

Steering score: the target tokens of a feature are the `targets` tokens whose logits rise most, on average over its own
contexts, when it is added. The score is the mean rise of the targets' logits less that of all tokens, at random
contexts. That of a random direction has targets of its own, chosen in the same way. The target tokens are chosen from
other text than the score is measured on. (arXiv 2411.10397 states no metric; this is ours.)

Activation share: a feature's sum of activations over that of all features, over all ordinary tokens. If features are
representations only, the effect of ablating them follows the share; those of small share and large effect are actions.

Only tokens that are followed by an ordinary one are steered. Intervals are over features. Cost, in passes over one row:
two to find the contexts, for every row of the text; and 7 for each token that is steered (the clean one, and one for
each mode and direction), which share the layers below the site.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from saelab.analysis.affine import check_affine
from saelab.analysis.settings import Intervention, SteeringSettings
from saelab.analysis.steering import activations_of, check_steerable, steered
from saelab.analysis.steering_report import EFFECTS, MODES, PASSES, SteeringEffects
from saelab.encoded import Block, encoded
from saelab.errors import SaelabError
from saelab.lm.model import LanguageModel
from saelab.lm.splice import SplicedRuns
from saelab.progress import Track, silent
from saelab.sae.model import SparseAutoencoder


@torch.no_grad()
def steering_effects(
    sae: SparseAutoencoder,
    lm: LanguageModel,
    rows: Tensor,
    site: str,
    settings: SteeringSettings = SteeringSettings(),  # noqa: B008 (frozen)
    *,
    features: Sequence[int] | None = None,
    seed: int = 0,
    track: Track = silent,
) -> SteeringEffects:
    """The effects that the head of this file defines, on the text `rows` ``[rows, context]``.

    Without `features`, `settings.features` are drawn from those that are active in enough rows. Memory, besides a pass:
    ``rows x features`` numbers. Raises SaelabError for a transcoder, and if a feature is active in too few rows.
    """
    check_steerable(sae, lm, site)
    check_affine(sae, "steering_effects")  # the length of what is added would differ between tokens

    def blocks() -> Iterator[Block]:
        return encoded(sae, lm, rows, site, settings.rows_per_forward, track=track)

    numbers, contexts = np.random.default_rng(seed), settings.contexts
    survey = _survey(sae, lm, blocks())
    enough = np.flatnonzero(survey.rows_active >= contexts)
    drawn: list[int] = np.sort(numbers.permutation(enough)[: settings.features]).tolist()
    features = drawn if features is None else features
    for feature in features:
        if not 0 <= feature < sae.n_features or survey.rows_active[feature] < contexts:
            raise SaelabError(
                f"steering: feature {feature} is not active in {contexts} rows of this text; use more text, fewer "
                f"contexts, or another feature (0 to {sae.n_features - 1})"
            )
    if not features or len(survey.scored) < contexts:
        raise SaelabError(f"steering: no feature is active in {contexts} rows of this text; use more text")
    own, largest = _strongest(lm, blocks(), len(rows), features, contexts)
    random = np.stack([numbers.choice(survey.scored, contexts, replace=False) for _ in features])
    share = survey.mass[features] / survey.mass.sum()
    chosen = Chosen(features, np.stack([own, random], 1), largest, share, survey.tokens, survey.norm)
    return effects_at(sae, lm, rows, site, chosen, settings, seed=seed, track=track)


class Chosen(NamedTuple):
    """The features that are steered, and the tokens at which each is."""

    features: Sequence[int]
    places: np.ndarray
    """row x context + position of each token, ``[features, 2, contexts]`` int64, by kind of context."""
    largest: np.ndarray
    """Largest activation of each feature in the text, ``[features]``."""
    share: np.ndarray
    """Activation share of each feature, ``[features]``."""
    tokens: int
    """Ordinary tokens of the text."""
    norm: float
    """Mean norm of an activation at the site."""


@torch.no_grad()
def effects_at(
    sae: SparseAutoencoder,
    lm: LanguageModel,
    rows: Tensor,
    site: str,
    chosen: Chosen,
    settings: SteeringSettings = SteeringSettings(),  # noqa: B008 (frozen)
    *,
    seed: int = 0,
    track: Track = silent,
) -> SteeringEffects:
    """The effects of steering the chosen features at the chosen tokens of `rows` ``[rows, context]``.

    Each token must be ordinary and followed by an ordinary one. Raises SaelabError for a transcoder, and
    for an autoencoder that is not `affine`.
    """
    check_steerable(sae, lm, site)
    width, contexts = rows.shape[1], chosen.places.shape[2]
    runs, generator = SplicedRuns(lm, site), torch.Generator().manual_seed(seed)
    found = []
    size = PASSES * 2 * contexts * width  # tokens in the passes of a feature
    for i in track(iter(range(len(chosen.features))), "steering", size * len(chosen.features), lambda _: size):
        feature = chosen.features[i]
        value = settings.scale * chosen.norm / float(sae.W_dec[feature].norm().clamp_min(1e-12))
        values = {"add": value, "clamp": float(chosen.largest[i]), "ablate": 0.0}
        interventions = [Intervention(feature, mode, values[mode]) for mode in MODES]
        direction = F.normalize(torch.randn(sae.d_in, generator=generator), dim=0).to(lm.device)
        kinds = [_at(sae, lm, runs, rows, torch.from_numpy(p), interventions, direction) for p in chosen.places[i]]
        found.append(_of_feature(kinds[0], kinds[1], settings.targets))
    columns = [np.stack(column) for column in zip(*found, strict=True)]
    places = chosen.places // width, chosen.places % width
    return SteeringEffects(
        site, chosen.tokens, contexts, np.array(chosen.features), np.asarray(chosen.share), *places, *columns
    )


def steerable_features(
    sae: SparseAutoencoder, lm: LanguageModel, rows: Tensor, site: str, settings: SteeringSettings
) -> np.ndarray:
    """The features that `steering_effects` takes on this text: those active in enough rows, rising, int64."""
    survey = _survey(sae, lm, encoded(sae, lm, rows, site, settings.rows_per_forward))
    return np.flatnonzero(survey.rows_active >= settings.contexts)


class _Survey(NamedTuple):
    tokens: int
    norm: float
    """Mean norm of an activation at the site."""
    mass: np.ndarray
    """Sum of the activations of each feature, ``[n_features]`` float64."""
    rows_active: np.ndarray
    """Rows in which each feature is active on a token that may be steered, ``[n_features]`` int64."""
    scored: np.ndarray
    """row x context + position of the tokens that may be steered, rising."""


def _survey(sae: SparseAutoencoder, lm: LanguageModel, blocks: Iterator[Block]) -> _Survey:
    mass, active = torch.zeros(sae.n_features, dtype=torch.float64), torch.zeros(sae.n_features, dtype=torch.long)
    tokens, norms, scored = 0, 0.0, []
    for block in blocks:
        tokens += len(block.x)
        norms += block.x.norm(dim=1).double().sum().item()
        codes, steerable = block.codes, _steerable(lm, block)
        mass.scatter_add_(0, codes.features.long().cpu(), codes.values.double().cpu())
        scored.append(block.positions[steerable].cpu().numpy())
        entry = steerable[codes.row_of_entry()].cpu()
        row = block.row_of_token()[codes.row_of_entry().cpu()][entry]
        pairs = (row * sae.n_features + codes.features.long().cpu()[entry]).unique()
        active += torch.bincount(pairs % sae.n_features, minlength=sae.n_features)
    if not tokens or not any(map(len, scored)):
        raise SaelabError("steering: no position has an ordinary token followed by another; use another text")
    return _Survey(tokens, norms / tokens, mass.numpy(), active.numpy(), np.concatenate(scored))


def _steerable(lm: LanguageModel, block: Block) -> Tensor:
    """Whether the token after each ordinary token is ordinary too, ``[tokens]`` bool."""
    first = block.first_row * block.rows.shape[1]
    return lm.scored(block.rows).flatten()[block.positions - first]


def _strongest(
    lm: LanguageModel, blocks: Iterator[Block], rows: int, features: Sequence[int], contexts: int
) -> tuple[np.ndarray, np.ndarray]:
    """The strongest tokens of each feature, one per row, ``[features, contexts]``, and the largest activation of each.

    A token is row x context + position; the first of equal ones of a row, and of rows.
    """
    values = torch.zeros(rows, len(features))
    places = torch.zeros(rows, len(features), dtype=torch.long)
    largest, which = torch.zeros(len(features)), torch.tensor(features)
    for block in blocks:
        found = activations_of(block.codes, which.to(block.x.device)).float()
        largest = torch.maximum(largest, found.amax(0).cpu())
        found[~_steerable(lm, block)] = 0
        row, positions, found = block.row_of_token(), block.positions.cpu(), found.cpu()
        for r in row.unique().tolist():
            here = row == r
            values[r], index = found[here].max(0)
            places[r] = positions[here][index]
    order = values.argsort(dim=0, descending=True, stable=True)[:contexts]
    return places.gather(0, order).T.numpy(), largest.numpy()


class _Effects(NamedTuple):
    """Effects at the contexts of one kind, ``[3, 2, ...]`` by mode and direction."""

    length: Tensor
    """``[3]``"""
    measured: dict[str, Tensor]
    """Means over the contexts, ``[3, 2]`` each."""
    rise: Tensor
    """Mean change of each logit over the contexts, in the mode add, ``[2, vocabulary]``."""


def _at(
    sae: SparseAutoencoder,
    lm: LanguageModel,
    runs: SplicedRuns,
    rows: Tensor,
    places: Tensor,
    interventions: Sequence[Intervention],
    direction: Tensor,
) -> _Effects:
    """Effects of each intervention at each of the tokens `places` (row x context + position), one token at a time."""
    width, device = rows.shape[1], lm.device
    row, position = (each.to(device) for each in (places // width, places % width))
    text, at = rows.to(device).long()[row], torch.arange(len(places), device=device)
    # the number of each steered token among the ordinary ones, which is all that a replacement gets
    index = lm.ordinary(text).flatten().cumsum(0)[at * width + position] - 1
    lengths: list[Tensor] = []

    def along_feature(intervention: Intervention) -> Callable[[Tensor], Tensor]:
        def replace(x: Tensor) -> Tensor:
            new = x.clone()
            new[index] = steered(sae, x[index], [intervention])
            lengths.append((new[index] - x[index]).float().norm(dim=1))
            return new

        return replace

    def along_direction(x: Tensor) -> Tensor:
        """As far as the feature was changed in the run before."""
        new = x.clone()
        new[index] = (x[index].float() + lengths[-1][:, None] * direction).to(x.dtype)
        return new

    replacements = [each for i in interventions for each in (along_feature(i), along_direction)]
    found = (logits[at, position].double() for logits in runs(text, replacements))
    clean = next(found)
    log_p, following = clean.log_softmax(-1), text[at, position + 1]
    measured: dict[str, list[Tensor]] = {name: [] for name in EFFECTS}
    rises = []
    for logits in found:
        change, other = logits - clean, logits.log_softmax(-1)
        measured["kl"].append((log_p.exp() * (log_p - other)).sum(1).clamp_min(0).mean())
        measured["logits"].append((change - change.mean(1, keepdim=True)).square().mean(1).sqrt().mean())
        measured["next_token"].append((other - log_p)[at, following].mean())
        measured["changed"].append((logits.argmax(1) != clean.argmax(1)).double().mean())
        rises.append(change.mean(0))
    add = 2 * MODES.index("add")
    return _Effects(
        torch.stack([each.mean() for each in lengths]),
        {name: torch.stack(values).view(len(MODES), 2) for name, values in measured.items()},
        torch.stack(rises[add : add + 2]),
    )


def _of_feature(own: _Effects, random: _Effects, targets: int) -> list[np.ndarray]:
    """The columns of `SteeringEffects` from `length` on, of one feature."""
    chosen = own.rise.topk(min(targets, own.rise.shape[1]), 1).indices
    score = random.rise.gather(1, chosen).mean(1) - random.rise.mean(1)
    effects = [torch.stack([each.measured[name] for each in (own, random)]) for name in EFFECTS]
    found = [torch.stack([own.length, random.length]), *effects]
    return [each.float().cpu().numpy() for each in found] + [chosen.cpu().numpy(), score.float().cpu().numpy()]
