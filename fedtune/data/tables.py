"""Files of rows: .csv, .tsv, .jsonl and .parquet, read into columns.

A row is counted from 1, after any header and without blank lines; errors about the file's own syntax
name lines. Text is UTF-8, with or without a byte order mark. Nothing is guessed: no delimiter, no
quoting style, no encoding.
"""

import csv
import difflib
import io
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.errors import DataError, EnvironmentProblem

_LARGEST_FIELD = 2**31 - 1  # csv's own limit of 131,072 characters is less than a long document


@dataclass(frozen=True)
class Table:
    """`columns` holds the columns that were asked for and exist, all of length `rows`;
    `names` lists all there are.
    """

    names: tuple[str, ...]
    columns: Mapping[str, list[Any]]
    rows: int
    source: str


def read_table(path: Path, wanted: Collection[str]) -> Table:
    """Reads the `wanted` columns of a file; those it lacks are left out.

    Values are strings (.csv, .tsv) or what the file holds (.jsonl, .parquet); a missing one is None.

    Raises:
        DataError: no such file, another suffix, not UTF-8, broken syntax, a repeated column, or no rows.
        EnvironmentProblem: .parquet without pyarrow.
    """
    suffix = path.suffix.lower()
    if not path.exists():
        raise DataError(f"{path}: does not exist; check data.source")
    if suffix not in READERS:
        raise DataError(
            f"{path}: suffix {path.suffix!r} is not known; known: {', '.join(READERS)}, or a folder of images"
        )
    try:
        table = READERS[suffix](path, wanted)
    except OSError as e:
        raise DataError(
            f"{path}: cannot be read ({e.strerror or e}); check the file and its permissions"
        ) from None
    if table.rows == 0:
        raise DataError(f"{path}: has no rows; give a file with at least one")
    return table


def column(table: Table, name: str, key: str, remedy: str = "") -> list[str]:
    """A column as texts; a missing value or NaN is "", true and false are lower case, 3 is "3".

    Args:
        key: the job key that names the column, for the message.
        remedy: what else the user can do when it is missing.

    Raises:
        DataError: no such column (lists those there are), or a value that is a list or a table.
    """
    if name not in table.columns:
        close = difflib.get_close_matches(name, table.names, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        known = ", ".join(map(repr, table.names)) + (f"; {remedy}" if remedy else "")
        raise DataError(f"{table.source}: no column {name!r} ({key}); {hint}columns: {known}")
    return [
        _as_text(value, f"{table.source}: row {row}, column {name!r}")
        for row, value in enumerate(table.columns[name], 1)
    ]


def _as_text(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, dict, bytes)):
        raise DataError(
            f"{where}: holds a {type(value).__name__}, not text or a number; "
            "flatten the column or name another"
        )
    return str(value)


def read_utf8(path: Path) -> str:
    """A whole file as text. Raises DataError that names the line and the byte where it is not UTF-8."""
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as e:
        line = raw.count(b"\n", 0, e.start) + 1
        raise DataError(
            f"{path}: line {line} is not UTF-8 (byte {e.start} "
            f"is 0x{raw[e.start]:02x}); save the file as UTF-8"
        ) from None


def _separated(delimiter: str) -> Callable[[Path, Collection[str]], Table]:
    def read(path: Path, wanted: Collection[str]) -> Table:
        text = read_utf8(path)
        csv.field_size_limit(_LARGEST_FIELD)
        # strict: a stray quote is an error here; without it the reader silently joins lines
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        try:
            return _from_rows(_same_width(reader, path), wanted, path)
        except csv.Error as e:
            where = f"{path}: line {reader.line_num}"
            reason = str(e).replace("\t", "\\t")
            raise DataError(
                f"{where}: broken quoting ({reason}); write a quote inside a quoted "
                "field twice, or save as .jsonl"
            ) from None

    return read


def _same_width(reader: Any, path: Path) -> Iterator[list[str]]:
    """The rows that are not blank, header first; raises DataError at the first with
    another number of fields.
    """
    header: list[str] | None = None
    row = 0
    for fields in reader:
        if not fields:
            continue
        header = header or fields
        if len(fields) != len(header):
            where = f"{path}: row {row} (line {reader.line_num})"
            raise DataError(
                f"{where} has {len(fields)} field{'s' if len(fields) != 1 else ''}, "
                f"the header has {len(header)}; quote fields that hold the delimiter"
            )
        yield fields
        row += 1


def _from_rows(rows: Iterator[list[str]], wanted: Collection[str], path: Path) -> Table:
    names = next(rows, None)
    if names is None:
        raise DataError(f"{path}: is empty; the first line must name the columns")
    _once(names, wanted, path)
    places = {name: names.index(name) for name in wanted if name in names}
    columns: dict[str, list[Any]] = {name: [] for name in places}
    count = 0
    for fields in rows:
        count += 1
        for name, place in places.items():
            columns[name].append(fields[place])
    return Table(tuple(names), columns, count, str(path))


def _read_jsonl(path: Path, wanted: Collection[str]) -> Table:
    records = list(_json_lines(read_utf8(path), path))
    names = tuple(dict.fromkeys(key for record in records for key in record))
    columns = {name: [record.get(name) for record in records] for name in wanted if name in names}
    return Table(names, columns, len(records), str(path))


def _json_lines(text: str, path: Path) -> Iterator[dict[str, Any]]:
    # not splitlines: it also cuts at U+2028, which JSON strings may hold
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as e:
            reason = (
                f"{e.msg} at character {e.pos + 1}"
                if isinstance(e, json.JSONDecodeError)
                else "nested too deeply"
            )
            raise DataError(
                f"{path}: line {number} is not valid JSON ({reason}); write one object a line"
            ) from None
        if not isinstance(record, dict):
            kind = type(record).__name__
            raise DataError(
                f"{path}: line {number} is not an object but {kind}; "
                'write lines such as {"text": "...", "label": "..."}'
            )
        yield record


def _read_parquet(path: Path, wanted: Collection[str]) -> Table:
    try:
        import pyarrow as pa  # here, because an edge device reads .csv and .jsonl and has no pyarrow
        import pyarrow.parquet as pq
    except ImportError:
        raise EnvironmentProblem(
            f"{path}: reading .parquet needs pyarrow; pip install pyarrow, or save as .jsonl"
        ) from None
    try:
        with path.open("rb") as raw, pq.ParquetFile(raw) as file:
            names = tuple(file.schema_arrow.names)
            _once(names, wanted, path)
            found = file.read(columns=[name for name in wanted if name in names])
            rows = file.metadata.num_rows
    except (pa.ArrowException, OSError) as e:
        # the system's own, such as permissions; arrow's for broken pages have no number
        if getattr(e, "errno", None):
            raise
        raise DataError(
            f"{path}: is not a readable parquet file ({_first_line(e)}); write it again"
        ) from None
    return Table(
        names, {name: _values(found.column(name), name, path) for name in found.column_names}, rows, str(path)
    )


def _values(values: Any, name: str, path: Path) -> list[Any]:
    """A parquet column as Python values. Raises DataError at the first text that is not UTF-8."""
    found: list[Any] = []
    try:
        for value in values:
            found.append(value.as_py())
    except UnicodeDecodeError:
        raise DataError(
            f"{path}: row {len(found) + 1}, column {name!r} is not UTF-8; write the file again as UTF-8"
        ) from None
    return found


def _once(names: Sequence[str], wanted: Collection[str], path: Path) -> None:
    for name in wanted:
        if names.count(name) > 1:
            raise DataError(f"{path}: column {name!r} stands {names.count(name)} times; rename all but one")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or ["no reason given"])[0][:160]


READERS: Mapping[str, Callable[[Path, Collection[str]], Table]] = {
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
