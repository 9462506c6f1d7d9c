"""The names of a feature database's files. Loads nothing, for code that only looks whether a database is there."""

FEATURES = "features.parquet"
CONTEXTS = "contexts.parquet"
SUMMARY = "summary.json"
