"""Streamlit components of the explorer's own: tokens, a histogram, and a table of features.

Each has a file of Python, one of JavaScript and one of CSS; there is no build step. Data go to the browser as compact
JSON. The JavaScript writes text with `textContent` only, because tokens are untrusted.
"""
