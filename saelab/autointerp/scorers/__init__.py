"""Scores of explanations, a file for each."""
