"""The client's role: a Flower ClientApp around a worker."""
