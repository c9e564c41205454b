"""The kinds of values that keys hold: how each is written, checked, printed and described in the schema.

Rules: a mistake is a ValueError whose text names what to change. No I/O, but for the machine's own name.
"""

from __future__ import annotations

import re
import socket
from fnmatch import fnmatchcase
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, PlainSerializer, PlainValidator, Strict, WithJsonSchema

from relay.settings.address import ADDRESS_PATTERN, LISTEN_PATTERN, Address, host_name
from relay.settings.dsn import shown_url
from relay.settings.networks import Network, parse_network
from relay.settings.units import (
    DURATION_PATTERN,
    LARGEST_SIZE,
    SIZE_PATTERN,
    format_duration,
    format_size,
    parse_duration,
    parse_size,
)

__all__ = [
    "Count",
    "Duration",
    "DurationOrZero",
    "FileName",
    "Flag",
    "HeaderName",
    "HttpAddress",
    "Lifetime",
    "ListenAddress",
    "MatchPattern",
    "NetworkText",
    "OwnName",
    "RelayName",
    "Size",
    "StoreUrl",
    "TaskTypeName",
    "UpstreamAddress",
    "Weight",
    "check_length",
    "check_line",
    "fits",
    "machine_name",
    "written",
]

GREATEST_NUMBER = 10**9  # what is calculated with it stays a number of the database and of the system
TASK_TYPE_LENGTH = 64
SHORTEST_SECRET = 16


def _address(value: str) -> str:
    return str(Address.parse(value))


def _relay_name(value: str) -> str:
    if not value.isprintable() or value != value.strip() or len(value) > 255:
        raise ValueError("must be a name of at most 255 characters")
    return value


def _listen_address(value: str) -> str:
    return str(Address.parse(value, unix=True))


def _upstream_address(value: str) -> str:
    address = Address.parse(value)
    if address.port == 0:
        raise ValueError("the port must be a number from 1 to 65535")
    return str(address)


def _network(value: object) -> Network:
    if isinstance(value, Network):
        return value
    if not isinstance(value, str):
        raise ValueError('must be text such as "192.0.2.0/24"')  # noqa: TRY004  pydantic wants ValueError
    return parse_network(value)


def _longer_than_zero(value: object) -> float:
    seconds = parse_duration(value)
    if not seconds:
        raise ValueError("must be longer than nothing")
    return seconds


def _lifetime(value: object) -> float | None:
    if value is None or value == "never":
        return None
    try:
        return _longer_than_zero(value)
    except ValueError as error:
        raise ValueError(f'{error} (or "never")') from None


def _format_lifetime(value: float | None) -> str:
    return "never" if value is None else format_duration(value)


def _header(value: str) -> str:
    if not re.fullmatch(r"[!-9;-~]{1,200}", value):  # RFC 5322 3.6.8
        raise ValueError("is no header name: printable ASCII without space and colon")
    return value


def _task_type(value: str) -> str:
    if not value.isprintable() or value != value.strip():
        raise ValueError("must be printable text, without space at its ends")
    return value


def _pattern(value: str) -> str:
    text = value.removeprefix("!")
    if not text:
        raise ValueError("a pattern is empty (the null reverse-path is written <>)")
    if not text.isprintable() or text != text.strip() or text.startswith("!"):
        raise ValueError(
            f'"{value}" is no pattern: printable text, at most one ! before it, no space at its ends'
        )
    return value


def _file_name(value: Path) -> Path:
    if "\0" in str(value):
        raise ValueError("must be the name of a file, without NUL")
    return value


def check_length(secret: str) -> None:
    """Raise ValueError for a token or a key that is short enough to be guessed."""
    if len(secret) < SHORTEST_SECRET:
        raise ValueError(f"is shorter than {SHORTEST_SECRET} characters: make one with openssl rand -hex 32")


def check_line(text: str) -> None:
    """Raise ValueError for what cannot be said in one line to a server."""
    if not text or any(character in "\0\r\n" for character in text):
        raise ValueError("must not be empty or hold line ends or NUL")


def fits(pattern: str, value: str) -> bool:
    """Whether `value` is what `pattern` says, or fits it as one with wildcards; case does not matter."""
    wanted, found = pattern.lower(), value.lower()
    return wanted == found or fnmatchcase(found, wanted)


def machine_name() -> str:
    """The machine's fully qualified name, as far as it has one that can stand in a greeting."""
    for name in (socket.getfqdn(), socket.gethostname()):
        try:
            return _own_name(name)
        except ValueError:
            continue
    return "localhost"


def _own_name(value: str) -> str:
    name = host_name(value)
    try:
        ip_address(name)
    except ValueError:
        return name
    raise ValueError("must be a name, not an IP address")


def written(value: Any) -> Any:
    """A default in the form in which the file has it; it is validated like any other value."""
    return Field(default=value)


def _text_schema(pattern: str, *examples: str, **more: Any) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "pattern": pattern, "examples": list(examples), **more})


_AS_DURATION = PlainSerializer(format_duration, when_used="json")
_DURATION_SCHEMA = _text_schema(DURATION_PATTERN, "500ms", "30s", "5m", "12h", "30d")

Duration = Annotated[float, PlainValidator(_longer_than_zero), _AS_DURATION, _DURATION_SCHEMA]
DurationOrZero = Annotated[float, PlainValidator(parse_duration), _AS_DURATION, _DURATION_SCHEMA]
Lifetime = Annotated[
    float | None,
    PlainValidator(_lifetime),
    PlainSerializer(_format_lifetime, when_used="json"),
    _text_schema(rf"{DURATION_PATTERN}|^never$", "30d", "never"),
]
Size = Annotated[
    int,
    PlainValidator(parse_size),
    PlainSerializer(format_size, when_used="json"),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "pattern": SIZE_PATTERN},
                {"type": "integer", "minimum": 0, "maximum": LARGEST_SIZE},
            ],
            "examples": ["500B", "64KiB", "25MiB", 1048576],
        }
    ),
]
OwnName = Annotated[str, AfterValidator(_own_name)]
RelayName = Annotated[str, AfterValidator(_relay_name)]
StoreUrl = Annotated[str, PlainSerializer(shown_url)]
ListenAddress = Annotated[
    str,
    AfterValidator(_listen_address),
    _text_schema(LISTEN_PATTERN, "127.0.0.1:2525", "[::1]:2525", "unix:/run/relay/relay.sock"),
]
HttpAddress = Annotated[
    str, AfterValidator(_address), _text_schema(ADDRESS_PATTERN, "127.0.0.1:9025", "[::1]:9025")
]
UpstreamAddress = Annotated[
    str, AfterValidator(_upstream_address), _text_schema(ADDRESS_PATTERN, "smtp.example.com:587")
]
NetworkText = Annotated[
    Network,
    PlainValidator(_network),
    PlainSerializer(str, when_used="json"),
    WithJsonSchema({"type": "string", "examples": ["192.0.2.0/24", "2001:db8::/32", "192.0.2.1"]}),
]
FileName = Annotated[Path, AfterValidator(_file_name)]
Count = Annotated[int, Strict(), Field(ge=1, le=GREATEST_NUMBER)]
Weight = Annotated[int, Strict(), Field(ge=0, le=GREATEST_NUMBER)]
MatchPattern = Annotated[str, Field(max_length=320), AfterValidator(_pattern)]
"""A text with the wildcards of `fnmatch`; a leading "!" excludes what fits it."""
Flag = Annotated[bool, Strict()]
HeaderName = Annotated[str, AfterValidator(_header)]
TaskTypeName = Annotated[str, Field(min_length=1, max_length=TASK_TYPE_LENGTH), AfterValidator(_task_type)]
