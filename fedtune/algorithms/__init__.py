"""Federated algorithms: frozen sets of pure functions, one paper each."""

from fedtune.algorithms.base import Algorithm, State
from fedtune.algorithms.dp_fed_avg import dp_fed_avg
from fedtune.algorithms.fed_avg import fed_avg
from fedtune.algorithms.secure_avg import secure_avg

__all__ = ["Algorithm", "State", "dp_fed_avg", "fed_avg", "secure_avg"]
