"""Devices without torch in a real federation: the same model as with it,
and nothing lost when they are killed.
"""

import contextlib
import dataclasses
import os
import signal

import numpy as np
import psutil
import pytest
from live_federation import Federation, Process, until

from fedtune.bundles.bundle import open_bundle
from fedtune.job import parse_job
from fedtune.runs.folder import open_run
from fedtune.runs.ledger import Ledger
from fedtune.training.device import open_device
from fedtune.wire import decode, encode
from fedtune.workflows.prepare import prepare

pytestmark = pytest.mark.slow
DEVICES = ("books", "films")


@pytest.fixture(scope="module")
def edge_folder(live_settings, tmp_path_factory):
    """Training graphs of the live job, whose frame all bundles of these tests share."""
    root = tmp_path_factory.mktemp("edge")
    prepare(parse_job("", live_settings), root / "bundle", root / "graphs")
    return root / "graphs"


@dataclasses.dataclass
class Pair:
    """A federation of two devices, the second one without torch."""

    live: Federation
    graphs: object
    data: dict

    def edge(self, name: str, *arguments: str, log: str = "") -> Process:
        return self.live.start(
            "fedtune.cli.main",
            "edge",
            "train",
            "--server",
            f"{self.live.host}:{self.live.port}",
            "--dir",
            str(self.live.keys / "devices" / name),
            "--graphs",
            str(self.graphs),
            "--data",
            str(self.data[name]),
            "--threads",
            "1",
            *arguments,
            name=log or f"edge-{name}",
        )

    def torch(self, name: str) -> Process:
        return self.live.client(name, self.data[name], "--threads", "1")


@pytest.fixture
def pair(federation, edge_folder, domain_csv):
    return lambda: Pair(federation(DEVICES), edge_folder, domain_csv)


TWO = ("federation.cohort=2", "federation.min-replies=2")


def below(process: Process, what: str) -> list[psutil.Process]:
    """Processes that this one started whose command line holds `what`."""
    found = []
    for p in psutil.Process(process.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # one that ended just now
            found += [p] if what in " ".join(p.cmdline()) else []
    return found


def test_a_mixed_federation_trains_the_model_of_torch_alone(pair, make_bundle):
    bundle, newest = make_bundle(*TWO), []
    for mixed in (False, True):
        made = pair()
        server = made.live.server(bundle)
        devices = [made.torch("books"), made.edge("films") if mixed else made.torch("films")]
        if mixed:
            devices[1].wait_for("ready for job")
            (trainer,) = below(devices[1], "fedtune.edge.service")
            libraries = {m.path for m in trainer.memory_maps()}
            assert any("onnxruntime" in path for path in libraries) and not any(
                "libtorch" in path for path in libraries
            )
        assert server.wait() == 0, server.text
        newest.append(open_run(made.live.run()))
        assert [device.stop() for device in devices] == [130, 130] and not any(
            "Traceback" in device.text for device in devices
        )
    ours, theirs = (run.newest().state for run in reversed(newest))
    assert ours.round == theirs.round == 3
    start = open_bundle(bundle).initial
    for name, array in theirs.arrays.items():
        np.testing.assert_allclose(ours.arrays[name], array, atol=1e-4, rtol=0)
    assert any(not np.allclose(start[name], array, atol=1e-3) for name, array in theirs.arrays.items())
    events = [[(e.round, e.facts) for e in Ledger(run.ledger).events()] for run in newest]
    assert events[0] == events[1]
    for mine, other in zip(newest[1].metrics(), newest[0].metrics(), strict=True):
        assert (mine["up"], mine["down"], sorted(mine["clients"])) == (
            other["up"],
            other["down"],
            sorted(other["clients"]),
        )
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-4)


def test_a_mixed_federation_trains_with_forward_passes_alone(pair, make_bundle, live_settings, tmp_path):
    """Both devices receive the start with the bundle; the model is the mean of what torch makes of it
    for both, round by round.
    """
    forward = ("edge.mode=forward", "edge.directions=64", "federation.optimizer=sgd", "federation.lr=0.05")
    bundle, made = open_bundle(make_bundle(*TWO, *forward)), pair()
    prepare(parse_job("", [*live_settings, *forward]), tmp_path / "bundle", tmp_path / "graphs")
    made.graphs = tmp_path / "graphs"
    server = made.live.server(bundle.folder)
    devices = [made.torch("books"), made.edge("films")]
    assert server.wait() == 0, server.text
    assert [device.stop() for device in devices] == [130, 130] and not any(
        "Traceback" in device.text for device in devices
    )
    for name in DEVICES:
        held = made.live.keys / "devices" / name / "bundles" / bundle.digest
        assert (held / "initial.safetensors").read_bytes() == (
            bundle.folder / "initial.safetensors"
        ).read_bytes()
    here, arrays = [open_device(bundle, made.data[name]) for name in DEVICES], bundle.start
    for round in (1, 2, 3):
        asked = encode("model", bundle.schema, arrays, round=round, frame=bundle.frame_digest)
        updates = [
            decode(device.handle(asked, name), bundle.schema, kinds=["update"])
            for device, name in zip(here, DEVICES)
        ]
        total = sum(u.header.weight for u in updates)
        arrays = {
            "directions": sum(
                u.header.weight / total * u.arrays["directions"].astype(np.float64) for u in updates
            ).astype(np.float32)
        }
    run = open_run(made.live.run())
    np.testing.assert_allclose(
        run.newest().state.arrays["directions"], arrays["directions"], rtol=0, atol=1e-4
    )
    assert np.count_nonzero(arrays["directions"]) > 5 and np.abs(arrays["directions"]).max() > 1e-3


def test_killed_in_a_step_it_joins_again_and_nothing_is_lost(pair, make_bundle):
    """First the trainer alone, which its client starts again for the same round;
    then the whole device, as in a power cut.
    """
    made = pair()
    bundle = make_bundle(
        *TWO,
        "federation.rounds=6",
        "federation.local-epochs=40",
        "federation.min-replies=1",
        "federation.deadline=30",
        "federation.lr=1e-4",
    )
    server = made.live.server(bundle)
    edge = made.edge("films", "--memory-mb", "400")
    torch = made.torch("books")
    edge.wait_for("training")
    (trainer,) = below(edge, "fedtune.edge.service")
    os.kill(trainer.pid, signal.SIGKILL)
    until(
        lambda: [p for p in below(edge, "fedtune.edge.service") if p.pid != trainer.pid] != [],
        "another trainer",
        lambda: edge.text,
    )
    until(lambda: (made.live.metrics() or [{"round": -1}])[-1]["round"] >= 1, "round 1", lambda: server.text)
    assert "films" in made.live.metrics()[1]["clients"], server.text + edge.text
    edge.wait_for("training", times=2)
    edge.kill()
    again = made.edge("films", log="edge-again")
    assert server.wait() == 0, server.text
    lines = made.live.metrics()
    assert [line["round"] for line in lines] == list(range(7)) and sorted(lines[-1]["clients"]) == sorted(
        DEVICES
    ), server.text + again.text
    assert [device.stop() for device in (again, torch)] == [
        130,
        130,
    ] and "Traceback" not in edge.text + again.text


def test_killed_while_a_bundle_is_received_it_receives_it_again(pair, make_bundle, tmp_path):
    """Half a bundle, as a power cut leaves it: what was written is whole, what names it is missing, and a
    part of a file lies beside.
    """
    made, bundle = pair(), make_bundle(*TWO)
    folder = made.live.keys / "devices" / "films" / "bundles" / open_bundle(bundle).digest
    folder.mkdir(parents=True)
    (folder / "frame.safetensors").write_bytes((bundle / "frame.safetensors").read_bytes()[:100])
    (folder / ".job.toml.x.part").write_bytes(b"half")
    server, torch = made.live.server(bundle), made.torch("books")
    edge = made.edge("films")
    edge.wait_for("received job")
    edge.kill()
    again = made.edge("films", log="edge-again")
    assert server.wait() == 0, server.text
    assert open_run(made.live.run()).newest().state.round == 3
    assert [device.stop() for device in (again, torch)] == [130, 130]


def test_graphs_of_another_job_end_the_device_with_one_line(pair, make_bundle):
    made = pair()
    made.live.server(make_bundle(*TWO, "adapter.rank=2"))
    edge = made.edge("films")
    assert edge.wait() == 2
    said = [line for line in edge.text.splitlines() if line.startswith("fedtune: ")]
    assert (
        len(said) == 1
        and "made for the frame" in said[0]
        and "fedtune prepare --edge" in said[0]
        and "Traceback" not in edge.text
    )
