"""Ways to choose the blocks that clients train, as values."""
