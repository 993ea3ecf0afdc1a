"""Forward-only training: directions are the same bits everywhere, a model is the sum of what its numbers
say, and a step is MeZO's.
"""

import json
from decimal import Decimal

import numpy as np
import pytest

from fedtune.bundles.bundle import open_bundle, receive_bundle
from fedtune.bundles.subspace import NAME, Subspace, order, signs, small, travelling
from fedtune.common.seeds import generator
from fedtune.errors import JobError, Refused
from fedtune.round.batches import local_batches
from fedtune.types import TensorSpec
from fedtune.wire import Schema, decode, encode
from fedtune.workflows.setup import open_setup

FORWARD = (
    "edge.mode=forward",
    "edge.directions=40",
    "federation.optimizer=sgd",
    "federation.lr=0.01",
    "simulation.engine=serial",
)
SCHEMA = Schema((TensorSpec("a", (3, 4), "block.0"), TensorSpec("b", (5,), "head")))


def philox(counter: int, key: tuple[int, int]) -> list[int]:
    """Four words of Philox4x64-10, from Salmon et al. 2011, section 3.3 and Table 1 of the Random123 sources.

    Slow and obvious.
    """
    word = 2**64 - 1
    c = [counter >> 64 * i & word for i in range(4)]
    k = list(key)
    for _ in range(10):
        low, high = c[0] * 0xD2E7470EE14C6C93, c[2] * 0xCA5A826395121157
        c = [high >> 64 ^ c[1] ^ k[0], high & word, low >> 64 ^ c[3] ^ k[1], low & word]
        k = [(k[0] + 0x9E3779B97F4A7C15) & word, (k[1] + 0xBB67AE8584CAA73B) & word]
    return c


def test_philox_gives_the_authors_known_answers():
    """kat_vectors of Random123."""
    assert philox(0, (0, 0)) == [
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    ]
    ones = 2**64 - 1
    assert philox(2**256 - 1, (ones, ones)) == [
        0x87B092C3013FE90B,
        0x438C3C67BE8D0224,
        0x9CC7D7C69CD777B6,
        0xA09CAEBF594F0BA0,
    ]


@pytest.mark.parametrize("seed, j, size", [(0, 0, 1), (0, 1, 64), (7, 3, 1000), (2**63 - 1, 999_999, 257)])
def test_signs_are_the_bits_of_philox(seed, j, size):
    words = [word for block in range(-(-size // 256)) for word in philox(block + 1, (seed, j))]
    bits = [words[i // 64] >> i % 64 & 1 for i in range(size)]
    found = signs(seed, j, size)
    assert found.dtype == np.float32 and found.tolist() == [2.0 * bit - 1.0 for bit in bits]


def test_a_model_is_its_start_and_the_sum_of_its_directions():
    rng = np.random.default_rng(0)
    start, numbers = rng.standard_normal(17).astype(np.float32), rng.standard_normal(50).astype(np.float32)
    numbers[rng.permutation(50)[:20]] = 0.0
    space = Subspace(SCHEMA, start, 50, seed=5)
    exact = [
        sum(
            (Decimal(float(a)) * int(space.direction(j)[i]) for j, a in enumerate(numbers)),
            Decimal(float(start[i])),
        )
        for i in range(17)
    ]
    found = space.expand(numbers)
    assert found.vector.dtype == np.float32 and {n: a.shape for n, a in found.items()} == {
        "a": (3, 4),
        "b": (5,),
    }
    assert found.vector.tolist() == [float(np.float32(float(x))) for x in exact]
    assert space.expand(np.zeros(50, np.float32)).vector.tobytes() == start.tobytes()


def test_the_mean_of_clients_numbers_is_the_mean_of_their_models():
    rng = np.random.default_rng(1)
    space = Subspace(SCHEMA, np.zeros(17, np.float32), 30, seed=1)
    clients, weights = rng.standard_normal((4, 30)).astype(np.float32), np.array([1, 2, 3, 4]) / 10
    models = np.stack([space.expand(a).vector for a in clients])
    np.testing.assert_allclose(
        space.expand((weights @ clients).astype(np.float32)).vector, weights @ models, rtol=0, atol=2e-6
    )


def test_a_share_moves_what_is_smallest_in_each_tensor():
    assert small(np.array([3.0, -1.0, 2.0, 0.0, -5.0]), 0.5).tolist() == [0, 1, 1, 1, 0]
    assert small(np.zeros(4), 0.5).tolist() == [1, 1, 0, 0] and small(np.ones(3), 0.01).sum() == 1
    start = np.arange(17, dtype=np.float32)
    space = Subspace(SCHEMA, start, 8, seed=0, share=0.25)
    moved = [[0, 1, 2], [12, 13]]
    for j in range(8):
        assert np.flatnonzero(space.direction(j)).tolist() == [*moved[0], *moved[1]] and set(
            np.abs(space.direction(j)[:3])
        ) == {1.0}
    assert np.array_equal(space.expand(np.ones(8, np.float32)).vector[3:12], start[3:12])


def test_a_client_takes_every_direction_before_one_comes_again():
    steps = order(Subspace(SCHEMA, np.zeros(17, np.float32), 6, 0), generator(0, "directions", 1, "c"))
    found = [next(steps) for _ in range(18)]
    assert all(sorted(found[i : i + 6]) == list(range(6)) for i in (0, 6, 12)) and found[:6] != found[6:12]


@pytest.mark.parametrize(
    "changes",
    [(), ("edge.share=0.5", "adapter.method=lora"), ("adapter.method=bias", "edge.perturbation=0.001")],
    ids=" ".join,
)
def test_a_round_is_mezo(changes, tiny_job, run_rounds, tmp_path):
    """One client's update against MeZO on torch parameters, written out with autograd's own loss."""
    import torch
    from torch.nn import functional as F

    from fedtune.adapters import methods

    simulation = run_rounds(tiny_job(*FORWARD, "federation.rounds=1", *changes), tmp_path / "run")
    bundle, job, setup = open_bundle(simulation.run.bundle), simulation.setup.job, simulation.setup
    client = setup.split.clients[0]
    sent = encode("model", bundle.schema, bundle.start, round=1, frame=bundle.frame_digest)
    update = decode(simulation.answer(sent, client), bundle.schema, kinds=["update"])
    data = setup.store.train(client)
    model = setup.fresh_model()
    parameters = methods.attach(model, setup.spec, bundle.frame)
    methods.write(parameters, bundle.initial)
    model.eval()

    def loss(index):
        batch = {
            k: torch.from_numpy(v) for k, v in setup.encoder.collate([data.encoded[i] for i in index]).items()
        }
        with torch.no_grad():
            return float(F.cross_entropy(model(**batch).double(), torch.from_numpy(data.labels[index])))

    def move(z, by):
        with torch.no_grad():
            for place, p in zip(
                np.split(z, np.cumsum([p.numel() for p in parameters.values()])[:-1]), parameters.values()
            ):
                p += by * torch.from_numpy(place.reshape(p.shape))

    space = bundle.subspace
    expected, eps = np.zeros(40), job.edge.perturbation
    steps = order(space, generator(job.federation.seed, "directions", 1, client))
    for index in local_batches(data.lengths, 8, 1, 0, generator(job.federation.seed, "local", 1, client)):
        j = next(steps)
        z = space.direction(j)
        move(z, eps)
        above = loss(index)
        move(z, -2 * eps)
        below = loss(index)
        move(z, eps)
        step = 0.01 * (above - below) / (2 * eps)
        move(z, -step)
        expected[j] -= step
    found = update.arrays[NAME]
    assert np.count_nonzero(found) == np.count_nonzero(expected) > 0
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-6)


def test_a_run_learns_and_sends_a_number_for_each_direction(tiny_job, run_rounds, tmp_path):
    simulation = run_rounds(
        tiny_job(
            *FORWARD,
            "federation.rounds=12",
            "federation.cohort=6",
            "federation.local-epochs=4",
            "federation.lr=0.05",
        ),
        tmp_path / "run",
    )
    lines = simulation.run.metrics()
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.01
    state = simulation.run.newest().state
    assert {n: a.shape for n, a in state.arrays.items()} == {NAME: (40,)}
    assert lines[-1]["up"] / (6 * 12) < 4 * 40 + 1024


def test_who_comes_late_has_the_model_of_who_was_there(tiny_job, run_rounds, tmp_path):
    """From what was shipped and the newest packet alone, bit for bit;
    the coordinator's own evaluation uses the same tensors.
    """
    simulation = run_rounds(tiny_job(*FORWARD), tmp_path / "run")
    bundle, state = open_bundle(simulation.run.bundle), simulation.run.newest().state
    shipped = bundle.shipped()
    assert set(shipped) == {"manifest.json", "job.toml", "frame.safetensors", "initial.safetensors"}
    assert bundle.frame_bytes == len(shipped["frame.safetensors"]) + len(shipped["initial.safetensors"])
    late = receive_bundle(tmp_path / "device", bundle.digest, shipped)
    packet = decode(
        encode("model", bundle.schema, state.arrays, round=4, frame=bundle.frame_digest),
        late.schema,
        kinds=["model"],
    )
    ours, theirs = bundle.trained(state.arrays), late.trained(packet.arrays)
    assert list(ours) == list(theirs) and all(ours[n].tobytes() == theirs[n].tobytes() for n in ours)
    for wrong in (
        {n: b for n, b in shipped.items() if n != "initial.safetensors"},
        shipped | {"initial.safetensors": shipped["frame.safetensors"]},
    ):
        with pytest.raises(Refused, match=r"its parts are not those that the manifest names"):
            receive_bundle(tmp_path / "other", bundle.digest, wrong)


def test_engines_and_resuming_agree(tiny_job, run_rounds, tmp_path):
    serial = run_rounds(tiny_job(*FORWARD), tmp_path / "serial").run.newest().state
    vectorised = run_rounds(tiny_job(*FORWARD[:-1]), tmp_path / "vectorised").run.newest().state
    assert serial.arrays[NAME].tobytes() == vectorised.arrays[NAME].tobytes()


@pytest.mark.parametrize(
    "change, message",
    [
        (
            "federation.optimizer=adamw",
            (
                r'edge\.mode = "forward": steps are of sgd with one learning rate, and optimizer = "adamw", '
                r'.*; set federation\.optimizer = "sgd"'
            ),
        ),
        ("federation.momentum=0.9", r"momentum = 0\.9"),
        ("federation.head-lr=0.1", r"head-lr = 0\.1"),
        ("federation.weight-decay=0.1", r"weight-decay = 0\.1"),
        ("federation.proximal=0.1", r"proximal = 0\.1"),
        (
            "adapter.init=gradient",
            r'devices compute no gradients, and adapter\.init = "gradient" asks for them; use "weights"',
        ),
        ("edge.mode=backward", r'edge\.directions = 40: only for edge\.mode = "forward"; remove it'),
        ("edge.directions=0", r"edge\.directions"),
        ("edge.share=0.0", r"edge\.share"),
        ("edge.perturbation=0.0", r"edge\.perturbation"),
    ],
)
def test_what_does_not_go_together_is_refused(change, message, tiny_job):
    with pytest.raises(JobError, match=message):
        tiny_job(*FORWARD, change)


def test_more_directions_than_can_be_rebuilt_are_refused(tiny_job):
    from fedtune.workflows.plan import make_plan

    with pytest.raises(
        JobError,
        match=(
            r"edge\.directions = 900000: rebuilding [0-9,]+ trained numbers .* at most 2e\+09 are borne; "
            r"lower it to \d+, or train less"
        ),
    ):
        make_plan(tiny_job(*FORWARD, "adapter.method=full", "edge.directions=900000"))


def test_example_level_privacy_is_refused(tiny_job):
    with pytest.raises(JobError, match=r'edge\.mode = "forward": bounds no single example\'s part of a step'):
        tiny_job(
            *FORWARD,
            "privacy.unit=example",
            "privacy.noise-multiplier=1.0",
            "privacy.clip=0.5",
            "privacy.examples=20",
            "federation.weighting=equal",
        )


def test_client_level_privacy_and_secure_sums_work_on_the_numbers(tiny_job, run_rounds, tmp_path):
    private = (
        "privacy.unit=client",
        "privacy.noise-multiplier=0.5",
        "privacy.clip=0.01",
        "federation.weighting=equal",
        "privacy.noise=seeded",
        "privacy.i-understand=true",
    )
    run = run_rounds(tiny_job(*FORWARD, *private), tmp_path / "noisy").run
    assert np.count_nonzero(run.newest().state.arrays[NAME]) == 40  # noise is on every number
    secure = (
        "privacy.secure-aggregation=true",
        "privacy.clip=1.0",
        "federation.weighting=equal",
        "federation.cohort=3",
    )
    plain = run_rounds(tiny_job(*FORWARD, *secure[2:]), tmp_path / "plain").run.newest().state.arrays[NAME]
    summed = run_rounds(tiny_job(*FORWARD, *secure), tmp_path / "secure").run.newest().state.arrays[NAME]
    np.testing.assert_allclose(summed, plain, rtol=0, atol=1e-4)


def test_plan_counts_numbers_and_no_activations(tiny_job, tiny_bert):
    from fedtune.workflows.plan import make_plan

    job = tiny_job(*FORWARD)
    plan = make_plan(job)
    assert [(u.name, u.numbers, u.bytes) for u in plan.units] == [(NAME, 40, 160)] and plan.device[
        "activations"
    ] == 0
    spec = open_setup(job).spec
    assert travelling(job, spec).size == 40 and plan.trainable == spec.size
    json.dumps(plan.to_json())
