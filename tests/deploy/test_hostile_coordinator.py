"""A coordinator that means harm, against a real device: only the code that is installed there runs, and
the owner's policy holds.
"""

import hashlib
import io
import json
import os
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.fab import Fab
from live_federation import Federation, free_port, until

from fedtune.bundles.bundle import open_bundle
from fedtune.server import superlink as server
from fedtune.wire import RECORD, decode, encode

pytestmark = pytest.mark.slow
MARK = "this came with the coordinator's app"
END = 10.0  # seconds in which all processes of a device are gone when its first is killed
POLICIES = {
    "base": ('allowed-bases = ["' + "0" * 64 + '"]', "policy: allowed-bases: "),
    "task": ('allowed-tasks = ["image-classification"]', "policy: allowed-tasks: "),
    "noise": ("min-noise-multiplier = 0.5", "policy: min-noise-multiplier: the job adds 0, "),
    "epsilon": ("max-epsilon = 8.0", "policy: max-epsilon: the job's epsilon is inf, "),
}


def hostile_app(marks: Path) -> Fab:
    """An app bundle whose every module leaves a file in `marks` when it is imported."""
    touch = f"# {MARK}\nimport pathlib\npathlib.Path({str(marks)!r}, __name__).touch()\n"
    files = {
        "pyproject.toml": (
            '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
            '[project]\nname = "coordinator"\nversion = "1.0.0"\ndescription = ""\n'
            'license = "Apache-2.0"\ndependencies = ["flwr"]\n'
            '[tool.flwr.app]\npublisher = "fedtune"\n'
            '[tool.flwr.app.components]\nserverapp = "evil:server"\nclientapp = "evil:app"\n'
            "[tool.flwr.app.config]\n"
        ),
        "evil.py": touch
        + (
            "from flwr.clientapp import ClientApp\nfrom flwr.serverapp import ServerApp\n"
            "app, server = ClientApp(), ServerApp()\n"
        ),
        "sitecustomize.py": touch,
        "fedtune/__init__.py": touch,
        "fedtune/client/__init__.py": touch,
        "fedtune/client/app.py": touch,
        "fedtune/wire.py": touch,
    }
    files[".info/CONTENT"] = "\n".join(
        f"{name},{hashlib.sha256(text.encode()).hexdigest()},{len(text) * 8}" for name, text in files.items()
    )
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as z:
        for name, text in files.items():
            z.writestr(name, text)
    return Fab(hashlib.sha256(packed.getvalue()).hexdigest(), packed.getvalue(), {})


class Hostile:
    """A SuperLink with such an app, without keys, and what it says to the one device that comes."""

    def __init__(self, link: server.SuperLink, grid: server.LinkGrid, port: int) -> None:
        self.link, self.grid, self.port = link, grid, port

    def tell(self, kind: str, records: RecordDict, seconds: float = 60.0) -> Message:
        """The device's answer to a message."""
        until(lambda: bool(self.link.online()), "device")
        (node,) = self.link.online()
        (number,) = self.grid.push_messages([Message(records, node, kind, ttl=seconds, group_id="1")])
        found: list[Message] = []

        def look() -> bool:
            found.extend(self.grid.pull_messages([number]))
            return bool(found)

        until(look, f"answer to {kind}", seconds=seconds)
        return found[0]

    def ask(self, kind: str, seconds: float = 60.0, **values: object) -> dict:
        return dict(self.tell(kind, RecordDict({RECORD: ConfigRecord(values)}), seconds).content[RECORD])  # type: ignore[arg-type]


@pytest.fixture
def hostile(tmp_path, monkeypatch) -> Iterator[Hostile]:
    marks = tmp_path / "marks"
    marks.mkdir()
    monkeypatch.setattr(server, "_empty_app", lambda: hostile_app(marks))
    port = free_port()
    with (
        server.superlink("127.0.0.1", port, tmp_path / "superlink.sqlite", None, 2**27) as link,
        link.run() as grid,
    ):
        yield Hostile(link, grid, port)


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_only_installed_code_runs_on_a_device(hostile, federation, make_bundle, domain_csv, tmp_path):
    folder, marks = tmp_path / "device", tmp_path / "marks"
    live: Federation = federation([])
    device = live.start(
        "fedtune.cli.main",
        "client",
        "--server",
        f"127.0.0.1:{hostile.port}",
        "--insecure",
        "--dir",
        str(folder),
        "--data",
        str(domain_csv["books"]),
        "--name",
        "books",
        name="books",
    )
    bundle = open_bundle(make_bundle())
    files = {f"file:{name}": data for name, data in bundle.shipped().items()}

    # a job that was never offered, paths for names, records of other kinds
    for kind in ("train", "evaluate"):
        for values in (
            {"job": "0" * 64, "packet": b"x", "client": "a"},
            {"job": "../../../etc", "packet": b"x", "client": "a"},
            {"packet": 1, "client": b"x"},
            {},
        ):
            assert hostile.ask(kind, **values).keys() == {"refused"}, (kind, values)
        assert hostile.tell(kind, RecordDict()).content[RECORD].keys() == {"refused"}
    assert hostile.tell("train.evil", RecordDict()).has_error()
    assert hostile.ask("query", job="../../device.key", **files)["refused"].startswith("job: is not named by")

    for what, (job, parts, reason) in wrong_bundles(bundle.shipped(), marks).items():
        answer = hostile.ask("query", job=job, **{f"file:{name}": data for name, data in parts.items()})
        assert answer["state"] == "refused" and answer["reason"].startswith(reason), (what, answer)
        assert not (folder / "bundles").exists(), what
        assert answer["reason"] in device.text, what

    assert hostile.ask("query", job=bundle.digest)["state"] == "need"
    extra = {"file:../../evil.py": b"x", "file:evil.py": b"x", "file:initial.safetensors": b"x"}
    # what a bundle does not hold is not looked at
    answer = hostile.ask("query", seconds=120.0, job=bundle.digest, **files, **extra)
    assert (answer["state"], answer["examples"]) == ("ready", 32), answer
    assert sorted(p.name for p in (folder / "bundles" / bundle.digest).iterdir()) == sorted(bundle.shipped())
    assert hostile.ask("train", job=bundle.digest, packet=b"FTP1", client="../../x")["refused"].startswith(
        "size: "
    )
    model = encode("model", bundle.manifest.spec.schema, bundle.initial, round=1, frame=bundle.frame_digest)
    update = decode(
        hostile.ask("train", job=bundle.digest, packet=model, client="../../x")["packet"],
        bundle.manifest.spec.schema,
        kinds=["update"],
    )
    assert update.header.weight == 32

    assert not list(marks.iterdir())
    assert not [path for path in folder.rglob("*") if path.is_file() and MARK.encode() in path.read_bytes()]
    assert not list((folder / "node" / "flwr").glob("apps/*"))
    assert "Traceback" not in device.text, device.text

    node, trainer = (one(device.process.pid, name) for name in ("supernode_process", "training.service"))
    for light in (psutil.Process(device.process.pid), node):
        assert not {
            part for part in ("libtorch", "/torch/", "/tokenizers/", "/pyarrow/") if part in loaded(light)
        }, light.cmdline()
    assert "libtorch" in loaded(trainer) and "/tokenizers/" in loaded(trainer)

    device.process.kill()  # its first process alone: the others notice
    device.process.wait()
    until(
        lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in (node, trainer)),
        "end of the other processes",
        seconds=END,
    )


def test_the_control_flower_alone_does_run_the_app(hostile, federation, tmp_path):
    """So that the test above would see it."""
    live: Federation = federation([])
    live.start(
        "fedtune.client.supernode_process",
        str(os.getpid()),
        "--insecure",
        "--superlink",
        f"127.0.0.1:{hostile.port}",
        "--port",
        str(free_port()),
        name="stock",
        prefix=(
            "env",
            f"FLWR_HOME={tmp_path / 'flwr'}",
            f"PATH={Path(sys.executable).parent}:{os.environ['PATH']}",
        ),
    )
    hostile.tell("train", RecordDict({RECORD: ConfigRecord({"packet": b"x"})}))
    assert (tmp_path / "marks" / "evil").exists()
    assert list((tmp_path / "flwr" / "apps").iterdir())


def wrong_bundles(shipped: dict[str, bytes], marks: Path) -> dict[str, tuple[str, dict[str, bytes], str]]:
    """(name, files, reason) of bundles that are none."""

    def named(files: dict[str, bytes]) -> str:
        return hashlib.sha256(files.get("manifest.json", b"")).hexdigest()

    def manifest(change: Callable[[dict], object]) -> bytes:
        facts = json.loads(shipped["manifest.json"])
        change(facts)
        return json.dumps(facts).encode()

    changed = {
        "manifest of another job": shipped
        | {"manifest.json": manifest(lambda m: m.update(job_sha256="0" * 64))},
        "another format": shipped | {"manifest.json": manifest(lambda m: m.update(format="2"))},
        "a manifest that is none": shipped | {"manifest.json": b"[]"},
        "a frame that is a pickle": shipped | {"frame.safetensors": pickle.dumps(Evil(marks / "pickle"))},
        "another frame": {name: data for name, data in shipped.items() if name != "frame.safetensors"},
        "a job that is none": shipped | {"job.toml": b"[federation]\nrun-this = true\n"},
        "a job that is no text": shipped | {"job.toml": b"\xff\xfe"},
        "no manifest": {"job.toml": shipped["job.toml"]},
        "no job": {"manifest.json": shipped["manifest.json"]},
    }
    found = {what: (named(files), files, "bundle: ") for what, files in changed.items()}
    return found | {
        "another name": ("0" * 64, shipped, "bundle: its manifest is not the one called 000000000000")
    }


def one(parent: int, name: str) -> psutil.Process:
    (found,) = [
        p
        for p in psutil.Process(parent).children(recursive=True)
        if any(name in part for part in p.cmdline())
    ]
    return found


def loaded(process: psutil.Process) -> str:
    """Every file that a process has mapped, libraries among them."""
    return Path(f"/proc/{process.pid}/maps").read_text()


def test_policies_are_kept_and_the_coordinator_sees_why(federation, make_bundle, domain_csv):
    live: Federation = federation(list(POLICIES))
    coordinator = live.server(make_bundle())
    devices = {}
    for name, (text, _) in POLICIES.items():
        (live.keys / "devices" / name / "policy.toml").write_text(text + "\n")
        devices[name] = live.client(name, domain_csv["books"])
    for name, (_, reason) in POLICIES.items():
        coordinator.wait_for(f"device {name} refused: {reason}")
        assert reason in devices[name].text
    asked = live.start("fedtune.cli.main", "status", "--dir", str(live.home), "--json", name="status")
    assert asked.wait() == 0
    status = json.loads(asked.text)
    assert {d["name"]: d["state"] for d in status["devices"]} == dict.fromkeys(POLICIES, "refused")
    assert all(d["reason"].startswith(POLICIES[d["name"]][1]) for d in status["devices"])
    family = [p for d in devices.values() for p in psutil.Process(d.process.pid).children(recursive=True)]
    assert len(family) == len(POLICIES)  # no trainer was started
    for device in devices.values():
        device.process.terminate()
    assert [device.wait() for device in devices.values()] == [130] * len(POLICIES)
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family)
    assert coordinator.stop() == 130
