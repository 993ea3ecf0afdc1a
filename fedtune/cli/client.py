"""fedtune client: runs a device."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from fedtune.cli.common import INTERRUPTED, shell
from fedtune.cli.journal import Journal
from fedtune.errors import UserError
from fedtune.process.address import is_loopback, parse_address

EXAMPLES = (
    "Examples:  fedtune client --server coordinator.example:9092 --dir keys/devices/device-001 "
    "--data reviews.csv   |   "
    "fedtune client --server 127.0.0.1:9092 --insecure --name first --dir first --data reviews.csv"
)
# Of every device, with torch or without.
ServerOption = Annotated[
    str, typer.Option("--server", metavar="HOST:PORT", help="The coordinator.", show_default=False)
]
FolderOption = Annotated[
    Path,
    typer.Option(
        "--dir",
        help="This device's folder: keys from `fedtune provision`, bundles, logs.",
        show_default=False,
    ),
]
DataOption = Annotated[
    Path,
    typer.Option(
        "--data",
        help="This device's data: .csv, .tsv, .jsonl, .parquet, or a folder of images. It stays here.",
        show_default=False,
    ),
]
PolicyOption = Annotated[
    Path | None,
    typer.Option(
        "--policy",
        help="The owner's limits (default: policy.toml in --dir, if there is one).",
        show_default=False,
    ),
]
NameOption = Annotated[
    str, typer.Option("--name", help="With --insecure: what to be called.", show_default=False)
]
ClassOption = Annotated[
    str,
    typer.Option(
        "--class",
        help=(
            "A class of the job's simulation.devices, whose units, depth and rank this device then "
            "has (default: the job's own)."
        ),
        show_default=False,
    ),
]
InsecureOption = Annotated[
    bool, typer.Option("--insecure", help="No TLS and no key; to 127.0.0.1 only, for trying out.")
]
ThreadsOption = Annotated[
    int, typer.Option("--threads", min=0, max=1024, help="Threads that compute (0: all cores).")
]
IdleOption = Annotated[
    float,
    typer.Option(
        "--idle", min=0, help="Seconds without work after which the model leaves memory (0: never)."
    ),
]
LogOption = Annotated[
    bool, typer.Option("--log-json", help="One JSON object a line on standard output, for log collectors.")
]


@shell
def command(
    server: ServerOption,
    folder: FolderOption,
    data: DataOption,
    base: Annotated[
        Path | None,
        typer.Option(
            "--base",
            help="Folder of the base model (default: the one the job names, from the cache).",
            show_default=False,
        ),
    ] = None,
    policy: PolicyOption = None,
    name: NameOption = "",
    insecure: InsecureOption = False,
    threads: ThreadsOption = 0,
    idle: IdleOption = 600.0,
    kind: ClassOption = "",
    log_json: LogOption = False,
) -> None:
    """Joins a federation and trains when asked, until stopped. The data stay here; what leaves are the
    adapter's values and counts.
    """
    join(
        server,
        folder,
        data,
        policy,
        name,
        insecure,
        log_json,
        base=base,
        threads=threads,
        idle_seconds=idle,
        kind=kind,
    )


def join(
    server: str,
    folder: Path,
    data: Path,
    policy: Path | None,
    name: str,
    insecure: bool,
    log_json: bool,
    **settings: Any,
) -> None:
    """Runs a device, with torch or without, until it is stopped.

    `settings`: further ones of `DeviceSettings`. Raises UserError.
    """
    from fedtune.bundles.offer import NAME

    host, _ = parse_address(server)
    if insecure and not is_loopback(host):
        raise UserError(
            f"--insecure to {host}: only 127.0.0.1, ::1 and localhost can do without TLS; "
            "remove --insecure and give a provisioned --dir"
        )
    if name and not insecure:
        raise UserError("--name: a device with a key is called as it was provisioned; remove --name")
    if name and not NAME.fullmatch(name):
        raise UserError(
            f"--name {name!r}: must be up to 64 letters, digits, dots, dashes or underscores, "
            "beginning with a letter or digit"
        )
    with _stopping() as stop, Journal(log_json) as journal:
        from fedtune.client.device import DeviceSettings, run_device

        device = DeviceSettings(server, folder, data, policy=policy, name=name, insecure=insecure, **settings)
        run_device(device, lambda text: journal.event("device", text), stop)
        journal.event("stopped", "stopped")
    sys.exit(INTERRUPTED)


@contextmanager
def _stopping() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set, also where a script started this process with SIGINT ignored."""
    stop = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
