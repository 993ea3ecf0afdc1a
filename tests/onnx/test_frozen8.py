"""Frozen weights of 8 bits: the graph computes with the rounded base exactly, holds a quarter of the
bytes, and rounding costs little.
"""

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from fedtune.adapters.methods import attach, write
from fedtune.edge.graphs import Graphs
from fedtune.job import parse_job
from fedtune.models.load import load_model
from fedtune.models.sources import locate
from fedtune.onnx.frozen8 import LEAST, STEPS, as_integers, round_frozen
from fedtune.onnx.lean import open_lean
from fedtune.workflows.prepare import prepare


def test_weights_are_rounded_to_the_nearest_step_of_their_row():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Embedding(200, 32), torch.nn.Linear(32, 200), torch.nn.Linear(8, 8), torch.nn.Linear(200, 40)
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = round_frozen(model, {id(model[3].weight)})
    assert len(found) == 3 and all(np.frombuffer(key, np.float32).size >= LEAST for key in found)
    for name, p in model.named_parameters():
        if name in ("0.weight", "1.weight"):
            whole, scale, axis = found[p.detach().numpy().tobytes()]
            if name == "1.weight":
                turned = found[p.detach().numpy().T.tobytes()]
                assert np.array_equal(turned[0], whole.T) and turned[2] == 1
            assert (
                axis == 0 and whole.dtype == np.int8 and np.abs(whole).max(1).tolist() == [STEPS] * len(whole)
            )
            torch.testing.assert_close(p, torch.from_numpy(whole * scale[:, None]), rtol=0, atol=0)
            assert (
                (p - before[name]).abs() <= before[name].abs().amax(1, keepdim=True) / STEPS * 0.5001
            ).all()
        else:
            assert torch.equal(p, before[name])


def test_a_row_of_zeros_stays_one():
    model = torch.nn.Linear(64, 64)
    with torch.no_grad():
        model.weight[3] = 0
    (whole, scale, _), _ = round_frozen(model, ()).values()
    assert scale[3] == 1 and not whole[3].any() and not model.weight[3].any()


def test_the_graph_is_that_of_the_rounded_weights(tmp_path):
    """A product, a transposed one, a row picked from a table, a weight that was turned
    before, and one used twice.
    """
    model = torch.nn.ModuleDict(
        {"table": torch.nn.Embedding(100, 64), "first": torch.nn.Linear(64, 64, bias=False)}
    )
    rounded = round_frozen(model, ())
    w, table = model["first"].weight.detach().numpy(), model["table"].weight.detach().numpy()
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"], axis=0),
        helper.make_node("MatMul", ["rows", "w"], ["a"]),
        helper.make_node("Gemm", ["a", "w"], ["b"], transB=1),
        helper.make_node("MatMul", ["b", "turned"], ["c"]),
        helper.make_node("Add", ["c", "small"], ["out"]),
    ]
    small = np.ones(64, np.float32)
    weights = [
        numpy_helper.from_array(x, name)
        for name, x in (("table", table), ("w", w), ("turned", np.ascontiguousarray(w.T)), ("small", small))
    ]
    made = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])],
            [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["n", 64])],
            weights,
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    as_integers(made, rounded)
    onnx.checker.check_model(made, full_check=True)
    kinds = [n.op_type for n in made.graph.node]
    assert kinds.count("DequantizeLinear") == 3 and {
        x.name for x in made.graph.initializer if x.data_type == TensorProto.FLOAT
    } == {"small", "w.scale", "turned.scale", "table.scale"}
    (tmp_path / "g.onnx").write_bytes(made.SerializeToString())
    ids = np.array([3, 99, 0, 3])
    (found,) = open_lean(tmp_path / "g.onnx", "int8").run(["out"], {"ids": ids})
    np.testing.assert_allclose(found, table[ids] @ w @ w.T @ w.T + small, rtol=1e-5, atol=1e-5)


def test_a_folder_holds_integers_and_answers_nearly_as_the_base(tiny_settings, tmp_path):
    job = parse_job(
        "", [*tiny_settings, 'data.labels=["bad", "good"]', "edge.mode=forward", "federation.optimizer=sgd"]
    )
    bundle = prepare(job, tmp_path / "bundle", tmp_path / "graphs", int8=True)
    small = Graphs.open(tmp_path / "graphs")
    assert small.card.weights == "int8" and bundle.manifest.frame_sha256 == small.card.frame_sha256
    kinds = [x.data_type for x in onnx.load(tmp_path / "graphs" / "forward.onnx").graph.initializer]
    assert kinds.count(TensorProto.INT8) >= 12  # six linears in each of two blocks
    ids = np.array([[2, 5, 9, 3], [2, 7, 8, 3]])
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    model = load_model(job.model, locate(job.model.source), 2, job.federation.seed)
    write(attach(model, bundle.manifest.spec, bundle.frame), bundle.initial)
    with torch.inference_mode():
        theirs = model(**{name: torch.from_numpy(x) for name, x in batch.items()}).numpy()
    ours = small.logits(batch, dict(bundle.initial))
    assert 0 < np.abs(ours - theirs).max() < 0.1 * np.abs(theirs).max()
