"""Who answers over HTTP, put together: page and API, who gets them, the server.

Whoever imports this loads aiohttp, which reads the machine's certificate authorities while it is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from relay.web.access import Access
from relay.web.api import Api, Limits
from relay.web.overview import Overview
from relay.web.page import Page
from relay.web.reading import Reading
from relay.web.server import Server, Site

if TYPE_CHECKING:
    from relay.metrics import Metrics
    from relay.settings import Settings

__all__ = ["make_server"]


def make_server(
    settings: Settings,
    metrics: Metrics,
    overview: Overview,
    reading: Reading,
    *,
    readiness: Callable[[], tuple[bool, Sequence[str]]],
    hostname: Callable[[], str],
    listens: Callable[[], Iterable[str]],
    limits: Limits,
) -> Server:
    """Return the server by these settings, of a relay with these parts, which tells this of itself."""
    page = Page(reading, overview, hostname=hostname, listens=listens, limits=limits)
    api = Api(reading, overview, limits)
    return Server(metrics, readiness, Site(Access(settings), overview, [api, page]))
