"""What a coordinator's folder says the service is doing.

Reads files alone: no torch, no Flower, no network.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedtune.common.storage import is_held
from fedtune.errors import RunError
from fedtune.report.format import bound, duration, size
from fedtune.report.privacy import UNSCORED
from fedtune.runs.folder import RunFolder

RECENT = 5  # rounds whose mean length is taken for those to come


def read(folder: Path) -> dict[str, Any]:
    """Raises RunError when no service was ever started there, or its file is damaged."""
    path = folder / "service.json"
    try:
        status = json.loads(path.read_bytes())
        line, run = status.get("line"), status.get("run")
        lines = RunFolder(Path(run)).metrics() if run and status["job"] and Path(run).exists() else []
        devices = [dict(d) for d in status["devices"]]
    except FileNotFoundError:
        if not folder.is_dir():
            raise RunError(f"{folder}: is not a folder; give the --dir of `fedtune server`") from None
        if (folder / "server").is_dir():
            raise RunError(
                f"{folder}: no service was started in it; its coordinator's folder is {folder / 'server'}"
            ) from None
        raise RunError(
            f"{folder}: no service was started in it; start one with `fedtune server JOB --dir {folder}`"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise RunError(f"{path}: damaged ({e}); a running service writes it again within seconds") from None
    for device in devices:
        device["rounds"] = sum(device["name"] in x["clients"] for x in lines)
        device["refusals"] = sum(device["name"] in x["refused"] for x in lines)
    last = lines[-1] if lines else line
    running = False
    with contextlib.suppress(OSError):
        running = is_held(folder / ".lock")
    if not running:
        status |= {"state": "stopped", "deadline_at": None}
        devices = [device | {"online": False} for device in devices]
    return status | {
        "running": running,
        "devices": devices,
        "finished": _finished(folder),
        "accuracy": last and last["accuracy"],
        "loss": last and last["loss"],
        "bytes": last["total_bytes"] if last else 0,
        "late": last["late"] if last else 0,
        "refused": sum(len(x["refused"]) for x in lines),
        "epsilon": status.get("epsilon"),
        "seconds_left": _left(lines, status),
    }


def lines(status: dict[str, Any]) -> Iterator[str]:
    """The status for people."""
    yield (
        f"service: {status['state']} on {status['address']}{' without TLS' if status['insecure'] else ''}"
        + (
            f" (process {status['pid']})"
            if status["running"]
            else "; the same command continues it"
            if status["job"]
            else ""
        )
    )
    if status["job"]:
        yield (
            f"job: {status['job']}, round {status['round'] if status['round'] is not None else 'not begun'} "
            f"of {status['rounds']}; run folder {status['run']}"
        )
        if status["state"] == "waiting":
            yield f"waiting for devices: {status.get('ready', 0)} of {status.get('need', '?')} ready"
        if status["accuracy"] is not None:
            yield f"held-out: accuracy {status['accuracy']:.4f}" + (
                f", loss {status['loss']:.4f}" if status["loss"] is not None else ""
            )
        elif not status.get("scored", True):
            yield UNSCORED
        yield (
            f"sent: {size(status['bytes'])}; updates refused: {status['refused']}, late: {status['late']}; "
            f"privacy spent: {_spent(status['epsilon'])}"
        )
        if status["seconds_left"] is not None:
            yield f"time left: about {duration(status['seconds_left'])}"
    for run in status["finished"]:
        yield (
            f"finished: {run['name']}, accuracy "
            f"{'not measured' if run['accuracy'] is None else format(run['accuracy'], '.4f')}; "
            f"run folder {run['run']}"
        )
    if status["queue"]:
        yield f"queued: {', '.join(status['queue'])}"


def _spent(epsilon: float | str | None) -> str:
    if epsilon is None:
        return "not read yet"
    return "epsilon infinite (unprotected)" if epsilon == "inf" else f"epsilon {bound(float(epsilon))}"


def _finished(folder: Path) -> list[dict[str, Any]]:
    """The newest runs that came to their end."""
    found = []
    for path in sorted(folder.glob("runs/*/summary.json"))[-RECENT:]:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            summary = json.loads(path.read_text())
            if summary["complete"]:
                found.append(
                    {
                        "name": path.parent.name,
                        "run": str(path.parent),
                        "accuracy": summary["final"]["accuracy"],
                    }
                )
    return found


def _left(lines: list[dict[str, Any]], status: dict[str, Any]) -> float | None:
    times = [x["seconds"] for x in lines if x["round"] > 0][-RECENT:]
    if not times or not status.get("rounds"):
        return None
    return round(sum(times) / len(times) * (status["rounds"] - lines[-1]["round"]), 1)
