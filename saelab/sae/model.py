"""The sparse autoencoder: x -> sparse codes -> reconstruction.

    z = (x - b_dec) W_enc^T + b_enc        codes = z if selected, else 0        xhat = codes W_dec + b_dec

affinity.py and allocation/ decide which entries are selected, encoder.py their values. With a width d_out the
autoencoder is a transcoder: it reconstructs something else than x, and b_dec is not subtracted from x. The encoder is
stored as rows, ``W_enc [n_features, d_in]``, as the decoder is: then both gradients are the same sparse product.

A transcoder may have a skip connection: it adds W_skip x to the reconstruction. Checkpoints of other trainers may
normalise each token (normalisation.py); that is for inference only.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from saelab.codes import Codes
from saelab.errors import SaelabError
from saelab.kernels import spmm
from saelab.ranks import ALONE, Ranks, shared, total
from saelab.sae import summary
from saelab.sae.affinity import Affinity, Alignment, alignment, cosine
from saelab.sae.allocation.gathered import own_rule
from saelab.sae.allocation.rules import GroupMax, Rule, Threshold, TokenChoice
from saelab.sae.allocation.selection import Request, Selection, select
from saelab.sae.encoder import Encoder, Gated, JumpReLU, Linear, Scratch
from saelab.sae.losses import Forward, nested_products, row_lengths, squared_deviation
from saelab.sae.normalisation import normalised

LIFT = 1e-3
"""Pre-activation that `lift` gives a silent feature on its nearest token; activations have E||x||^2 = d_in."""

BY_FEATURE = ("W_enc", "b_enc", "W_dec", "log_threshold", "r_mag", "b_mag")
"""The parameters that have a row for each feature. Of processes that share the features each has some of the rows."""
BLOCK_ROWS = 4096
"""Rows of a table that are drawn, aligned or gathered at a time."""


class Batch(NamedTuple):
    """Input of one training step."""

    x: Tensor
    """``[tokens, d_in]``"""
    target: Tensor | None = None
    """The values to reconstruct, ``[tokens, d_out]``; None: x itself."""
    gradients: Tensor | None = None
    """Gradients of the language model's loss at x, ``[tokens, d_in]``, for the gradient affinity."""

    def part(self, tokens: slice) -> "Batch":
        """The batch of some of the tokens."""
        target, gradients = (None if part is None else part[tokens] for part in (self.target, self.gradients))
        return Batch(self.x[tokens], target, gradients)

    def cut(self, parts: int) -> list["Batch"]:
        """The batch as `parts` batches, or fewer if one would have less than two tokens; the first ones are longer."""
        parts = max(1, min(parts, len(self.x) // 2))
        columns = [[None] * parts if each is None else each.tensor_split(parts) for each in self]
        return [Batch(*part) for part in zip(*columns, strict=True)]


class Tables(NamedTuple):
    """Copies in bfloat16 that the products of a training step read instead of the weights."""

    W_enc: Tensor
    W_dec: Tensor


class SparseAutoencoder(nn.Module):
    """A sparse autoencoder.

    Parameters: W_enc ``[n_features, d_in]``, W_dec ``[n_features, d_out]``, b_enc ``[n_features]``, b_dec ``[d_out]``,
    all zero until `initialise` or a checkpoint sets them; W_skip ``[d_out, d_in]`` if it has a skip connection.
    """

    W_skip: nn.Parameter | None
    log_threshold: nn.Parameter | None
    r_mag: nn.Parameter | None
    b_mag: nn.Parameter | None
    threshold: Tensor | None
    """Bound that a pre-activation must exceed to be active in inference: ``[1]``, one for all, or ``[n_features]``.
    None: every token keeps its k largest."""

    def __init__(
        self,
        d_in: int,
        n_features: int,
        k: int,
        metadata: dict[str, Any] | None = None,
        d_out: int | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__()
        self.ranks = ranks
        """The processes that share the training."""
        self.part = ranks.features.part(n_features)
        """The features of this process, among all `n_features`."""
        self.all_features, n_features = n_features, self.part.stop - self.part.start
        self.d_in, self.n_features, self.k, self.d_out = d_in, n_features, k, d_out or d_in
        self.transcodes = d_out is not None
        """Whether it reconstructs something else than x."""
        self.centred = d_out is None
        """Whether b_dec is subtracted from x."""
        self.normalisation: str | None = None
        """Normalisation of each token, a key of `NORMALISATIONS`; a transcoder's output is not scaled back."""
        self.site_widths: tuple[int, ...] = (self.d_out,)
        """Widths of the sites that W_dec writes to; those of a crosscoder (side_by_side.py), or d_out only."""
        self.beta = 0.0
        """Weight of the gradient in the affinity of training; in evaluation only the oracle uses it."""
        self.power = 0.0
        """Power of the lengths of encoder rows in the cosine affinity; 0 is plain activation."""
        self.prefixes: tuple[int, ...] = (self.all_features,)
        """Numbers of features, of all processes, of the nested autoencoders of training; the last is that of all."""
        self.groups = False
        """Whether the k active features of a token come from k groups of features, one each (GroupMax)."""
        self.aligned = False
        """Whether encoder rows are scaled in training so that their products with their decoder rows are 1."""
        self.metadata = metadata or {}
        """Origin of the autoencoder: model, site, context and our own facts (the checkpoint's metadata)."""
        self.figures: dict[str, Any] = {}
        """Evaluation of the run that it was loaded from (`eval.json`), by name; not part of the checkpoint."""
        # zeros, not whatever the memory had: an autoencoder that nobody initialised reads the same everywhere
        self.W_enc = nn.Parameter(torch.zeros(n_features, d_in))
        self.b_enc = nn.Parameter(torch.zeros(n_features))
        self.W_dec = nn.Parameter(torch.zeros(n_features, self.d_out))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))
        self.register_buffer("threshold", None, persistent=False)
        self.register_parameter("log_threshold", None)
        self.register_parameter("r_mag", None)
        self.register_parameter("b_mag", None)
        self.register_parameter("W_skip", None)
        self.bandwidth = 0.0
        self._scratch = Scratch()

    def __repr__(self) -> str:
        return summary.text(self)

    def _repr_html_(self) -> str:
        return summary.html(self)

    @property
    def encoder(self) -> Encoder:
        """The encoder, with the parameters themselves."""
        return self._encoder(None)

    def _encoder(self, read: Tensor | None) -> Encoder:
        if self.r_mag is not None and self.b_mag is not None:
            return Gated(self.W_enc, self.b_enc, read, r_mag=self.r_mag, b_mag=self.b_mag)
        if self.log_threshold is None:
            return Linear(self.W_enc, self.b_enc, read)
        return JumpReLU(self.W_enc, self.b_enc, read, self.log_threshold, self.bandwidth)

    @property
    def rule(self) -> Rule:
        """The rule that selects in inference."""
        if self.r_mag is not None and self.threshold is None:
            return Threshold(self.encoder.cut())
        if self.log_threshold is not None:
            return Threshold(self.log_threshold.detach().exp())
        if self.threshold is not None:
            return Threshold(self.threshold)
        return GroupMax(self.k, self.all_features) if self.groups else TokenChoice(self.k)

    @property
    def tied(self) -> bool:
        """Whether W_enc and W_dec are one parameter."""
        return self.W_enc is self.W_dec

    @torch.no_grad()
    def encode(self, x: Tensor, gradients: Tensor | None = None) -> Codes:
        """Active features of each token: x ``[..., d_in]`` -> codes over the flattened tokens, values above 0 only.

        A token's features do not depend on the other tokens. With `gradients` of the language model's loss, of the
        shape of x, selection is by the gradient affinity, as in training: an oracle, because the gradients depend on
        the next token.
        """
        return self.encode_by(x, self.rule, gradients)

    def encode_by(self, x: Tensor, rule: Rule, gradients: Tensor | None = None) -> Codes:
        """`encode` with the entries that `rule` selects."""
        centred = self._centre(x.reshape(-1, self.d_in).to(self.W_enc.dtype))
        affinity = self._affinity(None if gradients is None else gradients.reshape(-1, self.d_in), self.W_enc)
        scratch = Scratch()  # of its own: several threads may encode at once
        # every process that shares the features has all tokens here
        ranks = Ranks(features=self.ranks.features, every=self.ranks.features)
        ((pattern, pre),), _ = select(
            self.encoder, self.W_dec, centred, [own_rule(rule, self.part)], affinity, scratch=scratch, ranks=ranks
        )
        assert pre is not None
        return pattern.with_values(self.encoder.values(pre, pattern)).compact()

    def _affinity(self, gradients: Tensor | None, W_enc: Tensor) -> Affinity | None:
        """What makes scores of pre-activations by `W_enc`; None: these are the scores. Gradients ``[tokens, d_in]``."""
        return alignment(gradients, self.beta) or cosine(W_enc, self.power)

    @torch.no_grad()
    def take_in_affinity(self) -> None:
        """Make the cosine affinity part of the weights: pre-activations become what its scores were.

        Selection and reconstruction stay the same. Rows of W_dec then have lengths other than 1.
        """
        affinity = cosine(self.W_enc, self.power)
        if affinity is not None:
            factors = affinity.factors[:, None]
            self.W_enc.mul_(factors)
            self.b_enc.mul_(affinity.factors)
            self.W_dec.div_(factors)
            self.power = 0.0

    @property
    def affine(self) -> bool:
        """Whether the reconstruction is codes W_dec + b_dec, whatever the input."""
        return self.normalisation is None and self.W_skip is None

    def decode(self, codes: Codes, x: Tensor | None = None) -> Tensor:
        """Reconstruction of each token, ``[tokens, d_out]``.

        x ``[tokens, d_in]`` is what the codes were encoded from; only an autoencoder that is not `affine` needs it.
        """
        decoded = total(spmm(codes, self.W_dec), self.ranks.features) + self.b_dec
        if self.affine:
            return decoded
        if x is None:
            raise ValueError("decode: an autoencoder that is not affine needs the input x too")
        x = x.to(decoded.dtype)
        if self.normalisation is not None and not self.transcodes:
            _, gain, shift = normalised(x, self.normalisation)
            decoded = decoded * gain + shift
        return decoded if self.W_skip is None else decoded + x @ self.W_skip.T

    def gain(self, x: Tensor) -> Tensor:
        """What a row of W_dec is multiplied by where it is written: x ``[tokens, d_in]`` -> ``[tokens, 1]``."""
        if self.normalisation is None or self.transcodes:
            return x.new_ones(len(x), 1)
        return normalised(x, self.normalisation).gain

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction ``[..., d_out]`` in the dtype of x ``[..., d_in]``."""
        decoded = self.decode(self.encode(x), None if self.affine else x.reshape(-1, self.d_in))
        return decoded.view(*x.shape[:-1], self.d_out).to(x.dtype)

    @torch.no_grad()
    def pre_activations(self, x: Tensor) -> Tensor:
        """The dense pre-activations of a few tokens: x ``[tokens, d_in]`` -> ``[tokens, n_features]``."""
        return torch.addmm(self.b_enc, self._centre(x), self.W_enc.T)

    @torch.no_grad()
    def rounded_tables(self) -> Tables:
        """Copies of W_enc and W_dec in bfloat16, in buffers that the next call overwrites."""
        return Tables(self._scratch.bf16("W_enc copy", self.W_enc), self._scratch.bf16("W_dec copy", self.W_dec))

    def training_pass(
        self,
        batch: Batch,
        rule: Rule,
        requests: Sequence[Request | None] = (),
        *,
        bf16: bool = False,
        tables: Tables | None = None,
    ) -> tuple[Forward, list[Selection | None]]:
        """The forward pass of a training step, differentiable; and the entries of each request, None if it is None.

        `rule` selects the active entries; `bf16` lets bfloat16 propose the candidates. At most one request may have a
        mask. With `tables` the pass and its gradients are those of an autoencoder with these weights, summed in
        float32; the gradients reach the parameters. Processes that share the training get the same batch, rules and
        requests; each returns what belongs to its tokens and features.

        Raises SaelabError for an autoencoder that normalises each token.
        """
        if self.normalisation is not None:
            raise SaelabError("training: this version trains no autoencoder that normalises each token")
        tokens, own = len(batch.x), self.ranks.data.part(len(batch.x))
        masked = next((request for request in requests if request is not None and request.mask is not None), None)
        if masked is not None and masked.mask is not None:
            masked = masked._replace(mask=masked.mask[self.part])
        wider = [request.rule for request in requests if request is not None and request.mask is None]
        rules = [own_rule(each, self.part) for each in (rule, *wider)]
        encoder, ranks = self._encoder(None if tables is None else tables.W_enc), self.ranks
        read = None if tables is None else tables.W_dec
        with torch.no_grad():
            affinity = self._affinity(batch.gradients, self.W_enc if tables is None else tables.W_enc)
            if isinstance(affinity, Alignment):
                affinity = replace(affinity, gradients=affinity.gradients[own])
            deviation = squared_deviation(batch.x if batch.target is None else batch.target)
            batch = batch.part(own)
            centred, scratch, W_dec = self._centre(batch.x), self._scratch, self.W_dec
            (main, *others), strongest = select(
                encoder,
                W_dec,
                centred,
                rules,
                affinity,
                bf16=bf16,
                masked=masked,
                scratch=scratch,
                ranks=ranks,
                batch=tokens,
            )
            del centred
        with record_function("decode"):
            centre = shared(self.b_dec, ranks.features) if self.centred else None
            pre = encoder.pre(main.pattern, batch.x, centre, main.pre)
            codes = main.pattern.with_values(encoder.values(pre, main.pattern))
            target = batch.x if batch.target is None else batch.target
            prefixes = tuple(min(max(size - self.part.start, 0), self.n_features) for size in self.prefixes)
            products = nested_products(codes, W_dec, read, prefixes)
            added = self.b_dec if self.W_skip is None else self.b_dec + batch.x @ self.W_skip.T
            decoded = tuple(total(each, ranks.features) + added for each in products)
            sizes = {"ranks": ranks, "batch": tokens, "prefixes": prefixes, "site_widths": self.site_widths}
            forward = Forward(
                encoder, W_dec, read, added, centre, batch.x, target, codes, pre, decoded, deviation, **sizes
            )
        found = iter(others)
        return forward, [
            None if request is None else strongest if request.mask is not None else next(found) for request in requests
        ]

    def share_buffers(self, other: "SparseAutoencoder") -> None:
        """Use the buffers of `other` for the dense products of a training step: both take steps in turn."""
        self._scratch = other._scratch

    @torch.no_grad()
    def train_thresholds(self, threshold: float, bandwidth: float) -> None:
        """Make it a JumpReLU autoencoder with trained thresholds, float32.

        All begin at `threshold`, or at half the bandwidth if that is larger.
        """
        start = torch.full((self.n_features,), max(threshold, bandwidth / 2), device=self.W_enc.device)
        self.threshold, self.bandwidth, self.log_threshold = None, bandwidth, nn.Parameter(start.float().log())

    @torch.no_grad()
    def train_magnitudes(self) -> None:
        """Make it a gated autoencoder; its magnitudes are at first those of the gate."""
        self.threshold = None
        self.r_mag, self.b_mag = (nn.Parameter(torch.zeros_like(self.b_enc)) for _ in range(2))

    def tie(self) -> None:
        """Make W_enc and W_dec one parameter, which is named W_enc."""
        self.W_dec = self.W_enc

    @torch.no_grad()
    def align_encoder(self) -> None:
        """Scale every encoder row so that its product with its decoder row is 1.

        A row whose product is below 0.1, which no small step makes of 1, becomes its decoder row, scaled.
        """
        for encoder, decoder in zip(self.W_enc.split(BLOCK_ROWS), self.W_dec.split(BLOCK_ROWS), strict=True):
            products = (encoder * decoder).sum(1, keepdim=True)
            lost = products < 0.1
            encoder.copy_(torch.where(lost, decoder, encoder))
            squares = decoder.square().sum(1, keepdim=True).clamp_min(1e-12)
            encoder.div_(torch.where(lost, squares, products))

    @torch.no_grad()
    def renormalise_decoder(self) -> None:
        """Scale every decoder row to unit length (`row_lengths`)."""
        self.W_dec.div_(row_lengths(self.W_dec, self.site_widths)[:, None].clamp_min(1e-12))

    @torch.no_grad()
    def whole(self) -> "SparseAutoencoder | None":
        """The autoencoder with the features of all processes, on the first of them; None on the others.

        All processes call it. If none share the features it is the autoencoder itself.
        """
        axis, first = self.ranks.features, self.ranks.first
        if axis.size == 1:
            return self if first else None
        whole = copy.deepcopy(self) if first else None
        for name, rows in self.named_parameters():
            if name not in BY_FEATURE:
                continue
            table = rows.new_empty(self.all_features, *rows.shape[1:]) if first else None
            for start in range(0, max(part.stop - part.start for part in axis.parts(self.all_features)), BLOCK_ROWS):
                blocks = axis.gather(rows.data[start : start + BLOCK_ROWS])
                for part, block in zip(axis.parts(self.all_features), blocks, strict=True):
                    if table is not None:
                        table[part.start + start : part.start + start + len(block)] = block
            if whole is not None and table is not None:
                setattr(whole, name, nn.Parameter(table))
        if whole is not None:
            if self.tied:
                whole.tie()
            whole.ranks, whole.part, whole.n_features = ALONE, slice(0, self.all_features), self.all_features
        return whole

    @torch.no_grad()
    def lift(self, x: Tensor, mask: Tensor, tables: Tables | None = None) -> None:
        """Raise the bias of those features of `mask` that no token of x activates, until the nearest one just does.

        No gradient reaches a feature whose pre-activations are all negative, whatever the auxiliary loss; it reaches
        a lifted one. x ``[tokens, d_in]``, mask ``[n_features]`` bool; `tables` as in `training_pass`.
        """
        # on a CPU only the features of the mask; elsewhere all, or the host would wait to know which they are
        mask = mask[self.part]
        which = mask.nonzero().squeeze(1) if mask.device.type == "cpu" else torch.arange(len(mask), device=mask.device)
        for rows in which.split(4096):
            own = x[self.ranks.data.part(len(x))]
            W = (self.W_enc if tables is None else tables.W_enc)[rows].to(self.W_enc.dtype)
            pre = torch.addmm(self.b_enc[rows], self._centre(own), W.T)
            highest = pre.amax(0) if len(pre) else pre.new_full((len(rows),), -torch.inf)
            highest = self.ranks.data.max_(highest)
            self.b_enc[rows] += torch.where(mask[rows] & (highest <= 0), LIFT - highest, 0.0)

    def _centre(self, x: Tensor) -> Tensor:
        """x as the encoder's rows read it."""
        if self.normalisation is not None:
            x = normalised(x, self.normalisation).x
        return x - self.b_dec if self.centred else x
