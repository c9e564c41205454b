"""A line of the log: its values clean, and as JSON; the line of a message on a way of its own.

Rules: a line is always exactly one line. What its values may hold is decided in `values.py`; the short way
of a message is taken where one look at the whole line shows that none of its values needs that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, MutableMapping
from datetime import UTC, datetime
from typing import Any, Final

import orjson

from relay.maillog.facts import Facts
from relay.maillog.values import MAX_TEXT, json_text, plain, printable
from relay.outcome import Outcome

__all__ = ["as_json", "cleaned", "message_line"]


_WORDS: Final = {outcome: outcome.value for outcome in Outcome}
_LEVELS: Final = {level: level.encode() for level in ("debug", "info", "warning", "error", "critical")}
_UTC_Z: Final = orjson.OPT_UTC_Z


def message_line(level: str, outcome: Outcome, facts: Facts) -> bytes | None:
    """Return the JSON line of a message whose values need no cleaning, None if one might.

    One look at the whole line instead of one at each value: if it is ASCII without an escape, a DEL and a
    URL, so is each value, and none is longer than all. Outcome and times in `facts` are written over.
    """
    moment = orjson.dumps(datetime.now(UTC), option=_UTC_Z)
    try:
        # Written over: what `cleaned` makes of them, if it comes to that, is the same.
        facts["outcome"] = _WORDS[outcome]  # orjson asks an enumeration by way of a property
        # As round(value, 6), in a tenth of its time.
        facts["wait_s"] = int(facts["wait_s"] * 1e6 + 0.5) / 1e6
        facts["upstream_s"] = int(facts["upstream_s"] * 1e6 + 0.5) / 1e6
        facts["commit_s"] = int(facts["commit_s"] * 1e6 + 0.5) / 1e6
        facts["total_s"] = int(facts["total_s"] * 1e6 + 0.5) / 1e6
        # In two: to put the facts behind the first three members of one object is to copy them all.
        found = b'{"time":%b,"level":"%b","event":"message",%b' % (
            moment,
            _LEVELS[level],
            orjson.dumps(facts, bytes.decode)[1:],
        )
    except (TypeError, ValueError, OverflowError):  # no UTF-8, a lone surrogate, a number that is none
        return None
    # `in` asks first whether it is given a number, and makes an exception of the answer; `find` does not.
    if len(found) > MAX_TEXT or not found.isascii() or found.find(b"\\") >= 0 or found.find(b"\x7f") >= 0:
        return None
    return None if found.find(b"/") >= 0 and found.find(b"://") >= 0 else found  # a slash is found sooner


def cleaned(level: str, event: str, fields: MutableMapping[str, Any]) -> dict[str, Any]:
    """Give a line its time and level, first, and every value its printable form."""
    line: dict[str, Any] = {"time": datetime.now(UTC), "level": level, "event": printable(event)}
    for key, value in fields.pop("fields", fields).items():
        if value is None:
            continue
        kind = value.__class__
        if kind is str:
            clean = value.isprintable() and len(value) <= MAX_TEXT and "://" not in value
            line[key] = value if clean else printable(value)
        elif kind is float:
            line[key] = round(value, 6)  # seconds; no clock here means more digits
        elif kind is int or kind is bool:
            line[key] = value
        else:
            line[key] = plain(value)
    return line


def as_json(line: Mapping[str, Any]) -> bytes:
    """Return one JSON object."""
    try:
        return orjson.dumps(line, option=orjson.OPT_UTC_Z)
    except TypeError:  # an integer beyond 64 bits
        return json.dumps(line, default=json_text).encode()
