"""A job as TOML text."""

from collections.abc import Iterator
from typing import Any

from fedtune.job.sections import Section, fields, table_of, tables
from fedtune.job.text import toml_value
from fedtune.job.whole import Job


def to_toml(job: Job, comments: bool = False) -> str:
    """The whole job as TOML, every key written; with `comments`, one line above each key says what it is.

    A list of tables follows its section as [[section.key]]; an empty one is left out, or is an example in
    comments, since TOML takes no table for a key that was given a value.
    """
    lines: list[str] = []
    for section in type(job).model_fields:
        values = getattr(job, section)
        if comments:
            summary, *_ = (type(values).__doc__ or "").strip().split("\n\n")
            lines.append(f"# {' '.join(summary.split())}")
        lines.append(f"[{section}]")
        for name, field in type(values).model_fields.items():
            if table_of(field) is not None:
                continue
            if comments:
                lines.append(f"# {field.description}")
            lines.append(f"{name.replace('_', '-')} = {toml_value(getattr(values, name))}")
        lines.append("")
        for key, found in tables(values):
            lines += _table_lines(
                f"{section}.{key}", type(values).model_fields[key.replace("-", "_")], found, comments
            )
    return "\n".join(lines)


def _table_lines(name: str, field: Any, tables: tuple[Section, ...], comments: bool) -> Iterator[str]:
    if comments:
        yield f"# {field.description}"
        if not tables:
            yield f"# [[{name}]]"
            for key, inner in fields(table_of(field)).items():
                shown = inner.json_schema_extra["example"] if inner.is_required() else inner.default
                yield f"# {key.replace('_', '-')} = {toml_value(shown)}  # {inner.description}"
            yield ""
    for table in tables:
        yield f"[[{name}]]"
        for key, inner in type(table).model_fields.items():
            yield f"{key.replace('_', '-')} = {toml_value(getattr(table, key))}" + (
                f"  # {inner.description}" if comments else ""
            )
        yield ""
