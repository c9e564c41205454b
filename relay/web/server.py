"""The HTTP server and its routes, on the relay's own event loop.

Rules: metrics and health never wait for the store or an upstream, since a probe that hangs is a restart;
nothing here changes anything, so GET and HEAD are the only methods; and no answer of ours tells which server
or version gives it (the library's own 400 to what is no HTTP does). What else there is comes as `Site`:
routes, and what stands before them.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

from aiohttp import web
from aiohttp.http import HttpProcessingError
from aiohttp.web_urldispatcher import MatchInfoError, UrlMappingMatchInfo

from relay import maillog
from relay.metrics import Metrics
from relay.web.access import Access
from relay.web.crowd import Crowd
from relay.web.overview import SAMPLE_S, Overview
from relay.web.problem import problem

if TYPE_CHECKING:
    from relay.settings import Settings

__all__ = ["Part", "Server", "Site"]

_Resolve = Callable[[web.Request], Awaitable[UrlMappingMatchInfo]]
_STOP_TIMEOUT_S: Final = 2.0
"""How long a stop waits for answers that are on their way."""


_MAX_LINE: Final = 96 * 1024
"""Octets of a request line: a search may have several long values, percent-encoded."""
_MAX_PATH: Final = 1024
"""Characters of the path in it, percent-encoded; none of ours comes near."""


@dataclass(frozen=True, slots=True)
class Site:
    """What is answered beside metrics and health: page and API, behind `access`."""

    access: Access
    overview: Overview
    parts: Sequence[Part]


class Part(Protocol):
    """Something with routes."""

    def routes(self) -> Iterable[web.AbstractRouteDef]:
        """Return the routes."""


class Server:
    """Answers /metrics, /healthz and /readyz, and a site.

    `readiness` tells whether the relay can do its work now, and lines of text for whoever asks: the reason
    if it cannot, the upstreams' state in any case.
    """

    def __init__(
        self,
        metrics: Metrics,
        readiness: Callable[[], tuple[bool, Sequence[str]]],
        site: Site | None = None,
    ) -> None:
        self._metrics = metrics
        self._readiness = readiness
        self._site = site
        self._sampling: asyncio.Task[None] | None = None
        self._runner: web.AppRunner | None = None
        self._listening: list[asyncio.Server] = []

    def follow(self, settings: Settings) -> None:
        """Go by changed settings: who gets the site. The address stays."""
        if self._site is not None:
            self._site.access.follow(settings)

    async def serve(self, listening: Sequence[socket.socket]) -> None:
        """Answer who comes to these sockets."""
        crowd = Crowd()
        guards = [] if self._site is None else [self._site.access.middleware]
        app = web.Application(middlewares=[crowd.middleware, _safe, *guards, _errors])
        app.on_response_prepare.append(_without_server)
        cast("Any", app.router).resolve = _bounded(app.router.resolve)
        app.add_routes(
            [
                web.get("/metrics", self._get_metrics),
                web.get("/healthz", self._get_health),
                web.get("/readyz", self._get_readiness),
            ]
        )
        for part in () if self._site is None else self._site.parts:
            app.add_routes(part.routes())
        logging.getLogger("aiohttp.server").addFilter(_not_of_a_client)
        # The relay owns signals and logs; a scraper every few seconds would fill an access log. Nobody reads
        # a request's body, so none is unpacked: a megabyte may unpack to a thousand.
        self._runner = web.AppRunner(
            app,
            handle_signals=False,
            access_log=None,
            shutdown_timeout=_STOP_TIMEOUT_S,
            max_line_size=_MAX_LINE,
            auto_decompress=False,
        )
        await self._runner.setup()
        joins = crowd.joins(cast("web.Server", self._runner.server))
        loop = asyncio.get_running_loop()
        self._listening = [await loop.create_server(joins, sock=each) for each in listening]
        if self._site is not None:
            self._sampling = asyncio.create_task(_sample(self._site.overview), name="overview")

    async def stop(self) -> None:
        """Close the sockets and finish the answers that are on their way."""
        if self._sampling is not None:
            self._sampling.cancel()
            await asyncio.wait((self._sampling,))
        for each in self._listening:
            each.close()
        if self._runner is not None:
            runner, self._runner = self._runner, None
            await runner.cleanup()

    async def _get_metrics(self, request: web.Request) -> web.Response:
        body, content_type = self._metrics.exposition(request.headers.get("Accept"))
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def _get_health(self, _request: web.Request) -> web.Response:
        return _text(200, ["ok"])

    async def _get_readiness(self, _request: web.Request) -> web.Response:
        ready, lines = self._readiness()
        return _text(200 if ready else 503, ["ready" if ready else "not ready", *lines])


def _bounded(resolve: _Resolve) -> _Resolve:
    """Look only for paths that may be there.

    aiohttp looks for a path once for each "/" in it and copies it each time: for tens of thousands of them
    that is a second of the event loop, for anybody who asks, since it comes before `access`.
    """

    async def resolved(request: web.Request) -> UrlMappingMatchInfo:
        if len(request.rel_url.raw_path) > _MAX_PATH:
            return MatchInfoError(web.HTTPRequestURITooLong())
        return await resolve(request)

    return resolved


def _not_of_a_client(record: logging.LogRecord) -> bool:
    """Keep from the log what a client did wrong: aiohttp tells of it as an error, with a traceback."""
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


def _text(status: int, lines: Sequence[str]) -> web.Response:
    return web.Response(
        status=status, text="".join(f"{line}\n" for line in lines), headers={"Cache-Control": "no-store"}
    )


@web.middleware
async def _errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Give 404 and 405 one line of text, under /api a problem document; say nothing of what is unforeseen."""
    programs = request.path.startswith("/api/")
    try:
        return await handler(request)
    except web.HTTPException as error:
        allowed = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
        if programs:
            return problem(error.status, f"{request.method} {request.path}: {error.reason}", headers=allowed)
        # Raised further, it would pass by what every answer is given on its way out.
        return web.Response(status=error.status, text=f"{error.status} {error.reason}\n", headers=allowed)
    except Exception as error:
        maillog.unforeseen("http", None, error)
        text = "an error that nobody foresaw; the log has it"
        return problem(500, text) if programs else _text(500, [f"500 {text}"])


@web.middleware
async def _safe(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Say that no answer is to be taken for another kind than it says, nor used by another origin."""
    response = await handler(request)
    response.headers.setdefault("X-Content-Type-Options", "nosniff")
    response.headers.setdefault("Cross-Origin-Resource-Policy", "same-origin")
    response.headers.setdefault("Referrer-Policy", "no-referrer")
    return response


async def _sample(overview: Overview) -> None:
    while True:
        await asyncio.sleep(SAMPLE_S)
        overview.sample()


async def _without_server(_request: web.Request, response: web.StreamResponse) -> None:
    # aiohttp would name itself and Python with their versions.
    response.headers.pop("Server", None)
