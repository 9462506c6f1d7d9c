"""How fast things are, ours and other libraries'. Benchmarks, never tests with a clock."""
