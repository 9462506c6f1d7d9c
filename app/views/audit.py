"""The judged examples of one score: what the judge saw, what is true, and what it said."""

from collections.abc import Sequence
from html import escape

import numpy as np
import streamlit as st
from explorer import explanations, state
from explorer.components.tokens import Line, draw_tokens, feature_names
from explorer.explained_feature import ends, figure
from explorer.listing import Listing, feature_address

from saelab.autointerp.audit import Group, asked, example_of, groups
from saelab.autointerp.constant import warning
from saelab.autointerp.overview import Source, records
from saelab.autointerp.records import Explanation, Judged, Score
from saelab.autointerp.store import Scored, score_at
from saelab.features.database import Database
from saelab.features.token_facts import percentiles

LONGEST_ANSWER = 2000
"""Characters of an answer that are shown."""
CELLS = ("true_positive", "false_negative", "false_positive", "true_negative")
"""The figures of the confusion matrix."""
ANSWERED = ("simulation", "intervention")
"""Scores whose answers are shown although they could be read."""


def label_of(score: Score, explained: dict[str, Explanation]) -> str:
    """A score in the list of scores."""
    of, judge = explained.get(score.explanation), explanations.judge(score.model)
    value = figure(score.value.value)
    if of is None:
        return f"{score.score} by {judge}: {value}"
    text = of.text if len(of.text) <= 60 else of.text[:60] + "…"
    control = "control: " * Source(of.kind, of.model, of.author).control
    return f"{score.score} by {judge}: {value}, of {control}{text}"


def draw_confusion(score: Score) -> None:
    """The confusion matrix with what follows from it."""
    tp, fn, fp, tn = (f"{score.figures[name]:,.0f}" for name in CELLS)
    st.html(
        '<table class="sl-facts sl-confusion"><thead><tr><th></th><th>the judge says 1</th><th>says 0</th></tr></thead>'
        f'<tbody><tr><th>should be 1</th><td class="sl-value">{tp}</td><td class="sl-value">{fn}</td></tr>'
        f'<tr><th>should be 0</th><td class="sl-value">{fp}</td><td class="sl-value">{tn}</td></tr></tbody></table>'
    )
    shares = [
        f"{name} {figure(score.figures[name])}"
        for name in ("precision", "recall", "accuracy", "F1")
        if name in score.figures
    ]
    st.caption(", ".join(shares))


def draw_parts(score: Score) -> None:
    """A figure for each part of the feature's windows, strongest first."""
    names = [name for name in score.figures if ": " in name and name.rpartition(": ")[2].isdigit()]
    kind = next((name.rpartition(": ")[0] for name in names), None)
    if kind is None:
        return
    own = [name for name in names if name.rpartition(": ")[0] == kind]
    cells = "".join(f'<td class="sl-value">{escape(figure(score.figures[name]))}</td>' for name in own)
    heads = "".join(f"<th>{int(name.rpartition(': ')[2]) + 1}</th>" for name in own)
    st.html(
        '<div class="sl-wide"><table class="sl-facts sl-parts"><thead><tr><th>part, strongest first</th>'
        f"{heads}</tr></thead><tbody><tr><td>{escape(kind)}</td>{cells}</tr></tbody></table></div>"
    )


def side(score: Score, each: Judged) -> str:
    """What the judge said of a window, and what is true."""
    part = f"part {each.quantile + 1}" if each.quantile >= 0 else "silent"
    if score.score == "intruder":
        words = ["intruder" * each.truth, "picked" * bool(each.said)]
        return "\n".join(filter(None, (*words, part)))
    return f"{'?' if each.said is None else f'{each.said:.2f}'}\n{part}"


def lines(database: Database, score: Score, group: Group) -> list[Line]:
    """The windows of a group, with the marks that the judge saw."""
    active = database.facts.activations(score.feature)
    found = []
    for number, each in enumerate(group.judged):
        example = example_of(database, score.feature, each)
        shown = each.said is None or score.score in ANSWERED
        title = f"{group.title} ({len(group.judged)})" if score.score != "intruder" else group.title
        found.append(
            Line(
                example.tokens,
                example.token_ids,
                example.activations,
                percentiles(active, example.activations),
                start=example.start,
                row=example.row,
                side=side(score, each),
                heading=title if number == 0 else "",
                marks=each.marked,
                note=each.answer[:LONGEST_ANSWER] if shown else "",
            )
        )
    return found


def draw_question(database: Database, found: Scored, explanation: Explanation | None) -> None:
    """The first question that the judge was asked, if it can be made again."""
    question = asked(database, found, explanation)
    if question is None:
        return
    with st.expander("The first question, as the judge got it"):
        for role, text in question.messages:
            st.caption(role)
            st.code(text, language=None, wrap_lines=True)


def draw(database: Database, found: Scored, explanation: Explanation | None) -> None:
    score = found.score
    if explanation is not None:
        source = Source(explanation.kind, explanation.model, explanation.author)
        text, made = escape(explanation.text), escape(explanations.who(source))
        note = f"; {explanation.note}" if source.control and explanation.note else ""
        st.html(
            f'<div class="sl-explanation"><bdi>{text}</bdi> <small class="sl-dim">{made}{escape(note)}</small></div>'
        )
    value = figure(score.value.value) + f" ({ends(score.value)})" * bool(ends(score.value))
    st.metric(state.plain(score.unit), value, width="content")
    facts = [f"Judge: {explanations.judge(score.model)}", f"{len(score.judged):,} examples"]
    facts += [f"{score.unread:,} answers that could not be read", score.note, warning(score.figures)]
    st.caption(state.plain("; ".join(filter(None, facts))))
    if all(name in score.figures for name in CELLS):
        left, right = st.columns([2, 3], gap="large")
        with left:
            draw_confusion(score)
        with right:
            draw_parts(score)
    else:
        draw_parts(score)
    draw_question(database, found, explanation)
    every = groups(score)
    wrong = st.toggle("Only mistakes and unreadable answers", **state.bound("mistakes", False))
    shown = [group for group in every if not wrong or group.mistake or any(each.said is None for each in group.judged)]
    drawn = [line for group in shown for line in lines(database, score, group)]
    if not drawn:
        st.info("There are none." if score.judged else "No example was judged.")
        return
    draw_tokens(
        drawn,
        key="tokens_judged",
        strongest=database.feature(score.feature).usual_maximum or 1.0,
        link=feature_address(Listing()),
        names=feature_names(database),
    )
    st.caption(legend(score, drawn))


def legend(score: Score, drawn: Sequence[Line]) -> str:
    said = {
        "AUROC": "The number is what the judge gave the window; only their order counts.",
        "accuracy": "Of each question's windows, the one in which the feature is silent should be picked.",
        "correlation": "The number is the largest that the judge gave a token, over 10; below it stands its answer.",
        "nats": "The number is how much likelier steering makes the explanation, in nats; below it stand the texts.",
    }.get(score.unit, "The number is the judge's probability of 1, or its verdict.")
    marks = " Tokens between two lines were marked for the judge." if any(line.marks for line in drawn) else ""
    if score.score == "predicate":
        marks = " Tokens between two lines are those on which the explanation, run as a program, is active."
    return f"{said} Shades are the feature's activation, which the judge does not see.{marks}"


def page() -> None:
    database = state.database()
    n_active = np.asarray(database.table["n_active"])
    index = state.current_feature(database.n_features, otherwise=int((n_active > 0).argmax()))
    st.header(f"Audit of feature {index}", anchor=False)
    explanations.draw_problem(database)
    known, place = explanations.known(database), explanations.place_of(database)
    explained, scores = records(place.folder, known, index)
    st.page_link(
        state.FEATURE,
        label=f"Feature {index}",
        icon=":material/center_focus_strong:",
        query_params=state.link(feature=index),
    )
    if not scores:
        path = state.code(str(state.current_run().path))
        st.info(f"This feature has no scores. Its page has buttons that make them; `saelab score {path}` scores many.")
        return
    by_key = {each.explanation.key: each.explanation for each in explained}
    of = {each.score.key: each.score for each in scores}
    key = st.selectbox(
        "Score",
        list(of),
        format_func=lambda key: label_of(of[key], by_key),
        **state.bound("score", next(iter(of)), list(of)),
    )
    own = known.scores[(known.scores["feature"] == index) & (known.scores["key"] == int(key, 16))]
    found = score_at(place.folder, int(own["offset"][0]))
    draw(database, found, by_key.get(found.score.explanation))


page()
