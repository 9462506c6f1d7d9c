"""Train sparse autoencoders on a language model's activations, look at their features, measure how far to trust them.

Everything public is here and imported when first used, so that `import saelab` costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saelab.activations.reader import open_cache
    from saelab.analysis.fidelity import Fidelity, fidelity
    from saelab.caching import cache
    from saelab.codes import Codes
    from saelab.config import RunSettings, load_config
    from saelab.corpus import CorpusSettings, open_corpus
    from saelab.errors import SaelabError
    from saelab.lm import LanguageModel, ModelSettings, load_language_model
    from saelab.run import evaluate, features, train
    from saelab.sae.checkpoint import load, save_sae
    from saelab.sae.model import SparseAutoencoder

__version__ = "0.1.0"

_HOME = {
    "Codes": "saelab.codes",
    "CorpusSettings": "saelab.corpus",
    "Fidelity": "saelab.analysis.fidelity",
    "LanguageModel": "saelab.lm",
    "ModelSettings": "saelab.lm",
    "RunSettings": "saelab.config",
    "SaelabError": "saelab.errors",
    "SparseAutoencoder": "saelab.sae.model",
    "cache": "saelab.caching",
    "evaluate": "saelab.run",
    "features": "saelab.features",  # the package itself, which can be called
    "fidelity": "saelab.analysis.fidelity",
    "load": "saelab.sae.checkpoint",
    "load_config": "saelab.config",
    "load_language_model": "saelab.lm",
    "open_cache": "saelab.activations.reader",
    "open_corpus": "saelab.corpus",
    "save_sae": "saelab.sae.checkpoint",
    "train": "saelab.run",
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
    "features",
    "fidelity",
    "load",
    "load_config",
    "load_language_model",
    "open_cache",
    "open_corpus",
    "save_sae",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'saelab' has no attribute {name!r}")
    module = import_module(_HOME[name])
    return module if name == "features" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
