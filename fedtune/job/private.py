"""As `agreement`, of privacy and secure aggregation."""

from collections.abc import Iterator

from fedtune.job.checks import Check, when
from fedtune.job.sections import PrivacySection, Sections
from fedtune.job.text import toml_value

# keys that mean something where nothing is protected
_SECURE = ("secure_aggregation", "clip", "update_clip", "noise")


def _update_clip_without_secrecy(job: Sections) -> Iterator[str]:
    privacy = job.privacy
    if privacy.update_clip and not privacy.secure_aggregation:
        yield f"privacy.update-clip = {privacy.update_clip:g}: only for secure-aggregation; remove it"


def _bound_of_a_sum(job: Sections) -> Iterator[str]:
    privacy = job.privacy
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


def _weighted_sum(job: Sections) -> Iterator[str]:
    if job.privacy.unit == "none" and job.federation.weighting != "equal":
        yield (
            f"federation.weighting = {toml_value(job.federation.weighting)}: a secure sum counts all "
            'clients alike; set it to "equal"'
        )


def _gradients_in_the_clear(job: Sections) -> Iterator[str]:
    if job.adapter.asks_gradients:
        yield (
            f"adapter.init = {toml_value(job.adapter.init)}: sends single gradients in the clear; "
            'use "weights" with secure-aggregation'
        )


def _sum_of_two(job: Sections) -> Iterator[str]:
    if job.federation.cohort < 3:
        yield (
            f"federation.cohort = {job.federation.cohort}: at least 3 with secure-aggregation, as each of "
            "two could take itself from the sum; raise it"
        )


def _sum_of_any_number(job: Sections) -> Iterator[str]:
    if job.federation.sampling != "fixed":
        yield (
            f"federation.sampling = {toml_value(job.federation.sampling)}: a secure sum is laid out for a "
            'number of clients; set it to "fixed"'
        )


def _not_in_a_sum(key: str) -> Check:
    def check(job: Sections) -> Iterator[str]:
        value = getattr(job.privacy, key)
        if value and job.privacy.unit != "none":
            yield (
                f"privacy.{key.replace('_', '-')} = {toml_value(value)}: "
                "not with secure-aggregation; remove it"
            )

    return check


def _protects_nothing(key: str) -> Check:
    def check(job: Sections) -> Iterator[str]:
        value = getattr(job.privacy, key)
        if value != PrivacySection.model_fields[key].default and not (
            key in _SECURE and job.privacy.secure_aggregation
        ):
            yield (
                f"privacy.{key.replace('_', '-')} = {toml_value(value)}: privacy.unit "
                '= "none" protects nothing; set unit to "example" or "client", or remove the key'
            )

    return check


def _no_noise_for_the_frame(job: Sections) -> Iterator[str]:
    if job.adapter.init == "gradient-dp":
        yield (
            'adapter.init = "gradient-dp": privacy.unit = "none" has no noise for it; '
            'set unit to "example" or "client", or use "gradient"'
        )


def _no_epsilon(job: Sections) -> Iterator[str]:
    privacy = job.privacy
    if privacy.epsilon == 0 and privacy.noise_multiplier == 0:
        yield f"privacy.epsilon = 0: unit = {toml_value(privacy.unit)} needs epsilon, or a noise-multiplier"


def _no_clip(job: Sections) -> Iterator[str]:
    if job.privacy.clip == 0:
        yield (
            f"privacy.clip = 0: unit = {toml_value(job.privacy.unit)} needs a bound; "
            "`fedtune privacy calibrate` shows what one means"
        )


def _weighted(job: Sections) -> Iterator[str]:
    if job.federation.weighting != "equal":
        yield (
            f"federation.weighting = {toml_value(job.federation.weighting)}: how many examples a client "
            'holds is not protected; set it to "equal"'
        )


def _bare_gradients(job: Sections) -> Iterator[str]:
    if job.adapter.init == "gradient":
        yield (
            'adapter.init = "gradient": sends gradients of raw data that no noise protects; '
            'use "weights", or "gradient-dp"'
        )


def _only_of_the_frame(key: str) -> Check:
    def check(job: Sections) -> Iterator[str]:
        value = getattr(job.privacy, key)
        if value and job.adapter.init != "gradient-dp":
            yield (
                f"privacy.{key.replace('_', '-')} = {toml_value(value)}: "
                'only for adapter.init = "gradient-dp"; remove it'
            )

    return check


def _two_bounds(job: Sections) -> Iterator[str]:
    if job.adapter.init == "gradient-dp" and job.privacy.amplification and job.federation.sampling == "fixed":
        yield (
            'adapter.init = "gradient-dp": who sends a gradient is no secret, so its bound is of a client '
            'added or removed, that of amplification with sampling = "fixed" of one exchanged; use "poisson"'
        )


def _examples_of_a_client(job: Sections) -> Iterator[str]:
    privacy, fed = job.privacy, job.federation
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


def _only_for_clients(key: str) -> Check:
    def check(job: Sections) -> Iterator[str]:
        if getattr(job.privacy, key):
            yield f'privacy.{key.replace("_", "-")} = true: only for unit = "client"; remove it'

    return check


def _only_for_examples(job: Sections) -> Iterator[str]:
    if job.privacy.examples:
        yield f'privacy.examples = {job.privacy.examples}: only for unit = "example"; remove it'


def _void_rounds_tell(job: Sections) -> Iterator[str]:
    # with secure aggregation who takes part is not hidden
    if job.federation.min_replies > 1 and not job.privacy.secure_aggregation:
        yield (
            f"federation.min-replies = {job.federation.min_replies}: a round that is void for want of "
            'replies would tell who took part; leave it at 1 with unit = "client"'
        )


def _amplified_by_fewer(job: Sections) -> Iterator[str]:
    if job.privacy.amplification and any(
        device.available < 1 or device.memory_mb for device in job.simulation.devices
    ):
        yield (
            "privacy.amplification = true: with simulation.devices that are not always there, cohorts "
            "are drawn from fewer than all clients, so it would claim too much; remove one of the two"
        )


def _amplified_by_turns(job: Sections) -> Iterator[str]:
    privacy = job.privacy
    if privacy.amplification and privacy.participations:
        yield (
            f"privacy.participations = {privacy.participations}: with amplification every client counts "
            "as in every round; remove one of the two"
        )


PRIVACY_CHECKS: tuple[Check, ...] = (
    _update_clip_without_secrecy,
    when(
        lambda job: job.privacy.secure_aggregation,
        _bound_of_a_sum,
        _weighted_sum,
        _gradients_in_the_clear,
        _sum_of_two,
        _sum_of_any_number,
        *map(_not_in_a_sum, ("amplification", "adaptive_clip", "metrics_noise")),
    ),
    when(
        lambda job: job.privacy.unit == "none",
        *map(_protects_nothing, PrivacySection.model_fields),
        _no_noise_for_the_frame,
    ),
    when(
        lambda job: job.privacy.unit != "none",
        _no_epsilon,
        _no_clip,
        _weighted,
        _bare_gradients,
        *map(_only_of_the_frame, ("init_noise", "init_clip")),
        _two_bounds,
    ),
    when(
        lambda job: job.privacy.unit == "example",
        _examples_of_a_client,
        *map(_only_for_clients, ("amplification", "adaptive_clip")),
    ),
    when(
        lambda job: job.privacy.unit == "client",
        _only_for_examples,
        _void_rounds_tell,
        _amplified_by_fewer,
        _amplified_by_turns,
    ),
)
