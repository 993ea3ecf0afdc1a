"""Reading a job: TOML text and overrides into a checked Job, or all problems together, one line each."""

import difflib
import re
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from fedtune.errors import JobError
from fedtune.job.agreement import disagreements
from fedtune.job.sections import Section, Sections, fields, table_of
from fedtune.job.text import one_line, or_, shown, toml_value
from fedtune.job.whole import Job

_SUGGEST = 0.6

Place = tuple[int | str, ...]
"""Section, key, and in a list of tables its place and key; as written, with - or with _."""


def parse_job(text: str, overrides: Iterable[str] = (), source: str = "job") -> Job:
    """Reads TOML text, then `section.key=value` overrides, into a Job.

    Raises:
        JobError: with every problem found, one line each.
    """
    return job_from(_raw(text, overrides, source), source)


def _raw(text: str, overrides: Iterable[str], source: str) -> dict[str, Any]:
    """As `parse_job`, the values not checked yet."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise JobError([f"not valid TOML: {e}; check quotes and brackets there"], source) from None
    problems: list[str] = []
    for override in overrides:
        problems += _apply(raw, override)
    if problems:
        raise JobError(problems, source)
    return raw


def load_job(path: Path | str | None, overrides: Iterable[str] = ()) -> Job:
    """Reads a job file; None is the default job.

    Raises JobError, also for a file that cannot be read as UTF-8 text.
    """
    return job_from(*load_raw(None if path is None else Path(path), overrides))


def load_raw(path: Path | None, overrides: Iterable[str] = ()) -> tuple[dict[str, Any], str]:
    """(the values of a job file and overrides, not checked yet; what to call them in errors).

    Raises JobError.
    """
    if path is None:
        return _raw("", overrides, "default job"), "default job"
    if path.is_dir():
        raise JobError([f"{path} is a folder; give the .toml file in it"], str(path))
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
    except FileNotFoundError:
        raise JobError(
            [f"{path} does not exist; `fedtune init {path}` writes a commented one"], str(path)
        ) from None
    except UnicodeDecodeError as e:
        raise JobError([f"not UTF-8 text (byte {e.start}); save the file as UTF-8"], str(path)) from None
    except OSError as e:
        raise JobError([f"cannot be read: {e.strerror}"], str(path)) from None
    return _raw(text, overrides, str(path)), str(path)


def job_from(raw: dict[str, Any], source: str = "job") -> Job:
    """Checks a parsed TOML table. Raises JobError."""
    values = _tuples(raw)
    errors = _errors(values)
    planned = dict(_unavailable(values))
    valid = _valid_sections(values, [*(e["loc"] for e in errors), *planned])
    problems = [*_describe(errors), *disagreements(valid), *planned.values()]
    if problems:
        raise JobError(problems, source)
    return Job.model_validate(values)


def _errors(values: dict[str, Any]) -> list[ErrorDetails]:
    """What is wrong with single keys."""
    try:
        Sections.model_validate(values)
    except ValidationError as e:
        return e.errors()
    return []


def _valid_sections(values: dict[str, Any], places: Iterable[Place]) -> Sections:
    """The job without the keys at these places: to read one of them raises MissingKey."""
    inside = _by_first(places)
    return Sections.model_construct(
        None,
        **{
            name: _valid_section(type(field.default), values.get(name, {}), inside.get(name, []))
            for name, field in Sections.model_fields.items()
        },
    )


def _valid_section(kind: type[Section], values: Any, places: list[Place]) -> Section:
    """As `_valid_sections`, of a section or of a table in a list of tables; the empty place is all of it."""
    inside = {key: [()] for key in kind.model_fields} if () in places else _by_first(places)
    given = {_name(key): value for key, value in values.items()} if isinstance(values, dict) else {}
    needed = {
        name: field.json_schema_extra["example"]
        for name, field in fields(kind).items()
        if field.is_required() and name in inside
    }
    kept = {name: given[name] for name in given.keys() & kind.model_fields.keys() - inside.keys()}
    section = kind.model_validate(kept | needed).model_copy()
    for name in inside.keys() & kind.model_fields.keys():
        table = table_of(kind.model_fields[name])
        if table is None or () in inside[name]:
            del section.__dict__[name]
        else:
            rows = _by_first(inside[name])
            section.__dict__[name] = tuple(
                _valid_section(table, row, rows.get(str(number), []))
                for number, row in enumerate(given[name])
            )
    return section


def _by_first(places: Iterable[Place]) -> dict[str, list[Place]]:
    """What follows the first part of each place, by that part as a field is called."""
    found: dict[str, list[Place]] = {}
    for first, *rest in places:
        found.setdefault(_name(first), []).append(tuple(rest))
    return found


def _name(key: int | str) -> str:
    return str(key).replace("-", "_")


def _tuples(value: Any) -> Any:
    """TOML arrays as tuples and whole numbers stay whole: strict fields then take them."""
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _apply(raw: dict[str, Any], override: str) -> list[str]:
    name, equals, text = override.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and section and key):
        return [
            f"--set {one_line(override)}: not of the form section.key=value, for example federation.rounds=2"
        ]
    if re.search(r"[\r\n]", override.strip()):
        return [
            (
                f"--set {one_line(override)}: holds a line break, one key is set "
                "at a time; repeat --set for each key"
            )
        ]
    try:
        value = tomllib.loads(f"v = {text.strip()}")["v"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word is a string, so that --set adapter.method=lora needs no quotes
    table = raw.setdefault(section, {})
    if not isinstance(table, dict):
        return [f"{section} = {shown(table)}: is a section, write [{section}] above its keys"]
    key = key.strip().replace("_", "-")
    listed, deeper, _ = key.partition(".")
    if deeper and (field := _field((section, listed))) is not None and table_of(field):
        return [
            (
                f"--set {one_line(override)}: one key of a table cannot be set; "
                f"give the whole list: --set '{section}.{listed}={_example(field)}'"
            )
        ]
    table.pop(key.replace("-", "_"), None)  # the file may spell it so
    table[key] = value
    return []


def _unavailable(raw: dict[str, Any]) -> Iterator[tuple[Place, str]]:
    """The place of, and a line for, each value given whose feature is not built yet; works on unchecked
    values too.
    """
    for section, values in raw.items():
        for key, value in values.items() if isinstance(values, dict) else ():
            field = _field((section, key))
            if field is not None and isinstance(value, str) and value in _planned(field):
                yield (
                    (section, key),
                    f"{section}.{key} = {shown(value)}: not available yet; "
                    f"use {or_(field.json_schema_extra['available'])}",
                )


def _planned(field: Any) -> set[Any]:
    """The values of a Literal field that are named but not built."""
    available = field.json_schema_extra.get("available")
    return set() if available is None else set(get_args(field.annotation)) - set(available)


def _describe(errors: Iterable[ErrorDetails]) -> Iterator[str]:
    for e in errors:
        where = one_line(".".join(str(part).replace("_", "-") for part in e["loc"]))
        value, ctx = e.get("input"), e.get("ctx", {})
        if e["type"] == "extra_forbidden":
            yield f"{where}: unknown {'key' if len(e['loc']) > 1 else 'section'}; {_nearest(e['loc'])}"
        elif e["type"] in ("model_type", "model_attributes_type", "dict_type"):
            yield f"{where} = {shown(value)}: is a {_kind(e['loc'])} above its keys"
        elif e["type"] == "literal_error":
            yield f"{where} = {shown(value)}: must be {_choices(e['loc'], ctx['expected'])}"
        elif e["type"] == "missing":
            field = _field(e["loc"])
            yield (
                f"{where}: is missing; give {field.description}, such as "
                f"{toml_value(field.json_schema_extra['example'])}"
            )
        elif e["type"] == "tuple_type" and table_of(_field(e["loc"])):
            yield (
                f"{where} = {shown(value)}: must be a list of tables; write [[{where}]] above the keys "
                f"of each, or --set '{where}={_example(_field(e['loc']))}'"
            )
        elif e["type"] == "tuple_type":
            example = toml_value(_field(e["loc"]).default or ("a", "b"))
            yield (
                f"{where} = {shown(value)}: must be a list, such as {example}; quote it after --set: "
                f"--set '{where}={example}'"
            )
        else:
            yield f"{where} = {shown(value)}: {_plain(e['msg'])}; {_remedy(e['loc'])}"


def _choices(loc: tuple[Any, ...], expected: str) -> str:
    """What a key takes; of those that are planned, only what is built."""
    available = _field(loc).json_schema_extra.get("available")
    return or_(available) if available else expected.replace("'", '"')


def _plain(message: str) -> str:
    message = re.sub(r"^(Input|String) should ", "must ", message)
    return message.replace(
        "must match pattern '^([0-9a-f]{64})?$'", "must be 64 lower-case hexadecimal digits"
    )


def _remedy(loc: tuple[Any, ...]) -> str:
    if len(loc) < 2:
        return "see `fedtune init`"
    field = _field(loc)
    if field is None:
        return "see `fedtune init`"
    if field.is_required():
        return f"give {field.description}, such as {toml_value(field.json_schema_extra['example'])}"
    return f"default is {toml_value(field.default)} ({field.description})"


def _model(loc: Sequence[Any]) -> type[Section] | None:
    """The section, or the table in a list of tables, that holds the key at this place."""
    if str(loc[0]) not in Job.model_fields:
        return None
    model = type(Job.model_fields[str(loc[0])].default)
    field = model.model_fields.get(str(loc[1]).replace("-", "_")) if len(loc) > 3 else None
    return model if field is None or table_of(field) is None else table_of(field)


def _field(loc: Sequence[Any]) -> Any:
    """The field at (section, key), (section, key, place) or (section, key, place, key of the table);
    None where there is none.
    """
    model, table = _model(loc[:2]), _model(loc)
    if model is None or table is None:
        return None
    return table.model_fields.get(str(loc[1] if table is model else loc[3]).replace("-", "_"))


def _kind(loc: Sequence[Any]) -> str:
    if len(loc) == 3 and (field := _field(loc)) is not None and table_of(field):
        return f"table, write [[{loc[0]}.{str(loc[1]).replace('_', '-')}]]"
    return f"section, write [{one_line(str(loc[0]))}]"


def _example(field: Any) -> str:
    """A list of one inline table, with its first keys."""
    keys = [
        f"{name.replace('_', '-')} = {toml_value(f.json_schema_extra['example'])}"
        for name, f in fields(table_of(field)).items()
    ]
    return "[{" + ", ".join(keys[:3]) + "}]"


def _nearest(loc: tuple[Any, ...]) -> str:
    if len(loc) == 1:
        known = list(Job.model_fields)
        home = [s for s in known if _field((s, str(loc[0])))]
        if home:
            return f"{loc[0]} belongs under [{home[0]}]"
    else:
        known = [name.replace("_", "-") for name in model.model_fields] if (model := _model(loc)) else []
    if str(loc[-1]).replace("_", "-") in known:
        return "it stands twice, with - and with _; remove one"
    close = difflib.get_close_matches(str(loc[-1]).replace("_", "-"), known, n=1, cutoff=_SUGGEST)
    return f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
