"""Arithmetic on Arrays (`dict[str, ndarray]`). Inputs are never changed."""

import hashlib

import numpy as np

from fedtune.errors import ShapeMismatch
from fedtune.types import Arrays


def check_same(left: Arrays, right: Arrays) -> None:
    """Raise ShapeMismatch, naming the tensor, unless both hold the same names and shapes."""
    for name in left.keys() ^ right.keys():
        raise ShapeMismatch(f"tensor {name!r} is on one side only")
    for name in left:
        if left[name].shape != right[name].shape:
            raise ShapeMismatch(f"tensor {name!r}: shape {left[name].shape} against {right[name].shape}")


def subtract(left: Arrays, right: Arrays) -> Arrays:
    """left - right, tensor by tensor."""
    check_same(left, right)
    return {name: left[name] - right[name] for name in left}


def norm(arrays: Arrays) -> float:
    """L2 norm of everything together, summed in float64."""
    return float(np.sqrt(sum(float(np.sum(np.square(a, dtype=np.float64))) for a in arrays.values())))


def digest(arrays: Arrays) -> str:
    """sha256 over names, dtypes, shapes and little-endian bytes, in name order:
    equal digests mean equal arrays.
    """
    h = hashlib.sha256()
    for name in sorted(arrays):
        a = np.ascontiguousarray(arrays[name])
        h.update(f"{name}\x1f{a.dtype.str}\x1f{a.shape}\x1e".encode())
        h.update(a.tobytes())
    return h.hexdigest()
