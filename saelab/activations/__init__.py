"""Activations of a language model as shuffled batches: from the model (stream.py) or from a cache on disk (cache/)."""
