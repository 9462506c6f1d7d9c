"""`saelab push`: a run's autoencoder with its settings, evaluation and model card, for a repository on the Hub.

The folder PATH of the repository gets what SAELens reads (``cfg.json``, ``sae_weights.safetensors``), ``config.yaml``,
``eval.json`` and the card, ``README.md``; so a repository can have several autoencoders. Its own ``README.md`` is the
card too, unless it has one already: users add a license and text of their own to it. Paths of this machine are left out
of everything that is uploaded (`without_paths`).
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from saelab.errors import SaelabError, brief
from saelab.files import current_folder, expanded, make_folder, read_json, replace_folder, translate_errors, write_whole
from saelab.runs import folder, yaml12
from saelab.runs.model_card import About, card
from saelab.sae.layout import CONFIG, WEIGHTS

CARD = "README.md"
_WHOLE = re.compile(r"(?:file:/*)?(?:[/~\\]|\.\.?[/\\]|[A-Za-z]:[/\\]).*", re.DOTALL)
"""A path and nothing else, from the root, the user's folder or a folder like ``..``."""
_INSIDE = re.compile(
    r"""(?<![\w./\\~-])(?:file:/*)?(?:~\w*|[A-Za-z]:)?[/\\](?![/\\])  # not the slashes of https://
    (?:[^"':,;\n/\\]+[/\\])+  # folders, with blanks in their names
    ([^\s"':,;/\\]*)""",
    re.VERBOSE,
)
"""A path in a text. Its folders may contain blanks, so that words between two paths are taken for one too."""


@dataclass(frozen=True)
class Upload:
    """The files for a repository."""

    repo: str
    path: str
    """The folder in the repository."""
    files: Mapping[str, bytes | Path]
    """By their names in the repository."""

    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        found = self.files.items()
        return {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in found}


def prepare(run: str | Path, repo: str, path: str | None = None) -> Upload:
    """The files of the run in the folder `run` for `repo`, a user and a name with a slash between.

    `path` is the folder in the repository, by default the name of the site, or `crosscoder`. Asks nothing of the Hub.
    Raises SaelabError if the run has no whole checkpoint, or `repo` or `path` are no such names.
    """
    from saelab.sae.checkpoint import load
    from saelab.sae.interop.saelens import OURS

    run = Path(expanded(run))
    folder.check_run(run)
    load(run)  # nobody gets weights that are damaged
    checkpoint = current_folder(run / folder.CHECKPOINT)
    config = without_paths(read_json(checkpoint / CONFIG, "Train the run again."))
    metadata = config.get("metadata") or {}
    site = "crosscoder" if "site_widths" in config else metadata.get("hook_name")
    path = _checked(repo, path or (site if isinstance(site, str) and site else "sae"))
    settings = yaml12.parse(folder.settings_text(run), str(run / folder.SETTINGS))
    text = yaml.safe_dump(without_paths(settings), sort_keys=False, allow_unicode=True)
    evaluation = folder.evaluation(run)
    evaluation = None if evaluation is None else without_paths(evaluation)
    about = About(
        repo=repo,
        path=path,
        checkpoint=config,
        settings=text,
        evaluation=evaluation,
        unfinished=folder.unfinished(run),
        in_saelens=not str(config.get("architecture", "")).startswith(OURS),
        base_model=_base_model(settings),
    )
    files: dict[str, bytes | Path] = {
        CARD: card(about).encode(),
        f"{path}/{CARD}": card(about).encode(),
        f"{path}/{CONFIG}": _json(config),
        f"{path}/{WEIGHTS}": checkpoint / WEIGHTS,
        f"{path}/{folder.SETTINGS}": text.encode(),
    }
    if evaluation is not None:
        files[f"{path}/{folder.EVALUATION}"] = _json(evaluation)
    return Upload(repo, path, files)


def write(upload: Upload, out: str | Path) -> Path:
    """The folder `out` with the files as the repository would have them. Raises SaelabError if it is there already."""
    out = Path(expanded(out, "--out"))
    if out.is_file() or out.is_symlink() or (out.is_dir() and any(out.iterdir())):
        raise SaelabError(f"--out: {out} exists; choose another")
    with translate_errors(out.parent, elsewhere="choose another --out"):
        make_folder(out.parent)
        with replace_folder(out) as unfinished:
            for name, file in upload.files.items():
                make_folder((unfinished / name).parent)
                write_whole(unfinished / name, file if isinstance(file, bytes) else file.read_bytes())
    return out


def send(upload: Upload, *, private: bool = False) -> str:
    """The address of `upload` on the Hub, after one commit that has all its files.

    A repository that is missing is made, `private` if so asked. The token is the one that huggingface_hub finds:
    HF_TOKEN, or that of `hf auth login`. Raises SaelabError if the Hub cannot be reached or refuses, or if the
    repository is there and public though `private` was asked for.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    api = HfApi()
    try:
        api.create_repo(upload.repo, private=private, exist_ok=True)
        found = api.model_info(upload.repo)
        if private and not found.private:
            raise SaelabError(f"--private: {upload.repo} is there and public; make it private first, or name another")
        there = {file.rfilename for file in found.siblings or []}
        files = {name: file for name, file in upload.files.items() if name != CARD or CARD not in there}
        operations = [CommitOperationAdd(name, file) for name, file in files.items()]
        done = api.create_commit(upload.repo, operations, commit_message=f"{upload.path}, by saelab push")
    except SaelabError:
        raise
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise SaelabError(
                f"{upload.repo}: the Hub does not let you write there; log in with `hf auth login`, or set HF_TOKEN, "
                "with a token that may write"
            ) from error
        raise SaelabError(f"{upload.repo}: was not uploaded: {brief(error)}") from error
    except Exception as error:  # no network, offline, no token: the client and its transport raise their own kinds
        raise SaelabError(f"{upload.repo}: was not uploaded: {brief(error)}") from error
    return str(done.commit_url)


def without_paths(value: Any) -> Any:
    """`value`, of JSON or YAML, with the last name of each absolute path of a machine in place of the path."""
    if isinstance(value, dict):
        return {without_paths(key): without_paths(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(each) for each in value]
    if not isinstance(value, str):
        return value
    if _WHOLE.fullmatch(value):
        return re.split(r"[/\\]+", value.rstrip("/\\"))[-1]
    return _INSIDE.sub(r"\1", value)


def _base_model(settings: Any) -> str | None:
    """The language model's id on the Hub; None if it is a folder, or the embedded one."""
    model = settings.get("model") if isinstance(settings, dict) else None
    name = model.get("name") if isinstance(model, dict) else model
    known = isinstance(name, str) and name != "demo" and re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", name)
    return name if known else None


def _checked(repo: str, path: str) -> str:
    """`path`. Raises SaelabError if it or `repo` cannot be names on the Hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise SaelabError(f"{repo!r} is no name of a repository: {brief(error)}") from error
    if "/" not in repo:
        raise SaelabError(f"{repo!r} is no name of a repository; write user/repo")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", path):
        raise SaelabError(
            f"--path: {path!r} is no folder in a repository; use letters, digits, '_', '-' and '.', such as layers.2"
        )
    return path


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
