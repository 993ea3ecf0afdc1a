"""Numbers of an optimizer step that every engine and device takes alike. No torch."""

from fedtune.job import FederationSection

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
"""torch.optim.AdamW's own, which the serial engine uses."""


def learning_rate(settings: FederationSection, name: str, round: int) -> float:
    """Of the trained tensor of this name in this round; the head may have its own."""
    lr = settings.head_lr if settings.head_lr and name.startswith("head.") else settings.lr
    return lr * settings.lr_decay ** (round - 1)
