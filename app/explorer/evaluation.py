"""The evaluation of a run: its main figures, and all with definitions."""

import streamlit as st

from explorer import state
from explorer.html import facts_html
from saelab.runs import folder

HEADLINE = {
    "fvu": "FVU",
    "fvu_without_sinks": "FVU without sinks",
    "delta_ce": "delta CE, nats",
    "l0": "L0",
    "never_active": "Never active",
}
# The other figures of eval.json in reading order: (name, title, unit, definition).
FIGURES = [
    ("cosine", "Cosine", "", "mean cosine between an activation vector and its reconstruction"),
    (
        "sinks",
        "Attention sinks",
        "tokens",
        "evaluated tokens with norms above 10 times the median; FVU and cosine count them",
    ),
    ("sink_variance", "Variance in sinks", "share", "of the squared deviations from the mean, over all tokens"),
    ("cosine_without_sinks", "Cosine without sinks", "", "over all other tokens"),
    ("ce_spliced_without_sinks", "CE, spliced without sinks", "nats per token", "sinks are left clean"),
    ("delta_ce_without_sinks", "delta CE without sinks", "nats per token", "CE spliced without sinks - CE clean"),
    ("top_variance", "Variance in few dimensions", "share", "in the largest 1% of them, over all tokens but sinks"),
    ("ce_clean", "CE, clean", "nats per token", "cross-entropy of the next token in the unchanged model"),
    ("ce_spliced", "CE, spliced", "nats per token", "with the reconstruction in place of the activations"),
    ("kl", "KL", "nats per token", "from the clean to the spliced distribution of the next token"),
    ("ce_zero_ablated", "CE, zero-ablated", "nats per token", "with zeros in place of the activations"),
    ("ce_mean_ablated", "CE, mean-ablated", "nats per token", "with the mean activation in place of every activation"),
    (
        "loss_recovered_zero",
        "Loss recovered, zero ablation",
        "share",
        "(CE ablated - CE spliced) / (CE ablated - CE clean)",
    ),
    (
        "loss_recovered_mean",
        "Loss recovered, mean ablation",
        "share",
        "the same with mean ablation, which is the harder test",
    ),
    ("share_below_1e4", "Density below 1e-4", "share", "features active on less than 0.01% of the evaluated tokens"),
    ("share_below_1e5", "Density below 1e-5", "share", "features active on less than 0.001% of the evaluated tokens"),
    ("c_dec", "c_dec", "mean absolute cosine", "between the decoder rows of two features, over all pairs of features"),
    ("ce_tokens", "CE and KL on", "tokens", "evaluated tokens that are followed by another ordinary token"),
    ("trained_tokens", "Trained on", "tokens", "how far the training was when this was evaluated"),
]
SINKS = (  # shown if there are any
    "sinks",
    "sink_variance",
    "fvu_without_sinks",
    "cosine_without_sinks",
    "ce_spliced_without_sinks",
    "delta_ce_without_sinks",
)
# a hash of the inputs; the mode is inference; the page says the others elsewhere
NOT_SHOWN = ("inputs", "site", "sites", "mode", "training_complete", "tokens", "n_features", "never_active_share")


def shown(value: object) -> str:
    """A figure with four significant digits; counts are whole."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "undefined" if value is None else str(value)
    if isinstance(value, int) or abs(value) >= 1e4:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def with_interval(found: dict, name: str) -> str:
    """A figure, with its interval if the evaluation has one."""
    match found.get(f"{name}_interval"):
        case [low, high]:
            return f"{shown(found[name])} ({shown(low)} to {shown(high)})"
    return shown(found[name])


def draw_evaluation() -> None:
    found = state.read(folder.evaluation)
    if found is None:
        st.info(f"Not evaluated yet. `saelab eval {state.code(str(state.current_run().path))}` evaluates it.")
        return
    if not found.get("sinks"):
        found = {name: value for name, value in found.items() if name not in SINKS}
    of_text = found.get("ce_tokens") != 0
    if not of_text:  # without a language model
        found = {name: value for name, value in found.items() if name != "ce_tokens"}
    present = [name for name in HEADLINE if name in found]
    with st.container(horizontal=True, gap="medium"):
        for name in present:
            share = found.get("never_active_share") if name == "never_active" else None
            more = f" ({100 * share:.2g}%)" if isinstance(share, int | float) else ""
            st.metric(HEADLINE[name], with_interval(found, name) + more, width="content")
    on = f" on {found['tokens']:,} held-out tokens" if isinstance(found.get("tokens"), int) else ""
    special = "; no figure includes BOS or other special tokens" if of_text else ""
    sites = figures_of_sites(found)
    st.caption(f"Evaluated{on} in inference mode{special}.")
    if sites:
        st.caption(f"FVU is that of all sites together. CE is that with {state.plain(sites[0]['site'])} spliced in.")
    known = {name for name, *_ in FIGURES} | set(NOT_SHOWN) | set(HEADLINE)
    rows = [(title, with_interval(found, name), unit, text) for name, title, unit, text in FIGURES if name in found]
    new = [name for name in found if name not in known and not name.endswith("_interval")]
    rows += [(name, with_interval(found, name), "", "") for name in new]
    for each in sites:
        rows.append((f"FVU at {each['site']}", shown(each["fvu"]), "", "of this site's part of the reconstruction"))
        if each.get("ce_clean") != sites[0].get("ce_clean"):
            rows.append(
                (f"CE, clean, of {each['site']}", shown(each.get("ce_clean")), "nats per token", "of its own model")
            )
        rows.append(
            (f"delta CE at {each['site']}", shown(each["delta_ce"]), "nats per token", "with this site spliced in")
        )
    with st.expander("All figures, with definitions"):
        st.html(facts_html(rows))


def figures_of_sites(found: dict) -> list[dict]:
    """The figures of each site of a crosscoder; a file that somebody damaged may have others, which are left out."""
    sites = found.get("sites")
    needed = {"site", "fvu", "delta_ce"}
    return [each for each in sites if isinstance(each, dict) and needed <= set(each)] if isinstance(sites, list) else []
