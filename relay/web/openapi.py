"""The description of the API (OpenAPI 3.1), which tests hold against the server.

Rules. What it allows the server takes, and what it does not the server refuses. Names are those of the
columns and of the command line's options.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final
from zoneinfo import available_timezones

from relay import __version__
from relay.asking import MAX_VALUE
from relay.outcome import Outcome
from relay.records.by import By
from relay.web.cursor import CURSOR

__all__ = ["DEFAULT_LIMIT", "FILTERS", "MAX_LIMIT", "TASK_ID", "description"]

DEFAULT_LIMIT: Final = 50
MAX_LIMIT: Final = 1000
TASK_ID: Final = "[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"

_TEXT: Final = {"type": "string", "maxLength": MAX_VALUE}
_WHEN: Final = {
    "type": "string",
    "anyOf": [
        {"pattern": "^([0-9]{1,9}(ms|s)|[0-9]{1,5}[mh]|[0-9]{1,4}d)$"},
        {"enum": ["today", "yesterday"]},
        {"format": "date"},
        {"format": "date-time"},
    ],
    "examples": ["7d", "today", "2026-11-23", "2026-11-23T07:46:00Z"],
}
FILTERS: Final[dict[str, tuple[dict[str, Any], str]]] = {
    "sender": (
        _TEXT,
        "An address, `@domain`, or a pattern with `*`; empty: the null reverse-path. Case does not matter.",
    ),
    "recipient": (_TEXT, "An address, `@domain`, or a pattern with `*`. Case does not matter."),
    "type": (_TEXT, "Task type, or a pattern with `*`."),
    "client": (_TEXT, "Authenticated user, else the client's address, or a pattern with `*`."),
    "upstream": (_TEXT, "Name of the upstream, or a pattern with `*`."),
    "message_id": (_TEXT, "Message-ID, with or without its angle brackets."),
    "task_id": ({"type": "string", "pattern": f"^{TASK_ID}$"}, "The relay's id of the send."),
    "since": (_WHEN, "Then or later: a time ago, or a date or time, in the zone `tz` without its own."),
    "until": (_WHEN, "Before then."),
}
"""The parameters of a search: schema and meaning."""

_TIME: Final = {"type": "string", "format": "date-time"}
_COUNT: Final = {"type": "integer", "minimum": 0}


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _list(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": schema}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


_ROW: Final[dict[str, dict[str, Any]]] = {
    "task_id": {"type": "string", "format": "uuid"},
    "client_task_id": _nullable({"type": "string"}),
    "task_type": {"type": "string"},
    "sender": {"type": "string"},
    "sender_domain": {"type": "string"},
    "client": {"type": "string"},
    "expires_at": _nullable(_TIME),
    "upstream": {"type": "string"},
    "message_id": _nullable({"type": "string"}),
    "size": _COUNT,
    "duration_ms": _COUNT,
    "data": {"type": "object"},
    "recipients": _list({"type": "string"}),
}
_OUTCOMES: Final = {outcome.value: _COUNT for outcome in Outcome}
_SECONDS: Final = {"type": "number", "minimum": 0}


def _schemas() -> dict[str, Any]:
    latency = {name: _nullable(_SECONDS) for name in ("p50_s", "p95_s", "p99_s")}
    return {
        "Send": _object(
            **_ROW,
            state={"const": "accepted"},
            sent_at=_TIME,
            upstream_reply={"type": "string"},
            provider_id=_nullable({"type": "string"}),
        ),
        "InDoubt": _object(**_ROW, state={"const": "in_doubt"}, since=_TIME, reason={"type": "string"}),
        "Count": {
            **_object(keys={"type": "object", "additionalProperties": {"type": "string"}}, messages=_COUNT),
            "properties": {
                "keys": {"type": "object", "additionalProperties": {"type": "string"}},
                "messages": _COUNT,
                "recipients": _COUNT,
                "octets": _COUNT,
                "average_ms": _SECONDS,
                "slowest_ms": _COUNT,
            },
        },
        "Limit": _object(
            name={"type": "string"},
            scope={"type": "string"},
            unit={"type": "string"},
            maximum=_COUNT,
            window_s=_SECONDS,
            action={"type": "string"},
            keys=_list(
                _object(
                    key={"type": "string"},
                    used=_COUNT,
                    state={"enum": ["near", "over"]},
                    room_in_s=_nullable(_SECONDS),
                )
            ),
        ),
        "Status": _object(
            version={"type": "string"},
            at=_TIME,
            started_at=_TIME,
            ready={"type": "boolean"},
            notes=_list({"type": "string"}),
            sessions=_COUNT,
            rate_per_s=_SECONDS,
            outcomes=_object(**_OUTCOMES),
            last_hour=_list(_object(at=_TIME, **_OUTCOMES)),
            upstreams=_list(
                _object(
                    name={"type": "string"},
                    connections=_object(idle=_COUNT, active=_COUNT, connecting=_COUNT),
                    outcomes=_object(**_OUTCOMES),
                    latency=_object(answers=_COUNT, **latency),
                )
            ),
            records=_object(
                pending=_COUNT,
                spooled=_COUNT,
                reserve=_COUNT,
                errors=_COUNT,
                in_doubt=_nullable(_COUNT),
                readable=_nullable({"type": "string"}),
            ),
            expiry=_object(lag_s=_SECONDS, last_run_at=_nullable(_TIME), rows=_COUNT),
        ),
        "Problem": {
            "type": "object",
            "properties": {
                "type": {"type": "string"},
                "title": {"type": "string"},
                "status": {"type": "integer"},
                "detail": {"type": "string"},
                "field": {"type": "string", "description": "The parameter that is wrong."},
            },
            "required": ["type", "title", "status", "detail"],
            "additionalProperties": False,
        },
    }


def _parameter(name: str, schema: dict[str, Any], text: str, *, required: bool = False) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": required, "schema": schema, "description": text}


def _filters() -> list[dict[str, Any]]:
    found = [_parameter(name, schema, text) for name, (schema, text) in FILTERS.items()]
    zones = {"type": "string", "enum": sorted(available_timezones() | {"UTC"}), "default": "UTC"}
    return [*found, _parameter("tz", zones, "Zone of times without one, and of hours and days.")]


def _limit(default: int, text: str) -> dict[str, Any]:
    schema = {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": default}
    return _parameter("limit", schema, text)


def _get(
    summary: str, schema: dict[str, Any], parameters: list[dict[str, Any]], *statuses: str
) -> dict[str, Any]:
    """Return a path that is read; each of `statuses` has a problem document."""
    answers: dict[str, Any] = {
        "200": {"description": summary, "content": {"application/json": {"schema": schema}}}
    }
    answers |= {
        status: {"$ref": f"#/components/responses/{status}"} for status in (*statuses, "401", "403", "421")
    }
    return {"get": {"summary": summary, "parameters": parameters, "responses": answers}}


@cache
def description() -> dict[str, Any]:
    """Return the whole description; it looks for the zones that the machine knows, which takes a moment."""
    filters = _filters()
    cursor = _parameter(
        "cursor",
        {"type": "string", "pattern": f"^{CURSOR}$"},
        "`cursor` of the answer that this one follows.",
    )
    pages = [
        *filters,
        _limit(DEFAULT_LIMIT, "Rows of a page at most; one of more than 4 MiB ends sooner."),
        cursor,
    ]
    by = {
        "name": "by",
        "in": "query",
        "required": True,
        "description": "What to count by: one thing or two. By recipient-domain a message counts once for "
        "each recipient there.",
        "schema": {
            "type": "array",
            "minItems": 1,
            "maxItems": 2,
            "uniqueItems": True,
            "items": {"type": "string", "enum": [each.value for each in By]},
        },
    }
    detail = _parameter(
        "detail", {"type": "boolean", "default": False}, "Recipients, octets and times too; reads every row."
    )
    counts = _limit(MAX_LIMIT, "Counts at most: the biggest, or the latest.")
    task_id = {
        "name": "task_id",
        "in": "path",
        "required": True,
        "schema": {"type": "string", "pattern": f"^{TASK_ID}$"},
    }
    page = {"cursor": _nullable({"type": "string"}), "next": _nullable({"type": "string"})}
    one = {"oneOf": [_ref("Send"), _ref("InDoubt")]}
    stats = _object(by=_list({"type": "string"}), messages=_COUNT, groups=_COUNT, counts=_list(_ref("Count")))
    paths = {
        "/api/sends": _get(
            "Sends, newest first.", _object(sends=_list(_ref("Send")), **page), pages, "400", "503"
        ),
        "/api/sends/{task_id}": _get("Everything about one send.", one, [task_id], "400", "404", "503"),
        "/api/in-doubt": _get(
            "Messages in doubt, newest first.",
            _object(in_doubt=_list(_ref("InDoubt")), **page),
            pages,
            *("400", "503"),
        ),
        "/api/stats": _get("How much was sent.", stats, [*filters, by, detail, counts], "400", "503"),
        "/api/limits": _get(
            "The rate limits and how near their edge each is.",
            _object(limits=_list(_ref("Limit"))),
            [],
            *("400", "503"),
        ),
        "/api/status": _get("What happens now.", _ref("Status"), [], "400"),
        "/api/openapi.json": _get("This description.", {"type": "object"}, [], "400"),
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "SMTP relay that records sends", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": _schemas(),
            "responses": {
                status: {
                    "description": text,
                    "content": {"application/problem+json": {"schema": _ref("Problem")}},
                }
                for status, text in {
                    "400": "A parameter has no meaning.",
                    "401": "The token is missing or wrong.",
                    "403": "Off loopback there are no answers without a token.",
                    "404": "There is none.",
                    "421": "The relay does not go by the name in Host.",
                    "503": "The records cannot be read now.",
                }.items()
            },
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "basic": {"type": "http", "scheme": "basic"},
            },
        },
        "security": [{"bearer": []}, {"basic": []}, {}],
    }
