"""Features of a Hugging Face model steered in place, whatever runs it: `generate`, a pipeline, a loop of your own.

    with saelab.spliced(model, sae, "blocks.12.hook_resid_post", steer={12: 4.0}):
        model.generate(**tokenizer("I think", return_tensors="pt"), max_new_tokens=30)

The formulas are those of steering.py: the activation x of every ordinary token becomes x + sum of (new - old) * W_dec
row, so the autoencoder's error stays. With `error=False` the reconstruction takes the place of x, with the same
changes. A KV cache holds keys and values of steered tokens, so `generate` writes the same text with and without it, up
to rounding. transformers' `output_hidden_states` may show the values before the change.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from saelab.analysis.settings import Intervention
from saelab.analysis.steering import check_fits, check_interventions, steered
from saelab.corpus.special import special_ids
from saelab.errors import SaelabError
from saelab.lm.in_memory import named_ids, open_site, replaced
from saelab.sae.model import SparseAutoencoder


@contextmanager
def spliced(
    model: nn.Module,
    sae: SparseAutoencoder,
    site: str | None = None,
    *,
    steer: Mapping[int, float] | None = None,
    clamp: Mapping[int, float] | None = None,
    error: bool = True,
    tokenizer: Any = None,
) -> Iterator[None]:
    """Within the context, every pass of the transformers model `model` runs with the features of `sae` changed.

    `steer` adds to the activation of each feature that it names, on every ordinary token, and `clamp` sets it (0 takes
    the feature out); both are in units of activation. With `error` and neither of them, the model is the clean one to
    the bit; without `error`, activations are replaced by their reconstructions. `site` defaults to the one the
    autoencoder was trained at.

    Padding and special tokens stay clean: those of `tokenizer`, as everywhere in saelab; without it, the BOS, EOS and
    PAD that the model's configuration names. Contexts may be nested, at several sites or at one. The model itself does
    not change, and its hooks are removed when the context ends. No gradient passes the site.

    Raises SaelabError for an unknown site or feature, a feature that is named twice, a value that is not finite, a
    transcoder, widths or devices that differ, a model in training mode, and one that TransformerLens cannot read.
    """
    site = site or sae.metadata.get("hook_name")
    if site is None:
        raise SaelabError("splice: the autoencoder does not say its site; pass site='blocks.N.hook_resid_post'")
    opened = open_site(model, site)
    check_fits(sae, type(model).__name__, site, opened.d_in, opened.device, "splice")
    interventions = [
        *(Intervention(feature, "add", value) for feature, value in (steer or {}).items()),
        *(Intervention(feature, "clamp", value) for feature, value in (clamp or {}).items()),
    ]
    check_interventions(sae, interventions)
    special = named_ids(model) if tokenizer is None else special_ids(tokenizer)
    with replaced(model, opened, special, lambda x: steered(sae, x, interventions, error=error)):
        yield
