"""Sizes, times and counts as people read them."""

import math


def bytes_text(size: float) -> str:
    """Return a number of bytes in the unit that suits it.

    >>> bytes_text(1536)
    '1.5 KiB'
    """
    if not math.isfinite(size):
        return "–"
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(int(math.log(max(size, 1), 1024)), len(units) - 1)
    return f"{digits_of(size / 1024 ** power)} {units[power]}"


def seconds_text(seconds: float) -> str:
    """Return a time in the unit that suits it.

    >>> seconds_text(0.00125), seconds_text(75)
    ('1.25 ms', '1.25 min')
    """
    if not math.isfinite(seconds):
        return "–"
    for below, factor, unit in ((1e-3, 1e6, "µs"), (1, 1e3, "ms"), (60, 1, "s"),
                                (3600, 1 / 60, "min")):
        if seconds < below:
            return f"{digits_of(seconds * factor)} {unit}"
    return f"{digits_of(seconds / 3600)} h"


def count_text(count: float) -> str:
    """Return a count with the prefix that suits it.

    >>> count_text(26506), count_text(1.2e9)
    ('26.5 k', '1.2 G')
    """
    if not math.isfinite(count):
        return "–"
    prefixes = ("", "k", "M", "G", "T", "P")
    power = min(int(math.log(max(count, 1), 1000)), len(prefixes) - 1)
    return f"{digits_of(count / 1000 ** power)} {prefixes[power]}".rstrip()


def digits_of(value: float) -> str:
    """Return three significant digits without an exponent."""
    if value >= 100:
        return f"{value:.0f}"
    text = f"{value:.{1 if value >= 10 else 2}f}"
    return text.rstrip("0").rstrip(".")
