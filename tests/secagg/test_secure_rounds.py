"""Securely summed rounds in a simulation: the same model as a plain mean but for the grid, on every
engine; and what is refused.
"""

import numpy as np
import pytest

from fedtune.algorithms import fed_avg, secure_avg
from fedtune.algorithms.base import State
from fedtune.common.seeds import generator
from fedtune.errors import JobError, PrivacyRefused
from fedtune.job import parse_job
from fedtune.privacy.contribution import message_bytes, secure_of
from fedtune.privacy.noise import SeededNoise, noise_of
from fedtune.privacy.plan import resolved
from fedtune.privacy.releases import read
from fedtune.round.algorithm import make_algorithm
from fedtune.runs.ledger import Ledger
from fedtune.secagg.client import ClientRound
from fedtune.secagg.masks import sum_plainly
from fedtune.secagg.server import ServerRound, run_round
from fedtune.types import ClientInfo, TensorSpec, Update
from fedtune.wire import Schema

SCHEMA = Schema((TensorSpec("a", (3, 2), "low"), TensorSpec("b", (2,), "low"), TensorSpec("c", (4,), "high")))
PLAIN = (
    "privacy.secure-aggregation=true",
    "privacy.clip=2.0",
    "federation.weighting=equal",
    "federation.cohort=6",
    "privacy.noise=seeded",
)
CLIENT = (
    *PLAIN,
    "privacy.unit=client",
    "privacy.noise-multiplier=1.0",
    "privacy.delta=1e-5",
    "privacy.i-understand=true",
)
EXAMPLE = (
    *PLAIN,
    "privacy.unit=example",
    "privacy.noise-multiplier=2.0",
    "privacy.clip=0.5",
    "privacy.examples=64",
    "privacy.update-clip=3.0",
)
NAMES = [f"client-{i}" for i in range(6)]


def model(seed=0, size=1.0):
    rng = np.random.default_rng(seed)
    return {t.name: (size * rng.standard_normal(t.shape)).astype(np.float32) for t in SCHEMA.tensors}


def update(name, start, seed, units=("low", "high"), size=0.1, metrics=None):
    change = model(seed, size)
    arrays = {t.name: start[t.name] + change[t.name] for t in SCHEMA.of_units(units)}
    return Update(
        name, 1, arrays, 5.0, {"loss": (3.0, 4.0), "accuracy": (2.0, 4.0)} if metrics is None else metrics
    )


def algorithm(job, schema=SCHEMA):
    return secure_avg(
        seed=0,
        cohort=6,
        units=schema.units,
        secure=secure_of(job, schema),
        noise=lambda round, client: noise_of(job, round, client, "sum"),
    )


def test_the_model_is_the_plain_mean_but_for_the_grid():
    job, start = parse_job("", PLAIN), model()
    updates = [update(name, start, i + 1) for i, name in enumerate(NAMES)]
    state, report = algorithm(job).step(State(0, start), iter(updates))
    plain, told = fed_avg(seed=0, cohort=6, units=SCHEMA.units, weighting="equal").step(
        State(0, start), updates
    )
    step = 1 / secure_of(job, SCHEMA).grid.scale
    for name, array in plain.arrays.items():
        np.testing.assert_allclose(state.arrays[name], array, atol=step + 1e-7, rtol=0)
    assert any(not np.array_equal(state.arrays[n], start[n]) for n in start)
    assert report.clients == told.clients == tuple(NAMES) and state.round == 1
    assert report.metrics["loss"] == (pytest.approx(0.75 * 6, abs=1e-3), 6.0)
    assert report.metrics["accuracy"] == (pytest.approx(3.0, abs=1e-3), 6.0)


def test_a_long_update_is_clipped_and_a_high_loss_capped():
    job, start = parse_job("", PLAIN), {n: np.zeros_like(a) for n, a in model().items()}
    far = [
        update(name, start, 1, size=50.0, metrics={"loss": (900.0, 3.0), "accuracy": (0.0, 3.0)})
        for name in NAMES
    ]
    state, report = algorithm(job).step(State(0, start), far)
    assert np.sqrt(sum(float((a.astype(float) ** 2).sum()) for a in state.arrays.values())) == pytest.approx(
        2.0, abs=1e-4
    )
    assert report.metrics["loss"] == (pytest.approx(60.0, abs=1e-2), 6.0)


def test_each_unit_is_the_mean_of_those_who_trained_it():
    job, start = parse_job("", PLAIN), model()
    units = [("low",), ("low",), ("high",), ("low", "high"), (), ("low",)]
    updates = [update(name, start, i + 1, u, metrics={}) for i, (name, u) in enumerate(zip(NAMES, units))]
    state, report = algorithm(job).step(State(0, start), updates)
    step = 1 / secure_of(job, SCHEMA).grid.scale
    for tensor in SCHEMA.tensors:
        mean = np.mean([u.arrays[tensor.name] for u in updates if tensor.name in u.arrays], 0)
        np.testing.assert_allclose(state.arrays[tensor.name], mean, atol=2 * step + 1e-6, rtol=0)
    assert report.metrics == {}
    only_low, _ = algorithm(job).step(State(0, start), [update(name, start, 1, ("low",)) for name in NAMES])
    np.testing.assert_array_equal(only_low.arrays["c"], start["c"])


@pytest.mark.parametrize("settings", [PLAIN, CLIENT, EXAMPLE], ids=["plain", "client", "example"])
def test_of_drawn_units_the_sum_is_the_plain_mean_and_the_rest_stays(settings):
    """All clients train the same block of three and the head: the mean over those in the sum, or over the
    cohort where clients are protected.
    """
    schema = Schema(
        (
            *(TensorSpec(f"{i}.w", (40, 30), f"block.{i}") for i in range(3)),
            TensorSpec("head.b", (2,), "head"),
        )
    )
    job = parse_job("", [*settings, "units.strategy=lisa", "units.budget=1"])
    made, start = (
        make_algorithm(job, schema),
        {t.name: np.full(t.shape, 0.5, np.float32) for t in schema.tensors},
    )
    state = State(0, start)
    for round in range(1, 4):
        (units,) = {a.units for a in made.plan(state, [ClientInfo(n, 5) for n in NAMES])}
        names = [t.name for t in schema.of_units(units)]
        assert len(units) == 2 and units[1] == "head"
        rng = np.random.default_rng(round)
        updates = [
            Update(
                n,
                round,
                {
                    t: state.arrays[t]
                    + np.float32(0.001) * rng.standard_normal(state.arrays[t].shape).astype(np.float32)
                    for t in names
                },
                5.0,
            )
            for n in NAMES[:5]
        ]
        after, report = made.step(state, updates)
        assert report.clients == tuple(NAMES[:5])
        protected, secure = settings is CLIENT, secure_of(job, schema)
        for name, array in state.arrays.items():
            if name not in names:
                assert after.arrays[name] is array
            elif protected:
                noise = (
                    after.arrays[name]
                    - array
                    - sum(u.arrays[name].astype(np.float64) - array for u in updates) / 6
                )
                # five shares of what the fewest make whole
                expected = np.sqrt(5 / secure.design.threshold) * 1.0 * 2.0 / 6
                assert name == "head.b" or noise.std() == pytest.approx(expected, rel=0.15)
            else:
                mean = np.mean([u.arrays[name].astype(np.float64) for u in updates], 0)
                np.testing.assert_allclose(
                    after.arrays[name], mean, atol=2 / secure.grid.scale + 1e-6, rtol=0
                )
        state = after


def test_below_the_threshold_the_model_stays():
    job, start = parse_job("", PLAIN), model()
    state, report = algorithm(job).step(State(0, start), [update(n, start, 1) for n in NAMES[:3]])
    assert state.arrays is start and state.round == 1
    assert report.clients == tuple(NAMES[:3]) and report.metrics == {}
    nobody, empty = algorithm(job).step(State(0, start), [])
    assert nobody.arrays is start and empty.clients == ()


@pytest.mark.parametrize("settings", [PLAIN, CLIENT, EXAMPLE])
@pytest.mark.parametrize("gone", [0, 1, 2])
def test_the_protocol_gives_the_same_sum(settings, gone):
    """Devices' vectors through masks and shares, up to the most drop-outs, against the simulation's step;
    a masked vector is not the vector.
    """
    job, start = parse_job("", settings), model()
    secure = secure_of(job, SCHEMA)
    terms = secure.terms(bytes(range(16)), 1)
    updates = {name: update(name, start, i + 1) for i, name in enumerate(NAMES)}
    vectors = {
        n: secure.vector(u.arrays, u.metrics, start, noise_of(job, 1, n, "sum")) for n, u in updates.items()
    }
    rounds, sent, bytes_up, bytes_down = (
        {n: ClientRound(terms, minimum=3) for n in NAMES},
        {},
        dict.fromkeys(NAMES, 0),
        dict.fromkeys(NAMES, 0),
    )

    def ask(stage, questions):
        for name, question in questions.items():
            bytes_down[name] += len(question) if stage != "keys" else 0
            if name in NAMES[:gone] and stage in ("masked", "unmask"):
                yield name, None
                continue
            answer = getattr(rounds[name], stage)(question, *([vectors[name]] if stage == "masked" else []))
            bytes_up[name] += len(answer)
            if stage == "masked":
                sent[name] = answer[28:]
            yield name, answer

    found = run_round(ServerRound(terms, NAMES, secure.design), ask)
    assert set(found.clients) == set(NAMES[gone:])
    np.testing.assert_array_equal(found.vector, sum_plainly((vectors[n] for n in found.clients), terms))
    assert all(sent[n] != vectors[n].tobytes() for n in sent)
    ours, told = algorithm(job).settle(State(0, start), found.vector, found.clients)
    theirs, _ = algorithm(job).step(State(0, start), [updates[n] for n in found.clients])
    assert told.clients == found.clients
    for name, array in theirs.arrays.items():
        np.testing.assert_array_equal(ours.arrays[name], array)
    if not gone:
        assert {(bytes_up[n], bytes_down[n]) for n in NAMES} == {message_bytes(secure, 6)}


def test_protected_clients_are_divided_by_the_cohort_and_carry_noise():
    schema = Schema((TensorSpec("w", (200, 100), "low"),))
    job, start = parse_job("", CLIENT), {"w": np.zeros((200, 100), np.float32)}
    secure = secure_of(job, schema)
    change = np.full((200, 100), 1.0 / np.sqrt(20_000), np.float32)  # of norm 1, below the clip of 2
    four = secure.design.threshold
    assert four == 4 and not secure.scores
    state, report = algorithm(job, schema).step(
        State(0, start), [Update(n, 1, {"w": change}, 1.0, {"loss": (1.0, 1.0)}) for n in NAMES[:four]]
    )
    assert report.metrics == {}
    noise = state.arrays["w"] - 4 * change / 6
    # z C / cohort with exactly the fewest survivors
    assert noise.std() == pytest.approx(1.0 * 2.0 / 6, rel=0.03)
    assert abs(noise.mean()) < 6 * noise.std() / np.sqrt(noise.size)


@pytest.mark.parametrize(
    "changes, message",
    [
        (["privacy.clip=0.0"], "privacy.clip = 0: secure-aggregation needs the L2 bound"),
        (["federation.weighting=examples"], "counts all clients alike"),
        (["federation.cohort=2"], "federation.cohort = 2: at least 3"),
        (["federation.sampling=poisson"], "federation.sampling"),
        (["adapter.init=gradient"], "sends single gradients in the clear"),
        (["privacy.update-clip=1.0"], "privacy.update-clip = 1: only for unit"),
        (["privacy.epsilon=3.0"], "protects nothing"),
        (
            [*CLIENT, "privacy.amplification=true"],
            "privacy.amplification = true: not with secure-aggregation",
        ),
        (
            [*CLIENT, "privacy.adaptive-clip=true"],
            "privacy.adaptive-clip = true: not with secure-aggregation",
        ),
        ([*CLIENT, "privacy.metrics-noise=3.0"], "privacy.metrics-noise = 3.0: not with secure-aggregation"),
        ([*EXAMPLE, "privacy.update-clip=0.0"], "needs the L2 bound of an update, as clip bounds gradients"),
        (
            [
                "privacy.secure-aggregation=false",
                "privacy.clip=0.0",
                "privacy.noise=system",
                "privacy.update-clip=1.0",
            ],
            "only for secure-aggregation",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(changes, message):
    with pytest.raises(JobError) as e:
        parse_job("", [*PLAIN, *changes])
    (line,) = [p for p in e.value.problems if message in p]
    assert "\n" not in line


def test_what_wraps_around_or_has_no_noise_is_refused():
    with pytest.raises(PrivacyRefused, match="a cohort of 40000, must be 2 to 32768"):
        secure_of(parse_job("", [*PLAIN, "federation.cohort=40000", "data.clients=50000"]), SCHEMA)
    with pytest.raises(PrivacyRefused, match="was not computed before the rounds began"):
        secure_of(parse_job("", [*CLIENT, "privacy.noise-multiplier=0.0", "privacy.epsilon=5.0"]), SCHEMA)
    assert secure_of(parse_job("", ()), SCHEMA) is None


def test_whole_runs_on_every_engine_are_alike(tiny_job, run_rounds, tmp_path):
    settings = (*PLAIN, "federation.cohort=4")
    plain = run_rounds(tiny_job("federation.weighting=equal", "federation.cohort=4"), tmp_path / "plain").run
    runs = [
        run_rounds(tiny_job(*settings, f"simulation.engine={engine}"), tmp_path / engine).run
        for engine in ("vectorised", "serial")
    ]
    first = runs[0].newest()
    for run in runs:
        for name, array in run.newest().state.arrays.items():
            np.testing.assert_allclose(array, first.state.arrays[name], atol=1e-4, rtol=0)
            np.testing.assert_allclose(array, plain.newest().state.arrays[name], atol=2e-3, rtol=0)
        assert run.newest().counters == first.counters
        lines, others = run.metrics(), plain.metrics()
        assert [line["train_loss"] for line in lines[1:]] == pytest.approx(
            [line["train_loss"] for line in others[1:]], abs=0.1
        )
        assert lines[-1]["up"] > 0.9 * others[-1]["up"] and lines[-1]["refused"] == {}


@pytest.mark.parametrize("settings, mechanism", [(CLIENT, "distributed"), (EXAMPLE, "gaussian")])
def test_protected_runs_write_what_they_release(settings, mechanism, tiny_job, run_rounds, tmp_path):
    job = resolved(tiny_job(*settings, "federation.cohort=4", "federation.rounds=2"), 6)
    run = run_rounds(job, tmp_path / "run").run
    events = [read(e.facts) for e in Ledger(run.ledger).events()]
    assert [e.mechanism for e in events] == [mechanism] * 2
    assert all((e.excess > 0) == (mechanism == "distributed") for e in events)
    assert all(line["train_loss"] is None for line in run.metrics())
    end = run.newest().state.arrays
    assert any(not np.array_equal(run.first_arrays()[n], end[n]) for n in end)


def test_a_simulated_round_below_the_threshold_is_void_and_the_run_goes_on(tiny_job, run_rounds, tmp_path):
    lossy = '[{ name = "phone", share = 1.0, drop-out = 0.5 }]'
    run = run_rounds(
        tiny_job(*PLAIN, "federation.cohort=4", "federation.rounds=8", f"simulation.devices={lossy}"),
        tmp_path / "run",
    ).run
    lines = run.metrics()[1:]
    void = [line for line in lines if not line["clients"]]
    assert void and len(void) < len(lines) == 8
    assert all(len(line["clients"]) >= 3 for line in lines if line["clients"])
    assert any("a secure sum needs 3" in why for line in void for why in line["refused"].values())


def test_the_randomness_is_its_own():
    job = parse_job("", PLAIN)
    one = noise_of(job, 1, "x", "sum").uniform(3)
    assert not np.array_equal(one, noise_of(job, 1, "x").uniform(3))
    np.testing.assert_array_equal(one, SeededNoise(generator(0, "sum", 1, "x")).uniform(3))
    assert not noise_of(job, 1, "x", "sum").private
