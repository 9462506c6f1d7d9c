"""The explorer's own HTML: styles, the logit lens, tables of facts.

Tokens come from a corpus and are untrusted. Every piece of text passes `escape`, which also escapes quotes, before it
goes into an element or an attribute, and none of it reaches Markdown. Lines of tokens are a component's, see
`components`.
"""

from collections.abc import Iterable, Sequence
from html import escape

from saelab.features.database import TokenValue
from saelab.features.marks import cut, visible

HUE = "255, 140, 0"
OTHER_HUE = "80, 140, 230"  # for tokens that a feature suppresses

STYLE = """<style>
.stMainBlockContainer { padding: 3.6rem clamp(1rem, 3vw, 3rem) 3rem; }
.stMainBlockContainer > .stVerticalBlock { gap: .6rem; }
.st-key-feature_bar { padding: .4rem 0; backdrop-filter: blur(1rem); }
/* Above Streamlit's own header, which is empty there. */
@media (min-width: 640px) { div:has(> .st-key-feature_bar) { position: sticky; top: 0; z-index: 999991; } }
@media (max-width: 639px) { .st-key-feature_bar button :is(p, kbd) { display: none; } }
@media (min-width: 640px) { .stColumn:has(.st-key-rail) { position: sticky; top: 4rem; align-self: flex-start;
  max-height: calc(100vh - 5rem); overflow-y: auto; } }
div:has(> .st-key-beside) { position: sticky; top: 0; z-index: 80; max-height: 60vh; overflow-y: auto; flex: none;
  backdrop-filter: blur(2rem); }
/* On a phone the numbers stand below the examples, and what is beside them would be out of sight. */
@media (max-width: 639px) { div:has(> .st-key-beside) { position: fixed; inset: auto 0 0; max-height: 45vh;
  z-index: 999992; background: Canvas; } }
.st-key-rail .sl-facts, .st-key-rail .sl-facts td.sl-value { font-size: .8rem; }
.st-key-rail .sl-facts td { padding: .12rem .6rem .12rem 0; }
.st-key-rail .sl-facts td:empty { display: none; }
.sl-bar { font-family: "Source Code Pro", ui-monospace, Menlo, Consolas, monospace; font-size: .84rem; }
.sl-dim { opacity: .76; font-size: .78rem; }
.sl-value { text-align: right; font-variant-numeric: tabular-nums; font-size: .84rem; }
.sl-lens { display: grid; grid-template-columns: minmax(0, 1fr) 3.2rem; gap: .14rem .6rem; align-items: center; }
.sl-bar { border-radius: .2rem; padding: .06rem .4rem; white-space: pre; overflow: hidden; text-overflow: ellipsis;
  unicode-bidi: isolate; }
.sl-facts { width: 100%; border-collapse: collapse; font-size: .9rem; }
.sl-facts td, .sl-facts th { padding: .3rem 1.2rem .3rem 0; text-align: left; vertical-align: baseline; border: 0;
  border-bottom: 1px solid rgba(128, 128, 128, .2); }
.sl-facts th { font-weight: 400; opacity: .76; font-size: .78rem; }
.sl-facts td.sl-value { text-align: right; white-space: nowrap; font-weight: 600; font-size: .9rem; }
</style>"""


def bars_html(pairs: Sequence[TokenValue], shown: str = "{:+.2f}") -> str:
    """Tokens in rows, each on a bar whose length shows its value; `shown` formats the value."""
    longest = max((abs(pair.value) for pair in pairs), default=0.0) or 1.0
    lines = []
    for _, token, value in pairs:
        share, hue = 100 * abs(value) / longest, HUE if value > 0 else OTHER_HUE
        bar = f"linear-gradient(90deg, rgba({hue}, .38) {share:.0f}%, rgba({hue}, .07) {share:.0f}%)"
        text = escape(cut(visible(token)))
        lines.append(f'<span class="sl-bar" style="background: {bar}" title="{text}">{text}</span>')
        lines.append(f'<span class="sl-value">{escape(shown.format(value))}</span>')
    return f'<div class="sl-lens">{"".join(lines)}</div>'


def facts_html(rows: Iterable[tuple[str, str, str, str]]) -> str:
    """A table with rows of (quantity, value, unit, definition)."""
    lines = "".join(
        f'<tr><td>{escape(name)}</td><td class="sl-value">{escape(value)}</td><td class="sl-dim">{escape(unit)}</td>'
        f'<td class="sl-dim">{escape(meaning)}</td></tr>'
        for name, value, unit, meaning in rows
    )
    return f'<table class="sl-facts"><tbody>{lines}</tbody></table>'
