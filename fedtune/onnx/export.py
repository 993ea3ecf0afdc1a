"""A merged model as an ONNX graph, float32. Needs torch, onnx and onnxscript."""

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedtune.common.storage import write_atomic
from fedtune.errors import EnvironmentProblem, ModelError
from fedtune.models.base import TunableModel
from fedtune.types import Arrays

LARGEST = 2**31 - 2**24  # a protobuf file holds 2 GiB; some of it is the graph
OUTPUT = "logits"
REMEDY = "leave it out with export.onnx = false"


def export_graph(
    model: TunableModel, example: Arrays, path: Path, opset: int, facts: Mapping[str, Any]
) -> None:
    """Writes `model` as one ONNX file whose inputs are the keys of `example` and whose output is "logits".

    The number of examples is free, and for texts their length; images keep their size. The graph is not
    checked against torch here: see `fedtune.onnx.verify`. Source lines and paths that the exporter notes in a
    graph are taken out of it.

    Args:
        example: a batch as the encoder collates it, at least 2 examples, so that no axis looks constant.
        facts: metadata of the file; values that are not strings are written as JSON.

    Raises:
        ModelError: the exporter cannot handle this architecture or opset,
            or the file would be larger than 2 GiB.
        EnvironmentProblem: onnx or onnxscript is not installed.
    """
    size = 4 * sum(p.numel() for p in model.parameters())
    if size > LARGEST:
        raise ModelError(
            f"ONNX export: {size / 2**30:.1f} GiB of float32 weights, an ONNX file holds 2 GiB; {REMEDY}"
        )
    proto = _trace(model, example, opset)
    made = next(o.version for o in proto.opset_import if o.domain == "")
    if made != opset:
        raise ModelError(
            f"export.opset = {opset}: the exporter could only make opset {made} of this model; "
            f"set export.opset = {made}"
        )
    strip(proto)
    write_proto(proto, path, facts)


def write_proto(proto: Any, path: Path, facts: Mapping[str, Any]) -> None:
    """An onnx.ModelProto with metadata: strings as they are, other facts as JSON."""
    for key, value in facts.items():
        proto.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
    write_atomic(path, proto.SerializeToString(deterministic=True))


class _Positional(nn.Module):
    """The exporter knows positional inputs; a TunableModel takes keywords."""

    def __init__(self, model: TunableModel, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, inputs)))


def _trace(model: TunableModel, example: Arrays, opset: int) -> Any:
    """The onnx.ModelProto."""
    names = tuple(example)
    inputs = tuple(torch.from_numpy(example[name]) for name in names)
    free = dict(enumerate(model.task.inputs.axes))
    try:
        with quiet():
            program = torch.onnx.export(
                _Positional(model, names).eval(),
                inputs,
                dynamo=True,
                opset_version=opset,
                verbose=False,
                input_names=list(names),
                output_names=[OUTPUT],
                dynamic_shapes=(tuple(free for _ in names),),
            )
        assert program is not None, "without a file name, the exporter returns its program"
        return program.model_proto
    except ModuleNotFoundError as e:
        raise EnvironmentProblem(
            f"ONNX export needs the package {e.name}; install fedtune[sim], or {REMEDY}"
        ) from None
    # whatever an architecture does that torch.export cannot follow; the last cause says what
    except Exception as e:
        raise ModelError(
            f"ONNX export: torch cannot export {type(model.body).__name__} ({cause(e)}); {REMEDY}"
        ) from e


def cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}"


def strip(proto: Any) -> None:
    """Takes out notes for debugging (stack traces with this machine's paths among them)
    and shapes of inner values.

    The inner shapes would contradict the ones that quantising changes.
    """
    graphs = [proto.graph, *proto.functions]
    for graph in graphs:
        del graph.value_info[:]
        for part in (graph, *graph.node):
            del part.metadata_props[:]
            part.doc_string = ""
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        del value.metadata_props[:]
        value.doc_string = ""
    del proto.metadata_props[:]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warning and no log line from the libraries inside; both settings are restored."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
