"""A frame from noisy gradients: one release, charged beside the rounds, of the size that was promised,
on every engine alike.
"""

import math

import dp_accounting as dp
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from fedtune.client.budget import Budget
from fedtune.client.policy import Policy
from fedtune.common.trees import digest
from fedtune.errors import JobError, Refused, RunError, UserError
from fedtune.job import parse_job
from fedtune.privacy.account import assumptions
from fedtune.privacy.plan import plan_of, resolved
from fedtune.privacy.releases import read
from fedtune.round.gradient_init import gather_gradients, gradient_schema, init_warnings
from fedtune.round.replies import Reply
from fedtune.runs.folder import create_run, open_run
from fedtune.runs.ledger import Ledger
from fedtune.wire import Schema, encode
from fedtune.workflows.audit import audit
from fedtune.workflows.privacy import privacy_of
from fedtune.workflows.setup import open_setup

INIT = (
    "adapter.init=gradient-dp",
    "adapter.init-clients=3",
    "adapter.init-examples=40",
    "adapter.init-step=0.01",
    "federation.weighting=equal",
    "privacy.noise=seeded",
)
EXAMPLE = (
    *INIT,
    "privacy.unit=example",
    "privacy.noise-multiplier=2.0",
    "privacy.clip=0.5",
    "privacy.examples=160",
    "privacy.init-noise=3.0",
    "privacy.init-clip=0.25",
)
CLIENT = (*INIT, "privacy.unit=client", "privacy.noise-multiplier=3.0", "privacy.clip=0.5")
SAMPLED = (*CLIENT, "privacy.amplification=true", "federation.sampling=poisson")
REQUEST = encode("gradient-request", Schema(()), {}, round=0)


@pytest.mark.parametrize(
    "changes",
    [EXAMPLE, (*EXAMPLE, "privacy.participations=2"), CLIENT, SAMPLED],
    ids=["example", "example, budget", "client", "client, sampled"],
)
def test_engines_agree_and_the_ledger_has_the_release_first(changes, tiny_job, run_rounds, tmp_path):
    serial, fast = (
        run_rounds(tiny_job(f"simulation.engine={engine}", *changes), tmp_path / engine).run
        for engine in ("serial", "vectorised")
    )
    events = [(e.round, read(e.facts)) for e in Ledger(serial.ledger).events()]
    assert events == [(e.round, read(e.facts)) for e in Ledger(fast.ledger).events()]
    round, first = events[0]
    assert (
        round == 0
        and first.release == "gradients"
        and len(first.names) == 3
        and first.mechanism == "gaussian"
    )
    assert first.parts == {"init": 3.0} and (first.sampling, first.rate, first.clip) == (
        ("poisson", 0.25, 0.25) if changes[: len(EXAMPLE)] == EXAMPLE else ("none", 1.0, 0.5)
    )
    assert [round for round, _ in events] == [
        0,
        1,
        2,
        3,
    ] and serial.newest().counters == fast.newest().counters
    one, two = serial.newest().state, fast.newest().state
    for name, array in one.arrays.items():
        np.testing.assert_allclose(two.arrays[name], array, atol=1e-4, rtol=0)
    assert (serial.bundle / "frame.safetensors").read_bytes() == (
        fast.bundle / "frame.safetensors"
    ).read_bytes()


def ours(*changes, population=0, noise="system"):
    job = parse_job("", [*changes, f"privacy.noise={noise}"])
    return plan_of(job, population)


@pytest.mark.parametrize("accountant", [PLDAccountant, RdpAccountant])
def test_epsilon_is_what_dp_accounting_composes(accountant):
    """The plan's promise, composed here from the numbers of the job and nothing else of ours."""
    example, client = (
        ours(*EXAMPLE),
        ours(*SAMPLED, "data.clients=1000", "federation.cohort=50", population=1000),
    )
    found = [(example, [(0.25, 3.0, 1), (0.1, 2.0, 10 * 10)]), (client, [(1.0, 3.0, 1), (0.05, 3.0, 10)])]
    name = "pld" if accountant is PLDAccountant else "rdp"
    for plan, parts in found:
        theirs = (
            accountant(value_discretization_interval=1e-3) if accountant is PLDAccountant else accountant()
        )
        for rate, z, count in parts:
            gaussian = dp.GaussianDpEvent(z)
            theirs.compose(
                dp.SelfComposedDpEvent(
                    dp.PoissonSampledDpEvent(rate, gaussian) if rate < 1 else gaussian, count
                )
            )
        assert dict(plan.reading().by)[name] == pytest.approx(theirs.get_epsilon(plan.delta), rel=1e-6)


@pytest.mark.parametrize(
    "changes",
    [pytest.param(EXAMPLE, marks=pytest.mark.slow, id="example"), pytest.param(CLIENT, id="client")],
)
def test_epsilon_that_is_asked_for_pays_for_frame_and_rounds(changes):
    asked = [c for c in changes if "noise" not in c]
    plan = ours(*asked, "privacy.epsilon=4.0", population=100)
    assert 3.95 < plan.reading().epsilon <= 4.0 and plan.init_noise == plan.parts["update"]
    bare = ours(*[c for c in asked if "init" not in c], "privacy.epsilon=4.0", population=100)
    assert bare.parts["update"] < plan.parts["update"]
    dear = ours(*asked, "privacy.epsilon=4.0", "privacy.init-noise=20.0", population=100)
    assert bare.parts["update"] <= dear.parts["update"] < plan.parts["update"] and dear.init_noise == 20.0
    kept = resolved(plan.job, 100).privacy
    assert (kept.init_noise, kept.init_clip) == (plan.init_noise, 0.25 if changes is EXAMPLE else 0.5)
    assert any("Frame: made from one noisy sum" in text for text in assumptions(plan))


def exchange(schema, value):
    """Every client answers with gradients of this value."""

    def ask(pairs):
        for client, packet in pairs:
            assert packet == REQUEST
            arrays = {t.name: np.full(t.shape, value, np.float32) for t in schema.tensors}
            yield Reply(client, encode("gradient", schema, arrays, round=0, weight=500.0))

    return ask


def gathered(tiny_job, folder, value, *changes):
    """What is released as the coordinator has it, [numbers],
    for clients whose gradients are all of this value.
    """
    setup = open_setup(tiny_job(*CLIENT, *changes))
    plan, schema = plan_of(setup.job, 6), gradient_schema(setup.spec)
    found, _ = gather_gradients(
        setup.job,
        setup.spec,
        create_run(folder, setup.job, {}),
        setup.store.clients,
        exchange(schema, value),
        plan,
    )
    return np.concatenate([a.ravel() for a in found.values()])


@pytest.mark.parametrize("source", ["system", "seeded"])
def test_no_gradient_in_noise_of_the_promised_size_out_of_clients(source, tiny_job, tmp_path):
    noise = gathered(tiny_job, tmp_path / "run", 0.0, f"privacy.noise={source}") * 3
    assert noise.std() == pytest.approx(3.0 * 0.5, rel=0.03) and abs(noise.mean()) < 0.05


def test_a_client_counts_once_and_as_much_as_the_clip(tiny_job, tmp_path):
    """A thousand times the clip, and a weight of 500: the sum of three is three clips
    long, besides its noise.
    """
    hidden = gathered(tiny_job, tmp_path / "one", 0.0)
    moved = (gathered(tiny_job, tmp_path / "two", 1e3) - hidden) * 3
    assert np.linalg.norm(moved) == pytest.approx(3 * 0.5, rel=1e-3)


def test_nobody_answers_and_nobody_can_tell(tiny_job, tmp_path):
    setup = open_setup(tiny_job(*CLIENT))
    found, _ = gather_gradients(
        setup.job,
        setup.spec,
        create_run(tmp_path / "run", setup.job, {}),
        setup.store.clients,
        lambda pairs: iter(()),
        plan_of(setup.job, 6),
    )
    assert all(a.std() > 0 for a in found.values())


@pytest.fixture
def answered(tiny_job, run_rounds, tmp_path):
    """answered(changes) -> (what a client sends [numbers], times its public number of
    examples; how many it has).
    """
    from fedtune.data.encoded import ClientData
    from fedtune.training.worker import Worker
    from fedtune.wire import decode

    def ask(*changes, empty=False):
        setup = open_setup(tiny_job(*EXAMPLE, *changes))
        data = setup.store.train(setup.split.clients[0])
        # those of two labels nearly cancel
        data = ClientData([], np.zeros(0, np.int64)) if empty else data.take(np.flatnonzero(data.labels == 0))
        packet = Worker(setup.job, setup.spec, setup.fresh_model(), setup.encoder, dict).handle(
            REQUEST, "c", data
        )
        decoded = decode(packet, gradient_schema(setup.spec), kinds=["gradient"])
        assert decoded.header.weight == 1.0 and not decoded.header.metrics
        return decoded.arrays.vector * 40, len(data)

    return ask


@pytest.mark.parametrize("source", ["system", "seeded"])
def test_no_examples_in_noise_of_the_promised_size_out_of_a_client(source, answered):
    noise, _ = answered(f"privacy.noise={source}", empty=True)
    assert noise.std() == pytest.approx(3.0 * 0.25, rel=0.03) and abs(noise.mean()) < 0.03


def test_an_example_counts_as_much_as_the_clip(answered):
    """All examples are drawn, and nearly without noise the sum is at most as long as so many clips, and
    longer than the whole batch cut to one.
    """
    total, n = answered(
        "privacy.examples=40",
        "privacy.init-noise=0.001",
        "privacy.init-clip=1e-5",
        "privacy.i-understand=true",
    )
    assert 2e-5 < np.linalg.norm(total) <= n * 1e-5 * 1.01


def test_a_mechanism_of_less_noise_sends_nothing(answered, monkeypatch):
    from fedtune.privacy.noise import SeededNoise

    monkeypatch.setattr(SeededNoise, "normal", lambda self, *shape: 0.9 * self.rng.standard_normal(shape))
    with pytest.raises(Refused, match=r"the noise measured 0\.68.* 0\.75 was promised; nothing was sent"):
        answered()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("adapter.init=gradient-dp",), r'privacy.unit = "none" has no noise for it'),
        ((*EXAMPLE, "adapter.method=lora"), r'adapter.init = "gradient-dp": only for method = "fed-sb"'),
        (
            (*EXAMPLE, "privacy.secure-aggregation=true", "privacy.update-clip=1.0"),
            "sends single gradients in the clear",
        ),
        ((*CLIENT, "privacy.secure-aggregation=true"), "sends single gradients in the clear"),
        ((*CLIENT, "privacy.amplification=true"), 'use "poisson"'),
        (
            (*EXAMPLE, "adapter.init=weights"),
            r'privacy.init-noise = 3.0: only for adapter.init = "gradient-dp"; remove it',
        ),
    ],
)
def test_what_it_cannot_protect_is_refused(changes, said):
    with pytest.raises(JobError, match=said):
        parse_job("", changes)


def test_an_audit_says_what_it_does_not_see(tiny_job):
    with pytest.raises(UserError, match='audit the job with init = "weights"'):
        audit(tiny_job(*EXAMPLE), seed=1)


def test_a_ledger_without_the_release_claims_nothing(tiny_job, run_rounds, tmp_path):
    run = run_rounds(tiny_job(*EXAMPLE, "privacy.noise=system", "federation.rounds=1"), tmp_path / "run").run
    found = privacy_of(open_run(run.path), ("pld", "rdp"))
    assert (
        found["parts"].keys() == {"init", "update"}
        and 0 < found["parts"]["init"] < found["epsilon"] < math.inf
    )
    kept = [(e.round, e.facts) for e in Ledger(run.ledger).events()]
    run.ledger.unlink()
    for round, facts in kept[1:]:
        Ledger(run.ledger).record(round, facts)
    with pytest.raises(RunError, match="has no event of round 0"):
        privacy_of(open_run(run.path), ("pld", "rdp"))


def test_a_device_lets_the_gradient_out_once_and_before_the_rounds(tmp_path):
    def budget():
        return Budget(tmp_path / "privacy", "ab" * 32, parse_job("", [*EXAMPLE, "privacy.participations=2"]))

    model = encode("model", Schema(()), {}, round=1)
    # killed before it answered: nothing had left
    assert budget().charge(REQUEST) is None and budget().charge(REQUEST) is None
    budget().keep(REQUEST, b"noisy")
    assert budget().charge(REQUEST) == b"noisy"
    with pytest.raises(Refused, match="left this device before"):
        budget().charge(encode("gradient-request", Schema(()), {}, round=0, weight=1.0))
    assert budget().charge(model) is None
    budget().keep(model, b"update")
    with pytest.raises(Refused, match="left this device before"):
        budget().charge(REQUEST)
    # two rounds, as the job says, beside it
    assert budget().charge(encode("model", Schema(()), {}, round=2)) is None
    with pytest.raises(Refused, match="budget of 2 rounds"):
        budget().charge(encode("model", Schema(()), {}, round=3))
    events = Ledger(budget().ledger).events()
    assert [(e.round, read(e.facts).release) for e in events] == [
        (0, "gradients"),
        (1, "updates"),
        (2, "updates"),
    ]


def test_a_policy_looks_at_the_weaker_noise(tiny_job):
    from types import SimpleNamespace

    job = tiny_job(*EXAMPLE, "privacy.init-noise=0.5")
    manifest = SimpleNamespace(sha256="a" * 64, task=job.model.task, spec=SimpleNamespace(method="fed-sb"))
    with pytest.raises(Refused, match=r"the job adds 0\.5, at least 1"):
        Policy.model_validate({"min-noise-multiplier": 1.0}).check(manifest, job)


def test_where_the_noise_covers_the_gradient_it_is_said(tiny_job):
    setup = open_setup(tiny_job(*EXAMPLE))
    (said,) = init_warnings(setup.spec, plan_of(setup.job, 6))
    assert "in 12 of 12 matrices the noise" in said and "raise adapter.init-examples" in said
    useful = tiny_job(*EXAMPLE, "adapter.init-examples=5000", "privacy.examples=5000")
    assert not list(init_warnings(setup.spec, plan_of(useful, 6)))
    assert not list(init_warnings(setup.spec, None)) and not list(
        init_warnings(
            setup.spec, plan_of(tiny_job(*EXAMPLE[len(INIT) : -2], "federation.weighting=equal"), 6)
        )
    )


def test_the_noise_has_the_spectral_norm_that_the_warning_counts_on():
    draw = np.random.default_rng(0)
    for m, n in ((32, 48), (96, 384), (20, 400)):
        norms = [np.linalg.norm(draw.standard_normal((m, n)), 2) for _ in range(5)]
        assert np.mean(norms) == pytest.approx(math.sqrt(m) + math.sqrt(n), rel=0.06)


def test_plan_and_calibrate_warn(tiny_job, tiny_settings):
    from fedtune.workflows.calibrate import make_calibration
    from fedtune.workflows.plan import make_plan

    job = tiny_job(*EXAMPLE, "privacy.noise=system")
    assert any("as good as random" in note for note in make_plan(job).notes)
    assert any("as good as random" in note for note in make_calibration(job, (3.0,)).warnings)


def test_the_frame_is_that_of_the_released_gradient(tiny_job, run_rounds, tmp_path):
    """With next to no noise it is the frame of the clipped gradient,
    and with another seed's noise another one.
    """
    frames = [
        run_rounds(
            tiny_job(
                *CLIENT,
                f"privacy.init-noise={z}",
                "privacy.init-clip=1000.0",
                "federation.rounds=1",
                "privacy.i-understand=true",
                f"federation.seed={seed}",
                "adapter.init-clients=6",
                "adapter.init-examples=1000",
            ),
            tmp_path / f"{z}-{seed}",
        ).run
        for z, seed in ((0.001, 0), (3.0, 0), (3.0, 1))
    ]
    from fedtune.bundles.bundle import open_bundle

    assert len({digest(open_bundle(run.bundle).frame) for run in frames}) == 3
