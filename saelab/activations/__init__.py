"""Activations of a language model as shuffled batches: live in stream.py."""
