"""Text -> rows of token ids: sources.py says what a corpus may be and what is one document there, hub.py streams from
the Hugging Face Hub, rows.py draws the order, keeps a part held out, tokenises and packs."""

from saelab.corpus.rows import Corpus, open_corpus
from saelab.corpus.sources import CorpusSettings

__all__ = ["Corpus", "CorpusSettings", "open_corpus"]
