"""A run folder of a checkpoint that another trainer wrote, so that every stage works on it as on a run of our own."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from saelab.errors import SaelabError, did_you_mean, printable
from saelab.files import expanded, locked, translate_read_errors
from saelab.progress import Say, quiet
from saelab.runs.config import leaves, set_override
from saelab.runs.from_hub import resolve
from saelab.runs.job import Job, settings_of
from saelab.runs.reopen import check_width
from saelab.runs.save import check_out, save_adopted
from saelab.sae.checkpoint import check_weights, found_in
from saelab.sae.interop.saelens import GROUP_MAX, rule_of
from saelab.sae.layout import FOLDER
from saelab.sae.model import SparseAutoencoder
from saelab.sae.settings import (
    AllocationSettings,
    AuxSettings,
    EncoderSettings,
    SaeSettings,
    SparsitySettings,
)

_TAKES = (
    "out",
    "site",
    "target",
    "more_sites",
    "context",
    "seed",
    "device",
    "model.",
    "second_model",
    "second_model.",
    "corpus.",
    "eval.",
    "features.",
    "analysis.",
)
"""Settings that `adopt` takes; those that end in a dot are sections."""
_WHAT = {
    "model": ("model.name", "model_name", "--model, the language model: a Hub id or a local folder"),
    "site": ("site", "hook_name", "--site, where its inputs are read: TransformerLens' name of a hook point"),
    "target": ("target", "hook_name_out", "--target, the site whose activations it predicts, as a transcoder"),
    "corpus": ("corpus.source", "dataset_path", "--corpus, the text to read: a file, a folder or a Hub dataset"),
}
"""What must be known: its setting, its name in a checkpoint's metadata, and how to ask for it."""
_BOS = {True: "began with BOS", False: "did not begin with BOS"}
_FOLDED = (
    "fold_ln",
    "center_writing_weights",
    "center_unembed",
    "fold_value_biases",
    "refactor_factored_attn_matrices",
)
"""Options with which TransformerLens loads other weights than the model has."""


@dataclass(frozen=True)
class _Known:
    """What a checkpoint says about its training, None or "" if it says nothing or something else than it should."""

    model_name: str
    second_model_name: str
    hook_name: str
    hook_names: tuple[str, ...]
    """The sites of a crosscoder."""
    hook_name_out: str
    dataset_path: str
    context_size: int | None
    prepend_bos: bool | None
    folded: tuple[str, ...]
    """The options of `_FOLDED` that the model was loaded with."""


def adopt(
    checkpoint: str | Path,
    *,
    model: str | None = None,
    site: str | None = None,
    target: str | None = None,
    corpus: str | None = None,
    out: str | Path | None = None,
    overrides: Iterable[str] = (),
    force: bool = False,
    say: Say = quiet,
) -> Path:
    """Make a run folder of a checkpoint that `saelab.load` reads, local or on the Hub; returns the folder.

    What is not given is taken from the checkpoint's metadata, if it says it: the `model`, the `site`, the `target` of a
    transcoder, the further sites and the second model of a crosscoder, the `corpus` (names as in a config), and the
    context. `out` is by default ``runs/NAME``, with the name of the checkpoint's folder. `overrides` may set `context`,
    `device`, `seed`, `more_sites` and the sections `model`, `second_model`, `corpus`, `eval`, `features` and
    `analysis`. The weights are copied, as saelab writes them. `say` reports what the checkpoint was trained on if it
    differs from what is given. An existing run is replaced only with `force`.

    Raises SaelabError if the checkpoint cannot be loaded, if something is neither given nor known (the message lists
    all of it), if the model has no such site or one of another width, and as `train` does for text and folders.
    """
    path = resolve(checkpoint)
    peer, stored = found_in(path)
    sae = peer.read(stored)
    check_weights(sae, str(stored.path))
    tree: dict[str, Any] = {"out": f"runs/{_name(checkpoint, path)}" if out is None else str(out)}
    known = _known(sae.metadata)
    given = {"model": model, "site": site, "target": target, "corpus": corpus}
    if not sae.transcodes and target is None:
        del given["target"]
    for name, value in given.items():
        if found := getattr(known, _WHAT[name][1]) if value is None else value:
            tree[name] = found
    if len(sae.site_widths) > 1 and known.hook_names[:1] == (tree.get("site"),):
        tree["more_sites"] = list(known.hook_names[1:])
        if known.second_model_name:
            tree["second_model"] = known.second_model_name
    if known.context_size is not None:
        tree["context"] = known.context_size
    for override in overrides:
        set_override(tree, override)
    _check_given(tree, path, sae)
    settings = settings_of(tree | {"sae": asdict(_settings_like(sae))})
    run = Path(settings.out)
    if stored.path.resolve().is_relative_to(run.resolve()):
        raise SaelabError(f"--out: {run} would be replaced, and the checkpoint lies in it; choose another")
    with locked(run):
        check_out(settings, force)  # before the model is loaded
        job = Job(settings, say)
        try:
            check_width(path, job, sae)
            for note in _notes(known, job):
                say(note)
        except SaelabError as error:
            own = [name for name in ("model", "corpus") if given[name] is None and str(error).startswith(f"{name}: ")]
            if not own:
                raise
            raise SaelabError(f"{error} The checkpoint names this {own[0]}; give another by --{own[0]}.") from error
        with translate_read_errors(stored.path, "the weights", "Use another copy."), stored.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        facts = {
            "from": str(path.absolute()) if Path(expanded(checkpoint)).exists() else str(checkpoint),
            "file": str(stored.path.absolute()),
            "sha256": digest,
            "trainer": "saelab" if "saelab" in sae.metadata else peer.name,
            "trained_on": {name: value for name, value in asdict(known).items() if value not in (None, "", ())},
        }
        save_adopted(settings, job.lm, job.corpus, sae, facts, force=force)
    return run


def _name(checkpoint: str | Path, path: Path) -> str:
    """The name of a checkpoint's folder, or the last part of its id on the Hub."""
    given = Path(expanded(checkpoint))
    place = given.resolve() if given.exists() else given
    place = place.parent if path.is_file() else place
    return (place.parent if place.name == FOLDER else place).name


def _known(metadata: Mapping[str, Any]) -> _Known:
    """What is in a checkpoint's metadata, which may be anyone's."""

    def text(name: str) -> str:
        value = metadata.get(name)
        return value.strip() if isinstance(value, str) else ""

    context, bos = metadata.get("context_size"), metadata.get("prepend_bos")
    options = metadata.get("model_from_pretrained_kwargs")
    options = options if isinstance(options, Mapping) else {}
    names = metadata.get("hook_names")
    names = names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []
    return _Known(
        _official(text("model_name")),
        _official(text("second_model_name")),
        text("hook_name"),
        tuple(names),
        text("hook_name_out"),
        text("dataset_path"),
        context if isinstance(context, int) and not isinstance(context, bool) and context >= 2 else None,
        bos if isinstance(bos, bool) else None,
        tuple(name for name in _FOLDED if options.get(name) is True),
    )


def _official(name: str) -> str:
    """The Hub id of a model that TransformerLens has a short name for, such as ``pythia-70m``; others as they are."""
    if "/" in name or not name:
        return name
    from transformer_lens.supported_models import MODEL_ALIASES

    return next((official for official, aliases in MODEL_ALIASES.items() if name in aliases), name)


def _check_given(tree: Mapping[str, Any], path: Path, sae: SparseAutoencoder) -> None:
    """Raises SaelabError if a setting has no effect here, or if something is neither given nor known."""
    wrong = [name for name in leaves(tree) if not f"{name}.".startswith(_TAKES) and not name.startswith(_TAKES)]
    if wrong:
        taken = ", ".join(f"{name}*" if name.endswith(".") else name for name in _TAKES)
        raise SaelabError(
            f"{wrong[0]}: is not for a checkpoint that is trained already; `saelab adopt` takes {taken}."
            f"{did_you_mean(wrong[0], [name.rstrip('.') for name in _TAKES])}"
        )
    given = leaves(tree)
    needed = {name: what for name, what in _WHAT.items() if name != "target" or sae.transcodes}
    missing = [ask for name, (setting, _, ask) in needed.items() if not (given.get(name) or given.get(setting))]
    if missing:
        said = {name: sae.metadata.get(key) for name, (_, key, _) in needed.items()}
        knows = ", ".join(f"its {name} is {printable(str(value))[:100]}" for name, value in said.items() if value)
        raise SaelabError(
            f"{path}: the checkpoint does not say everything that a run needs{f' ({knows})' if knows else ''}; give "
            f"{'; '.join(missing)}"
        )
    if sae.metadata.get("hook_head_index") is not None:
        raise SaelabError(
            f"{path}: was trained on head {printable(str(sae.metadata['hook_head_index']))[:20]} of a site, and a site "
            "of saelab has all heads, so there is no text to evaluate it on"
        )


def _settings_like(sae: SparseAutoencoder) -> SaeSettings:
    """Settings of an autoencoder with the same size, budget and rule of inference. No loss has a weight."""
    rule, k = rule_of(sae), min(sae.k, sae.n_features)
    encoder, sparsity = EncoderSettings(), SparsitySettings()
    name = {"topk": "token_choice", GROUP_MAX: "group_max"}.get(rule, "threshold")
    if rule == "threshold":
        encoder, sparsity = EncoderSettings("jumprelu"), SparsitySettings("l0", coefficient=0.0)
    elif rule == "relu":
        sparsity = SparsitySettings("l1", coefficient=0.0)
    return SaeSettings(
        skip=sae.transcodes and sae.W_skip is not None,
        n_features=sae.n_features,
        k=k,
        encoder=encoder,
        allocation=AllocationSettings(name),
        aux=AuxSettings("none"),
        sparsity=sparsity,
    )


def _notes(known: _Known, job: Job) -> Iterable[str]:
    """What the checkpoint was trained on, as far as it differs from what the run reads."""
    settings = job.settings
    pairs = {
        "model": (known.model_name, settings.model.name),
        "site": (known.hook_name, settings.site),
        **({} if settings.target is None else {"target": (known.hook_name_out, settings.target)}),
        "text": (known.dataset_path, settings.corpus.source),
        "context": (known.context_size, settings.context),
    }
    for name, (said, here) in pairs.items():
        if said not in (None, "", here):
            yield f"note: by its metadata, the checkpoint was trained with {name} {printable(str(said))}; here: {here}"
    if known.prepend_bos not in (None, job.corpus.begins_with_bos):
        then, now = _BOS[known.prepend_bos], _BOS[not known.prepend_bos]
        yield f"note: by its metadata, rows {then} in training; here they {now}"
    if known.folded:
        yield (
            f"note: the checkpoint was trained on activations of weights that TransformerLens had changed "
            f"({', '.join(known.folded)}); here the model is as it is, so the activations may differ"
        )
