"""Overview of a run: evaluation, training curves and settings."""

import streamlit as st
from explorer import charts, state
from explorer.html import facts_html, number

from saelab.features import database
from saelab.runs import folder

# The figures of eval.json in reading order: (name, title, unit, definition).
FIGURES = [
    ("fvu", "FVU", "", "squared error over squared deviation from the mean, each pooled over all evaluated tokens"),
    ("l0", "L0", "features per token", "mean number of active features"),
    ("cosine", "Cosine", "", "mean cosine between an activation vector and its reconstruction"),
    (
        "sinks",
        "Attention sinks",
        "tokens",
        "evaluated tokens with norms above 10 times the median; FVU and cosine count them",
    ),
    ("sink_variance", "Variance in sinks", "share", "of the squared deviations from the mean, over all tokens"),
    ("fvu_without_sinks", "FVU without sinks", "", "over all other tokens"),
    ("cosine_without_sinks", "Cosine without sinks", "", "over all other tokens"),
    ("ce_spliced_without_sinks", "CE, spliced without sinks", "nats per token", "sinks are left clean"),
    ("delta_ce_without_sinks", "delta CE without sinks", "nats per token", "CE spliced without sinks - CE clean"),
    ("top_variance", "Variance in few dimensions", "share", "in the largest 1% of them, over all tokens but sinks"),
    ("ce_clean", "CE, clean", "nats per token", "cross-entropy of the next token in the unchanged model"),
    ("ce_spliced", "CE, spliced", "nats per token", "with the reconstruction in place of the activations"),
    ("delta_ce", "delta CE", "nats per token", "CE spliced - CE clean: the loss added by the reconstruction"),
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
    ("never_active", "Never active", "features", "active on none of the evaluated tokens, in inference mode"),
    ("never_active_share", "Never active", "share", "of all features"),
    ("share_below_1e4", "Density below 1e-4", "share", "features active on less than 0.01% of the evaluated tokens"),
    ("share_below_1e5", "Density below 1e-5", "share", "features active on less than 0.001% of the evaluated tokens"),
    ("c_dec", "c_dec", "mean absolute cosine", "between the decoder rows of two features, over all pairs of features"),
    ("n_features", "Features", "", "number of features of the autoencoder"),
    ("tokens", "Evaluated on", "tokens", "N: held-out tokens; no figure includes BOS or other special tokens"),
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
# a hash of the inputs; the site is in the caption; the mode is inference; the page's head shows an unfinished training
NOT_SHOWN = ("inputs", "site", "mode", "training_complete")

CURVES = {
    "fvu": "FVU of the batch",
    "l0": "L0, active features per token",
    "dead": "Dead features (in training)",
    "aux": "Auxiliary loss",
    "targets": "Features targeted by the auxiliary loss",
    "share_reached": "Share of targeted features with a gradient",
    "multi_topk": "FVU of the batch with four times the budget",
    "l1": "L1 penalty, before its weight",
    "lr": "Learning rate",
    "gradient_norm": "Norm of the gradient",
    "tokens_per_second": "Tokens per second",
}


def shown(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "undefined" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}" if abs(value) >= 1e-3 else number(value)


def draw_evaluation() -> None:
    st.subheader("Evaluation", anchor=False)
    found = state.read(folder.evaluation)
    if found is None:
        st.info(f"Not evaluated yet. `saelab eval {state.code(str(state.current_run().path))}` evaluates it.")
        return
    headline = [
        ("fvu", "FVU"),
        ("fvu_without_sinks", "FVU without sinks"),
        ("delta_ce", "delta CE, nats"),
        ("l0", "L0"),
        ("never_active", "Never active"),
    ]
    if not found.get("sinks"):
        found = {name: value for name, value in found.items() if name not in SINKS}
    present = [(name, title) for name, title in headline if name in found]
    for column, (name, title) in zip(st.columns(max(1, len(present))), present, strict=False):
        column.metric(title, shown(found[name]))
    rows = [(title, shown(found[name]), unit, text) for name, title, unit, text in FIGURES if name in found]
    known = {name for name, *_ in FIGURES} | set(NOT_SHOWN)
    rows += [(name, shown(value), "", "") for name, value in found.items() if name not in known]
    st.html(facts_html(rows))


def draw_training() -> None:
    st.subheader("Training", anchor=False)
    metrics = state.read(folder.metrics)
    x = next((name for name in ("tokens", "step") if name in metrics), None)
    if x is None:
        st.info("No training metrics were logged.")
        return
    names = [name for name in CURVES if name in metrics]
    names += [name for name in metrics if name not in CURVES and name not in ("tokens", "step")]
    for start in range(0, len(names), 3):
        for column, name in zip(st.columns(3, gap="medium"), names[start : start + 3], strict=False):
            with column:
                title = CURVES.get(name, name)
                charts.draw(charts.curve(metrics, x, name, title), f"curve-{name}", f"{title} over training")


def page() -> None:
    run = state.current_run()
    st.header(state.plain(st.session_state["run_name"]), anchor=False)
    unfinished = state.read(folder.unfinished)
    if unfinished:
        goes_on = f"`saelab train --resume {state.code(str(run.path))}` goes on with it."
        st.warning(f"{unfinished[0].upper()}{unfinished[1:]}. {goes_on}", icon=":material/warning:")
    if run.has_features:
        whole = state.read(database.summary)
        st.caption(
            state.plain(f"{whole.n_features:,} features of {whole.site} ({whole.d_in} wide) of the model {whole.model}")
        )
    else:
        st.info(f"No features yet. `saelab index {state.code(str(run.path))}` makes them.")
    draw_evaluation()
    draw_training()
    with st.expander("Settings, with defaults and overrides (config.yaml)"):
        st.code(state.read(folder.settings_text), language="yaml")


page()
