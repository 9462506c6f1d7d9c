"""An autoencoder in words: a few lines for a terminal, and HTML for a notebook.

Metadata may come from anyone's checkpoint: its text is cut, invisible characters in it are shown as codes, and HTML
escapes it.
"""

import math
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any

from torch import Tensor

from saelab.errors import printable
from saelab.tensors import kind

if TYPE_CHECKING:
    from saelab.sae.model import SparseAutoencoder

_LONGEST = 100
"""Most characters that are shown of a text from the metadata."""


def text(sae: "SparseAutoencoder") -> str:
    """The facts and figures of `sae`, one a line."""
    lines = [f"{name}: {value}" for name, value in facts(sae) + figures(sae)]
    return "\n  ".join(["SparseAutoencoder", *lines])


def html(sae: "SparseAutoencoder") -> str:
    """The facts and figures of `sae` as two tables, beside each other if there is room.

    Colours are those of the notebook, so that it fits a light and a dark one.
    """
    tables = [_table("SparseAutoencoder", facts(sae))]
    found = figures(sae)
    if found:
        tables.append(_table("Evaluation", found))
    style = "display: flex; flex-wrap: wrap; gap: 1em 3em; align-items: flex-start"
    return f'<div style="{style}">{"".join(tables)}</div>'


def facts(sae: "SparseAutoencoder") -> list[tuple[str, str]]:
    """Sizes, origin, method and inference of `sae`, as pairs of a name and text; unknown ones are left out."""
    metadata = sae.metadata
    ours = metadata.get("saelab")
    ours = ours if isinstance(ours, Mapping) else {}
    names = metadata.get("hook_names")
    names = names if isinstance(names, list) else []
    adopted = ours.get("adopted") if isinstance(ours.get("adopted"), Mapping) else None
    parameters = sum(parameter.numel() for parameter in sae.parameters())
    widths = f"d_in {sae.d_in:,}" + (f", d_out {sae.d_out:,}" if sae.transcodes else "")
    found = [
        ("size", f"{widths}, {sae.n_features:,} features, {parameters:,} parameters"),
        ("weights", kind(sae.W_dec)),
        ("site", _shown(metadata.get("hook_name"))),
        ("further sites", _shown(", ".join(map(str, names[1:]))) if len(sae.site_widths) > 1 else ""),
        ("target", _shown(metadata.get("hook_name_out")) if sae.transcodes else ""),
        ("array" if "array" in ours else "model", _shown(metadata.get("model_name"))),
        ("second model", _shown(metadata.get("second_model_name"))),
        ("text", _shown(metadata.get("dataset_path"))),
        ("method", _method(sae, ours)),
        ("input", "" if sae.normalisation is None else f"each token normalised ({sae.normalisation})"),
        ("inference", _inference(sae)),
        ("skip connection", "" if sae.W_skip is None else "W_skip x is added to the reconstruction"),
        ("trained on", f"{_number(ours['tokens'])} tokens" if "tokens" in ours and adopted is None else ""),
        (
            "adopted from",
            "" if adopted is None else f"{_shown(adopted.get('from'))} ({_shown(adopted.get('trainer'))})",
        ),
        ("input scale", _input_scale(ours["input_scale"]) if "input_scale" in ours else ""),
    ]
    return [(name, value) for name, value in found if value]


def figures(sae: "SparseAutoencoder") -> list[tuple[str, str]]:
    """The main figures of the evaluation that was loaded with `sae`, as pairs of a name and text; none without one."""
    found, ours = sae.figures, sae.metadata.get("saelab")
    ours = ours if isinstance(ours, Mapping) else {}
    shown = [
        ("held-out rows", "tokens", "") if "array" in ours else ("held-out text", "tokens", " tokens"),
        ("FVU", "fvu", ""),
        *([("FVU without sinks", "fvu_without_sinks", "")] if found.get("sinks") else []),
        ("L0", "l0", " features per token"),
        ("delta CE", "delta_ce", " nats per token"),
        *([("delta CE without sinks", "delta_ce_without_sinks", " nats per token")] if found.get("sinks") else []),
        ("loss recovered", "loss_recovered_zero", " (zero ablation)"),
        ("loss recovered", "loss_recovered_mean", " (mean ablation)"),
        ("never active", "never_active", f" of {sae.n_features:,} features"),
    ]
    rows = [(name, _number(found[key]) + unit) for name, key, unit in shown if key in found]
    if len(sae.site_widths) > 1 and "delta_ce" in found:
        rows.append(
            ("delta CE and loss recovered", f"with the reconstruction at {_shown(sae.metadata.get('hook_name'))}")
        )
    return rows


def _input_scale(scale: Any) -> str:
    """The scale of the input, or of each site of a crosscoder."""
    scales = ", ".join(map(_number, scale)) if isinstance(scale, list) else _number(scale)
    return f"{scales} (folded into the weights)"


def _method(sae: "SparseAutoencoder", ours: Mapping[str, Any]) -> str:
    """The settings that decided which entries were active in training; "" if the checkpoint does not say them."""
    parts = []
    for name in ("encoder", "affinity", "allocation", "aux", "sparsity"):
        section = ours.get(name)
        value = section.get("name") if isinstance(section, Mapping) else section
        if value is not None and value != "none":
            parts.append(f"{name} {_shown(value)}")
    if parts:
        return ", ".join([*parts, f"k {sae.k:,}"])
    return _shown(sae.metadata.get("training_architecture"))


def _inference(sae: "SparseAutoencoder") -> str:
    """Which entries are active when `encode` is called."""
    if sae.r_mag is not None:
        return "every feature whose gate is above 0"
    threshold = sae.threshold if sae.log_threshold is None else sae.log_threshold.detach().exp()
    if sae.groups and threshold is None:
        return f"the largest pre-activation of each of {sae.k:,} groups of features, if above 0"
    if threshold is None:
        return f"the {sae.k:,} largest pre-activations of each token, if above 0"
    low, high = _ends(threshold)
    if low == high:
        return "every pre-activation above " + (f"{_number(low)}, one threshold for all features" if low else "0")
    return f"every pre-activation above the feature's threshold, {_number(low)} to {_number(high)}"


def _ends(threshold: Tensor) -> tuple[float, float]:
    """The lowest and the highest threshold; an active entry is above 0 in any case."""
    threshold = threshold.clamp_min(0)
    return threshold.min().item(), threshold.max().item()


def _table(title: str, rows: list[tuple[str, str]]) -> str:
    edge = "border: 0; border-bottom: 1px solid rgba(128, 128, 128, .3); padding: .25em 1em .25em 0; text-align: left"
    lines = "".join(
        f'<tr style="background: none"><th style="{edge}; font-weight: normal; opacity: .65; white-space: nowrap; '
        f'vertical-align: top">{escape(name)}</th><td style="{edge}; overflow-wrap: anywhere">{escape(value)}</td></tr>'
        for name, value in rows
    )
    caption = "caption-side: top; text-align: left; font-weight: bold; color: inherit; padding: .25em 0"
    table = "border-collapse: collapse; margin: 0; font-variant-numeric: tabular-nums"
    return f'<table style="{table}"><caption style="{caption}">{escape(title)}</caption><tbody>{lines}</tbody></table>'


def _number(value: Any) -> str:
    """A number with four digits, whole numbers in full; "undefined" for None, as JSON has it in place of NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "undefined" if value is None else _shown(value)
    if isinstance(value, int) or not math.isfinite(value):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def _shown(value: Any) -> str:
    """A value of the metadata as one line of visible characters; "" for None."""
    if value is None:
        return ""
    whole = str(value)
    cut = whole if len(whole) <= _LONGEST else whole[:_LONGEST] + "..."
    return printable(cut)
