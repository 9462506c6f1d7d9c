"""The feature database: index.py writes it in one pass over text, database.py is what everything later reads."""
