"""What a device without torch keeps for itself, and what it sends, beside one with torch: round after
round the same to rounding.
"""

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedtune.edge import device as edge_device
from fedtune.errors import ContractError
from fedtune.onnx.predict import Predictor
from fedtune.training.device import open_device
from fedtune.wire import Schema, decode, encode

SGD = ("federation.optimizer=sgd", "federation.lr=0.2")
METHODS = {
    "ditto": ("personal.method=ditto", "federation.proximal=0.2"),
    "head": ("personal.method=head", *SGD),
    "scaffold": ("federation.drift=scaffold", "federation.weighting=equal", *SGD, "federation.head-lr=0.1"),
    "select": ("personal.method=select", "personal.every=1", "federation.weight-decay=0.1", *SGD),
    "loge": ("personal.method=loge", *SGD),
    "fedspeed": ("federation.drift=fedspeed", "federation.proximal=0.5", *SGD),
}


@pytest.mark.parametrize("method", METHODS)
def test_rounds_are_torchs(method, prepared, tiny_csv, tmp_path):
    made = prepared(*METHODS[method])
    devices = (
        open_device(made.bundle, tiny_csv, kept=tmp_path / "torch"),
        edge_device.open_device(made.bundle, tiny_csv, made.graphs, threads=1, kept=tmp_path / "edge"),
    )
    bundle, schema, moved = made.bundle, made.bundle.schema, 0.0
    for round in (1, 2, 5):
        draw = np.random.default_rng(round)
        model = {n: a + draw.normal(0, 0.01, a.shape).astype(np.float32) for n, a in bundle.start.items()}
        asked = encode("model", schema, model, round=round, frame=bundle.frame_digest)
        theirs, ours = (
            decode(d.handle(asked, "a"), schema, kinds=["update"], round=round, frame=bundle.frame_digest)
            for d in devices
        )
        assert ours.header.weight == theirs.header.weight and ours.metrics["loss"][0] == pytest.approx(
            theirs.metrics["loss"][0], rel=1e-4
        )
        np.testing.assert_allclose(ours.arrays.vector, theirs.arrays.vector, rtol=0, atol=5e-5)
        moved = max(moved, *(float(np.abs(ours.arrays[n] - a).max()) for n, a in model.items()))
        stay = [d.worker.kept.load("", round) for d in devices]
        for name, array in stay[0].items():
            np.testing.assert_allclose(stay[1][name], array, rtol=0, atol=5e-5)
        scores = [decode(d.evaluate(asked), Schema(()), kinds=["scores"]).metrics for d in devices]
        assert scores[0].keys() == scores[1].keys() and ("personal_accuracy" in scores[0]) == (
            method in ("ditto", "head", "loge", "select")
        )
        assert all(
            scores[1][n] == (pytest.approx(total, rel=1e-4), count) for n, (total, count) in scores[0].items()
        )
    assert moved > 2e-3
    if "personal_accuracy" in scores[0]:
        own = [load_file(tmp_path / place / "adapter.safetensors") for place in ("torch", "edge")]
        for t in bundle.manifest.spec.trainable:
            np.testing.assert_allclose(own[1][t.name], own[0][t.name], rtol=0, atol=5e-5)
        store = devices[1].store
        found = store.dataset.examples.take(store.split.held_out[0])
        labels, _ = Predictor.adapted(made.graphs, tmp_path / "edge", 1).predict(list(found.inputs))
        right = sum(bundle.manifest.labels[label] == said for label, said in zip(found.labels, labels))
        assert (right, len(labels)) == scores[1]["personal_accuracy"]
        assert (tmp_path / "edge" / "adapter.safetensors").stat().st_mode & 0o077 == 0
    again = [d.handle(asked, "another name") == d.handle(asked, "another name") for d in devices]
    assert again == [True, True] and [d.worker.kept.load("", 4) is not None for d in devices] == [True, True]


def test_without_a_place_to_keep_it_nothing_is_trained(prepared, tiny_csv):
    made = prepared(*METHODS["ditto"], graphs=False)
    device = open_device(made.bundle, tiny_csv)
    with pytest.raises(ContractError, match="no place for it"):
        device.handle(
            encode("model", made.bundle.schema, made.bundle.start, round=1, frame=made.bundle.frame_digest),
            "a",
        )
