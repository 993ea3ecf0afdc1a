"""Backward operations written out, against torch's own kernels."""

import pytest
import torch
from torch import Tensor

from fedtune.onnx.decompositions import (
    avg_pool_backward,
    batch_norm_backward,
    convolution_backward,
    hardtanh_backward,
    threshold_backward,
)

aten = torch.ops.aten


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [(1, 1, 0, 1), (3, 1, 1, 1), (3, 2, 1, 1), (5, 2, 2, 1), (3, 2, 0, 1), (3, 1, 2, 2), (2, 3, 1, 1)],
)
@pytest.mark.parametrize("size", [(9, 9), (8, 11)])
def test_convolution_backward(
    groups: int, kernel: int, stride: int, padding: int, dilation: int, size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    x, weight = (
        torch.randn(3, 8, *size, dtype=torch.float64),
        torch.randn(16, 8 // groups, kernel, kernel, dtype=torch.float64),
    )
    settings = ([stride] * 2, [padding] * 2, [dilation] * 2, False, [0, 0], groups)
    dy = torch.randn_like(aten.convolution(x, weight, None, *settings))
    truth = aten.convolution_backward(dy, x, weight, [16], *settings, [True] * 3)
    found = convolution_backward(dy, x, weight, [16], *settings, [True] * 3)
    for a, b in zip(found, truth):
        assert isinstance(a, Tensor)
        torch.testing.assert_close(a, b)


def test_convolution_backward_gives_what_is_wanted() -> None:
    x, weight = torch.randn(2, 4, 5, 5), torch.randn(4, 1, 3, 3)
    dy = aten.convolution(x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 4)
    dx, dw, db = convolution_backward(
        dy, x, weight, [4], [1, 1], [1, 1], [1, 1], False, [0, 0], 4, [True, False, False]
    )
    assert dx is not None and dw is None and db is None


def test_convolution_backward_refuses() -> None:
    x = torch.randn(2, 16, 5, 5)
    with pytest.raises(NotImplementedError, match="16 groups"):
        convolution_backward(
            x,
            x,
            torch.randn(16, 1, 3, 3),
            [16],
            [1, 1],
            [1, 1],
            [1, 1],
            False,
            [0, 0],
            16,
            [False, True, False],
        )
    with pytest.raises(NotImplementedError, match="transposed"):
        convolution_backward(
            x,
            x,
            torch.randn(16, 16, 3, 3),
            [16],
            [1, 1],
            [1, 1],
            [1, 1],
            True,
            [0, 0],
            1,
            [True, False, False],
        )


@pytest.mark.parametrize("shape", [(3, 4, 5, 5), (6, 4)])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_backward(shape: tuple[int, ...], affine: bool) -> None:
    torch.manual_seed(0)
    x, dy = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    weight, mean, variance = (torch.rand(4, dtype=torch.float64) + 0.5 for _ in range(3))
    settings = (weight if affine else None, mean, variance, None, None, False, 1e-3, [True] * 3)
    for a, b in zip(batch_norm_backward(dy, x, *settings), aten.native_batch_norm_backward(dy, x, *settings)):
        assert isinstance(a, Tensor)
        torch.testing.assert_close(a, b)
    with pytest.raises(NotImplementedError, match="statistics of its batch"):
        batch_norm_backward(dy, x, None, mean, variance, None, None, True, 1e-3, [True] * 3)


def test_bends() -> None:
    """At the bends themselves too."""
    x, dy = torch.tensor([-1.0, 0.0, 1e-9, 3.0, 6.0, 7.0]), torch.arange(1.0, 7.0)
    torch.testing.assert_close(
        hardtanh_backward(dy, x, 0.0, 6.0), aten.hardtanh_backward(dy, x, 0.0, 6.0), rtol=0, atol=0
    )
    torch.testing.assert_close(
        threshold_backward(dy, x, 0.0), aten.threshold_backward(dy, x, 0.0), rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [(2, [], 0), (2, [2, 2], 0), (3, [2, 2], 1), (3, [1, 1], 0), (2, [3, 3], 0)],
)
@pytest.mark.parametrize("size", [(8, 8), (9, 11)])
def test_avg_pool_backward(kernel: int, stride: list[int], padding: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    settings = ([kernel] * 2, stride, [padding] * 2, False, True, None)
    dy = torch.randn_like(aten.avg_pool2d(x, *settings))
    torch.testing.assert_close(
        avg_pool_backward(dy, x, *settings), aten.avg_pool2d_backward(dy, x, *settings)
    )
    with pytest.raises(NotImplementedError, match="differ in size"):
        avg_pool_backward(dy, x, [kernel] * 2, stride, [padding] * 2, True, True, None)
