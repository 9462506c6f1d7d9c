"""What a language model is shown of a feature, to explain it, beside the windows in which it is active."""

from saelab.autointerp.contexts import Contexts
from saelab.features.database import Database
from saelab.features.examples import Example

_NEAR_MISSES = 5
_TOP_LOGITS = 10


def near_misses(database: Database, contexts: Contexts) -> list[Example]:
    """Silent windows that resemble those of a feature, none of which it is scored on."""
    window = len(contexts.explain[0].example.tokens)
    found = database.near_misses(contexts.feature, 2 * _NEAR_MISSES, window)
    scored = [each.example for each in (*contexts.positives, *contexts.negatives)]
    texts = {each.token_ids.tobytes() for each in scored}

    def apart(miss: Example) -> bool:
        overlaps = (each.row == miss.row and abs(each.start - miss.start) < window for each in scored)
        return miss.token_ids.tobytes() not in texts and not any(overlaps)

    similar, same = ([each for each in kind if apart(each)] for kind in (found.similar_text, found.same_token))
    return [*similar[: -(-_NEAR_MISSES // 2)], *same[: _NEAR_MISSES // 2]]


def top_logits(database: Database, feature: int) -> list[str]:
    """Tokens whose logits a feature raises most; none if the database has no logits."""
    tokens = database.table["top_logit_tokens"][feature][:_TOP_LOGITS].tolist()
    return [database.vocabulary.text(token) for token in tokens if token >= 0]
