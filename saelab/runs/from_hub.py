"""Autoencoders on the Hugging Face Hub by their ids: `resolve` makes them local folders, `load` loads them.

An id is ``user/repo``, ``user/repo/path/in/repo`` or ``user/repo@revision/path``, as in the Hub's addresses. (Paths in
repositories contain colons, so none separates repository and path.)
The releases of `RELEASES` also go by SAELens' names, ``release/id``. Nothing is downloaded unless the Hub is asked by
such an id, and nothing but the files of the one autoencoder.
"""

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch

from saelab.errors import SaelabError, brief, did_you_mean, printable
from saelab.files import expanded
from saelab.hub import TIMEOUT, HubUnreachable, ask_hub
from saelab.sae.checkpoint import load as load_local
from saelab.sae.interop.recognise import SUFFIXES, USUAL
from saelab.sae.model import SparseAutoencoder

RELEASES = (
    (r"(gemma-scope-(?:2b|9b|27b)-(?:pt|it)-(?:res|att|mlp|transcoders))/(.+)", r"google/\1/\2"),
    (r"(gemma-scope-2-(?:270m|1b|4b|12b|27b)-(?:pt|it))-res/(.+)", r"google/\1/resid_post/\2"),
    (r"gpt2-small-res-jb/(.+)", r"jbloom/GPT2-Small-SAEs-Reformatted/\1"),
    (
        r"gpt2-small-resid-post-v5-32k/blocks\.(\d+)\.hook_resid_post",
        r"jbloom/GPT2-Small-OAI-v5-32k-resid-post-SAEs/v5_32k_layer_\1.pt",  # a folder
    ),
    (
        r"gpt2-small-(resid-post|resid-mid|mlp-out|attn-out)-v5-(32k|128k)/blocks\.(\d+)\.hook_\w+",
        r"jbloom/GPT2-Small-OAI-v5-\2-\1-SAEs/v5_\2_layer_\3",
    ),
    *(
        (
            rf"llama_scope_lx{site}_(8|32)x/l(\d+){site}_\1x",
            rf"fnlp/Llama3_1-8B-Base-LX{site.upper()}-\1x/Llama3_1-8B-Base-L\2{site.upper()}-\1x",
        )
        for site in "ram"
    ),
)
"""Names of SAELens, as regular expressions, and the ids that they stand for."""
_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([\w.%-]+))?(?:/(.+))?")
_SAFE = tuple(name for name in USUAL if not name.endswith((".pt", ".pth")))
_BESIDE = ("cfg.json", "config.json", "hyperparams.json", "activation_scaler.json", "eval.json")
"""Small files, in the folder of the weights or the one above, that say how the weights are used."""
_WHITENING = "activation_whitening.safetensors"


class HubId(NamedTuple):
    """An autoencoder on the Hub."""

    repo: str
    revision: str | None
    path: str
    """In the repository; "" for its root."""

    def __str__(self) -> str:
        return f"{self.repo}{f'@{self.revision}' if self.revision else ''}{f'/{self.path}' if self.path else ''}"


def load(path: str | Path, device: torch.device | str = "cpu") -> SparseAutoencoder:
    """The autoencoder in `path`: a run folder, a checkpoint of saelab or another trainer, or an id on the Hub.

    See `saelab.sae.checkpoint.load` about local ones, and `resolve` about ids. Raises SaelabError as they do.
    """
    return load_local(resolve(path), device)


def resolve(name: str | Path) -> Path:
    """The local folder or file of an autoencoder: `name` itself if it is there, or cannot be an id of the Hub.

    Else the Hub is asked, and what is not in its local cache is downloaded: only the files of that autoencoder, and no
    file that is unpickled unless the id is that of such a file, which is then read with ``weights_only=True``.

    Raises SaelabError if the Hub cannot be reached, has no such repository, revision or path, does not let this user
    read it, or has several autoencoders there.
    """
    wanted = parse(name)
    if wanted is None:
        return Path(expanded(name))
    cached = _cached(wanted)
    if cached is not None and (place := _chosen(cached, wanted)) is not None and place[0] == wanted.path:
        return cached.folder / place[0]
    return _downloaded(wanted, cached)


def parse(name: str | Path) -> HubId | None:
    """The id that `name` is; None if it is a path: it is there, or the folder that it begins with is."""
    text = str(name)
    if text.startswith(("/", ".", "~", "$")):
        return None
    try:
        if Path(expanded(name)).exists() or Path(text.split("/")[0]).exists():
            return None
    except OSError:  # a name that is too long for a file is too long for an id
        return None
    for pattern, stands_for in RELEASES:
        if re.fullmatch(pattern, text):
            text = re.sub(pattern, stands_for, text)
            break
    found = _ID.fullmatch(text.rstrip("/"))
    if found is None:
        return None
    path = str(PurePosixPath(found[3] or ""))
    if ".." in path.split("/"):
        return None
    return HubId(found[1], found[2] and found[2].replace("%2F", "/"), "" if path == "." else path)


class _Files(NamedTuple):
    """What there is of a repository."""

    names: list[str]
    folder: Path
    """Where they are, if they are local."""


def _cached(wanted: HubId) -> _Files | None:
    """What the local cache has of the repository; None if it has nothing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        nothing = ["/"]  # else a snapshot that lacks files of the repository counts as missing
        folder = Path(
            snapshot_download(wanted.repo, revision=wanted.revision, allow_patterns=nothing, local_files_only=True)
        )
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise SaelabError(f"{wanted}: there is no such file or folder, and it is no id of the Hub") from error
    files = (path for path in folder.rglob("*") if path.is_file())
    return _Files([path.relative_to(folder).as_posix() for path in files], folder)


def _downloaded(wanted: HubId, cached: _Files | None) -> Path:
    """The autoencoder after its files were downloaded; without the Hub, what the cache has of it."""
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = ask_hub(lambda api: api.model_info(wanted.repo, revision=wanted.revision, timeout=TIMEOUT))
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise SaelabError(
            f"{wanted}: there is no such file or folder, and the Hub has no model {wanted.repo}, or it is private (log "
            "in with `hf auth login`, or set HF_TOKEN)"
        ) from error
    except HubUnreachable as error:
        if isinstance(error.__cause__, RevisionNotFoundError):
            raise SaelabError(f"{wanted}: {wanted.repo} on the Hub has no revision {wanted.revision}") from error
        if cached is not None and (place := _chosen(cached, wanted)) is not None:
            return cached.folder / place[0]
        raise SaelabError(
            f"{wanted}: there is no such file or folder, and the Hub cannot be reached ({error}). Without a network, "
            f"load a copy made elsewhere: `hf download {wanted.repo} --local-dir DIR`"
        ) from error
    files = _Files([file.rfilename for file in info.siblings or []], Path())
    chosen = _chosen(files, wanted)
    if chosen is None:
        raise SaelabError(_missing(files.names, wanted))
    place, weights = chosen
    folder = _parent(weights[0])
    small = [_joined(each, name) for each in (folder, _parent(folder)) for name in (*_BESIDE, _WHITENING)]
    small = [name for name in dict.fromkeys(small) if name in files.names]
    if small:
        _fetch(wanted, small)
    return _fetch(wanted, weights) / place  # last: where the weights are, the small files are too


def _fetch(wanted: HubId, names: list[str]) -> Path:
    """The local folder of the repository after these files were downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    patterns = [re.sub(r"([*?\[])", r"[\1]", name) for name in names]
    try:
        return Path(snapshot_download(wanted.repo, revision=wanted.revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise SaelabError(
            f"{wanted}: {wanted.repo} is gated: accept its conditions at https://huggingface.co/{wanted.repo}, then "
            "log in with `hf auth login`, or set HF_TOKEN"
        ) from error
    except Exception as error:  # interrupted, disk full: the client and its transport raise their own kinds
        raise SaelabError(f"{wanted}: cannot be downloaded: {brief(error)}") from error


def _chosen(files: _Files, wanted: HubId) -> tuple[str, list[str]] | None:
    """The path of the autoencoder in the repository, and its files of weights; None if there is not exactly one."""
    if wanted.path in files.names and wanted.path.endswith(SUFFIXES):
        return wanted.path, [wanted.path]
    folders = _folders(files.names, wanted.path)
    if wanted.path in folders:
        return wanted.path, folders[wanted.path]
    return next(iter(folders.items())) if len(folders) == 1 else None


def _folders(names: Iterable[str], below: str) -> dict[str, list[str]]:
    """The folders at and below `below` that have an autoencoder, and its file of weights."""
    found: dict[str, list[str]] = {}
    for name in sorted(name for name in names if ".." not in name.split("/")):  # the Hub's list is not trusted
        for usual in _SAFE:
            if name == usual or name.endswith(f"/{usual}"):
                folder = name.removesuffix(usual).rstrip("/")
                if not below or folder == below or folder.startswith(f"{below}/"):
                    found.setdefault(folder, []).append(name)
    return found


def _missing(names: list[str], wanted: HubId) -> str:
    """Why there is no autoencoder to download, and which there are."""
    folders = [f"{wanted.repo}/{folder}" for folder in _folders(names, wanted.path)]
    if folders:
        shown = ", ".join(map(printable, folders[:10])) + (f" and {len(folders) - 10} more" if folders[10:] else "")
        return f"{wanted}: has {len(folders)} autoencoders; load one of them: {shown}"
    below = [name for name in names if not wanted.path or name.startswith(f"{wanted.path}/")]
    if pickles := [name for name in below if name.endswith((".pt", ".pth"))]:
        return (
            f"{wanted}: has no weights but files of torch.save; name one to load it with weights_only=True, such as "
            f"{wanted.repo}/{printable(pickles[0])}"
        )
    if below:
        return f"{wanted}: has no file of weights ({', '.join(_SAFE)}) in {wanted.path or 'it'}"
    nearest = did_you_mean(wanted.path, _folders(names, ""))
    return f"{wanted}: {wanted.repo} on the Hub has no {printable(wanted.path)}.{nearest}"


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _joined(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
