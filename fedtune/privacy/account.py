"""What a run has spent: the ledger read into figures and into words."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from fedtune.privacy.accounting import Reading, read_epsilon, relation
from fedtune.privacy.plan import Plan, fewest
from fedtune.privacy.releases import History, Release, histories, history

OWN = "this device"
"""The client of a device's own ledger."""
POINTS = 24
"""Rounds at which epsilon is read for the plot."""


@dataclass(frozen=True)
class Account:
    """Epsilon at `delta` of everything in a ledger.

    Attributes:
        worst: of the unit that lost most, which is what the run promises, with the client it is of ("" for all alike).
        spread: (epsilon, clients that have it), from the most to the least.
        rounds: (round, epsilon of the unit that has lost most by then).
        parts: epsilon of each kind of release, as if it alone had left.
        left: epsilon still unspent of what the job allows; infinite where it names no epsilon.
    """

    delta: float
    worst: Reading
    client: str
    spread: tuple[tuple[float, int], ...]
    rounds: tuple[tuple[int, float], ...]
    parts: dict[str, float]
    left: float

    @property
    def epsilon(self) -> float:
        return self.worst.epsilon


def account(events: Sequence[tuple[int, Release]], clients: Sequence[str], plan: Plan, accountants: Sequence[str] = ("pld", "rdp")) -> Account:
    """Reads (round, release) events for these clients. An unprotected event makes every reading infinite."""
    releases = [release for _, release in events]
    if not all(r.protected for r in releases):
        lost = read_epsilon(releases, plan.delta)
        return Account(plan.delta, lost, "", ((lost.epsilon, len(clients)),), tuple((round, lost.epsilon) for round, _ in events), {}, 0.0)
    own = histories(releases, clients)
    readings: dict[History, float] = {h: read_epsilon(h, plan.delta).epsilon for h in set(own.values())}
    first = max(own, key=lambda name: readings[own[name]], default="")
    worst = read_epsilon(own[first] if own else history(releases), plan.delta, accountants)
    spread, alike = Counter(readings[h] for h in own.values()), len(readings) <= 1
    target = plan.job.privacy.epsilon
    return Account(
        plan.delta, worst, "" if alike else first, tuple(sorted(spread.items(), reverse=True)), _by_round(events, first, plan.delta), _by_part(releases, first, plan.delta),
        max(0.0, target - worst.epsilon) if target else float("inf"))


def _by_round(events: Sequence[tuple[int, Release]], client: str, delta: float) -> tuple[tuple[int, float], ...]:
    last = max((round for round, _ in events), default=0)
    marks = sorted({round(1 + i * (last - 1) / (POINTS - 1)) for i in range(POINTS)}) if last else []
    return tuple((mark, read_epsilon(history(r for at, r in events if at <= mark and (not r.names or client in r.names)), delta).epsilon) for mark in marks)


def _by_part(releases: Sequence[Release], client: str, delta: float) -> dict[str, float]:
    names = dict.fromkeys(name for r in releases for name in r.parts)
    found = {}
    for name in names:
        alone = [r.model_copy(update={"parts": {name: r.parts[name]}}) for r in releases if name in r.parts and (not r.names or client in r.names)]
        found[name] = read_epsilon(history(alone), delta).epsilon
    return found


def assumptions(plan: Plan) -> list[str]:
    """Whom the bound protects, against whom, and what has to be true for it, one sentence each."""
    privacy, fed, release = plan.job.privacy, plan.job.federation, plan.release(["one"])
    one = "one training example of one client" if plan.unit == "example" else "all data of one client"
    how = relation([release.step])
    told = "exchanged for another" if how == "replace-one" else "added or removed"
    out = [f"Unit: {one}. Two data sets are neighbours when that is {told} ({how})."]
    if plan.unit == "example":
        if privacy.secure_aggregation:
            out.append("Secure aggregation hides single updates from a coordinator that follows the protocol. No noise is saved by it, and the figures do not rest on it.")
        out.append("Trusted: each client's own device. Noise is added there, so the bound holds against the coordinator and everyone after it.")
        out.append(f"Sampling: each step takes every example with chance {release.rate:.4g}, on its own, drawn on the device; a client makes {plan.steps} steps a round. "
                   f"Both follow from privacy.examples = {privacy.examples}, which is public and not counted in the data.")
        out.append("Clients hold different examples: the figure is that of the client that lost most. Nothing is claimed for not having been drawn in a round.")
    elif plan.distributed:
        least = fewest(plan.job)
        out.append(f"Trusted: no single party, but {least} honest clients in each sum, with their noise, and a coordinator that follows the protocol and relays the "
                   "clients' public keys unchanged; it may be curious. A client that colludes with it tells its own noise, which then does not count.")
        out.append(f"Noise: each client adds discrete noise of 1 / {least} of the variance that is needed, as {least} are the fewest whose sum opens. That a client took part is "
                   "not hidden; a client added or removed means that its numbers are there, or zeros in their place. Read as zCDP (arXiv:2102.06387).")
    else:
        out.append("Trusted: the coordinator, which sees each client's update before it adds the noise. The bound is against all who see the model or the figures it releases.")
    if plan.unit == "client":
        if privacy.amplification:
            drawn = f"each client with chance {release.rate:.4g}" if fed.sampling == "poisson" else f"{release.sample} of {release.population} clients"
            out.append(f"Sampling: a round draws {drawn}, and the bound counts on it that nobody learns who was drawn; the run folder names them, so keep it with the coordinator.")
        else:
            out.append("Sampling: none is counted on. A client is charged for the rounds it was asked in, whoever knows of them.")
    share = privacy.examples if plan.unit == "example" else plan.population
    held = f", below 1 / {share} = {1 / share:.2g}" if share else ""
    out.append(f"Delta = {plan.delta:g}{held}: with that chance epsilon may not hold.")
    out.append(f"Clip {privacy.clip:g}{', adapted with the clip bits charged' if privacy.adaptive_clip else ''}; noise multiplier {plan.parts['update']:g} in double precision from "
               + ("the operating system's generator." if privacy.noise == "system" else "A KNOWN SEED: NOT PRIVATE, no epsilon holds."))
    out.append("Training metrics: " + (f"sent with noise of multiplier {privacy.metrics_noise:g}, charged." if privacy.metrics_noise else "not sent.")
               + " Held-out examples are another matter: where a simulation scores them, it does so exactly, and no bound covers them.")
    out.append("Not covered: settings that were chosen by looking at the data, and other runs on the same data, whose losses add up.")
    return out
