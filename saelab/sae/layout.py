"""The names of a checkpoint's files. Loads nothing, for code that only looks whether a checkpoint is there."""

FOLDER = "sae"
"""The checkpoint's folder in a run folder."""
CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
EVALUATION = "eval.json"
"""The evaluation, beside the checkpoint's folder in a run folder."""
