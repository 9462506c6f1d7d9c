"""Runs: a config, the folder it makes, and the stages that fill that folder."""
