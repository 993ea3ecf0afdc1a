"""One job in a simulation and live, on real SuperNodes: the same model, ledger and byte counts."""

import json
import stat

import numpy as np
import pytest

from fedtune.bundles.bundle import open_bundle
from fedtune.job import parse_job
from fedtune.runs.folder import open_run
from fedtune.runs.ledger import Ledger
from fedtune.stateful.methods import method_of
from fedtune.stateful.store import Kept

pytestmark = pytest.mark.slow


def kept_here(live, names, simulated, summary):
    """Each device has what the simulated client of its name keeps, in its own folder,
    for nobody else to read.
    """
    for name in simulated.clients(names, 3):
        (job,) = (live.keys / "devices" / name / "personal").iterdir()
        mine, theirs = Kept(job, simulated.schema, "device").load(name, 3), simulated.load(name, 3)
        assert mine.keys() == theirs.keys() and all(
            np.allclose(mine[n], a, rtol=0, atol=1e-4) for n, a in theirs.items()
        )
        assert (
            all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in job.rglob("*.safetensors"))
            and stat.S_IMODE(job.stat().st_mode) == 0o700
        )
    if "personal" in summary:
        assert (summary["personal"]["clients"], summary["personal"]["of"]) == (3, 3)
        assert summary["personal"]["accuracy"] == pytest.approx(
            summary["rounds"][-1]["personal_accuracy"]
        ) and summary["personal"]["federated"] == pytest.approx(summary["final"]["accuracy"])


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("units.strategy=lisa", "units.budget=1"),
        ("units.strategy=gradient", "units.budget=1", "units.probe-every=2"),
        ("personal.method=ditto",),
        ("personal.method=head",),
        ("personal.method=select", "personal.every=1"),
        ("personal.method=loge",),
        (
            "federation.drift=scaffold",
            "federation.optimizer=sgd",
            "federation.lr=0.1",
            "federation.weighting=equal",
        ),
    ],
    ids=["all", "drawn units", "probed units", "ditto", "own heads", "own entries", "two heads", "controls"],
)
def test_live_equals_simulated(
    changes, federation, domain_csv, live_settings, make_bundle, run_rounds, tmp_path
):
    live = federation()
    bundle = make_bundle(*changes)
    server = live.server(bundle)
    devices = {name: live.client(name, data) for name, data in domain_csv.items()}
    assert server.wait() == 0, server.text

    simulated = run_rounds(parse_job("", [*live_settings, *changes]), tmp_path / "simulated").run
    run = open_run(live.run())
    ours, theirs = run.newest(), simulated.newest()
    assert ours.state.round == theirs.state.round == 3
    start = open_bundle(bundle).start
    for name, array in theirs.state.arrays.items():
        np.testing.assert_allclose(ours.state.arrays[name], array, atol=1e-5, rtol=0)
    assert any(not np.allclose(start[name], array, atol=1e-4) for name, array in theirs.state.arrays.items())
    assert [(e.round, e.facts) for e in Ledger(run.ledger).events()] == [
        (e.round, e.facts) for e in Ledger(simulated.ledger).events()
    ]

    for mine, other in zip(run.metrics(), simulated.metrics(), strict=True):
        # live, they stand in the order they answered
        assert sorted(mine["clients"]) == sorted(other["clients"])
        for key in ("round", "refused", "up", "down", "total_bytes", "evaluated", "late"):
            assert mine[key] == other[key], key
        assert mine.get("units") == other.get("units") and ("units" in mine) == any(
            "units" in change for change in changes
        )
        assert (
            mine.get("scores") == pytest.approx(other["scores"], abs=1e-5)
            if "scores" in other
            else "scores" not in mine
        )
        assert mine.keys() == other.keys() and ("personal_clients" in mine) == any(
            "personal" in change for change in changes
        )
        assert [mine.get(f"personal_{key}") for key in ("clients", "evaluated")] == [
            other.get(f"personal_{key}") for key in ("clients", "evaluated")
        ]
        for key in mine.keys() & {
            "loss",
            "accuracy",
            "train_loss",
            "train_accuracy",
            "personal_loss",
            "personal_accuracy",
        }:
            assert mine[key] == pytest.approx(other[key], abs=1e-5), key
    assert {k: v for k, v in ours.counters.items() if k not in ("evaluation", "offers")} == {
        k: v for k, v in theirs.counters.items() if k not in ("evaluation", "offers")
    }
    assert ours.counters["evaluation"] > theirs.counters["evaluation"] == 0

    summary = json.loads(run.summary.read_text())
    assert summary["complete"] and summary["engine"] == "live"
    assert {c["name"] for c in summary["final"]["clients"]} == set(domain_csv)
    assert (run.path / "tensorboard").is_dir()
    if changes and "units" not in changes[0]:
        kept_here(
            live,
            domain_csv,
            Kept(
                simulated.clients,
                method_of(simulated.job()).keeps(open_bundle(simulated.bundle).manifest.spec.schema),
            ),
            summary,
        )
    for name, device in devices.items():
        assert device.stop() == 130, name
        assert not any(word in device.text for word in ("Traceback", "error:")), device.text
