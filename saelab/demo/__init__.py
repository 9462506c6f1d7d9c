"""The embedded default: a small real language model and its corpus (stdlib.py). README.md says how it was made."""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
"""Hugging Face folder of the demo language model: 4-layer Llama, 4.5 M parameters, byte-level BPE of 4096."""

HELD_OUT_SAMPLE = MODEL / "held_out_sample.json"
"""64 rows of held-out token ids (text of the Python standard library, PSF licence)."""

MEASURED = MODEL / "measured.json"
"""Figures that scripts/train_demo_lm.py measured on the finished weights."""
