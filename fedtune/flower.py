"""The Flower that the modules which work inside Flower are written for. Imports no flwr."""

from importlib.metadata import version

from fedtune.errors import EnvironmentProblem

FLOWER = "1.41"


def check_version() -> None:
    """Raises EnvironmentProblem for another Flower than this fedtune was written for."""
    found = version("flwr")
    if not found.startswith(FLOWER + "."):
        raise EnvironmentProblem(f"flwr {found} is installed; this fedtune is written for {FLOWER}.x, because it works inside Flower; install flwr=={FLOWER}.0")
