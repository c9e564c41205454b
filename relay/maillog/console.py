"""A line of the log for people: time, level, what happened, then its values; coloured on a terminal."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import IO, Any, Final

__all__ = ["Console", "coloured"]

_LEVELS: Final = {
    "debug": "\x1b[1;32m",
    "info": "\x1b[1;32m",
    "warning": "\x1b[1;33m",
    "error": "\x1b[1;31m",
    "critical": "\x1b[1;31m",
}
_BRIGHT, _DIM, _CYAN, _MAGENTA, _PLAIN = "\x1b[1m", "\x1b[2m", "\x1b[1;36m", "\x1b[1;35m", "\x1b[0m"
_QUOTED: Final = frozenset(" \t=\r\n\"'")
"""A text with one of these would not be seen to be one value."""


def coloured(stream: IO[Any]) -> bool:
    """Whether it is a terminal that has colours, and nobody has said by NO_COLOR that they are not wanted."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class Console:
    """Makes lines for people of lines whose values are clean."""

    def __init__(self, *, colors: bool) -> None:
        self._colors = colors

    def __call__(self, line: Mapping[str, Any]) -> bytes:
        """Return one line."""
        values = dict(line)
        moment, level = values.pop("time").strftime("%Y-%m-%dT%H:%M:%S.%fZ"), values.pop("level")
        parts = [
            self._in(_DIM, moment),
            f"[{self._in(_LEVELS[level], f'{level:<9}')}]",
            self._in(_BRIGHT, values.pop("event")),
            *(f"{self._in(_CYAN, key)}={self._in(_MAGENTA, _shown(value))}" for key, value in values.items()),
        ]
        return " ".join(parts).encode("utf-8", "backslashreplace")

    def _in(self, style: str, text: str) -> str:
        return f"{style}{text}{_PLAIN}" if self._colors else text


def _shown(value: object) -> str:
    return value if isinstance(value, str) and _QUOTED.isdisjoint(value) else repr(value)
