"""Devices that name their class: the same model and bytes as in a simulation whose
clients are of these classes.
"""

import json

import numpy as np
import pytest

from fedtune.job import parse_job
from fedtune.runs.folder import open_run
from fedtune.simulation.devices import assign

pytestmark = pytest.mark.slow
CLASSES = 'simulation.devices=[{name = "small", rank = 2, units = 1}, {name = "large", share = 2}]'


def test_live_classes_train_their_own_ranks_and_blocks(
    federation, domain_csv, live_settings, make_bundle, run_rounds, tmp_path
):
    changes = (CLASSES, "units.strategy=top", "units.budget=2")
    job = parse_job("", [*live_settings, *changes])
    simulation = run_rounds(job, tmp_path / "simulated")
    names = [
        job.simulation.devices[place].name for place in assign(job.federation.seed, job.simulation.devices, 3)
    ]
    kinds = dict(zip(simulation.setup.split.clients, names))
    assert set(names) == {"small", "large"} and kinds.keys() == domain_csv.keys()

    live = federation()
    server = live.server(make_bundle(*changes))
    wrong = live.client("books", domain_csv["books"], "--class", "phone")
    wrong.wait_for(
        'class: the job knows no class "phone": those of simulation.devices are "small", '
        '"large"; name one of them, or none'
    )
    assert wrong.stop() == 130
    (live.root / "books.log").unlink()
    devices = [
        live.client(
            name, data, *(() if kinds[name] == "large" and name != "meals" else ("--class", kinds[name]))
        )
        for name, data in domain_csv.items()
    ]
    assert server.wait() == 0, server.text

    run, simulated = open_run(live.run()), simulation.run
    ours, theirs = run.newest(), simulated.newest()
    for name, array in theirs.state.arrays.items():
        np.testing.assert_allclose(ours.state.arrays[name], array, atol=1e-5, rtol=0)
    for mine, other in zip(run.metrics(), simulated.metrics(), strict=True):
        assert [mine[key] for key in ("up", "down", "ranks", "units", "refused")] == [
            other[key] for key in ("up", "down", "ranks", "units", "refused")
        ]
    assert mine["ranks"] == {"2": names.count("small"), "4": names.count("large")}
    assert json.loads(run.summary.read_text())["ranks"][0]["updates"] == 3 * names.count("small")
    for device in devices:
        assert device.stop() == 130 and "Traceback" not in device.text, device.text
