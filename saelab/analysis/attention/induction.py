"""Induction by intervention (claims T6, T7): how much of the text before a token must come back.

A head does induction if, at a token that has come before, it attends to what followed then. On rows of different random
tokens,

    BOS  r[1] ... r[S]  x[1] ... x[m - n]  r[j - n + 1] ... r[j]

the last n tokens are a copy of n earlier ones, and nothing else comes back. The score is the last token's attention to
r[j + 1]. From n + 1 to n, one token changes, the one n back from the last; positions stay the same. So the score as a
function of n is an intervention: with n = 0 nothing matches, with n = 1 only the current token.

An induction head has a score of at least `INDUCTIVE` at the largest n. Its prefix is short if one matching token gives
at least `SHORT` of that score, else long. The paper's two heads of GPT-2 small: 5.5 (short) is at 0.7 with one token,
5.1 (long) below 0.3, and above 0.7 with two.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from saelab.analysis.attention.prompt import check_heads
from saelab.analysis.intervals import Interval, interval
from saelab.analysis.result import Result
from saelab.analysis.steering import activations_of
from saelab.errors import SaelabError
from saelab.lm.attention import Heads, recorded_heads, site_of
from saelab.lm.model import LanguageModel
from saelab.sae.model import SparseAutoencoder

if TYPE_CHECKING:
    import plotly.graph_objects as go

INDUCTIVE = 0.4
SHORT = 0.5
_ROWS_PER_FORWARD = 16


@dataclass(frozen=True, eq=False, repr=False)
class PrefixScores(Result):
    """Scores by matching tokens; `prefix_scores` makes it."""

    rows: int
    layers: np.ndarray
    """``[layers]`` int64"""
    scores: np.ndarray
    """The attention to the token that followed, of each row, ``[n = 0 ..., rows, layers, heads]`` float32."""
    activations: np.ndarray
    """Activations of the autoencoder's features at the last token, means over rows, ``[n = 0 ..., n_features]``
    float32; no features without one."""

    @property
    def mean(self) -> np.ndarray:
        """``[n = 0 ..., layers, heads]``"""
        return self.scores.mean(1)

    def score(self, layer: int, head: int, n: int) -> Interval:
        """A head's score with n matching tokens, with its interval over rows."""
        values = self.scores[n, :, list(self.layers).index(layer), head].astype(np.float64)
        return interval(np.stack([values, np.ones_like(values)], 1))

    def kinds(self) -> dict[str, str]:
        """The induction heads, as layer.head, and whether their prefix is short or long."""
        one, most = self.mean[1], self.mean[-1]
        return {
            f"{self.layers[i]}.{head}": "short prefix" if one[i, head] >= SHORT * most[i, head] else "long prefix"
            for i, head in np.argwhere(most >= INDUCTIVE).tolist()
        }

    def induction_features(self, factor: float = 2.0) -> np.ndarray:
        """Features whose activation with all tokens matching is above `factor` times that without, strongest first."""
        none, most = self.activations[0], self.activations[-1]
        which = np.flatnonzero((most > factor * none) & (most > 0))
        return which[np.argsort(-(most - none)[which], kind="stable")]

    def figures(self) -> Mapping[str, int | float | str | Interval]:
        found: dict[str, int | float | str | Interval] = {"rows": self.rows, "induction heads": len(self.kinds())}
        for name, kind in self.kinds().items():
            layer, head = map(int, name.split("."))
            for n in (1, 2, len(self.scores) - 1):
                found[f"head {name}, {kind}: score with {n} matching"] = self.score(layer, head, n)
        return found

    def plot(self) -> "go.Figure":
        """The score of each head by the number of matching tokens; induction heads in colour."""
        import plotly.graph_objects as go

        figure, kinds, mean = go.Figure(), self.kinds(), self.mean
        for i, layer in enumerate(self.layers):
            for head in range(mean.shape[2]):
                name = f"{layer}.{head}"
                style = {"name": f"{name} {kinds[name]}"} if name in kinds else {"line_color": "lightgrey"}
                options = {"showlegend": name in kinds, "hovertext": name} | style
                figure.add_scatter(x=list(range(len(mean))), y=mean[:, i, head], **options)
        return figure.update_layout(xaxis_title="matching tokens", yaxis_title="attention to what followed")


@torch.no_grad()
def prefix_scores(
    lm: LanguageModel, sae: SparseAutoencoder | None = None, *, longest: int = 6, rows: int = 128, seed: int = 0
) -> PrefixScores:
    """Induction scores of all heads with 0 to `longest` matching tokens, and activations of a `sae` of heads' outputs.

    Runs ``(longest + 1) * rows`` rows of at most 64 tokens. Raises SaelabError if the model takes too few tokens, has
    too few, or if its attention cannot be taken apart.
    """
    layers = sorted(n for n in range(lm.shape().layers) if site_of(n) in lm.sites)
    site = None if sae is None else site_of(check_heads(sae, lm))
    texts, source = repeated_rows(lm, longest, rows, seed)
    scores: list[np.ndarray] = []
    activations = np.zeros((longest + 1, 0 if sae is None else sae.n_features), np.float32)
    sites = [site_of(layers[-1]), *([site] if site else [])]
    lm.measure(sites)
    for n, text in enumerate(texts):
        found: list[np.ndarray] = []
        for first in range(0, rows, _ROWS_PER_FORWARD):
            here = slice(first, first + _ROWS_PER_FORWARD)
            followed, at = source[here], torch.arange(len(source[here]), device=lm.device)
            by_layer: dict[int, Tensor] = {}

            def take(
                layer: int,
                heads: Heads,
                by_layer: dict[int, Tensor] = by_layer,
                at: Tensor = at,
                followed: Tensor = followed,
            ) -> None:
                by_layer[layer] = heads.pattern[at, :, -1, followed].float()

            with recorded_heads(lm, layers, take):
                values = lm.activations(text[here], sites)
            found.append(torch.stack([by_layer[layer] for layer in layers], 1).cpu().numpy())
            if sae is not None and site is not None:
                codes = sae.encode(values[site][:, -1].float())
                activations[n] += codes.to_dense().sum(0).float().cpu().numpy() / rows
        scores.append(np.concatenate(found))
    return PrefixScores(rows, np.array(layers), np.stack(scores), activations)


def repeated_rows(lm: LanguageModel, longest: int, rows: int, seed: int) -> tuple[list[Tensor], Tensor]:
    """The rows with 0 to `longest` matching tokens, and the position of r[j + 1] in each row.

    ``[rows, context]`` int64 for each n, and ``[rows]``.
    """
    length = min(64, lm.max_context or 64)
    S, m = (length - 1) // 2, length - 1 - (length - 1) // 2
    ids = torch.arange(lm.embeddings, device=lm.device)
    known = ids[lm.ordinary(ids) & (ids < len(lm.tokenizer))]
    if not 0 < longest < min(S, m) or len(known) < length:
        raise SaelabError(
            f"induction: {longest} matching tokens need rows of at least {2 * longest + 3} tokens, and as many "
            f"different ones; {lm.name} takes rows of {length} and has {len(known)}"
        )
    generator = torch.Generator().manual_seed(seed)
    texts = torch.stack([known[torch.randperm(len(known), generator=generator)[:length]] for _ in range(rows)])
    if lm.tokenizer.bos_token_id is not None:
        texts[:, 0] = lm.tokenizer.bos_token_id
    last = torch.randint(longest, S, (rows,), generator=generator).to(lm.device)  # position of r[j]; r[j + 1] is there
    found = []
    for n in range(longest + 1):
        text = texts.clone()
        if n:
            back = torch.arange(n - 1, -1, -1, device=lm.device)
            text[:, length - n :] = texts.gather(1, last[:, None] - back)
        found.append(text)
    return found, last + 1


@torch.no_grad()
def corrupted(
    sae: SparseAutoencoder,
    lm: LanguageModel,
    rows: Tensor,
    feature: int,
    at: Sequence[tuple[int, int]],
    *,
    farthest: int = 8,
    seed: int = 0,
    site: str | None = None,
) -> np.ndarray:
    """A feature's activation on real text after one earlier token is replaced, ``[pairs, farthest + 1]`` float32.

    `at` are pairs (row, position) of `rows` ``[rows, context]``; column n has the token n back replaced by a random
    one, and column 0 is the clean run. NaN if the row begins less than n tokens back, or if the token there is special.
    The activation falls at n if the feature needs the token n back: the intervention of claim T7 for features.
    """
    generator = torch.Generator().manual_seed(seed)
    found = np.full((len(at), farthest + 1), np.nan, np.float32)
    for number, (row, position) in enumerate(at):
        text = rows[row].to(lm.device).long()
        new = _unused(lm, text, generator)
        texts, columns = [text], [0]
        for n in range(1, min(farthest, position) + 1):
            if bool(lm.ordinary(text[position - n])) and n < len(new):
                changed = text.clone()
                changed[position - n] = new[n]
                texts.append(changed)
                columns.append(n)
        found[number, columns] = _last_activations(sae, lm, torch.stack(texts)[:, : position + 1], feature, site)
    return found


@torch.no_grad()
def without_match(
    sae: SparseAutoencoder,
    lm: LanguageModel,
    rows: Tensor,
    feature: int,
    at: Sequence[tuple[int, int]],
    *,
    seed: int = 0,
    site: str | None = None,
) -> np.ndarray:
    """A feature's activation on real text if nothing earlier matches its token: ``[pairs, 3]`` float32.

    `at` are pairs (row, position) of `rows` ``[rows, context]``. Columns: the clean run; each earlier occurrence of
    the token replaced by a random one; as many other earlier tokens replaced, a control. NaN if the token does not
    occur earlier, or if there are too few others. What follows the occurrences stays as it is, so a feature that reads
    it only because of the match falls in the second column and not in the third.
    """
    generator = torch.Generator().manual_seed(seed)
    found = np.full((len(at), 3), np.nan, np.float32)
    for number, (row, position) in enumerate(at):
        text = rows[row, : position + 1].to(lm.device).long()
        new = _unused(lm, text, generator)
        equal = (text[:-1] == text[-1]).nonzero().squeeze(1)
        after = torch.isin(torch.arange(position, device=lm.device), equal + 1)
        others = (lm.ordinary(text[:-1]) & (text[:-1] != text[-1]) & ~after).nonzero().squeeze(1)
        others = others[torch.randperm(len(others), generator=generator).to(lm.device)][: len(equal)]
        if not 0 < len(equal) == len(others) <= len(new):
            continue
        texts = text.repeat(3, 1)
        texts[1, equal], texts[2, others] = new[: len(equal)], new[: len(equal)]
        found[number] = _last_activations(sae, lm, texts, feature, site)
    return found


def _unused(lm: LanguageModel, text: Tensor, generator: torch.Generator) -> Tensor:
    """Ordinary tokens in random order that `text` does not have: another of its own could start another copy."""
    ids = torch.arange(lm.embeddings, device=lm.device)
    known = ids[lm.ordinary(ids) & (ids < len(lm.tokenizer))]
    known = known[~torch.isin(known, text)]
    return known[torch.randperm(len(known), generator=generator).to(known.device)]


def _last_activations(
    sae: SparseAutoencoder, lm: LanguageModel, texts: Tensor, feature: int, site: str | None
) -> np.ndarray:
    """The activation of a feature at the last token of each text, ``[texts]``."""
    site = site_of(check_heads(sae, lm, site))
    z = lm.activations(texts, [site])[site][:, -1]
    which = torch.tensor([feature], device=lm.device)
    return activations_of(sae.encode(z.float()), which)[:, 0].float().cpu().numpy()
