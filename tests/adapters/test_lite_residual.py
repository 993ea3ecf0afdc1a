"""TinyTL's lite residuals: shapes, the unchanged start, and what is refused."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedtune.adapters import methods
from fedtune.adapters.describe import describe
from fedtune.adapters.kinds.tinytl import lite_kernel, lite_tensors, start
from fedtune.adapters.layers.lite_residual import LiteResidual
from fedtune.errors import ModelError
from fedtune.job import AdapterSection
from fedtune.models.base import TunableModel, layout
from fedtune.models.layout import Inverted
from fedtune.tasks import TASKS
from fedtune.workflows.setup import open_setup


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.widen, self.deep, self.narrow = (
            nn.Conv2d(inputs, 24, 1),
            nn.Conv2d(24, 24, 3, stride, 1, groups=24),
            nn.Conv2d(24, outputs, 1),
        )
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x):
        return self.norm(self.narrow(F.relu6(self.deep(F.relu6(self.widen(x))))))


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 8, 3, 2, 1), nn.ModuleList([Block(8, 12, 2), Block(12, 12, 1)])

    def forward(self, pixels):
        x = F.relu6(self.stem(pixels))
        for block in self.blocks:
            x = block(x)
        return x.mean((2, 3))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TunableModel(Body(), TASKS["image-classification"], nn.Linear(12, 3)).eval()


def test_what_is_trained_is_all_biases_a_branch_for_each_block_and_the_head(model):
    spec = describe(layout(model), AdapterSection(method="tinytl"))
    names = [t.name for t in spec.trainable]
    branch = ["conv.weight", "norm.weight", "norm.bias", "point.weight", "last.weight"]
    biases = [f"blocks.{i}.{part}.bias" for i in (0, 1) for part in ("widen", "deep", "narrow", "norm")]
    assert names == [
        "stem.bias",
        *biases,
        *(f"blocks.{i}.lite.{part}" for i in (0, 1) for part in branch),
        "head.weight",
        "head.bias",
    ]
    assert {t.unit for t in spec.trainable} == {"outside", "block.0", "block.1", "head"}
    parameters = methods.attach(model, spec, {})
    assert {t.name: t.shape for t in spec.trainable} == {
        name: tuple(p.shape) for name, p in parameters.items()
    }
    # and not the last norm's shift
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in parameters.values()}


@pytest.mark.parametrize("side", [32, 33, 3])
def test_the_start_is_the_base_and_the_branch_is_its_formula(model, side):
    pixels = torch.randn(2, 3, side, side)
    plain = model(pixels=pixels)
    spec = describe(layout(model), AdapterSection(method="tinytl"))
    arrays = methods.initial(model, spec, {}, 0)
    parameters = methods.attach(model, spec, {})
    methods.write(parameters, arrays)
    assert torch.equal(model(pixels=pixels), plain)
    assert (
        0.5 < arrays["blocks.0.lite.conv.weight"].std() * (4 * 25 / 2) ** 0.5 < 1.5
        and not arrays["blocks.0.lite.last.weight"].any()
    )
    torch.nn.init.normal_(parameters["blocks.0.lite.last.weight"])
    assert not torch.equal(model(pixels=pixels), plain)

    x = torch.randn(2, 8, 7, 7)
    block, lite = model.body.blocks[0], model.body.blocks[0].lite
    small = F.relu(lite.norm(F.conv2d(F.avg_pool2d(x, 2, 2), lite.conv.weight, None, 2, 2, 1, 2)))
    branch = F.interpolate(
        F.group_norm(F.conv2d(small, lite.point.weight), lite.last.num_groups, lite.last.weight),
        (4, 4),
        mode="bilinear",
    )
    torch.testing.assert_close(block(x), block.forward(x) + branch)


def test_merged_keeps_the_branches(model):
    fresh, spec = copy.deepcopy(model), describe(layout(model), AdapterSection(method="tinytl"))
    draw = np.random.default_rng(0)
    arrays = {t.name: draw.standard_normal(t.shape).astype(np.float32) for t in spec.trainable}
    methods.write(methods.attach(model, spec, {}), arrays)
    methods.merge(fresh, spec, {}, arrays)
    pixels = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(fresh(pixels=pixels), model(pixels=pixels))


def test_kernels_shrink_with_what_they_see():
    block = Inverted("b", 16, 24, 1, 2)
    assert [lite_kernel(dataclasses.replace(block, reduction=r)) for r in (2, 8, 16, 32, 64, 128)] == [
        5,
        5,
        5,
        3,
        1,
        1,
    ]


@pytest.mark.parametrize("inputs, outputs", [(16, 24), (12, 5), (7, 8)])
def test_any_number_of_channels_fits(inputs, outputs):
    block = Inverted("b", inputs, outputs, 2, 4)
    branch = LiteResidual(block)
    assert branch(torch.randn(2, inputs, 9, 9), (5, 5)).shape == (2, outputs, 5, 5)
    wanted = {t.name.removeprefix("b.lite."): t.shape for t in lite_tensors(block)}
    assert wanted == {name: tuple(p.shape) for name, p in branch.named_parameters() if name != "last.bias"}


def test_a_start_is_the_seeds():
    assert np.array_equal(start("x.conv.weight", (4, 2, 3, 3), 1), start("x.conv.weight", (4, 2, 3, 3), 1))
    assert not np.array_equal(
        start("x.conv.weight", (4, 2, 3, 3), 1), start("y.conv.weight", (4, 2, 3, 3), 1)
    )
    assert (
        start("x.norm.weight", (4,), 1).tolist() == [1] * 4
        and not start("x.norm.bias", (4,), 1).any()
        and not start("x.last.weight", (4,), 1).any()
    )


def test_a_base_without_inverted_bottlenecks_is_told_what_to_use(tiny_job):
    with pytest.raises(
        ModelError,
        match=(
            r'^adapter.method = "tinytl": this base has no inverted bottlenecks .*; '
            r'use "bias", "head" or "full", or for a text model "fed-sb"$'
        ),
    ):
        _ = open_setup(tiny_job("adapter.method=tinytl")).spec
