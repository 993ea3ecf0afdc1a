"""The one local step and loop, and evaluation. Needs torch."""
