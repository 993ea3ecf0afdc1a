"""What a device of a class may be asked for: all that the coordinator ever asks such a client,
and nothing beyond it.
"""

import pytest

from fedtune.algorithms.units import AS_THE_JOB, Limits, selected, tensors_of
from fedtune.errors import Refused
from fedtune.round.asked import require_borne
from fedtune.wire import encode
from fedtune.workflows.prepare import prepare

CLASSES = 'simulation.devices=[{name = "small", units = 1, rank = 2}, {name = "large", units = 2}]'
SMALL, LARGE = Limits(1, 0, 2), Limits(2, 0, 0)


@pytest.fixture(scope="module")
def bundles(tiny_job, tmp_path_factory):
    made = {}
    for strategy, more in {"lisa": (), "bottom": (), "gradient": ()}.items():
        job = tiny_job(f"units.strategy={strategy}", "units.budget=1", CLASSES, *more)
        made[strategy] = prepare(job, tmp_path_factory.mktemp(strategy) / "bundle")
    return made


def packet(bundle, units, rank, kind="model", round=1):
    held = {t.name: bundle.start[t.name] for t in bundle.schema.held(rank).tensors}
    train = tensors_of(bundle.schema, units, rank) if kind == "model" else None
    return encode(kind, bundle.schema, held, round=round, frame=bundle.frame_digest, train=train)


@pytest.mark.parametrize("strategy", ["lisa", "bottom"])
def test_what_the_coordinator_asks_is_borne(strategy, bundles):
    bundle = bundles[strategy]
    for limits in (SMALL, LARGE, AS_THE_JOB):
        for round in range(1, 6):
            require_borne(
                bundle,
                packet(
                    bundle,
                    selected(bundle.job, bundle.schema, round, limits.blocks),
                    limits.rank,
                    round=round,
                ),
                limits,
            )


def test_more_is_refused(bundles):
    both = ("block.0", "block.1", "head")
    require_borne(bundles["lisa"], packet(bundles["lisa"], both, 0), LARGE)
    for strategy, units, rank, limits, message in (
        (
            "bottom",
            both,
            2,
            SMALL,
            r"asks for block\.1 to be trained in round 1, where a client of this class trains block\.0, head",
        ),
        ("bottom", ("block.1", "head"), 0, AS_THE_JOB, r"asks for block\.1 to be trained in round 1"),
        ("gradient", both, 2, SMALL, "asks for 2 blocks to be trained, a client of this class trains 1"),
        ("gradient", both, 0, AS_THE_JOB, "asks for 2 blocks to be trained, a client of this class trains 1"),
        (
            "gradient",
            ("block.0", "head"),
            0,
            Limits(1, 1, 0),
            r"asks for block\.0 to be trained, a client of this class goes down to the last 1",
        ),
        ("gradient", ("block.1", "head"), 0, SMALL, "holds cores of rank 4, a client of this class has 2"),
        ("lisa", ("head",), 0, SMALL, "holds cores of rank 4, a client of this class has 2"),
    ):
        with pytest.raises(Refused, match=message):
            require_borne(bundles[strategy], packet(bundles[strategy], units, rank), limits)


def test_a_probe_is_borne_by_those_that_reach_all_blocks(bundles):
    bundle = bundles["gradient"]
    for limits in (SMALL, LARGE, AS_THE_JOB, Limits(1, 2, 0)):
        require_borne(bundle, packet(bundle, (), limits.rank, "probe"), limits)
    for rank, limits, message in (
        (0, Limits(1, 1, 0), "asks about all 2 blocks, a client of this class goes down to the last 1"),
        (0, SMALL, "holds cores of rank 4"),
    ):
        with pytest.raises(Refused, match=message):
            require_borne(bundle, packet(bundle, (), rank, "probe"), limits)
