"""Metrics from outside are taken only when they can be what they say."""

import pytest

from fedtune.common.metrics import LARGEST_LOSS, plausible


@pytest.mark.parametrize(
    "metrics",
    [
        {},
        {"loss": (3.0, 4.0), "accuracy": (2.0, 4.0)},
        {"loss": (0.0, 0.0), "accuracy": (0.0, 0.0)},
        {"loss": (4 * LARGEST_LOSS, 4.0)},
        {"accuracy": (4.0, 4.0)},
    ],
)
def test_what_can_be(metrics):
    assert plausible(metrics, 4.0)


@pytest.mark.parametrize(
    "metrics",
    [
        {"loss": (3.0, 4.0), "accuracy": (5.0, 4.0)},
        {"loss": (3.0, 4.0), "accuracy": (2.0, 3.0)},
        {"loss": (-1.0, 4.0)},
        {"accuracy": (-1.0, 4.0)},
        {"loss": (3.0, 5.0)},
        {"loss": (3.0, -4.0)},
        {"accuracy": (4e28, 4.0)},
        {"loss": (5e9, 4.0)},
        {"loss": (1.0, 0.0)},
        {"epsilon": (0.0, 1.0)},
    ],
)
def test_what_cannot(metrics):
    assert not plausible(metrics, 4.0)
