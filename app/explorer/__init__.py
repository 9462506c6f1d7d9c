"""What the explorer's pages share: what they read, and how they draw it."""
