"""Graphs side by side whose weights lie in one file, each once, found by content. Needs onnx."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onnx import TensorProto

from fedtune.common.storage import write_atomic
from fedtune.onnx.folder import WEIGHTS

LEAST = 1024
"""Bytes of a tensor that is worth a place outside of its graph."""
ALIGN = 4096
"""Where a tensor begins: at a page, so that a runtime can map it into memory instead of reading it."""


def write_graphs(folder: Path, graphs: Mapping[str, Any]) -> None:
    """Writes onnx.ModelProtos under their file names into `folder`, with what is large in WEIGHTS. The protos
    are changed: they say where in WEIGHTS it lies, as what `cut` makes of them does.
    """
    places: dict[bytes, tuple[int, int]] = {}
    weights = bytearray()
    for proto in graphs.values():
        for tensor in proto.graph.initializer:
            if len(tensor.raw_data) < LEAST:
                continue
            key = hashlib.sha256(tensor.raw_data).digest()
            if key not in places:
                places[key] = (len(weights), len(tensor.raw_data))
                weights += tensor.raw_data
                weights += bytes(-len(weights) % ALIGN)
            offset, length = places[key]
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for name, value in (("location", WEIGHTS), ("offset", offset), ("length", length)):
                tensor.external_data.add(key=name, value=str(value))
    write_atomic(folder / WEIGHTS, bytes(weights))
    for name, proto in graphs.items():
        write_graph(folder / name, proto)


def write_graph(path: Path, proto: Any) -> None:
    """Writes an onnx.ModelProto, the same one always as the same bytes."""
    write_atomic(path, proto.SerializeToString(deterministic=True))
