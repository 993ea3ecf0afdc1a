"""From a bundle to the folder that lets a device train with onnxruntime alone; see `fedtune.onnx.folder`.

Needs torch and onnx.
"""

import math
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fedtune.adapters import methods
from fedtune.adapters.methods import Parameters
from fedtune.bundles.bundle import Bundle
from fedtune.common.seeds import generator
from fedtune.common.storage import failing_clearly, sha256_of, write_json
from fedtune.errors import ModelError, RunError
from fedtune.job import Job
from fedtune.models.base import TunableModel
from fedtune.onnx import folder as files
from fedtune.onnx.cut import cut
from fedtune.onnx.frozen8 import as_integers, round_frozen
from fedtune.onnx.lean import open_lean
from fedtune.onnx.shared import write_graph, write_graphs
from fedtune.onnx.training import forward_graph, step_graph
from fedtune.runs.folder import versions
from fedtune.types import Arrays
from fedtune.wire import Schema
from fedtune.workflows.card import public_name
from fedtune.workflows.setup import OpenBase

LOSS, GRADIENT = 1e-4, 2e-3
"""Largest difference of a loss from torch's, relative above 1, and of all gradients together as a share of
their L2 norm: a value at the bend of a ReLU can fall on its other side.
"""
TRIED = ((4, 12), (3, 5), (1, 6))
"""Batches that the graphs are tried on, (examples, tokens of the longest):
other sizes than those they were traced with.
"""
SHIFT = 0.01
"""Standard deviation of what is added to the trained values at each trial,
as a start of zeros would hide much.
"""


def write_edge_folder(
    base: OpenBase,
    bundle: Bundle,
    target: Path,
    stage: Callable[[str], None] = lambda text: None,
    int8: bool = False,
) -> files.EdgeCard:
    """Traces the graphs with the bundle's frame, runs them beside torch, and only then moves them to
    `target`, which must not exist.

    A job that trains with forward passes alone has no step graph, one whose clients train some blocks may
    have several (`smaller_steps`). int8: frozen weights are rounded (`fedtune.onnx.frozen8`), and torch's,
    which the graphs are compared with, too.

    Raises RunError for a target that exists, ModelError for a base that cannot be traced,
    or whose graphs differ from torch.
    """
    if target.exists():
        raise RunError(f"{target} already exists; choose another folder, or remove it")
    model, spec, job = base.fresh_model(), bundle.manifest.spec, base.job
    parameters = methods.attach(model, spec, bundle.frame)
    methods.write(parameters, bundle.initial)
    weights = "int8" if int8 else "float32"
    rounded = round_frozen(model, {id(p) for p in parameters.values()}) if int8 else {}
    example = _batch(base, 5, 8)
    with (
        failing_clearly(target),
        tempfile.TemporaryDirectory(prefix=".edge-", dir=target.absolute().parent) as scratch,
    ):
        made = Path(scratch) / "new"
        made.mkdir()
        graphs = {}
        if job.edge.mode == "backward":
            stage("tracing the training step")
            graphs[files.STEP] = step_graph(model, parameters, example, job.export.opset)
        stage("tracing the forward pass")
        graphs[files.FORWARD] = forward_graph(model, parameters, example, job.export.opset)
        for graph in graphs.values():
            as_integers(graph, rounded)
        write_graphs(made, graphs)
        smaller = smaller_steps(job, spec.schema)
        for name, tensors in smaller.items():
            write_graph(
                made / name,
                cut(
                    graphs[files.STEP],
                    {files.LOSS, files.CORRECT, files.COUNT, *map(files.gradient_of, tensors)},
                ),
            )
        steps = {files.STEP: tuple(parameters), **smaller} if files.STEP in graphs else {}
        stage("checking the graphs against torch")
        _require_equal(made, weights, steps, _trials(base, model, parameters, bool(steps)))
        base.encoder.save(made)
        manifest = bundle.manifest
        card = files.EdgeCard(
            files.FORMAT,
            manifest.task,
            manifest.labels,
            job.model.max_length,
            spec,
            public_name(manifest.source),
            manifest.sha256,
            manifest.frame_sha256,
            job.export.opset,
            versions()["fedtune"],
            {p.name: sha256_of(p) for p in sorted(made.iterdir())},
            job.model.pooling,
            weights,
        )
        write_json(made / files.CARD, files.CARD_FILE.dump_python(card, mode="json"))
        made.rename(target)
    return card


def smaller_steps(job: Job, schema: Schema) -> dict[str, tuple[str, ...]]:
    """Steps whose gradients end above the first block: by file name, the tensors whose gradients each has.
    None where no backward pass of this job ends earlier: all train the first block, or what may lie below it.
    """
    if job.units.chosen.from_below or "outside" in schema.units:
        return {}
    blocks = tuple(block for block in schema.blocks if block in schema.units)
    return {
        files.step_from(block): tuple(t.name for t in schema.tensors if t.unit not in blocks[:place])
        for place, block in enumerate(blocks)
        if place
    }


def _batch(base: OpenBase, examples: int, length: int) -> Arrays:
    """Made-up inputs; of texts, the first has `length` tokens and the others no more."""
    draw = generator(0, "edge-batch", examples, str(length))
    lengths = [length, *draw.integers(1, length + 1, examples - 1).tolist()]
    return base.encoder.collate(base.encoder.made_up(lengths, draw))


@dataclass(frozen=True)
class _Trial:
    """What graphs are given, and what torch makes of it. given: of the forward graph; more:
    what a step takes beside that.
    """

    given: Arrays
    more: Arrays
    logits: np.ndarray
    loss: np.ndarray
    count: np.ndarray
    gradients: Arrays


def _trials(base: OpenBase, model: TunableModel, parameters: Parameters, gradients: bool) -> list[_Trial]:
    """Of other batches than the traced one, with trained values near the start."""
    draw, found = generator(0, "edge-values"), []
    for examples, length in TRIED:
        methods.write(
            parameters,
            {
                name: v + (SHIFT * draw.standard_normal(v.shape)).astype(np.float32)
                for name, v in methods.read(parameters).items()
            },
        )
        batch = _batch(base, examples, length)
        labels = draw.integers(0, base.classes, examples)
        weight = draw.uniform(0.1, 1.0, examples).astype(np.float32)
        inputs = {name: torch.from_numpy(x) for name, x in batch.items()}
        out = model(**inputs)
        loss, _, count = model.loss(out, inputs, torch.from_numpy(labels))
        slopes = (
            torch.autograd.grad(
                (loss * torch.from_numpy(weight)).sum(),
                list(parameters.values()),
                allow_unused=True,
                materialize_grads=True,
            )
            if gradients
            else ()
        )
        more = {files.WEIGHT: weight} | ({files.LABELS: labels} if model.task.has_head else {})
        found.append(
            _Trial(
                batch | methods.read(parameters),
                more,
                out.detach().numpy(),
                loss.detach().numpy(),
                count.numpy(),
                {n: g.numpy() for n, g in zip(parameters, slopes)},
            )
        )
    return found


def _require_equal(
    folder: Path, weights: str, steps: Mapping[str, Collection[str]], trials: Sequence[_Trial]
) -> None:
    """Runs the graphs, one open at a time, on what torch was tried on. steps: by file name, the tensors
    whose gradients it has. Raises ModelError.
    """
    forward = open_lean(folder / files.FORWARD, weights)
    for trial in trials:
        _near("logits", forward.run([files.LOGITS], trial.given)[0], trial.logits, LOSS)
    del forward
    for name, tensors in steps.items():
        step = open_lean(folder / name, weights)
        for trial in trials:
            found = dict(zip([o.name for o in step.get_outputs()], step.run(None, trial.given | trial.more)))
            _near("loss", found[files.LOSS], trial.loss, LOSS)
            _near("count", found[files.COUNT], trial.count, 0.0)
            ours, truth = (
                np.concatenate([x.ravel() for x in xs])
                for xs in zip(*((found[files.gradient_of(t)], trial.gradients[t]) for t in tensors))
            )
            off = np.linalg.norm(ours - truth)
            if not off <= GRADIENT * np.linalg.norm(truth) + 1e-7:
                raise _differs("gradients", float(off / np.linalg.norm(truth)), GRADIENT)


def _near(what: str, found: np.ndarray, truth: np.ndarray, limit: float) -> None:
    off = (
        float((np.abs(found - truth) / np.maximum(1.0, np.abs(truth))).max(initial=0.0))
        if found.shape == truth.shape
        else math.inf
    )
    if not off <= limit:
        raise _differs(what, off, limit)


def _differs(what: str, off: float, limit: float) -> ModelError:
    return ModelError(
        f"training graph: its {what} differ from torch by {off:.3g}, {limit:g} is allowed; "
        "nothing was written. Train this base on devices with torch"
    )
