"""The model card of a run: the README.md of its repository on the Hub. Names in it are escaped, for they may be any."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from saelab.runs.folder import SETTINGS
from saelab.sae.layout import CONFIG

_FIGURES = (
    ("FVU", "fvu", 4, "squared error of the reconstruction over squared deviation from the mean, over all tokens"),
    (
        "FVU without sinks",
        "fvu_without_sinks",
        4,
        "the same without attention sinks, tokens whose norm is above 10 times the median",
    ),
    ("L0", "l0", 2, "mean number of active features per token"),
    ("cosine", "cosine", 4, "mean cosine of activation and reconstruction"),
    ("never active", "never_active", 0, "features that are active on none of the tokens"),
    (
        "density below 1e-4",
        "share_below_1e4",
        4,
        "share of the features that are active on fewer than 1 token in 10,000",
    ),
    ("CE, clean", "ce_clean", 4, "cross-entropy of the language model, nats per token"),
    ("CE, spliced", "ce_spliced", 4, "the same with the reconstruction in place of the activation"),
    ("delta CE", "delta_ce", 4, "CE spliced - CE clean, nats per token"),
    ("delta CE without sinks", "delta_ce_without_sinks", 4, "the same with the sinks left clean"),
    (
        "loss recovered, zero ablation",
        "loss_recovered_zero",
        4,
        "(CE ablated - CE spliced) / (CE ablated - CE clean), where 0 takes the place of the activation",
    ),
    ("loss recovered, mean ablation", "loss_recovered_mean", 4, "the same, with the mean in place of the activation"),
    ("KL", "kl", 4, "divergence of the spliced predictions from the clean ones, nats per token"),
)
"""Label, name in the evaluation, digits and definition."""
_USE = (
    "x is `[tokens, {}]`, {}; `codes` are the active features of each token, and "
    "`sae.decode(codes, x)` is the reconstruction{}."
)
_OF_CE = ("ce_", "delta_ce", "loss_", "kl")


class About(NamedTuple):
    """What a card is made of."""

    repo: str
    path: str
    """In the repository."""
    checkpoint: Mapping[str, Any]
    """`cfg.json`."""
    settings: str
    """`config.yaml`."""
    evaluation: Mapping[str, Any] | None
    unfinished: str | None
    """How far the training came, if it is not complete."""
    in_saelens: bool
    """Whether SAELens has the architecture."""
    base_model: str | None
    """Id of the language model on the Hub; None if it has none."""


def card(about: About) -> str:
    """The card in Markdown, with its YAML front matter. It claims no license: that is for the user to add."""
    metadata = about.checkpoint.get("metadata") or {}
    ours = metadata.get("saelab") or {}
    model, site = metadata.get("model_name") or "an unnamed model", metadata.get("hook_name") or "an unnamed site"
    title, of = f"{_text(model)} at {_text(site)}", f"the activations of `{_code(model)}` at `{_code(site)}`"
    kind, x, y, note = "autoencoder", "unscaled activations at the site", "", ""
    if "site_widths" in about.checkpoint:
        others = (metadata.get("hook_names") or [])[1:]
        kind, x = "crosscoder", f"{x}, those of all sites side by side"
        title, of = (" + ".join([title, *map(_text, others)]), of + "".join(f", `{_code(name)}`" for name in others))
        if second := metadata.get("second_model_name"):
            of += f", of which those with `@second` are of the model `{_code(second)}`"
        note = (
            "FVU and cosine are of all sites side by side, each scaled as in training. For CE the reconstruction is in "
            f"place at `{_code(site)}` only. "
        )
    elif "d_out" in about.checkpoint:
        kind, to = "transcoder", _code(metadata.get("hook_name_out") or "an unnamed site")
        of, y, note = f"{of} to those at `{to}`", f" of those at `{to}`", f"The activation is that at `{to}`. "
    elif "array" in ours:
        title, of, x = _text(model), f"the rows of the array `{_code(model)}`", "rows of the array"
        note = "A token is a row of the array. "
    trained = ", trained with saelab" if ours.get("tokens") else ""  # not of another trainer's, in a run of its own
    parts = [
        _front_matter(about),
        f"# {about.checkpoint['d_sae']:,} features of {title}",
        f"A sparse {kind} of {of}{trained}.",
        _facts(about, metadata, ours),
        "## How good it is",
        _figures(about.evaluation, note, held_out=bool(ours.get("tokens"))),
        "## How to load it",
        _fenced(f'import saelab\n\nsae = saelab.load("{about.repo}/{about.path}")\ncodes = sae.encode(x)\n', "python"),
        _USE.format(about.checkpoint["d_in"], x, y),
        _saelens(about),
        *_settings(about, adopted="adopted" in ours),
    ]
    return "\n\n".join(parts) + "\n"


def _settings(about: About, *, adopted: bool) -> tuple[str, ...]:
    """The section with the settings; those of an adopted checkpoint are not those of its training."""
    named = "the settings with all defaults; files and folders are named without their place."
    title, what = "How it was trained", named
    if adopted:
        title = "How it was evaluated"
        what = f"{named} It was trained elsewhere; how is not known here."
    return f"## {title}", f"`{about.path}/{SETTINGS}`: {what}", _fenced(about.settings, "yaml")


def _front_matter(about: About) -> str:
    lines = ["---", "library_name: saelab", "tags:", "- sparse-autoencoder", "- interpretability"]
    lines += ["- saelens"] * about.in_saelens
    lines += [f"base_model: {about.base_model}"] * (about.base_model is not None)
    return "\n".join([*lines, "---"])


def _facts(about: About, metadata: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    allocation, tokens, adopted = ours.get("allocation"), ours.get("tokens"), ours.get("adopted") or {}
    allocation = allocation.get("name") if isinstance(allocation, Mapping) else None  # it may be another trainer's
    before = adopted.get("trained_on") or {}
    rows = {
        "features": f"{about.checkpoint['d_sae']:,}",
        "width of the activations": f"{about.checkpoint['d_in']:,}",
        "architecture": f"`{_code(about.checkpoint.get('architecture', ''))}` in `{CONFIG}`",
        "allocation in training": allocation and _text(f"{allocation}, k = {ours.get('k')}"),
        "checkpoint of": adopted and _text(adopted.get("trainer")),
        "model and text of its training": ", ".join(
            f"`{_code(before[name])}`" for name in ("model_name", "dataset_path") if name in before
        ),
        "text of the evaluation" if adopted else "text": metadata.get("dataset_path")
        and f"`{_code(metadata['dataset_path'])}`",
        "context": metadata.get("context_size") and f"{metadata['context_size']} tokens",
        "trained on": tokens and f"{tokens:,} tokens",
        "not complete": about.unfinished and _text(about.unfinished),
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value]
    return "\n".join(["| | |", "|---|---|", *lines])


def _figures(found: Mapping[str, Any] | None, note: str, *, held_out: bool) -> str:
    """The table of the figures; `note` says what they are of."""
    if found is None:
        return "It was not evaluated."
    rows = []
    for label, name, digits, definition in _FIGURES:
        if name in found and (found.get("sinks") or not name.endswith("_without_sinks")):
            shown = _number(found[name], digits)
            shown += (
                f" of {_number(found['n_features'], 0)}" if name == "never_active" and "n_features" in found else ""
            )
            tokens = _number(found.get("ce_tokens" if name.startswith(_OF_CE) else "tokens"), 0)
            rows.append(f"| {label} | {shown} | {tokens} | {definition} |")
    for each in found.get("sites") or ():
        place = f"`{_code(each.get('site'))}`"
        for label, name, of, what in (
            ("FVU", "fvu", "tokens", "FVU of this site"),
            ("delta CE", "delta_ce", "ce_tokens", "delta CE with the reconstruction in place at this site only"),
        ):
            figure, tokens = _number(each.get(name), 4), _number(found.get(of), 0)
            rows.append(f"| {label} at {place} | {figure} | {tokens} | {what} |")
    head = [f"{note}{'Measured on what was held out of the training. ' * held_out}N is the number of tokens.", ""]
    return "\n".join([*head, "| figure | value | N | what it is |", "|---|---|---|---|", *rows])


def _number(value: object, digits: int) -> str:
    """`value` with that many digits; "undefined" if it is no number."""
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:,.{digits}f}" if known else "undefined"


def _saelens(about: About) -> str:
    if not about.in_saelens:
        return f"SAELens has no architecture that computes it (`{_code(about.checkpoint.get('architecture', ''))}`)."
    code = (
        f'from sae_lens import SAE\n\nsae = SAE.from_pretrained("{about.repo}", "{about.path}")\nacts = sae.encode(x)\n'
    )
    return f"In SAELens, 6 or later:\n\n{_fenced(code, 'python')}"


def _fenced(content: str, language: str) -> str:
    """A block of code, whose fence is longer than any in it."""
    longest = max((len(run) for run in re.findall("`+", content)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{content.rstrip()}\n{fence}"


def _text(value: object) -> str:
    """`value` as plain text on one line, in which Markdown and HTML mean nothing."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&])", r"\\\1", " ".join(str(value).split()))


def _code(value: object) -> str:
    """`value` for a span of code in a line or a table."""
    return " ".join(str(value).split()).replace("`", "'").replace("|", "/")
