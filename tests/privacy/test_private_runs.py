"""Whole runs with privacy: every engine gives the same model, figures and ledger;
nothing leaves that has no noise.
"""

import numpy as np
import pytest

from fedtune.errors import PrivacyRefused
from fedtune.privacy.releases import read
from fedtune.runs.ledger import Ledger

EXAMPLE = (
    "privacy.unit=example",
    "privacy.noise-multiplier=2.0",
    "privacy.clip=0.5",
    "privacy.examples=160",
    "federation.weighting=equal",
    "privacy.noise=seeded",
)
CLIENT = (
    "privacy.unit=client",
    "privacy.noise-multiplier=3.0",
    "privacy.clip=0.5",
    "federation.weighting=equal",
    "privacy.noise=seeded",
)

SECURE = ("privacy.secure-aggregation=true", "federation.cohort=4")
LISA = ("units.strategy=lisa", "units.budget=1")
UNEQUAL = (
    "units.strategy=top",
    "units.budget=2",
    'simulation.devices=[{name = "small", units = 1}, {name = "large"}]',
)


def events(run):
    return [(e.round, read(e.facts)) for e in Ledger(run.ledger).events()]


@pytest.mark.parametrize(
    "changes",
    [
        EXAMPLE,
        (*EXAMPLE, "privacy.metrics-noise=4.0", "privacy.participations=2"),
        CLIENT,
        (*CLIENT, "privacy.adaptive-clip=true", "privacy.metrics-noise=4.0"),
        (*CLIENT, "federation.sampling=poisson", "privacy.amplification=true", "federation.cohort=2"),
        (*EXAMPLE, *LISA, "privacy.metrics-noise=4.0"),
        (*CLIENT, *LISA),
        (*CLIENT, *SECURE, *LISA),
        (*CLIENT, *SECURE, *UNEQUAL),
    ],
    ids=[
        "example",
        "example, all",
        "client",
        "client, all",
        "client, poisson",
        "example, units",
        "client, units",
        "client, secure, units",
        "client, secure, unequal",
    ],
)
def test_engines_agree(changes, tiny_job, run_rounds, tmp_path):
    serial, fast = (
        run_rounds(tiny_job(f"simulation.engine={engine}", *changes), tmp_path / engine).run
        for engine in ("serial", "vectorised")
    )
    assert events(serial) == events(fast)
    one, two = serial.newest().state, fast.newest().state
    for name, array in one.arrays.items():
        np.testing.assert_allclose(two.arrays[name], array, atol=1e-4, rtol=0)
    for mine, other in zip(serial.metrics(), fast.metrics(), strict=True):
        assert (
            sorted(mine["clients"]) == sorted(other["clients"])
            and mine["refused"] == other["refused"]
            and mine["total_bytes"] == other["total_bytes"]
        )
        if mine["train_loss"] is not None:
            assert mine["train_loss"] == pytest.approx(other["train_loss"], rel=1e-3)


@pytest.mark.parametrize("secure", [(), SECURE], ids=["plain", "secure"])
def test_noise_for_clients_is_on_what_anybody_trains(secure, tiny_job, run_rounds, tmp_path):
    """Also where nobody who could train a block was drawn: else the release would tell who was."""
    small = (
        'simulation.devices=[{name = "small", units = 1, share = 5}, {name = "large", '
        "units = 2, drop-out = 0.999999}]"
    )
    run = run_rounds(
        tiny_job(
            *CLIENT,
            *secure,
            "federation.cohort=6",
            "federation.rounds=1",
            "units.strategy=top",
            "units.budget=1",
            small,
            "federation.lr=1e-9",
            "federation.min-replies=1",
            "federation.deadline=100",
        ),
        tmp_path / "run",
    ).run
    first, last = run.first_arrays(), run.newest().state.arrays
    assert 4 <= len(run.metrics()[-1]["clients"]) < 6 and "block.0" not in run.metrics()[-1]["units"]
    assert any("layer.0." in name for name in first) and all(
        (array != last[name]).all() for name, array in first.items()
    )
    assert [r.parts for _, r in events(run)] == [{"update": 3.0}]


@pytest.mark.parametrize("secure", [(), SECURE], ids=["plain", "secure"])
def test_noise_for_clients_is_on_the_units_that_are_trained(secure, tiny_job, run_rounds, tmp_path):
    run = run_rounds(
        tiny_job(*CLIENT, *secure, "units.strategy=top", "units.budget=1", "federation.lr=1e-9"),
        tmp_path / "run",
    ).run
    first, last = run.first_arrays(), run.newest().state.arrays
    for name, array in first.items():
        assert (array != last[name]).all() if "layer.0." not in name else np.array_equal(array, last[name])
    assert [r.parts for _, r in events(run)] == [{"update": 3.0}] * 3


def test_nothing_without_noise_is_sent(tiny_job, run_rounds, tmp_path):
    """No training metrics, and a weight that is the same whatever a client holds;
    every release is in the ledger first.
    """
    for unit in (EXAMPLE, CLIENT):
        run = run_rounds(tiny_job(*unit, "privacy.noise=system"), tmp_path / unit[0]).run
        lines = run.metrics()
        assert all(line["train_loss"] is None and line["train_accuracy"] is None for line in lines)
        assert [round for round, _ in events(run)] == [1, 2, 3] and all(
            r.protected and r.unit in unit[0] for _, r in events(run)
        )


def test_a_private_run_needs_its_noise(tiny_job, run_rounds, tmp_path):
    """An epsilon that nobody made into noise trains nothing."""
    for unit in (EXAMPLE, CLIENT):
        with pytest.raises(PrivacyRefused, match="was not computed"):
            run_rounds(
                tiny_job(*unit[:1], *unit[2:], "privacy.epsilon=9.0", "privacy.i-understand=true"),
                tmp_path / unit[0],
            )
