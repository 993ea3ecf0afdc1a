"""A model's training step as an ONNX graph that plain onnxruntime runs:
loss and gradients out, trained values in.

The step is traced with torch's own autograd, so the graph holds what autograd would do and nothing for what
is frozen. Batch and, for texts, length are free. A second graph gives logits from the same inputs; both read
the frozen weights from one file (`fedtune.onnx.shared`).
"""

from collections.abc import Container, Sequence
from typing import Any

import torch
from onnx import helper
from onnxscript import optimizer
from torch import Tensor, nn
from torch._decomp import core_aten_decompositions, decomposition_table
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedtune.adapters.methods import Parameters
from fedtune.errors import EnvironmentProblem, ModelError
from fedtune.models.base import TunableModel
from fedtune.onnx.decompositions import TABLE
from fedtune.onnx.export import cause, quiet, strip
from fedtune.onnx.folder import CORRECT, COUNT, LABELS, LOGITS, LOSS, WEIGHT, gradient_of
from fedtune.types import Arrays


def step_graph(model: TunableModel, parameters: Parameters, example: Arrays, opset: int) -> Any:
    """One pass forward and back, as an onnx.ModelProto.

    Inputs: the keys of `example`; "labels" int64 [n], where the task has labels; "weight" float32 [n]; the
    trained tensors by name. Outputs: "loss", "correct" and "count", float32 [n], as `TunableModel.loss`
    gives them; "gradient:NAME" of sum(weight * loss) for each tensor.

    Args:
        model: with its adapter on it; `parameters` as `attach` returned them.
        example: a batch of at least 2 examples as the encoder collates it.

    Raises ModelError: an operation of this base cannot be traced or exported.
    """
    keys, labelled = tuple(example), model.task.has_head
    frozen, places = _divided(model, parameters)

    def step(fixed: list[Tensor], given: list[Tensor], values: list[Tensor]) -> list[Tensor]:
        values = [v.detach().requires_grad_() for v in values]
        inputs = dict(zip(keys, given))
        out = torch.func.functional_call(
            model, dict(zip(frozen, fixed)) | dict(zip(places, values)), (), inputs
        )
        loss, correct, count = model.loss(out, inputs, given[len(keys)] if labelled else inputs[keys[0]])
        found = torch.autograd.grad(
            (loss * given[-1]).sum(), values, allow_unused=True, materialize_grads=True
        )
        return [loss.detach(), correct, count, *found]

    n = len(next(iter(example.values())))
    extra = {
        **({LABELS: torch.zeros(n, dtype=torch.int64)} if labelled else {}),
        WEIGHT: torch.full((n,), 1.0 / n),
    }
    outputs = [LOSS, CORRECT, COUNT, *(gradient_of(name) for name in parameters)]
    return _exported(step, frozen, _tensors(example) | extra, parameters, outputs, model, opset)


def forward_graph(model: TunableModel, parameters: Parameters, example: Arrays, opset: int) -> Any:
    """From the same inputs, without labels and weight, to "logits". Otherwise as `step_graph`."""
    keys = tuple(example)
    frozen, places = _divided(model, parameters)

    def forward(fixed: list[Tensor], given: list[Tensor], values: list[Tensor]) -> list[Tensor]:
        return [
            torch.func.functional_call(
                model, dict(zip(frozen, fixed)) | dict(zip(places, values)), (), dict(zip(keys, given))
            )
        ]

    with torch.no_grad():
        return _exported(forward, frozen, _tensors(example), parameters, [LOGITS], model, opset)


def decompositions() -> dict[Any, Any]:
    """By operation: torch's own of the core set and of everything backward, and ours before them."""
    backward = {
        operation: how for operation, how in decomposition_table.items() if "backward" in str(operation)
    }
    return backward | core_aten_decompositions() | TABLE


def _divided(model: TunableModel, parameters: Parameters) -> tuple[dict[str, Tensor], list[str]]:
    """All tensors of the model that are not trained, by their names in it, and the names in it of those
    that are, in their order.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    places = [names[id(p)] for p in parameters.values()]
    everything = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: t.detach() for name, t in everything.items() if name not in set(places)}, places


def _tensors(example: Arrays) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in example.items()}


class _Baked(nn.Module):
    """The traced function with what is frozen as its own."""

    def __init__(self, graph: GraphModule, frozen: Sequence[Tensor], given: int) -> None:
        super().__init__()
        self.graph, self.given, self.count = graph, given, len(frozen)
        for place, tensor in enumerate(frozen):
            self.register_buffer(f"frozen_{place}", tensor)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return self.graph(
            [getattr(self, f"frozen_{i}") for i in range(self.count)],
            list(inputs[: self.given]),
            list(inputs[self.given :]),
        )


def _exported(
    function: Any,
    frozen: dict[str, Tensor],
    given: dict[str, Tensor],
    parameters: Parameters,
    outputs: list[str],
    model: TunableModel,
    opset: int,
) -> Any:
    axes, values = len(model.task.inputs.axes), [p.detach().clone() for p in parameters.values()]
    free: list[Any] = [
        {i: torch.export.Dim.DYNAMIC for i in range(axes if x.dim() == 2 else 1)} for x in given.values()
    ]
    try:
        with quiet(), sdpa_kernel(SDPBackend.MATH):
            shapes = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
            sketched = [
                shapes.from_tensor(x, symbolic_context=_context(x, axes))
                for x, axes in zip(given.values(), free)
            ]
            fixed, trained = (
                [shapes.from_tensor(x, static_shapes=True) for x in xs] for xs in (frozen.values(), values)
            )
            with shapes:
                traced = make_fx(function, tracing_mode="symbolic", decomposition_table=decompositions())(
                    fixed, sketched, trained
                )
            masks_early(traced)
            baked = _Baked(traced, list(frozen.values()), len(given)).eval()
            program = torch.export.export(
                baked,
                (*given.values(), *values),
                dynamic_shapes=((*free, *[None] * len(values)),),
                strict=False,
            )
            made = torch.onnx.export(
                program,
                (),
                dynamo=True,
                opset_version=opset,
                verbose=False,
                optimize=False,
                input_names=[*given, *parameters],
                output_names=outputs,
            )
            assert made is not None, "without a file name, the exporter returns its program"
            # only this of what the exporter would do: its rewriting takes minutes here, and constants that it
            # made of weights would be copies
            optimizer.fold_constants(made.model, input_size_limit=SMALL, output_size_limit=SMALL)
            optimizer.remove_unused_nodes(made.model)
        proto = made.model_proto
    except ModuleNotFoundError as e:
        raise EnvironmentProblem(
            f"a training graph needs the package {e.name}; install fedtune[sim]"
        ) from None
    except Exception as e:  # whatever an architecture does that cannot be traced; the last cause says what
        raise ModelError(
            f"training graph: torch cannot export {type(model.body).__name__} ({cause(e)}); "
            "train it on devices with torch"
        ) from e
    strip(proto)
    untransposed(proto)
    return proto


def untransposed(proto: Any) -> None:
    """Products with a transposed weight as products that transpose: a runtime would make a transposed copy
    of each weight when it opens the graph.
    """
    weights = {x.name for x in proto.graph.initializer}
    turned = {
        node.output[0]: node.input[0]
        for node in proto.graph.node
        if node.op_type == "Transpose" and node.input[0] in weights
    }
    for node in proto.graph.node:
        if (
            node.op_type in ("MatMul", "Gemm")
            and node.input[1] in turned
            and not any(a.name in ("transA", "transB") for a in node.attribute)
        ):
            node.op_type = "Gemm"
            node.input[1] = turned[node.input[1]]
            node.attribute.append(helper.make_attribute("transB", 1))
    used = {name for node in proto.graph.node for name in node.input}
    kept = [
        node
        for node in proto.graph.node
        if not (node.op_type == "Transpose" and node.output[0] in turned and node.output[0] not in used)
    ]
    del proto.graph.node[:]
    proto.graph.node.extend(kept)


def _context(x: Tensor, axes: Container[int]) -> StatelessSymbolicContext:
    """Only what is free is a symbol: a graph with symbols for all sizes takes minutes to trace."""
    return StatelessSymbolicContext(
        [DimDynamic.DYNAMIC if i in axes else DimDynamic.STATIC for i in range(x.dim())]
    )


SMALL = 1024
"""Numbers of a constant that is folded into others."""
_MASKS = frozenset(
    {
        "le",
        "lt",
        "ge",
        "gt",
        "eq",
        "ne",
        "logical_or",
        "logical_and",
        "logical_not",
        "bitwise_and",
        "bitwise_or",
    }
)


def masks_early(traced: GraphModule) -> None:
    """Moves comparisons to where their inputs are made, so that between forward and backward a ReLU keeps
    a byte a number, and not its float32 input.
    """
    for node in list(traced.graph.nodes):
        if (
            node.op == "call_function"
            and str(node.target).split(".")[1:2]
            and str(node.target).split(".")[1] in _MASKS
        ):
            inputs = [n for n in node.all_input_nodes if n.op != "placeholder"]
            if inputs:
                max(inputs).append(node)  # nodes compare by their places in the graph
    traced.recompile()
