"""fedtune: federated fine-tuning of pretrained models with adapters of kilobytes."""

__version__ = "0.1.0"
