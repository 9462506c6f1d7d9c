"""A feature database in other forms: a page, other tools' JSON, tables. A module per form, each with a `write`."""
