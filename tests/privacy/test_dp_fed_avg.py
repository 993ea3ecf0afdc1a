"""Client level: one clip over everything, a denominator that does not follow the data, noise of the size
that was promised, a clip that adapts.
"""

import math

import numpy as np
import pytest
from scipy import stats

from fedtune.algorithms.dp_fed_avg import CLIP, dp_fed_avg
from fedtune.errors import PrivacyRefused, Refused, ShapeMismatch
from fedtune.privacy.client import ClientPrivacy, client_privacy
from fedtune.privacy.clipping import clip, flat_norm
from fedtune.privacy.noise import SeededNoise, SystemNoise
from fedtune.privacy.plan import plan_of
from fedtune.types import ClientInfo, Update

START = {"a": np.zeros((3, 4), np.float32), "head.b": np.ones(5, np.float32)}
CLIENTS = [ClientInfo(f"c{i}", 10) for i in range(40)]


class Silence:
    """No noise, for what has to be exact."""

    private = False

    def normal(self, *shape):
        # of variance 1, and known
        return np.ones(shape) * np.where(np.arange(math.prod(shape)).reshape(shape) % 2, 1, -1)

    def uniform(self, *shape):
        return np.full(shape, 0.5)


def algorithm(noise, cohort=4, sampling="fixed", secret=False, **more):
    privacy = ClientPrivacy(**({"clip": 1.0, "multiplier": 1e-9} | more))
    return dp_fed_avg(
        seed=0,
        cohort=cohort,
        units=("block.0", "head"),
        sampling=sampling,
        privacy=privacy,
        noise=lambda round: noise,
        secret=secret,
    )


def update(client, scale, metrics=None, weight=1.0):
    rng = np.random.default_rng(int(client[1:]))
    return Update(
        client,
        1,
        {n: (a + scale * rng.standard_normal(a.shape)).astype(np.float32) for n, a in START.items()},
        weight,
        metrics or {},
    )


def test_one_clip_over_all_tensors_equal_weights_and_a_fixed_denominator():
    made, updates = (
        algorithm(Silence()),
        [update("c1", 0.01, weight=1.0), update("c2", 5.0, weight=1000.0), update("c3", 1e30)],
    )
    state, report = made.step(made.init(START), updates)
    expected = {name: a.astype(np.float64) for name, a in START.items()}
    for one in updates:
        delta = {name: one.arrays[name].astype(np.float64) - START[name] for name in START}
        norm = math.sqrt(sum((d**2).sum() for d in delta.values()))
        for name, d in delta.items():
            expected[name] += d * min(1.0, 1.0 / norm) / 4  # of four that were asked, three came
    for name, a in expected.items():
        np.testing.assert_allclose(state.arrays[name], a, atol=2e-6)
    assert report.clients == ("c1", "c2", "c3") and report.weight == 4.0 and report.metrics == {}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_a_number_adds_nothing(bad):
    made = algorithm(Silence())
    broken = Update("c9", 1, START | {"a": np.full((3, 4), bad, np.float32)}, 1.0)
    alone, both = (
        made.step(made.init(START), u)[0] for u in ([update("c1", 0.1)], [update("c1", 0.1), broken])
    )
    assert all(np.array_equal(alone.arrays[n], both.arrays[n]) for n in START)
    with pytest.raises(Refused, match="not-finite"):
        clip({"a": np.array([bad])}, 1.0)
    with pytest.raises(ShapeMismatch, match="'c1'"):
        made.step(made.init(START), [Update("c1", 1, {"other": np.zeros(2)}, 1.0)])


@pytest.mark.parametrize("scale", [0.0, 1e-20, 0.9, 1.0, 7.0, 1e18])
def test_clipped_in_float32_too(scale):
    arrays = {"a": np.float32(scale) * np.random.default_rng(0).standard_normal((100, 10)).astype(np.float32)}
    found, norm = clip(arrays, 2.0)
    assert flat_norm(found) <= 2.0 and norm == flat_norm(arrays)
    assert norm > 2.0 or found is arrays


def test_a_zero_update_is_noise_of_the_size_that_was_promised():
    """Also when nobody answered: a round without noise would tell that."""
    made, start = algorithm(SystemNoise(), multiplier=3.0, clip=0.5), {"a": np.zeros((200, 100), np.float32)}
    for updates in ([], [Update("c1", 1, start, 1.0)]):
        state, _ = made.step(made.init(start), updates)
        moved = state.arrays["a"].ravel() / (3.0 * 0.5 / 4)
        assert stats.kstest(moved, "norm").pvalue > 1e-4 and state.round == 1


def test_noise_that_is_too_small_releases_nothing():
    class Weak(SystemNoise):
        def normal(self, *shape):
            return 0.9 * super().normal(*shape)

    made, start = algorithm(Weak(), multiplier=1.0), {"a": np.zeros((200, 100), np.float32)}
    with pytest.raises(
        PrivacyRefused, match=r"the noise measured 0\.[89].* 1 was promised; nothing was released"
    ):
        made.step(made.init(start), [])


@pytest.mark.parametrize("first", [0.01, 100.0])
def test_the_clip_finds_the_quantile(first):
    """Andrew et al.: from far below and far above it comes to the median of the norms, and stays."""
    norms = np.exp(np.random.default_rng(1).standard_normal(20))
    made = algorithm(SystemNoise(), cohort=20, clip=first, quantile=0.5, rate=0.4, bits=1.0)
    state, seen = made.init(START), []
    for _ in range(80):
        updates = []
        for i, norm in enumerate(norms):
            delta = {n: np.random.default_rng(i).standard_normal(a.shape) for n, a in START.items()}
            updates.append(
                Update(
                    f"c{i}",
                    1,
                    {
                        n: (state.arrays[n] + d * norm / flat_norm(delta)).astype(np.float32)
                        for n, d in delta.items()
                    },
                    1.0,
                )
            )
        state, _ = made.step(state, updates)
        seen.append(float(state.slots[CLIP]))
    assert np.mean(seen[-20:]) == pytest.approx(np.median(norms), rel=0.4)
    assert abs(math.log(seen[0] / first)) <= 0.4 * 0.5 + 1e-9


def test_metrics_are_noisy_bounded_means():
    scores = [{"loss": (90.0, 10.0), "accuracy": (5.0, 10.0)}, {"loss": (1e9, 1.0), "accuracy": (1.0, 1.0)}]
    made = algorithm(Silence(), cohort=2, metrics=1e-9)
    report = made.step(made.init(START), [update(f"c{i}", 0.1, m) for i, m in enumerate(scores)])[1]
    assert report.metrics == {
        "loss": (pytest.approx(19.0, abs=1e-6), 2.0),
        "accuracy": (pytest.approx(1.5, abs=1e-6), 2.0),
    }


def test_cohorts():
    fixed = algorithm(SystemNoise(), cohort=6)
    assert len(fixed.plan(fixed.init(START), CLIENTS)) == 6 and fixed.plan(
        fixed.init(START), CLIENTS
    ) == fixed.plan(fixed.init(START), CLIENTS)
    secret = algorithm(SystemNoise(), cohort=20, sampling="poisson", secret=True)
    drawn = [frozenset(a.client for a in secret.plan(secret.init(START), CLIENTS)) for _ in range(20)]
    # the seed tells nothing of them
    assert len(set(drawn)) > 15 and 15 < np.mean([len(d) for d in drawn]) < 25
    seeded = algorithm(SeededNoise(np.random.default_rng(0)), cohort=6)
    assert [a.client for a in seeded.plan(seeded.init(START), CLIENTS)] == [
        a.client for a in fixed.plan(fixed.init(START), CLIENTS)
    ]


def test_settings_of_a_job(tiny_job):
    keys = (
        "privacy.unit=client",
        "privacy.noise-multiplier=2.0",
        "privacy.clip=0.3",
        "federation.weighting=equal",
    )
    job = tiny_job(*keys, "privacy.adaptive-clip=true", "privacy.metrics-noise=5.0")
    made = client_privacy(job)
    assert made == ClientPrivacy(0.3, 2.0, 0.5, 0.2, 10.0, 5.0)
    # a bit is 0 or 1: half a unit from its middle
    assert plan_of(job, 50).parts == {"update": 2.0, "clip-bits": 20.0, "metrics": 5.0}
    assert client_privacy(tiny_job()) is None
    open_ = job.model_copy(
        update={"privacy": job.privacy.model_copy(update={"noise_multiplier": 0.0, "epsilon": 1.0})}
    )
    with pytest.raises(PrivacyRefused, match="was not computed"):
        client_privacy(open_)
