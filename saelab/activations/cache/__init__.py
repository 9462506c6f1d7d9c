"""Activations on disk. FORMAT.md says what the bytes are; writer.py writes them, reader.py reads them."""
