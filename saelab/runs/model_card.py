"""The model card of a run: the README.md of its repository on the Hub. Names in it are escaped, for they may be any."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from saelab.runs.folder import SETTINGS
from saelab.sae.layout import CONFIG

_FIGURES = (
    ("FVU", "fvu", 4, "squared error of the reconstruction over squared deviation from the mean, over all tokens"),
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
    "x is `[tokens, {}]`, unscaled activations at the site{}; `codes` are the active features of each token, and "
    "`sae.decode(codes, x)` is the reconstruction."
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
    n_features = about.checkpoint["d_sae"]
    kind = "transcoder" if "d_out" in about.checkpoint else "autoencoder"
    to = metadata.get("hook_name_out")
    target = f" to those at `{_code(to)}`" if kind == "transcoder" and to else ""
    if "site_widths" in about.checkpoint:
        others = (metadata.get("hook_names") or [])[1:]
        kind, target = "crosscoder", "".join(f", `{_code(name)}`" for name in others)
        if second := metadata.get("second_model_name"):
            target += f", of which those with `@second` are of the model `{_code(second)}`"
    trained = ", trained with saelab" if ours.get("tokens") else ""  # not of another trainer's, in a run of its own
    parts = [
        _front_matter(about),
        f"# {n_features:,} features of {_text(model)} at {_text(site)}",
        f"A sparse {kind} of the activations of `{_code(model)}` at `{_code(site)}`{target}{trained}.",
        _facts(about, metadata, ours),
        "## How good it is",
        _figures(about.evaluation, held_out=bool(ours.get("tokens"))),
        "## How to load it",
        _fenced(f'import saelab\n\nsae = saelab.load("{about.repo}/{about.path}")\ncodes = sae.encode(x)\n', "python"),
        _USE.format(about.checkpoint["d_in"], ", those of all sites side by side" * (kind == "crosscoder")),
        _saelens(about),
        "## How it was trained",
        f"`{about.path}/{SETTINGS}`: the settings with all defaults; files and folders are named without their place.",
        _fenced(about.settings, "yaml"),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(about: About) -> str:
    lines = ["---", "library_name: saelab", "tags:", "- sparse-autoencoder", "- interpretability"]
    lines += ["- saelens"] * about.in_saelens
    lines += [f"base_model: {about.base_model}"] * (about.base_model is not None)
    return "\n".join([*lines, "---"])


def _facts(about: About, metadata: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    allocation = (ours.get("allocation") or {}).get("name")
    tokens = ours.get("tokens")
    rows = {
        "features": f"{about.checkpoint['d_sae']:,}",
        "width of the activations": f"{about.checkpoint['d_in']:,}",
        "architecture": f"`{_code(about.checkpoint.get('architecture', ''))}` in `{CONFIG}`",
        "allocation in training": allocation and f"{_text(allocation)}, k = {ours.get('k')}",
        "text": metadata.get("dataset_path") and f"`{_code(metadata['dataset_path'])}`",
        "context": metadata.get("context_size") and f"{metadata['context_size']} tokens",
        "trained on": tokens and f"{tokens:,} tokens",
        "not complete": about.unfinished and _text(about.unfinished),
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value]
    return "\n".join(["| | |", "|---|---|", *lines])


def _figures(found: Mapping[str, Any] | None, *, held_out: bool) -> str:
    if found is None:
        return "It was not evaluated."
    rows = []
    for label, name, digits, definition in _FIGURES:
        if name in found:
            shown = _number(found[name], digits)
            shown += (
                f" of {_number(found['n_features'], 0)}" if name == "never_active" and "n_features" in found else ""
            )
            tokens = _number(found.get("ce_tokens" if name.startswith(_OF_CE) else "tokens"), 0)
            rows.append(f"| {label} | {shown} | {tokens} | {definition} |")
    head = [f"{'On text that was held out of the training; ' * held_out}N is the number of tokens.", ""]
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
