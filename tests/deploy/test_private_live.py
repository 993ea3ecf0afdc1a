"""Example-level privacy on real devices: each keeps its own account, which a coordinator that is killed
does not change, and stops at its end.
"""

import json

import numpy as np
import pytest
from live_federation import until

from fedtune.job import load_job, parse_job
from fedtune.privacy.releases import read
from fedtune.report.privacy import UNSCORED
from fedtune.runs.folder import open_run
from fedtune.runs.ledger import Ledger
from fedtune.workflows.export import export_run
from fedtune.workflows.setup import open_setup
from fedtune.workflows.status import lines as lines_of
from fedtune.workflows.status import read as read_status

pytestmark = pytest.mark.slow
PRIVATE = (
    "privacy.unit=example",
    "privacy.noise-multiplier=2.0",
    "privacy.clip=0.5",
    "privacy.examples=160",
    "federation.weighting=equal",
    "privacy.noise=seeded",
    "federation.batch-size=8",
    "federation.local-steps=3",
)


NOISY = ("adapter.init=gradient-dp", "adapter.init-clients=3", "adapter.init-step=0.1")


@pytest.mark.parametrize("first", [(), NOISY], ids=["rounds", "a noisy frame, and rounds"])
def test_a_private_federation_survives_its_coordinator(
    first, federation, domain_csv, live_settings, make_bundle, run_rounds, tmp_path
):
    changes = (*PRIVATE, *first, "federation.rounds=5", "privacy.participations=4")
    live = federation()
    bundle = make_bundle(*changes)
    server = live.server(bundle)
    devices = {name: live.client(name, data) for name, data in domain_csv.items()}
    until(lambda: (live.metrics() or [{"round": -1}])[-1]["round"] >= 1, "round 1", lambda: server.text)
    assert UNSCORED in list(lines_of(read_status(live.home)))
    server.kill()
    server = live.server(bundle, name="again")
    assert server.wait() == 0, server.text

    run = open_run(live.run())
    simulated = run_rounds(
        parse_job("", ["simulation.engine=serial", *live_settings, *changes]), tmp_path / "simulated"
    ).run
    ours, theirs = run.newest().state, simulated.newest().state
    assert ours.round == theirs.round == 5
    for name, array in theirs.arrays.items():
        np.testing.assert_allclose(ours.arrays[name], array, atol=1e-5, rtol=0)
    assert [(e.round, e.facts, e.chain) for e in Ledger(run.ledger).events()] == [
        (e.round, e.facts, e.chain) for e in Ledger(simulated.ledger).events()
    ]

    lines = run.metrics()
    # the fifth round is more than anyone's budget
    assert [len(line["clients"]) for line in lines] == [0, 3, 3, 3, 3, 0]
    assert (
        all("budget of 4 rounds is spent" in why for why in lines[-1]["refused"].values())
        and len(lines[-1]["refused"]) == 3
    )
    # nothing that holds no noise
    assert all(line["accuracy"] is None and line["train_loss"] is None for line in lines)
    summary = json.loads(run.summary.read_text())
    assert UNSCORED in server.text and list(lines_of(read_status(live.home)))[-1].endswith(
        "accuracy not measured" + f"; run folder {run.path}"
    )
    if not first:
        setup = open_setup(load_job(run.path / "job.toml", ["export.onnx=true"]))
        assert export_run(run, setup)["float32"]["accuracy"] > 0  # as that line says
    assert (
        summary["complete"]
        and summary["privacy"]["epsilon"] == "inf"
        and "known seed" in summary["privacy"]["note"]
    )
    for name, device in devices.items():
        (own,) = (live.keys / "devices" / name / "privacy").glob("*.sqlite")
        events = Ledger(own).events()
        # also when it was asked twice for one round
        assert [e.round for e in events] == [*([0] if first else []), 1, 2, 3, 4]
        assert all(read(e.facts).count == (3 if e.round else 1) for e in events)
        assert device.stop() == 130 and "Traceback" not in device.text
