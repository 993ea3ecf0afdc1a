"""Bundles of the tiny job with the graphs that train them, made once."""

import fcntl
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from fedtune.bundle import Bundle, open_bundle
from fedtune.job import parse_job
from fedtune.workflows.prepare import prepare


class Prepared(NamedTuple):
    bundle: Bundle
    graphs: Path


@pytest.fixture(scope="session")
def prepared(tiny_settings: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Prepared]:
    """prepared("section.key=value", ..., graphs=False) -> bundle and, without that, graphs; jobs that trace alike share them, in all processes."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def make(*changes: str, graphs: bool = True) -> Prepared:
        job = parse_job("", [*tiny_settings, "data.id=id", 'data.labels=["bad", "good"]', *changes])
        root = tmp_path_factory.mktemp("prepared")
        shape = tuple(c for c in changes if c.startswith(("model.", "adapter.", "edge.mode")))
        place = shared / f"graphs-{hashlib.sha256(repr(shape).encode()).hexdigest()[:16]}"
        with place.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # tracing takes half a minute: one process does it, and the others wait for it
            prepare(job, root / "bundle", place if graphs and not place.exists() else None)
        return Prepared(open_bundle(root / "bundle"), place if graphs else root)

    return make
