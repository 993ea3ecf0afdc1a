"""Secure sums on real devices: the simulation's model, drop-outs up to the threshold (one of them killed)
and beyond it, and nothing of one device with the coordinator.
"""

import csv
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from live_federation import DOMAINS, until

from fedtune.job import parse_job
from fedtune.runs.checkpoint import load_checkpoint
from fedtune.runs.folder import open_run

pytestmark = pytest.mark.slow
NAMES = (*DOMAINS, "songs")
ROUNDS, SECONDS = 3, 10.0
SECURE = (
    "privacy.secure-aggregation=true",
    "privacy.clip=4.0",
    "privacy.noise=seeded",
    "federation.weighting=equal",
    "federation.cohort=4",
    f"federation.rounds={ROUNDS}",
    f"federation.deadline={SECONDS}",
    "federation.min-replies=4",
)


@pytest.fixture(scope="module")
def four_files(tiny_csv, tmp_path_factory):
    """The rows of `tiny_csv` by domain, a tenth of them moved to a fourth one,
    in one file and in one for each.
    """
    folder = tmp_path_factory.mktemp("four")
    rows = list(csv.DictReader(tiny_csv.read_text(encoding="utf-8").splitlines()))
    rows = [row | {"domain": "songs" if place % 4 == 3 else row["domain"]} for place, row in enumerate(rows)]
    for name in ("all", *NAMES):
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            out = csv.DictWriter(file, rows[0].keys())
            out.writeheader()
            out.writerows(row for row in rows if name in ("all", row["domain"]))
    return folder


def checkpoint(live, round):
    return list(live.home.glob(f"runs/001-*/checkpoints/round-{round:05d}.safetensors"))


def test_a_federation_that_learns_only_sums(
    federation, four_files, live_settings, make_bundle, run_rounds, tmp_path
):
    settings = (*SECURE, f"data.source={four_files / 'all.csv'}")
    live, seen = federation(NAMES), tmp_path / "vectors"
    server = live.server(make_bundle(*settings))
    server.wait_for("listening")
    silent = {"books": "", "films": "", "meals": "2", "songs": "2"}  # round 2: two of four are missing
    # round 3: one of four, with SIGKILL when all hold shares of its seed and its vector is asked for
    killed = {"songs": "3"}
    devices = {}
    for name in NAMES:
        (seen / name).mkdir(parents=True)
        where = (
            "--server",
            f"{live.host}:{live.port}",
            "--dir",
            str(live.keys / "devices" / name),
            "--data",
            str(four_files / f"{name}.csv"),
        )
        devices[name] = live.start(
            "leaving_device",
            silent[name],
            killed.get(name, "0"),
            str(SECONDS + 0.5),
            str(seen / name),
            "client",
            *where,
            name=name,
            prefix=(
                "env",
                f"PYTHONPATH={Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            ),
        )
    models = {}
    for round in (1, 2, 3):
        until(
            lambda round=round: bool(checkpoint(live, round)) or not server.running,
            f"round {round}",
            lambda: server.text,
        )
        models[round] = load_checkpoint(*checkpoint(live, round)).state.arrays
    assert server.wait() == 0, server.text + "".join(d.text for d in devices.values())

    run = open_run(live.run())
    lines = {line["round"]: line for line in run.metrics()}
    assert [sorted(lines[r]["clients"]) for r in range(1, 4)] == [
        sorted(NAMES),
        [],
        sorted(set(NAMES) - {"songs"}),
    ]
    assert lines[3]["refused"].keys() == {"songs"} and lines[3]["refused"]["songs"].startswith(
        ("no reply", "failed: ")
    )
    assert devices["songs"].wait() == -signal.SIGKILL
    assert all(
        "2 clients sent a vector, 3 are needed: the round is void and nothing is released"
        in lines[2]["refused"][n]
        for n in NAMES
    )
    assert all(line["accuracy"] is None for line in lines.values())
    assert lines[1]["train_loss"] > 0 and lines[2]["train_loss"] is None
    assert all(np.array_equal(models[1][n], models[2][n]) for n in models[2])
    assert any(not np.array_equal(models[2][n], models[3][n]) for n in models[2])

    simulated = run_rounds(
        parse_job("", [*live_settings, *settings, "simulation.engine=serial", "federation.rounds=1"]),
        tmp_path / "simulated",
    ).run
    for name, array in simulated.newest().state.arrays.items():
        np.testing.assert_allclose(models[1][name], array, atol=1e-5, rtol=0)
    first = simulated.metrics()[1]
    assert lines[1]["train_loss"] == pytest.approx(first["train_loss"], abs=1e-3)
    assert (lines[1]["up"], lines[1]["down"]) == (first["up"], first["down"])

    kept = b"".join(path.read_bytes() for path in live.home.rglob("*") if path.is_file())
    plain = [(seen / name / str(r)).read_bytes() for name in NAMES for r in range(1, 4)]
    assert len(plain) == 12 and all(v[:64] not in kept and v[1000:1064] not in kept for v in plain)
    assert json.loads(run.summary.read_text())["complete"]
    for device in devices.values():
        if device.running:
            device.process.terminate()
    for name, device in devices.items():
        assert (live.keys / "devices" / name / "secagg").is_dir()
        assert (
            device.wait() == (-signal.SIGKILL if name in killed else 130) and "Traceback" not in device.text
        ), device.text
