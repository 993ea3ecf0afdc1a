"""Frozen weights of training graphs as 8-bit integers: a quarter of their size on disk and in memory.

Needs torch and onnx.

Weights of linears, convolutions and embeddings that are not trained become round(w / s), one scale s = max
|w| / 127 for each output (for each row of an embedding). A graph turns them back to float32 where they are
used, so its arithmetic stays in float32 and its gradients are exact for the rounded base: the rounding of
weight-only int8, as LLM.int8() has it without its outliers (Dettmers et al. 2022, section 2.1).
"""

from collections.abc import Container, Mapping

import numpy as np
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import nn

STEPS = 127
LEAST = 1024
"""Numbers of a weight that is worth rounding."""

AXIS = "last_axis"
Rounded = dict[bytes, tuple[np.ndarray, np.ndarray, int]]
"""By the bytes of a rounded weight in float32: the integers, int8, the scales, float32 [outputs],
and the axis of the outputs. A linear's stands there twice, as it is and transposed, because
exporters do that to small ones.
"""


def round_frozen(model: nn.Module, trained: Container[int]) -> Rounded:
    """Rounds the frozen weights of a model in place. trained: ids of the parameters that stay as they are."""
    found: Rounded = {}
    for module in model.modules():
        weight = module.weight if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)) else None
        if weight is None or id(weight) in trained or weight.numel() < LEAST:
            continue
        values = weight.detach().numpy()
        flat = values.reshape(len(values), -1)
        scale = (np.abs(flat).max(1) / STEPS).astype(np.float32)
        scale[scale == 0] = 1.0
        whole = np.rint(flat / scale[:, None]).astype(np.int8)
        # as DequantizeLinear computes it
        back = (whole.astype(np.float32) * scale[:, None]).reshape(values.shape)
        with torch.no_grad():
            weight.copy_(torch.from_numpy(back))
        found[back.tobytes()] = (whole.reshape(values.shape), scale, 0)
        if isinstance(module, nn.Linear):
            found[back.T.tobytes()] = (np.ascontiguousarray(whole.T), scale, 1)
    return found


def as_integers(proto: ModelProto, rounded: Mapping[bytes, tuple[np.ndarray, np.ndarray, int]]) -> None:
    """Replaces initializers that hold rounded weights, and puts what turns them back before each node that
    uses one, so that none stays in memory as floats from a forward pass to the backward one.
    """
    graph, kept, lengths = proto.graph, [], {len(data) for data in rounded}
    weights: dict[str, tuple[np.ndarray, np.ndarray, int]] = {}
    for tensor in graph.initializer:
        if len(tensor.raw_data) in lengths and tensor.raw_data in rounded:
            weights[tensor.name] = rounded[tensor.raw_data]
        else:
            kept.append(tensor)
    del graph.initializer[:]
    graph.initializer.extend(kept)
    for name, (whole, scale, _) in weights.items():
        graph.initializer.append(numpy_helper.from_array(whole, f"{name}.int8"))
        graph.initializer.append(numpy_helper.from_array(scale, f"{name}.scale"))
    nodes: list[NodeProto] = []
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name not in weights:
                continue
            if (
                node.op_type == "Gather"
                and place == 0
                and not any(a.name == "axis" and a.i for a in node.attribute)
            ):
                nodes += _gathered(node, name)
                break
            made = f"{name}.{len(nodes)}"
            nodes.append(
                helper.make_node(
                    "DequantizeLinear", [f"{name}.int8", f"{name}.scale"], [made], axis=weights[name][2]
                )
            )
            node.input[place] = made
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    assert not any(name in weights for node in nodes for name in node.input), (
        "a weight that nobody turned back"
    )
    if any(AXIS in node.input for node in nodes):
        graph.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), AXIS))


def _gathered(node: NodeProto, name: str) -> list[NodeProto]:
    """Rows of an embedding, turned back after they are picked: the table stays of integers."""
    out = node.output[0]
    return [
        helper.make_node("Gather", [f"{name}.int8", node.input[1]], [f"{out}.int8"], axis=0),
        helper.make_node("Gather", [f"{name}.scale", node.input[1]], [f"{out}.scale"], axis=0),
        helper.make_node("Cast", [f"{out}.int8"], [f"{out}.whole"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", [f"{out}.scale", AXIS], [f"{out}.wide"]),
        helper.make_node("Mul", [f"{out}.whole", f"{out}.wide"], [out]),
    ]
