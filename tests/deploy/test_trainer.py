"""The trainer as a process of its own: kept, watched, ended and started again;
with the answers of the same work done here.
"""

import contextlib
import dataclasses
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedtune import errors
from fedtune.bundles.bundle import open_bundle
from fedtune.client import trainer as client_side
from fedtune.client.trainer import Trainer, TrainerSettings
from fedtune.errors import DataError, EnvironmentProblem, JobError, ModelError, Refused, RunError, UserError
from fedtune.process import trainer as service
from fedtune.training.device import open_device
from fedtune.wire import Schema, decode, encode
from fedtune.workflows.setup import data_free_frame, make_bundle, open_setup

OPEN, CALL = 120.0, 60.0  # seconds; generous, as other work may fill the machine


@pytest.fixture(scope="module")
def make(tiny_job, tmp_path_factory):
    """make("section.key=value", ...) -> Bundle of the tiny job."""

    def make(*changes):
        setup = open_setup(tiny_job("data.id=id", *changes))
        model = setup.fresh_model()
        return make_bundle(
            setup, tmp_path_factory.mktemp("bundles") / "bundle", data_free_frame(setup, model), model, {}
        )

    return make


@pytest.fixture(scope="module")
def bundle(make):
    return make()


@pytest.fixture(scope="module")
def long_bundle(make):
    """A bundle whose training takes a minute or so: long enough to do something to the process meanwhile."""
    return make("federation.local-epochs=1000")


@pytest.fixture
def trainer_of(tiny_csv, tmp_path):
    """trainer_of(bundle, field=value, ...) -> Trainer, stopped after the test."""
    with contextlib.ExitStack() as stack:

        def start(bundle, **changes):
            settings = TrainerSettings(
                bundle.folder, tiny_csv, None, 1, 0.0, tmp_path / "trainer.log", tmp_path
            )
            return stack.enter_context(Trainer(dataclasses.replace(settings, **changes)))

        yield start


def packet(bundle, round=1):
    return encode(
        "model", bundle.manifest.spec.schema, bundle.initial, round=round, frame=bundle.frame_digest
    )


def alive(pid):
    """Running, and not only a zombie that nobody waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def eventually(holds, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)


def busy(pid):
    """Whether the process uses about a whole core just now, that is, trains."""
    ticks = lambda: sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))  # noqa: E731
    before = ticks()
    time.sleep(0.5)
    return ticks() - before > 10


def leftovers(folder):
    return list(folder.glob("fedtune-trainer-*"))


def in_thread(call):
    """Runs `call` in a thread; join() returns what it returned or raises what it raised."""
    done = {}

    def run():
        try:
            done["value"] = call()
        except Exception as e:
            done["error"] = e

    thread = threading.Thread(target=run)
    thread.start()

    def join():
        thread.join(CALL + OPEN)
        assert not thread.is_alive()
        if "error" in done:
            raise done["error"]
        return done["value"]

    return join


def test_the_light_side_has_no_torch():
    code = (
        "import sys, fedtune.client.trainer; print(*(m for m in ('torch', 'transformers', 'flwr', "
        "'fedtune.training') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


def test_errors_that_come_back_are_fedtunes_own():
    assert client_side._PLAIN_ERRORS.keys() | {"Refused", "JobError"} <= {
        name for name in vars(errors) if name[0].isupper()
    }


def test_a_trainer_that_cannot_start_says_its_last_line(tmp_path, trainer_of, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    nothing = type("Nothing", (), {"folder": tmp_path})
    trainer = trainer_of(nothing)
    with pytest.raises(
        EnvironmentProblem,
        match=rf"^trainer did not start \(exit code 1\); it wrote nothing to {tmp_path}/trainer\.log$",
    ):
        trainer.open(OPEN)
    assert not trainer.running and trainer.pid is None and not leftovers(tmp_path)


@pytest.mark.slow
def test_loads_once_and_answers_as_the_same_work_done_here(bundle, tiny_csv, tmp_path, trainer_of):
    trainer = trainer_of(bundle)
    assert not trainer.running and trainer.starts == 0
    device = open_device(open_bundle(bundle.folder), tiny_csv)
    assert trainer.open(OPEN) == device.facts()
    pid = trainer.pid
    assert trainer.handle(packet(bundle), "a", CALL) == device.handle(packet(bundle), "a")
    assert trainer.handle(packet(bundle, 2), "b", CALL) == device.handle(packet(bundle, 2), "b")
    assert trainer.evaluate(packet(bundle), CALL) == device.evaluate(packet(bundle))
    assert decode(trainer.evaluate(packet(bundle), CALL), Schema(()), kinds=["scores"]).header.weight == 24
    assert (trainer.pid, trainer.starts) == (pid, 1) and trainer.running
    (private,) = leftovers(tmp_path)
    assert (
        stat.S_IMODE(private.stat().st_mode) == 0o700
        and stat.S_IMODE((private / "config.json").stat().st_mode) == 0o600
    )
    trainer.stop()
    assert not trainer.running and not alive(pid) and not leftovers(tmp_path)
    with pytest.raises(EnvironmentProblem, match=r"^trainer was stopped; make another one$"):
        trainer.open(OPEN)


@pytest.mark.slow
def test_started_again_when_killed_between_calls(bundle, trainer_of, tmp_path):
    trainer = trainer_of(bundle)
    first, pid = trainer.handle(packet(bundle), "a", CALL), trainer.pid
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not trainer.running)
    assert trainer.handle(packet(bundle), "a", CALL) == first
    assert trainer.starts == 2 and trainer.pid != pid and len(leftovers(tmp_path)) == 1


@pytest.mark.slow
def test_a_call_during_which_it_is_killed_is_made_once_more(long_bundle, trainer_of, tmp_path):
    trainer = trainer_of(long_bundle)
    trainer.open(OPEN)
    join = in_thread(lambda: trainer.handle(packet(long_bundle), "a", 600.0))
    for start in (1, 2):
        eventually(
            lambda n=start: (
                trainer.starts == n and trainer.address and holds_model(trainer) and busy(trainer.pid)
            ),
            OPEN,
        )
        os.kill(trainer.pid, signal.SIGKILL)
    with pytest.raises(
        EnvironmentProblem,
        match=(
            r"^trainer ended twice during Handle \(SIGKILL, as when memory runs out\); "
            rf".*{tmp_path}/trainer\.log"
        ),
    ):
        join()
    assert trainer.starts == 2 and not trainer.running and not leftovers(tmp_path)


@pytest.mark.slow
def test_the_second_attempt_gives_the_answer(bundle, trainer_of, monkeypatch):
    """Killed when the request is on its way, once."""
    trainer, request = trainer_of(bundle), client_side._Process.request
    first, killed = trainer.handle(packet(bundle), "a", CALL), []

    def kill_first(process, *args):
        if not killed:
            os.kill(process.popen.pid, signal.SIGKILL)
            killed.append(process.popen.pid)
        return request(process, *args)

    monkeypatch.setattr(client_side._Process, "request", kill_first)
    assert trainer.handle(packet(bundle), "a", CALL) == first
    assert killed and trainer.starts == 2


@pytest.mark.slow
def test_one_that_hangs_in_a_call_is_killed_at_its_timeout(long_bundle, bundle, trainer_of, tmp_path):
    trainer = trainer_of(long_bundle)
    trainer.open(OPEN)
    pid = trainer.pid
    join = in_thread(lambda: trainer.handle(packet(long_bundle), "a", 4.0))
    eventually(lambda: busy(pid))
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(
        EnvironmentProblem,
        match=(
            r"^trainer did not answer Handle within 4 s, it was stopped; allow more time, "
            r"or give this device less work; [^\n]*trainer\.log$"
        ),
    ):
        join()
    assert not alive(pid) and not leftovers(tmp_path)
    assert trainer.open(OPEN)["examples"] == 96 and trainer.starts == 2


@pytest.mark.slow
def test_one_that_hangs_between_calls_is_replaced(bundle, trainer_of, monkeypatch):
    monkeypatch.setattr(client_side, "HEALTH_SECONDS", 2.0)
    trainer = trainer_of(bundle)
    first, pid = trainer.evaluate(packet(bundle), CALL), trainer.pid
    os.kill(pid, signal.SIGSTOP)
    assert trainer.evaluate(packet(bundle), CALL) == first
    assert trainer.starts == 2 and not alive(pid)


@pytest.mark.slow
def test_idle_gives_the_memory_back_and_the_next_call_starts_it_again(bundle, trainer_of, tmp_path):
    trainer = trainer_of(bundle, idle_seconds=2.0)
    first, pid = trainer.handle(packet(bundle), "a", CALL), trainer.pid
    assert trainer.running
    eventually(lambda: not trainer.running, 10.0)
    assert not alive(pid) and trainer.pid is None and trainer.address == ""
    assert trainer.handle(packet(bundle), "a", CALL) == first
    assert trainer.starts == 2 and len(leftovers(tmp_path)) == 1


@pytest.mark.slow
def test_idle_time_does_not_run_while_it_works(long_bundle, trainer_of):
    trainer = trainer_of(long_bundle, idle_seconds=1.0)
    with pytest.raises(EnvironmentProblem, match="did not answer Handle within 6 s"):
        trainer.handle(packet(long_bundle), "a", 6.0)
    assert trainer.starts == 1


@pytest.mark.slow
def test_errors_come_back_as_their_classes(bundle, tiny_csv, trainer_of, tmp_path):
    path = tmp_path / "own.csv"
    trainer = trainer_of(bundle, data=path)
    with pytest.raises(DataError, match=rf"^--data {path}: does not exist; give a file of texts \(.*\)$"):
        trainer.open(OPEN)
    path.write_text("id,text,label\n" + "".join(f"{i},x,good\n" for i in range(9)) + f"9,x,{'ü😀' * 3000}\n")
    # a long message arrives too, cut
    with pytest.raises(DataError, match=rf"^--data {path}: label 'ü😀ü") as e:
        trainer.open(OPEN)
    assert len(str(e.value)) == service.MAX_DETAILS
    path.write_bytes(tiny_csv.read_bytes())
    assert trainer.open(OPEN)["held_out"] == 24  # mended, and tried again by the same process
    with pytest.raises(Refused, match=r"^kind: 'update', taken here: model, probe$") as refused:
        trainer.handle(encode("update", bundle.manifest.spec.schema, bundle.initial, round=1), "a", CALL)
    assert refused.value.reason == "kind"
    assert trainer.starts == 1 and trainer.running


@pytest.mark.slow
def test_errors_of_base_and_bundle_come_back_as_their_classes(bundle, trainer_of, tmp_path):
    with pytest.raises(ModelError, match=rf"^--base {tmp_path}/none: does not exist; "):
        trainer_of(bundle, base=tmp_path / "none").open(OPEN)
    with pytest.raises(
        RunError, match=r": no manifest\.json, so not a bundle; `fedtune prepare JOB -o BUNDLE` makes one$"
    ):
        trainer_of(type("Nothing", (), {"folder": tmp_path})).open(OPEN)


def test_errors_are_made_from_a_closed_table(tmp_path):
    """Whatever name a status brings, nothing but these classes is made of it."""
    process = client_side._Process.__new__(client_side._Process)
    process.log = tmp_path / "log"
    for error in (
        DataError("a: b"),
        ModelError("m"),
        RunError("r"),
        UserError("u"),
        EnvironmentProblem("e"),
        Refused("size", "a: b"),
        JobError(["a.b = 1: wrong", "c: d"], "/x/job.toml"),
        JobError(["one"], "job"),
    ):
        again = process._error(type(error).__name__, str(error))
        assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))
    for name in ("bug", "ContractError", "SystemExit", "os.system", "FedtuneError", "__class__", ""):
        again = process._error(name, "TypeError: x")
        assert type(again) is EnvironmentProblem
        assert (
            str(again) == f"trainer failed: TypeError: x; this is a bug, its traceback is in {tmp_path}/log"
        )


@pytest.mark.slow
def test_a_bug_is_one_line_and_its_traceback_is_in_the_log(bundle, trainer_of, tmp_path):
    """A client name that is no text, which the stub never sends."""
    trainer = trainer_of(bundle)
    trainer.open(OPEN)
    with pytest.raises(
        EnvironmentProblem,
        match=(
            r"^trainer failed: UnicodeDecodeError: [^\n]*; this is a bug, its traceback "
            rf"is in {tmp_path}/trainer\.log$"
        ),
    ):
        trainer._call("Handle", packet(bundle), CALL, (("client-bin", b"\xff"),))
    assert (
        "Traceback" in (tmp_path / "trainer.log").read_text() and trainer.open(OPEN) and trainer.starts == 1
    )


def holds_model(trainer):
    """What the standard health service says of the trainer's own service."""
    with grpc.insecure_channel(trainer.address) as channel:
        request = health_pb2.HealthCheckRequest(service=service.SERVICE)
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=5.0)
        except grpc.RpcError:  # not listening yet
            return False
    return answer.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.slow
def test_health_is_answered_while_it_trains(long_bundle, trainer_of, tmp_path):
    trainer = trainer_of(long_bundle, data=tmp_path / "none.csv")
    with pytest.raises(DataError):
        trainer.open(OPEN)
    assert not holds_model(trainer)  # it listens, but has no device
    trainer = trainer_of(long_bundle)
    trainer.open(OPEN)
    assert holds_model(trainer)
    join = in_thread(lambda: trainer.handle(packet(long_bundle), "a", 600.0))
    eventually(lambda: busy(trainer.pid))
    times = []
    for _ in range(10):
        begin = time.monotonic()
        assert holds_model(trainer)
        times.append(time.monotonic() - begin)
    assert np.median(times) < 1.0
    assert busy(trainer.pid)
    begin = time.monotonic()
    trainer.stop()  # from another thread than the call's, which ends with it
    with pytest.raises(EnvironmentProblem, match=r"^trainer was stopped; make another one$"):
        join()
    assert time.monotonic() - begin < 10 and trainer.starts == 1


PARENT = """
import sys, threading, time
from pathlib import Path
from fedtune.client.trainer import Trainer, TrainerSettings
bundle, data, folder = map(Path, sys.argv[1:])
trainer = Trainer(TrainerSettings(bundle, data, None, 1, 0.0, folder / "log", folder))
call = threading.Thread(target=trainer.open, args=(120.0,))  # its end must not end the trainer
call.start()
call.join()
time.sleep(2)
assert trainer.running and trainer.starts == 1
print(trainer.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def orphan(bundle, tiny_csv, tmp_path):
    """(parent, pid of its trainer)"""
    command = [sys.executable, "-c", PARENT, str(bundle.folder), str(tiny_csv), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as parent:
        yield parent, int(parent.stdout.readline())
        parent.kill()


@pytest.mark.slow
@pytest.mark.parametrize("hangs", [False, True])
def test_it_does_not_outlive_its_parent(hangs, orphan, trainer_of, bundle, tmp_path, monkeypatch):
    parent, pid = orphan
    assert alive(pid)
    if hangs:
        os.kill(pid, signal.SIGSTOP)
    parent.kill()
    parent.wait()
    eventually(lambda: not alive(pid), 10.0)
    (old,) = leftovers(tmp_path)
    with monkeypatch.context() as context:  # the next start removes what it left, once that is old enough
        context.setattr(client_side, "START_SECONDS", -1.0)
        with pytest.raises(EnvironmentProblem, match="did not start within -1 s"):
            trainer_of(bundle).open(OPEN)
    assert not old.exists()


@pytest.mark.slow
def test_ctrl_c_is_for_the_parent_to_decide(orphan):
    """A terminal sends it to the whole group."""
    parent, pid = orphan
    os.killpg(os.getpgid(parent.pid), signal.SIGINT)
    parent.wait(30)  # it has no handler, so it ends, and its trainer with it; but not by SIGINT
    eventually(lambda: not alive(pid), 10.0)


@pytest.mark.slow
def test_sigint_is_ignored(bundle, trainer_of):
    trainer = trainer_of(bundle)
    trainer.open(OPEN)
    os.kill(trainer.pid, signal.SIGINT)
    time.sleep(1)
    assert trainer.open(OPEN) and trainer.starts == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["x" * 120, "with space 50%"])
def test_a_folder_that_no_socket_address_can_name(name, bundle, trainer_of, tmp_path):
    (tmp_path / name).mkdir()
    trainer = trainer_of(bundle, folder=tmp_path / name)
    assert trainer.open(OPEN)["examples"] == 96
    private = Path(trainer.address.removeprefix("unix:")).parent
    assert stat.S_IMODE(private.stat().st_mode) == 0o700 and not leftovers(tmp_path / name)
    trainer.stop()
    assert not private.exists()


@pytest.mark.slow
def test_modules_of_the_folder_one_stands_in_are_not_imported(bundle, trainer_of, tmp_path, monkeypatch):
    (tmp_path / "random.py").write_text("raise SystemExit('taken from the wrong place')")
    monkeypatch.chdir(tmp_path)
    assert trainer_of(bundle).open(OPEN)["examples"] == 96


def test_the_config_holds_no_more_than_the_service_takes(tmp_path, bundle):
    settings = TrainerSettings(bundle.folder, Path("a.csv"), None, 1, 0.0, tmp_path / "log", tmp_path)
    with client_side._write_config(tmp_path, settings):
        config = service.Config(**json.loads((tmp_path / "config.json").read_text()))
    assert (config.data, config.base, config.parent) == (str(Path.cwd() / "a.csv"), "", os.getpid())
