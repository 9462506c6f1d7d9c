"""Settings of an autoencoder: its size, and the encoder, affinity, allocation and losses it is trained with."""

import math
from dataclasses import dataclass, field
from itertools import pairwise

from saelab.errors import SettingError
from saelab.files import expanded

BOUND = ("tied", "aligned")
"""Encoders whose rows are bound to those of the decoder."""


def _one_of(field_name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise SettingError(f"{field_name}: {value!r} is not {', '.join(choices[:-1])} or {choices[-1]}")


def _curve(exponent: float | None, shift: float | None) -> None:
    """Raises SettingError unless both parameters of a Zipf curve or neither are given, and the curve falls."""
    if (exponent is None) != (shift is None):
        raise SettingError("exponent: a Zipf curve takes both exponent and shift, or neither (then it is fitted)")
    if exponent is not None and not 0 <= exponent < math.inf:
        raise SettingError(f"exponent: {exponent} is not a number from 0 up")
    if shift is not None and not 0 <= shift < math.inf:
        raise SettingError(f"shift: {shift} is not a number from 0 up")


@dataclass(frozen=True)
class EncoderSettings:
    name: str = "linear"
    """Value of an active entry: linear (its pre-activation), jumprelu (the same, above a trained threshold), or gated
    (a magnitude of its own scale and bias). tied is linear with W_enc = W_dec, and aligned is linear with every encoder
    row scaled so that its product with its decoder row is 1."""
    bandwidth: float = 0.5
    """jumprelu: width of the window around a threshold whose entries move it; inputs have E||x||^2 = d_in."""
    threshold: float | None = None
    """jumprelu: initial value of all thresholds. Default: L0 then equals `sparsity.target_l0`, or k without one."""

    def __post_init__(self) -> None:
        _one_of("name", self.name, ("linear", "jumprelu", "gated", "tied", "aligned"))
        for name in ("bandwidth", "threshold"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise SettingError(f"{name}: {value} is not a positive number")


@dataclass(frozen=True)
class AffinitySettings:
    name: str = "activation"
    """Score of an entry: activation, gradient (the activation weighted by its effect on the LM's loss), or cosine (the
    activation over a power of the length of the feature's encoder row)."""
    beta: float = 1.0
    """gradient: weight of the gradient's part; 0 is activation."""
    power: float = 1.0
    """cosine: that power; 1 is cosine, and 0 activation."""

    def __post_init__(self) -> None:
        _one_of("name", self.name, ("activation", "gradient", "cosine"))
        if not 0 <= self.power <= 1:
            raise SettingError(f"power: {self.power} is not between 0 and 1")
        if not 0 <= self.beta < math.inf:
            raise SettingError(f"beta: {self.beta} is not a number from 0 up")


@dataclass(frozen=True)
class AllocationSettings:
    name: str = "token_choice"
    """How the budget of k per token is divided: token_choice (k for each token, TopK), mutual_choice (over the whole
    batch), feature_choice (a capacity for each feature) or group_max (one of each of k groups of consecutive features,
    for each token). threshold has no budget: every entry above the encoder's
    threshold is active (ReLU, JumpReLU), and a sparsity loss is needed."""
    capacity: str = "zipf"
    """Feature choice: how capacities fall with a feature's rank by density, zipf or uniform."""
    exponent: float | None = None
    """Feature choice: exponent of the Zipf curve; without it, fitted when feature choice begins."""
    shift: float | None = None
    """Feature choice: shift of the rank in the Zipf curve; without it, fitted."""
    after: float = 0.5
    """Feature choice: share of the steps, the first ones, trained by mutual choice while densities are measured."""
    refresh: int = 100
    """Feature choice: steps between two rankings of the features."""

    def __post_init__(self) -> None:
        _one_of("name", self.name, ("token_choice", "mutual_choice", "feature_choice", "group_max", "threshold"))
        _one_of("capacity", self.capacity, ("zipf", "uniform"))
        _curve(self.exponent, self.shift)
        if not 0 <= self.after <= 1:
            raise SettingError(f"after: {self.after} is not a share between 0 and 1")
        if self.refresh < 1:
            raise SettingError(f"refresh: {self.refresh} is not a positive number")


@dataclass(frozen=True)
class AuxSettings:
    name: str = "aux_k"
    """Auxiliary loss: none, aux_k (targets dead features) or aux_zipf (targets under-used ones too)."""
    coefficient: float = 1 / 32
    """Weight of the auxiliary loss."""
    features: int | None = None
    """Features it may use per token; default d_in / 2."""
    exponent: float | None = None
    """aux_zipf: exponent of the curve of expected densities; without it, fitted to the densities of the run so far."""
    shift: float | None = None
    """aux_zipf: shift of the rank in that curve; without it, fitted."""
    share: float = 0.5
    """aux_zipf: a feature is under-used below this share of its expected density."""
    lift: bool = False
    """Raise the bias of target features that no token of a batch activates; otherwise no gradient reaches them."""

    def __post_init__(self) -> None:
        _one_of("name", self.name, ("none", "aux_k", "aux_zipf"))
        if not 0 <= self.coefficient < math.inf:
            raise SettingError(f"coefficient: {self.coefficient} is not a number from 0 up")
        if self.features is not None and self.features < 1:
            raise SettingError(f"features: {self.features} is not a positive number")
        _curve(self.exponent, self.shift)
        if not 0 < self.share <= 1:
            raise SettingError(f"share: {self.share} is not a share above 0 and up to 1")


@dataclass(frozen=True)
class SparsitySettings:
    name: str = "none"
    """Loss that keeps features inactive: none, l1 (sum of activations), lp (sum of their powers), tanh (a smooth number
    of active features), or l0 (their number; jumprelu)."""
    coefficient: float = 1.0
    """Weight of that loss; the reconstruction loss (FVU) has weight 1."""
    target_l0: float | None = None
    """l0: the loss is (L0 / target_l0 - 1)^2. Default: L0 itself, so that `coefficient` is FVU per active feature."""
    warmup: float = 0.05
    """Share of the steps over which the weight rises from zero."""
    p: float = 0.5
    """lp: the power of an activation."""
    slope: float = 4.0
    """tanh: an activation of 1 / slope counts as 0.76 of an active feature; inputs have E||x||^2 = d_in."""

    def __post_init__(self) -> None:
        _one_of("name", self.name, ("none", "l1", "lp", "tanh", "l0"))
        if not 0 < self.p <= 1:
            raise SettingError(f"p: {self.p} is not a power above 0 and up to 1")
        if not 0 < self.slope < math.inf:
            raise SettingError(f"slope: {self.slope} is not a positive number")
        if not 0 <= self.coefficient < math.inf:
            raise SettingError(f"coefficient: {self.coefficient} is not a number from 0 up")
        if self.target_l0 is not None and not 0 < self.target_l0 < math.inf:
            raise SettingError(f"target_l0: {self.target_l0} is not a positive number")
        if not 0 <= self.warmup <= 1:
            raise SettingError(f"warmup: {self.warmup} is not a share between 0 and 1")


@dataclass(frozen=True)
class SaeSettings:
    n_features: int = 4096
    """Number of features (latents)."""
    k: int = 32
    """Most features active on a token, on average over a batch. Without a budget: L0 that jumprelu's thresholds begin
    with, unless `sparsity.target_l0` is given."""
    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    """linear, jumprelu, gated, tied or aligned."""
    affinity: AffinitySettings = field(default_factory=AffinitySettings)
    """activation, gradient or cosine."""
    allocation: AllocationSettings = field(default_factory=AllocationSettings)
    """token_choice, mutual_choice, feature_choice, group_max or threshold."""
    aux: AuxSettings = field(default_factory=AuxSettings)
    """none, aux_k or aux_zipf."""
    sparsity: SparsitySettings = field(default_factory=SparsitySettings)
    """none, l1, lp, tanh or l0."""
    prefixes: tuple[float, ...] = ()
    """Matryoshka: sizes of the nested autoencoders of the first features, in rising order: numbers of features, or
    shares of them if below 1. The whole autoencoder is always the last of them. [] trains only the whole."""
    multi_topk: bool = False
    """Also reconstruct with four times the budget, at an eighth of the weight."""
    selection: str = "float32"
    """Precision of the scores that propose candidates: float32 or bfloat16. The final choice is in float32."""
    b_dec_init: str = "mean"
    """Initial value of b_dec: mean or geometric_median of the first activations, or zero."""
    unit_norm: bool = True
    """Whether decoder rows keep length 1."""
    seed: int | None = None
    """Seed of the initial weights. Default: the run's seed, which also decides the order of the text."""
    init_from: str | None = None
    """A checkpoint of any trainer, or a run, whose weights training starts with. null: random weights."""
    freeze: str = "none"
    """Weights that are not trained: none, decoder (W_dec) or encoder (W_enc and b_enc). A random decoder that is never
    trained is the control that a trained one must beat."""
    skip: bool = False
    """Transcoders: also learn W_skip, a linear map from the input that is added to the reconstruction."""
    k_start: int | None = None
    """k of the first step, from which k falls on a straight line to `k`. null: `k` in every step."""
    k_steps: float = 0.2
    """Share of the steps, the first ones, over which k falls."""

    def __post_init__(self) -> None:
        if not 1 <= self.n_features < 2**31:  # their numbers are int32 in the feature database
            raise SettingError(f"n_features: {self.n_features} is not between 1 and 2,147,483,647")
        if not 1 <= self.k <= self.n_features:
            raise SettingError(f"k: {self.k} is not between 1 and n_features ({self.n_features})")
        if self.k_start is not None and not self.k <= self.k_start <= self.n_features:
            raise SettingError(
                f"k_start: {self.k_start} is not between k ({self.k}) and n_features ({self.n_features})"
            )
        if not 0 <= self.k_steps <= 1:
            raise SettingError(f"k_steps: {self.k_steps} is not a share between 0 and 1")
        if any(not 0 < size < math.inf or (size >= 1 and size != int(size)) for size in self.prefixes):
            raise SettingError(
                f"prefixes: {list(self.prefixes)} are not numbers of features, or shares of them below 1"
            )
        if any(larger <= smaller for smaller, larger in pairwise((0, *self.prefix_sizes))):
            raise SettingError(
                f"prefixes: {', '.join(map(str, self.prefix_sizes[:-1]))} of {self.n_features} features: each must be "
                "larger than the one before, at least 1, and below n_features"
            )
        if self.init_from is not None:
            object.__setattr__(self, "init_from", expanded(self.init_from, "init_from"))
            if self.b_dec_init != "mean":
                raise SettingError("b_dec_init: has no effect with init_from, whose b_dec it is; leave it out")
        _one_of("selection", self.selection, ("float32", "bfloat16"))
        _one_of("b_dec_init", self.b_dec_init, ("mean", "geometric_median", "zero"))
        _one_of("freeze", self.freeze, ("none", "decoder", "encoder"))
        self._check_combination()

    def _check_combination(self) -> None:
        """Raises SettingError if the encoder, allocation and losses do not fit each other."""
        has_budget, trains_threshold = self.allocation.name != "threshold", self.encoder.name == "jumprelu"
        if self.encoder.name in ("jumprelu", "gated") and has_budget:
            raise SettingError(
                f"encoder: {self.encoder.name} decides what is active; it goes with allocation: threshold"
            )
        if self.sparsity.name == "l0" and not trains_threshold:
            raise SettingError("sparsity: l0 trains the thresholds of encoder: jumprelu; use l1 with another encoder")
        if self.encoder.name == "tied" and self.freeze != "none":
            raise SettingError(f"freeze: {self.freeze}: encoder: tied has one table for both; use a linear encoder")
        if self.encoder.name == "tied" and self.affinity.name == "cosine":
            raise SettingError(
                "affinity: cosine divides by lengths of encoder rows, and with encoder: tied these are those of the "
                "decoder; use a linear encoder"
            )
        if self.aux.lift and self.freeze == "encoder":
            raise SettingError("aux: lift raises the encoder's biases, and freeze: encoder keeps them; leave one out")
        if self.encoder.name == "aligned" and self.freeze == "encoder":
            raise SettingError("freeze: encoder: aligned scales encoder rows in every step; use a linear encoder")
        if self.allocation.name == "group_max":
            self._check_groups()
        if has_budget:
            return
        if self.sparsity.name == "none":
            raise SettingError("sparsity: allocation: threshold has no budget; it needs sparsity: l1, lp, tanh or l0")
        if self.beta or self.affinity.name == "cosine":
            raise SettingError(f"affinity: {self.affinity.name} goes with a budget, not with allocation: threshold")
        if self.k_start is not None:
            raise SettingError("k_start: goes with a budget, not with allocation: threshold")
        if self.multi_topk:
            raise SettingError("multi_topk: goes with a budget, not with allocation: threshold")
        if self.selection != "float32":
            raise SettingError("selection: allocation: threshold selects in float32: pre-activations near 0 count too")

    def _check_groups(self) -> None:
        """Raises SettingError if the features cannot be divided into as many groups as the budget needs."""
        if self.k_start is not None:
            raise SettingError("k_start: allocation: group_max has k groups in every step; use token_choice")
        groups = self.k * (4 if self.multi_topk else 1)
        if self.n_features % groups:
            near = max(1, round(self.n_features / groups)) * groups
            what = "4 k, of multi_topk" if self.multi_topk else "k"
            raise SettingError(
                f"n_features: {self.n_features} cannot be divided into {groups} equal groups ({what}) for allocation: "
                f"group_max; set n_features to {near}, say"
            )

    def check_sites(self, *, transcodes: bool, crosses: bool = False) -> None:
        """Raises SettingError if the settings do not fit a transcoder, a crosscoder, or an autoencoder of one site."""
        if self.skip and not transcodes:
            raise SettingError("skip: W_skip of an autoencoder would be the identity; it goes with a `target` site")
        if transcodes and self.encoder.name in BOUND:
            raise SettingError(
                f"encoder: {self.encoder.name}: encoder and decoder rows of a transcoder are of different spaces; use "
                "encoder: linear"
            )
        if (transcodes or crosses) and self.needs_gradients:
            raise SettingError(
                "affinity: gradient: its gradients are those at one site that is read and written, as a transcoder or "
                "crosscoder has none; use affinity: activation"
            )
        if crosses and not self.unit_norm and self.allocation.name != "threshold":
            raise SettingError(
                "unit_norm: false: a crosscoder with a budget selects by activation times decoder length, which has to "
                "be 1 for that; use unit_norm: true, or allocation: threshold"
            )

    def k_at(self, step: int, steps: int) -> int:
        """k of step `step`, from 0, of a training of `steps`: on the line from `k_start`, rounded, and then `k`."""
        falling = self.k_steps * steps
        if self.k_start is None or step >= falling:
            return self.k
        return round(self.k_start + (self.k - self.k_start) * step / falling)

    @property
    def prefix_sizes(self) -> tuple[int, ...]:
        """Numbers of features of the nested autoencoders; the last is `n_features`, and the only one without any."""
        sizes = [round(size * self.n_features) if size < 1 else int(size) for size in self.prefixes]
        return tuple(sizes if sizes[-1:] == [self.n_features] else [*sizes, self.n_features])

    @property
    def largest_k(self) -> int:
        """The largest k of any step."""
        return self.k if self.k_start is None else self.k_start

    @property
    def beta(self) -> float:
        """Weight of the gradient in the affinity, 0 for plain activation."""
        return self.affinity.beta if self.affinity.name == "gradient" else 0.0

    @property
    def needs_gradients(self) -> bool:
        """Whether training needs the gradients of the language model's loss."""
        return self.beta > 0
