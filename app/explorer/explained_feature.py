"""A feature's explanations with their scores, and the tools that make more: explain, score, write by hand."""

from collections.abc import Callable, Collection, Mapping, Sequence
from html import escape
from urllib.parse import urlencode

import numpy as np
import streamlit as st

from explorer import explanations, llm, state
from explorer.listing import version
from saelab.analysis.intervals import Interval
from saelab.autointerp import single
from saelab.autointerp.constant import warning
from saelab.autointerp.embedders import Embedder, of_database
from saelab.autointerp.explain import LONGEST
from saelab.autointerp.lexical import NAME as LEXICAL
from saelab.autointerp.llm.budget import estimate
from saelab.autointerp.overview import Source, is_control, records
from saelab.autointerp.records import Score
from saelab.autointerp.scoring import CHANCE, Judges
from saelab.autointerp.store import Explained, Scored
from saelab.errors import SaelabError
from saelab.features.database import Database, Feature

AUTHOR = "explanation_author"
"""The name that the reader gave last, in the session."""


def draw_headline(database: Database, feature: Feature) -> None:
    """The latest explanation of a feature; without one, buttons that make one."""
    explanations.draw_problem(database)
    if explanations.problem(database):
        return
    found = explanations.known(database).explanation(feature.index)
    if found is not None:
        st.html(explanations.explanation_html(found))
    elif not feature.never_active:
        with state.errors_shown(), st.container(horizontal=True, vertical_alignment="center", gap="small"):
            st.caption("No explanation yet.", width="content")
            draw_explain(database, feature.index, {}, "headline")


@st.fragment(key="explanations")
@state.errors_shown()
def draw_explanations(index: int) -> None:
    """The scores of the latest explanation; the other ones; and how to make more."""
    database = state.database()
    if explanations.problem(database):  # which stands above
        return
    feature, known = database.feature(index), explanations.known(database)
    explained, scores = records(explanations.place_of(database).folder, known, index)
    own = [each for each in reversed(explained) if not source_of(each).control]
    latest = next((each for each in own if int(each.explanation.key, 16) == known.latest.get(index)), None)
    st.subheader("Explanation and scores", anchor=False)
    of_feature = [each.score for each in scores if not each.score.explanation]
    if latest is not None:
        draw_scores(latest, explained, scores, of_feature)
        with state.errors_shown():
            draw_score_buttons(database, latest, scores, "latest")
        draw_commands({each.score.score for each in scores})
    elif of_feature:
        st.html(scores_html(of_feature, {}))
    others = [each for each in own if each is not latest]
    if others:
        with st.expander(f"{len(others)} other{'s' * (len(others) > 1)}"):
            for each in others:
                draw_other(database, each, explained, scores)
    if feature.never_active:
        return
    with state.errors_shown(), st.container(horizontal=True, gap="small"):
        if latest is not None:
            draw_explain(database, index, {source_of(each): each for each in own}, "rail")
        draw_writing(database, index, latest)


def draw_commands(scored: Collection[str]) -> None:
    """How to make the scores for which the run's language model has to be loaded."""
    path = state.code(str(state.current_run().path))
    lines = {
        "surprisal": f"`saelab score {path} --scores surprisal`",
        "intervention": f"`saelab explain {path} --about effect`, `saelab score {path} --scores intervention`",
    }
    if missing := [f"{name}: {line}" for name, line in lines.items() if name not in scored]:
        st.caption("These run the language model. " + "; ".join(missing))


def source_of(each: Explained) -> Source:
    return Source(each.explanation.kind, each.explanation.model, each.explanation.author)


def draw_other(database: Database, each: Explained, explained: Sequence[Explained], scores: Sequence[Scored]) -> None:
    """An explanation that is not the latest one, or that could not be read."""
    made = escape(explanations.who(source_of(each)))
    text = escape(each.explanation.text) or "<i>no explanation</i>"
    st.html(f'<div class="sl-explanation"><bdi>{text}</bdi> <small class="sl-dim">{made}</small></div>')
    draw_scores(each, explained, scores)
    with state.errors_shown():
        draw_score_buttons(database, each, scores, each.explanation.key)


def draw_scores(
    each: Explained, explained: Sequence[Explained], scores: Sequence[Scored], of_feature: Sequence[Score] = ()
) -> None:
    """The notes on an explanation, and its scores beside those of its control, with those of the feature itself."""
    explanation = each.explanation
    notes = [explanation.note] if explanation.note else []
    if not explanation.text and explanation.answer:
        notes.append(f"The answer could not be read: {explanation.answer}")
    elif explanation.model == LEXICAL:
        notes.append(explanation.answer)
    control = next((c for c in reversed(explained) if is_control(c.explanation, explanation)), None)
    if control is not None:
        notes.append(f"Its control is {control.explanation.note}.")
    if text := "".join(f'<div class="sl-note">{escape(note)}</div>' for note in notes if note):
        st.html(text)
    key = control.explanation.key if control else None
    controls = {(s.score.score, s.score.model): s.score for s in scores if s.score.explanation == key}
    own = [s.score for s in scores if s.score.explanation == explanation.key]
    if not own and explanation.text:
        st.caption("Not scored yet.")
    if own or of_feature:
        st.html(scores_html([*own, *of_feature], controls))
        st.caption("Below: 95% intervals. Control: the explanation of another feature, scored on this one.")


def scores_html(scores: Sequence[Score], controls: Mapping[tuple[str, str], Score]) -> str:
    """A table of scores, each beside its control, with links to the judged examples."""
    lines = []
    for score in scores:
        control = controls.get((score.score, score.model))
        small = [score.unit, f"judge: {explanations.judge(score.model)}"]
        small += [f"{score.unread:,} answer{'s' * (score.unread > 1)} could not be read"] if score.unread else []
        small += [each for each in (score.note, warning(score.figures)) if each]
        against = value_html(control.value) if control else "<small>none yet</small>"
        if not score.explanation:
            against = f"<small>chance {CHANCE[score.unit]:.2g}</small>" if score.unit in CHANCE else ""
        other = f' <a href="{escape(_address(control))}" target="_self">control</a>' if control else ""
        lines.append(
            f"<tr><td>{escape(score.score)}<small>{escape(' · '.join(small))}</small></td>"
            f'<td class="sl-value">{value_html(score.value)}</td><td class="sl-value">{against}</td>'
            f'<td><a href="{escape(_address(score))}" target="_self">audit</a>{other}</td></tr>'
        )
    head = '<tr><th>score</th><th class="sl-value">value</th><th class="sl-value">control</th><th></th></tr>'
    return f'<table class="sl-facts sl-scores"><thead>{head}</thead><tbody>{"".join(lines)}</tbody></table>'


def _address(score: Score) -> str:
    return f"audit?{urlencode(state.link(feature=score.feature, score=score.key))}"


def value_html(value: Interval) -> str:
    return f"{figure(value.value)}<small>{ends(value)}</small>"


def figure(value: float) -> str:
    return f"{value:.2f}" if np.isfinite(value) else "none"


def ends(value: Interval) -> str:
    return f"{value.low:.2f} to {value.high:.2f}" if np.isfinite(value.low) and np.isfinite(value.high) else ""


# tools


def draw_explain(database: Database, index: int, made: Mapping[Source, Explained], key: str) -> None:
    """Buttons that explain the feature now, by those who have not done so."""
    place, asked = explanations.place_of(database), llm.language_model()
    if Source(LEXICAL, LEXICAL, "") not in made:
        acts(
            "Explain now, offline",
            "auto_awesome",
            f"{key}_lexical",
            lambda: single.explain(place, index, llm.OFFLINE.client),
            f"at once; {explanations.LEXICAL}",
        )
    if asked is not None and Source("default", asked.client.name, "") not in made:
        price = asked.budget.price if asked.budget else None
        try:
            cost = estimate(asked.client, [single.request(place, index, asked.client)], 1, price)
        except SaelabError:  # there are no windows to explain it from, as the other button says
            return
        acts(
            f"Ask {asked.client.name}",
            "psychology",
            f"{key}_llm",
            lambda: single.explain(place, index, asked.client, asked.budget),
            f"{cost}",
        )


def draw_score_buttons(database: Database, each: Explained, scores: Sequence[Scored], key: str) -> None:
    """Buttons that score an explanation, by those who have not done so."""
    if not each.explanation.text or source_of(each).effect:
        return
    place, known, asked = explanations.place_of(database), explanations.known(database), llm.language_model()
    judged = {each_.score.model for each_ in scores if each_.score.explanation == each.explanation.key}
    with st.container(horizontal=True, gap="small"):
        if LEXICAL not in judged:
            acts(
                "Score now, offline",
                "speed",
                f"score_{key}_lexical",
                lambda: single.score(place, each, known, judges(database, llm.OFFLINE)),
                "detection, fuzzing, embedding, intruder and predicate, by words in common; no language model. The "
                "first one takes some seconds.",
            )
        if asked is not None and asked.client.name not in judged:
            price = asked.budget.price if asked.budget else None
            acts(
                f"Let {asked.client.name} judge",
                "speed",
                f"score_{key}_llm",
                lambda: single.score(place, each, known, judges(database, asked), asked.budget),
                str(single.cost(place, each, judges(database, asked), price)),
            )


def acts(label: str, icon: str, key: str, act: Callable[[], object], help: str) -> None:
    """A button; what it does is shown after it, or why it failed."""
    if st.button(state.plain(label), key=f"act_{key}", icon=f":material/{icon}:", help=state.plain(help)):
        with st.spinner("Working ... a language model that does not answer is asked again for about a minute"):
            act()
        st.rerun()


def judges(database: Database, asked: llm.Asked) -> Judges:
    def embed(texts: Sequence[str]) -> np.ndarray:
        return embedder(database, version(database))(texts)  # at the first use: it takes seconds

    return Judges(asked.client, embed, "TF-IDF")


@st.cache_resource(max_entries=2, show_spinner=False)
def embedder(_database: Database, version: tuple) -> Embedder:
    return of_database(_database)


def draw_writing(database: Database, index: int, latest: Explained | None) -> None:
    """A form for an explanation by hand, which begins with the latest one."""
    with st.popover("Write one", icon=":material/edit:"), st.form(f"write_{index}", border=False):
        text = st.text_area(
            "Explanation",
            latest.explanation.text if latest else "",
            max_chars=LONGEST,
            help='It is stored beside the others. One in words such as: the tokens " def", " class"; numbers - can be '
            "run, for the score predicate.",
        )
        author = st.text_input(
            "Your name", st.session_state.get(AUTHOR, ""), max_chars=single.LONGEST_AUTHOR, placeholder="as the author"
        )
        if st.form_submit_button("Save"):
            try:
                single.write_by_hand(explanations.place_of(database), index, text or "", author or "")
            except SaelabError as error:
                state.show_error(error)
                return
            st.session_state[AUTHOR] = author
            st.rerun()
