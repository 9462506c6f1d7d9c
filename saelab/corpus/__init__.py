"""From text to rows of token ids.

sources.py lists the kinds of corpora and what a document is in each; folders.py and splits.py choose the files of a
folder; files.py (with json_files.py, csv_files.py, arrow_files.py and decoding.py) and hub.py read local files and the
Hugging Face Hub; usable.py leaves empty documents out; encoder.py tokenises; special.py says which tokens are special;
rows.py shuffles, holds a part out, packs documents into rows, and resumes from a saved position.
"""

from saelab.corpus.rows import Corpus, open_corpus
from saelab.corpus.settings import CorpusSettings

__all__ = ["Corpus", "CorpusSettings", "open_corpus"]
