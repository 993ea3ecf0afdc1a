"""Smaller steps: which there are, that each computes what the whole step does,
and that they bring no weights.
"""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from fedtune.adapters.spec import AdapterSpec
from fedtune.job import parse_job
from fedtune.onnx import folder as files
from fedtune.onnx.cut import cut
from fedtune.onnx.shared import write_graph, write_graphs
from fedtune.types import TensorSpec
from fedtune.wire import Schema
from fedtune.workflows.edge_folder import smaller_steps


def spec(*units: str) -> AdapterSpec:
    return AdapterSpec(
        "fed-sb",
        2,
        1.0,
        (),
        tuple(TensorSpec(f"{unit}.{name}", (2, 2), unit) for unit in units for name in "ab"),
        (),
    )


def card(spec: AdapterSpec, *cuts: str) -> files.EdgeCard:
    return files.EdgeCard(
        files.FORMAT,
        "text-classification",
        ("a", "b"),
        8,
        spec,
        "base",
        "",
        "",
        20,
        "0",
        dict.fromkeys((files.STEP, files.FORWARD, *cuts), ""),
    )


THREE = spec("block.0", "block.1", "block.2", "head")


@pytest.mark.parametrize(
    "units, file",
    [
        ("head", "step-block.2.onnx"),
        ("block.2 head", "step-block.2.onnx"),
        ("block.1 head", "step-block.1.onnx"),
        ("block.1 block.2", "step-block.1.onnx"),
        ("block.0 head", "step.onnx"),
        ("block.0 block.2", "step.onnx"),
    ],
)
def test_the_smallest_step_that_has_them_is_taken(units: str, file: str) -> None:
    names = [t.name for t in THREE.schema.of_units(units.split())]
    assert card(THREE, "step-block.1.onnx", "step-block.2.onnx").step_of(names) == file
    assert card(THREE).step_of(names) == "step.onnx"  # a folder without smaller ones
    # or without some
    assert card(THREE, "step-block.1.onnx").step_of(names) == (
        "step.onnx" if "block.0" in units else "step-block.1.onnx"
    )
    assert card(THREE, "step-block.1.onnx", "step-block.2.onnx").step_of(None) == "step.onnx"


def test_what_may_lie_below_the_blocks_takes_the_whole_step() -> None:
    assert (
        card(spec("outside", "block.0", "block.1"), "step-block.1.onnx").step_of(["outside.a", "block.1.a"])
        == "step.onnx"
    )


@pytest.mark.parametrize(
    "strategy", ["all", "top", "bottom", "both", "lisa", "gradient", "rgn", "snr", "fisher"]
)
def test_jobs_whose_backward_pass_may_end_early_have_smaller_steps(strategy: str) -> None:
    job = parse_job("", [f"units.strategy={strategy}", *(["units.budget=1"] if strategy != "all" else [])])
    found = smaller_steps(job, THREE.schema)
    assert found == (
        {}
        if strategy in ("all", "bottom")
        else {
            "step-block.1.onnx": ("block.1.a", "block.1.b", "block.2.a", "block.2.b", "head.a", "head.b"),
            "step-block.2.onnx": ("block.2.a", "block.2.b", "head.a", "head.b"),
        }
    )
    assert not smaller_steps(job, spec("outside", "block.0", "block.1").schema) and not smaller_steps(
        job, Schema(())
    )


def chain() -> onnx.ModelProto:
    """y = x w0 w1; "near" = y w2, and "far" = y w3 w4."""
    weights = [
        onnx.numpy_helper.from_array(
            np.random.default_rng(i).standard_normal((32, 32)).astype(np.float32), f"w{i}"
        )
        for i in range(5)
    ]
    nodes = [
        helper.make_node("MatMul", [a, b], [c])
        for a, b, c in [
            ("x", "w0", "h"),
            ("h", "w1", "y"),
            ("y", "w3", "f"),
            ("y", "w2", "near"),
            ("f", "w4", "far"),
        ]
    ]
    values = [helper.make_tensor_value_info(name, 1, (32, 32)) for name in ("x", "unused", "near", "far")]
    return helper.make_model(
        helper.make_graph(nodes, "g", values[:2], values[2:], weights),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )


def test_a_cut_has_what_its_outputs_need_and_reads_the_weights_of_the_whole(tmp_path: Path) -> None:
    whole = chain()
    write_graphs(tmp_path, {"whole.onnx": whole})
    before, weights = whole.SerializeToString(deterministic=True), (tmp_path / files.WEIGHTS).read_bytes()
    part = cut(whole, {"near"})
    write_graph(tmp_path / "part.onnx", part)
    assert (
        whole.SerializeToString(deterministic=True) == before
        and (tmp_path / files.WEIGHTS).read_bytes() == weights
    )
    assert [list(n.output) for n in part.graph.node] == [["h"], ["y"], ["near"]] and [
        x.name for x in part.graph.initializer
    ] == ["w0", "w1", "w2"]
    assert [x.name for x in part.graph.input] == ["x", "unused"] and len(
        (tmp_path / "part.onnx").read_bytes()
    ) < len((tmp_path / "whole.onnx").read_bytes())
    onnx.checker.check_model(str(tmp_path / "part.onnx"))
    feed = {
        name: np.random.default_rng(9).standard_normal((32, 32)).astype(np.float32)
        for name in ("x", "unused")
    }
    found = [
        onnxruntime.InferenceSession(tmp_path / f"{name}.onnx", providers=["CPUExecutionProvider"]).run(
            ["near"], feed
        )[0]
        for name in ("whole", "part")
    ]
    np.testing.assert_array_equal(*found)
    assert cut(whole, {"near", "far"}) == whole
