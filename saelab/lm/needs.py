"""The memory that a language model's weights and passes need. An `outlined_language_model`, without weights, will do.

The tensors of a pass are counted by running the model's own code without numbers. What libraries use inside a single
operation is left out.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from saelab.errors import SaelabError, brief
from saelab.lm.model import LanguageModel
from saelab.lm.settings import ModelSettings
from saelab.memory import Need, Place, peak_bytes


class Uncountable(SaelabError):
    """The model's code needs numbers to run, as a choice among experts may, so its passes cannot be counted."""


def weights_needs(lm: LanguageModel, settings: ModelSettings, where: Place) -> list[Need]:
    """The weights; on a GPU also in main memory, through which they are loaded if there is no device_map."""
    shape = lm.shape()
    how = f"{shape.parameters:,} parameters in {settings.dtype}"
    needs = [Need("model", shape.bytes, where, how)]
    if where == "gpu" and settings.device_map is None:
        needs.append(Need("model, while it is loaded", shape.bytes, "memory", how, ("loading",)))
    return needs


def site_widths(lm: LanguageModel, sites: Iterable[str]) -> dict[str, int]:
    """d_in of each site. Raises SaelabError if there is no such site, and Uncountable."""
    with _needs_no_numbers(lm):
        return {site: lm.width(site) for site in sites}


def pass_bytes(lm: LanguageModel, rows: int, context: int, sites: Sequence[str], *, gradients: bool = False) -> int:
    """Peak bytes of the tensors of `activations`, or of `activations_and_gradients`, which takes `rows_at_once`.

    Raises Uncountable.
    """
    rows = min(rows, lm.rows_at_once(context)) if gradients else rows
    with _needs_no_numbers(lm):
        ids = torch.zeros(rows, context, dtype=torch.long, device=lm.device)
        return peak_bytes(lambda: lm.activations_and_gradients(ids, sites) if gradients else lm.activations(ids, sites))


def logits_bytes(lm: LanguageModel, rows: int, context: int) -> int:
    """Peak bytes of the tensors of `logits`. Raises Uncountable."""
    with _needs_no_numbers(lm):
        ids = torch.zeros(rows, context, dtype=torch.long, device=lm.device)
        return peak_bytes(lambda: lm.logits(ids))


@contextmanager
def _needs_no_numbers(lm: LanguageModel) -> Iterator[None]:
    try:
        yield
    except SaelabError:
        raise
    except Exception as error:  # of the model's code, and of torch, which has many kinds
        raise Uncountable(f"model: {lm.name} does not run without its weights ({brief(error)})") from error
