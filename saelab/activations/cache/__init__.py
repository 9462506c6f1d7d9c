"""Activations on disk. FORMAT.md specifies the bytes; writer.py writes them, reader.py reads them."""
