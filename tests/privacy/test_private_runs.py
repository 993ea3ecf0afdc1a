"""Whole runs with privacy: every engine gives the same model, figures and ledger; nothing leaves that has no noise."""

import numpy as np
import pytest

from fedtune.errors import PrivacyRefused
from fedtune.ledger import Ledger
from fedtune.privacy.releases import read

EXAMPLE = ("privacy.unit=example", "privacy.noise-multiplier=2.0", "privacy.clip=0.5", "privacy.examples=160", "federation.weighting=equal", "privacy.noise=seeded")
CLIENT = ("privacy.unit=client", "privacy.noise-multiplier=3.0", "privacy.clip=0.5", "federation.weighting=equal", "privacy.noise=seeded")

SECURE = ("privacy.secure-aggregation=true", "federation.cohort=4")
LISA = ("units.strategy=lisa", "units.budget=1")


def events(run):
    return [(e.round, read(e.facts)) for e in Ledger(run.ledger).events()]


@pytest.mark.parametrize("changes", [
    EXAMPLE, (*EXAMPLE, "privacy.metrics-noise=4.0", "privacy.participations=2"), CLIENT, (*CLIENT, "privacy.adaptive-clip=true", "privacy.metrics-noise=4.0"),
    (*CLIENT, "federation.sampling=poisson", "privacy.amplification=true", "federation.cohort=2"),
    (*EXAMPLE, *LISA, "privacy.metrics-noise=4.0"), (*CLIENT, *LISA), (*CLIENT, *SECURE, *LISA)],
    ids=["example", "example, all", "client", "client, all", "client, poisson", "example, units", "client, units", "client, secure, units"])
def test_engines_agree(changes, tiny_job, run_rounds, tmp_path):
    serial, fast = (run_rounds(tiny_job(f"simulation.engine={engine}", *changes), tmp_path / engine).run for engine in ("serial", "vectorised"))
    assert events(serial) == events(fast)
    one, two = serial.newest().state, fast.newest().state
    for name, array in one.arrays.items():
        np.testing.assert_allclose(two.arrays[name], array, atol=1e-4, rtol=0)
    for mine, other in zip(serial.metrics(), fast.metrics(), strict=True):
        assert mine["clients"] == other["clients"] and mine["refused"] == other["refused"] and mine["total_bytes"] == other["total_bytes"]
        if mine["train_loss"] is not None:
            assert mine["train_loss"] == pytest.approx(other["train_loss"], rel=1e-3)


@pytest.mark.parametrize("secure", [(), SECURE], ids=["plain", "secure"])
def test_noise_for_clients_is_on_the_units_that_are_trained(secure, tiny_job, run_rounds, tmp_path):
    run = run_rounds(tiny_job(*CLIENT, *secure, "units.strategy=top", "units.budget=1", "federation.lr=1e-9"), tmp_path / "run").run
    first, last = run.first_arrays(), run.newest().state.arrays
    for name, array in first.items():
        assert (array != last[name]).all() if "layer.0." not in name else np.array_equal(array, last[name])
    assert [r.parts for _, r in events(run)] == [{"update": 3.0}] * 3


def test_nothing_without_noise_is_sent(tiny_job, run_rounds, tmp_path):
    """No training metrics, and a weight that is the same whatever a client holds; every release is in the ledger first."""
    for unit in (EXAMPLE, CLIENT):
        run = run_rounds(tiny_job(*unit, "privacy.noise=system"), tmp_path / unit[0]).run
        lines = run.metrics()
        assert all(line["train_loss"] is None and line["train_accuracy"] is None for line in lines)
        assert [round for round, _ in events(run)] == [1, 2, 3] and all(r.protected and r.unit in unit[0] for _, r in events(run))


def test_a_private_run_needs_its_noise(tiny_job, run_rounds, tmp_path):
    """An epsilon that nobody made into noise trains nothing."""
    for unit in (EXAMPLE, CLIENT):
        with pytest.raises(PrivacyRefused, match="was not computed"):
            run_rounds(tiny_job(*unit[:1], *unit[2:], "privacy.epsilon=9.0", "privacy.i-understand=true"), tmp_path / unit[0])
