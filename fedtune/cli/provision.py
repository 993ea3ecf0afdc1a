"""fedtune provision: keys and certificates of a federation, made, renewed and shown."""

import json
import math
import shlex
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import typer

from fedtune.cli.common import JsonOption, no_dash, out, shell
from fedtune.errors import EnvironmentProblem, UserError

if TYPE_CHECKING:
    from fedtune.provision import Item, Report

EXAMPLES = (
    "Examples:  fedtune provision --host fed.example.org --host 192.0.2.7 --devices 4 -o keys   |   "
    "fedtune provision --device lab-7 -o keys   |   "
    "fedtune provision renew -o keys   |   "
    "fedtune provision show -o keys"
)
RENEW_EXAMPLES = (
    "Examples:  fedtune provision renew -o keys   |   "
    "fedtune provision renew -o keys --host fed.example.org   |   "
    "fedtune provision renew -o keys --device device-003"
)
SHOW_EXAMPLES = "Examples:  fedtune provision show -o keys   |   fedtune provision show -o keys --json"
PORT = 9092

HostOption = Annotated[
    list[str] | None,
    typer.Option("--host", metavar="NAME-OR-IP", help="What devices call the coordinator; repeatable."),
]
DaysOption = Annotated[int, typer.Option("--days", help="How long the server certificate is good.")]
FolderOption = Annotated[
    Path,
    typer.Option(
        "-o",
        "--out",
        callback=no_dash,
        metavar="DIR",
        help="Folder that `fedtune provision` made.",
        show_default=False,
    ),
]

app = typer.Typer(
    name="provision", invoke_without_command=True, suggest_commands=False, pretty_exceptions_enable=False
)


@app.callback(epilog=EXAMPLES)
@shell
def command(
    ctx: typer.Context,
    host: HostOption = None,
    devices: Annotated[
        int | None,
        typer.Option("--devices", metavar="N", help="Makes device-001 to device-N.", show_default=False),
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option("--device", metavar="NAME", help="Makes a device of this name; repeatable."),
    ] = None,
    out_: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            callback=no_dash,
            metavar="DIR",
            help="Folder to write, or to add to.",
            show_default=False,
        ),
    ] = None,
    days: DaysOption = 365,
    ca_days: Annotated[int, typer.Option("--ca-days", help="How long the CA is good.")] = 1825,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Make everything new, also what is there: every device has to be set up again."
        ),
    ] = False,
) -> None:
    """Makes a private CA, the coordinator's certificate and a key pair for each device, in a folder per role.

    What is there already stays as it is: run it again with more devices to enrol them.
    """
    if ctx.invoked_subcommand:
        if host or device or devices is not None or out_ or force:
            raise UserError(
                f"options stand after {ctx.invoked_subcommand}: `fedtune provision "
                f"{ctx.invoked_subcommand} -o DIR …`"
            )
        return
    if out_ is None:
        raise UserError(
            "provision needs --host NAME-OR-IP, --devices N and -o DIR; see `fedtune provision --help`"
        )
    library = _library()
    names = library.device_names(devices, device or ())
    report = library.make(out_, host or (), names, days, ca_days, force)
    _print(report, "made")
    _print_next(report, next((item.name for item in report.made if item.kind == "device"), names[0]))


@app.command(epilog=RENEW_EXAMPLES)
@shell
def renew(
    out_: FolderOption,
    within: Annotated[
        int, typer.Option("--within", metavar="DAYS", help="Renew what expires within so many days.")
    ] = 30,
    host: HostOption = None,
    days: DaysOption = 365,
    device: Annotated[
        list[str] | None,
        typer.Option(
            "--device", metavar="NAME", help="Replace the keys of this device, lost or stolen; repeatable."
        ),
    ] = None,
) -> None:
    """Renews what expires soon; with --host makes a certificate for other hosts,
    with --device replaces a device's keys.

    Needs ca/ca.key to sign a certificate. With --device alone certificates are left alone.
    """
    report = _library().renew(out_, within, host or (), days, device or ())
    if not report.made:
        _line(f"nothing expires within {within} day{'s' if within != 1 else ''}")
    _print(report, "renewed")


@app.command(epilog=SHOW_EXAMPLES)
@shell
def show(out_: FolderOption, json_: JsonOption = False) -> None:
    """Prints what is provisioned and until when it is good."""
    items = _library().inspect(out_)
    if json_:
        out.print_json(json.dumps([_as_json(item) for item in items]))
    else:
        _print_table(("what", "good until", "left", "file", "note"), items)


def _library() -> ModuleType:
    try:
        from fedtune import provision
    except ModuleNotFoundError as e:
        raise EnvironmentProblem(
            f"fedtune provision needs the package {e.name}; install fedtune[server]"
        ) from None
    return provision


def _print(report: "Report", done: str) -> None:
    for title, items in ((done, report.made), ("left as it was", report.kept)):
        if items:
            _line(f"{title}: {_summed_up(items)}")
    if report.removed:
        _line(f"removed: {_library().names_in_short(report.removed)}")
    dated = sorted(
        (item for item in (*report.made, *report.kept) if item.not_after), key=lambda item: item.kind
    )
    _print_table(("what", "good until", "left", "file"), dated)
    for sentence in report.todo:
        _line(f"- {sentence}")


def _print_next(report: "Report", name: str) -> None:
    host = f"[{report.hosts[0]}]" if ":" in report.hosts[0] else report.hosts[0]
    folder = report.root
    _line("next:")
    _line(f"  fedtune server JOB --dir {_quoted(folder / 'server')} --address {_quoted(f'{host}:{PORT}')}")
    _line(
        f"  fedtune client --server {_quoted(f'{host}:{PORT}')} --dir "
        f"{_quoted(folder / 'devices' / name)} --data DATA"
    )


def _print_table(header: "tuple[str, ...]", items: "Iterable[Item]") -> None:
    from fedtune.report.terminal import table

    rows = [(item.name, *_good_until(item), str(item.path), _note(item)) for item in items]
    out.print(table(header, [row[: len(header)] for row in rows], words=(0, 1, 3, 4)))


def _summed_up(items: "tuple[Item, ...]") -> str:
    """The CA and the server certificate by name, devices counted."""
    words = {"ca": "the CA", "server": "the server certificate for "}
    names = [item.name for item in items if item.kind == "device"]
    parts = [words[item.kind] + ", ".join(item.hosts) for item in items if item.kind in words]
    if names:
        parts.append(
            f"{len(names):,} device{'s' if len(names) != 1 else ''} ({_library().names_in_short(names)})"
        )
    return "; ".join(parts)


def _good_until(item: "Item") -> tuple[str, str]:
    if item.not_after is None:
        return "does not expire", ""
    left = _days_left(item.not_after)
    return f"{item.not_after:%Y-%m-%d}", "expired" if left <= 0 else f"{left:,} day{'s' if left != 1 else ''}"


def _days_left(until: datetime) -> int:
    """A day begun counts, so that a certificate made for 365 days has 365 left."""
    return math.ceil((until - datetime.now(UTC)) / timedelta(days=1))


def _note(item: "Item") -> str:
    away = {"ca": "key kept elsewhere", "server": "key delivered", "device": "key delivered"}
    return "; ".join(
        [*([", ".join(item.hosts)] if item.hosts else []), *([] if item.has_key else [away[item.kind]])]
    )


def _as_json(item: "Item") -> dict[str, object]:
    return {
        "name": item.name,
        "kind": item.kind,
        "path": str(item.path),
        "not_after": item.not_after.isoformat() if item.not_after else None,
        "days_left": _days_left(item.not_after) if item.not_after else None,
        "hosts": list(item.hosts),
        "has_key": item.has_key,
    }


def _quoted(text: Path | str) -> str:
    return shlex.quote(str(text))


def _line(text: str) -> None:
    out.print(text, markup=False, highlight=False, soft_wrap=True)
