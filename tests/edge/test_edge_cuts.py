"""A device that trains some blocks with the step that ends at the lowest of them:
the same numbers as with the whole step.
"""

import dataclasses
import shutil

import numpy as np
import onnx
import pytest

from fedtune.algorithms.units import selected
from fedtune.common.storage import write_json
from fedtune.edge import device as edge_device
from fedtune.edge import graphs as edge_graphs
from fedtune.edge.graphs import Graphs
from fedtune.onnx import folder as files
from fedtune.wire import decode, encode

CUT = "step-block.1.onnx"
PRIVATE = (
    "privacy.unit=example",
    "privacy.noise-multiplier=0.7",
    "privacy.clip=0.05",
    "privacy.examples=40",
    "federation.weighting=equal",
    "privacy.noise=seeded",
)


@pytest.fixture(scope="module")
def without(prepared, tmp_path_factory):
    """The folder as a job that trains all blocks has it."""
    folder = tmp_path_factory.mktemp("without") / "edge"
    shutil.copytree(prepared().graphs, folder)
    (folder / CUT).unlink()
    card = files.open_card(prepared().graphs)
    card = dataclasses.replace(
        card, files={name: sha256 for name, sha256 in card.files.items() if name != CUT}
    )
    write_json(folder / files.CARD, files.CARD_FILE.dump_python(card, mode="json"))
    return folder


@pytest.fixture
def opened(monkeypatch):
    """Names of the graphs that are opened, in their order."""
    names, how = [], edge_graphs.open_lean
    monkeypatch.setattr(
        edge_graphs, "open_lean", lambda path, *more: names.append(path.name) or how(path, *more)
    )
    return names


def test_a_folder_holds_one_smaller_step_for_each_block_above_the_first(prepared):
    folder = prepared().graphs
    card = files.open_card(folder)
    assert (
        card.cuts == ("block.1",)
        and {p.name for p in folder.iterdir()} == {*card.files, files.CARD}
        and CUT in card.files
    )
    whole, part = (onnx.load(folder / name, load_external_data=False).graph for name in (files.STEP, CUT))
    assert 0 < len(part.node) < len(whole.node) and [x.name for x in part.input] == [
        x.name for x in whole.input
    ]
    # the same places in weights.bin
    assert {x.SerializeToString() for x in part.initializer} <= {
        x.SerializeToString() for x in whole.initializer
    }
    assert {x.name for x in part.output} == {
        "loss",
        "correct",
        "count",
        *(files.gradient_of(t.name) for t in card.spec.trainable if t.unit in ("block.1", "head")),
    }


@pytest.mark.parametrize(
    "units, name",
    [(("block.1", "head"), CUT), (("head",), CUT), (("block.0", "head"), files.STEP), (None, files.STEP)],
)
def test_gradients_are_those_of_the_whole_step_bit_for_bit(units, name, prepared, without, opened):
    made, draw = prepared(), np.random.default_rng(0)
    here, there = (Graphs.open(folder, 1) for folder in (made.graphs, without))
    ids = draw.integers(4, 20, (3, 7))
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    labels, weight = np.array([0, 1, 1]), np.array([0.2, 0.5, 1.0], np.float32)
    values = {n: a + draw.normal(0, 0.05, a.shape).astype(np.float32) for n, a in made.bundle.initial.items()}
    tensors = here.card.spec.trainable
    names = None if units is None else [t.name for t in tensors if t.unit in units]
    found, same = (graphs.step(batch, labels, weight, values, names) for graphs in (here, there))
    all_of_them = there.step(batch, labels, weight, values)
    np.testing.assert_array_equal(found.gradient, same.gradient)
    np.testing.assert_array_equal(found.totals, all_of_them.totals)
    mask = np.concatenate([np.full(t.size, names is None or t.name in names) for t in tensors])
    np.testing.assert_array_equal(found.gradient, np.where(mask, all_of_them.gradient, 0))
    assert np.count_nonzero(found.gradient) and opened == [name, files.STEP]


LARGER = 'simulation.devices=[{name = "large", units = 2}]'
"""Somebody trains all blocks, so that none is left out of the adapter."""


@pytest.mark.parametrize("more", [(), PRIVATE], ids=["plain", "private"])
@pytest.mark.parametrize(
    "strategy, steps",
    [("top", {CUT}), ("both", {CUT}), ("bottom", {files.STEP}), ("lisa", {CUT, files.STEP})],
)
def test_a_device_trains_the_same_model_with_and_without(
    strategy, steps, more, prepared, without, tiny_csv, opened
):
    made = prepared(f"units.strategy={strategy}", "units.budget=1", LARGER, *more)
    bundle, schema = made.bundle, made.bundle.schema
    devices = [
        edge_device.open_device(bundle, tiny_csv, folder, threads=1) for folder in (made.graphs, without)
    ]
    used = []
    for round in range(1, 5):
        names = tuple(t.name for t in schema.of_units(selected(bundle.job, schema, round)))
        asked = encode("model", schema, bundle.initial, round=round, frame=bundle.frame_digest, train=names)
        del opened[:]
        found, expected = (device.handle(asked, "a") for device in devices)
        used += opened[:1]
        assert found == expected
        assert tuple(decode(found, schema, kinds=["update"]).arrays) == names
    assert set(used) == steps


def test_a_probe_takes_the_whole_step(prepared, tiny_csv, opened):
    made = prepared("units.strategy=gradient", "units.budget=1")
    device = edge_device.open_device(made.bundle, tiny_csv, made.graphs, threads=1)
    device.handle(
        encode("probe", made.bundle.schema, made.bundle.initial, round=1, frame=made.bundle.frame_digest), "a"
    )
    assert opened == [files.STEP]
