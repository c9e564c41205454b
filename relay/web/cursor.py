"""A cursor: where a page ended and the next one goes on, as a word that can stand in an address."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Final

from relay.asking import AskedError
from relay.records.sends import Key

__all__ = ["CURSOR", "cursor_of", "place_of"]

CURSOR: Final = "[0-9]{1,17}-[0-9]{1,18}"
"""Microseconds since 1970, and the id of the row."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)


def cursor_of(key: Key) -> str:
    """Return the cursor of the page that ended with this row."""
    moment, identity = key
    return f"{(moment - _EPOCH) // _MICROSECOND}-{identity}"


def place_of(cursor: str | None, field: str, takes: str) -> Key | None:
    """Return the row that a cursor stands for, None for none.

    Raises AskedError for what is no cursor: `field` has it, and `takes` says what it is to people.
    """
    if cursor is None:
        return None
    if re.fullmatch(CURSOR, cursor) is None:
        raise AskedError(field, takes)
    micros, identity = map(int, cursor.split("-"))
    return _EPOCH + micros * _MICROSECOND, identity
