"""Language models that explain and judge: one protocol, and a file for each kind of back-end."""
