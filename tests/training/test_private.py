"""Example-level privacy: the serial loop, the clients together, and Opacus,
which shares no code with either, agree.
"""

from dataclasses import replace

import numpy as np
import opacus
import pytest
import torch
from cohort_bench import SETTINGS, SIZES, Bench
from scipy import stats

from fedtune.adapters.methods import write
from fedtune.errors import Refused
from fedtune.privacy import example
from fedtune.privacy.example import (
    METRIC_CAP,
    ExamplePrivacy,
    SelfCheck,
    capped,
    example_privacy,
    noisy_metrics,
    poisson_batches,
)
from fedtune.privacy.noise import SystemNoise, noise_of
from fedtune.training import private
from fedtune.training.chunks import Task
from fedtune.training.local import to_batch
from fedtune.training.private import PerExample, clipped, train_privately

PRIVATE = (
    "privacy.unit=example",
    "privacy.noise-multiplier=0.7",
    "privacy.clip=0.05",
    "privacy.examples=8",
    "federation.weighting=equal",
    "privacy.noise=seeded",
    "privacy.metrics-noise=2.0",
)


@pytest.fixture
def bench(tiny_job):
    return lambda *changes, units=None: Bench(tiny_job(*SETTINGS, *PRIVATE, *changes), units)


def together(made, settings, chunk=0, round=2):
    tasks, totals = [], []
    for name, data in made.clients.items():
        noise = noise_of(made.job, round, name)
        tasks.append(Task(name, data, poisson_batches(len(data), settings, noise), noise=noise))
    models, seen = made.trainer(chunk=chunk).train(made.flat(made.start), tasks, round, settings)
    totals = [noisy_metrics(one, settings, task.noise) for one, task in zip(seen, tasks)]
    return models, totals


def one_by_one(made, settings, gradients, round=2):
    models, metrics = [], []
    for name, data in made.clients.items():
        write(made.parameters, made.start)
        metrics.append(
            train_privately(
                gradients,
                data,
                made.setup.encoder,
                made.job.federation,
                settings,
                round,
                noise_of(made.job, round, name),
            )
        )
        models.append(made.flat({n: p.detach().numpy().copy() for n, p in made.parameters.items()}))
    return np.stack(models), metrics


@pytest.mark.parametrize("chunk", [1, 20, 10_000])
@pytest.mark.parametrize(
    "changes",
    [
        ("federation.optimizer=sgd",),
        ("adapter.method=lora", "federation.optimizer=sgd"),
        ("adapter.method=bias", "federation.optimizer=sgd"),
        ("adapter.method=full", "federation.optimizer=sgd"),
        ("adapter.method=head",),
        ("federation.local-steps=2", "federation.weight-decay=0.1"),
    ],
    ids=" ".join,
)
def test_together_and_one_by_one(changes, chunk, bench):
    """Also a client with one example and one with none: it sends noise."""
    made = bench(*changes)
    settings = example_privacy(made.job)
    found, metrics = together(made, settings, chunk)
    expected, plain = one_by_one(made, settings, PerExample(made.model, made.parameters))
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5)
    assert np.abs(found - made.flat(made.start)).max(axis=1).min() > 1e-4
    for a, b in zip(metrics, plain):
        for name in ("loss", "accuracy"):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4)


def test_texts_that_are_predicted_count_as_their_mean(bench, tiny_llama):
    made = bench(f"model.source={tiny_llama}", "model.task=causal-lm", "federation.optimizer=sgd")
    settings = example_privacy(made.job)
    found, _ = together(made, settings, 20)
    expected, _ = one_by_one(made, settings, PerExample(made.model, made.parameters))
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("method", "hooks"),
    [("fed-sb", True), ("lora", True), ("ffa-lora", True), ("bias", True), ("head", True), ("full", False)],
)
def test_opacus_is_used_where_it_is_right(method, hooks, bench):
    """Positions are embedded once for the whole batch, which Opacus takes for one example:
    then examples go one by one.
    """
    made = bench(f"adapter.method={method}")
    gradients, data = PerExample(made.model, made.parameters), made.clients["c3"]
    batch, labels = to_batch(data, np.arange(len(data)), made.setup.encoder)
    before = [m.training for m in made.model.modules()]
    flat, scores = gradients(batch, labels)
    assert gradients.by_hooks == hooks
    expected, plain = gradients.one_by_one(batch, labels)
    torch.testing.assert_close(flat, expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(scores, plain)
    assert [m.training for m in made.model.modules()] == before and all(
        p.grad is None for p in made.parameters.values()
    )


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("way", ["serial", "together"])
def test_a_step_is_opacus_step(way, bench, monkeypatch):
    """Cut, summed and divided by a fixed number: against Opacus' own optimizer on the same
    batch, without the noise.
    """
    made = bench(
        "federation.optimizer=sgd",
        "federation.lr=50.0",
        "federation.batch-size=8",
        "federation.local-steps=1",
    )
    settings, start = replace(example_privacy(made.job), rate=0.6), made.flat(made.start)
    monkeypatch.setattr(SelfCheck, "require", lambda *_: None)
    monkeypatch.setattr(private, "noisy_metrics", lambda *_: {})
    quiet = replace(settings, multiplier=0.0)
    found = (
        together(made, quiet, 25)[0]
        if way == "together"
        else one_by_one(made, quiet, PerExample(made.model, made.parameters))[0]
    )
    for row, name in enumerate(made.clients):
        (index,) = poisson_batches(SIZES[row], settings, noise_of(made.job, 2, name))
        write(made.parameters, made.start)
        if len(index):
            made.model.train()
            wrapped = opacus.GradSampleModule(made.model, strict=False, loss_reduction="sum")
            for m in made.model.modules():
                # hooks need it; dropout stays off
                m.training = isinstance(m, torch.nn.Linear) or m is made.model
            optimizer = opacus.optimizers.DPOptimizer(
                torch.optim.SGD(made.parameters.values(), lr=50.0),
                noise_multiplier=0.0,
                max_grad_norm=settings.clip,
                expected_batch_size=8,
                loss_reduction="mean",
            )
            batch, labels = to_batch(made.clients[name], index, made.setup.encoder)
            torch.nn.functional.cross_entropy(wrapped(**batch), labels, reduction="sum").backward()
            optimizer.step()
            wrapped.remove_hooks()
            made.model.eval()
        expected = made.flat({n: p.detach().numpy() for n, p in made.parameters.items()})
        np.testing.assert_allclose(found[row], expected, rtol=0, atol=5e-5, err_msg=name)
    assert np.abs(found[3] - start).max() > 1e-2


@pytest.mark.parametrize("way", ["serial", "together"])
def test_noise_has_the_size_that_was_promised(way, bench):
    """Of clients without data the whole update is noise: lr * multiplier * clip / batch in every number."""
    made = bench(
        "federation.optimizer=sgd", "federation.lr=1.0", "federation.local-steps=1", "privacy.noise=system"
    )
    made.clients = {f"c{i}": made.clients["c2"] for i in range(8)} | {"c3": made.clients["c3"]}
    settings = example_privacy(made.job)
    models = (
        together(made, settings)
        if way == "together"
        else one_by_one(made, settings, PerExample(made.model, made.parameters))
    )[0]
    moved = (models[:8] - made.flat(made.start)).ravel() / (0.7 * 0.05 / 3)
    assert stats.kstest(moved, "norm").pvalue > 1e-4
    assert abs(np.corrcoef(models[0] - models[2], models[1] - models[3])[0, 1]) < 6 / np.sqrt(models.shape[1])


def test_clips_whatever_comes():
    flat = torch.tensor(
        [[3.0, 4.0], [0.1, 0.0], [float("nan"), 1.0], [float("inf"), 1.0], [1e30, 1e30], [0.0, 0.0]]
    )
    check = SelfCheck(ExamplePrivacy(1.0, 1.0, 1, 1, 1))
    out = clipped(flat, 1.0, check)
    torch.testing.assert_close(
        out,
        torch.tensor([[0.6, 0.8], [0.1, 0.0], [0.0, 0.0], [0.0, 0.0], [0.5**0.5, 0.5**0.5], [0.0, 0.0]]),
        rtol=2e-6,
        atol=0,
    )
    assert check.largest <= 1.0
    assert capped(np.array([[np.nan, np.inf, 1.0], [-3.0, -1.0, 1.0], [50.0, 1.0, 1.0]])).tolist() == [
        [METRIC_CAP, 1.0, 1.0],
        [0.0, 0.0, 1.0],
        [METRIC_CAP, 1.0, 1.0],
    ]


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"multiplier": 0.5}, "the noise measured"),
        ({"multiplier": 2.0}, "the noise measured"),
        ({"clip": 0.5}, "got past the clip"),
        ({"still": True}, "did not move"),
    ],
)
def test_a_mechanism_that_breaks_its_promise_sends_nothing(broken, said):
    settings, rng = ExamplePrivacy(1.0, 1.0, 4, 0.1, 10), np.random.default_rng(0)
    check = SelfCheck(settings)
    check.noise(rng.standard_normal(4000) * broken.get("multiplier", 1.0))
    check.clipped(np.array([0.3, 1.0]) / broken.get("clip", 1.0))
    with pytest.raises(Refused, match=said):
        check.require(np.zeros(3), np.zeros(3) if "still" in broken else np.ones(3))


def test_batches_are_poisson():
    settings = ExamplePrivacy(1.0, 1.0, 4, 0.1, 400)
    sizes = np.array([len(b) for b in poisson_batches(30, settings, SystemNoise())])
    assert (
        stats.chisquare(
            np.bincount(np.minimum(sizes, 7), minlength=8),
            400 * np.append(stats.binom.pmf(np.arange(7), 30, 0.1), stats.binom.sf(6, 30, 0.1)),
        ).pvalue
        > 1e-4
    )
    assert (sizes == 0).any()


def test_metrics_hold_noise_or_are_not_there():
    settings = replace(ExamplePrivacy(1.0, 1.0, 4, 0.1, 25), metrics=2.0)
    totals = np.array([2000.0, 500.0, 1000.0])
    assert noisy_metrics(totals, replace(settings, metrics=0.0), SystemNoise()) == {}
    drawn = np.array(
        [
            [m["loss"][0], m["accuracy"][0], m["accuracy"][1]]
            for m in (noisy_metrics(totals, settings, SystemNoise()) for _ in range(500))
        ]
    )
    sigma = 2.0 * example.METRIC_NORM * 5
    np.testing.assert_allclose(drawn.std(0), [METRIC_CAP * sigma, sigma, sigma], rtol=0.2)
    np.testing.assert_allclose(drawn.mean(0), totals, atol=5 * METRIC_CAP * sigma / np.sqrt(500))
