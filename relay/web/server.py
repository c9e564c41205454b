"""The HTTP server and its routes, on the relay's own event loop.

Rules: an answer never waits for the store or an upstream, since a probe that hangs is a restart; nothing
here changes anything, so GET and HEAD are the only methods; and no answer of ours tells which server or
version gives it (the library's own 400 to what is no HTTP does).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from aiohttp import web

from relay.metrics import Metrics

__all__ = ["BindError", "Web"]

_STOP_TIMEOUT_S: Final = 2.0
"""How long a stop waits for answers that are on their way."""


class BindError(OSError):
    """The address cannot be listened on; the text is one line for the operator."""


class Web:
    """Answers /metrics, /healthz and /readyz.

    `readiness` tells whether the relay can do its work now, and lines of text for whoever asks: the reason
    if it cannot, the upstreams' state in any case.
    """

    def __init__(self, metrics: Metrics, readiness: Callable[[], tuple[bool, Sequence[str]]]) -> None:
        self._metrics = metrics
        self._readiness = readiness
        self._runner: web.AppRunner | None = None
        self.port = 0
        """The TCP port, once started; useful when port 0 was asked for."""

    async def start(self, host: str, port: int) -> None:
        """Listen on `host` (an IP address or a name) and `port`, 0 for any; raise BindError."""
        app = web.Application(middlewares=[_plain_errors])
        app.on_response_prepare.append(_without_server)
        app.add_routes(
            [
                web.get("/metrics", self._get_metrics),
                web.get("/healthz", self._get_health),
                web.get("/readyz", self._get_readiness),
            ]
        )
        # The relay owns signals and logs; a scraper every few seconds would fill an access log.
        runner = web.AppRunner(app, handle_signals=False, access_log=None, shutdown_timeout=_STOP_TIMEOUT_S)
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            await runner.cleanup()
            reason = error.strerror or str(error)
            raise BindError(f"http.address: cannot listen on {host} port {port}: {reason}") from error
        self._runner = runner
        self.port = runner.addresses[0][1]

    async def stop(self) -> None:
        """Close the listener and finish the answers that are on their way; harmless when not started."""
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


def _text(status: int, lines: Sequence[str]) -> web.Response:
    return web.Response(
        status=status, text="".join(f"{line}\n" for line in lines), headers={"Cache-Control": "no-store"}
    )


@web.middleware
async def _plain_errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Give 404 and 405 one line of text, as everything else here."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        error.text = f"{error.status} {error.reason}\n"
        raise


async def _without_server(_request: web.Request, response: web.StreamResponse) -> None:
    # aiohttp would name itself and Python with their versions.
    response.headers.pop("Server", None)
