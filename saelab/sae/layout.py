"""The names of a checkpoint's files. Imports nothing, for code that only checks whether there is one."""

FOLDER = "sae"
"""The checkpoint's folder in a run folder."""
CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
EVALUATION = "eval.json"
"""The evaluation, beside the checkpoint's folder in a run folder."""
