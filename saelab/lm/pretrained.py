"""The files of a pretrained model: embedded, in a local folder, or on the Hub and downloaded once."""

import hashlib
import json
import re
from collections.abc import Collection
from pathlib import Path

from saelab import demo
from saelab.errors import SaelabError, brief, did_you_mean
from saelab.hub import TIMEOUT, HubUnreachable, ask_hub

_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
_SMALL_FILES = ["*.json", "*.txt", "*.model"]
_DOWNLOADED = ["*.safetensors"]  # no pickles and no code
_SHA256 = re.compile(r"[0-9a-f]{64}")


def model_folder(name: str, weights: bool = True) -> Path:
    """The folder with configuration, tokenizer and, if `weights`, the weights of the model `name`.

    Files of a Hub id are downloaded if they are not in the local cache. Raises SaelabError if they cannot be found or
    downloaded.
    """
    if name == "demo":
        return demo.MODEL
    try:
        path = Path(name).absolute()
        files = {entry.name for entry in path.iterdir()} if path.is_dir() else None
        is_file = path.is_file()
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    except OSError as error:  # not readable, or a name that is too long
        raise SaelabError(f"model: {name[:200]} cannot be read: {brief(error)}") from error
    if files is not None:
        lacking = _lacking(files, weights)
        if lacking:
            raise SaelabError(f"model: {path} {lacking}")
        return path
    if is_file:
        raise SaelabError(f"model: {path} is a file; name the Hugging Face folder with config.json and the weights")
    if Path(name).is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise SaelabError(f"model: there is no folder {path}.{did_you_mean(path.name, siblings)}")
    return _hub_folder(name, weights, siblings)


def _lacking(files: Collection[str], weights: bool) -> str:
    """What a folder with these files lacks to be a model's, and what to do about it; "" if it lacks nothing."""
    if "adapter_config.json" in files:
        return (
            "is an adapter (LoRA), or has one beside its weights; merge it into its base model with peft's "
            "`merge_and_unload()`, and save the result, without adapter_config.json, as a folder of its own"
        )
    if _CONFIG not in files:
        if any(file.endswith(".gguf") for file in files):
            return "has GGUF files, which saelab does not read; use the Hugging Face folder that they were made from"
        return "has no config.json, so it is not a Hugging Face model folder" if files else "is empty: no config.json"
    if not any(file in files for file in _TOKENIZER):
        return "has no tokenizer (tokenizer.json); copy the tokenizer's files from the model that it was trained from"
    if not weights or _WEIGHTS in files or _INDEX in files:
        return ""
    if any(file.endswith(".safetensors") for file in files):
        return f"has safetensors files, but neither {_WEIGHTS} nor {_INDEX}, which lists the files of a divided model"
    if any(file.endswith((".bin", ".pt", ".pth", ".h5", ".msgpack")) for file in files):
        return (
            "has no safetensors weights, and saelab does not unpickle files; write them with transformers: "
            "`AutoModelForCausalLM.from_pretrained(MODEL).save_pretrained(DIR)`"
        )
    return f"has no weights ({_WEIGHTS})"


def _hub_folder(name: str, weights: bool, siblings: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    patterns = [*_SMALL_FILES, *_DOWNLOADED] if weights else _SMALL_FILES
    nearest = did_you_mean(name, [*_cached_models(), *siblings, "demo"])
    try:
        folder = Path(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
        if _is_whole(folder, weights):
            return folder
    except LocalEntryNotFoundError:
        pass  # not downloaded yet
    except HFValidationError as error:
        raise SaelabError(f"model: {name[:200]!r} is neither a folder nor a Hub id.{nearest}") from error
    try:
        files = {file.rfilename for file in ask_hub(lambda api: api.model_info(name, timeout=TIMEOUT)).siblings or []}
    except RepositoryNotFoundError as error:
        raise SaelabError(
            f"model: there is no folder {name}, and the Hub has no model {name}, or it is private or gated (log in, or "
            f"set HF_TOKEN).{nearest}"
        ) from error
    except HubUnreachable as error:
        raise SaelabError(
            f"model: {name} is not a local folder and not in the local cache, and the Hub cannot be reached ({error}). "
            "Without a network, use `model: demo` or a copy made elsewhere: "
            f"`hf download {name} --local-dir DIR`.{nearest}"
        ) from error
    lacking = _lacking(files, weights)
    if lacking:
        raise SaelabError(f"model: {name} on the Hub {lacking}")
    disable_progress_bars()
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # gated, interrupted, disk full: the client and its transport raise their own kinds
        raise SaelabError(f"model: {name} cannot be downloaded: {brief(error)}") from error


def _cached_models() -> list[str]:
    """The ids of the models in the Hub's local cache."""
    from huggingface_hub import constants

    return [path.name[len("models--") :].replace("--", "/") for path in Path(constants.HF_HUB_CACHE).glob("models--*")]


def _is_whole(folder: Path, weights: bool) -> bool:
    """Whether a snapshot has all necessary files; its download may have been interrupted."""
    if _lacking({path.name for path in folder.iterdir()}, weights):
        return False
    return not weights or all(path.is_file() for path in weight_files(folder))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers reads from `folder`; they may be missing.

    Raises SaelabError if the index that lists them is damaged.
    """
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        return [folder / file for file in sorted(set(index["weight_map"].values()))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SaelabError(f"model: {folder / _INDEX} is damaged ({brief(error)}); download it again") from error


def fingerprint(folder: Path) -> str:
    """Hash of the configuration and weights: the same for a model on the Hub and for a copy of it in any folder."""
    digest = hashlib.sha256()
    for path in sorted([folder / _CONFIG, *folder.glob("*.safetensors"), *folder.glob("tokenizer.json")]):
        digest.update(_sha256(path))
    return digest.hexdigest()[:40]


def _sha256(path: Path) -> bytes:
    """The sha256 of a file. The Hub's client names large files by it, so that they need not be read."""
    blob = path.resolve()
    if path.is_symlink() and blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name):
        return bytes.fromhex(blob.name)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
