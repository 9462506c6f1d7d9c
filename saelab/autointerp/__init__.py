"""Explanations of features, by a language model or without one, and scores of how far they hold."""
