"""A training that starts with the weights of a checkpoint (`sae.init_from`).

The checkpoint applies to activations x, and training is on x' = scale (x - mean) whitening (input_map.py). So its
weights are unfolded: the inverse of `InputMap.folded`, which is exact. What a training would have to change silently is
refused, or noted.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from saelab.errors import SettingError
from saelab.ranks import ALONE, Ranks
from saelab.sae.input_map import InputMap
from saelab.sae.interop.saelens import rule_of
from saelab.sae.interop.writing import b_enc
from saelab.sae.model import SparseAutoencoder
from saelab.sae.new import bare_autoencoder, begin_thresholds
from saelab.sae.settings import SaeSettings

_ENDS = (1e-6, 1e6)
"""Least and largest trained threshold, in units in which E||x'||^2 = d_in: training takes their logarithms."""
_NEAR = 1e-3
"""Largest difference of a length or product from 1, or of tied tables from each other, that counts as rounding."""


def notes_on_start(
    found: SparseAutoencoder,
    settings: SaeSettings,
    d_in: int,
    d_out: int | None = None,
    *,
    normalisation: str | None = None,
) -> Iterator[str]:
    """What a training by `settings` from the checkpoint `found` at a site of width `d_in` does not take over.

    `d_out` is the width of the target, if there is one; `normalisation` is that of the inputs. Raises SettingError if
    it cannot start from it.
    """
    where = f"sae.init_from: {settings.init_from}"
    if found.normalisation != normalisation:
        own, here = found.normalisation or "no", normalisation or "no"
        raise SettingError(
            f"{where}: has {own} normalisation of each token, and the inputs of training {here}; set "
            f"activations.inputs={found.normalisation or 'scale'}"
        )
    if len(found.site_widths) > 1:
        raise SettingError(f"{where}: is a crosscoder, and those start with random weights; use another checkpoint")
    if found.transcodes != (d_out is not None):
        kind, here = ("a transcoder", "no target") if found.transcodes else ("no transcoder", "a target")
        raise SettingError(f"{where}: is {kind}, and the run has {here}; use another checkpoint, or change `target`")
    for what, own, width in (("takes", found.d_in, d_in), ("gives", found.d_out, d_out or d_in)):
        if own != width:
            raise SettingError(
                f"{where}: {what} activations {own:,} wide, and the site's are {width:,}; use another site"
            )
    if (found.W_skip is not None) != settings.skip:
        has = "has a skip connection" if found.W_skip is not None else "has no skip connection"
        raise SettingError(f"{where}: {has}, and sae.skip is {str(settings.skip).lower()}; change one of them")
    if found.n_features != settings.n_features:
        raise SettingError(
            f"{where}: has {found.n_features:,} features, and n_features is {settings.n_features:,}; set "
            f"sae.n_features={found.n_features}"
        )
    rule, has_budget = rule_of(found), settings.allocation.name != "threshold"
    if rule == "threshold" and not has_budget and settings.encoder.name not in ("jumprelu", "gated"):
        raise SettingError(
            f"{where}: has thresholds, and encoder: {settings.encoder.name} with allocation: threshold has none; use "
            "encoder: jumprelu"
        )
    if rule in ("threshold", "relu") and has_budget:
        yield f"{settings.init_from}: its thresholds are left out; training has a budget (k {settings.k}) instead"
    if rule == "relu" and settings.encoder.name == "jumprelu":
        yield f"{settings.init_from}: has no thresholds above 0; those of training begin anew"
    if rule in ("topk", "groupmax") and not has_budget:
        yield f"{settings.init_from}: its k of {found.k} is left out; training has thresholds instead of a budget"
    elif rule in ("topk", "groupmax") and found.k != settings.k:
        yield f"{settings.init_from}: k is {settings.k} here and {found.k} in the checkpoint"
    if settings.affinity.name == "cosine" and settings.affinity.power:
        yield f"{settings.init_from}: affinity: cosine selects other features than the checkpoint does"
    if has_budget and (rule == "groupmax") != (settings.allocation.name == "group_max"):
        yield f"{settings.init_from}: its allocation is {rule}, and here it is {settings.allocation.name}"


@torch.no_grad()
def start_from(
    found: SparseAutoencoder,
    settings: SaeSettings,
    sample: Tensor,
    inputs: InputMap,
    target_scale: float = 1.0,
    ranks: Ranks = ALONE,
) -> SparseAutoencoder:
    """The autoencoder of x' = `inputs` (x) that starts a training by `settings` and computes what `found` does of x.

    ``inputs.folded`` of it is `found` again, up to rounding, if encoder and rule are the same. sample ``[tokens,
    d_in]`` are first inputs x'; thresholds that `found` lacks are fitted to them. A transcoder is trained on
    `target_scale` times its targets. If `ranks` share the features it has those of this process. `notes_on_start` was
    asked before. Raises SettingError if the weights do not fit settings that bind them, such as `unit_norm`.
    """
    start = _unfolded_transcoder(found, inputs, target_scale) if found.transcodes else _unfolded(found, inputs)
    W_enc, W_dec, bias, b_dec, threshold, W_skip = start
    if settings.unit_norm:
        W_enc, W_dec, bias, threshold = _unit(W_enc, W_dec, bias, threshold, settings)
    _check_bound(W_enc, W_dec, settings)
    d_out = found.d_out if found.transcodes else None
    sae = bare_autoencoder(settings, found.d_in, d_out, ranks=ranks).to(sample.device)
    part = sae.part
    sae.W_enc.copy_(W_enc[part])
    if not sae.tied:
        sae.W_dec.copy_(W_dec[part])
    sae.b_enc.copy_(bias[part])
    sae.b_dec.copy_(b_dec)
    if sae.W_skip is not None and W_skip is not None:
        sae.W_skip.copy_(W_skip)
    if sae.log_threshold is not None:
        if rule_of(found) == "threshold" and threshold is not None:
            sae.log_threshold.copy_(threshold[part].clamp(*_ENDS).log())
        else:
            begin_thresholds(sae, settings, sample)
    if sae.b_mag is not None:  # the gate is the magnitude less its threshold
        sae.b_mag.copy_(bias[part])
        if threshold is not None:
            sae.b_enc.sub_(threshold[part].clamp(0, _ENDS[1]).to(sae.b_enc))
    return sae


class _Weights(NamedTuple):
    """The weights of an autoencoder of x', float64."""

    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor
    threshold: Tensor | None
    """``[n_features]``, or None."""
    W_skip: Tensor | None = None


def _unfolded(found: SparseAutoencoder, inputs: InputMap) -> _Weights:
    W_enc, W_dec, b_dec = (table.detach().double() for table in (found.W_enc, found.W_dec, found.b_dec))
    bias = b_enc(found, centred=True).double() * inputs.scale
    if inputs.mean is not None:
        b_dec = b_dec - inputs.mean.to(b_dec)
    if inputs.whitening is not None and inputs.inverse is not None:
        whitening = inputs.whitening.to(b_dec)
        W_enc, W_dec, b_dec = W_enc @ inputs.inverse.to(b_dec), W_dec @ whitening, b_dec @ whitening
    return _Weights(W_enc, W_dec, bias, b_dec * inputs.scale, _threshold(found, inputs.scale))


def _unfolded_transcoder(found: SparseAutoencoder, inputs: InputMap, target_scale: float) -> _Weights:
    W_enc, W_dec, bias, b_dec = (t.detach().double() for t in (found.W_enc, found.W_dec, found.b_enc, found.b_dec))
    skip = None if found.W_skip is None else found.W_skip.detach().double()
    if inputs.mean is not None:
        mean = inputs.mean.to(bias)
        bias, b_dec = bias + W_enc @ mean, b_dec if skip is None else b_dec + skip @ mean
    ratio = target_scale / inputs.scale
    inverse = ratio if inputs.inverse is None else inputs.inverse.to(bias) * ratio
    W_enc, skip = (table if table is None else _times(table, inverse) for table in (W_enc, skip))
    assert W_enc is not None
    return _Weights(W_enc, W_dec, bias * target_scale, b_dec * target_scale, _threshold(found, target_scale), skip)


def _times(table: Tensor, by: Tensor | float) -> Tensor:
    return table @ by if isinstance(by, Tensor) else table * by


def _threshold(found: SparseAutoencoder, scale: float) -> Tensor | None:
    if found.threshold is None:
        return None
    return (found.threshold.double().clamp_min(0) * scale).expand(found.n_features)


def _unit(
    W_enc: Tensor, W_dec: Tensor, bias: Tensor, threshold: Tensor | None, settings: SaeSettings
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The same autoencoder with decoder rows of length 1, as training keeps them.

    Raises SettingError if another selection would follow: a budget goes to the largest pre-activations, and these get
    the lengths as factors.
    """
    lengths = torch.linalg.vector_norm(W_dec, dim=1)
    lengths = torch.where(lengths > 0, lengths, 1.0)  # a row of zeros stays one
    if bool(((lengths - 1).abs() < _NEAR).all()):
        return W_enc, W_dec, bias, threshold  # the first step scales them
    if settings.allocation.name != "threshold" and lengths.max() > (1 + _NEAR) * lengths.min():
        raise SettingError(
            f"sae.init_from: {settings.init_from}: its decoder rows, for training's inputs, have lengths from "
            f"{lengths.min():.3g} to {lengths.max():.3g}; with length 1 other features would be selected, so set "
            "sae.unit_norm=false"
        )
    scaled = None if threshold is None else threshold * lengths
    return W_enc * lengths[:, None], W_dec / lengths[:, None], bias * lengths, scaled


def _check_bound(W_enc: Tensor, W_dec: Tensor, settings: SaeSettings) -> None:
    """Raises SettingError if the rows of encoder and decoder are not bound to each other as the encoder binds them."""
    name = settings.encoder.name
    apart = 0.0
    if name == "tied":
        apart = float((W_enc - W_dec).abs().max() / W_dec.abs().max().clamp_min(1e-30))
    elif name == "aligned":
        apart = float(((W_enc * W_dec).sum(1) - 1).abs().max())
    if apart > _NEAR:
        raise SettingError(
            f"sae.init_from: {settings.init_from}: its encoder rows are not bound to its decoder rows as "
            f"encoder: {name} keeps them; use encoder: linear"
        )
