"""A language model at named sites: activations, gradients, logits, and runs with something spliced in."""
