"""What the self-test says: one line about one thing that it looked at."""

from __future__ import annotations

from typing import Literal, NamedTuple

__all__ = ["Finding", "Level"]

Level = Literal["ok", "note", "failed"]
"""ok: as it must be. note: worth knowing, the operator's choice. failed: wrong, or could not be tried."""


class Finding(NamedTuple):
    """What was found, and where: a listener, or the configuration."""

    where: str
    level: Level
    text: str
