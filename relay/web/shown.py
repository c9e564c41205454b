"""How values are written on the page, for people. Pure functions; the templates' filters."""

from __future__ import annotations

from datetime import UTC, datetime

from markupsafe import Markup

from relay.escaping import escaped

__all__ = ["FILTERS", "visible"]


def visible(value: object) -> object:
    """Return what a template prints of a value: what does not print, or turns the text round, escaped.

    Everything on the page passes here, and then the escaping of HTML: what a stranger wrote is text.
    """
    if value is None:
        return ""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return escaped(value, keep="\n")


def iso(moment: datetime) -> str:
    """A moment for programs, which the page's script shows in the reader's zone."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def utc(moment: datetime) -> str:
    """A moment for people, in UTC."""
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def number(value: float | None) -> str:
    """A count: 12,345."""
    return "" if value is None else f"{value:,}"


def seconds(value: float | None) -> str:
    """A length of time, as fine as it matters: 0.4 ms, 35 ms, 1.2 s, 4 min, 2 h, 3 d."""
    if value is None:
        return "-"
    for unit, length in (("ms", 0.001), ("s", 1), ("min", 60), ("h", 3600)):
        count = value / length
        if count < (999.5 if unit == "ms" else 99.5):
            return f"{count:.1f}".removesuffix(".0") + f" {unit}" if count < 9.95 else f"{count:.0f} {unit}"
    return f"{value / 86400:.0f} d"


def octets(value: int) -> str:
    """A size: 512 B, 3.4 KiB, 12 MiB."""
    size = float(value)
    for unit in ("B", "KiB", "MiB"):
        if size < 1000 or unit == "MiB":
            return f"{size:.1f} {unit}" if size < 9.95 and unit != "B" else f"{size:.0f} {unit}"
        size /= 1024
    raise AssertionError


def one_line(text: str) -> str:
    """A reply of several lines on one."""
    return " ".join(text.split("\n"))


FILTERS = {
    "iso": iso,
    "utc": utc,
    "number": number,
    "seconds": seconds,
    "octets": octets,
    "one_line": one_line,
}
