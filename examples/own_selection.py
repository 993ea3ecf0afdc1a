"""A selection of one's own: everybody has a turn before anybody has a second one.

    python examples/own_selection.py                      # the quickstart's job, for some minutes
    python examples/own_selection.py job.toml runs/mine   # another job, another run folder

A draw by lot leaves some clients out for a long time. Here each pass over the clients is in an order of its
own, and each round takes the next few of it. What is chosen depends on the clients and the round alone, so
that a run which was stopped goes on as it would have.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import fedtune

QUICKSTART = Path(__file__).parents[1] / "simulations" / "quickstart" / "job.toml"
COHORT = 4


def in_turn(clients: Sequence[fedtune.ClientInfo], round: int, rng: np.random.Generator) -> list[str]:
    names = sorted(client.name for client in clients)
    rounds_of_a_pass = -(-len(names) // COHORT)
    tour, place = divmod(round - 1, rounds_of_a_pass)
    order = np.random.default_rng(tour).permutation(len(names))
    return [names[i] for i in order[place * COHORT : (place + 1) * COHORT]]


def main(job: str = str(QUICKSTART), out: str = "runs/in-turn") -> None:
    run = fedtune.simulate(job, out=out, select=in_turn)
    for line in run.rounds[1:]:
        print(f"round {line['round']}: {', '.join(line['clients'])}")
    turns = Counter(client for line in run.rounds for client in line["clients"])
    print(f"{len(turns)} clients trained, each between {min(turns.values())} and {max(turns.values())} times")
    print(f"accuracy {run.rounds[-1]['accuracy']:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
