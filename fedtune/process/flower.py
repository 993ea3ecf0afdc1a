"""The Flower that the modules which work inside Flower are written for. Imports no flwr."""

from collections.abc import Mapping
from importlib.metadata import version

from fedtune.errors import (
    ContractError,
    DataError,
    EnvironmentProblem,
    FedtuneError,
    ModelError,
    PrivacyRefused,
    Refused,
    RunError,
)

FLOWER = "1.41"
_FAILED, _TEXT = "failed", "failed-text"
_ENDING = {
    kind.__name__: kind
    for kind in (RunError, DataError, ModelError, EnvironmentProblem, PrivacyRefused, ContractError)
}


def check_version() -> None:
    """Raises EnvironmentProblem for another Flower than this fedtune was written for."""
    found = version("flwr")
    if not found.startswith(FLOWER + "."):
        raise EnvironmentProblem(
            f"flwr {found} is installed; this fedtune is written for {FLOWER}.x, because it works inside "
            f"Flower; install flwr=={FLOWER}.0"
        )


def failure(error: FedtuneError) -> dict[str, str]:
    """What an engine's client sends of an error that is no client's own, such as a full disk; nothing of
    one that costs a client its update.
    """
    return {} if isinstance(error, Refused) else {_FAILED: type(error).__name__, _TEXT: str(error)}


def require_no_failure(values: Mapping[str, object]) -> None:
    """Raises the error that `failure` told of.

    For engines whose clients are processes of this run; what a device sends ends no run.
    """
    if _FAILED in values:
        raise _ENDING.get(str(values[_FAILED]), FedtuneError)(str(values.get(_TEXT, "")))
