"""Checkpoints of other trainers: one file for each peer, which says how its files are recognised, read and written."""
