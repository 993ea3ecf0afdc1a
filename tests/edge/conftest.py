"""Bundles of the tiny job with the graphs that train them, made once."""

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
    """prepared("section.key=value", ..., graphs=False) -> bundle and, without that, graphs; jobs that trace alike share them."""
    traced: dict[tuple[str, ...], Path] = {}

    def make(*changes: str, graphs: bool = True) -> Prepared:
        job = parse_job("", [*tiny_settings, "data.id=id", 'data.labels=["bad", "good"]', *changes])
        root = tmp_path_factory.mktemp("prepared")
        shape = tuple(c for c in changes if c.startswith(("model.", "adapter.", "edge.mode")))
        prepare(job, root / "bundle", root / "graphs" if graphs and shape not in traced else None)
        return Prepared(open_bundle(root / "bundle"), traced.setdefault(shape, root / "graphs") if graphs else root)

    return make
