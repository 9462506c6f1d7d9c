"""The explorer's own HTML: contexts with shaded tokens, the logit lens, tables of facts.

Tokens come from a corpus and are untrusted. Every piece of text passes `escape`, which also escapes quotes, before it
goes into an element or an attribute, and none of it reaches Markdown. Numbers are only formatted here.
"""

from collections.abc import Iterable, Sequence
from html import escape

from saelab.features.examples import Example
from saelab.features.marks import number, pieces, visible

# One hue, mixed with the theme's background; even at full strength, text stays legible in light and dark themes.
HUE = "255, 140, 0"
OTHER_HUE = "80, 140, 230"  # for tokens that a feature suppresses
WEAKEST, STRONGEST = 0.12, 0.62

STYLE = f"""<style>
.stMainBlockContainer {{ padding-top: 4.2rem; padding-bottom: 3rem; }}
.st-key-neighbours a {{ background: transparent; padding: 0 .3rem; min-height: 0; }}
.st-key-neighbours a p {{ color: rgb(200, 110, 10); font-variant-numeric: tabular-nums; }}
.sl-context {{ display: grid; grid-template-columns: 3.4rem minmax(0, 1fr) 8.5rem; gap: 0 1rem; align-items: baseline;
  padding: .3rem 0; border-top: 1px solid rgba(128, 128, 128, .2); }}
.sl-text, .sl-bar {{ font-family: "Source Code Pro", ui-monospace, Menlo, Consolas, monospace; font-size: .84rem; }}
.sl-text {{ line-height: 1.75; white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4; }}
.sl-token {{ border-radius: .2rem; padding: .1rem 0; cursor: default; unicode-bidi: isolate; }}
.sl-token:hover {{ box-shadow: 0 0 0 1px rgba(128, 128, 128, .9); }}
.sl-peak {{ font-weight: 700; box-shadow: 0 0 0 1px rgba({HUE}, .95); }}
.sl-mark {{ opacity: .45; font-weight: 400; }}
.sl-token[style] .sl-mark {{ opacity: .8; }}
.sl-dim {{ opacity: .62; font-size: .78rem; }}
.sl-value {{ text-align: right; font-variant-numeric: tabular-nums; font-size: .84rem; }}
.sl-lens {{ display: grid; grid-template-columns: minmax(0, 1fr) 3.2rem; gap: .14rem .6rem; align-items: center; }}
.sl-bar {{ border-radius: .2rem; padding: .06rem .4rem; white-space: pre; overflow: hidden; text-overflow: ellipsis; }}
.sl-facts {{ width: 100%; border-collapse: collapse; font-size: .9rem; }}
.sl-facts td, .sl-facts th {{ padding: .3rem 1.2rem .3rem 0; text-align: left; vertical-align: baseline; border: 0;
  border-bottom: 1px solid rgba(128, 128, 128, .2); }}
.sl-facts th {{ font-weight: 400; opacity: .62; font-size: .78rem; }}
.sl-facts td.sl-value {{ text-align: right; white-space: nowrap; font-weight: 600; font-size: .9rem; }}
.sl-scale {{ display: inline-block; width: 6rem; height: .7rem; border-radius: .2rem; vertical-align: middle;
  background: linear-gradient(90deg, rgba({HUE}, {WEAKEST}), rgba({HUE}, {STRONGEST})); }}
</style>"""


def shading(share: float) -> str:
    """The background colour of an activation that is this share, 0 to 1, of the strongest; "" for none."""
    if not share > 0:  # also for nan
        return ""
    return f"rgba({HUE}, {WEAKEST + (STRONGEST - WEAKEST) * min(1.0, share):.2f})"


def token_html(token: str, activation: float, strongest: float, *, peak: bool = False, breaks: bool = False) -> str:
    """A token of a context, shaded by its activation; a tooltip shows both. `breaks` keeps line breaks and indents."""
    colour = shading(activation / strongest if strongest > 0 else 0.0)
    style = f' style="background: {colour}"' if colour else ""
    hover = f"{visible(token)}   {number(activation) if activation else 'not active'}"
    shown = pieces(token, breaks) or [("∅", True)]
    inner = "".join(f'<span class="sl-mark">{escape(text)}</span>' if mark else escape(text) for text, mark in shown)
    return f'<span class="sl-token{" sl-peak" if peak else ""}" title="{escape(hover)}"{style}>{inner}</span>'


def contexts_html(contexts: Iterable[Example], strongest: float, *, breaks: bool = False) -> str:
    """Contexts in rows: the activation at the peak, the text, and its position. `strongest` gets full shading."""
    return "".join(
        f'<div class="sl-context"><span class="sl-value">{number(context.activation)}</span><span class="sl-text">'
        + "".join(
            token_html(token, activation, strongest, peak=i == context.index, breaks=breaks)
            for i, (token, activation) in enumerate(zip(context.tokens, context.activations, strict=True))
        )
        + f'</span><span class="sl-dim">row {context.row}, token {context.position}</span></div>'
        for context in contexts
    )


def scale_html(strongest: float) -> str:
    """The legend of the shading."""
    return (
        f'<span class="sl-dim">activation 0 <span class="sl-scale"></span> {number(strongest)} (strongest); '
        "the frame marks the peak; hover over a token to see its activation</span>"
    )


def logits_html(pairs: Sequence[tuple[str, float]]) -> str:
    """Tokens and their logits in rows, each on a bar whose length shows the logit."""
    longest = max((abs(value) for _, value in pairs), default=0.0) or 1.0
    lines = []
    for token, value in pairs:
        share, hue = 100 * abs(value) / longest, HUE if value > 0 else OTHER_HUE
        bar = f"linear-gradient(90deg, rgba({hue}, .38) {share:.0f}%, rgba({hue}, .07) {share:.0f}%)"
        text = escape(visible(token))
        lines.append(f'<span class="sl-bar" style="background: {bar}" title="{text}">{text}</span>')
        lines.append(f'<span class="sl-value">{value:+.2f}</span>')
    return f'<div class="sl-lens">{"".join(lines)}</div>'


def facts_html(rows: Iterable[tuple[str, str, str, str]]) -> str:
    """A table with rows of (quantity, value, unit, definition)."""
    lines = "".join(
        f'<tr><td>{escape(name)}</td><td class="sl-value">{escape(value)}</td><td class="sl-dim">{escape(unit)}</td>'
        f'<td class="sl-dim">{escape(meaning)}</td></tr>'
        for name, value, unit, meaning in rows
    )
    return f'<table class="sl-facts"><tbody>{lines}</tbody></table>'


def tokens_html(tokens: Iterable[str]) -> str:
    """A few tokens on one line."""
    inner = "  ".join(f"<span>{escape(visible(token))}</span>" for token in tokens)
    return f'<div class="sl-text sl-dim">{inner}</div>'
