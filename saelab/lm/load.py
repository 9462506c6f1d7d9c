"""A language model from its settings: loaded onto a device, or its outline without weights."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from saelab.errors import SaelabError, brief
from saelab.lm.architecture import Architecture, read_architecture
from saelab.lm.installers import no_installers
from saelab.lm.model import LanguageModel, ModelShape
from saelab.lm.needs import site_widths
from saelab.lm.outline import one_text_a_row, outline
from saelab.lm.pair import ModelPair
from saelab.lm.pretrained import fingerprint, model_folder
from saelab.lm.selfcheck import site_meanings
from saelab.lm.settings import ModelSettings
from saelab.lm.sites import Site, resolve_sites
from saelab.lm.weights import load_model
from saelab.memory import no_numbers


def load_language_model(settings: ModelSettings, device: str = "auto") -> LanguageModel:
    """The model of `settings` on `device` (auto, cpu, cuda or cuda:N), or on all GPUs if `settings` has a device_map.

    Raises SaelabError if it cannot be found or loaded.
    """
    target = resolve_device(device)
    if settings.device_map is not None and device not in ("auto", "cuda"):
        raise SaelabError(f"device: {device} cannot be combined with the model's device_map; use `device: auto`")
    folder = model_folder(settings.name)
    with _loading(settings):
        architecture, tokenizer = read_architecture(folder, settings.attention), _tokenizer(folder)
        sites = _sites(folder, architecture)
        model = load_model(folder, architecture, getattr(torch, settings.dtype), settings.device_map)
    with no_installers():
        disputed = site_meanings(model).disputed if settings.self_check else None
    if settings.device_map is None:
        model = nn.Module.to(model, target)
    return LanguageModel(
        settings.name,
        model,
        tokenizer,
        sites,
        fingerprint(folder),
        disputed=disputed,
        self_check=settings.self_check,
    )


@contextmanager
def outlined_language_model(settings: ModelSettings, second: ModelSettings | None = None) -> Iterator[LanguageModel]:
    """The model of `settings` without its weights; with a `second`, both as a `ModelPair`. Inside the context it runs
    on rows of any shape, and tensors have shapes but no numbers.

    Reads only the models' small files, and downloads them if necessary. Raises SaelabError if one cannot be loaded.
    """
    found = []
    for each in (settings, *([second] if second else [])):
        folder = model_folder(each.name, weights=False)
        with _loading(each):
            architecture, tokenizer = read_architecture(folder, each.attention), _tokenizer(folder)
            found.append((each, folder, tokenizer, _sites(folder, architecture)))
    with no_numbers(), one_text_a_row():
        models = []
        for each, folder, tokenizer, sites in found:
            with _loading(each):
                model = outline(folder, getattr(torch, each.dtype), each.attention)
            models.append(LanguageModel(each.name, model, tokenizer, sites, "", self_check=False))
        yield ModelPair(*models) if second else models[0]


def model_shape(settings: ModelSettings, sites: Iterable[str] = ()) -> ModelShape:
    """The shape of the model of `settings`. Raises SaelabError if it cannot be loaded or has no such site.

    Raises Uncountable if the model does not run without its weights, so that the widths of sites are not known.
    """
    with outlined_language_model(settings) as lm:
        return replace(lm.shape(), widths=site_widths(lm, sites))


@contextmanager
def _loading(settings: ModelSettings) -> Iterator[None]:
    """Turn any error into a SaelabError that names the model, silence transformers, and let nobody install packages."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with no_installers():
            yield
    except Exception as error:  # several libraries' own: damaged files, unknown architectures, missing packages
        why = str(error) if isinstance(error, SaelabError) else brief(error)
        raise SaelabError(f"model: {settings.name} cannot be loaded: {why}") from error


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # as many kinds as there are kinds of damage
        raise SaelabError(f"its tokenizer cannot be read ({brief(error)}); copy the tokenizer's files again") from error
    if not tokenizer.is_fast:
        raise SaelabError("it has no fast tokenizer (tokenizer.json); save it with transformers once more")
    return tokenizer


def _sites(folder: Path, architecture: Architecture) -> dict[str, Site]:
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    name = architecture.model_class.__name__
    if name not in SUPPORTED_ARCHITECTURES:
        raise SaelabError(
            f"TransformerLens, whose names saelab's sites have, does not know {name}; a newer version may, or choose "
            "another model"
        )
    try:
        return resolve_sites(folder)
    except Exception as error:
        raise SaelabError(f"TransformerLens cannot read it as {name} ({brief(error)})") from error


def resolve_device(name: str) -> torch.device:
    """The device `name`; auto is the first GPU, else the CPU. Raises SaelabError if this machine has no such device."""
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
            f"device: torch finds no {name} ({torch.cuda.device_count()} GPUs in all); `device: cpu` always works"
        )
    return device
