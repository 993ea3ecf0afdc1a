"""As `agreement`, of privacy and secure aggregation."""

from collections.abc import Iterator

from fedtune.job.sections import PrivacySection, Sections
from fedtune.job.text import toml_value

_NO_PRIVACY = PrivacySection()
# keys that mean something where nothing is protected
_SECURE = ("secure_aggregation", "clip", "update_clip", "noise")


def privacy_disagreements(job: Sections) -> Iterator[str]:
    privacy, fed = job.privacy, job.federation
    yield from _secure_disagreements(job)
    if privacy.unit == "none":
        for name in type(privacy).model_fields:
            if not (privacy.secure_aggregation and name in _SECURE) and getattr(privacy, name) != getattr(
                _NO_PRIVACY, name
            ):
                yield (
                    f"privacy.{name.replace('_', '-')} = {toml_value(getattr(privacy, name))}: privacy.unit "
                    '= "none" protects nothing; set unit to "example" or "client", or remove the key'
                )
        if job.adapter.init == "gradient-dp":
            yield (
                'adapter.init = "gradient-dp": privacy.unit = "none" has no noise for it; '
                'set unit to "example" or "client", or use "gradient"'
            )
        return
    if privacy.epsilon == 0 and privacy.noise_multiplier == 0:
        yield f"privacy.epsilon = 0: unit = {toml_value(privacy.unit)} needs epsilon, or a noise-multiplier"
    if privacy.clip == 0:
        yield (
            f"privacy.clip = 0: unit = {toml_value(privacy.unit)} needs a bound; "
            "`fedtune privacy calibrate` shows what one means"
        )
    if fed.weighting != "equal":
        yield (
            f"federation.weighting = {toml_value(fed.weighting)}: how many examples a client holds is not "
            'protected; set it to "equal"'
        )
    if job.adapter.init == "gradient":
        yield (
            'adapter.init = "gradient": sends gradients of raw data that no noise protects; '
            'use "weights", or "gradient-dp"'
        )
    for name in ("init_noise", "init_clip"):
        if getattr(privacy, name) and job.adapter.init != "gradient-dp":
            yield (
                f"privacy.{name.replace('_', '-')} = {toml_value(getattr(privacy, name))}: "
                'only for adapter.init = "gradient-dp"; remove it'
            )
    if job.adapter.init == "gradient-dp" and privacy.amplification and fed.sampling == "fixed":
        yield (
            'adapter.init = "gradient-dp": who sends a gradient is no secret, so its bound is of a client '
            'added or removed, that of amplification with sampling = "fixed" of one exchanged; use "poisson"'
        )
    if privacy.unit == "example":
        if privacy.examples == 0:
            yield (
                'privacy.examples = 0: unit = "example" needs the public number '
                "of examples a client is taken to hold"
            )
        elif privacy.examples < fed.batch_size:
            yield (
                f"privacy.examples = {privacy.examples}: at least federation.batch-size = {fed.batch_size}; "
                "raise it, or lower the batch size"
            )
        for name in ("amplification", "adaptive_clip"):
            if getattr(privacy, name):
                yield f'privacy.{name.replace("_", "-")} = true: only for unit = "client"; remove it'
    else:
        if privacy.examples:
            yield f'privacy.examples = {privacy.examples}: only for unit = "example"; remove it'
        if fed.min_replies > 1 and not privacy.secure_aggregation:  # there, who takes part is not hidden
            yield (
                f"federation.min-replies = {fed.min_replies}: a round that is void for want of replies would "
                'tell who took part; leave it at 1 with unit = "client"'
            )
        if privacy.amplification and any(
            device.available < 1 or device.memory_mb for device in job.simulation.devices
        ):
            yield (
                "privacy.amplification = true: with simulation.devices that are not always there, cohorts "
                "are drawn from fewer than all clients, so it would claim too much; remove one of the two"
            )
        if privacy.amplification and privacy.participations:
            yield (
                f"privacy.participations = {privacy.participations}: with amplification every client counts "
                "as in every round; remove one of the two"
            )


def _secure_disagreements(job: Sections) -> Iterator[str]:
    privacy, fed = job.privacy, job.federation
    if not privacy.secure_aggregation:
        if privacy.update_clip:
            yield f"privacy.update-clip = {privacy.update_clip:g}: only for secure-aggregation; remove it"
        return
    if privacy.unit == "example":
        if not privacy.update_clip:
            yield (
                'privacy.update-clip = 0: secure-aggregation with unit = "example" needs the L2 bound '
                "of an update, as clip bounds gradients"
            )
    elif privacy.update_clip:
        yield (
            f'privacy.update-clip = {privacy.update_clip:g}: only for unit = "example"; '
            "clip is the bound here, remove it"
        )
    elif privacy.unit == "none" and not privacy.clip:
        yield (
            "privacy.clip = 0: secure-aggregation needs the L2 bound of an update, or its sum has no range; "
            "look at the norms of a run without"
        )
    if privacy.unit == "none" and fed.weighting != "equal":
        yield (
            f"federation.weighting = {toml_value(fed.weighting)}: a secure sum counts all "
            'clients alike; set it to "equal"'
        )
    if job.adapter.asks_gradients:
        yield (
            f"adapter.init = {toml_value(job.adapter.init)}: sends single gradients in the clear; "
            'use "weights" with secure-aggregation'
        )
    if fed.cohort < 3:
        yield (
            f"federation.cohort = {fed.cohort}: at least 3 with secure-aggregation, as each of two could "
            "take itself from the sum; raise it"
        )
    if fed.sampling != "fixed":
        yield (
            f"federation.sampling = {toml_value(fed.sampling)}: a secure sum is laid out for a number "
            'of clients; set it to "fixed"'
        )
    for name in ("amplification", "adaptive_clip", "metrics_noise"):
        if getattr(privacy, name) and privacy.unit != "none":
            yield (
                f"privacy.{name.replace('_', '-')} = {toml_value(getattr(privacy, name))}: "
                "not with secure-aggregation; remove it"
            )
