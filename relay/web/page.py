"""The page for people: what happens now, what was sent, one send in full.

Rules. GET and HEAD alone, and every view has an address that can be passed on. Everything that strangers
wrote goes through the templates, which escape it; a Content-Security-Policy lets nothing run that is not a
file of this package, and nothing is loaded from anywhere else. However many look at it, the process is asked
every other second at most, and the records no more than a hundredth of the time.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib import resources
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import urlencode
from uuid import UUID

from aiohttp import web

from relay import __version__
from relay.asking import AskedError, zone_of
from relay.late import late
from relay.provider import accepted_as
from relay.records.errors import MissingStoreError, StoreError
from relay.records.sends import InDoubt, Key, Send, SendFilter
from relay.web.api import Limits, no_limits, shown
from relay.web.box import Box
from relay.web.figures import SPANS, Figure, by_outcome, by_type
from relay.web.overview import Overview
from relay.web.reading import Reading
from relay.web.shown import FILTERS, octets, seconds, visible
from relay.web.standing import LimitRow, limit_row, standing

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["Page"]

T = TypeVar("T")

ROWS: Final = 50
"""Sends on a page of results."""
RECENT: Final = 10
_NOW_S: Final = 2.0
"""For how long what happens now is good enough for the next one who looks."""
_REST: Final = 100
_SHORTEST_REST_S, _LONGEST_REST_S = 5.0, 300.0
"""What was read from the records rests so many times as long as reading it took, within these bounds."""
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
_TYPES: Final = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_CURSOR: Final = re.compile("([0-9]{1,17})-([0-9]{1,18})")
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
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
class _Line:
    """A send, or a message in doubt, in a table."""

    task_id: str
    moment: datetime
    task_type: str
    sender: str
    recipients: tuple[str, ...]
    reply: str


@dataclass(frozen=True, slots=True)
class _Recent:
    rows: list[_Line]
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
        self._kept = _Kept()
        self._static = _static_files()
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
            return await self._render("_live.html", live_only=True, **await self._live(span))

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

    async def _limits_now(self) -> list[LimitRow]:
        try:
            return [limit_row(limit) for limit in await self._limits()]
        except StoreError:
            return []  # the parts above say what is wrong with the records

    async def _recent(self) -> _Recent:
        try:
            return _Recent([_line(row) for row in await self._reading.search(SendFilter(), rows=RECENT)])
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
            found = await find(_place(request.query.get("after")))
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
            older = _address(request.path, [*query, ("after", _cursor(found[-1]))])
        return await self._html(
            request,
            "sends.html",
            status=status,
            title=title,
            here=request.path,
            doubts=title == "In doubt",
            form=box,
            rows=[_line(row) for row in found],
            problem=problem,
            first="after" not in request.query,
            first_page=_address(request.path, query),
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
            row=_line(row),
            doubt=isinstance(row, InDoubt),
            reason=row.reason if isinstance(row, InDoubt) else "",
            upstream=row.upstream,
            facts=list(_facts(row)),
            refused=_refused(row.data.get("refused")),
            headers=list(_kept_headers(row.data.get("headers"))),
            raw=json.dumps(shown(row), indent=2, ensure_ascii=False, default=list),
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
        text = await self._render(template, **values)
        return _answer(request, text.encode(), "text/html", status)

    async def _render(self, template: str, **values: Any) -> str:
        if self._templates is None:
            self._templates = await late(_load_templates)
        found = self._templates.get_template(template)
        return found.render(hostname=self._hostname(), version=__version__, **values)


class _Kept:
    """What was read a moment ago, by name. Who comes while it is read waits for the same reading."""

    def __init__(self) -> None:
        self._values: dict[str, tuple[float, Any]] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    async def get(
        self, name: str, read: Callable[[], Awaitable[T]], *, at_most: float = _LONGEST_REST_S
    ) -> T:
        """Return what `read` gives, or gave not long ago."""
        async with self._locks.setdefault(name, asyncio.Lock()):
            good_until, value = self._values.get(name, (0.0, None))
            begun = time.monotonic()
            if begun < good_until:
                kept: T = value
                return kept
            fresh = await read()
            ended = time.monotonic()
            rest = min(max((ended - begun) * _REST, _SHORTEST_REST_S), at_most)
            self._values[name] = ended + rest, fresh
            return fresh


def _load_templates() -> Environment:
    """Make all of them ready: to load jinja2 and to compile takes a while, which a start has not."""
    import jinja2

    files = _template_files()
    environment = jinja2.Environment(
        loader=jinja2.DictLoader(files),
        auto_reload=False,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=visible,
    )
    environment.filters.update(FILTERS)
    for name in files:
        environment.get_template(name)
    return environment


def _template_files() -> dict[str, str]:
    """Return the templates by name, all read now: an upgrade changes none under a relay that runs."""
    found = (resources.files("relay.web") / "templates").iterdir()
    return {each.name: each.read_text("utf-8") for each in found}


def _static_files() -> dict[str, tuple[bytes, str]]:
    """Return the package's own files: content and type, by name."""
    root = resources.files("relay.web") / "static"
    names = ("style.css", "page.js", "favicon.svg", "uplot/uPlot.iife.min.js", "uplot/uPlot.min.css")
    return {name: ((root / name).read_bytes(), _TYPES[name.rpartition(".")[2]]) for name in names}


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


def _address(path: str, query: Iterable[tuple[str, str]]) -> str:
    text = urlencode(list(query))
    return f"{path}?{text}" if text else path


def _cursor(row: Send | InDoubt) -> str:
    return f"{(_moment(row) - _EPOCH) // _MICROSECOND}-{row.id}"


def _place(cursor: str | None) -> Key | None:
    if cursor is None:
        return None
    found = _CURSOR.fullmatch(cursor)
    if found is None:
        raise AskedError("after", "the address of an older page")
    return _EPOCH + int(found[1]) * _MICROSECOND, int(found[2])


def _moment(row: Send | InDoubt) -> datetime:
    return row.sent_at if isinstance(row, Send) else row.since


def _line(row: Send | InDoubt) -> _Line:
    said = row.upstream_reply if isinstance(row, Send) else row.reason
    return _Line(row.task_id, _moment(row), row.task_type, row.sender, row.recipients, said)


def _facts(row: Send | InDoubt) -> Iterable[tuple[str, Any, str]]:
    """Give what is known of a send: a name, the value, how it is shown."""
    if isinstance(row, Send):
        accepted = accepted_as(row.upstream_reply)
        yield "Accepted", row.sent_at, "time"
        yield "The upstream said", row.upstream_reply.split("\n"), "lines"
        if accepted is not None:
            yield "The provider's id", accepted.id, "mono"
    else:
        yield "In doubt since", row.since, "time"
        yield "Because", row.reason, ""
    if "client_reply" in row.data:
        heard = row.data["client_reply"]
        yield "The client heard", "nothing: its connection had broken" if heard is None else str(heard), ""
    yield "From", row.sender, "search"
    yield "Client", _client(row), ""
    yield "Upstream", row.upstream, ""
    if row.message_id is not None:
        yield "Message-ID", row.message_id, "mono"
    yield "Task id", row.task_id, "mono"
    if row.client_task_id is not None:
        yield "The application's id", row.client_task_id, "mono"
    exactly = "" if row.size < 1000 else f" ({row.size:,} octets)"
    yield "Size", f"{octets(row.size)}{exactly}", ""
    yield "Took", f"{seconds(row.duration_ms / 1000)} from MAIL on", ""
    if isinstance(row.data.get("tags"), list):
        yield "Tags", row.data["tags"], "lines"
    if row.expires_at is None:
        yield "Kept", "for ever", ""
    else:
        yield "Kept until", row.expires_at, "time"


def _client(row: Send | InDoubt) -> str:
    address = row.data.get("client_address")
    return row.client if address is None else f"{row.client}, from {address}"


def _refused(found: object) -> list[dict[str, str]]:
    if not isinstance(found, list):
        return []
    return [
        {"recipient": str(each.get("recipient", "")), "reply": str(each.get("reply", ""))}
        for each in found
        if isinstance(each, Mapping)
    ]


def _kept_headers(found: object) -> Iterable[tuple[str, str]]:
    for name, value in found.items() if isinstance(found, Mapping) else ():
        for each in value if isinstance(value, list) else [value]:
            yield str(name), str(each)
