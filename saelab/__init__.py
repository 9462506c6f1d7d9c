"""Train sparse autoencoders on a language model's activations, look at their features, measure how far to trust them.

Everything public is here and imported when first used, so that `import saelab` costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saelab.activations.cache.reader import open_cache
    from saelab.analysis.fidelity import Fidelity, fidelity
    from saelab.codes import Codes
    from saelab.corpus import CorpusSettings, open_corpus
    from saelab.errors import SaelabError
    from saelab.lm.load import load_language_model
    from saelab.lm.model import LanguageModel
    from saelab.lm.settings import ModelSettings
    from saelab.runs.cache import cache
    from saelab.runs.config import RunSettings, load_config
    from saelab.runs.stages import evaluate, index, run
    from saelab.runs.train import resume, train
    from saelab.sae.checkpoint import load, save_sae
    from saelab.sae.model import SparseAutoencoder

__version__ = "0.1.0"

_HOME = {
    "Codes": "saelab.codes",
    "CorpusSettings": "saelab.corpus",
    "Fidelity": "saelab.analysis.fidelity",
    "LanguageModel": "saelab.lm.model",
    "ModelSettings": "saelab.lm.settings",
    "RunSettings": "saelab.runs.config",
    "SaelabError": "saelab.errors",
    "SparseAutoencoder": "saelab.sae.model",
    "cache": "saelab.runs.cache",
    "evaluate": "saelab.runs.stages",
    "fidelity": "saelab.analysis.fidelity",
    "index": "saelab.runs.stages",
    "load": "saelab.sae.checkpoint",
    "load_config": "saelab.runs.config",
    "load_language_model": "saelab.lm.load",
    "open_cache": "saelab.activations.cache.reader",
    "open_corpus": "saelab.corpus",
    "resume": "saelab.runs.train",
    "run": "saelab.runs.stages",
    "save_sae": "saelab.sae.checkpoint",
    "train": "saelab.runs.train",
}

__all__ = [
    "Codes",
    "CorpusSettings",
    "Fidelity",
    "LanguageModel",
    "ModelSettings",
    "RunSettings",
    "SaelabError",
    "SparseAutoencoder",
    "cache",
    "evaluate",
    "fidelity",
    "index",
    "load",
    "load_config",
    "load_language_model",
    "open_cache",
    "open_corpus",
    "resume",
    "run",
    "save_sae",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'saelab' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
