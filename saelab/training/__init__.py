"""The training loop: batches of activations in, a trained autoencoder out."""
