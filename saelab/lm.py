"""A language model: activations at named sites, logits, and runs with something else spliced in at a site.

TransformerLens' TransformerBridge resolves the site names (``blocks.2.hook_resid_post``), so they mean the same for
every architecture. The bridge runs attention eagerly; the values here are therefore read from the Hugging Face
modules underneath, with sdpa attention and a forward pass that stops after the last site. Tests hold both equal.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saelab import demo
from saelab.errors import SaelabError, SettingError, brief, did_you_mean
from saelab.hub import TIMEOUT, HubUnreachable, ask_hub

_LOGITS_AT_ONCE = 2**26
"""Logits that one pass of `activations_and_gradients` makes, if a single row does not make more (268 MB in float32)."""
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]  # no pickled weights, no code


@dataclass(frozen=True)
class ModelSettings:
    name: str = "demo"
    """``demo`` (the embedded model), a Hub id such as ``gpt2``, or a local Hugging Face folder."""
    dtype: str = "float32"
    """Precision the model runs in: float32, bfloat16 or float16. SAEs always see float32."""

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise SettingError(f"dtype: {self.dtype!r} is not float32, bfloat16 or float16")


@dataclass(frozen=True)
class Site:
    """Where a hook point lies in the Hugging Face model: a module's input or its output."""

    module: str
    side: Literal["hook_in", "hook_out"]


class _Stop(Exception):
    """Ends a forward pass once every wanted site has been read."""


class LanguageModel:
    """A frozen Hugging Face model with the site names of TransformerLens.

    Rows are token ids ``[rows, context]``, BOS first where the tokenizer has one.
    """

    def __init__(
        self, name: str, model: nn.Module, tokenizer: Any, sites: Mapping[str, Site], fingerprint: str
    ) -> None:
        self.name = name
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.sites = sites
        self.fingerprint = fingerprint
        self.device = next(model.parameters()).device
        self.max_context: int | None = getattr(model.config, "max_position_embeddings", None)
        self.special_ids = torch.tensor(sorted(set(tokenizer.all_special_ids)), dtype=torch.long, device=self.device)

    @property
    def unembedding(self) -> Tensor:
        """The matrix from the residual stream to logits, ``[vocabulary, d_model]``."""
        return self.model.get_output_embeddings().weight  # type: ignore[operator]

    def site(self, name: str) -> Site:
        """Where `name` lies. Raises SaelabError, with the nearest names, if this model has no such site."""
        if name not in self.sites:
            raise SaelabError(f"site: {self.name} has no {name!r}.{did_you_mean(name, self.sites)}")
        return self.sites[name]

    def width(self, site: str) -> int:
        """d_in of a site: the width of its activations, attention heads flattened."""
        rows = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        return self.activations(rows, [site])[site].shape[-1]

    def ordinary(self, rows: Tensor) -> Tensor:
        """True where a token is not BOS or another special token: bool ``[rows, context]``."""
        return ~torch.isin(rows, self.special_ids.to(rows.device))

    def scored(self, rows: Tensor) -> Tensor:
        """True where the next token's loss counts, both tokens being ordinary: bool ``[rows, context]``.

        A row's last position has no next token and is False.
        """
        ordinary = self.ordinary(rows)
        return F.pad(ordinary[:, :-1] & ordinary[:, 1:], (0, 1))

    @torch.no_grad()
    def activations(self, rows: Tensor, sites: Iterable[str]) -> dict[str, Tensor]:
        """Activations ``[rows, context, d_in]`` in the model's dtype at every site, from one pass that stops there."""
        wanted = list(dict.fromkeys(sites))
        found: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[[Tensor], None]:
            def read(value: Tensor) -> None:
                self._check_floating(name, value)
                found[name] = value.reshape(*rows.shape, -1)
                if len(found) == len(wanted):
                    raise _Stop

            return read

        with ExitStack() as hooks:
            for name in wanted:
                hooks.enter_context(self._hook(self.site(name), keep(name)))
            try:
                self._forward(rows)
            except _Stop:
                return found
        raise self._never_runs(*(name for name in wanted if name not in found))

    def activations_and_gradients(self, rows: Tensor, site: str) -> tuple[Tensor, Tensor]:
        """Activations at `site`, in the model's dtype, and the loss's gradient, float32: ``[rows, context, d_in]``.

        The loss is the cross-entropy of the next token in the clean run, in nats, summed over the positions that are
        `scored`; so g at a position is what its activation does to all later losses of its row, whatever the number of
        rows. It knows the tokens to come: fit for training, not for evaluation. At a row's last position it is 0, and
        so are all others behind the row's last scored one. Like a splice, it goes through what reads the site's value.

        One full forward pass, and a backward pass that ends at the site. Memory, beside the activations that the
        backward pass keeps above the site: at most three float32 copies of the logits of ``2**26 / (context *
        vocabulary)`` rows, at least one; more rows are done in turn. Raises SaelabError where the site holds no
        activations or the loss does not depend on it.
        """
        vocabulary = len(self.unembedding)
        together = max(1, _LOGITS_AT_ONCE // (rows.shape[1] * vocabulary))
        pairs = [self._values_and_gradients(block, site) for block in rows.split(together)]
        return torch.cat([values for values, _ in pairs]), torch.cat([gradients for _, gradients in pairs])

    def _values_and_gradients(self, rows: Tensor, site: str) -> tuple[Tensor, Tensor]:
        ids, leaf = rows.to(self.device).long(), None

        def cut(value: Tensor) -> Tensor:
            """Make the value a leaf: parameters are frozen, so the graph begins here."""
            nonlocal leaf
            self._check_floating(site, value)
            leaf = value.detach().requires_grad_()
            return leaf

        with torch.enable_grad(), self._hook(self.site(site), cut):
            logits = self._forward(ids)
        if leaf is None:
            raise self._never_runs(site)
        if not logits.requires_grad:
            raise SaelabError(f"site: the loss of {self.name} does not depend on {site}")
        # The loss itself is not needed, and its gradient at the logits is softmax - one-hot: fewer copies of the
        # logits than autograd through the cross-entropy keeps.
        slope = logits.detach().softmax(-1, dtype=torch.float32)
        slope.scatter_add_(-1, ids.roll(-1, 1)[..., None], slope.new_full((*ids.shape, 1), -1.0))
        slope.masked_fill_(~self.scored(ids)[..., None], 0.0)
        (gradient,) = torch.autograd.grad(logits, leaf, slope.to(logits.dtype))
        return leaf.detach().reshape(*rows.shape, -1), gradient.reshape(*rows.shape, -1).float()

    @torch.no_grad()
    def logits(self, rows: Tensor) -> Tensor:
        """``[rows, context, vocabulary]``."""
        return self._forward(rows)

    @torch.no_grad()
    def spliced_logits(self, rows: Tensor, site: str, replace: Callable[[Tensor], Tensor]) -> Tensor:
        """Logits of a run in which the activations at `site` are replaced, ``[rows, context, vocabulary]``.

        `replace` maps the activations of all ordinary tokens, ``[tokens, d_in]`` in the model's dtype, to what stands
        in for them. BOS and other special positions are left clean.
        """
        ordinary = self.ordinary(rows).to(self.device)

        def splice(value: Tensor) -> Tensor:
            flat = value.reshape(*rows.shape, -1).clone()
            flat[ordinary] = replace(flat[ordinary]).to(flat.dtype)
            return flat.view_as(value)

        with self._hook(self.site(site), splice):
            return self._forward(rows)

    def _check_floating(self, site: str, value: Tensor) -> None:
        if not value.is_floating_point():
            raise SaelabError(f"site: {site} of {self.name} holds token ids, no activations")

    def _never_runs(self, *sites: str) -> SaelabError:
        return SaelabError(f"site: {self.name} never runs {', '.join(sites)} in a forward pass")

    def _forward(self, rows: Tensor) -> Tensor:
        if self.max_context is not None and rows.shape[1] > self.max_context:
            raise SaelabError(
                f"context: {self.name} takes at most {self.max_context} tokens, the rows have {rows.shape[1]}"
            )
        return self.model(input_ids=rows.to(self.device).long(), use_cache=False).logits

    def _hook(self, site: Site, function: Callable[[Tensor], Tensor | None]) -> torch.utils.hooks.RemovableHandle:
        """Call `function` on the value at `site` in every forward pass; what it returns, if anything, replaces it."""
        module = self.model.get_submodule(site.module)

        def on_input(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            if args:
                new = function(args[0])
                return None if new is None else ((new, *args[1:]), kwargs)
            new = function(kwargs["hidden_states"])
            return None if new is None else (args, {**kwargs, "hidden_states": new})

        def on_output(_: nn.Module, __: tuple, output: Any) -> Any:
            if isinstance(output, tuple):
                new = function(output[0])
                return None if new is None else (new, *output[1:])
            return function(output)

        if site.side == "hook_in":
            return module.register_forward_pre_hook(on_input, with_kwargs=True)
        return module.register_forward_hook(on_output)


def load_language_model(settings: ModelSettings, device: str = "auto") -> LanguageModel:
    """The model of `settings` on `device` (auto, cpu, cuda or cuda:N). Raises SaelabError if it cannot be had."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    target = resolve_device(device)
    folder = _model_folder(settings.name)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, settings.dtype), attn_implementation="sdpa", use_safetensors=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # of several libraries: damaged files, unknown architectures, missing packages
        raise SaelabError(f"model: {settings.name} in {folder} does not load: {brief(error)}") from error
    if not tokenizer.is_fast:
        raise SaelabError(f"model: {settings.name} has no fast tokenizer (tokenizer.json)")
    try:
        sites = _resolve_sites(model, folder)
    except Exception as error:  # TransformerLens' own kinds, for architectures it does not know
        raise SaelabError(f"model: TransformerLens cannot read {settings.name}: {brief(error)}") from error
    return LanguageModel(settings.name, nn.Module.to(model, target), tokenizer, sites, _fingerprint(folder))


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


def _resolve_sites(model: nn.Module, folder: Path) -> dict[str, Site]:
    """Every TransformerLens hook point that is the input or the output of a module of `model`.

    The bridge rewires the model it is given, so it gets a twin that shares the weights; a bridge component holds the
    twin's module, which identifies the module of the same name in `model`.
    """
    from transformer_lens.model_bridge import TransformerBridge

    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    twin = copy.deepcopy(model, shared)
    names = {id(module): name for name, module in twin.named_modules()}
    dtype = next(model.parameters()).dtype
    bridge = TransformerBridge.boot_transformers(str(folder), hf_model=twin, device="cpu", dtype=dtype)
    places: dict[int, Site] = {}
    for component in bridge.modules():
        name = names.get(id(getattr(component, "original_component", None)))
        for side in ("hook_in", "hook_out"):
            point = getattr(component, side, None)
            if name is not None and isinstance(point, nn.Module):
                places[id(point)] = Site(name, side)
    return {name: places[id(point)] for name, point in bridge.hook_dict.items() if id(point) in places}


def _model_folder(name: str) -> Path:
    if name == "demo":
        return demo.MODEL
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise SaelabError(f"model: {path} holds no config.json, so it is not a Hugging Face model folder")
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise SaelabError(f"model: there is no folder {path}.{did_you_mean(path.name, siblings)}")
    return _hub_folder(name)


def _hub_folder(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    try:
        folder = Path(snapshot_download(name, allow_patterns=_HUB_FILES, local_files_only=True))
        if _is_whole(folder):
            return folder
    except LocalEntryNotFoundError:
        pass  # not downloaded so far
    except HFValidationError as error:
        raise SaelabError(f"model: {name!r} is neither a folder nor a Hub id") from error
    try:
        files = ask_hub(lambda api: api.model_info(name, timeout=TIMEOUT)).siblings or []
    except RepositoryNotFoundError as error:
        raise SaelabError(f"model: the Hub has no model {name}, or it is private (log in, or set HF_TOKEN)") from error
    except HubUnreachable as error:
        raise SaelabError(
            f"model: {name} is no local folder, is not in the local cache, and the Hub cannot be reached ({error}). "
            f"Without a network, use `model: demo` or a copy made elsewhere: `hf download {name} --local-dir DIR`."
        ) from error
    if not any(file.rfilename.endswith(".safetensors") for file in files):
        raise SaelabError(f"model: {name} has no safetensors weights, and saelab does not unpickle files")
    disable_progress_bars()
    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # gated, cut off, or no room: the client and its transport each have their own kinds
        raise SaelabError(f"model: {name} cannot be downloaded: {brief(error)}") from error


def _is_whole(folder: Path) -> bool:
    """Whether a snapshot holds all it needs: a download may have been cut off."""
    index = folder / "model.safetensors.index.json"
    weights = {"model.safetensors"}
    if index.is_file():
        weights = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    return tokenizer and all((folder / name).is_file() for name in {"config.json", *weights})


def _fingerprint(folder: Path) -> str:
    """Hash of configuration and weights; a Hub snapshot is named by its commit, which says the same."""
    if folder.parent.name == "snapshots":
        return folder.name
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("tokenizer.json")]):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:40]
