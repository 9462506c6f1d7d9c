"""The steer page."""
