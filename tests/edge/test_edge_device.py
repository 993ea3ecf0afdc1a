"""A device without torch beside one with it: the same rows, the same batches,
and the same update to rounding.
"""

import dataclasses

import numpy as np
import pytest

from fedtune.algorithms.probes import answers
from fedtune.data.encoded import ClientData
from fedtune.data.images import ImageEncoder
from fedtune.edge import device as edge_device
from fedtune.edge.training import Engine, pieces
from fedtune.errors import DataError, ModelError, Refused, RunError
from fedtune.training.device import open_device
from fedtune.wire import Schema, decode, encode

NEAR = 2e-5
"""Largest difference of a trained value after a few steps. Gradients differ by 1e-7 of their size; AdamW
divides by their own size, so that a gradient near 0 moves a value by up to a few hundredths of the learning
rate of 5e-3 either way.
"""
PRIVATE = (
    "privacy.unit=example",
    "privacy.noise-multiplier=0.7",
    "privacy.clip=0.05",
    "privacy.examples=40",
    "federation.weighting=equal",
    "privacy.noise=seeded",
    "privacy.metrics-noise=2.0",
    "federation.local-steps=4",
)

FORWARD = ("edge.mode=forward", "edge.directions=40", "federation.optimizer=sgd", "federation.lr=0.05")


def packet(bundle, round=1):
    rng = np.random.default_rng(round)
    arrays = {n: a + rng.normal(0, 0.01, a.shape).astype(np.float32) for n, a in bundle.initial.items()}
    return encode("model", bundle.manifest.spec.schema, arrays, round=round, frame=bundle.frame_digest)


def both(prepared, data, *changes, span=None):
    """(torch device, edge device) of a job."""
    made = prepared(*changes)
    mine = edge_device.open_device(made.bundle, data, made.graphs, threads=1)
    if span:
        worker = dataclasses.replace(mine.worker, engine=dataclasses.replace(mine.worker.engine, span=span))
        mine = dataclasses.replace(mine, worker=worker)
    return open_device(made.bundle, data), mine


def compare(theirs, ours, round=1):
    """Both devices' updates to one packet. Returns how far the model moved."""
    bundle = theirs.bundle
    asked = packet(bundle, round)
    schema = bundle.manifest.spec.schema
    expected, found = (
        decode(d.handle(asked, "a"), schema, kinds=["update"], round=round, frame=bundle.frame_digest)
        for d in (theirs, ours)
    )
    assert (found.header.weight, found.metrics.keys()) == (expected.header.weight, expected.metrics.keys())
    np.testing.assert_allclose(found.arrays.vector, expected.arrays.vector, rtol=0, atol=NEAR)
    for name, (total, count) in expected.metrics.items():
        assert found.metrics[name] == (pytest.approx(total, rel=1e-4), pytest.approx(count, rel=1e-12))
    scores = [decode(d.evaluate(asked), Schema(()), kinds=["scores"]) for d in (theirs, ours)]
    assert scores[0].header.weight == scores[1].header.weight
    for name, (total, count) in scores[0].metrics.items():
        assert scores[1].metrics[name] == (pytest.approx(total, rel=1e-5), count)
    return float(np.abs(expected.arrays.vector - decode(asked, schema, kinds=["model"]).arrays.vector).max())


@pytest.mark.parametrize(
    "changes",
    [
        ("federation.optimizer=sgd", "federation.lr=0.5"),
        (
            "federation.optimizer=sgd",
            "federation.momentum=0.9",
            "federation.weight-decay=0.01",
            "federation.lr=0.1",
        ),
        (),
        ("federation.weight-decay=0.1", "federation.head-lr=0.02", "federation.local-epochs=2"),
        ("federation.batch-size=7", "federation.local-steps=3"),
        ("federation.proximal=2.0", "federation.optimizer=sgd", "federation.lr=0.2"),
    ],
    ids=lambda c: " ".join(c) or "adamw",
)
def test_the_update_is_torchs(changes, prepared, tiny_csv):
    theirs, ours = both(prepared, tiny_csv, *changes)
    assert ours.facts() == theirs.facts()
    assert compare(theirs, ours) > 100 * NEAR
    # nothing stays from one call to the next
    assert ours.handle(packet(ours.bundle), "a") == ours.handle(packet(ours.bundle), "a")


@pytest.mark.parametrize(
    "changes",
    [
        (),
        (
            "federation.optimizer=sgd",
            "federation.momentum=0.9",
            "federation.lr=0.1",
            "federation.head-lr=0.3",
        ),
        PRIVATE,
    ],
    ids=["adamw", "sgd", "private"],
)
@pytest.mark.parametrize("units", [("block.0", "head"), ("block.1",)], ids=" ".join)
def test_an_update_of_some_units_is_torchs_and_holds_no_other(units, changes, prepared, tiny_csv):
    theirs, ours = both(prepared, tiny_csv, *changes)
    bundle, schema = theirs.bundle, theirs.bundle.schema
    names = tuple(t.name for t in schema.of_units(units))
    model = decode(packet(bundle), schema, kinds=["model"]).arrays
    asked = encode("model", schema, model, round=1, frame=bundle.frame_digest, train=names)
    expected, found = (
        decode(d.handle(asked, "a"), schema, kinds=["update"], round=1, frame=bundle.frame_digest)
        for d in (theirs, ours)
    )
    assert (
        tuple(found.arrays) == tuple(expected.arrays) == names
        and found.header.weight == expected.header.weight
    )
    np.testing.assert_allclose(found.arrays.vector, expected.arrays.vector, rtol=0, atol=NEAR)
    moved = [np.abs(found.arrays[n] - model[n]).max() for n in names]
    assert min(moved) > 0 and max(moved) > 100 * NEAR


RANKS = 'simulation.devices=[{name = "small", rank = 2}, {name = "middle", rank = 3}, {name = "large"}]'


def ranked(bundle, kind, rank, **more):
    """A packet to a client of this rank, from a model whose cores are nowhere 0."""
    whole = bundle.ranks.split(decode(packet(bundle), bundle.manifest.spec.schema, kinds=["model"]).arrays)
    held = {t.name: whole[t.name] for t in bundle.schema.held(rank).tensors}
    return held, encode(kind, bundle.schema, held, round=1, frame=bundle.frame_digest, **more)


@pytest.mark.parametrize(
    "changes",
    [
        (),
        (
            "federation.optimizer=sgd",
            "federation.momentum=0.9",
            "federation.lr=0.1",
            "federation.proximal=0.5",
            "federation.weight-decay=0.1",
        ),
        PRIVATE,
    ],
    ids=["adamw", "sgd", "private"],
)
@pytest.mark.parametrize(
    "rank, units", [(2, ("block.0", "block.1", "head")), (3, ("block.1", "head")), (4, ("block.0", "head"))]
)
def test_an_update_of_a_lower_rank_is_torchs(rank, units, changes, prepared, tiny_csv):
    """Torch computes with parts of the frame and cores; the graphs with whole ones that are 0 elsewhere,
    of which the leading numbers move.
    """
    theirs, ours = both(prepared, tiny_csv, RANKS, *changes)
    bundle = theirs.bundle
    names = tuple(t.name for t in bundle.schema.held(rank).of_units(units))
    model, asked = ranked(bundle, "model", rank, train=names)
    expected, found = (
        decode(d.handle(asked, "a"), bundle.schema, kinds=["update"], round=1, frame=bundle.frame_digest)
        for d in (theirs, ours)
    )
    assert tuple(found.arrays) == tuple(expected.arrays) == names
    np.testing.assert_allclose(found.arrays.vector, expected.arrays.vector, rtol=0, atol=NEAR)
    moved = [np.abs(found.arrays[n] - model[n]).max() for n in names]
    assert min(moved) > 0 and max(moved) > 100 * NEAR
    for name, (total, count) in expected.metrics.items():
        assert found.metrics[name] == (pytest.approx(total, rel=1e-4), pytest.approx(count, rel=1e-12))
    with pytest.raises(Refused, match="which are those of none of the ranks 2, 3, 4"):
        ours.handle(
            encode("model", bundle.schema, {names[0]: model[names[0]]}, round=1, frame=bundle.frame_digest),
            "a",
        )


def test_a_probe_of_a_lower_rank_is_torchs(prepared, tiny_csv):
    theirs, ours = both(prepared, tiny_csv, RANKS, "units.strategy=gradient", "units.budget=1")
    bundle = theirs.bundle
    scores = [
        [
            decode(
                d.handle(ranked(bundle, "probe", rank)[1], "a"),
                answers(bundle.schema),
                kinds=["block-scores"],
                round=1,
            ).arrays["scores"]
            for d in (theirs, ours)
        ]
        for rank in (2, 4)
    ]
    for expected, found in scores:
        np.testing.assert_allclose(found, expected, rtol=1e-3)
    assert (scores[0][0] < scores[1][0]).all()  # of fewer numbers, and with them alone


@pytest.mark.parametrize("strategy", ["gradient", "rgn", "snr", "fisher"])
def test_a_probe_is_torchs(strategy, prepared, tiny_csv):
    theirs, ours = both(prepared, tiny_csv, f"units.strategy={strategy}", "units.budget=1")
    bundle, schema = theirs.bundle, theirs.bundle.schema
    asked = encode(
        "probe",
        schema,
        decode(packet(bundle), schema, kinds=["model"]).arrays,
        round=3,
        frame=bundle.frame_digest,
    )
    expected, found = (
        decode(
            d.handle(asked, "a"), answers(schema), kinds=["block-scores"], round=3, frame=bundle.frame_digest
        )
        for d in (theirs, ours)
    )
    assert expected.arrays["scores"].min() > 0 and found.header == expected.header
    np.testing.assert_allclose(found.arrays["scores"], expected.arrays["scores"], rtol=1e-3)


def test_a_forward_only_update_is_torchs(prepared, tiny_csv):
    """Losses differ by 1e-7, a slope by that over the perturbation;
    the numbers are the learning rate times slopes.
    """
    theirs, ours = both(prepared, tiny_csv, *FORWARD)
    assert (
        ours.worker.engine.graphs.card.mode == "forward"
        and not (ours.worker.engine.graphs.folder / "step.onnx").exists()
    )
    bundle, rng = theirs.bundle, np.random.default_rng(0)
    model = {"directions": rng.normal(0, 0.01, 40).astype(np.float32)}
    asked = encode("model", bundle.schema, model, round=2, frame=bundle.frame_digest)
    expected, found = (
        decode(d.handle(asked, "a"), bundle.schema, kinds=["update"], round=2, frame=bundle.frame_digest)
        for d in (theirs, ours)
    )
    assert 0 < np.count_nonzero(expected.arrays.vector != model["directions"]) < 40
    np.testing.assert_allclose(found.arrays.vector, expected.arrays.vector, rtol=0, atol=1e-5)
    for name, (total, count) in expected.metrics.items():
        assert found.metrics[name] == (pytest.approx(total, rel=1e-4), count)
    scores = [decode(d.evaluate(asked), Schema(()), kinds=["scores"]).metrics["loss"] for d in (theirs, ours)]
    assert scores[0] == (pytest.approx(scores[1][0], rel=1e-5), scores[1][1])


def test_graphs_of_the_other_mode_are_refused(prepared):
    backward, forward = prepared(), prepared(*FORWARD)
    for bundle, graphs, here, there in (
        (backward.bundle, forward.graphs, "forward", "backward"),
        (forward.bundle, backward.graphs, "backward", "forward"),
    ):
        with pytest.raises(
            ModelError,
            match=rf"made for the edge\.mode {here}, the coordinator's bundle has {there}; copy the folder",
        ):
            edge_device.require_same(edge_device.Graphs.open(graphs).card, bundle, graphs)


@pytest.mark.parametrize("span", [1, 11, 30, 10**6])
def test_pieces_of_any_size_add_up_to_the_batch(span, prepared, tiny_csv):
    theirs, ours = both(prepared, tiny_csv, span=span)
    compare(theirs, ours)


@pytest.mark.parametrize(
    "lengths, span, sizes",
    [
        ([3, 4, 5, 5], 10, [2, 2]),
        ([3, 4, 5, 5], 1, [1, 1, 1, 1]),
        ([3, 4, 5, 5], 100, [4]),
        ([], 5, []),
        ([9, 2, 2], 8, [1, 2]),
        ([2, 2, 9], 18, [2, 1]),
    ],
)
def test_pieces_hold_no_more_than_the_span(lengths, span, sizes):
    found = list(pieces(lengths, span))
    assert [len(rows) for rows in found] == sizes and np.concatenate([*found, []]).tolist() == list(
        range(len(lengths))
    )
    assert all(len(rows) == 1 or len(rows) * max(lengths[i] for i in rows) <= span for rows in found)


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("federation.optimizer=sgd", "federation.lr=0.5", "federation.momentum=0.5"),
        ("privacy.metrics-noise=0",),
        ("federation.proximal=2.0",),
    ],
    ids=" ".join,
)
def test_a_private_update_is_torchs(changes, prepared, tiny_csv):
    """Drawn with the same seed: the same examples, clipped alike, the same noise,
    and the same noisy metrics.
    """
    theirs, ours = both(prepared, tiny_csv, *PRIVATE, *changes)
    assert compare(theirs, ours, round=2) > 100 * NEAR


def test_a_private_client_without_examples_in_a_step_sends_noise(prepared, tiny_csv, tmp_path):
    (tmp_path / "one.csv").write_text("id,text,label\n1,a lovely film,good\n")
    theirs, ours = both(prepared, tmp_path / "one.csv", *PRIVATE)
    assert compare(theirs, ours) > 100 * NEAR


def test_a_broken_mechanism_sends_nothing(prepared, tiny_csv, monkeypatch):
    _, ours = both(prepared, tiny_csv, *PRIVATE)
    monkeypatch.setattr(
        "fedtune.edge.training.drawn_noise", lambda sizes, settings, noise: np.zeros(sum(sizes), np.float32)
    )
    with pytest.raises(
        Refused, match=r"^privacy-check: the noise measured 0, 0\.035 was promised; nothing was sent$"
    ):
        ours.handle(packet(ours.bundle), "a")
    monkeypatch.undo()
    monkeypatch.setattr("fedtune.privacy.clipping.SHRINK", 2.0)
    with pytest.raises(
        Refused, match=r"^privacy-check: a gradient of norm .* got past the clip of 0\.05; nothing was sent$"
    ):
        ours.handle(packet(ours.bundle), "a")


def test_a_training_that_diverges_is_refused(prepared, tiny_csv):
    _, ours = both(
        prepared,
        tiny_csv,
        "federation.optimizer=sgd",
        "federation.lr=100",
        "federation.local-epochs=20",
        "federation.weight-decay=1",
    )
    with pytest.raises(Refused, match=r"^not-finite: training diverged here"):
        ours.handle(packet(ours.bundle), "a")


def test_what_is_not_for_this_bundle_is_refused(prepared, tiny_csv):
    _, ours = both(prepared, tiny_csv)
    schema, start, frame = ours.bundle.manifest.spec.schema, ours.bundle.initial, ours.bundle.frame_digest
    name = schema.tensors[0].name
    for asked, reason in [
        (b"nothing", "size"),
        (encode("update", schema, start, round=1, frame=frame), "kind"),
        (encode("model", schema, start, round=1, frame="0" * 16), "frame"),
        (encode("gradient-request", Schema(()), {}, round=0), "kind"),
        (encode("model", schema, {name: start[name]}, round=1, frame=frame), "tensors"),
    ]:
        with pytest.raises(Refused) as e:
            ours.handle(asked, "a")
        assert e.value.reason == reason


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"base_sha256": "ab" * 32},
            r"made for the base abababababab…, the coordinator's bundle has [0-9a-f]{12}…",
        ),
        (
            {"frame_sha256": "cd" * 32},
            r"made for the frame cdcdcdcdcdcd…, the coordinator's bundle has [0-9a-f]{12}…",
        ),
        (
            {"task": "causal-lm"},
            r"made for the task causal-lm, the coordinator's bundle has text-classification",
        ),
        (
            {"labels": ("good", "bad")},
            r"made for the labels good, bad, the coordinator's bundle has bad, good",
        ),
        ({"pooling": "first"}, r"made for the pooling first, the coordinator's bundle has mean"),
    ],
)
def test_graphs_of_another_bundle_are_refused(change, message, prepared):
    made = prepared()
    card = edge_device.Graphs.open(made.graphs).card
    edge_device.require_same(card, made.bundle, made.graphs)
    with pytest.raises(
        ModelError,
        match=(
            rf"^--graphs {made.graphs}: {message}; copy the folder that `fedtune prepare "
            r"--edge` made with this bundle$"
        ),
    ):
        edge_device.require_same(dataclasses.replace(card, **change), made.bundle, made.graphs)


def test_graphs_of_another_rank_or_scale_are_refused(prepared):
    made, card = (
        prepared("adapter.rank=2", graphs=False).bundle,
        edge_device.Graphs.open(prepared().graphs).card,
    )
    with pytest.raises(ModelError, match=r"made for the (adapter|frame) .*, the coordinator's bundle has "):
        edge_device.require_same(card, made, prepared().graphs)
    scaled = dataclasses.replace(card, spec=dataclasses.replace(card.spec, scale=2.0))
    with pytest.raises(ModelError, match=r"made for the adapter scale or places differ, "):
        edge_device.require_same(scaled, prepared().bundle, prepared().graphs)


def test_a_folder_that_is_not_whole_is_refused(prepared, tiny_csv, tmp_path):
    made = prepared()
    with pytest.raises(RunError, match=rf"^{tmp_path}: no edge\.json, so no graphs for training; "):
        edge_device.open_device(made.bundle, tiny_csv, tmp_path)
    for file in made.graphs.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "weights.bin").write_bytes(b"x" + (tmp_path / "weights.bin").read_bytes()[1:])
    with pytest.raises(RunError, match=rf"^{tmp_path}/weights\.bin: sha256 .*; copy the folder again$"):
        edge_device.open_device(made.bundle, tiny_csv, tmp_path)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(
        RunError,
        match=rf"^{tmp_path}/weights\.bin: is not there, and edge\.json names it; copy the folder again$",
    ):
        edge_device.open_device(made.bundle, tiny_csv, tmp_path)


def test_mistakes_in_the_data_are_those_of_any_device(prepared, tmp_path):
    made = prepared()
    (tmp_path / "a.csv").write_text("id,text,label\n1,x,ugly\n")
    with pytest.raises(
        DataError,
        match=rf"^--data {tmp_path}/a\.csv: label 'ugly' of row 1 is not in data\.labels \('bad', 'good'\)",
    ):
        edge_device.open_device(made.bundle, tmp_path / "a.csv", made.graphs)


def test_a_span_counts_padding_of_images_by_rows():
    card = type("Card", (), {"task": "image-classification"})
    encoder = ImageEncoder(8)
    engine = Engine(type("Graphs", (), {"card": card}), encoder, encoder.span(256, 2))
    five = ClientData(encoder.made_up([1] * 5, np.random.default_rng(0)), np.zeros(5, np.int64))
    assert [len(rows) for rows in pieces(engine.lengths(five), engine.span)] == [2, 2, 1]
