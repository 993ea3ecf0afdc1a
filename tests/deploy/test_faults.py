"""What breaks while a federation runs: the coordinator, devices, the network, the disk. Real processes; nothing is simulated but the fault."""

import json
import os
import signal
import subprocess
import time

import numpy as np
import psutil
import pytest
from conftest import DOMAINS, Federation, Process, until

from fedtune.job import parse_job
from fedtune.ledger import Ledger
from fedtune.run import open_run

pytestmark = pytest.mark.slow


def trainer_of(device: Process) -> psutil.Process:
    """The process of a device that trains."""
    found: list[psutil.Process] = []

    def look() -> bool:
        found[:] = [p for p in psutil.Process(device.process.pid).children(recursive=True) if "fedtune.training.service" in " ".join(p.cmdline())]
        return bool(found)

    until(look, f"trainer of {device.log.name}", lambda: device.text)
    return found[0]


def service(federation: Federation) -> dict:
    return json.loads((federation.home / "service.json").read_text())


def in_round(federation: Federation, number: int) -> bool:
    """Round `number` was sent out and is not finished."""
    now = service(federation)
    return now["state"] == "training" and now["round"] == number - 1


def same_model(run, other) -> None:
    ours, theirs = run.newest().state, other.newest().state
    assert ours.round == theirs.round
    for name, array in theirs.arrays.items():
        np.testing.assert_allclose(ours.arrays[name], array, atol=1e-6, rtol=0)


def test_a_coordinator_killed_in_a_round_continues_and_takes_a_second_job(federation, domain_csv, live_settings, make_bundle, run_rounds, tmp_path):
    live, bundle = federation(), make_bundle("federation.rounds=4")
    server = live.server(bundle)
    devices = {name: live.client(name, data) for name, data in domain_csv.items()}
    server.wait_for("round 2/4")
    trainer = trainer_of(devices["films"])
    trainer.suspend()  # so that a round is under way
    until(lambda: in_round(live, 3) or in_round(live, 4), "round under way", lambda: server.text)
    server.kill()
    begun = open_run(live.run()).newest().state.round
    trainer.resume()

    again = live.server(bundle, name="again")
    again.wait_for("listening on")
    other = live.server(make_bundle("federation.rounds=1", "federation.seed=7"), name="second")
    assert other.wait() == 0 and "queued as 002" in other.text, other.text
    assert again.wait() == 0, again.text
    assert f"round {begun}/4" not in again.text  # it went on from there
    run = open_run(live.run())
    simulated = run_rounds(parse_job("", [*live_settings, "federation.rounds=4"]), tmp_path / "simulated").run
    same_model(run, simulated)
    assert [(e.round, e.facts, e.chain) for e in Ledger(run.ledger).events()] == [(e.round, e.facts, e.chain) for e in Ledger(simulated.ledger).events()]
    assert [line["round"] for line in run.metrics()] == [0, 1, 2, 3, 4] and run.metrics()[-1]["up"] == simulated.metrics()[-1]["up"]
    assert json.loads((live.run(2) / "summary.json").read_text())["complete"]
    third = live.server(bundle, name="third")
    assert third.wait() == 0 and "was run already" in third.text


def test_devices_that_die_or_hang_cost_their_round_and_come_back(federation, domain_csv, make_bundle):
    live = federation()
    server = live.server(make_bundle("federation.rounds=7", "federation.deadline=15.0", "evaluation.every=7", "federation.min-replies=2"))
    devices = {name: live.client(name, data) for name, data in domain_csv.items()}
    for name in domain_csv:
        server.wait_for(f"device {name} ready")

    def last() -> dict:
        return live.metrics()[-1]

    # one hangs: the round ends at its deadline without it, and its late reply is counted and nothing else
    until(lambda: (live.home / "runs").exists() and any(live.home.glob("runs/*/metrics.jsonl")) and len(last()["clients"]) == 3, "a round of three")
    hanging = trainer_of(devices["books"])
    hanging.suspend()
    until(lambda: "books" in last()["refused"], "round without the device that hangs", lambda: server.text)
    assert sorted(last()["clients"]) == ["films", "meals"] and last()["refused"]["books"] == "no reply" and last()["late"] == 0
    hanging.resume()

    # one is killed, with everything below it, and started again
    devices["meals"].kill()
    until(lambda: "meals" in last()["refused"], "round without the device that was killed", lambda: server.text)
    dead = last()["round"]
    assert "films" in last()["clients"]
    devices["meals"] = live.client("meals", domain_csv["meals"])
    until(lambda: (last()["round"] > dead and "meals" in last()["clients"]) or not server.running, "round with the device that came back", lambda: server.text)
    assert server.wait() == 0, server.text
    lines = live.metrics()
    assert any("meals" in line["clients"] for line in lines if line["round"] > dead)
    assert any("books" in line["clients"] for line in lines if line["round"] > 2)
    assert lines[-1]["late"] >= 1
    assert all(sorted(line["clients"]) != [] for line in lines[1:])


def test_a_full_disk_stops_clearly_and_the_run_continues_when_there_is_room(federation, domain_csv, make_bundle):
    live, bundle = federation(), make_bundle("federation.rounds=4", "evaluation.every=4")
    runs = live.home / "runs"
    runs.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(runs)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small disk takes the right to mount one: {mounted.stderr}")
    try:
        server = live.server(bundle)
        for name, data in domain_csv.items():
            live.client(name, data)
        server.wait_for("round 1/4")
        with (runs / "filler").open("wb") as filler, pytest.raises(OSError, match="No space"):
            while True:
                filler.write(bytes(4096))
                filler.flush()
        assert server.wait() == 3, server.text
        assert "cannot write" in server.text and "free space" in server.text and "Traceback" not in server.text
        kept = open_run(live.run()).newest().state.round
        assert kept >= 1
        (runs / "filler").unlink()
        again = live.server(bundle, name="again")
        assert again.wait() == 0, again.text
        assert [line["round"] for line in live.metrics()] == [0, 1, 2, 3, 4]
    finally:
        live.close()
        subprocess.run(["umount", "-l", str(runs)], check=True)


def test_a_third_of_the_devices_lose_their_network_each_round(tmp_path, domain_csv, make_bundle):
    """Each device in a network of its own; one of the three is cut off in each round."""
    networks = {name: (f"ft{os.getpid() % 10000}{place}", f"10.77.{place}.1", f"10.77.{place}.2") for place, name in enumerate(DOMAINS)}
    try:
        for name, hub, own in networks.values():
            _ip("netns", "add", name)
            _ip("link", "add", f"v{name}", "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("addr", "add", f"{hub}/24", "dev", f"v{name}")
            _ip("link", "set", f"v{name}", "up")
            for command in (("addr", "add", f"{own}/24", "dev", "eth0"), ("link", "set", "eth0", "up"), ("link", "set", "lo", "up")):
                _ip("-n", name, *command)
        live = Federation(tmp_path / "net", hosts=[hub for _, hub, _ in networks.values()])
    except (OSError, subprocess.CalledProcessError) as e:
        _remove(networks)
        pytest.skip(f"networks of one's own take the right to make them: {e}")
    try:
        server = live.server(make_bundle("federation.rounds=6", "federation.deadline=12.0", "federation.min-replies=2", "evaluation.every=6"), address="0.0.0.0")
        for name, data in domain_csv.items():
            net, hub, _ = networks[name]
            live.client(name, data, address=hub, prefix=("ip", "netns", "exec", net))
        for name in domain_csv:
            server.wait_for(f"device {name} ready")
        number = 0
        while server.running and number < 6:
            cut = DOMAINS[number % len(DOMAINS)]
            _ip("link", "set", f"v{networks[cut][0]}", "down")
            until(lambda number=number: len(live.metrics()) > number + 1 or not server.running, f"round {number + 1}", lambda: server.text)
            _ip("link", "set", f"v{networks[cut][0]}", "up")
            number = len(live.metrics()) - 1
        assert server.wait() == 0, server.text
        lines = live.metrics()
        assert [line["round"] for line in lines] == list(range(7))
        assert all(len(line["clients"]) >= 2 or line["refused"] for line in lines[1:])
        assert any(line["refused"] for line in lines) and {n for line in lines for n in line["clients"]} == set(DOMAINS)
    finally:
        live.close()
        _remove(networks)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def _remove(networks: dict[str, tuple[str, str, str]]) -> None:
    for name, *_ in networks.values():
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_ctrl_c_ends_everything_at_once_and_loses_nothing(federation, domain_csv, make_bundle):
    live, bundle = federation(), make_bundle("federation.rounds=50", "evaluation.every=50")
    server = live.server(bundle)
    devices = [live.client(name, data) for name, data in domain_csv.items()]
    server.wait_for("round 2/50")
    family = [p for d in devices for p in psutil.Process(d.process.pid).children(recursive=True)]
    began = time.monotonic()
    for process in (server, *devices):
        process.process.send_signal(signal.SIGINT)
    assert [p.wait() for p in (server, *devices)] == [130] * 4
    until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family), "end of all children", seconds=30)
    assert time.monotonic() - began < 60
    assert "the same command continues" in server.text and "Traceback" not in server.text + "".join(d.text for d in devices)
    assert open_run(live.run()).newest().state.round == live.metrics()[-1]["round"]
