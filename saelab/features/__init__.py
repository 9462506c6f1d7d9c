"""The feature database: index.py writes it in one pass over text; facts.py and database.py read it."""
