"""What may stand in a line: values printable, bounded and without secrets, whatever was put into them.

Rules: octets that are no UTF-8 and characters that do not print come out as backslash escapes. Passwords are
cut out of URLs, and settings that are secret by their name are hidden. Nothing here raises.
"""

from __future__ import annotations

import dataclasses
import json
import re
import traceback
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

from relay.escaping import escaped
from relay.records.model import Entry

__all__ = [
    "MAX_ITEMS",
    "MAX_TEXT",
    "MAX_TRACEBACK",
    "error_text",
    "json_text",
    "plain",
    "printable",
    "row_text",
    "traceback_text",
    "without_secrets",
]

MAX_TEXT: Final = 1024
"""Characters of one value in a line."""
MAX_TRACEBACK: Final = 8192
"""Characters of one traceback; its end says most, so that is what stays."""
MAX_ITEMS: Final = 20
"""Members of one list in a line; recipients have their count beside it."""

_SECRET_KEY: Final = re.compile(r"(?:\A|_)(?:password|secret|token|api_key)\Z", re.IGNORECASE)
_URL_PASSWORD: Final = re.compile(r"(?<=://)([^\s/@:]{0,256}):\S{0,256}@")
_HIDDEN: Final = "(hidden)"


class Verbatim(str):
    """Text that is printable already and keeps its length."""

    __slots__ = ()


def plain(value: Any) -> Any:
    """Return a value made of JSON's types only, its texts printable and bounded, its lists too."""
    if value is None or isinstance(value, Verbatim | bool | int | float):
        return value
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, list | tuple):
        items = [plain(item) for item in value[:MAX_ITEMS]]
        return items if len(value) <= MAX_ITEMS else [*items, f"... ({len(value)} in all)"]
    if isinstance(value, Mapping):
        return {printable(str(key)): plain(item) for key, item in value.items()}
    return printable(_text(value))


def printable(text: str) -> str:
    """Escape what does not print (controls, line separators, bidirectional marks), and bound the length."""
    if len(text) <= MAX_TEXT and text.isprintable() and "://" not in text:
        return text
    cut = text[: 2 * MAX_TEXT]
    if "://" in cut:  # before the cut, which might fall between a password and its "@"
        cut = _URL_PASSWORD.sub(r"\1:***@", cut)
    if not cut.isprintable():
        cut = escaped(cut[:MAX_TEXT])
    if len(cut) > MAX_TEXT or len(text) > MAX_TEXT:
        cut = f"{cut[:MAX_TEXT]}... ({len(text)} characters)"
    return cut


def error_text(error: BaseException) -> str:
    """Return an error's type and what it says."""
    return "".join(traceback.format_exception_only(error)).strip()


def traceback_text(error: BaseException) -> str:
    """Return the end of an error's traceback, in printable characters."""
    text = "".join(traceback.format_exception(error)).strip()[-MAX_TRACEBACK:]
    return Verbatim(escaped(_URL_PASSWORD.sub(r"\1:***@", text))[-MAX_TRACEBACK:])


def row_text(entry: Entry) -> str:
    """Return the whole row as one JSON object in printable ASCII: nothing may be lost here."""
    # `ensure_ascii` escapes everything that is not ASCII, and every control character but DEL.
    return Verbatim(json.dumps(dataclasses.asdict(entry), default=json_text).replace("\x7f", "\\u007f"))


def json_text(value: object) -> str:
    """Return what stands in JSON for a value that is none of its types."""
    return value.isoformat() if isinstance(value, datetime) else str(value)


def without_secrets(value: Any, key: str = "") -> Any:
    """Return a setting, and what it holds, with what is secret by its name hidden; `key` is the name."""
    if value is not None and _SECRET_KEY.search(key):
        return _HIDDEN
    if isinstance(value, Mapping):
        return {name: without_secrets(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(item) for item in value]
    return value


def _text(value: object) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
