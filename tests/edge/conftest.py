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
    """prepared("section.key=value", ...) -> bundle and graphs; jobs that trace alike share their graphs."""
    traced: dict[tuple[str, ...], Path] = {}

    def make(*changes: str) -> Prepared:
        job = parse_job("", [*tiny_settings, "data.id=id", 'data.labels=["bad", "good"]', *changes])
        root = tmp_path_factory.mktemp("prepared")
        shape = tuple(c for c in changes if c.startswith(("model.", "adapter.")))
        graphs = None if shape in traced else root / "graphs"
        prepare(job, root / "bundle", graphs)
        return Prepared(open_bundle(root / "bundle"), traced.setdefault(shape, root / "graphs"))

    return make
