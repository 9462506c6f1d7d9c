"""The sparse autoencoder: encoder, affinity, allocation, losses, the model itself, and its checkpoint on disk."""
