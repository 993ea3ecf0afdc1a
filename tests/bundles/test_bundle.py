"""The bundle: read as written, its frame checked by hash, and never half a bundle."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedtune.adapters.describe import describe
from fedtune.bundles.bundle import open_bundle, receive_bundle, write_bundle
from fedtune.common.trees import digest
from fedtune.errors import EnvironmentProblem, Refused, RunError
from fedtune.job import AdapterSection, Job
from fedtune.models.layout import Layout, Linear
from fedtune.types import TensorSpec

LINEAR = Linear("block.0.up", "up", 6, 4, "block.0")
SPEC = describe(
    Layout((LINEAR,), (TensorSpec("block.0.up.weight", (6, 4), "block.0"),), ()), AdapterSection(rank=2)
)
FRAME = {t.name: np.arange(t.size, dtype=np.float32).reshape(t.shape) for t in SPEC.frame}
INITIAL = {t.name: np.ones(t.shape, np.float32) for t in SPEC.schema.tensors}
FACTS = {
    "source": "package:x",
    "sha256": "a" * 64,
    "licence": "MIT",
    "parameters": 24,
    "task": "text-classification",
    "labels": ("bad", "good"),
    "spec": SPEC,
    "versions": {"python": "3"},
}


@pytest.fixture
def folder(tmp_path):
    write_bundle(tmp_path / "bundle", Job(), FRAME, INITIAL, **FACTS)
    return tmp_path / "bundle"


def change(folder, **facts):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def test_read_as_written(folder):
    bundle = open_bundle(folder)
    assert bundle.manifest.spec == SPEC and bundle.manifest.labels == ("bad", "good")
    assert all(np.array_equal(bundle.frame[n], FRAME[n]) for n in FRAME)
    assert bundle.manifest.frame_sha256 == digest(FRAME) and bundle.frame_digest == digest(FRAME)[:16]
    assert bundle.frame_bytes == (folder / "frame.safetensors").stat().st_size > 4 * 20


def test_without_a_frame(tmp_path):
    bundle = write_bundle(tmp_path / "bundle", Job(), {}, INITIAL, **FACTS)
    assert (bundle.frame, bundle.frame_bytes) == ({}, 0) and not (
        tmp_path / "bundle" / "frame.safetensors"
    ).exists()
    assert open_bundle(tmp_path / "bundle").frame == {}


@pytest.mark.parametrize(
    "other",
    [
        FRAME | {"block.0.up.A": FRAME["block.0.up.A"] + np.float32(1e-6)},
        {n: a.T.copy() for n, a in FRAME.items()},
        {n.replace("up", "down"): a for n, a in FRAME.items()},
        {n: a.astype(np.float64) for n, a in FRAME.items()},
    ],
    ids=["value", "shape", "name", "type"],
)
def test_another_frame_is_refused(other, folder):
    save_file(other, folder / "frame.safetensors")
    with pytest.raises(
        RunError,
        match=(
            r"frame\.safetensors: sha256 [0-9a-f]{12}…, the manifest says [0-9a-f]{12}…; "
            r"remove .*, and it is made again"
        ),
    ):
        _ = open_bundle(folder).frame


def test_a_frame_cut_short_or_gone_is_refused(folder):
    path = folder / "frame.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RunError, match="cannot be read"):
        _ = open_bundle(folder).frame
    path.unlink()
    with pytest.raises(RunError, match="the manifest says"):
        _ = open_bundle(folder).frame


def test_no_manifest_is_no_bundle(folder):
    (folder / "manifest.json").unlink()
    with pytest.raises(RunError, match=r"no manifest\.json, so not a bundle"):
        open_bundle(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null"])
def test_a_broken_manifest_is_one_line(text, folder):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(
        RunError, match=r"manifest\.json: \d+ fields are wrong, first .*; remove .*, and it is made again"
    ):
        open_bundle(folder)


def test_another_format_or_a_wrong_field_is_refused(folder):
    change(folder, format="9")
    with pytest.raises(RunError, match="bundle format 9, this fedtune reads 1"):
        open_bundle(folder)
    change(folder, format="1", parameters="many")
    with pytest.raises(RunError, match=r"first \('parameters',\)"):
        open_bundle(folder)


def test_the_manifest_comes_last(tmp_path, monkeypatch):
    """A crash before it leaves a frame, and no bundle."""

    def full(path, value):
        raise EnvironmentProblem("disk full")

    monkeypatch.setattr("fedtune.bundles.bundle.write_json", full)
    with pytest.raises(EnvironmentProblem):
        write_bundle(tmp_path / "bundle", Job(), FRAME, INITIAL, **FACTS)
    assert sorted(p.name for p in (tmp_path / "bundle").iterdir()) == [
        "frame.safetensors",
        "initial.safetensors",
        "job.toml",
    ]
    with pytest.raises(RunError, match="not a bundle"):
        open_bundle(tmp_path / "bundle")


def test_another_job_or_start_is_refused(folder):
    bundle = open_bundle(folder)
    assert bundle.job == Job() and all(np.array_equal(bundle.initial[n], INITIAL[n]) for n in INITIAL)
    (folder / "job.toml").write_text("[federation]\nrounds = 3\n")
    (folder / "initial.safetensors").unlink()
    with pytest.raises(RunError, match=r"job\.toml: sha256"):
        _ = open_bundle(folder).job
    with pytest.raises(RunError, match=r"initial\.safetensors: sha256"):
        _ = open_bundle(folder).initial


def test_what_is_shipped_arrives_whole_and_without_the_start(folder, tmp_path):
    sent = open_bundle(folder)
    got = receive_bundle(tmp_path / "device", sent.digest, sent.shipped())
    assert (got.digest, got.manifest, got.job) == (sent.digest, sent.manifest, sent.job)
    assert all(np.array_equal(got.frame[n], FRAME[n]) for n in FRAME)
    assert not (tmp_path / "device" / "initial.safetensors").exists()


@pytest.mark.parametrize(
    "change_to",
    [
        lambda files: files | {"../evil.py": b"x"},
        lambda files: files | {"client/app.py": b"x"},
        lambda files: {n: b for n, b in files.items() if n != "job.toml"},
        lambda files: {},
        lambda files: files | {"manifest.json": b"{}"},
        lambda files: files | {"job.toml": b"[federation]\nrounds = 3\n"},
        lambda files: files | {"job.toml": b"\xff"},
        lambda files: files | {"frame.safetensors": b"PK" + bytes(100)},
        lambda files: files | {"frame.safetensors": files["frame.safetensors"][:-4] + b"abcd"},
        lambda files: {n: b for n, b in files.items() if n != "frame.safetensors"},
    ],
    ids=[
        "extra-up",
        "extra-code",
        "no-job",
        "nothing",
        "other-manifest",
        "other-job",
        "not-text",
        "not-a-frame",
        "other-frame",
        "no-frame",
    ],
)
def test_a_bundle_from_outside_that_is_not_the_one_named_is_refused_and_not_written(
    change_to, folder, tmp_path
):
    sent = open_bundle(folder)
    with pytest.raises(Refused, match=r"^bundle: "):
        receive_bundle(tmp_path / "device", sent.digest, change_to(sent.shipped()))
    assert not (tmp_path / "device").exists()
