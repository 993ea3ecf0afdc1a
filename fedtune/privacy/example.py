"""Example-level privacy: the numbers of DP-SGD (Abadi et al. 2016, arXiv:1607.00133, Algorithm 1) and its
checks of itself. No torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedtune.errors import Refused
from fedtune.job import Job
from fedtune.privacy.noise import Noise, as_promised
from fedtune.privacy.plan import (
    METRIC_CAP,
    init_batch,
    init_clip,
    local_steps,
    noise_multiplier,
    sampling_rate,
)
from fedtune.types import Metrics

METRIC_NORM = math.sqrt(3.0)
"""L2 bound of one example's (loss / METRIC_CAP, right, 1)."""


@dataclass(frozen=True)
class ExamplePrivacy:
    """One client's round: in each of `steps` steps every example is taken with chance `rate`, its gradient
    cut to the L2 norm `clip`, noise of standard deviation multiplier * clip added to the sum, and the sum
    divided by `batch`, a public number.

    `metrics`: noise multiplier of the training metrics; 0: there are none.
    """

    clip: float
    multiplier: float
    batch: float
    rate: float
    steps: int
    metrics: float = 0.0


def example_privacy(job: Job) -> ExamplePrivacy | None:
    """None where the job does not protect examples. Raises PrivacyRefused as `noise_multiplier`."""
    privacy = job.privacy
    if privacy.unit != "example":
        return None
    return ExamplePrivacy(
        privacy.clip,
        noise_multiplier(job),
        float(job.federation.batch_size),
        sampling_rate(job),
        local_steps(job),
        privacy.metrics_noise,
    )


def first_gradient(job: Job) -> ExamplePrivacy | None:
    """Of the first step's gradient; None where the job does not protect examples.

    Raises PrivacyRefused as `noise_multiplier`.
    """
    if job.privacy.unit != "example":
        return None
    batch, rate = init_batch(job)
    return ExamplePrivacy(init_clip(job), job.privacy.init_noise or noise_multiplier(job), batch, rate, 1)


def poisson_batches(count: int, settings: ExamplePrivacy, noise: Noise) -> list[np.ndarray]:
    """Which of `count` examples are in each step: every example on its own with chance `rate`,
    so a step may have none.
    """
    return [np.flatnonzero(noise.uniform(count) < settings.rate) for _ in range(settings.steps)]


def drawn_noise(sizes: Sequence[int], settings: ExamplePrivacy, noise: Noise) -> np.ndarray:
    """What is added to a step's sum of gradients, float32 [P], where P is the sum of `sizes`,
    the numbers of each trained tensor.
    """
    sigma = settings.multiplier * settings.clip
    # in parts: a draw takes ten times its room
    return np.concatenate([(sigma * noise.normal(size)).astype(np.float32) for size in sizes])


def capped(scores: np.ndarray) -> np.ndarray:
    """Of each example (loss, right, 1), float64 [n, 3], within [0, METRIC_CAP], [0, 1] and [0, 1]."""
    bounded = np.nan_to_num(scores, nan=METRIC_CAP, posinf=METRIC_CAP)
    return np.minimum(np.maximum(bounded, 0.0), [METRIC_CAP, 1.0, 1.0])


def noisy_metrics(totals: np.ndarray, settings: ExamplePrivacy, noise: Noise) -> Metrics:
    """`totals`, the sums over all steps of each example's (capped loss, right, 1), with the noise of all
    steps and made plausible; none where the job sends none.
    """
    if not settings.metrics:
        return {}
    sigma = settings.metrics * METRIC_NORM * math.sqrt(settings.steps)
    a, b, c = (totals / [METRIC_CAP, 1.0, 1.0] + sigma * noise.normal(3)).tolist()
    c = max(c, 1.0)
    return {"loss": (METRIC_CAP * min(max(a, 0.0), c), c), "accuracy": (min(max(b, 0.0), c), c)}


@dataclass
class SelfCheck:
    """What a private training saw of its own mechanism; `require` refuses to let a
    broken one's result leave.
    """

    settings: ExamplePrivacy
    squares: float = 0.0
    drawn: int = 0
    largest: float = 0.0
    """L2 norm of a clipped gradient, the largest seen."""

    def noise(self, added: np.ndarray) -> None:
        """What was added to a sum of gradients."""
        self.squares += float(np.square(added, dtype=np.float64).sum())
        self.drawn += added.size

    def clipped(self, norms: np.ndarray) -> None:
        self.largest = max(self.largest, float(norms.max(initial=0.0)))

    def require(self, start: np.ndarray, end: np.ndarray) -> None:
        """Raises Refused unless the clip held, the noise has the size that was promised,
        and the weights moved.
        """
        sigma = self.settings.multiplier * self.settings.clip
        if not self.largest <= self.settings.clip * (1 + 1e-5):
            raise Refused(
                "privacy-check",
                f"a gradient of norm {self.largest:.6g} got past the clip "
                f"of {self.settings.clip:g}; nothing was sent",
            )
        if not as_promised(self.squares, self.drawn, sigma):
            raise Refused(
                "privacy-check",
                f"the noise measured {math.sqrt(self.squares / max(1, self.drawn)):.4g}, "
                f"{sigma:.4g} was promised; nothing was sent",
            )
        if not np.isfinite(end).all() or np.array_equal(start, end):
            raise Refused(
                "privacy-check", "the trained weights did not move, or not to numbers; nothing was sent"
            )
