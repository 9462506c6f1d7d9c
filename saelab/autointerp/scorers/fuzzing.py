"""Fuzzing: does the judge see whether the marked tokens are those on which the feature is active?

The paper's score (arXiv 2410.13928, section 5): in windows with an activation the tokens above 0.3 of the window's
largest are marked, in windows without one as many tokens at random. A 1 says that the marks fit the description. The
headline figure is balanced accuracy. How many tokens are marked in a silent window is drawn from the numbers in those
with an activation (the paper marks their mean in each), so that the number of marks says nothing.
"""

from collections.abc import Sequence

import numpy as np

from saelab.autointerp.contexts import Context, Contexts
from saelab.autointerp.llm.protocol import Reply, Request
from saelab.autointerp.prompts import strongest_tokens
from saelab.autointerp.records import Explanation, Score
from saelab.autointerp.scorers.verdicts import Item, request, scored, shuffled
from saelab.autointerp.settings import ScoreSettings

TASK = (
    "A feature of a language model responds to something in text. You get a description of it and some texts in which "
    "tokens are marked with << and >>. For each text say whether the marked tokens fit the description: 1 if so, 0 if "
    "not. Only the marked tokens matter."
)


def requests(contexts: Contexts, explanation: Explanation, settings: ScoreSettings) -> list[Request]:
    """A question for each batch of windows."""
    return [request(TASK, explanation, batch, settings) for batch in _batches(contexts, settings)]


def score(
    contexts: Contexts, explanation: Explanation, replies: Sequence[Reply], settings: ScoreSettings, model: str
) -> Score:
    """The score from the replies to `requests`, in their order."""
    return scored("fuzzing", contexts, explanation, _batches(contexts, settings), replies, model)


def _batches(contexts: Contexts, settings: ScoreSettings) -> list[list[Item]]:
    rng = np.random.default_rng([settings.seed, contexts.feature, 1])
    items = [Item(each, True, strongest_tokens(each.example)) for each in contexts.positives]
    numbers = [len(item.marked) for item in items] or [1]

    def marked(each: Context) -> tuple[int, ...]:
        length = len(each.example.tokens)
        number = min(length, int(rng.choice(numbers)))
        return tuple(sorted(rng.choice(length, number, replace=False).tolist()))

    items += [Item(each, False, marked(each)) for each in contexts.negatives]
    return shuffled(contexts, items, settings)
