"""What breaks while a federation runs: the coordinator, devices, the network, the disk.

Real processes; nothing is simulated but the fault.

One service stands for the whole module, with three devices, each in a network of its own, and a small disk
for its runs; each test gives it another job.
"""

import contextlib
import csv
import json
import os
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from live_federation import DOMAINS, Federation, Process, free_port, until

from fedtune.job import parse_job
from fedtune.runs.folder import open_run
from fedtune.runs.ledger import Ledger

pytestmark = pytest.mark.slow


class Standing(Federation):
    """A service that stays, and its devices.

    Without the right to make networks and mounts (no root), those are the machine's own.
    """

    def __init__(self, root: Path, data: dict[str, Path]) -> None:
        subnet = f"10.{64 + os.getpid() % 128}"  # another for each test session
        self.networks = {
            name: (f"ft{os.getpid() % 10000}x{place}", f"{subnet}.{place}.1", f"{subnet}.{place}.2")
            for place, name in enumerate(DOMAINS)
        }
        self.data, self.jobs = data, 0
        self.own_networks = all(self._network(*network) for network in self.networks.values())
        hubs = [hub for _, hub, _ in self.networks.values()] if self.own_networks else ["127.0.0.1"]
        super().__init__(root, hosts=hubs)
        self.runs = self.home / "runs"
        self.runs.mkdir()
        self.own_disk = _may("mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(self.runs))
        self.devices: dict[str, Process] = {}
        self.scrape = free_port()
        self.begin()
        for name in DOMAINS:
            self.join(name)

    def begin(self) -> None:
        """Starts the service, again."""
        (self.root / "server.log").unlink(missing_ok=True)
        self.service_process = self.server(
            "--stay",
            "--log-json",
            "--metrics",
            f"127.0.0.1:{self.scrape}",
            address="0.0.0.0" if self.own_networks else "",
        )
        self.service_process.wait_for("listening on")

    def join(self, name: str) -> None:
        """Starts a device, again."""
        net, hub, _ = self.networks[name]
        more = {"address": hub, "prefix": ("ip", "netns", "exec", net)} if self.own_networks else {}
        self.devices[name] = self.client(name, self.data[name], **more)

    def give(self, bundle: Path) -> int:
        """Queues a job; its number."""
        queued = self.start("fedtune.cli.main", "server", str(bundle), "--dir", str(self.home), name="queue")
        assert queued.wait() == 0, queued.text
        self.jobs += 1
        return self.jobs

    def last(self, number: int) -> dict:
        return (self.metrics(number) or [{"round": -1, "clients": [], "refused": {}, "late": 0}])[-1]

    def finish(self, number: int) -> None:
        until(
            lambda: (self.run_folder(number) / "summary.json").exists() or not self.service_process.running,
            f"end of job {number}",
            self.said,
        )
        assert self.service_process.running, self.said()

    def run_folder(self, number: int) -> Path:
        return next(iter(self.runs.glob(f"{number:03d}-*")), self.runs / "none")

    def said(self) -> str:
        return self.service_process.text + "".join(
            f"--- {name}\n{device.text}" for name, device in self.devices.items()
        )

    def trainer(self, name: str) -> psutil.Process:
        """The process of a device that trains."""
        found: list[psutil.Process] = []

        def look() -> bool:
            with contextlib.suppress(psutil.NoSuchProcess):
                below = psutil.Process(self.devices[name].process.pid).children(recursive=True)
                found[:] = [p for p in below if "fedtune.training.service" in " ".join(p.cmdline())]
            return bool(found)

        until(look, f"trainer of {name}", self.said)
        return found[0]

    def cut(self, name: str, state: str) -> None:
        _may("ip", "link", "set", f"v{self.networks[name][0]}", state)

    def close(self) -> None:
        super().close()
        _may("umount", "-l", str(self.runs))
        for net, *_ in self.networks.values():
            _may("ip", "netns", "del", net)

    @staticmethod
    def _network(name: str, hub: str, own: str) -> bool:
        return all(
            _may("ip", *command.split())
            for command in (
                f"netns add {name}",
                f"link add v{name} type veth peer name eth0 netns {name}",
                f"addr add {hub}/24 dev v{name}",
                f"link set v{name} up",
                f"-n {name} addr add {own}/24 dev eth0",
                f"-n {name} link set eth0 up",
                f"-n {name} link set lo up",
            )
        )


def _may(*command: str) -> bool:
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True).returncode == 0
    return False


@pytest.fixture(scope="module")
def standing(tmp_path_factory, domain_csv) -> Iterator[Standing]:
    federation = Standing(tmp_path_factory.mktemp("standing"), domain_csv)
    yield federation
    federation.close()


def same_model(run, other) -> None:
    ours, theirs = run.newest().state, other.newest().state
    assert ours.round == theirs.round
    for name, array in theirs.arrays.items():
        np.testing.assert_allclose(ours.arrays[name], array, atol=1e-6, rtol=0)


def test_a_coordinator_killed_in_a_round_continues(
    standing, live_settings, make_bundle, run_rounds, tmp_path
):
    number = standing.give(make_bundle("federation.rounds=4"))
    until(lambda: standing.last(number)["round"] >= 2, "round 2", standing.said)
    trainer = standing.trainer("films")
    trainer.suspend()  # so that a round is under way
    until(
        lambda: (
            standing.service()["state"] == "training"
            and standing.service()["round"] == standing.last(number)["round"] < 4
        ),
        "round under way",
        standing.said,
    )
    standing.service_process.kill()
    begun = standing.last(number)["round"]
    trainer.resume()

    standing.begin()
    standing.finish(number)
    assert begun >= 2 and f"round {begun}/4" not in standing.service_process.text  # it went on from there
    run = open_run(standing.run(number))
    simulated = run_rounds(
        parse_job("", ["simulation.engine=serial", *live_settings, "federation.rounds=4"]),
        tmp_path / "simulated",
    ).run
    same_model(run, simulated)
    assert [(e.round, e.facts, e.chain) for e in Ledger(run.ledger).events()] == [
        (e.round, e.facts, e.chain) for e in Ledger(simulated.ledger).events()
    ]
    assert [line["round"] for line in run.metrics()] == [0, 1, 2, 3, 4] and run.metrics()[-1][
        "up"
    ] == simulated.metrics()[-1]["up"]
    again = standing.start(
        "fedtune.cli.main", "server", str(run.bundle), "--dir", str(standing.home), name="again"
    )
    assert again.wait() == 0 and "was run already" in again.text


def test_devices_that_die_or_hang_cost_their_round_and_come_back(standing, make_bundle, domain_csv):
    number = standing.give(
        make_bundle(
            "federation.rounds=12",
            "federation.deadline=10.0",
            "evaluation.every=12",
            "federation.min-replies=2",
            "federation.seed=1",
        )
    )
    until(lambda: len(standing.last(number)["clients"]) == 3, "a round of three", standing.said)

    # the round ends at its deadline without it, and its late reply is counted and nothing else
    hanging = standing.trainer("books")
    hanging.suspend()
    until(
        lambda: "books" in standing.last(number)["refused"],
        "round without the device that hangs",
        standing.said,
    )
    line = standing.last(number)
    assert (
        sorted(line["clients"]) == ["films", "meals"]
        and line["refused"]["books"] == "no reply"
        and line["late"] == 0
    )
    hanging.resume()

    standing.devices["meals"].kill()
    until(
        lambda: "meals" in standing.last(number)["refused"],
        "round without the device that was killed",
        standing.said,
    )
    assert "films" in standing.last(number)["clients"]
    standing.join("meals")
    standing.finish(number)
    lines = standing.metrics(number)
    assert all("films" in line["clients"] for line in lines[1:]) and lines[-1]["round"] == 12
    assert "books" in lines[-1]["clients"] and lines[-1]["late"] >= 1
    number = standing.give(make_bundle("federation.rounds=1", "federation.seed=2"))  # needs all three
    standing.finish(number)
    assert sorted(standing.last(number)["clients"]) == sorted(DOMAINS)


def test_a_frame_from_gradients_is_made_with_the_devices(
    standing, live_settings, make_bundle, run_rounds, tmp_path
):
    changes = (
        "adapter.init=gradient",
        "adapter.init-clients=3",
        "adapter.init-step=0.1",
        "federation.rounds=2",
        "federation.seed=6",
    )
    number = standing.give(make_bundle(*changes))
    standing.finish(number)
    run = open_run(standing.run(number))
    simulated = run_rounds(
        parse_job("", ["simulation.engine=serial", *live_settings, *changes]), tmp_path / "simulated"
    ).run
    same_model(run, simulated)
    assert (
        run.newest().counters["up"] == simulated.newest().counters["up"]
        and run.newest().counters["down"] == simulated.newest().counters["down"]
    )
    assert [(e.round, e.facts, e.chain) for e in Ledger(run.ledger).events()] == [
        (e.round, e.facts, e.chain) for e in Ledger(simulated.ledger).events()
    ]


def test_a_third_of_the_devices_lose_their_network_each_round(standing, make_bundle):
    if not standing.own_networks:
        pytest.skip("networks of one's own take the right to make them")
    number = standing.give(
        make_bundle(
            "federation.rounds=3",
            "federation.deadline=8.0",
            "federation.min-replies=2",
            "evaluation.every=3",
            "federation.seed=3",
        )
    )
    until(lambda: standing.last(number)["round"] >= 0, "the start", standing.said)
    while (done := standing.last(number)["round"]) < 3:
        cut = DOMAINS[done % len(DOMAINS)]
        standing.cut(cut, "down")
        until(lambda done=done: standing.last(number)["round"] > done, f"round {done + 1}", standing.said)
        standing.cut(cut, "up")
    standing.finish(number)
    lines = standing.metrics(number)
    assert [line["round"] for line in lines] == list(range(4))
    assert any(line["refused"] for line in lines) and {
        name for line in lines for name in line["clients"]
    } == set(DOMAINS)


def test_a_full_disk_stops_clearly_and_the_run_continues_when_there_is_room(standing, make_bundle):
    if not standing.own_disk:
        pytest.skip("a small disk takes the right to mount one")
    number = standing.give(make_bundle("federation.rounds=5", "evaluation.every=5", "federation.seed=4"))
    until(lambda: standing.last(number)["round"] >= 1, "round 1", standing.said)
    filler = standing.runs / "filler"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(4096))
    assert standing.service_process.wait() == 3, standing.said()
    said = standing.service_process.text
    assert "cannot write" in said and "free space" in said and "Traceback" not in said
    assert open_run(standing.run(number)).newest().state.round >= 1
    filler.unlink()
    standing.begin()
    standing.finish(number)
    assert [line["round"] for line in standing.metrics(number)] == [0, 1, 2, 3, 4, 5]


def test_what_can_be_seen_and_what_cannot(standing, domain_csv):
    """After the tests above: status, metrics and logs say what happened,
    and nothing of the data or the keys.
    """
    done = standing.jobs
    asked = standing.start("fedtune.cli.main", "status", "--dir", str(standing.home), "--json", name="status")
    assert asked.wait() == 0, asked.text
    status = json.loads(asked.text)
    assert (
        status["running"] and {d["name"] for d in status["devices"]} <= set(DOMAINS) and status["queue"] == []
    )

    scraped = (
        urllib.request.urlopen(f"http://127.0.0.1:{standing.scrape}/metrics", timeout=10).read().decode()
    )
    values = {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
        for line in scraped.splitlines()
        if not line.startswith("#")
    }
    assert values['fedtune_state{state="idle"}'] == 1 and values["fedtune_queued_jobs"] == 0
    last = standing.metrics(done)
    assert (
        values['fedtune_score{metric="accuracy"}'] == last[-1]["accuracy"]
        and values['fedtune_bytes{direction="up"}'] == last[-1]["up"]
    )
    assert values['fedtune_updates_total{result="accepted"}'] >= 1 and values["fedtune_epsilon"] == float(
        "inf"
    )

    lines = [json.loads(line) for line in standing.service_process.text.splitlines()]
    assert {"listening", "run", "device", "round", "finished"} <= {line["event"] for line in lines}
    assert all({"time", "level", "event", "text"} <= line.keys() for line in lines)
    assert [line["round"] for line in lines if line["event"] == "round"][-1] == last[-1]["round"]

    texts = {
        row["text"] for path in domain_csv.values() for row in csv.DictReader(path.read_text().splitlines())
    }
    secrets = {
        line
        for key in standing.keys.glob("**/*.key")
        for line in key.read_text().splitlines()
        if len(line) > 40
    }
    kept = [p for p in standing.home.rglob("*") if p.is_file() and p.name not in ("server.key",)]
    kept += [
        standing.root / "server.log",
        *(process.log for process in standing.devices.values()),
        *standing.keys.glob("devices/*/**/*.log"),
    ]
    for path in kept:
        held = path.read_bytes().decode(errors="replace")
        assert not [t for t in texts if t in held] and not [s for s in secrets if s in held], path


def test_ctrl_c_ends_everything_and_loses_nothing(standing, make_bundle):
    number = standing.give(make_bundle("federation.rounds=500", "evaluation.every=500", "federation.seed=5"))
    until(lambda: standing.last(number)["round"] >= 2, "round 2", standing.said)
    everything = (standing.service_process, *standing.devices.values())
    family = [
        p for d in standing.devices.values() for p in psutil.Process(d.process.pid).children(recursive=True)
    ]
    for process in everything:
        process.process.send_signal(signal.SIGINT)
    assert [process.wait() for process in everything] == [130] * 4, standing.said()
    until(
        lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family),
        "end of all children",
        seconds=30,
    )
    assert (
        "the same command continues" in standing.service_process.text and "Traceback" not in standing.said()
    )
    assert open_run(standing.run(number)).newest().state.round == standing.last(number)["round"]
    assert json.loads((standing.run(1) / "summary.json").read_text())["complete"]
