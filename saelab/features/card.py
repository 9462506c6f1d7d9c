"""A feature as HTML, for a notebook and for an exported page: no script, no request, light and dark.

Tokens and names are untrusted: every piece of text passes `escape` before it goes into an element or an attribute.
"""

from collections.abc import Collection
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from saelab.features.marks import cut, number, pieces, visible

if TYPE_CHECKING:
    from saelab.features.database import Feature, Neighbour, TokenValue
    from saelab.features.examples import Example

STYLE = """<style>
.saelab-card { --page: #ffffff; --text: #1b1c1e; --dim: #5c6066; --line: #d9dbdf; --link: #8a4b00;
  --up: 255, 140, 0; --down: 80, 140, 230; --weakest: .2; --strongest: .62;
  background: var(--page); color: var(--text); border: 1px solid var(--line); border-radius: .4rem;
  padding: .8rem 1rem; margin: .5rem 0; max-width: 76rem; font: .9rem/1.45 system-ui, sans-serif; text-align: left; }
@media (prefers-color-scheme: dark) {
  .saelab-card { --page: #1d1e21; --text: #e9eaec; --dim: #a8acb3; --line: #3b3e44; --link: #ffb45c;
    --strongest: .46; } }
.saelab-card h2 { font-size: 1.25rem; margin: 0 .8rem 0 0; display: inline; }
.saelab-card h3 { font-size: .8rem; font-weight: 600; margin: .9rem 0 .2rem; }
.saelab-card .columns { display: flex; flex-wrap: wrap; gap: 0 2rem; }
.saelab-card .wide { flex: 1 1 26rem; min-width: 0; }
.saelab-card .narrow { flex: 0 1 20rem; min-width: 0; }
.saelab-card .dim { color: var(--dim); font-size: .8rem; }
.saelab-card .example { display: grid; grid-template-columns: 3.2rem minmax(0, 1fr); gap: 0 .7rem; padding: .25rem 0;
  border-top: 1px solid var(--line); }
.saelab-card .value { text-align: right; font-variant-numeric: tabular-nums; }
.saelab-card .text, .saelab-card .bar { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .82rem; }
.saelab-card .text { line-height: 1.75; white-space: pre-wrap; overflow-wrap: anywhere; }
.saelab-card .token { unicode-bidi: isolate; border-radius: .2rem; }
.saelab-card .active { background: rgba(var(--up), calc(var(--weakest) + (var(--strongest) - var(--weakest)) *
  var(--share))); box-shadow: inset 0 -.13em rgb(var(--up)); }
.saelab-card .peak { font-weight: 700; outline: 1px solid currentColor; }
.saelab-card .mark { color: var(--dim); font-weight: 400; }
.saelab-card .active .mark { color: inherit; }
.saelab-card .list { display: grid; grid-template-columns: minmax(0, 1fr) auto; gap: .1rem .6rem; }
.saelab-card .bar { white-space: pre; overflow: hidden; text-overflow: ellipsis; padding: 0 .3rem; border-radius: .2rem;
  background: linear-gradient(90deg, rgba(var(--up), .34) calc(100% * var(--share)), rgba(var(--up), .06) 0); }
.saelab-card .bar.down { background: linear-gradient(90deg, rgba(var(--down), .34) calc(100% * var(--share)),
  rgba(var(--down), .06) 0); }
.saelab-card svg { display: block; width: 100%; height: 4rem; fill: rgb(var(--up)); }
.saelab-card .ends { display: flex; justify-content: space-between; border-top: 1px solid var(--line); }
.saelab-card a { color: var(--link); }
.saelab-card summary { margin-top: .9rem; cursor: pointer; font-size: .8rem; font-weight: 600; }
</style>"""

_EXAMPLES = 10
_FOLDED = 3
"""Examples of an interval, and near misses of each kind."""
_NEIGHBOURS = 5
_KINDS = {"decoder": "decoder cosine", "encoder": "encoder cosine", "coactive": "co-activation, phi"}


def card(feature: "Feature", linked: Collection[int] = (), whole: bool = False) -> str:
    """A feature as an element that needs `STYLE` on its page.

    Neighbours in `linked` become links to ``#feature-INDEX``, the id of this element for another feature. `whole` adds
    intervals and near misses, folded up.
    """
    database = feature.database
    origin = f"{database.folder.resolve().parent.name} / {database.site} / {database.model}"
    rail = "".join(
        [
            _section("Activations", _histogram(feature)),
            _section("Raises the logits of", _tokens(feature.top_logits, "{:+.2f}")),
            _section("Lowers the logits of", _tokens(feature.bottom_logits, "{:+.2f}")),
            _section("", _dim(f"Decoder row through the unembedding; {database.lens}.") if feature.top_logits else ""),
            _section("Tokens with most of its activation", _tokens(feature.top_tokens, "{:.1%}")),
            *(_section(f"Neighbours: {_KINDS[kind]}", _neighbours(feature, kind, linked)) for kind in _KINDS),
        ]
    )
    examples = database.examples(feature.index, n=_EXAMPLES, distinct=True)
    shown = _section("Strongest activations", _examples(feature, examples)) + (_folded(feature) if whole else "")
    return (
        f'<section class="saelab-card" id="feature-{feature.index}"><h2>Feature {feature.index}</h2>'
        f'<span class="dim">{escape(visible(origin))}</span><div>{_figures(feature)}</div><div class="columns">'
        f'<div class="wide">{shown}</div><div class="narrow">{rail}</div>'
        "</div></section>"
    )


def _figures(feature: "Feature") -> str:
    if feature.never_active:
        return f"never active on {feature.n_tokens:,} tokens"
    return (
        f"density {100 * feature.density:.3g}% ({feature.n_active:,} of {feature.n_tokens:,} tokens), "
        f"mean activation {number(feature.mean)}, maximum {number(feature.maximum)}, "
        f"entropy over {'labels' if feature.database.of_array else 'token ids'} {feature.token_entropy:.1f} bits"
    )


def _section(title: str, inner: str) -> str:
    return (f"<h3>{escape(title)}</h3>" if title else "") + inner if inner else ""


def _dim(text: str) -> str:
    return f'<div class="dim">{escape(text)}</div>'


def _histogram(feature: "Feature") -> str:
    """Bars of the number of tokens in each bin of activation."""
    if feature.never_active:
        return ""
    counts, edges, logarithmic = feature.bars
    most, ends = int(counts.max()), [number(float(edge)) for edge in edges[[0, -1]]]
    heights = np.where(counts > 0, np.maximum(60 * counts / most, 1.5), 0)  # a bar of one token is seen too
    bars = "".join(
        f'<rect x="{5 * i}" y="{60 - height:.2f}" width="4" height="{height:.2f}"/>'
        for i, height in enumerate(heights.tolist())
        if height
    )
    counted = f"at most {most:,} in a bin" + (", logarithmic" if logarithmic else "")
    label = f"tokens in {len(counts)} bins of activation from {ends[0]} to {ends[1]}, {counted}"
    return (
        f'<svg viewBox="0 0 {5 * len(counts)} 60" preserveAspectRatio="none" role="img" aria-label="{label}">{bars}'
        f'</svg><div class="ends dim"><span>{ends[0]}</span><span>{counted}</span>'
        f"<span>{ends[1]}</span></div>"
    )


def _tokens(tokens: "list[TokenValue]", digits: str) -> str:
    """Tokens with numbers, each on a bar whose length shows the number."""
    longest = max((abs(token.value) for token in tokens), default=0.0) or 1.0
    lines = []
    for token in tokens:
        down = " down" if token.value < 0 else ""
        lines.append(
            f'<span class="bar{down}" style="--share: {abs(token.value) / longest:.2f}">{escape(_line(token.text))}'
            f'</span><span class="value">{digits.format(token.value)}</span>'
        )
    return f'<div class="list">{"".join(lines)}</div>' if lines else ""


def _neighbours(feature: "Feature", kind: str, linked: Collection[int]) -> str:
    lines = []
    for neighbour in feature.neighbours[kind][:_NEIGHBOURS]:
        lines.append(f'<span class="bar" style="--share: 0">{_named(feature, neighbour, linked)}</span>')
        lines.append(f'<span class="value">{neighbour.value:.3f}</span>')
    return f'<div class="list">{"".join(lines)}</div>' if lines else ""


def _named(feature: "Feature", neighbour: "Neighbour", linked: Collection[int]) -> str:
    """A neighbour's index and the tokens that have most of its activation."""
    database, index = feature.database, neighbour.feature
    tokens = [token for token in database.table["top_tokens"][index][:3].tolist() if token >= 0]
    words = escape("  ".join(_line(database.vocabulary.text(token)) for token in tokens))
    name = f'<a href="#feature-{index}">{index}</a>' if index in linked else f"{index}"
    return f'{name}  <span class="dim">{words}</span>'


def _folded(feature: "Feature") -> str:
    """Examples of each interval between deciles, and near misses."""
    database = feature.database
    groups = []
    for low, high, share, examples in database.intervals(feature.index, _FOLDED):
        title = f"{number(low)} to {number(high)}, {100 * share:.3g}% of its activations"
        groups.append(_section(title, _examples(feature, examples)))
    found = database.near_misses(feature.index, _FOLDED)
    misses = [
        _section("At the same token, not active", _examples(feature, found.same_token)),
        _section("In similar text, silent", _examples(feature, found.similar_text)),
    ]
    return _details("Intervals between deciles", "".join(groups)) + _details("Near misses", "".join(misses))


def _details(title: str, inner: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{inner}</details>" if inner else ""


def _examples(feature: "Feature", examples: "list[Example]") -> str:
    return "".join(_example(example, feature) for example in examples)


def _example(example: "Example", feature: "Feature") -> str:
    tokens = "".join(
        _token(text, value, feature.usual_maximum, i == example.index)
        for i, (text, value) in enumerate(zip(example.tokens, example.activations.tolist(), strict=True))
    )
    where = f"row {feature.database.first_row + example.row}"
    where += "" if feature.database.of_array else f", token {example.position}"
    if example.repeats:
        where += f", and {example.repeats} more with the same tokens around it"
    return (
        f'<div class="example"><span class="value">{number(example.activation)}</span><div><div class="text">{tokens}'
        f"</div>{_dim(where)}</div></div>"
    )


def _token(text: str, value: float, strongest: float, peak: bool) -> str:
    """A token of an example, shaded by its activation, which is also its tooltip."""
    active = value > 0
    shown = pieces(cut(text)) or [("∅", True)] * (active or peak)  # else its bytes are part of an earlier character
    inner = "".join(f'<span class="mark">{escape(part)}</span>' if mark else escape(part) for part, mark in shown)
    classes = "token" + " active" * active + " peak" * peak
    shade = f' style="--share: {min(1.0, value / strongest):.2f}" title="{number(value)}"' if active else ""
    return f'<span class="{classes}"{shade}>{inner}</span>'


def _line(text: str) -> str:
    return visible(cut(text))
