"""int8 twins of float32 graphs. Needs onnx.

Weights use 7 of the 8 bits, because x86 processors without VNNI saturate sums of full ones: so figures
measured here hold on such a device too.
"""

import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx

from fedtune.onnx.export import quiet
from fedtune.types import Arrays

PRODUCTS = ["MatMul", "Gemm"]
LEAST_SHARE = 0.1


def quantise(source: Path, target: Path) -> str:
    """Dynamic int8: weights of matrix products as 8-bit integers,
    activations turned into 8 bits while running.

    Only constant factors of matrix products become integers (one scale per output); embeddings and
    convolutions stay float32.

    Returns:
        "" when `target` was written, else why not: it would not be worth it.
    """
    share = product_share(onnx.load(source))
    if share < LEAST_SHARE:
        return f"{share:.1%} of the weights are in matrix products, so int8 would save next to nothing"
    with quiet():
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=PRODUCTS,
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
        )
    return ""


def quantise_static(source: Path, target: Path, batches: Iterable[Arrays]) -> None:
    """Static int8: as above, convolutions too, and activations in fixed ranges: the least and the largest
    value that `batches` give.
    """
    with quiet(), tempfile.TemporaryDirectory(dir=target.parent, prefix=".static-") as scratch:
        from onnxruntime.quantization import (
            CalibrationDataReader,
            CalibrationMethod,
            QuantFormat,
            QuantType,
            quantize_static,
        )
        from onnxruntime.quantization.shape_inference import quant_pre_process

        class Batches(CalibrationDataReader):
            def __init__(self) -> None:
                self.left = iter(batches)

            def get_next(self) -> Arrays | None:
                return next(self.left, None)

        ready = Path(scratch) / "ready.onnx"
        quant_pre_process(source, ready, skip_symbolic_shape=True)
        quantize_static(
            ready,
            target,
            Batches(),
            QuantFormat.QDQ,
            op_types_to_quantize=[*PRODUCTS, "Conv"],
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )


def product_share(model: onnx.ModelProto) -> float:
    """Share of a graph's numbers that are constant second factors of matrix products, 0 to 1."""
    sizes = {t.name: int(np.prod(t.dims, dtype=np.int64)) for t in model.graph.initializer}
    factors = {node.input[1] for node in model.graph.node if node.op_type in PRODUCTS}
    return sum(sizes.get(name, 0) for name in factors) / max(1, sum(sizes.values()))
