"""Federations and what they are started with."""

import csv
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from live_federation import DOMAINS, Federation


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Callable[..., Federation]]:
    """federation(names) -> Federation; its processes end with the test."""
    made: list[Federation] = []

    def make(*args: object, **kwargs: object) -> Federation:
        made.append(Federation(tmp_path / f"federation-{len(made)}", *args, **kwargs))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(scope="session")
def domain_csv(tiny_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The rows of `tiny_csv`, one file per domain."""
    folder = tmp_path_factory.mktemp("domains")
    rows = list(csv.DictReader(tiny_csv.read_text(encoding="utf-8").splitlines()))
    for domain in DOMAINS:
        with (folder / f"{domain}.csv").open("w", newline="", encoding="utf-8") as file:
            out = csv.DictWriter(file, rows[0].keys())
            out.writeheader()
            out.writerows(row for row in rows if row["domain"] == domain)
    return {domain: folder / f"{domain}.csv" for domain in DOMAINS}


@pytest.fixture(scope="session")
def live_settings(tiny_settings: tuple[str, ...]) -> tuple[str, ...]:
    """The tiny job with one client per domain, all of them in every round, as three devices would run it."""
    return (
        *tiny_settings,
        "data.clients=0",
        "data.id=id",
        'data.labels=["bad", "good"]',
        "federation.cohort=3",
        "federation.min-replies=3",
        "federation.deadline=120.0",
    )


@pytest.fixture(scope="session")
def make_bundle(
    live_settings: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """make_bundle("section.key=value", ...) -> folder of the live job's bundle with these keys changed."""
    from fedtune.job import parse_job
    from fedtune.workflows.prepare import prepare

    def make(*changes: str) -> Path:
        folder = tmp_path_factory.mktemp("bundle") / "bundle"
        prepare(parse_job("", [*live_settings, *changes]), folder)
        return folder

    return make
