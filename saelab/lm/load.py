"""A language model from its settings: loaded onto a device, or its outline without weights."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from saelab.errors import SaelabError, brief
from saelab.lm.model import LanguageModel, ModelShape
from saelab.lm.outline import one_text_a_row, outline
from saelab.lm.pretrained import fingerprint, model_folder
from saelab.lm.selfcheck import site_meanings
from saelab.lm.settings import ModelSettings
from saelab.lm.sites import Site, resolve_sites
from saelab.memory import no_numbers


def load_language_model(settings: ModelSettings, device: str = "auto") -> LanguageModel:
    """The model of `settings` on `device` (auto, cpu, cuda or cuda:N), or on all GPUs if `settings` has a device_map.

    Raises SaelabError if it cannot be found or loaded.
    """
    from transformers import AutoModelForCausalLM

    target = resolve_device(device)
    if settings.device_map is not None and device not in ("auto", "cuda"):
        raise SaelabError(f"device: {device} cannot be combined with the model's device_map; use `device: auto`")
    folder = model_folder(settings.name)
    with _translate_errors(f"model: {settings.name} in {folder} cannot be loaded"):
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
            f"model: {settings.name} does not fit on the GPUs in {settings.dtype}: a part of it would be loaded again "
            "in every pass, which is too slow to be useful; `model.dtype=bf16` may help"
        )
    sites = _sites(settings, folder)
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
def outlined_language_model(settings: ModelSettings) -> Iterator[LanguageModel]:
    """The model of `settings` without its weights. Inside the context it runs on rows of any shape, and tensors have
    shapes but no numbers.

    Reads only the model's small files, and downloads them if necessary. Raises SaelabError if it cannot be loaded.
    """
    folder = model_folder(settings.name, weights=False)
    sites = _sites(settings, folder)
    with no_numbers(), one_text_a_row():
        with _translate_errors(f"model: {settings.name} in {folder} cannot be loaded"):
            model, tokenizer = outline(folder, getattr(torch, settings.dtype)), _tokenizer(folder)
        yield LanguageModel(settings.name, model, tokenizer, sites, "", self_check=False)


def model_shape(settings: ModelSettings, sites: Iterable[str] = ()) -> ModelShape:
    """The shape of the model of `settings`. Raises SaelabError if it cannot be loaded or has no such site."""
    with outlined_language_model(settings) as lm:
        return lm.shape(sites)


@contextmanager
def _translate_errors(what: str) -> Iterator[None]:
    """Turn any error into a SaelabError that begins with `what`, and silence transformers' own messages."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except Exception as error:  # several libraries' own: damaged files, unknown architectures, missing packages
        raise SaelabError(f"{what}: {brief(error)}") from error


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.is_fast:
        raise ValueError("it has no fast tokenizer (tokenizer.json)")
    return tokenizer


def _sites(settings: ModelSettings, folder: Path) -> dict[str, Site]:
    with _translate_errors(f"model: TransformerLens cannot read {settings.name}"):
        return resolve_sites(folder)


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
