"""A language model from its settings: loaded onto a device, or its outline without weights."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from saelab.errors import SaelabError, brief
from saelab.lm.model import LanguageModel, ModelShape
from saelab.lm.outline import no_numbers, one_text_a_row, outline
from saelab.lm.pretrained import fingerprint, model_folder
from saelab.lm.settings import ModelSettings
from saelab.lm.sites import Site, resolve_sites


def load_language_model(settings: ModelSettings, device: str = "auto") -> LanguageModel:
    """The model of `settings` on `device` (auto, cpu, cuda or cuda:N), or over all GPUs where it has a device_map.

    Raises SaelabError if it cannot be had.
    """
    from transformers import AutoModelForCausalLM

    target = resolve_device(device)
    if settings.device_map is not None and device not in ("auto", "cuda"):
        raise SaelabError(f"device: {device} does not go with the model's device_map; leave it at `device: auto`")
    folder = model_folder(settings.name)
    with _told(f"model: {settings.name} in {folder} does not load"):
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, settings.dtype),
            attn_implementation="sdpa",
            use_safetensors=True,
            device_map=settings.device_map,
        )
        tokenizer = _tokenizer(folder)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise SaelabError(
            f"model: {settings.name} does not fit into the GPUs in {settings.dtype}: a part of it would be fetched "
            "anew in every pass, which is too slow to be of use; `model.dtype=bf16` may help"
        )
    sites = _sites(settings, folder)
    if settings.device_map is None:
        model = nn.Module.to(model, target)
    return LanguageModel(settings.name, model, tokenizer, sites, fingerprint(folder))


@contextmanager
def outlined_language_model(settings: ModelSettings) -> Iterator[LanguageModel]:
    """The model of `settings` without its weights: within, it runs on rows of any shape, and no tensor has numbers.

    Of the model's files only the small ones are read, and fetched if need be. Raises SaelabError if it cannot be had.
    """
    folder = model_folder(settings.name, weights=False)
    sites = _sites(settings, folder)
    with no_numbers(), one_text_a_row():
        with _told(f"model: {settings.name} in {folder} does not load"):
            model, tokenizer = outline(folder, getattr(torch, settings.dtype)), _tokenizer(folder)
        yield LanguageModel(settings.name, model, tokenizer, sites, "")


def model_shape(settings: ModelSettings, sites: Iterable[str] = ()) -> ModelShape:
    """The shape of the model of `settings`. Raises SaelabError if it cannot be had, or has no such site."""
    with outlined_language_model(settings) as lm:
        return lm.shape(sites)


@contextmanager
def _told(what: str) -> Iterator[None]:
    """A library's complaint as a SaelabError that begins with `what`, and nothing else of what transformers says."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except Exception as error:  # of several libraries: damaged files, unknown architectures, missing packages
        raise SaelabError(f"{what}: {brief(error)}") from error


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.is_fast:
        raise ValueError("it has no fast tokenizer (tokenizer.json)")
    return tokenizer


def _sites(settings: ModelSettings, folder: Path) -> dict[str, Site]:
    with _told(f"model: TransformerLens cannot read {settings.name}"):
        return resolve_sites(folder)


def resolve_device(name: str) -> torch.device:
    """auto is the first GPU if there is one. Raises SaelabError for a device this machine does not have."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SaelabError(f"device: {name!r} is not auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise SaelabError(f"device: {name!r} is not auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SaelabError(
            f"device: {name} asked for, but torch sees {torch.cuda.device_count()} GPUs; `device: cpu` works"
        )
    return device
