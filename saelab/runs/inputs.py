"""From a source's activations to the batches of training: scaled, and without tokens of too large a norm.

The first activations decide both: `activations.inputs` is fitted to them (`saelab.sae.input_map`), so that E||x||^2 =
d_in over them, and `activations.max_norm` is a multiple of their median norm. The target of a transcoder has only a
scale, of its own, so that E||y||^2 = d_out. With several sites each has a median norm, and a token is left out whose
norm is too large at one of them, the target included: sinks of one site need not be sinks of another.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from saelab.activations.sinks import SINK, Concentration, largest_norm, measure, within
from saelab.activations.source import SAMPLE_TOKENS
from saelab.activations.stream import ActivationBatch
from saelab.corpus import Corpus
from saelab.errors import SaelabError
from saelab.runs.job import Job
from saelab.sae.input_map import InputMap, input_map
from saelab.sae.model import Batch, SparseAutoencoder
from saelab.sae.side_by_side import SideBySide, side_by_side_map

NOTED_SINKS = 0.1
"""Share of the variance in sinks from which it is said: with it, an autoencoder that explains the sinks and nothing
else has an FVU lower by as much, which is more than most methods differ by."""
NOTED_TOP = 0.5
"""Share of the variance in the largest 1% of dimensions from which it is said: FVU is then mostly about them."""


@dataclass
class Inputs:
    """How activations become the inputs of training; `left_out` counts the tokens that do not."""

    map: InputMap | SideBySide
    largest_norms: tuple[float, ...] = ()
    """Norm above which a token is left out, before scaling, at each site; the target is the last. Empty: none is."""
    first: dict[str, Any] = field(default_factory=dict)
    """`Concentration` of the first activations, before any is left out, as a dictionary; for the record. Of several
    sites one for each, by its name."""
    left_out: int = 0
    target_scale: float | None = None
    """Factor of the targets; None: the target is the input."""
    _empty: int = 0
    """Tokens in a row of which none was left."""

    def batch(self, batch: ActivationBatch, device: torch.device, target: Tensor | None = None) -> Batch | None:
        """A batch of the source as inputs, on `device`; None if fewer than two tokens are left.

        `target` ``[tokens, d_out]`` are the activations at the target site, if there is one.
        Raises SaelabError if no token of `SAMPLE_TOKENS` in a row is left: half of the first activations were.
        """
        found = self._scaled(batch, device, target)
        self._empty = 0 if found is not None else self._empty + len(batch)
        if self._empty >= SAMPLE_TOKENS:
            bound = " or ".join(f"{norm:.4g}" for norm in self.largest_norms)
            raise SaelabError(
                f"activations.max_norm: {self._empty:,} tokens in a row have norms above {bound}, the bound from the "
                "first activations, so no batch can be filled; shuffle the text, or set a larger "
                "`activations.max_norm`"
            )
        return found

    def _scaled(self, batch: ActivationBatch, device: torch.device, target: Tensor | None) -> Batch | None:
        values, gradients = batch.values.to(device).float(), batch.gradients
        gradients = self.map.gradients(None if gradients is None else gradients.to(device).float(), values)
        target = None if target is None else target.to(device).float()
        keep = self.within(values, target)
        if target is not None and self.target_scale is not None:
            target = target * self.target_scale
        if keep is None:
            return Batch(self.map(values), target, gradients)
        kept = int(keep.sum())
        self.left_out += len(keep) - kept
        if kept < 2:  # one token has no variance to explain
            return None
        target, gradients = (None if each is None else each[keep] for each in (target, gradients))
        return Batch(self.map(values[keep]), target, gradients)

    def within(self, values: Tensor, target: Tensor | None = None) -> Tensor | None:
        """Which tokens are trained on, bool ``[tokens]``; None if all are.

        values ``[tokens, d_in]`` and target ``[tokens, d_out]`` are as the model gives them.
        """
        if not self.largest_norms:
            return None
        widths = self.map.widths if isinstance(self.map, SideBySide) else ()
        return within(_by_site(values, target, widths), self.largest_norms)

    def folded(self, sae: SparseAutoencoder) -> SparseAutoencoder:
        """The autoencoder of activations as the model gives them that computes what `sae` computes on inputs."""
        return self.map.folded(sae, 1.0 if self.target_scale is None else self.target_scale)

    def state(self) -> dict[str, Any]:
        """The record, and what the map has besides the scale; `from_state` reads it."""
        found = {"mean": self.map.mean, "whitening": self.map.whitening, "normalisation": self.map.normalisation}
        return self.record() | {f"input_{name}": value for name, value in found.items() if value is not None}

    def record(self) -> dict[str, Any]:
        """JSON-able facts about the inputs."""
        bounds = [None if math.isinf(norm) else norm for norm in self.largest_norms]
        scale, widths = self.map.scale, {}
        if isinstance(self.map, SideBySide):
            scale, widths = list(self.map.scale), {"site_widths": list(self.map.widths)}
        return {
            "input_scale": scale,
            **widths,
            **({} if self.target_scale is None else {"target_scale": self.target_scale}),
            "largest_norm": bounds if len(bounds) > 1 else bounds[0] if bounds else None,
            "left_out": self.left_out,
            "first_activations": self.first,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Inputs":
        """The inputs of a run that goes on; states of earlier versions have the scale only."""
        bounds, scale, mean = state.get("largest_norm"), state["input_scale"], state.get("input_mean")
        if not isinstance(bounds, list):
            bounds = [] if bounds is None else [bounds]
        if isinstance(scale, list):
            made: InputMap | SideBySide = SideBySide(tuple(scale), tuple(state["site_widths"]), mean)
        else:
            made = InputMap(scale, mean, state.get("input_whitening"), state.get("input_normalisation"))
        return cls(
            made,
            tuple(math.inf if norm is None else norm for norm in bounds),
            state.get("first_activations", {}),
            state.get("left_out", 0),
            state.get("target_scale"),
        )


def first_inputs(
    sample: Tensor, job: Job, target: Tensor | None = None, site_widths: Sequence[int] = ()
) -> tuple[Inputs, Batch]:
    """The inputs that the first activations `sample` ``[tokens, d_in]`` give, and the sample as such inputs.

    `target` ``[tokens, d_out]`` are the first activations at the target site, if there is one; of a crosscoder, whose
    sites are side by side in the sample, `site_widths` are the widths of the sites.
    Says so if few tokens or dimensions hold much of the variance of what is trained on. Raises SaelabError if
    no scale gives E||x||^2 = d_in.
    """
    sites, settings, target_scale = job.settings.sites, job.settings.activations, None
    found = trained_on = [measure(each) for each in _by_site(sample, target, site_widths)]
    bounds: tuple[float, ...] = ()
    if settings.max_norm is not None:
        bounds = tuple(largest_norm(each.median_norm, settings.max_norm) for each in found)
        keep = within(_by_site(sample, target, site_widths), bounds)
        if keep is not None:
            _check_left(keep, settings.max_norm)
            sample, target = sample[keep], None if target is None else target[keep]
            trained_on = [measure(each) for each in _by_site(sample, target, site_widths)]
    site = " + ".join(sites.inputs)
    try:
        crosses = len(site_widths) > 1
        fitted = (
            side_by_side_map(settings.inputs, sample, site_widths) if crosses else input_map(settings.inputs, sample)
        )
        if sites.target is not None and target is not None:
            site = sites.target
            target_scale = input_map("scale", target).scale
            target = target * target_scale
    except ValueError as error:
        raise SaelabError(f"{site}: the first {len(sample):,} activations {error}; choose another site") from error
    several = len(sites.all) > 1
    for name, each in zip(sites.all, trained_on, strict=True):
        for note in concentration_notes(each, job.origin[1]):
            job.say(f"note: {f'at {name} ' * several}{note}")
    first = {name: asdict(each) for name, each in zip(sites.all, found, strict=True)}
    read = Inputs(fitted, bounds, first if several else first[sites.input], target_scale=target_scale)
    return read, Batch(fitted(sample), target)


def _by_site(values: Tensor, target: Tensor | None, widths: Sequence[int]) -> list[Tensor]:
    """The activations at each site: those side by side in `values`, if there are several `widths`, and the target's."""
    read = values.split(list(widths), 1) if len(widths) > 1 else (values,)
    return [*read] if target is None else [*read, target]


def _check_left(keep: Tensor, max_norm: float) -> None:
    """Raises SaelabError if fewer than two tokens are kept: half are at each site, but not the same half at all."""
    if int(keep.sum()) < 2:
        raise SaelabError(
            f"activations.max_norm: of the first {len(keep):,} tokens none has a norm up to {max_norm:g} times the "
            "median at every site; set a larger one"
        )


def concentration_notes(found: Concentration, corpus: Corpus | None) -> Iterator[str]:
    """What to note if few tokens or dimensions hold much of the variance. `corpus` is the text, if there is one."""
    if found.sink_variance >= NOTED_SINKS:
        cause = (
            ""
            if corpus is None or corpus.begins_with_bos
            else "; often the first token of a row that does not begin with BOS"
        )
        yield (
            f"{found.sink_share:.2%} of the tokens have norms above {SINK:g} times the median (attention sinks"
            f"{cause}) and hold {found.sink_variance:.1%} of the variance, so training and FVU are mostly about them; "
            f"activations.max_norm={SINK:g} leaves them out of training"
        )
    if found.top_variance >= NOTED_TOP:
        yield (
            f"{found.top_dimensions} of the dimensions hold {found.top_variance:.1%} of the variance of the "
            "other tokens, so FVU and cosine are mostly about them; delta CE shows what is lost in the others"
        )
