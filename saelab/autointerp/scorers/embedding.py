"""Embedding scores: are windows with an activation nearer to the explanation, or to known windows, than those without?

embedding          cosine of a window and the explanation (arXiv 2410.13928, section 5)
example_embedding  mean cosine of a window and those that the explainer saw; needs no explanation (arXiv 2507.08473)

Both are the AUROC of that cosine. TF-IDF sees shared words only: its scores are not comparable to those of a sentence
encoder, and `model` says which it was.
"""

import numpy as np

from saelab.autointerp.contexts import Contexts
from saelab.autointerp.embedders import Embedder
from saelab.autointerp.metrics import auroc_interval
from saelab.autointerp.records import Explanation, Score


def embedding(contexts: Contexts, explanation: Explanation, embed: Embedder, model: str) -> Score:
    """AUROC of the cosine to the explanation's text."""
    return _scored("embedding", contexts, [explanation.text], embed, model, explanation.key)


def example_embedding(contexts: Contexts, embed: Embedder, model: str) -> Score:
    """AUROC of the mean cosine to the windows of `Contexts.explain`; NaN without such windows."""
    known = ["".join(each.example.tokens) for each in contexts.explain]
    return _scored("example_embedding", contexts, known, embed, model, "")


def _scored(name: str, contexts: Contexts, query: list[str], embed: Embedder, model: str, key: str) -> Score:
    items = [*contexts.positives, *contexts.negatives] if query else []  # nothing is near to nothing
    texts = ["".join(each.example.tokens) for each in items]
    cosines = (embed(texts) @ embed(query).T).mean(1) if items else np.zeros(0)
    truth = np.arange(len(items)) < len(contexts.positives)
    judged = tuple(each.judged(float(cosine)) for each, cosine in zip(items, cosines, strict=True))
    value = auroc_interval(cosines, truth)
    return Score(contexts.feature, name, key, model, value, "AUROC", note=contexts.lacking, judged=judged)
