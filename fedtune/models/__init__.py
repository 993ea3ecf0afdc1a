"""Bases: pretrained models by a fixed table of loaders, wrapped as body + head. Needs torch."""
