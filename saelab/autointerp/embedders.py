"""Texts as vectors of length 1: by sentence-transformers, or by the words that they have in common.

An embedder is a function from texts to a matrix ``[texts, d]`` whose rows have length 1, or 0 for a text without known
words. Equal texts must get equal rows.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec

import numpy as np

from saelab.errors import SaelabError
from saelab.features.database import Database

Embedder = Callable[[Sequence[str]], np.ndarray]

_COUNTED = 20_000
WORDS = r"[^\W\d_]+|\d+|[^\w\s]"
"""What counts as a word: a run of letters, a run of digits, or any other sign."""


def tfidf(texts: Sequence[str]) -> Embedder:
    """TF-IDF of the words of `texts`, case left out; scikit-learn's, with smooth document frequencies."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectors = TfidfVectorizer(token_pattern=WORDS)
    try:
        vectors.fit(texts)
    except ValueError:  # not a single word
        return lambda texts: np.zeros((len(texts), 1))
    return lambda texts: vectors.transform(texts).toarray()


def of_database(database: Database, window: int = 32) -> Embedder:
    """TF-IDF with the document frequencies of a database's text, in windows of `window` tokens.

    Of a long text, `_COUNTED` windows at equal distances are counted, and words that are in none of them do not count.
    """
    rows = database.facts.rows
    window = min(window, rows.shape[1])
    per_row = rows.shape[1] // window
    texts = []
    for number in range(0, len(rows) * per_row, max(1, len(rows) * per_row // _COUNTED)):
        row, part = divmod(number, per_row)
        ids = np.array(rows[row, part * window : (part + 1) * window])
        texts.append("".join(database.vocabulary.window(ids)))
    return tfidf(texts)


def sentence_transformer(model: str) -> Embedder:
    """A sentence-transformers model, a folder or a name. Raises SaelabError if the package or the model is missing."""
    if find_spec("sentence_transformers") is None:
        raise SaelabError("sentence-transformers is not installed; `pip install 'saelab[embed]'`, or leave --embed out")
    try:
        encoder = import_module("sentence_transformers").SentenceTransformer(model)
    except (OSError, ValueError) as error:
        raise SaelabError(f"{model}: is no sentence-transformers model that can be loaded ({error})") from None

    def embed(texts: Sequence[str]) -> np.ndarray:
        return np.asarray(encoder.encode(list(texts), normalize_embeddings=True, show_progress_bar=False))

    return embed
