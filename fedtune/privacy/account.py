"""What a run has spent: the ledger read into figures and into words."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fedtune.privacy.accounting import Reading, read_epsilon, relation
from fedtune.privacy.plan import PrivacyPlan, fewest
from fedtune.privacy.releases import History, Release, histories, history

OWN = "this device"
"""The client of a device's own ledger."""
POINTS = 16
"""Rounds at which epsilon is read for the plot."""
SHARES = 24
"""About the most different histories that are read for the spread over clients."""


@dataclass(frozen=True)
class Account:
    """Epsilon at `delta` of everything in a ledger.

    Attributes:
        worst: of the unit that lost most, which is what the run promises,
            with the client it is of ("" for all alike).
        spread: (epsilon, clients that have it), from the most to the least; of very many different ones, some
            count as the next larger.
        rounds: (round, epsilon by then of the client that has lost most in the end).
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


def account(
    events: Sequence[tuple[int, Release]],
    clients: Sequence[str],
    plan: PrivacyPlan,
    accountants: Sequence[str] = ("pld", "rdp"),
    others: int = 0,
) -> Account:
    """Reads (round, release) events. An unprotected event makes every reading infinite.

    Args:
        accountants: by which the worst unit is read; the others only by the one of PLD
            and RDP that gives it less.
        others: clients beside `clients` that no event names.
    """
    releases = [release for _, release in events]
    if not all(r.protected for r in releases):
        lost = read_epsilon(releases, plan.delta)
        return Account(
            plan.delta,
            lost,
            "",
            ((lost.epsilon, len(clients) + others),),
            tuple((round, lost.epsilon) for round, _ in events),
            {},
            0.0,
        )
    own = histories(releases, clients)
    counts = Counter(own.values())
    counts[history(r for r in releases if not r.names)] += others
    counts += Counter()  # without the empty ones
    heaviest = max(_largest(counts) or [history(releases)], key=lambda h: read_epsilon(h, plan.delta).epsilon)
    worst, best = read_epsilon(heaviest, plan.delta, accountants), read_epsilon(heaviest, plan.delta).best

    def quick(found: History) -> float:
        if found == heaviest:
            return worst.epsilon
        one = read_epsilon(found, plan.delta, (best,)).epsilon if found else 0.0
        return one if math.isfinite(one) else read_epsilon(found, plan.delta).epsilon

    spread: Counter[float] = Counter()
    for found, larger in thinned(counts).items():
        spread[quick(larger)] += counts[found]
    client = next((name for name, found in own.items() if found == heaviest), "")
    mine = [(round, r) for round, r in events if not r.names or client in r.names]
    target = plan.job.privacy.epsilon
    return Account(
        plan.delta,
        worst,
        client if len(counts) > 1 else "",
        tuple(sorted(spread.items(), reverse=True)),
        tuple((mark, quick(history(r for round, r in mine if round <= mark))) for mark in _marks(events)),
        {
            name: quick(history(_alone(r, name) for _, r in mine if name in r.parts))
            for name in dict.fromkeys(name for r in releases for name in r.parts)
        },
        max(0.0, target - worst.epsilon) if target else math.inf,
    )


def spent(releases: Sequence[Release], delta: float) -> float:
    """Epsilon so far of the unit that has lost most. Readings are kept, so a new round costs one or two."""
    if not all(r.protected for r in releases):
        return math.inf
    return max(
        read_epsilon(found, delta).epsilon
        for found in _largest(histories(releases, ()).values()) or [history(releases)]
    )


def _largest(found: Iterable[History]) -> list[History]:
    """The histories that no other one contains; only these can be the most expensive."""
    known = set(found)
    return [h for h in known if not any(h != other and _within(h, other) for other in known)]


def _within(a: History, b: History) -> bool:
    """Whether all that happened in `a` happened in `b`, too."""
    counts = dict(b)
    return all(count <= counts.get(step, 0) for step, count in a)


def thinned(found: Iterable[History]) -> dict[History, History]:
    """For each history one that contains it, itself where there are few,
    so that about SHARES different ones are left to read.
    """
    ordered = sorted(set(found), key=lambda h: -sum(count for _, count in h))
    kept = ordered[:: max(1, -(-len(ordered) // SHARES))]
    return {
        h: next((larger for larger in reversed(kept) if _within(h, larger)), h) if h else h for h in ordered
    }


def _marks(events: Sequence[tuple[int, Release]]) -> list[int]:
    """At most POINTS rounds, evenly up to the last."""
    first, last = (
        min((round for round, _ in events), default=1),
        max((round for round, _ in events), default=0),
    )
    return sorted({round(first + i * (last - first) / (POINTS - 1)) for i in range(POINTS)}) if events else []


def _alone(release: Release, part: str) -> Release:
    return release.model_copy(update={"parts": {part: release.parts[part]}})


def assumptions(plan: PrivacyPlan) -> list[str]:
    """Whom the bound protects, against whom, and what has to be true for it, one sentence each."""
    privacy, fed, release = plan.job.privacy, plan.job.federation, plan.release(["one"])
    one = "one training example of one client" if plan.unit == "example" else "all data of one client"
    how = relation([release.step])
    told = "exchanged for another" if how == "replace-one" else "added or removed"
    out = [f"Unit: {one}. Two data sets are neighbours when that is {told} ({how})."]
    if plan.unit == "example":
        if privacy.secure_aggregation:
            out.append(
                "Secure aggregation hides single updates from a coordinator that follows the protocol. "
                "No noise is saved by it, and the figures do not rest on it."
            )
        out.append(
            "Trusted: each client's own device. Noise is added there, so the bound holds against "
            "the coordinator and everyone after it."
        )
        out.append(
            f"Sampling: each step takes every example with chance {release.rate:.4g}, on its own, "
            f"drawn on the device; a client makes {plan.steps} steps a round. Both follow from "
            f"privacy.examples = {privacy.examples}, which is public and not counted in the data."
        )
        out.append(
            "Clients hold different examples: the figure is that of the client that lost most. "
            "Nothing is claimed for not having been drawn in a round."
        )
    elif plan.distributed:
        least = fewest(plan.job)
        out.append(
            f"Trusted: no single party, but {least} honest clients in each sum, with their noise, "
            "and a coordinator that follows the protocol and relays the clients' public keys unchanged; it "
            "may be curious. A client that colludes with it tells its own noise, which then does not count."
        )
        out.append(
            f"Noise: each client adds discrete noise of 1 / {least} of the variance that is needed, "
            f"as {least} are the fewest whose sum opens. That a client took part is not hidden; "
            "a client added or removed means that its numbers are there, or zeros in their place. "
            "Read as zCDP (arXiv:2102.06387)."
        )
    else:
        out.append(
            "Trusted: the coordinator, which sees each client's update before it adds the noise. "
            "The bound is against all who see the model or the figures it releases."
        )
    if plan.unit == "client":
        if privacy.amplification:
            drawn = (
                f"each client with chance {release.rate:.4g}"
                if fed.sampling == "poisson"
                else f"{release.sample} of {release.population} clients"
            )
            out.append(
                f"Sampling: a round draws {drawn}, and the bound counts on it that nobody learns who was "
                "drawn; the run folder names them, so keep it with the coordinator."
            )
        else:
            out.append(
                "Sampling: none is counted on. A client is charged for the rounds it was asked "
                "in, whoever knows of them."
            )
    share = privacy.examples if plan.unit == "example" else plan.population
    held = (
        (
            f" It is below 1 / {share} = {1 / share:.2g}: giving away one of {share} {plan.unit}s whole "
            "would not count as private."
        )
        if share
        else ""
    )
    out.append(f"Delta = {plan.delta:g}: with that chance epsilon may not hold.{held}")
    out.append(
        (
            "Clip "
            f"{privacy.clip:g}{', adapted with the clip bits charged' if privacy.adaptive_clip else ''}; "
            f"noise multiplier {plan.parts['update']:g} in double precision from "
        )
        + (
            "the operating system's generator."
            if privacy.noise == "system"
            else "A KNOWN SEED: NOT PRIVATE, no epsilon holds."
        )
    )
    if not plan.job.units.chosen.whole:
        out.append(
            "Units: which of them a client trains in a round follows from the job alone, never from its "
            "data, and anybody may know; clip and noise are over those, and nothing else moves."
        )
    if first := plan.gradients([]):
        out.append(
            f"Frame: made from one noisy sum of gradients alone, clip {first.clip:g} and noise multiplier "
            f"{plan.init_noise:g}, charged beside the rounds."
        )
    out.append(
        "Training metrics: "
        + (
            f"sent with noise of multiplier {privacy.metrics_noise:g}, charged."
            if privacy.metrics_noise
            else "not sent."
        )
        + (
            " Held-out examples are another matter: where a simulation scores them, "
            "it does so exactly, and no bound covers them."
        )
    )
    out.append(
        "Not covered: settings and labels that were chosen by looking at the data; "
        "a simulation's baselines, and what its page and run folder say of who holds what; "
        "and other runs on the same data, whose losses add up."
    )
    return out
