"""Bytes <-> tensors with their facts. The one narrow door for what comes from outside.

A packet is

    4 bytes   magic "FTP1"
    4 bytes   header length h, unsigned little-endian, at most MAX_HEADER
    h bytes   header: JSON object with exactly the fields of `Header`,
              then spaces up to a multiple of HEADER_STEP
    rest      the tensors that the header names, float32 little-endian, in schema order,
              nothing between or after

Both sides know the schema (names and shapes, in order) from the bundle, so a packet names tensors by their
index in it and carries the schema's digest. That keeps a packet at 4 bytes a number plus a header of a few
hundred bytes; the spaces make its size the same whatever the metrics are, so that `fedtune plan` knows it and
it tells a listener nothing. There is no pickle, no dtype to choose, no length that the sender can lie about:
the size follows from the schema and is checked before any value is read.
"""

import hashlib
import json
import math
import struct
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedtune.errors import Refused, ShapeMismatch
from fedtune.types import Arrays, Metrics, TensorSpec

RECORD = "fedtune"
"""Name of the record that carries a packet where the transport has named records."""

MAGIC = b"FTP1"
MAX_HEADER = 65536
HEADER_STEP = 256
_STRETCH = 2**16
Shapes = tuple[tuple[tuple[str, ...], tuple[int, ...]], ...]
"""Names of tensors in order, as runs of one shape: a tensor costs little where its
neighbours are shaped alike.
"""

Kind = Literal["model", "update", "gradient-request", "gradient", "scores", "probe", "block-scores"]
Short = Annotated[str, Field(max_length=64)]
Number = Annotated[float, Field(ge=-1e30, le=1e30, allow_inf_nan=False)]
Index = Annotated[int, Field(ge=0, le=10**6)]


@dataclass(frozen=True)
class Schema:
    """The ordered tensors both sides agreed on.

    `base_blocks`: the blocks of the base, from the bottom up, where some of them have no
    tensors here; else empty.
    """

    tensors: tuple[TensorSpec, ...]
    base_blocks: tuple[str, ...] = ()

    @cached_property
    def digest(self) -> str:
        """First 16 hexadecimal digits of the sha256 of names and shapes in order."""
        text = json.dumps([[t.name, list(t.shape)] for t in self.tensors])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @cached_property
    def layout(self) -> Shapes:
        return layout((t.name, t.shape) for t in self.tensors)

    @cached_property
    def size(self) -> int:
        """Numbers in all tensors together."""
        return sum(t.size for t in self.tensors)

    @cached_property
    def units(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(t.unit for t in self.tensors))

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """The units that a strategy selects from, from the bottom up."""
        return self.base_blocks or tuple(unit for unit in self.units if unit.startswith("block."))

    def of_units(self, units: Sequence[str]) -> tuple[TensorSpec, ...]:
        wanted = set(units)
        return tuple(t for t in self.tensors if t.unit in wanted)

    def held(self, rank: int) -> "Schema":
        """What a client of this rank has of it; 0: all."""
        return Schema(tuple(t for t in self.tensors if t.rank <= rank), self.base_blocks) if rank else self


class Header(BaseModel):
    """What a packet says about itself. Unknown fields, wrong types and non-finite numbers are refused.

    `tensors`: which it holds, by their index in the schema. `train`: of a model,
    which are to be trained and sent back. None: all.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    kind: Kind
    schema_digest: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    frame: Annotated[str, Field(pattern=r"^([0-9a-f]{16})?$")] = ""
    round: Annotated[int, Field(ge=0, le=10**9)]
    tensors: Annotated[list[Index], Field(max_length=16384)] | None = None
    train: Annotated[list[Index], Field(min_length=1, max_length=16384)] | None = None
    weight: Annotated[float, Field(ge=0, le=1e30, allow_inf_nan=False)] = 0.0
    metrics: Annotated[
        dict[Short, Annotated[list[Number], Field(min_length=2, max_length=2)]], Field(max_length=32)
    ] = {}


class Pieces(dict[str, np.ndarray]):
    """Tensors by name that lie one after another in `vector`, and are all of it,
    so that they can be added as one.

    Made once, from a layout (`layout`). As with all Arrays that travel, nothing in it is replaced afterwards.
    """

    def __init__(self, vector: np.ndarray, layout: Shapes) -> None:
        super().__init__()
        self.vector, self.layout = vector, layout
        start = 0
        for names, shape in layout:
            end = start + len(names) * math.prod(shape)
            rows = vector[start:end].reshape(len(names), *shape)
            # a row of numbers yields copies
            self.update(zip(names, rows if shape else (rows[i, ...] for i in range(len(names)))))
            start = end


def layout(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> Shapes:
    """The layout of tensors with these names and shapes, in this order.

    >>> layout([("a", (2, 2)), ("b", (2, 2)), ("c", (3,))])
    ((('a', 'b'), (2, 2)), (('c',), (3,)))
    """
    return tuple(
        (tuple(name for name, _ in run), shape) for shape, run in groupby(shapes, key=lambda x: x[1])
    )


@dataclass(frozen=True)
class Packet:
    """A decoded packet: checked header, tensors by name (float32, finite), and `norm`,
    their L2 norm as `quick_norm` has it.

    `train`: of a model, the tensors to be trained and sent back, in the order of the schema; None: all.
    """

    header: Header
    arrays: Pieces
    norm: float
    train: tuple[str, ...] | None = None

    @property
    def metrics(self) -> Metrics:
        return {name: (s, w) for name, (s, w) in self.header.metrics.items()}


def encode(
    kind: Kind,
    schema: Schema,
    arrays: Arrays,
    *,
    round: int,
    frame: str = "",
    weight: float = 0.0,
    metrics: Metrics | None = None,
    train: Collection[str] | None = None,
) -> bytes:
    """Packs `arrays` (all or some of the schema's tensors).

    Raises ShapeMismatch where they differ from the schema.

    train: of a model, names of the tensors to be trained and sent back; None for all.
    """
    chosen = places(schema, arrays)
    header = Header(
        kind=kind,
        schema_digest=schema.digest,
        frame=frame,
        round=round,
        weight=float(weight),
        tensors=chosen,
        train=None if train is None else places(schema, train),
        metrics={name: [float(s), float(w)] for name, (s, w) in (metrics or {}).items()},
    )
    text = _text(header)
    parts = [MAGIC, struct.pack("<I", len(text)), text]
    for i in range(len(schema.tensors)) if chosen is None else chosen:
        spec, array = schema.tensors[i], arrays[schema.tensors[i].name]
        if array.shape != spec.shape:
            raise ShapeMismatch(f"tensor {spec.name!r}: shape {array.shape}, schema says {spec.shape}")
        parts.append(np.ascontiguousarray(array, dtype="<f4").tobytes())
    return b"".join(parts)


def places(schema: Schema, names: Collection[str]) -> list[int] | None:
    """Indices of these tensors in the schema, ascending; None for all of them.

    Raises ShapeMismatch for one that is not in it.
    """
    found = [i for i, t in enumerate(schema.tensors) if t.name in names]
    if len(found) != len(names):
        known = {t.name for t in schema.tensors}
        raise ShapeMismatch(f"tensor {next(n for n in names if n not in known)!r} is not in the schema")
    return None if len(found) == len(schema.tensors) else found


def held_places(schema: Schema, rank: int) -> list[int] | None:
    """As `places`, of what a client of this rank has (0: all)."""
    return places(schema, [t.name for t in schema.held(rank).tensors])


def packed_size(header: Header, schema: Schema) -> int:
    """Bytes of a packet with this header, as `encode` makes it."""
    numbers = schema.size if header.tensors is None else sum(schema.tensors[i].size for i in header.tensors)
    return 8 + len(_text(header)) + 4 * numbers


def _text(header: Header) -> bytes:
    """A header as it travels, filled up with spaces, so that sizes do not depend on digits."""
    text = header.model_dump_json(exclude_defaults=True).encode()
    return text + b" " * (-len(text) % HEADER_STEP)


def decode(
    data: bytes,
    schema: Schema,
    *,
    kinds: Sequence[Kind],
    round: int | None = None,
    frame: str | None = None,
    copy: bool = True,
) -> Packet:
    """Unpacks bytes from outside.

    Checks in this order: size, magic, header, kind, schema, frame, round, tensors, values.

    Args:
        data: anything.
        schema: the tensors this side expects.
        kinds: packet kinds taken here.
        round, frame: when given, the only round and frame digest taken.
        copy: False gives read-only tensors that lie in `data` and keep it alive,
            for a caller that soon drops both.

    Raises:
        Refused: and nothing else, with one reason per way the bytes can be wrong.
    """
    limit = 8 + MAX_HEADER + 4 * schema.size
    _require(len(data) <= limit, "size", f"{len(data)} bytes, at most {limit} are taken")
    header, body = _open(data)
    _require(header.kind in kinds, "kind", f"{header.kind!r}, taken here: {', '.join(kinds)}")
    _require(
        header.schema_digest == schema.digest,
        "schema",
        f"{header.schema_digest}, this run has {schema.digest}",
    )
    _require(
        frame is None or header.frame == frame,
        "frame",
        f"{header.frame or 'none'}, this run has {frame or 'none'}",
    )
    _require(
        round is None or header.round == round,
        "round",
        f"reply to round {header.round}, this is round {round}",
    )
    _require(
        header.train is None or header.kind == "model",
        "tensors",
        f"{header.kind!r} says what to train; only a model does",
    )
    train = None if header.train is None else tuple(t.name for t in _chosen(header.train, schema).tensors)
    arrays = _tensors(header, body, schema, copy)
    return Packet(header, arrays, finite_norm(arrays.vector), train)


def require_whole(packet: Packet) -> None:
    """Raises Refused for a part of a model: to train some tensors, the values of all are needed."""
    _require(packet.header.tensors is None, "tensors", "holds a part of the model; training needs all of it")


def packet_bytes(schema: Schema, trained: Collection[str] | None = None, rank: int = 0) -> tuple[int, int]:
    """Bytes of a model packet to a client of this rank (0: of all there is), and of the update that answers
    it with these tensors (None: all), as a run sends them; values do not change them.
    """
    part = None if trained is None else places(schema, trained)
    model = Header(
        kind="model",
        schema_digest=schema.digest,
        frame="0" * 16,
        round=1,
        tensors=held_places(schema, rank),
        train=part,
    )
    metrics = {"loss": [1.0, 1.0], "accuracy": [1.0, 1.0]}
    update = Header(
        kind="update",
        schema_digest=schema.digest,
        frame="0" * 16,
        round=1,
        tensors=part,
        weight=1.0,
        metrics=metrics,
    )
    return packed_size(model, schema), packed_size(update, schema)


def trained_of(data: bytes, schema: Schema) -> Schema:
    """The tensors that a model packet asks to be trained. Raises Refused when the header is not one."""
    return _chosen(_open(data)[0].train, schema)


def held_of(data: bytes, schema: Schema) -> Schema:
    """The tensors that a packet says it holds. Raises Refused when the header is not one."""
    return _chosen(_open(data)[0].tensors, schema)


def finite_norm(vector: np.ndarray) -> float:
    """`quick_norm`. Raises Refused when a number is not finite."""
    norm = quick_norm(vector)
    # A NaN or an infinity makes the norm one too; so do finite numbers whose squares overflow,
    # and then each has to be looked at.
    _require(
        math.isfinite(norm) or bool(np.isfinite(vector).all()), "not-finite", "a tensor holds NaN or infinity"
    )
    return norm


def quick_norm(vector: np.ndarray) -> float:
    """L2 norm of a float32 vector [n], within 1 % where squares neither overflow nor vanish; not finite where
    one overflows, or a number is not.

    A float32 sum of k squares is off by at most about k * 2^-24 of itself whatever the order of adding
    (Higham 2002, Accuracy and Stability of Numerical Algorithms, section 4.2): 0.4 % for a stretch of 2^16,
    half of that after the root. Stretches add up in float64.
    """
    stretches = (vector[i : i + _STRETCH] for i in range(0, vector.size, _STRETCH))
    with np.errstate(over="ignore", invalid="ignore"):  # the result says it
        return math.sqrt(sum(float(np.dot(x, x)) for x in stretches))


def kind_of(data: bytes) -> Kind:
    """The kind a packet claims, for choosing the schema to decode it with.

    Raises Refused when the header is not one.
    """
    return _open(data)[0].kind


def round_of(data: bytes) -> int:
    """The round a packet says it is of. Raises Refused when the header is not one."""
    return _open(data)[0].round


def _open(data: bytes) -> tuple[Header, memoryview]:
    _require(len(data) >= 8, "size", f"{len(data)} bytes, a packet has at least 8")
    _require(data[:4] == MAGIC, "magic", f"starts with {bytes(data[:4])!r}, not {MAGIC!r}")
    (length,) = struct.unpack_from("<I", data, 4)
    _require(
        length <= min(MAX_HEADER, len(data) - 8),
        "header",
        f"says {length} bytes, {min(MAX_HEADER, len(data) - 8)} are there or allowed",
    )
    try:
        header = Header.model_validate_json(bytes(data[8 : 8 + length]))
    except ValidationError as e:
        first = e.errors(include_input=False, include_url=False)[0]
        raise Refused(
            "header", f"{'.'.join(map(str, first['loc'])) or 'JSON'}: {first['msg']}"[:200]
        ) from None
    return header, memoryview(data)[8 + length :]


def _tensors(header: Header, body: memoryview, schema: Schema, copy: bool) -> Pieces:
    part = _chosen(header.tensors, schema)
    _require(len(body) == 4 * part.size, "size", f"{len(body)} bytes of tensors, {4 * part.size} expected")
    values = np.frombuffer(body, dtype="<f4")
    return Pieces(values.astype(np.float32) if copy else values, part.layout)


def _chosen(indices: Sequence[int] | None, schema: Schema) -> Schema:
    """The tensors with these indices; None: all."""
    if indices is None:
        return schema
    _require(all(a < b for a, b in pairwise(indices)), "tensors", "indices repeat or are out of order")
    _require(
        not indices or indices[-1] < len(schema.tensors),
        "tensors",
        f"index {indices[-1] if indices else 0}, the schema has {len(schema.tensors)}",
    )
    return Schema(tuple(schema.tensors[i] for i in indices))


def _require(condition: bool, reason: str, message: str) -> None:
    if not condition:
        raise Refused(reason, message)
