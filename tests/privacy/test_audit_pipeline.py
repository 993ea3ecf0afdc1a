"""The audit on the real pipeline: a right mechanism stays below its claim, each broken one is caught.

Where a mechanism is broken its own checks are switched off, so that the audit alone has to catch it. Noise is
seeded, so that each case gives the same figures every time; the slow tests go over several seeds.
"""

import csv
import json
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from fedtune.cli.main import app
from fedtune.errors import PrivacyRefused, UserError
from fedtune.privacy.clipping import flat_norm
from fedtune.privacy.distributed import Distributed
from fedtune.privacy.example import SelfCheck
from fedtune.privacy.noise import SeededNoise
from fedtune.training import cohort, private
from fedtune.workflows.audit import audit

pytestmark = pytest.mark.slow

DP_FED_AVG = sys.modules["fedtune.algorithms.dp_fed_avg"]  # of this name the package has a function
COMMON = (
    "federation.weighting=equal",
    "data.partition=iid",
    "adapter.rank=16",
    "federation.rounds=1",
    "privacy.noise-multiplier=2.0",
    "privacy.clip=0.05",
    "privacy.delta=1e-5",
    "privacy.noise=seeded",
)
EXAMPLE = (
    *COMMON,
    "privacy.unit=example",
    "data.clients=8",
    "federation.cohort=8",
    "federation.local-steps=1",
    "privacy.examples=8",
)
"""One step of all examples: the plain Gaussian mechanism with mu = 1/2, so that canaries can show most."""
ENGINES = ("vectorised", "serial")
CLAIM = 1.993
"""Epsilon of it at delta = 1e-5, exactly."""


@pytest.fixture(scope="session")
def crowd(tmp_path_factory):
    """crowd(clients, ...) -> settings of a job with as many clients, of two texts each,
    who are all asked in its only round.
    """
    folder = tmp_path_factory.mktemp("crowd")

    def make(clients, *more):
        path = folder / f"{clients}.csv"
        with path.open("w", newline="") as file:
            csv.writer(file).writerows(
                [
                    ("id", "text", "label"),
                    *((row, "the film was fine", ("good", "bad")[row % 2]) for row in range(2 * clients)),
                ]
            )
        return (
            *COMMON,
            "privacy.unit=client",
            f"data.source={path}",
            f"data.clients={clients}",
            f"federation.cohort={clients}",
            *more,
        )

    return make


@pytest.fixture
def unchecked(monkeypatch):
    """Switches off what the mechanisms check of themselves."""
    monkeypatch.setattr(SelfCheck, "require", lambda *_: None)
    monkeypatch.setattr(
        DP_FED_AVG,
        "drawn_noise",
        lambda model, sigma, source: {name: sigma * source.normal(*a.shape) for name, a in model.items()},
    )


@pytest.fixture
def half_the_noise(monkeypatch, unchecked):
    monkeypatch.setattr(SeededNoise, "normal", lambda self, *shape: 0.5 * self.rng.standard_normal(shape))


@pytest.fixture
def no_clipping(monkeypatch, unchecked):
    for place in (private, cohort):
        monkeypatch.setattr(place, "clipped", lambda flat, bound, check: flat)
    monkeypatch.setattr(DP_FED_AVG, "clipped", lambda arrays, bound: (arrays, flat_norm(arrays)))


@pytest.fixture
def weights_believed(monkeypatch):
    """A client that says it holds five examples counts five times."""
    once = DP_FED_AVG._Sums.add

    def add(self, update, model, bound):
        for _ in range(round(update.weight)):
            once(self, update, model, bound)

    monkeypatch.setattr(DP_FED_AVG._Sums, "add", add)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_right_mechanism_stays_below_its_claim(engine, tiny_job):
    found = audit(tiny_job(*EXAMPLE, f"simulation.engine={engine}"), canaries=20_000, seed=1)
    assert found.claimed == pytest.approx(CLAIM, rel=1e-3) and found.verdict == "consistent"
    assert 0.8 < found.outcome.lower < found.claimed and found.outcome.lower == pytest.approx(
        found.expected, abs=0.4
    )
    assert (
        found.outcome.made == found.outcome.guesses
        and found.rounds == 1.0
        and found.halved > CLAIM
        and len(found.notes) == 1
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_half_the_noise_is_caught(engine, tiny_job, half_the_noise):
    found = audit(tiny_job(*EXAMPLE, f"simulation.engine={engine}"), canaries=20_000, seed=1)
    assert found.verdict == "VIOLATION"
    assert found.outcome.lower == pytest.approx(found.halved, abs=0.4)
    with pytest.raises(
        PrivacyRefused, match=r"epsilon is at least 2\.\d+ with 95% confidence, the job claims 1.993"
    ):
        found.require_consistent()


@pytest.mark.parametrize("strategy", ["top", "bottom"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_part_of_the_model_is_audited_in_its_own_directions(
    engine, strategy, tiny_job, monkeypatch, unchecked
):
    job = tiny_job(*EXAMPLE, f"simulation.engine={engine}", f"units.strategy={strategy}", "units.budget=1")
    right = audit(job, canaries=8000, seed=1)
    assert right.verdict == "consistent" and 0.5 < right.outcome.lower < right.claimed == pytest.approx(
        CLAIM, rel=1e-3
    )
    monkeypatch.setattr(SeededNoise, "normal", lambda self, *shape: 0.5 * self.rng.standard_normal(shape))
    broken = audit(job, canaries=8000, seed=1)
    assert broken.verdict == "VIOLATION" and broken.outcome.lower == pytest.approx(broken.halved, abs=0.5)


@pytest.mark.parametrize("strategy", ["both", "bottom"])
def test_clients_that_train_a_part_stay_below_their_claim(strategy, tiny_job, crowd, no_clipping, request):
    job = tiny_job(*crowd(1000), f"units.strategy={strategy}", "units.budget=1")
    assert audit(job, seed=1).verdict == "VIOLATION"
    request.getfixturevalue("monkeypatch").undo()
    right = audit(job, canaries=800, seed=1)
    assert right.verdict == "consistent" and 0.1 < right.outcome.lower < right.claimed


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_that_are_not_clipped_are_caught(engine, tiny_job, no_clipping):
    found = audit(tiny_job(*EXAMPLE, f"simulation.engine={engine}"), canaries=2000, seed=1)
    assert found.verdict == "VIOLATION" and found.outcome.correct == found.outcome.guesses


def test_many_sampled_steps_and_any_optimizer(tiny_job):
    """Batches are drawn, AdamW is run and metrics are sent: canaries are asked in every round
    and still say something.
    """
    sampled = (
        "privacy.examples=32",
        "federation.local-steps=4",
        "federation.rounds=3",
        "federation.optimizer=adamw",
        "privacy.noise-multiplier=0.8",
        "privacy.metrics-noise=5",
    )
    found = audit(tiny_job(*EXAMPLE, *sampled), canaries=8000, seed=1)
    assert found.verdict == "consistent" and 0.3 < found.outcome.lower < found.claimed
    assert found.rounds == found.charged == 3 and found.expected < found.halved < found.claimed
    assert any("violation could have been shown" in note for note in found.notes)  # at this epsilon


def test_clients_stay_below_their_claim(tiny_job, crowd):
    found = audit(tiny_job(*crowd(1200)), canaries=1000, seed=1)
    assert (
        found.unit == "client" and found.verdict == "consistent" and 0.2 < found.outcome.lower < found.claimed
    )


def test_updates_that_are_not_clipped_are_caught(tiny_job, crowd, no_clipping):
    assert audit(tiny_job(*crowd(1000)), seed=1).verdict == "VIOLATION"


def test_weights_that_are_believed_are_caught(tiny_job, crowd, weights_believed):
    assert audit(tiny_job(*crowd(1000)), seed=1).verdict == "VIOLATION"


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True])
def test_noise_that_clients_share(broken, tiny_job, crowd, monkeypatch):
    """Under secure aggregation each adds its part of the noise. Without it next to nothing hides a canary."""
    if broken:
        monkeypatch.setattr(
            Distributed, "shares", lambda self, exact, source: np.rint(exact).astype(np.int64)
        )
    found = audit(tiny_job(*crowd(300, "privacy.secure-aggregation=true")), seed=1)
    assert (found.verdict == "VIOLATION") == broken and found.outcome.made == found.outcome.guesses


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True])
def test_half_the_noise_on_the_mean_is_caught(broken, tiny_job, crowd, request):
    if broken:
        request.getfixturevalue("half_the_noise")
    found = audit(tiny_job(*crowd(10_000, "adapter.rank=32")), seed=1)
    assert (found.verdict == "VIOLATION") == broken and found.outcome.canaries == 10_000


@pytest.mark.slow
@pytest.mark.parametrize(("sampling", "multiplier"), [("fixed", 4.0), ("poisson", 1.5)])
def test_clients_whose_draw_is_secret(sampling, multiplier, tiny_job, crowd):
    """Nobody knows who was asked, so nothing is used of it; of a fixed number,
    what is out pulls the other way.
    """
    secret = (
        "privacy.amplification=true",
        f"federation.sampling={sampling}",
        "federation.cohort=300",
        "federation.rounds=4",
        f"privacy.noise-multiplier={multiplier}",
    )
    found = audit(tiny_job(*crowd(1000, *secret)), seed=1)
    assert found.verdict == "consistent" and found.outcome.made == found.outcome.guesses


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True])
def test_half_the_noise_is_caught_through_sampling(broken, tiny_job, request):
    """Thirty steps that take each example with chance 1/10."""
    if broken:
        request.getfixturevalue("half_the_noise")
    sampled = (
        "privacy.examples=80",
        "federation.local-steps=10",
        "federation.rounds=3",
        "privacy.noise-multiplier=1.5",
    )
    found = audit(tiny_job(*EXAMPLE, *sampled), canaries=20_000, seed=1)
    assert (found.verdict == "VIOLATION") == broken and found.claimed == pytest.approx(2.01, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True])
def test_over_several_seeds(broken, tiny_job, request):
    if broken:
        request.getfixturevalue("half_the_noise")
    found = [
        audit(tiny_job(*EXAMPLE, f"federation.seed={seed}"), canaries=20_000, seed=seed) for seed in range(4)
    ]
    assert (
        sum(one.verdict == "VIOLATION" for one in found) >= 3
        if broken
        else all(one.verdict == "consistent" for one in found)
    )


def test_what_a_client_holds_back_is_not_seen(tiny_job, monkeypatch):
    """With its own checks on, a mechanism of half the noise sends nothing,
    and there is nothing to find in what it sent.
    """
    monkeypatch.setattr(SeededNoise, "normal", lambda self, *shape: 0.5 * self.rng.standard_normal(shape))
    with pytest.raises(PrivacyRefused, match=r"no update left any client .*the noise measured"):
        audit(tiny_job(*EXAMPLE), canaries=100, seed=1)


def test_mislabelled_texts_from_outside(tiny_job):
    found = audit(tiny_job(*EXAMPLE), kind="input", seed=1)
    assert (
        found.verdict == "consistent"
        and found.rounds is None
        and "asks the model at the start and at the end" in found.attacker
    )
    assert found.outcome.canaries == 96 and found.outcome.lower < 0.5


@pytest.mark.slow
def test_texts_that_are_learnt_by_heart_are_found(tiny_job, unchecked, monkeypatch):
    """Hardly any noise, and one client that goes over its data a hundred times:
    even from outside most guesses are right.
    """
    monkeypatch.setattr(SeededNoise, "normal", lambda self, *shape: 1e-3 * self.rng.standard_normal(shape))
    learnt = (
        "privacy.clip=0.5",
        "data.clients=1",
        "federation.cohort=1",
        "federation.local-steps=100",
        "federation.local-epochs=100",
        "federation.lr=0.01",
        "privacy.i-understand=true",
    )
    found = audit(tiny_job(*EXAMPLE, *learnt), kind="input", canaries=60, guesses=20, seed=0)
    assert found.outcome.correct >= 16


@pytest.mark.parametrize(
    ("changes", "options", "said"),
    [
        ((), {}, 'privacy.unit = "none": such a job promises nothing'),
        ((*EXAMPLE, "simulation.engine=ray"), {}, 'use "vectorised" or "serial"'),
        (
            (*EXAMPLE, "adapter.rank=4"),
            {"canaries": 10_000},
            (
                "--canaries 10000: at most 2,048, as 8 clients are asked, of whose "
                "gradients each has 256 directions"
            ),
        ),
        (
            (*EXAMPLE, "units.strategy=lisa", "units.budget=1"),
            {},
            (
                r'units\.strategy = "lisa": .* keep their directions from round to round; '
                r'use "all", "top", "bottom" or "both"'
            ),
        ),
        (
            (
                *EXAMPLE,
                "units.strategy=top",
                "units.budget=1",
                'simulation.devices=[{name = "a", units = 2}]',
            ),
            {},
            "simulation.devices: classes that train unlike numbers of blocks",
        ),
        (EXAMPLE, {"canaries": 100, "guesses": 101}, "--guesses 101: there are 100 canaries"),
    ],
)
def test_what_cannot_be_audited_is_said(changes, options, said, tiny_job):
    with pytest.raises(UserError, match=said):
        audit(tiny_job(*changes), seed=1, **options)


def test_input_canaries_are_examples(tiny_job, crowd):
    with pytest.raises(UserError, match=r'canaries are examples, but privacy\.unit = "client"'):
        audit(tiny_job(*crowd(10)), kind="input")


def invoke(tiny_settings, *options):
    settings = [word for setting in (*tiny_settings, *EXAMPLE) for word in ("--set", setting)]
    return CliRunner().invoke(
        app, ["privacy", "audit", *settings, *options], env={"COLUMNS": "200", "NO_COLOR": "1"}
    )


def test_the_command_prints_a_table_or_json(tiny_settings):
    shown = invoke(tiny_settings, "--canaries", "200", "--seed", "3")
    assert (
        shown.exit_code == 0
        and "consistent" in shown.stdout
        and "no violation could have been shown" not in shown.stdout
    )
    said = json.loads(invoke(tiny_settings, "--canaries", "200", "--seed", "3", "--json").stdout)
    assert (
        said["verdict"] == "consistent"
        and said["canaries"] == said["made"] + said["abstained"] == 200
        and said["seed"] == 3
    )
    assert f"{said['lower']:.3f}" in shown.stdout and said["claimed"] > said["lower"]


def test_the_command_ends_with_4_for_a_violation(tiny_settings, no_clipping):
    shown = invoke(tiny_settings, "--canaries", "2000", "--seed", "3")
    assert (
        shown.exit_code == 4
        and "VIOLATION" in shown.stdout
        and "fedtune: audit: epsilon is at least" in shown.stderr
    )
