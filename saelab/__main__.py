"""`python -m saelab` is `saelab`; so is `torchrun -m saelab`."""

from saelab.cli import main

main()
