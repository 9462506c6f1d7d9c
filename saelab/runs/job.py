"""A job: settings with the model and text, or the array, that they name, and hashes that identify the inputs of a
result."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, reduce
from operator import attrgetter, getitem
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saelab.activations.array.rows import Array, open_array
from saelab.activations.cache.layout import manifest_checksum
from saelab.activations.stream import check_losses, provenance
from saelab.corpus import Corpus, open_corpus
from saelab.errors import SaelabError
from saelab.files import translate_read_errors
from saelab.lm.load import load_language_model, resolve_device
from saelab.lm.model import LanguageModel
from saelab.lm.pair import ModelPair
from saelab.lm.settings import ModelSettings
from saelab.progress import Say, quiet
from saelab.ranks import ALONE, Ranks
from saelab.runs import folder
from saelab.runs.config import RunSettings, find_config, load_config, located, settings_from
from saelab.runs.from_hub import resolve
from saelab.sae.allocation.methods import allocation_of
from saelab.sae.checkpoint import checksum
from saelab.training.distributed import own_device

Config = str | Path | Mapping[str, Any] | RunSettings


_ADDED = {
    "sae": ("seed", "k_start", "k_steps", "prefixes", "skip", "init_from"),
    "sae.affinity": ("power",),
    "sae.sparsity": ("p", "slope"),
    "training": ("schedule", "accumulate", "precision", "ema", "resample"),
}
"""Settings that earlier versions did not have."""


@dataclass(frozen=True)
class Job:
    """Settings with the model and text, or the array, that they name, each loaded at first use."""

    settings: RunSettings
    say: Say = quiet
    ranks: Ranks = ALONE
    """The processes that do the job together; each has a Job."""

    @cached_property
    def array(self) -> Array | None:
        """The array that the activations come from; None if they come from a language model."""
        source = self.settings.activations.array
        if source is None:
            return None
        device = resolve_device(own_device(self.settings.device))
        array = open_array(source, self.settings.corpus.held_out, device)
        self.say(f"activations: {array.about}")
        return array

    @property
    def model(self) -> LanguageModel | Array:
        """What gives the activations of `held_out`."""
        return self.array or self.lm

    @property
    def origin(self) -> tuple[LanguageModel, Corpus] | tuple[Array, None]:
        """What the activations come from: model and text, or an array."""
        return (self.lm, self.corpus) if self.array is None else (self.array, None)

    @cached_property
    def lm(self) -> LanguageModel:
        if self.settings.activations.array is not None:
            raise SaelabError(
                f"{self.settings.out}: its activations come from an array, {self.settings.activations.array.path}, so "
                "there is no language model and no text, which this needs"
            )
        model, second = self.settings.model, self.settings.second_model
        self.say(f"model: {model.name}" + (f", second model: {second.name}" if second else ""))
        device = own_device(self.settings.device)
        lm = load_language_model(model, device)
        if second is not None:
            lm = ModelPair(lm, load_language_model(second, device))
        check_model(lm, self.settings)
        for each, settings in zip(lm.models, (model, second), strict=False):
            if settings and each.attention == "eager" and settings.attention == "auto":
                self.say(
                    f"note: {each.name} has no sdpa attention, so its attention is eager: the same values, with memory "
                    "for a score of each pair of positions"
                )
        return lm

    @property
    def loaded(self) -> bool:
        """Whether the model is in memory already."""
        return "lm" in vars(self)

    @cached_property
    def corpus(self) -> Corpus:
        embeddings = self.lm.embeddings
        corpus = open_corpus(self.settings.corpus, self.lm.tokenizer, self.settings.context, embeddings=embeddings)
        self.say(f"corpus: {corpus.about}")
        return corpus

    @cached_property
    def start(self) -> str | None:
        """Hash of the checkpoint that training starts with, or None without one.

        A training that has begun does not need the checkpoint again: if it cannot be read any more, the hash is that in
        the record of the run, or "gone" without one.
        """
        checkpoint = self.settings.sae.init_from
        try:
            return checkpoint and checksum(resolve(checkpoint))
        except SaelabError:
            known = folder.training_record(Path(self.settings.out)).get("start") or {}
            return known["sha256"] if known.get("checkpoint") == checkpoint else "gone"

    def beside(self, settings: RunSettings, say: Say) -> "Job":
        """A job with another autoencoder or site, on the model and text of this one, which are loaded once.

        Raises SaelabError if the model has no such site.
        """
        job = Job(settings, say, self.ranks)
        if self.array is not None:
            vars(job).update(array=self.array)
            return job
        lm = self.lm if settings.second_model else self.lm.models[0]
        check_model(lm, settings)
        vars(job).update(lm=lm, corpus=self.corpus)
        return job

    def held_out(self, tokens: int) -> Tensor:
        """The first held-out rows, of about `tokens` tokens, ``[rows, context]``; of an array ``[rows, 1]``."""
        if self.array is not None:
            return torch.from_numpy(self.array.held_out_rows(tokens))
        return torch.from_numpy(self.corpus.held_out_rows(tokens))

    def rows_at_once(self, rows_per_forward: int) -> int:
        """`rows_per_forward`; of an array the rows that have as many tokens."""
        return rows_per_forward if self.array is None else rows_per_forward * self.settings.context

    @property
    def ce_tokens(self) -> int:
        """Tokens on which evaluation measures losses: none of an array, which no model goes on from."""
        return self.settings.eval.ce_tokens if self.array is None else 0

    def provenance(self) -> dict[str, Any]:
        """The facts of model and text, or of the array, that decide the activations."""
        if self.array is not None:
            return {"array": self.array.identity}
        facts = provenance(self.lm, self.corpus, special_tokens=self.settings.activations.special_tokens)
        return json.loads(json.dumps(facts))

    def check_losses(self) -> None:
        """Raises SettingError if the rows of the text are too short for the losses that evaluation needs."""
        if self.array is None:
            check_losses(self.corpus)

    def report_empty_documents(self) -> None:
        """Reports how many documents of the corpus were left out because they are empty, if any was read."""
        empty = None if self.array is not None else self.corpus.empty_documents()
        if empty is not None:
            self.say(f"corpus: {empty}")

    def training_inputs(self) -> str:
        """Hash of everything that the trained weights depend on."""
        settings = asdict(self.settings)
        parts = {name: settings[name] for name in ("site", "seed", "context", "activations", "sae", "training")}
        parts["training"] = {k: v for k, v in parts["training"].items() if k not in ("log", "log_every", "checkpoint")}
        for section, names in _ADDED.items():  # by default the same weights as of versions without these settings
            defaults = type(attrgetter(section)(self.settings))()
            found = reduce(getitem, section.split("."), parts)
            for name in names:
                if found[name] == getattr(defaults, name):
                    del found[name]
        if self.settings.sae.init_from is not None:  # its content counts, not its folder
            parts["sae"]["init_from"] = self.start
        cache = self.settings.activations.cache
        inputs, max_norm, array = (parts["activations"].pop(name) for name in ("inputs", "max_norm", "array"))
        if cache is not None:  # its content counts, not its folder
            contents = manifest_checksum(Path(cache.path))
            parts["activations"] = {"cache": contents, "buffer_tokens": cache.buffer_tokens}
        parts |= self._further_sites()
        if array is not None:
            parts["activations"] = {"buffer_tokens": array["buffer_tokens"]}
        if max_norm is not None:
            parts["activations"]["max_norm"] = max_norm
        if inputs != "scale":
            parts["activations"]["inputs"] = inputs
        if allocation_of(self.settings.sae).calibrated:  # thresholds are set on the tokens after evaluation's
            parts["eval_tokens"] = self.settings.eval.tokens
        return _hash(parts | self._fingerprints())

    def _further_sites(self) -> dict[str, Any]:
        """The sites besides `site`; none for an autoencoder, so that its hashes are those of earlier versions."""
        found = {"target": self.settings.target, "more_sites": self.settings.more_sites}
        return {name: value for name, value in found.items() if value}

    def result_inputs(self, run: Path, section: Any) -> str:
        """Hash of everything that a result on held-out text depends on."""
        path = folder.weights(run)
        with translate_read_errors(path, "the weights of the autoencoder", "Train the run again."):
            weights = hashlib.sha256(path.read_bytes()).hexdigest()
        return _hash(
            {
                "weights": weights,
                "settings": asdict(section),
                **self._fingerprints(),
                "site": self.settings.site,
                **self._further_sites(),
            }
            | ({} if self.array is None else {"labels": self.array.labels_fingerprint})
        )

    def _fingerprints(self) -> dict[str, Any]:
        """What identifies the activations in the hashes."""
        if self.array is not None:
            return {"array": self.array.fingerprint}
        found = _of_model(self.lm, self.settings.model) | {"corpus": self.corpus.fingerprint}
        second = self.settings.second_model
        return found if second is None else found | {"second": _of_model(self.lm.models[1], second)}


def _of_model(lm: LanguageModel, settings: ModelSettings) -> dict[str, Any]:
    return {"dtype": settings.dtype, "attention": lm.attention, "model": lm.fingerprint}


def check_model(lm: LanguageModel, settings: RunSettings, sites: Iterable[str] | None = None) -> None:
    """Raises SaelabError, with the name of the setting, if `lm` lacks one of the sites, by default those of `settings`,
    or does not take rows of its context."""
    named = {"site": (settings.site,), "target": (settings.target,), "more_sites": settings.more_sites}
    for site in settings.sites.all if sites is None else sites:
        try:
            lm.site(site)
        except SaelabError as error:
            setting = next((name for name, theirs in named.items() if site in theirs), "cache.sites")
            raise SaelabError(f"{setting}: {error}") from error
    context = settings.context
    if lm.max_context is not None and context > lm.max_context:
        raise SaelabError(
            f"context: {lm.name} takes at most {lm.max_context} tokens, not {context}; set context={lm.max_context} or "
            "less"
        )


def check_spread(settings: RunSettings, processes: int) -> None:
    """Raises SaelabError if each of several processes would spread its model over all GPUs."""
    if processes > 1 and any(model and model.device_map for model in (settings.model, settings.second_model)):
        raise SaelabError(
            "model.device_map: it spreads one process over all GPUs, but under torchrun each process has one GPU; "
            "remove it, or run without torchrun"
        )


def settings_of(config: Config, overrides: Iterable[str] = ()) -> RunSettings:
    """Settings from a file, from the name of a shipped config, from a mapping, or from settings; paths are absolute.

    Only `out` may stay relative, since messages show it.
    """
    if isinstance(config, RunSettings | Mapping):
        return located(settings_from(asdict(config) if isinstance(config, RunSettings) else config, overrides))
    return located(load_config(find_config(config), overrides))


def _hash(parts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]
