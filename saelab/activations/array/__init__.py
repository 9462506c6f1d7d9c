"""Activations from an array on disk instead of a language model: its files (files.py), and a run's view of it
(rows.py)."""
