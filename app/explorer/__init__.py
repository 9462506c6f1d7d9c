"""Shared by the explorer's pages: state, charts and HTML."""
