"""Durations and sizes as people write them, and back.

Rules: a duration always has a unit, so that nobody has to guess seconds from minutes; whole numbers only;
sizes are powers of 1024 and say so (KiB). What is printed parses back to the same value. No I/O.
"""

from __future__ import annotations

import re

__all__ = [
    "DURATION_PATTERN",
    "LARGEST_SIZE",
    "SIZE_PATTERN",
    "format_duration",
    "format_size",
    "parse_duration",
    "parse_size",
]

DURATION_PATTERN = r"^([0-9]{1,15}) ?(ms|s|m|h|d)$"
"""Regular expression of a duration, in the dialect of JSON Schema."""
SIZE_PATTERN = r"^([0-9]{1,15}) ?(B|KiB|MiB|GiB)?$"
"""Regular expression of a size, in the dialect of JSON Schema."""
LARGEST_SIZE = 1 << 60
"""Octets; what is compared with it in a database stays a number of 64 bits."""

_DURATION = re.compile(DURATION_PATTERN)
_MILLISECONDS = {"d": 86_400_000, "h": 3_600_000, "m": 60_000, "s": 1000, "ms": 1}
_LONGEST_MS = 36_500 * _MILLISECONDS["d"]  # a hundred years: what is added to a date stays a date

_SIZE = re.compile(SIZE_PATTERN)
_OCTETS = {"GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10, "B": 1}
_DECIMAL = re.compile(r"([0-9]+) ?([kKmMgG])i?[bB]?")


def parse_duration(text: object) -> float:
    """Return the seconds that `text` ("500ms", "30s", "5m", "12h", "30d") means; raise ValueError if none."""
    if isinstance(text, int) and not isinstance(text, bool):
        text = str(text)
    if not isinstance(text, str):
        raise ValueError('must be a duration such as "30s", "5m", "12h" or "30d"')  # noqa: TRY004  for pydantic
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        if re.fullmatch(r"[0-9]+", text.strip()):
            raise ValueError(f'a duration needs a unit: "{text.strip()}s" if seconds are meant')
        raise ValueError(f'{_shown(text)} is no duration: a whole number and ms, s, m, h or d, such as "30s"')
    milliseconds = int(match[1]) * _MILLISECONDS[match[2]]
    if milliseconds > _LONGEST_MS:
        raise ValueError(f'{_shown(text)} is longer than a hundred years ("36500d")')
    return milliseconds / 1000


def format_duration(seconds: float) -> str:
    """Write `seconds` in the largest unit that gives a whole number, at least milliseconds."""
    milliseconds = round(seconds * 1000)
    if not milliseconds:
        return "0s"
    unit = next(unit for unit, factor in _MILLISECONDS.items() if milliseconds % factor == 0)
    return f"{milliseconds // _MILLISECONDS[unit]}{unit}"


def parse_size(value: object) -> int:
    """Return the octets that `value` ("64KiB", "25MiB", "500B", 500) means; raise ValueError otherwise."""
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            raise ValueError("a size cannot be negative")
        return _within(value)
    if not isinstance(value, str):
        raise ValueError('must be a size such as "64KiB", "25MiB" or a number of octets')  # noqa: TRY004  for pydantic
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        decimal = _DECIMAL.fullmatch(value.strip())
        if decimal:
            raise ValueError(f'{_shown(value)} is no size: write "{decimal[1]}{decimal[2].upper()}iB"')
        raise ValueError(f"{_shown(value)} is no size: a whole number and B, KiB, MiB or GiB")
    return _within(int(match[1]) * _OCTETS[match[2] or "B"])


def _within(octets: int) -> int:
    if octets > LARGEST_SIZE:
        raise ValueError(f'is larger than "{format_size(LARGEST_SIZE)}"')
    return octets


def format_size(octets: int) -> str:
    """Write `octets` in the largest unit that gives a whole number."""
    if not octets:
        return "0B"
    unit = next(unit for unit, factor in _OCTETS.items() if octets % factor == 0)
    return f"{octets // _OCTETS[unit]}{unit}"


def _shown(text: str) -> str:
    return f'"{text}"' if len(text) <= 40 and text.isprintable() else "this"
