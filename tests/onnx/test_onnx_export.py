"""Graphs of small models with random weights against torch, and the figures of a
comparison on graphs made by hand.
"""

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn
from transformers import BertConfig, BertModel

from fedtune.errors import ModelError
from fedtune.models.base import TunableModel
from fedtune.onnx.export import export_graph
from fedtune.onnx.quantise import product_share, quantise
from fedtune.onnx.verify import (
    UNLABELLED,
    Agreement,
    Check,
    compare,
    open_graph,
    reason_against,
    require_equal,
)
from fedtune.tasks import TASKS
from fedtune.types import Arrays

VOCABULARY = 50


def bert() -> TunableModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    body = BertModel(config, add_pooling_layer=False)
    return TunableModel(body, TASKS["text-classification"], nn.Linear(32, 3)).eval()


def batch(lengths: list[int]) -> Arrays:
    """Random ids, padded on the right to the longest."""
    mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
    ids = np.random.default_rng(sum(lengths)).integers(1, VOCABULARY, mask.shape) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def run_torch(model: TunableModel, inputs: Arrays) -> np.ndarray:
    with torch.inference_mode():
        return model(**{name: torch.from_numpy(x) for name, x in inputs.items()}).numpy()


@pytest.fixture(scope="module")
def bert_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bert") / "model.onnx"
    export_graph(
        bert(),
        batch([4, 3]),
        path,
        20,
        {"task": "text-classification", "labels": ["a", "b", "c"], "base_sha256": "0" * 64},
    )
    return path


@pytest.mark.parametrize("lengths", [[1], [7], [5, 2, 9], [3] * 6])
def test_a_text_graph_equals_torch_for_any_batch_and_length(bert_graph: Path, lengths: list[int]) -> None:
    inputs = batch(lengths)
    found = open_graph(bert_graph).run(["logits"], inputs)[0]
    np.testing.assert_allclose(found, run_torch(bert(), inputs), atol=1e-5)


def test_a_graph_says_what_it_is_and_not_where_it_was_made(bert_graph: Path) -> None:
    model = onnx.load(bert_graph)
    facts = {p.key: p.value for p in model.metadata_props}
    assert facts == {"task": "text-classification", "labels": '["a", "b", "c"]', "base_sha256": "0" * 64}
    assert [i.name for i in model.graph.input] == ["input_ids", "attention_mask", "token_type_ids"]
    assert [o.version for o in model.opset_import if not o.domain] == [20]
    # the exporter notes stack traces with the paths of this machine
    assert b".py" not in bert_graph.read_bytes()


class _Branching(nn.Module):
    """Its way depends on values, which no graph can follow."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.mean((2, 3)) if pixels.sum() > 0 else pixels.amax((2, 3))


def test_an_architecture_that_cannot_be_exported_is_named_on_one_line(tmp_path: Path) -> None:
    model = TunableModel(_Branching(), TASKS["image-classification"], nn.Linear(3, 2)).eval()
    with pytest.raises(ModelError, match=r"cannot export _Branching .*export\.onnx = false") as e:
        export_graph(model, {"pixels": np.zeros((2, 3, 8, 8), np.float32)}, tmp_path / "model.onnx", 20, {})
    assert "\n" not in str(e.value) and not list(tmp_path.iterdir())


def test_a_model_too_large_for_one_file_is_refused_before_work(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = TunableModel(nn.Linear(2**15, 2**15), TASKS["text-classification"], nn.Linear(1, 1))
    with pytest.raises(ModelError, match=r"4\.0 GiB .* holds 2 GiB"):
        export_graph(model, {}, tmp_path / "model.onnx", 20, {})


def test_int8_replaces_products_only_and_is_close(bert_graph: Path, tmp_path: Path) -> None:
    assert quantise(bert_graph, tmp_path / "int8.onnx") == ""
    kinds = [n.op_type for n in onnx.load(tmp_path / "int8.onnx").graph.node]
    # query, key, value, output, two of the feed-forward, head
    assert kinds.count("MatMulInteger") == 7 and "Gather" in kinds
    inputs = batch([5, 8, 3])
    found = open_graph(tmp_path / "int8.onnx").run(["logits"], inputs)[0]
    assert 0 < np.abs(found - run_torch(bert(), inputs)).max() < 0.1


def graph(path: Path, nodes: list, inputs: list, constants: list) -> Path:
    output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)
    whole = helper.make_graph(nodes, "g", inputs, [output], constants)
    made = helper.make_model(whole, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(made, path)
    return path


@pytest.fixture
def shifted(tmp_path: Path) -> Path:
    """logits = x + [0, 0.25, 0]."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])
    shift = helper.make_tensor("shift", TensorProto.FLOAT, [3], [0, 0.25, 0])
    return graph(
        tmp_path / "shifted.onnx", [helper.make_node("Add", ["x", "shift"], ["logits"])], [x], [shift]
    )


def test_figures_are_those_counted_by_hand(shifted: Path) -> None:
    x = np.array([[1, 0, 0], [0.1, 0, 0], [0, 0, 1]], np.float32)
    first = Check({"x": x}, np.ones(3, bool), x, np.array([0, 0, UNLABELLED]))
    second = Check({"x": x}, np.array([True, False, False]), x[:1], np.array([1]))
    # the second row of `first` turns from label 0 to 1; targets are known for three rows, one of them is met
    assert compare({"a": shifted}, [first, second]) == {"a": Agreement(0.25, 3 / 4, 1 / 3)}


def test_not_a_number_is_never_close_enough(shifted: Path) -> None:
    x = np.array([[np.nan, 0, 0], [0, 0, 0]], np.float32)
    checks = [
        Check({"x": part}, np.ones(len(part), bool), part, np.zeros(len(part), np.int64))
        for part in (x, x[1:])
    ]
    found = compare({"a": shifted}, checks)["a"]
    assert math.isnan(found.max_difference) and reason_against(found, 0.9) == "its logits are not finite"
    with pytest.raises(ModelError, match="differ from torch by nan"):
        require_equal(found, 1e9, "a")


@pytest.mark.parametrize(("agreement", "usable"), [(0.89, False), (0.9, True), (math.nan, False)])
def test_int8_needs_the_share_of_labels_the_job_asks_for(agreement: float, usable: bool) -> None:
    assert (reason_against(Agreement(0.3, agreement, math.nan), 0.9) == "") is usable


def test_the_largest_difference_is_the_limit() -> None:
    require_equal(Agreement(1e-3, 1.0, 1.0), 1e-3, "a")
    with pytest.raises(ModelError, match=r"differ from torch by 0\.0011, export\.max-difference is 0\.001"):
        require_equal(Agreement(1.1e-3, 1.0, 1.0), 1e-3, "a")


def test_convolutions_are_not_worth_int8(tmp_path: Path) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8, 4, 4])
    weight = helper.make_tensor("w", TensorProto.FLOAT, [8, 8, 3, 3], [0.0] * 576)
    head = helper.make_tensor("h", TensorProto.FLOAT, [4, 2], [0.0] * 8)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1]),
        helper.make_node("MatMul", ["y", "h"], ["logits"]),
    ]
    path = graph(tmp_path / "conv.onnx", nodes, [x], [weight, head])
    assert product_share(onnx.load(path)) == 8 / 584
    assert (
        quantise(path, tmp_path / "int8.onnx")
        == "1.4% of the weights are in matrix products, so int8 would save next to nothing"
    )
    assert not (tmp_path / "int8.onnx").exists()


def test_a_file_that_is_no_graph_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(ModelError, match=r"model\.onnx: onnxruntime cannot open it .*export the run again"):
        open_graph(tmp_path / "model.onnx")
