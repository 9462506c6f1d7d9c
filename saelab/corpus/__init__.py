"""Text -> rows of token ids: sources.py says what a corpus may be and what is one document there, files.py and hub.py
read local files and the Hugging Face Hub, encoder.py tokenises, rows.py draws the order, keeps a part held out, packs,
and goes on from where it was."""

from saelab.corpus.rows import Corpus, open_corpus
from saelab.corpus.settings import CorpusSettings

__all__ = ["Corpus", "CorpusSettings", "open_corpus"]
