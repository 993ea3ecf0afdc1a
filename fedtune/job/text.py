"""Values as a job file spells them, on one line."""

import re
from collections.abc import Iterable
from typing import Any

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # with all that ends a line: a message is one line


def toml_value(value: Any) -> str:
    """One value as TOML text: booleans, numbers, strings, and lists of these."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(toml_value(v) for v in value) + "]"
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{one_line(escaped)}"'


def shown(value: Any) -> str:
    """A value as in a job file, on one line; also of kinds that no key takes."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{one_line(str(k))} = {shown(v)}" for k, v in value.items()) + "}"
    return "[" + ", ".join(map(shown, value)) + "]" if isinstance(value, (tuple, list)) else toml_value(value)


def or_(values: Iterable[Any]) -> str:
    *rest, last = [shown(v) for v in values]
    return f"{', '.join(rest)} or {last}" if rest else last


def one_line(text: str) -> str:
    return CONTROL.sub(lambda m: f"\\u{ord(m[0]):04x}", text)
