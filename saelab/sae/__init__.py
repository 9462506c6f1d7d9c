"""The sparse autoencoder: selection (allocation.py), losses, the model itself, and its checkpoint on disk."""
