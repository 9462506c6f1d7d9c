"""The files of a pretrained model: embedded, in a local folder, or on the Hub and downloaded once."""

import hashlib
import json
import re
from pathlib import Path

from saelab import demo
from saelab.errors import SaelabError, brief, did_you_mean
from saelab.hub import TIMEOUT, HubUnreachable, ask_hub

_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json")
_DESCRIPTION = ["*.json", "*.txt", "*.model"]
_WEIGHTS = ["*.safetensors"]  # no pickles and no code
_SHA256 = re.compile(r"[0-9a-f]{64}")


def model_folder(name: str, weights: bool = True) -> Path:
    """The folder with configuration, tokenizer and, if `weights`, the weights of the model `name`.

    Files of a Hub id are downloaded if they are not in the local cache. Raises SaelabError if they cannot be found or
    downloaded.
    """
    if name == "demo":
        return demo.MODEL
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise SaelabError(f"model: {path} has no config.json, so it is not a Hugging Face model folder")
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise SaelabError(f"model: there is no folder {path}.{did_you_mean(path.name, siblings)}")
    return _hub_folder(name, weights)


def _hub_folder(name: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    patterns = [*_DESCRIPTION, *_WEIGHTS] if weights else _DESCRIPTION
    try:
        folder = Path(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
        if _is_whole(folder, weights):
            return folder
    except LocalEntryNotFoundError:
        pass  # not downloaded yet
    except HFValidationError as error:
        raise SaelabError(f"model: {name!r} is neither a folder nor a Hub id") from error
    try:
        files = ask_hub(lambda api: api.model_info(name, timeout=TIMEOUT)).siblings or []
    except RepositoryNotFoundError as error:
        raise SaelabError(f"model: the Hub has no model {name}, or it is private (log in, or set HF_TOKEN)") from error
    except HubUnreachable as error:
        raise SaelabError(
            f"model: {name} is not a local folder and not in the local cache, and the Hub cannot be reached ({error}). "
            f"Without a network, use `model: demo` or a copy made elsewhere: `hf download {name} --local-dir DIR`."
        ) from error
    if not any(file.rfilename.endswith(".safetensors") for file in files):
        raise SaelabError(f"model: {name} has no safetensors weights, and saelab does not unpickle files")
    disable_progress_bars()
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # gated, interrupted, disk full: the client and its transport raise their own kinds
        raise SaelabError(f"model: {name} cannot be downloaded: {brief(error)}") from error


def _is_whole(folder: Path, weights: bool) -> bool:
    """Whether a snapshot has all necessary files; its download may have been interrupted."""
    needed = {"config.json"}
    index = folder / "model.safetensors.index.json"
    if weights and index.is_file():
        needed |= set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    elif weights:
        needed.add("model.safetensors")
    tokenizer = any((folder / name).is_file() for name in _TOKENIZER)
    return tokenizer and all((folder / name).is_file() for name in needed)


def fingerprint(folder: Path) -> str:
    """Hash of the configuration and weights: the same for a model on the Hub and for a copy of it in any folder."""
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("tokenizer.json")]):
        digest.update(_sha256(path))
    return digest.hexdigest()[:40]


def _sha256(path: Path) -> bytes:
    """The sha256 of a file. The Hub's client names large files by it, so that they need not be read."""
    blob = path.resolve()
    if path.is_symlink() and blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name):
        return bytes.fromhex(blob.name)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
