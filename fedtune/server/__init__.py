"""The coordinator's role: Flower messages in, Flower messages out. Never imports torch."""
