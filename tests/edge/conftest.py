"""Bundles of the tiny job with the graphs that train them, made once."""

import fcntl
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from fedtune.bundles.bundle import Bundle, open_bundle
from fedtune.job import Job, parse_job
from fedtune.workflows.prepare import prepare


class Prepared(NamedTuple):
    bundle: Bundle
    graphs: Path


@pytest.fixture(scope="session")
def prepared(
    tiny_settings: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Prepared]:
    """prepared("section.key=value", ..., graphs=False) -> bundle and, without that, graphs with all smaller
    steps; jobs that trace alike share them, in all processes.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def parsed(*changes: str) -> Job:
        return parse_job("", [*tiny_settings, "data.id=id", 'data.labels=["bad", "good"]', *changes])

    def make(*changes: str, graphs: bool = True) -> Prepared:
        job = parsed(*changes)
        root = tmp_path_factory.mktemp("prepared")
        prepare(job, root / "bundle")
        part = bool(open_bundle(root / "bundle").manifest.spec.base_blocks)
        shape = tuple(
            c
            for c in changes
            if c.startswith(("model.", "adapter.", "edge.mode", *(("units.", "simulation.") if part else ())))
        )
        place = shared / f"graphs-{hashlib.sha256(repr(shape).encode()).hexdigest()[:16]}"
        with place.with_suffix(".lock").open("w") as lock:
            # tracing takes half a minute: one process does it, and the others wait for it
            fcntl.flock(lock, fcntl.LOCK_EX)
            if graphs and not place.exists():
                alike = job.edge.mode == "forward" or part  # else for jobs with and without [units]
                prepare(
                    job if alike else parsed(*shape, "units.strategy=lisa", "units.budget=1"),
                    root / "traced",
                    place,
                )
        return Prepared(open_bundle(root / "bundle"), place if graphs else root)

    return make
