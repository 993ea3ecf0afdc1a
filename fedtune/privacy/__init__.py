"""Differential privacy: mechanisms, what they cost, and how that is read. Imports no torch."""
