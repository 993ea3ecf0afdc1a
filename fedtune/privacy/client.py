"""Client-level privacy: the numbers of DP-FedAvg (`algorithms.dp_fed_avg`)."""

import math
from dataclasses import dataclass

from fedtune.job import Job
from fedtune.privacy.plan import BITS, noise_multiplier

METRIC_NORM = math.sqrt(2.0)
"""L2 bound of one client's (mean loss / METRIC_CAP, accuracy)."""


@dataclass(frozen=True)
class ClientPrivacy:
    """`multiplier`: of the update's noise. `quantile` 0: the clip stays. `bits`: standard deviation of
    the noise on the number of updates within the clip. `metrics`: noise multiplier of training
    metrics, 0: there are none.
    """

    clip: float
    multiplier: float
    quantile: float = 0.0
    rate: float = 0.2
    bits: float = 0.0
    metrics: float = 0.0


def client_privacy(job: Job) -> ClientPrivacy | None:
    """None where the job does not protect clients. Raises PrivacyRefused as `noise_multiplier`."""
    privacy = job.privacy
    if privacy.unit != "client":
        return None
    z = noise_multiplier(job)
    bits = (privacy.clip_noise or BITS * z / 2) if privacy.adaptive_clip else 0.0
    return ClientPrivacy(
        privacy.clip,
        z,
        privacy.clip_quantile if privacy.adaptive_clip else 0.0,
        privacy.clip_rate,
        bits,
        privacy.metrics_noise,
    )
