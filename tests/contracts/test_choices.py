"""What a job can choose by name is one object in one table, and nothing else compares with the name."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

import fedtune
from fedtune.aggregation.rules import RULES, own_rule
from fedtune.aggregation.steps import STEPS
from fedtune.errors import EmptyCohort, JobError, ShapeMismatch
from fedtune.job import FederationSection, SimulationSection, UnitsSection, parse_job
from fedtune.round.algorithm import make_algorithm
from fedtune.simulation.engines import ENGINES
from fedtune.types import ClientInfo, TensorSpec, Update
from fedtune.units.strategies import STRATEGIES
from fedtune.wire import Schema

ROOT = Path(fedtune.__file__).parent
TABLES = {  # by the attribute that holds the name: the names, and where they are defined
    "aggregation": (RULES, "aggregation"),
    "server_optimizer": (STEPS, "aggregation"),
    "engine": (ENGINES, "simulation"),
    "strategy": (STRATEGIES, "units"),
}
SETTINGS = {"trim": 0.25, "byzantine": 1, "norm_bound": 0.5}
REFERENCE = {
    "w": np.ones((2, 3), np.float32),
    "b": np.zeros(2, np.float32),
    "untrained": np.full(4, 7.0, np.float32),
}
SCHEMA = Schema((TensorSpec("w", (2, 3), "block.0"), TensorSpec("b", (2,), "head")))


def updates(count: int) -> list[Update]:
    rng = np.random.default_rng(count)
    return [
        Update(
            f"c{i}",
            1,
            {n: (REFERENCE[n] + rng.normal(size=REFERENCE[n].shape)).astype(np.float32) for n in ("w", "b")},
            float(i + 1),
            {"loss": (1.0, 2.0)},
        )
        for i in range(count)
    ]


def comparisons(path: Path) -> Iterator[tuple[int, str, set[str]]]:
    """(line, attribute or name, strings) of each comparison of the one with the others."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Compare):
            continue
        sides = [node.left, *node.comparators]
        named = [s.attr if isinstance(s, ast.Attribute) else s.id for s in sides if isinstance(s, NAMES)]
        texts = {
            leaf.value
            for side in sides
            for leaf in ast.walk(side)
            if isinstance(leaf, ast.Constant) and isinstance(leaf.value, str)
        }
        yield from ((node.lineno, name, texts) for name in named)


NAMES = (ast.Attribute, ast.Name)


@pytest.mark.parametrize("attribute", TABLES)
def test_nobody_compares_with_a_name_of_the_table(attribute):
    table, folder = TABLES[attribute]
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sorted(ROOT.rglob("*.py"))
        if path.relative_to(ROOT).parts[0] != folder
        for line, name, texts in comparisons(path)
        if name == attribute and texts & table.keys()
    ]
    assert found == []


@pytest.mark.parametrize("key, table", [("aggregation", RULES), ("server_optimizer", STEPS)])
def test_keys_of_a_choice_are_of_its_section(key, table):
    assert all(k in FederationSection.model_fields for choice in table.values() for k in choice.keys)


@pytest.mark.parametrize(
    "section, key, table",
    [
        (FederationSection, "aggregation", RULES),
        (FederationSection, "server_optimizer", STEPS),
        (SimulationSection, "engine", ENGINES),
        (UnitsSection, "strategy", STRATEGIES),
    ],
)
def test_a_job_can_choose_what_the_table_has(section, key, table):
    assert set(get_args(section.model_fields[key].annotation)) == set(table)
    assert all(name == choice.name for name, choice in table.items())


@pytest.fixture(params=RULES)
def rule(request):
    return RULES[request.param]


def test_a_rule_leaves_what_it_is_given(rule):
    average, given = rule.make(FederationSection(**SETTINGS)), updates(5)
    before = [{n: a.copy() for n, a in u.arrays.items()} for u in given]
    reference = {n: a.copy() for n, a in REFERENCE.items()}
    mean = average(iter(given), reference)
    assert mean.arrays.keys() == REFERENCE.keys()
    assert all(np.array_equal(u.arrays[n], old[n]) for u, old in zip(given, before) for n in old)
    assert all(np.array_equal(reference[n], REFERENCE[n]) for n in REFERENCE)
    assert {*mean.clients, *mean.aside} == {u.client for u in given}


def test_a_rule_keeps_what_nobody_trained(rule):
    mean = rule.make(FederationSection(**SETTINGS))(iter(updates(5)), REFERENCE)
    np.testing.assert_array_equal(mean.arrays["untrained"], REFERENCE["untrained"])
    assert all(
        mean.arrays[n].dtype == a.dtype and mean.arrays[n].shape == a.shape for n, a in REFERENCE.items()
    )
    assert not np.array_equal(mean.arrays["w"], REFERENCE["w"])


def test_a_rule_refuses_an_empty_cohort_and_other_shapes(rule):
    average = rule.make(FederationSection(**SETTINGS))
    with pytest.raises(EmptyCohort):
        average(iter(()), REFERENCE)
    with pytest.raises(ShapeMismatch, match="c0"):
        average(iter([Update("c0", 1, {"w": np.zeros(3, np.float32)}, 1.0, {})]), REFERENCE)


def test_a_rule_holds_one_update_or_all_as_it_says(rule):
    alive, most = set(), 0

    class Watched(np.ndarray):
        def __del__(self):
            alive.discard(id(self))

    def given():
        nonlocal most
        for update in updates(6):
            arrays = {name: a.copy().view(Watched) for name, a in update.arrays.items()}
            alive.add(id(arrays["w"]))
            most = max(most, len(alive))
            yield Update(update.client, 1, arrays, update.weight, update.metrics)
            del arrays, update

    rule.make(FederationSection(**SETTINGS))(given(), REFERENCE)
    assert most <= 2 if rule.streams else most == 6


def test_a_rule_of_ones_own():
    """A caller's function in the place of the job's rule; it is refused where the job counts on a mean."""
    job = parse_job("", ["data.clients=4", "federation.cohort=4"])
    clients = [ClientInfo(f"c{i}", 1) for i in range(4)]
    last = own_rule(lambda updates, reference: {"w": updates[-1].arrays["w"]})
    algorithm = make_algorithm(job, SCHEMA, rule=last)
    start = {n: REFERENCE[n] for n in ("w", "b")}
    given = updates(4)
    state, report = algorithm.step(algorithm.init(start), iter(given))
    np.testing.assert_array_equal(state.arrays["w"], given[-1].arrays["w"])
    np.testing.assert_array_equal(state.arrays["b"], start["b"])
    assert report.clients == tuple(c.name for c in clients) and report.metrics == {"loss": (4.0, 8.0)}
    secret = parse_job("", ["data.clients=4", "federation.cohort=4", *SECURE])
    with pytest.raises(JobError, match=r'federation\.aggregation = "own": looks at single updates'):
        make_algorithm(secret, SCHEMA, rule=last)


SECURE = ("privacy.secure-aggregation=true", "privacy.clip=1", "federation.weighting=equal")


def test_a_draw_of_ones_own():
    job = parse_job("", ["data.clients=4", "federation.cohort=2"])
    clients = [ClientInfo(f"c{i}", 1) for i in range(4)]
    algorithm = make_algorithm(job, SCHEMA, draw=lambda clients, round, rng: clients[round : round + 2])
    state = algorithm.init({n: REFERENCE[n] for n in ("w", "b")})
    assert [a.client for a in algorithm.plan(state, clients)] == ["c1", "c2"]
    private = ("privacy.unit=client", "privacy.noise-multiplier=1", "privacy.delta=1e-5", "privacy.clip=1")
    protected = parse_job(
        "", ["data.clients=4", "federation.cohort=2", "federation.weighting=equal", *private]
    )
    with pytest.raises(JobError, match="leave out draw"):
        make_algorithm(protected, SCHEMA, draw=lambda clients, round, rng: clients)
