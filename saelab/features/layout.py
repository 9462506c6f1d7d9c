"""The names of a feature database's files. Imports nothing, for code that only checks whether there is one."""

FEATURES = "features.parquet"
CONTEXTS = "contexts.parquet"
SUMMARY = "summary.json"
