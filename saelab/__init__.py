"""Train sparse autoencoders on a language model's activations, look at their features, measure how far to trust them.

Everything public is here and imported when first used, so that `import saelab` costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saelab.activations.cache.reader import open_cache
    from saelab.activations.sites import Sites
    from saelab.activations.source import FromCache, FromModel
    from saelab.activations.stream import read_activations
    from saelab.analysis.attention.direct import direct_attribution
    from saelab.analysis.attention.logits import logit_attribution
    from saelab.analysis.attention.overview import attention
    from saelab.analysis.attention.tree import attribution_tree
    from saelab.analysis.attribution import attribute, next_token_loss
    from saelab.analysis.cka import PairedCodes
    from saelab.analysis.dark_matter import dark_matter
    from saelab.analysis.dead import dead
    from saelab.analysis.decoder import mean_absolute_cosine
    from saelab.analysis.fidelity import Fidelity, fidelity
    from saelab.analysis.matching import assign_decoders, match_decoders
    from saelab.analysis.meta_structure import meta_structure
    from saelab.analysis.model_diff import model_diff
    from saelab.analysis.pareto import plot_pareto
    from saelab.analysis.settings import EvalSettings, Intervention
    from saelab.analysis.similarities import similarities
    from saelab.analysis.similarity import compare_decoders
    from saelab.analysis.site_norms import site_norms
    from saelab.analysis.spliced import spliced
    from saelab.analysis.stability import stability
    from saelab.analysis.steering import steer
    from saelab.analysis.steering_effects import steering_effects
    from saelab.codes import Codes
    from saelab.corpus import CorpusSettings, open_corpus
    from saelab.errors import SaelabError
    from saelab.features.database import open_database
    from saelab.features.settings import FeatureSettings
    from saelab.lm.load import load_language_model
    from saelab.lm.model import LanguageModel
    from saelab.lm.pair import ModelPair
    from saelab.lm.settings import ModelSettings
    from saelab.progress import bar
    from saelab.runs.adopt import adopt
    from saelab.runs.analyses import analyse, read_analysis
    from saelab.runs.autointerp import explain, score
    from saelab.runs.cache import cache
    from saelab.runs.calibration import calibrate, calibration_rows
    from saelab.runs.config import RunSettings, load_config
    from saelab.runs.controls import controls, neuron_run
    from saelab.runs.decoder import decoder_rows
    from saelab.runs.from_hub import load
    from saelab.runs.job import settings_of
    from saelab.runs.save import create_run, save_run
    from saelab.runs.stages import evaluate, index, run
    from saelab.runs.sweep import sweep
    from saelab.runs.train import resume, train
    from saelab.sae.checkpoint import save_sae
    from saelab.sae.input_map import InputMap, input_map
    from saelab.sae.model import Batch, SparseAutoencoder
    from saelab.sae.new import new_autoencoder
    from saelab.sae.settings import (
        AffinitySettings,
        AllocationSettings,
        AuxSettings,
        EncoderSettings,
        SaeSettings,
        SparsitySettings,
    )
    from saelab.training.settings import TrainingSettings
    from saelab.training.trainer import Trainer

__version__ = "0.1.0"

_HOME = {
    "AffinitySettings": "saelab.sae.settings",
    "AllocationSettings": "saelab.sae.settings",
    "AuxSettings": "saelab.sae.settings",
    "Batch": "saelab.sae.model",
    "Codes": "saelab.codes",
    "CorpusSettings": "saelab.corpus",
    "EncoderSettings": "saelab.sae.settings",
    "EvalSettings": "saelab.analysis.settings",
    "FeatureSettings": "saelab.features.settings",
    "Fidelity": "saelab.analysis.fidelity",
    "FromCache": "saelab.activations.source",
    "FromModel": "saelab.activations.source",
    "InputMap": "saelab.sae.input_map",
    "Intervention": "saelab.analysis.settings",
    "LanguageModel": "saelab.lm.model",
    "ModelPair": "saelab.lm.pair",
    "ModelSettings": "saelab.lm.settings",
    "PairedCodes": "saelab.analysis.cka",
    "RunSettings": "saelab.runs.config",
    "SaeSettings": "saelab.sae.settings",
    "SaelabError": "saelab.errors",
    "Sites": "saelab.activations.sites",
    "SparseAutoencoder": "saelab.sae.model",
    "SparsitySettings": "saelab.sae.settings",
    "Trainer": "saelab.training.trainer",
    "TrainingSettings": "saelab.training.settings",
    "adopt": "saelab.runs.adopt",
    "analyse": "saelab.runs.analyses",
    "attribute": "saelab.analysis.attribution",
    "assign_decoders": "saelab.analysis.matching",
    "attention": "saelab.analysis.attention.overview",
    "attribution_tree": "saelab.analysis.attention.tree",
    "bar": "saelab.progress",
    "cache": "saelab.runs.cache",
    "calibrate": "saelab.runs.calibration",
    "calibration_rows": "saelab.runs.calibration",
    "compare_decoders": "saelab.analysis.similarity",
    "controls": "saelab.runs.controls",
    "create_run": "saelab.runs.save",
    "dark_matter": "saelab.analysis.dark_matter",
    "dead": "saelab.analysis.dead",
    "decoder_rows": "saelab.runs.decoder",
    "direct_attribution": "saelab.analysis.attention.direct",
    "evaluate": "saelab.runs.stages",
    "explain": "saelab.runs.autointerp",
    "fidelity": "saelab.analysis.fidelity",
    "index": "saelab.runs.stages",
    "input_map": "saelab.sae.input_map",
    "load": "saelab.runs.from_hub",
    "load_config": "saelab.runs.config",
    "load_language_model": "saelab.lm.load",
    "logit_attribution": "saelab.analysis.attention.logits",
    "match_decoders": "saelab.analysis.matching",
    "mean_absolute_cosine": "saelab.analysis.decoder",
    "meta_structure": "saelab.analysis.meta_structure",
    "model_diff": "saelab.analysis.model_diff",
    "new_autoencoder": "saelab.sae.new",
    "neuron_run": "saelab.runs.controls",
    "next_token_loss": "saelab.analysis.attribution",
    "open_cache": "saelab.activations.cache.reader",
    "open_corpus": "saelab.corpus",
    "open_database": "saelab.features.database",
    "plot_pareto": "saelab.analysis.pareto",
    "read_activations": "saelab.activations.stream",
    "read_analysis": "saelab.runs.analyses",
    "resume": "saelab.runs.train",
    "run": "saelab.runs.stages",
    "save_run": "saelab.runs.save",
    "save_sae": "saelab.sae.checkpoint",
    "score": "saelab.runs.autointerp",
    "settings_of": "saelab.runs.job",
    "spliced": "saelab.analysis.spliced",
    "similarities": "saelab.analysis.similarities",
    "site_norms": "saelab.analysis.site_norms",
    "stability": "saelab.analysis.stability",
    "steer": "saelab.analysis.steering",
    "steering_effects": "saelab.analysis.steering_effects",
    "sweep": "saelab.runs.sweep",
    "train": "saelab.runs.train",
}

__all__ = [
    "AffinitySettings",
    "AllocationSettings",
    "AuxSettings",
    "Batch",
    "Codes",
    "CorpusSettings",
    "EncoderSettings",
    "EvalSettings",
    "FeatureSettings",
    "Fidelity",
    "FromCache",
    "FromModel",
    "InputMap",
    "Intervention",
    "LanguageModel",
    "ModelPair",
    "ModelSettings",
    "PairedCodes",
    "RunSettings",
    "SaeSettings",
    "SaelabError",
    "Sites",
    "SparseAutoencoder",
    "SparsitySettings",
    "Trainer",
    "TrainingSettings",
    "adopt",
    "analyse",
    "assign_decoders",
    "attention",
    "attribute",
    "attribution_tree",
    "bar",
    "cache",
    "calibrate",
    "calibration_rows",
    "compare_decoders",
    "controls",
    "create_run",
    "dark_matter",
    "dead",
    "decoder_rows",
    "direct_attribution",
    "evaluate",
    "explain",
    "fidelity",
    "index",
    "input_map",
    "load",
    "load_config",
    "load_language_model",
    "logit_attribution",
    "match_decoders",
    "mean_absolute_cosine",
    "meta_structure",
    "model_diff",
    "neuron_run",
    "new_autoencoder",
    "next_token_loss",
    "open_cache",
    "open_corpus",
    "open_database",
    "plot_pareto",
    "read_activations",
    "read_analysis",
    "resume",
    "run",
    "save_run",
    "save_sae",
    "score",
    "settings_of",
    "similarities",
    "site_norms",
    "spliced",
    "stability",
    "steer",
    "steering_effects",
    "sweep",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'saelab' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
