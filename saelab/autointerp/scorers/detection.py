"""Detection: does the judge find the windows in which the feature is active, from its description?

The paper's score (arXiv 2410.13928, section 5): plain windows with and without an activation, in batches of five; a
1 says that the feature is active somewhere in the window. The headline figure is balanced accuracy.
"""

from collections.abc import Sequence

from saelab.autointerp.contexts import Contexts
from saelab.autointerp.llm.protocol import Reply, Request
from saelab.autointerp.records import Explanation, Score
from saelab.autointerp.scorers.verdicts import Item, request, scored, shuffled
from saelab.autointerp.settings import ScoreSettings

TASK = (
    "A feature of a language model responds to something in text. You get a description of it and some texts. For each "
    "text say whether something in it fits the description: 1 if so, 0 if not."
)


def requests(contexts: Contexts, explanation: Explanation, settings: ScoreSettings) -> list[Request]:
    """A question for each batch of windows."""
    return [request(TASK, explanation, batch, settings) for batch in _batches(contexts, settings)]


def score(
    contexts: Contexts, explanation: Explanation, replies: Sequence[Reply], settings: ScoreSettings, model: str
) -> Score:
    """The score from the replies to `requests`, in their order."""
    return scored("detection", contexts, explanation, _batches(contexts, settings), replies, model)


def _batches(contexts: Contexts, settings: ScoreSettings) -> list[list[Item]]:
    items = [Item(each, True) for each in contexts.positives] + [Item(each, False) for each in contexts.negatives]
    return shuffled(contexts, items, settings)
