"""The autoencoder that a training starts from, as its settings say."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import NamedTuple

import torch
from torch import Tensor, nn

from saelab.activations.sites import Sites
from saelab.ranks import ALONE, Ranks
from saelab.sae.allocation.methods import allocation_of
from saelab.sae.allocation.rules import Rule, TokenChoice
from saelab.sae.initial import initialise, threshold_for
from saelab.sae.model import SparseAutoencoder
from saelab.sae.settings import EncoderSettings, SaeSettings


class Widths(NamedTuple):
    """The widths of an autoencoder."""

    d_in: int
    d_out: int | None = None
    """Width of a transcoder's target; None: it is no transcoder."""
    sites: tuple[int, ...] = ()
    """Widths of the sites of a crosscoder, whose sum is d_in; empty: it is none."""

    @property
    def largest(self) -> int:
        return max(self.d_in, self.d_out or 0)


def widths_of(sites: Sites, widths: Mapping[str, int]) -> Widths:
    """The widths of an autoencoder at `sites`, given those of single sites."""
    own = tuple(widths[site] for site in sites.inputs)
    return Widths(sum(own), None if sites.target is None else widths[sites.target], own if sites.more else ())


def bare_autoencoder(
    settings: SaeSettings,
    d_in: int,
    d_out: int | None = None,
    site_widths: Sequence[int] = (),
    ranks: Ranks = ALONE,
) -> SparseAutoencoder:
    """An autoencoder for a training by `settings`, with weights of zero; with `d_out` a transcoder.

    With several `site_widths`, which add up to `d_in`, it is a crosscoder.
    If `ranks` share the features it has those of this process. Raises SettingError for what only an autoencoder or only
    a transcoder can have (`SaeSettings.check_sites`).
    """
    settings.check_sites(transcodes=d_out is not None, crosses=len(site_widths) > 1)
    sae = SparseAutoencoder(d_in, settings.n_features, settings.k, {"saelab": asdict(settings)}, d_out, ranks)
    if site_widths:
        sae.site_widths = tuple(site_widths)
    threshold = allocation_of(settings).initial_threshold
    if threshold is not None:
        sae.threshold = torch.full((1,), threshold)
    sae.power = settings.affinity.power if settings.affinity.name == "cosine" else 0.0
    if settings.skip:
        sae.W_skip = nn.Parameter(torch.zeros(sae.d_out, d_in))
    sae.prefixes, sae.groups = settings.prefix_sizes, settings.allocation.name == "group_max"
    ENCODERS[settings.encoder.name](sae, settings.encoder)
    return sae


ENCODERS: dict[str, Callable[[SparseAutoencoder, EncoderSettings], None]] = {
    "linear": lambda sae, options: None,
    "jumprelu": lambda sae, options: sae.train_thresholds(1.0, options.bandwidth),
    "gated": lambda sae, options: sae.train_magnitudes(),
    "tied": lambda sae, options: sae.tie(),
    "aligned": lambda sae, options: setattr(sae, "aligned", True),
}
"""By the name of an encoder, the function that adds its parameters to a bare autoencoder."""


def new_autoencoder(
    settings: SaeSettings,
    sample: Tensor,
    *,
    seed: int,
    target: Tensor | None = None,
    site_widths: Sequence[int] = (),
    ranks: Ranks = ALONE,
) -> SparseAutoencoder:
    """The autoencoder that a training by `settings` starts from, on the device of `sample` ``[tokens, d_in]``.

    The sample is scaled as the batches will be: E||x||^2 = d_in. With `target` ``[tokens, d_out]``, scaled so that
    E||y||^2 = d_out, it is a transcoder; with several `site_widths` a crosscoder, whose sample has each site in its
    columns, scaled on its own. Processes that share the training get the same sample.
    """
    torch.manual_seed(seed)
    d_out = None if target is None else target.shape[1]
    sae = bare_autoencoder(settings, sample.shape[1], d_out, site_widths, ranks).to(sample.device)
    zero_decoder = target is not None and not settings.unit_norm and settings.freeze != "decoder"
    initialise(sae, sample, settings.b_dec_init, target, first_rule(settings), zero_decoder)
    if sae.log_threshold is not None:
        begin_thresholds(sae, settings, sample)
    return sae


def begin_thresholds(sae: SparseAutoencoder, settings: SaeSettings, sample: Tensor) -> None:
    """Set the trained thresholds that `sae` starts with on inputs like `sample`, ``[tokens, d_in]``."""
    options = settings.encoder
    start = options.threshold or threshold_for(sae, settings.sparsity.target_l0 or settings.k, sample)
    sae.train_thresholds(start, options.bandwidth)


def first_rule(settings: SaeSettings) -> Rule | None:
    """The rule whose selection the first scale of the encoder is fitted to: that of the first step, by its final k.

    None: that of inference. JumpReLU has no thresholds yet, and the rule is token choice.

    With token choice's selection the encoder of mutual choice would begin 1.2 times as long (docs/results.md).
    """
    if settings.encoder.name == "jumprelu":  # its thresholds are set later, from that scale
        return TokenChoice(settings.k)
    return allocation_of(settings).first_rule(settings)
