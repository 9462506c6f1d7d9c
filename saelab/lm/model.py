"""A language model: activations at named sites, logits, and runs with something else spliced in at a site.

Sites have TransformerLens' names (sites.py). TransformerLens' bridge runs attention eagerly, so values are read from
the Hugging Face modules below it instead, with sdpa attention and a forward pass that stops after the last site. Tests
check that both give the same values.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import EinopsError
from torch import Tensor, nn

from saelab.corpus.special import special_ids
from saelab.errors import SaelabError, did_you_mean
from saelab.lm.layout import POSITIONS, ROWS, Layout, layout_of, measuring_rows
from saelab.lm.sites import Site, general_name, hook, read_values
from saelab.tensors import kind

LOGITS_AT_ONCE = 2**26
"""Most logits in one pass of `activations_and_gradients` (268 MB in float32), unless a single row has more."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model."""

    parameters: int
    bytes: int
    """Size of parameters and buffers, in the model's dtype."""
    vocabulary: int
    hidden: int
    layers: int
    widths: dict[str, int]
    """d_in of each requested site."""


class LanguageModel:
    """A frozen Hugging Face model with the site names of TransformerLens.

    Rows are token ids ``[rows, context]``. Those of a corpus of text begin with BOS if the tokenizer has one.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        tokenizer: Any,
        sites: Mapping[str, Site],
        fingerprint: str,
        *,
        disputed: Mapping[str, str] | None = None,
        self_check: bool = True,
    ) -> None:
        """`disputed` is that of the `SiteMeanings`; these sites cannot be read.

        Without `self_check`, shapes decide how a site's value is laid out; necessary for a model without weights.
        """
        self.name = name
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.sites = sites
        self.fingerprint = fingerprint
        self.device = next(model.parameters()).device
        self.max_context = _max_context(model.config)
        self._disputed, self._self_check = disputed or {}, self_check
        self._layouts: dict[str, Layout] = {}
        self.special_ids = torch.tensor(sorted(special_ids(tokenizer)), dtype=torch.long, device=self.device)

    def __repr__(self) -> str:
        parameters = sum(tensor.numel() for tensor in self.model.parameters())
        sites = f"{len(self.sites):,} sites"
        return f"LanguageModel({self.name}: {parameters:,} parameters, {kind(self._head)}, {sites})"

    @property
    def unembedding(self) -> Tensor:
        """The matrix from the residual stream to logits, ``[vocabulary, d_model]``."""
        return self._head.to(self.device)

    @property
    def dtype(self) -> torch.dtype:
        """The precision that the model runs in."""
        return self._head.dtype

    @property
    def _head(self) -> Tensor:
        """`unembedding` on its own device, which a device_map may have chosen."""
        return self.model.get_output_embeddings().weight  # type: ignore[operator]

    @property
    def embeddings(self) -> int:
        """Number of token ids that the model has an embedding for; its tokenizer may have fewer, or more."""
        return self.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]

    @property
    def attention(self) -> str:
        """How attention is computed: sdpa or eager."""
        return getattr(_text_config(self.model.config), "_attn_implementation", "eager")

    @property
    def models(self) -> tuple["LanguageModel", ...]:
        """The model itself; of a `ModelPair` both."""
        return (self,)

    def owner(self, site: str) -> tuple["LanguageModel", str]:
        """The model that `site` belongs to, and the name of the site there."""
        return self, site

    def site(self, name: str) -> Site:
        """The module and side of the site `name`. Raises SaelabError, with the nearest names, if there is none."""
        if name not in self.sites:
            raise SaelabError(f"{self.name} has no site {name!r}.{did_you_mean(name, self.sites)}")
        if problem := self._disputed.get(general_name(name)):
            raise SaelabError(f"{name} of {self.name} is not what its name says: {problem}; choose another site")
        return self.sites[name]

    def width(self, site: str) -> int:
        """d_in of a site: the width of its activations, with attention heads flattened."""
        rows = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        return self.activations(rows, [site])[site].shape[-1]

    def shape(self, sites: Iterable[str] = ()) -> ModelShape:
        """The sizes of the model and of `sites`. Raises SaelabError if it has no such site."""
        parameters = list(self.model.parameters())
        vocabulary, hidden = self._head.shape
        return ModelShape(
            parameters=sum(tensor.numel() for tensor in parameters),
            bytes=sum(tensor.nbytes for tensor in [*parameters, *self.model.buffers()]),
            vocabulary=vocabulary,
            hidden=hidden,
            layers=_text_config(self.model.config).num_hidden_layers,
            widths={site: self.width(site) for site in sites},
        )

    def ordinary(self, rows: Tensor) -> Tensor:
        """True where a token is not special (saelab/corpus/special.py): bool ``[rows, context]``."""
        return ~torch.isin(rows, self.special_ids.to(rows.device))

    def scored(self, rows: Tensor) -> Tensor:
        """True where the loss of predicting the next token counts, as both are ordinary: bool ``[rows, context]``.

        The last position of a row has no next token and is False.
        """
        ordinary = self.ordinary(rows)
        return F.pad(ordinary[:, :-1] & ordinary[:, 1:], (0, 1))

    @torch.no_grad()
    def activations(self, rows: Tensor, sites: Iterable[str]) -> dict[str, Tensor]:
        """Activations ``[rows, context, d_in]`` in the model's dtype, by site, from one pass that stops after the last.

        Raises SaelabError if there is no such site, if a pass does not run it, or if it holds no activations.
        """
        names = list(dict.fromkeys(sites))
        self.measure(names)
        found = self._values(rows, names)
        if len(found) < len(names):
            raise self._never_runs(*(name for name in names if name not in found))
        return {name: self._flatten(name, value, rows).to(self.device) for name, value in found.items()}

    def _values(self, rows: Tensor, sites: list[str]) -> dict[str, Any]:
        return read_values(self.model, {name: self.site(name) for name in sites}, lambda: self._forward(rows))

    def activations_and_gradients(
        self, rows: Tensor, sites: Iterable[str]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Activations in the model's dtype, and the loss's gradients in float32, ``[rows, context, d_in]`` by site.

        The loss is the cross-entropy of the next token in the clean run, in nats, summed over the `scored` positions.
        So the gradient at a position is the effect of its activation on all later losses of its row, and it does not
        depend on the number of rows. It has seen the tokens that follow, so use it in training but not in evaluation.
        It is 0 at all positions after a row's last scored one. Like a splice, it acts only through the modules that
        read the site's value. A site's gradient does not depend on which other sites are requested.

        Runs one full forward pass, and a backward pass that ends at the lowest site. Beside the activations that the
        backward pass keeps above that site, it needs memory for at most three float32 copies of the logits of
        ``2**26 / (context * vocabulary)`` rows, at least one row; more rows take several passes. Raises SaelabError if
        a site holds no activations or if the loss does not depend on it.
        """
        names = list(dict.fromkeys(sites))
        self.measure(names)
        parts = [self._values_and_gradients(block, names) for block in rows.split(self.rows_at_once(rows.shape[1]))]
        values, gradients = ({name: torch.cat([part[i][name] for part in parts]) for name in names} for i in (0, 1))
        return values, gradients

    def rows_at_once(self, context: int) -> int:
        """Number of rows in one pass of `activations_and_gradients`."""
        return max(1, LOGITS_AT_ONCE // (context * len(self._head)))

    def _values_and_gradients(self, rows: Tensor, sites: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        ids = rows.to(self.device).long()
        found: dict[str, Tensor] = {}

        def cut(name: str) -> Callable[[Tensor], Tensor]:
            """Give the modules that read the site's value, and nothing else, a tensor of their own to read."""

            def replace(value: Tensor) -> Tensor:
                self._flatten(name, value, rows)  # raises if it cannot be done, before the rest of the pass
                # Parameters are frozen, so the graph begins at the lowest sites; sites above them must not end it.
                # Copies on both sides: a model may change both its outputs and its inputs in place.
                found[name] = value.clone() if value.requires_grad else value.clone().requires_grad_()
                return found[name].clone()

            return replace

        with torch.enable_grad(), ExitStack() as hooks:
            for name in sites:
                hooks.enter_context(hook(self.model, self.site(name), cut(name)))
            logits = self._forward(ids)
        if len(found) < len(sites):
            raise self._never_runs(*(name for name in sites if name not in found))
        # Only the loss' gradient at the logits is needed: softmax - one-hot. Computing it directly keeps fewer copies
        # of the logits than autograd through the cross-entropy.
        slope = logits.detach().softmax(-1, dtype=torch.float32)
        slope.scatter_add_(-1, ids.roll(-1, 1)[..., None], slope.new_full((*ids.shape, 1), -1.0))
        slope.masked_fill_(~self.scored(ids)[..., None], 0.0)
        slopes: tuple[Tensor | None, ...] = (None,) * len(sites)
        if logits.requires_grad:
            read = [found[name] for name in sites]
            slopes = torch.autograd.grad(logits, read, slope.to(logits.dtype), allow_unused=True)
        gradients = {}
        for name, gradient in zip(sites, slopes, strict=True):
            if gradient is None:
                raise SaelabError(f"site: the loss of {self.name} does not depend on {name}; choose another site")
            gradients[name] = self._flatten(name, gradient, rows).to(self.device).float()
        values = {name: self._flatten(name, found[name].detach(), rows).to(self.device) for name in sites}
        return values, gradients

    @torch.no_grad()
    def logits(self, rows: Tensor) -> Tensor:
        """``[rows, context, vocabulary]``."""
        return self._forward(rows)

    def spliced_logits(
        self, rows: Tensor, site: str, replace: Callable[[Tensor], Tensor], *, gradients: bool = False
    ) -> Tensor:
        """Logits of a run in which the activations at `site` are replaced, ``[rows, context, vocabulary]``.

        With `gradients`, they have a graph from what `replace` returns.
        """
        with torch.set_grad_enabled(gradients), self.spliced(rows, site, replace):
            return self._forward(rows)

    @contextmanager
    def spliced(self, rows: Tensor, site: str, replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Within the context, passes over `rows` have other activations at `site`.

        `replace` maps the activations of all ordinary tokens, ``[tokens, d_in]`` in the model's dtype, to their
        replacements. BOS and other special positions stay clean. `measure` the sites that are read in the context
        before it.
        """
        self.measure([site])

        def splice(value: Tensor) -> Tensor:
            flat = self._flatten(site, value, rows).clone()
            ordinary = self.ordinary(rows).to(flat.device)
            flat[ordinary] = replace(flat[ordinary].to(self.device)).to(flat)
            return self._layouts[site].restore(flat, value)

        with hook(self.model, self.site(site), splice):
            yield

    @torch.no_grad()
    def measure(self, sites: Iterable[str]) -> None:
        """Measure the layout of each site at its first use. Raises SaelabError if a site has no vector per token."""
        new = [site for site in sites if site not in self._layouts]
        if not new:
            return
        rows, changed = self._measuring_rows()
        before = self._values(rows, new)
        after = self._values(changed, new) if self._self_check else dict.fromkeys(before)
        for site in new:
            if site not in before or site not in after:
                raise self._never_runs(site)
            layout = layout_of(before[site], after[site])
            if isinstance(layout, str):
                raise SaelabError(f"site: {site} of {self.name} {layout}; choose another site")
            self._layouts[site] = layout

    def _measuring_rows(self) -> tuple[Tensor, Tensor]:
        """Rows ``[ROWS, POSITIONS]`` of different ordinary tokens, if there are enough, and these with changed ones."""
        if not self._self_check:
            rows = torch.zeros(ROWS, POSITIONS, dtype=torch.long, device=self.device)
            return rows, rows
        ids = torch.arange(self.embeddings, device=self.device)
        return measuring_rows(ids[self.ordinary(ids)])

    def _flatten(self, site: str, value: Tensor, rows: Tensor) -> Tensor:
        """The value at `site` as ``[rows, positions, d_in]``: one vector per token, no copy if possible."""
        try:
            return self._layouts[site].flatten(value, *rows.shape)
        except EinopsError as error:
            raise SaelabError(
                f"site: {site} of {self.name} has shape {list(value.shape)} for rows of shape {list(rows.shape)}, not "
                "one vector per token; choose another site"
            ) from error

    def _never_runs(self, *sites: str) -> SaelabError:
        return SaelabError(f"site: a forward pass of {self.name} does not run {', '.join(sites)}; choose another site")

    def _forward(self, rows: Tensor) -> Tensor:
        if self.max_context is not None and rows.shape[1] > self.max_context:
            raise SaelabError(
                f"context: {self.name} takes at most {self.max_context} tokens, the rows have {rows.shape[1]}"
            )
        return self.model(input_ids=rows.to(self.device).long(), use_cache=False).logits.to(self.device)


def _text_config(config: Any) -> Any:
    """The part of a transformers config that describes the language model."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _max_context(config: Any) -> int | None:
    """Most tokens in a row; None if the config sets no limit, as for position biases (ALiBi) and recurrent models."""
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "context_length")
    limits = (getattr(_text_config(config), name, None) for name in names)
    return next((limit for limit in limits if isinstance(limit, int)), None)
