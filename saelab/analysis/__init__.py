"""One file per question, each a function that returns a small result."""
