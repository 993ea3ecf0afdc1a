"""What a run leaves for others: the native adapter, a folder that PEFT opens, ONNX graphs, and a model card.

    adapter/    adapter.safetensors, frame.safetensors (Fed-SB), adapter.json:
                everything trained, without the base
    peft/       adapter_model.safetensors, adapter_config.json, head.safetensors:
                fed-sb and lora as a plain LoRA
    onnx/       model.onnx, model.int8.onnx, if asked for model.static.onnx and model.adapters.onnx;
                model.json, verify.json and the encoder's files: all a device needs
    README.md   the model card

Of what one client predicts with, in a folder of its own, the first three.
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save

from fedtune.adapters import methods
from fedtune.adapters.kinds.table import METHODS
from fedtune.adapters.spec import ADAPTER, DESCRIPTION, AdapterSpec
from fedtune.bundles.bundle import Bundle, open_bundle
from fedtune.common.seeds import generator
from fedtune.common.storage import failing_clearly, write_atomic, write_json
from fedtune.data.encoded import ClientData, Encoder
from fedtune.errors import ContractError, RunError, UserError
from fedtune.models.base import TunableModel
from fedtune.onnx import verify
from fedtune.onnx.export import export_graph, write_proto
from fedtune.onnx.folder import FORMAT
from fedtune.onnx.predict import ADAPTERS, CARD, CARD_FILE, FLOAT32, INT8, STATIC, ModelCard
from fedtune.onnx.quantise import quantise, quantise_static
from fedtune.round.batches import by_length
from fedtune.round.keeping import personal_model
from fedtune.runs.folder import RunFolder, versions
from fedtune.stateful.methods import method_of
from fedtune.stateful.store import Kept
from fedtune.tasks import Task
from fedtune.training.local import to_batch
from fedtune.types import Arrays
from fedtune.workflows.card import Exports, model_card, public_name
from fedtune.workflows.setup import Setup, open_setup

Stage = Callable[[str], None]

EXAMPLES = 512
PARTS = ("adapter", "peft", "onnx", "README.md")
CALIBRATION, CALIBRATED = 64, 8
"""Training examples that static ranges are found on, and how many at once."""
_CHUNK = 256  # examples encoded at once, so that images do not fill the memory


@dataclass(frozen=True)
class _Trained:
    """A run at its newest checkpoint: the opened job, the bundle, the trained values after `round` rounds,
    the held-out rows that graphs are compared on, and the model as it travels.
    """

    setup: Setup
    bundle: Bundle
    arrays: Arrays
    round: int
    held_out: np.ndarray
    shared: Arrays

    @property
    def spec(self) -> AdapterSpec:
        return self.bundle.manifest.spec

    def adapted(self) -> TunableModel:
        """As it was trained, the adapter beside the base."""
        return self.attached()[0]

    def attached(self) -> tuple[TunableModel, methods.Parameters]:
        """The same, and its trained parameters."""
        model = self.setup.fresh_model()
        parameters = methods.attach(model, self.spec, self.bundle.frame)
        methods.write(parameters, self.arrays)
        return model, parameters

    @cached_property
    def merged(self) -> TunableModel:
        """The adapter folded into the base."""
        model = self.setup.fresh_model()
        methods.merge(model, self.spec, self.bundle.frame, self.arrays)
        return model


def export_run(
    run: RunFolder, setup: Setup | None = None, stage: Stage = lambda text: None, examples: int = EXAMPLES
) -> Exports:
    """Writes the exports of a run at its newest checkpoint, as its `[export]` section asks,
    in place of earlier ones.

    Everything is made and checked in a folder of its own and moved into the run at the end, so that a
    failure leaves the earlier exports whole. Between two moves a crash can leave a part missing;
    exporting again mends it.

    Args:
        setup: the opened job, where the caller has it; its `[export]` section counts.
        examples: held-out examples of all clients, drawn by the seed, that each graph is compared on at most.

    Returns:
        What each export is, by "adapter", "peft", "float32" and "int8": file, bytes, and for graphs their
        agreement with the trained model; or a `note` alone that says why it was left out.

    Raises:
        RunError: no checkpoint yet, or base or labels are no longer those of the run.
        ModelError: the architecture cannot be exported, or the float32 graph differs by more
            than export.max-difference.
    """
    trained = _open(run, setup)
    with failing_clearly(run.path), tempfile.TemporaryDirectory(prefix=".export-", dir=run.path) as scratch:
        made = Path(scratch) / "new"
        exports = _make(trained, made, stage, examples)
        write_atomic(
            made / "README.md",
            model_card(run, trained.setup, trained.bundle, trained.round, exports).encode(),
        )
        _publish(made, Path(scratch) / "old", run.path)
    return exports


def export_client(
    run: RunFolder,
    client: str,
    folder: Path,
    setup: Setup | None = None,
    stage: Stage = lambda text: None,
    examples: int = EXAMPLES,
) -> Exports:
    """As `export_run`, of what one client of a simulation predicts with, into `folder`, which must be new or
    empty. No model card: it is not everybody's.

    Graphs are compared on the client's own held-out examples, where it has any.

    Raises UserError for a job whose clients predict with the global model, a client that the run does not
    have, one that keeps nothing yet, and a folder that holds something.
    """
    with failing_clearly(folder):
        target = folder.expanduser().resolve()
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UserError(f"--out {folder}: already exists and is not empty; choose another")
        if target.is_relative_to(run.path.resolve()):
            raise UserError(
                f"--out {folder}: lies in the run folder, whose own exports would "
                "take its place; choose another"
            )
        if above := next((p for p in target.parents if p.exists() and not p.is_dir()), None):
            raise UserError(f"--out {folder}: {above.name} is a file; choose another")
        trained = _of_client(_open(run, setup), run, client)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=target.parent) as scratch:
            made = Path(scratch) / "new"
            exports = _make(trained, made, stage, examples)
            made.replace(target)
    return exports


def _make(trained: _Trained, made: Path, stage: Stage, examples: int) -> Exports:
    settings = trained.setup.job.export
    if trained.setup.job.simulation.threads:
        torch.set_num_threads(trained.setup.job.simulation.threads)
    made.mkdir()
    stage("writing the adapter")
    exports: Exports = {"adapter": _write_adapter(trained, made / "adapter")}
    if settings.peft:
        exports["peft"] = _write_peft(trained, made / "peft")
    if settings.onnx:
        exports |= _write_onnx(trained, made / "onnx", stage, examples)
    return exports


def _of_client(trained: _Trained, run: RunFolder, client: str) -> _Trained:
    job, split, bundle = trained.setup.job, trained.setup.split, trained.bundle
    method = method_of(job)
    if method.personal is None or method.keeps is None:
        raise UserError(
            f'--client {client}: personal.method = "none", so all clients predict with the global model; '
            "export it without --client"
        )
    try:
        place = split.clients.place(client)
    except KeyError:
        raise UserError(
            f"--client {client}: the run has no such client; its {len(split.clients)} are called "
            f"{split.clients[0]}, …, {split.clients[-1]}"
        ) from None
    run.require_kept()
    own = personal_model(
        bundle,
        Kept(run.clients, method.keeps(bundle.manifest.spec.schema)),
        trained.shared,
        client,
        trained.round,
    )
    if own is None:
        raise UserError(
            f"--client {client}: took part in none of the {trained.round} rounds, so it has nothing "
            "of its own; name one that did"
        )
    rows = split.held_out[place]
    return replace(trained, arrays=own, held_out=rows if len(rows) else trained.held_out)


def _open(run: RunFolder, setup: Setup | None) -> _Trained:
    checkpoint = run.newest()
    if checkpoint is None:
        raise RunError(
            f"{run.path}: has no checkpoint yet; continue it with `fedtune simulate --resume {run.path}`"
        )
    setup = setup or open_setup(run.job())
    bundle = open_bundle(run.bundle)
    require_same_base(run.path, setup.sha256, bundle.manifest.sha256, setup.job.model.source)
    if setup.dataset.label_names != bundle.manifest.labels:
        now = f"the data now has {list(setup.dataset.label_names)}"
        raise RunError(
            f"{run.path}: was trained on labels {list(bundle.manifest.labels)}, {now}; restore that data"
        )
    return _Trained(
        setup,
        bundle,
        bundle.trained(method_of(bundle.job).shared(checkpoint.state.arrays)),
        checkpoint.state.round,
        np.sort(setup.split.held_out.rows),
        checkpoint.state.arrays,
    )


def require_same_base(run: Path, found: str, trained: str, source: str) -> None:
    """Raises RunError where the base is no longer the one that a run was trained on; both by sha256."""
    if found != trained:
        raise RunError(
            f"{run}: was trained on a base with sha256 {trained[:12]}…, {source} is now {found[:12]}…; "
            "restore that base"
        )


def _publish(made: Path, old: Path, run: Path) -> None:
    """Moves every part into the run; what this export did not make is taken away,
    so that no stale file stands beside it.
    """
    old.mkdir()
    for name in PARTS:
        if (run / name).exists():
            (run / name).rename(old / name)
        if (made / name).exists():
            (made / name).rename(run / name)


def _write_adapter(trained: _Trained, folder: Path) -> dict[str, Any]:
    manifest, spec, job = trained.bundle.manifest, trained.spec, trained.setup.job
    folder.mkdir()
    write_atomic(folder / ADAPTER, save(trained.arrays))
    if trained.bundle.frame:
        write_atomic(folder / "frame.safetensors", save(trained.bundle.frame))
    base = {
        "name": public_name(manifest.source),
        "sha256": manifest.sha256,
        "licence": manifest.licence,
        "parameters": manifest.parameters,
    }
    write_json(
        folder / DESCRIPTION,
        {
            "format": FORMAT,
            "task": manifest.task,
            "labels": list(manifest.labels),
            "base": base,
            "method": spec.method,
            "rank": spec.rank,
            "scale": spec.scale,
            "linears": [x.name for x in spec.linears],
            "frame_sha256": manifest.frame_sha256,
            "pooling": job.model.pooling,
            "encoder": trained.setup.encoder.to_config(),
            "round": trained.round,
            "seed": job.federation.seed,
            "versions": manifest.versions,
        },
    )
    return _entry(folder)


def _write_peft(trained: _Trained, folder: Path) -> dict[str, Any]:
    """The adapter as PEFT's LoRA: W + alpha/r · lora_B · lora_A, with Fed-SB's core folded into lora_B."""
    spec, source = trained.spec, trained.bundle.manifest.source
    method = METHODS[spec.method]
    if method.lora_factors is None:
        return {"note": method.no_lora}
    folder.mkdir()
    tensors: Arrays = {}
    for linear in spec.linears:
        b, a = method.lora_factors(trained.bundle.frame, trained.arrays, linear.name)
        tensors[f"base_model.model.{linear.name}.lora_A.weight"] = np.ascontiguousarray(a)
        tensors[f"base_model.model.{linear.name}.lora_B.weight"] = np.ascontiguousarray(b)
    write_atomic(folder / "adapter_model.safetensors", save(tensors, {"format": "pt"}))
    alpha = spec.scale * spec.rank
    write_json(
        folder / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": trained.setup.task.peft,
            "base_model_name_or_path": public_name(source),
            "r": spec.rank,
            "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            # PEFT matches endings: names from the top of the model match nothing else
            "target_modules": [x.name for x in spec.linears],
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
        },
    )
    head = _head(trained)
    if head:
        write_atomic(folder / "head.safetensors", save(head, {"format": "pt"}))
    return _entry(folder)


def _head(trained: _Trained) -> Arrays:
    """head.weight [classes, width] and head.bias [classes], also when the run left them as the seed
    drew them; {} without one.
    """
    head = trained.merged.head
    return {} if head is None else {f"head.{name}": p.detach().numpy() for name, p in head.named_parameters()}


def _write_onnx(trained: _Trained, folder: Path, stage: Stage, examples: int) -> Exports:
    setup, manifest, settings = trained.setup, trained.bundle.manifest, trained.setup.job.export
    held_out = trained.held_out
    if not len(held_out):
        return {"float32": {"note": "no held-out example to check a graph on"}}
    folder.mkdir()
    stage("exporting ONNX")
    example = _example(setup.encoder)
    fedtune, labels = versions()["fedtune"], list(manifest.labels)
    facts = {"task": manifest.task, "labels": labels, "fedtune": fedtune, "base_sha256": manifest.sha256}
    export_graph(trained.merged, example, folder / FLOAT32, settings.opset, facts)
    kinds, left_out = {"float32": FLOAT32}, dict[str, str]()
    if settings.adapters:
        kinds["adapters"] = ADAPTERS
        _write_adapters_graph(trained, example, folder / ADAPTERS, facts)
    if settings.int8:
        stage("quantising to int8")
        kinds["int8"], left_out["int8"] = INT8, quantise(folder / FLOAT32, folder / INT8)
    if settings.static:
        stage("quantising to int8 with fixed ranges")
        kinds["static"], left_out["static"] = STATIC, _quantise_static(setup, folder)
    left_out = {kind: reason for kind, reason in left_out.items() if reason}
    graphs = {kind: folder / name for kind, name in kinds.items() if kind not in left_out}
    index = _drawn(held_out, examples, setup.job.federation.seed)
    stage(f"checking ONNX against torch on {len(index):,} of {len(held_out):,} held-out examples")
    found = verify.compare(
        graphs,
        _checks(trained.adapted(), setup, index),
        setup.job.simulation.threads,
        {"adapters": trained.arrays},
    )
    for kind in found:
        if kind in ("float32", "adapters"):
            verify.require_equal(found[kind], settings.max_difference, f"ONNX {kind}")
        elif reason := verify.reason_against(found[kind], settings.min_agreement):
            left_out[kind] = reason
            graphs.pop(kind).unlink()
    exports = {
        kind: _entry(path) | _figures(found[kind]) | {"examples": len(index), "of": len(held_out)}
        for kind, path in graphs.items()
    }
    exports |= {kind: {"note": reason} for kind, reason in left_out.items()}
    card = ModelCard(
        format=FORMAT,
        task=setup.job.model.task,
        labels=manifest.labels,
        max_length=setup.job.model.max_length,
        opset=settings.opset,
        fedtune=fedtune,
        base=public_name(manifest.source),
        base_sha256=manifest.sha256,
        left_out={kinds[kind]: reason for kind, reason in left_out.items()},
        spec=trained.spec if settings.adapters else None,
        frame_sha256=manifest.frame_sha256 if settings.adapters else "",
    )
    setup.encoder.save(folder)
    write_json(folder / CARD, CARD_FILE.dump_python(card, mode="json"))
    write_json(folder / "verify.json", exports)
    return exports


def _write_adapters_graph(trained: _Trained, example: Arrays, path: Path, facts: Mapping[str, Any]) -> None:
    """The base with the frame, and the trained tensors as inputs. Raises ModelError as `forward_graph`."""
    from fedtune.onnx.training import forward_graph

    write_proto(forward_graph(*trained.attached(), example, trained.setup.job.export.opset), path, facts)


def _quantise_static(setup: Setup, folder: Path) -> str:
    """Why there is no such graph; "" for one that was written."""
    if setup.job.privacy.hides_clients:
        return "its ranges would be of training examples, and privacy protects these"
    rows = generator(setup.job.federation.seed, "calibration").permutation(setup.split.train.rows)[
        :CALIBRATION
    ]
    data = setup.store.stream(np.sort(rows))
    quantise_static(
        folder / FLOAT32,
        folder / STATIC,
        (setup.encoder.collate(data.take(places).encoded) for places in by_length(data.lengths, CALIBRATED)),
    )
    return ""


def _example(encoder: Encoder) -> Arrays:
    """A batch of 2 to trace with; its sides differ, so that the exporter does not
    take two free axes for one.
    """
    return encoder.collate(encoder.made_up((4, 3), generator(0, "export-example")))


def _drawn(index: np.ndarray, limit: int, seed: int) -> np.ndarray:
    if limit < 1:
        raise ContractError(f"examples = {limit}: a graph must be checked on at least 1")
    return np.sort(generator(seed, "export").choice(index, size=min(limit, len(index)), replace=False))


def _checks(model: TunableModel, setup: Setup, index: np.ndarray) -> Iterator[verify.Check]:
    """The trained model's logits, batch by batch."""
    for start in range(0, len(index), _CHUNK):
        examples = setup.dataset.examples.take(index[start : start + _CHUNK])
        data = ClientData(setup.encoder.encode(examples.inputs), examples.labels)
        for places in by_length(data.lengths, setup.job.evaluation.batch_size):
            batch, labels = to_batch(data, places, setup.encoder)
            with torch.inference_mode():
                logits = model(**batch).numpy()
            yield _check({name: x.numpy() for name, x in batch.items()}, logits, labels.numpy(), model.task)


def _check(inputs: Arrays, logits: np.ndarray, labels: np.ndarray, task: Task) -> verify.Check:
    rows, classes = task.targets(inputs, labels)
    return verify.Check(inputs, rows, logits[rows], classes[rows])


def _entry(path: Path) -> dict[str, Any]:
    """Name in the run folder and bytes, of a folder or of a graph in onnx/."""
    if path.is_dir():
        return {"file": f"{path.name}/", "bytes": sum(p.stat().st_size for p in path.iterdir())}
    return {"file": f"{path.parent.name}/{path.name}", "bytes": path.stat().st_size}


def _figures(found: verify.Agreement) -> dict[str, float | None]:
    return {name: None if math.isnan(x) else x for name, x in asdict(found).items()}
