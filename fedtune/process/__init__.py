"""Processes and the waits between them: addresses, Flower's settings, the trainer's service."""
