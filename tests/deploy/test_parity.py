"""One job in a simulation and live, on real SuperNodes: the same model, ledger and byte counts."""

import json

import numpy as np
import pytest

from fedtune.bundle import open_bundle
from fedtune.job import parse_job
from fedtune.ledger import Ledger
from fedtune.run import open_run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("changes", [
    (), ("units.strategy=lisa", "units.budget=1"), ("units.strategy=gradient", "units.budget=1", "units.probe-every=2")], ids=["all", "drawn units", "probed units"])
def test_live_equals_simulated(changes, federation, domain_csv, live_settings, make_bundle, run_rounds, tmp_path):
    live = federation()
    bundle = make_bundle(*changes)
    server = live.server(bundle)
    devices = {name: live.client(name, data) for name, data in domain_csv.items()}
    assert server.wait() == 0, server.text

    simulated = run_rounds(parse_job("", [*live_settings, *changes]), tmp_path / "simulated").run
    run = open_run(live.run())
    ours, theirs = run.newest(), simulated.newest()
    assert ours.state.round == theirs.state.round == 3
    start = open_bundle(bundle).initial
    for name, array in theirs.state.arrays.items():
        np.testing.assert_allclose(ours.state.arrays[name], array, atol=1e-5, rtol=0)
    assert any(not np.allclose(start[name], array, atol=1e-4) for name, array in theirs.state.arrays.items())
    assert [(e.round, e.facts) for e in Ledger(run.ledger).events()] == [(e.round, e.facts) for e in Ledger(simulated.ledger).events()]

    for mine, other in zip(run.metrics(), simulated.metrics(), strict=True):
        assert sorted(mine["clients"]) == sorted(other["clients"])  # live, they stand in the order they answered
        for key in ("round", "refused", "up", "down", "total_bytes", "evaluated", "late"):
            assert mine[key] == other[key], key
        assert mine.get("units") == other.get("units") and ("units" in mine) == bool(changes)
        assert mine.get("scores") == pytest.approx(other["scores"], abs=1e-5) if "scores" in other else "scores" not in mine
        for key in ("loss", "accuracy", "train_loss", "train_accuracy"):
            assert mine[key] == pytest.approx(other[key], abs=1e-5), key
    assert {k: v for k, v in ours.counters.items() if k not in ("evaluation", "offers")} == {k: v for k, v in theirs.counters.items() if k not in ("evaluation", "offers")}
    assert ours.counters["evaluation"] > theirs.counters["evaluation"] == 0

    summary = json.loads(run.summary.read_text())
    assert summary["complete"] and summary["engine"] == "live"
    assert {c["name"] for c in summary["final"]["clients"]} == set(domain_csv)
    assert (run.path / "tensorboard").is_dir()
    for name, device in devices.items():
        assert device.stop() == 130, name
        assert not any(word in device.text for word in ("Traceback", "error:")), device.text
