"""The JSON API: what `relay sends` and `relay stats` answer, over HTTP, and what happens now.

Rules. GET and HEAD alone. A parameter that is unknown, comes twice or has no meaning is refused with a
problem document that names it: an answer to another question than the one asked is worse than none. Pages
go on by a cursor, the place of the last row, so that a page costs the same however far back it is; they end
where they get large, since they are written on the event loop. `openapi` describes all of it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import urlencode
from uuid import UUID

import orjson
from aiohttp import web

from relay.asking import AskedError, filter_of, zone_of
from relay.records.by import By
from relay.records.errors import MissingStoreError, SlowReadError, StoreError
from relay.records.sends import InDoubt, Key, Send
from relay.web import openapi
from relay.web.cursor import cursor_of, place_of
from relay.web.openapi import DEFAULT_LIMIT, FILTERS, MAX_LIMIT, TASK_ID
from relay.web.overview import Overview
from relay.web.problem import problem
from relay.web.reading import BusyError, Reading
from relay.web.row import document

__all__ = ["Api", "Limits", "no_limits"]

Limits = Callable[[], Awaitable[list[dict[str, Any]]]]
"""Gives the rate limits and how near their edge each is."""

_FIELDS: Final = tuple(FILTERS)
_MAX_OCTETS: Final = 4 * 1024 * 1024
"""Octets of a page's rows after which it ends, though it might have more rows."""
_FIRST: Final = 50
_GROWS: Final = 4
"""Rows that are read first for a page; by how much more are read each time."""
_Search = Callable[..., Awaitable[Sequence[Send | InDoubt]]]
Handler = Callable[[web.Request], Awaitable[web.Response]]


async def no_limits() -> list[dict[str, Any]]:
    """There are none."""
    return []


class Api:
    """The routes under /api."""

    def __init__(self, reading: Reading, overview: Overview, limits: Limits = no_limits) -> None:
        self._reading = reading
        self._overview = overview
        self._limits = limits

    def routes(self) -> Iterable[web.AbstractRouteDef]:
        """Return the routes."""
        return [
            web.get("/api/sends", self._answering(self._sends, (*_FIELDS, "tz", "limit", "cursor"))),
            web.get("/api/sends/{task_id}", self._answering(self._send)),
            web.get("/api/in-doubt", self._answering(self._doubts, (*_FIELDS, "tz", "limit", "cursor"))),
            web.get("/api/stats", self._answering(self._stats, (*_FIELDS, "tz", "limit", "by", "detail"))),
            web.get("/api/limits", self._answering(self._get_limits)),
            web.get("/api/status", self._answering(self._status)),
            web.get("/api/openapi.json", self._answering(self._openapi)),
        ]

    def _answering(
        self, work: Callable[[web.Request], Awaitable[Any]], known: tuple[str, ...] = ()
    ) -> Handler:
        """Return a handler: parameters that are not `known` are refused, what fails is a problem document."""

        async def answer(request: web.Request) -> web.Response:
            try:
                _check(request, known)
                return _json(await work(request))
            except AskedError as error:
                return problem(400, f"{error.field} takes {error.takes}", field=error.field)
            except web.HTTPNotFound as error:
                return problem(404, error.text or error.reason)
            except SlowReadError as error:
                return problem(503, f"the search {error}")
            except BusyError as error:
                return problem(503, str(error), headers={"Retry-After": "1"})
            except MissingStoreError:
                return problem(503, "there are no records yet", headers={"Retry-After": "10"})
            except StoreError as error:
                return problem(503, str(error), headers={"Retry-After": "10"})

        return answer

    async def _sends(self, request: web.Request) -> Any:
        return await _page(request, "sends", self._reading.search, *self._asked(request))

    async def _doubts(self, request: web.Request) -> Any:
        return await _page(request, "in_doubt", self._reading.in_doubt, *self._asked(request))

    def _asked(self, request: web.Request) -> tuple[Any, int, Key | None]:
        rows = _number(request.query.get("limit"), DEFAULT_LIMIT)
        after = place_of(request.query.get("cursor"), "cursor", "the cursor of an answer")
        return self._filter(request), rows, after

    def _filter(self, request: web.Request) -> Any:
        given = {name: request.query.get(name) for name in _FIELDS}
        if given["task_id"] is not None and re.fullmatch(TASK_ID, given["task_id"]) is None:
            raise AskedError("task_id", "a UUID")
        zone = zone_of(request.query.get("tz", "UTC"))
        return filter_of(given, datetime.now(UTC), zone, self._reading.aliases)

    async def _send(self, request: web.Request) -> Any:
        given = request.match_info["task_id"]
        found = None
        if re.fullmatch(TASK_ID, given):
            found = await self._reading.send(UUID(given))
        if found is None:
            raise web.HTTPNotFound(
                text="no send has this task_id, and no message in doubt; it may have expired"
            )
        return document(found)

    async def _stats(self, request: web.Request) -> Any:
        names = request.query.getall("by", [])
        if not 1 <= len(names) <= 2 or len(set(names)) < len(names) or not set(names) <= set(By):
            raise AskedError("by", f"one or two of {', '.join(By)}")
        detail = request.query.get("detail", "false")
        if detail not in ("true", "false"):
            raise AskedError("detail", "true or false")
        zone = zone_of(request.query.get("tz", "UTC"))
        found = await self._reading.statistics(
            self._filter(request),
            [By(name) for name in names],
            zone=zone,
            detail=detail == "true",
            limit=_number(request.query.get("limit"), MAX_LIMIT),
        )
        counts = [dataclasses.asdict(count) for count in found.counts]
        for count in counts:
            count["keys"] = dict(zip(names, count["keys"], strict=True))
            if detail == "false":
                for name in ("recipients", "octets", "average_ms", "slowest_ms"):
                    del count[name]
        return {"by": names, "messages": found.messages, "groups": found.groups, "counts": counts}

    async def _get_limits(self, _request: web.Request) -> Any:
        return {"limits": await self._reading.bounded(self._limits)}

    async def _status(self, _request: web.Request) -> Any:
        status = self._overview.now()
        try:
            status["records"]["in_doubt"] = await self._reading.count_in_doubt()
            status["records"]["readable"] = None
        except StoreError as error:
            status["records"]["in_doubt"] = None
            status["records"]["readable"] = str(error)
        return status

    async def _openapi(self, _request: web.Request) -> Any:
        return await asyncio.to_thread(openapi.description)


async def _page(request: web.Request, name: str, search: _Search, wanted: Any, rows: int, after: Any) -> Any:
    """Return the next `rows` rows, or as many as make a page.

    Each may have a thousand recipients, so few are read at first, then as many as would still go in.
    """
    shown: list[orjson.Fragment] = []
    octets, more = 0, True
    while more and len(shown) < rows and octets < _MAX_OCTETS:
        fits = (_MAX_OCTETS - octets) * len(shown) // max(octets, 1)
        asked = min(rows - len(shown), max(1, min(fits, _GROWS * len(shown))) if shown else _FIRST)
        found = await search(wanted, rows=asked, after=after)
        more = len(found) == asked
        for each in found:
            if octets >= _MAX_OCTETS:
                more = True
                break
            row = orjson.dumps(document(each))
            shown.append(orjson.Fragment(row))
            octets += len(row)
            after = each.key
    return {name: shown, **_next(request, after if more else None)}


def _json(document: Any) -> web.Response:
    body = orjson.dumps(document)
    return web.Response(body=body, content_type="application/json", headers={"Cache-Control": "no-store"})


def _check(request: web.Request, known: tuple[str, ...]) -> None:
    for name in request.query:
        if name not in known:
            raise AskedError(name, f"nothing: there is no such parameter ({', '.join(known) or 'none'})")
        if name != "by" and len(request.query.getall(name)) > 1:
            raise AskedError(name, "one value")


def _number(value: str | None, default: int) -> int:
    if value is None:
        return default
    if not re.fullmatch("[0-9]{1,6}", value) or not 1 <= int(value) <= MAX_LIMIT:
        raise AskedError("limit", f"a number from 1 to {MAX_LIMIT}")
    return int(value)


def _next(request: web.Request, key: Key | None) -> Mapping[str, str | None]:
    """Return the cursor of the next page, and its address; null at the end."""
    if key is None:
        return {"cursor": None, "next": None}
    cursor = cursor_of(key)
    query = [(name, value) for name, value in request.query.items() if name != "cursor"]
    return {"cursor": cursor, "next": f"{request.path}?{urlencode([*query, ('cursor', cursor)])}"}
