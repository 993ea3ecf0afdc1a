"""Numbers and names as people read them. The page and the terminal share these, so that both say the same."""

import math
import unicodedata
from collections.abc import Sequence
from typing import Any

ABSENT = "—"


def number(value: float | None, digits: int = 3) -> str:
    """An accuracy or a loss; a dash where there is none.

    >>> number(0.86149), number(float("nan")), number(None)
    ('0.861', 'not a number', '—')
    """
    if value is None:
        return ABSENT
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite" if value > 0 else "minus infinite"
    return f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.3g}"


def signed(value: float | None) -> str:
    """A difference, with its sign also when positive.

    >>> signed(0.0812), signed(-0.0004)
    ('+0.081', '-0.000')
    """
    return number(value) if value is None or not math.isfinite(value) else f"{value:+.3f}"


def small(value: float | None) -> str:
    """A tiny figure such as a largest difference: two significant digits, powers of ten.

    >>> small(3.14e-06), small(0)
    ('3.1e-06', '0')
    """
    if value is None or not math.isfinite(value):
        return number(value)
    return "0" if value == 0 else f"{value:.2g}"


def bound(value: float) -> str:
    """An upper bound, such as epsilon: four digits, never rounded down.

    >>> bound(4.98211), bound(161.01), bound(0.0), bound(float("inf"))
    ('4.983', '161.1', '0', 'infinite')
    """
    if not math.isfinite(value):
        return "infinite"
    if value <= 0:
        return "0"
    unit = 10.0 ** (math.floor(math.log10(value)) - 3)
    return f"{math.ceil(round(value / unit, 6)) * unit:.4g}"


def count(value: int) -> str:
    """A whole number with thousands separated.

    >>> count(22713216)
    '22,713,216'
    """
    return f"{value:,}"


def size(value: float) -> str:
    """Bytes in decimal units (1 KB is 1000 bytes), three significant digits.

    >>> size(812), size(46080), size(1_234_567), size(1e9)
    ('812 bytes', '46.1 KB', '1.23 MB', '1 GB')
    """
    if value < 1000:
        return f"{value:.0f} byte" + ("" if value == 1 else "s")
    for unit in ("KB", "MB", "GB", "TB"):
        value /= 1000
        if value < 999.5 or unit == "TB":
            break
    text = f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text} {unit}"


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours.

    >>> duration(0.42), duration(59.9), duration(192), duration(7260)
    ('0.4 s', '1 min 0 s', '3 min 12 s', '2 h 1 min')
    """
    if seconds is None or not math.isfinite(seconds):
        return ABSENT
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return (
        f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"
    )


def percent(part: float, whole: float) -> str:
    """A share as a percentage, two significant digits below ten.

    >>> percent(10371, 22713216), percent(1, 8), percent(3, 0)
    ('0.046 %', '12 %', '—')
    """
    if whole <= 0:
        return ABSENT
    value = 100 * part / whole
    return f"{value:.2g} %" if value < 9.95 else f"{value:.0f} %"


def plural(n: int, word: str, several: str = "") -> str:
    """
    >>> plural(1, "round"), plural(1200, "client"), plural(2, "class", "classes")
    ('1 round', '1,200 clients', '2 classes')
    """
    return f"{count(n)} {word if n == 1 else several or f'{word}s'}"


def clean(value: Any) -> str:
    """Text from outside without what a terminal or a page could obey:
    control and direction characters, lone surrogates.
    """
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cf", "Cs") else c for c in str(value))


def short(value: Any, limit: int) -> str:
    """Clean text of at most `limit` characters."""
    text = clean(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def unique(names: Sequence[str]) -> list[str]:
    """The names with a number after those that stand twice.

    >>> unique(["a", "b", "a"])
    ['a', 'b', 'a (2)']
    """
    taken: set[str] = set()
    result = []
    for name in names:
        candidate, n = name, 1
        while candidate in taken:
            n += 1
            candidate = f"{name} ({n})"
        taken.add(candidate)
        result.append(candidate)
    return result
