"""The page for people: what happens now, what was sent, one send in full.

Rules. GET and HEAD alone, and every view has an address that can be passed on. Everything that strangers
wrote goes through the templates, which escape it; a Content-Security-Policy lets nothing run that is not a
file of this package, and nothing is loaded from anywhere else. However many look at it, the process is asked
every other second at most, and the records no more than a hundredth of the time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlencode
from uuid import UUID

from aiohttp import web

from relay import __version__
from relay.asking import AskedError, zone_of
from relay.late import late
from relay.records.errors import MissingStoreError, StoreError
from relay.records.sends import InDoubt, Key, Send, SendFilter
from relay.web.api import Limits, no_limits
from relay.web.box import Box
from relay.web.cursor import cursor_of, place_of
from relay.web.figures import SPANS, Figure, by_outcome, by_type
from relay.web.files import load_templates, static_files
from relay.web.kept import Kept
from relay.web.overview import Overview
from relay.web.reading import BusyError, Reading
from relay.web.row import Line, document, facts, headers, line_of, refused
from relay.web.standing import LimitRow, limit_row, standing

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["Page"]

ROWS: Final = 50
"""Sends on a page of results."""
RECENT: Final = 10
_NOW_S: Final = 2.0
"""For how long what happens now is good enough for the next one who looks."""
_HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-cache",
}
_EXAMPLE: Final = """\
python3 - <<'END'
import smtplib
from email.message import EmailMessage

mail = EmailMessage()
mail["From"], mail["To"], mail["Subject"] = "shop@example.com", "ann@example.org", "Your order"
mail["X-Task-Type"] = "order-confirmation"
mail.set_content("Thank you!")
with smtplib.SMTP("{host}", {port}) as smtp:
    smtp.send_message(mail)
END"""


@dataclass(frozen=True, slots=True)
class _Recent:
    rows: list[Line]
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class _Limited:
    rows: list[LimitRow]
    problem: str | None = None


class Page:
    """The routes of the page; `hostname` and `listens` are those of the relay."""

    def __init__(
        self,
        reading: Reading,
        overview: Overview,
        hostname: Callable[[], str],
        listens: Callable[[], Iterable[str]],
        limits: Limits = no_limits,
    ) -> None:
        self._reading = reading
        self._overview = overview
        self._hostname = hostname
        self._listens = listens
        self._limits = limits
        self._kept = Kept()
        self._static = static_files()
        self._templates: Environment | None = None

    def routes(self) -> Iterable[web.AbstractRouteDef]:
        """Return the routes."""
        return [
            web.get("/", self._get_overview),
            web.get("/live", self._get_live),
            web.get("/sends", self._get_sends),
            web.get("/sends/{task_id}", self._get_send),
            web.get("/in-doubt", self._get_doubts),
            web.get("/static/{name:.+}", self._get_static),
        ]

    # What happens now

    async def _get_overview(self, request: web.Request) -> web.Response:
        values = await self._live(_span(request))
        return await self._html(
            request, "overview.html", here="/", live_only=False, form=Box.of({}), **values
        )

    async def _get_live(self, request: web.Request) -> web.Response:
        """Answer with the parts of the overview that change, as they stand."""
        span = _span(request)

        async def render() -> str:
            return await self._render("_live.html", root="./", live_only=True, **await self._live(span))

        return _answer(
            request, (await self._kept.get(f"live {span}", render, at_most=_NOW_S)).encode(), "text/html"
        )

    async def _live(self, span: str) -> dict[str, Any]:
        now = datetime.now(UTC)
        status = self._overview.now()
        in_doubt = await self._kept.get("doubts", self._count_in_doubt)
        return {
            "now": standing(status, in_doubt, now),
            "outcomes": by_outcome(status["last_hour"], now),
            "types": await self._kept.get(f"types {span}", lambda: self._types(span, now)),
            "recent": await self._kept.get("recent", self._recent),
            "limits": await self._kept.get("limits", self._limits_now),
            "span": span,
            "spans": list(SPANS),
            "listens": ", ".join(self._listens()),
            "example": _example(self._listens()),
        }

    async def _count_in_doubt(self) -> int | None:
        try:
            return await self._reading.count_in_doubt()
        except MissingStoreError:
            return 0
        except StoreError:
            return None

    async def _types(self, name: str, now: datetime) -> Figure:
        span = SPANS[name]
        try:
            counts = await self._reading.over_time(span.begin(now), span.step, span.slots)
        except MissingStoreError:
            counts = {}
        except StoreError as error:
            return Figure("types", "", [], span.step, [], problem=_sentence(error))
        return by_type(counts, span, now)

    async def _limits_now(self) -> _Limited:
        try:
            return _Limited([limit_row(limit) for limit in await self._reading.bounded(self._limits)])
        except (MissingStoreError, BusyError):  # there may be no limits
            return _Limited([])
        except StoreError as error:
            return _Limited([], _sentence(error))

    async def _recent(self) -> _Recent:
        try:
            return _Recent([line_of(row) for row in await self._reading.search(SendFilter(), rows=RECENT)])
        except MissingStoreError:
            return _Recent([])
        except StoreError as error:
            return _Recent([], _sentence(error))

    # What was sent

    async def _get_sends(self, request: web.Request) -> web.Response:
        box = Box.of(request.query)

        async def find(after: Key | None) -> list[Send]:
            zone = zone_of(request.query.get("tz") or "UTC")
            found: dict[int, Send] = {}
            for wanted in box.filters(datetime.now(UTC), zone, self._reading.aliases):
                rows = await self._reading.search(wanted, rows=ROWS + 1, after=after)
                found.update((row.id, row) for row in rows)
            return sorted(found.values(), key=lambda row: (row.sent_at, row.id), reverse=True)

        return await self._results(request, "Sends", box, find)

    async def _get_doubts(self, request: web.Request) -> web.Response:
        async def find(after: Key | None) -> list[InDoubt]:
            return await self._reading.in_doubt(SendFilter(), rows=ROWS + 1, after=after)

        return await self._results(request, "In doubt", Box.of({}), find)

    async def _results(
        self,
        request: web.Request,
        title: str,
        box: Box,
        find: Callable[[Key | None], Awaitable[list[Send] | list[InDoubt]]],
    ) -> web.Response:
        problem, status = None, 200
        found: list[Send] | list[InDoubt] = []
        try:
            found = await find(place_of(request.query.get("after"), "after", "the address of an older page"))
        except AskedError as error:
            problem, status = f"{error.field} takes {error.takes}.", 400
        except MissingStoreError:
            found = []
        except StoreError as error:
            problem, status = _sentence(error), 503
        query = [(name, value) for name, value in request.query.items() if name != "after" and value]
        older = None
        if len(found) > ROWS:
            found = found[:ROWS]
            older = _address(request, [*query, ("after", cursor_of(found[-1].key))])
        return await self._html(
            request,
            "sends.html",
            status=status,
            title=title,
            here=request.path,
            doubts=title == "In doubt",
            form=box,
            rows=[line_of(row) for row in found],
            problem=problem,
            first="after" not in request.query,
            first_page=_address(request, query),
            next_page=older,
        )

    async def _get_send(self, request: web.Request) -> web.Response:
        try:
            row = await self._reading.send(UUID(request.match_info["task_id"]))
        except (ValueError, MissingStoreError):
            row = None
        except StoreError as error:
            return await self._problem(request, 503, "The records cannot be read", _sentence(error))
        if row is None:
            text = "No send has this task id, and no message in doubt. It may have expired."
            return await self._problem(request, 404, "Not found", text)
        return await self._html(
            request,
            "send.html",
            here="",
            row=line_of(row),
            doubt=isinstance(row, InDoubt),
            reason=row.reason if isinstance(row, InDoubt) else "",
            upstream=row.upstream,
            facts=list(facts(row)),
            refused=refused(row),
            headers=list(headers(row)),
            raw=json.dumps(document(row), indent=2, ensure_ascii=False, default=list),
        )

    # Answers

    async def _get_static(self, request: web.Request) -> web.Response:
        found = self._static.get(request.match_info["name"])
        if found is None:
            raise web.HTTPNotFound
        return _answer(request, *found)

    async def _problem(self, request: web.Request, status: int, title: str, text: str) -> web.Response:
        return await self._html(request, "problem.html", status=status, here="", title=title, text=text)

    async def _html(
        self, request: web.Request, template: str, *, status: int = 200, **values: Any
    ) -> web.Response:
        text = await self._render(template, root=_root(request), **values)
        return _answer(request, text.encode(), "text/html", status)

    async def _render(self, template: str, **values: Any) -> str:
        if self._templates is None:
            self._templates = await late(load_templates)
        found = self._templates.get_template(template)
        return found.render(hostname=self._hostname(), version=__version__, **values)


def _answer(request: web.Request, body: bytes, kind: str, status: int = 200) -> web.Response:
    """Answer with `body`, or with 304 to who has it."""
    tag = hashlib.blake2b(body, digest_size=12).hexdigest()
    headers = {**_HEADERS, "ETag": f'"{tag}"'}
    known = request.if_none_match or ()
    if status == 200 and any(each.value == tag for each in known):
        return web.Response(status=304, headers=headers)
    return web.Response(status=status, body=body, content_type=kind, charset="utf-8", headers=headers)


def _span(request: web.Request) -> str:
    name = request.query.get("span", "")
    return name if name in SPANS else next(iter(SPANS))


def _example(listens: Iterable[str]) -> str:
    """Return a script that sends a message to the first listener."""
    host, _, port = next(iter(listens), "127.0.0.1:25").rpartition(":")
    anywhere = {"0.0.0.0": "127.0.0.1", "[::]": "::1"}  # noqa: S104
    return _EXAMPLE.format(host=anywhere.get(host, host.strip("[]")), port=port)


def _sentence(error: StoreError) -> str:
    text = str(error)
    return f"{text[:1].upper()}{text[1:]}."


def _root(request: web.Request) -> str:
    """Return where the overview is, seen from this page: a proxy in front may have put a path before it."""
    return "../" if "task_id" in request.match_info else "./"


def _address(request: web.Request, query: Iterable[tuple[str, str]]) -> str:
    text = urlencode(list(query))
    address = f"{_root(request)}{request.path[1:]}"
    return f"{address}?{text}" if text else address
