"""Who gets the page and the API: the Host that a request names, and the token.

Rules. /metrics, /healthz and /readyz are open to whoever reaches the port. Everything else says what was
sent to whom, so a request

- must name a Host that is ours: an IP address, `localhost`, or a name from the configuration. A browser that
  was lured to another name which resolves to this machine (DNS rebinding) is told 421;
- must bring the token if there is one: as a bearer token, or as the password of HTTP's Basic scheme, whatever
  the user's name; compared in constant time;
- is told 403 if there is no token and the port is not loopback's alone.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from typing import TYPE_CHECKING, Final

from aiohttp import web

from relay.web.problem import problem

if TYPE_CHECKING:
    from relay.settings import Settings

__all__ = ["OPEN", "Access"]

OPEN: Final = frozenset({"/metrics", "/healthz", "/readyz"})
"""What asks for nothing."""
_CHALLENGE: Final = 'Basic realm="relay", charset="UTF-8"'


class Access:
    """Lets requests through or not, by the settings in force."""

    def __init__(self, settings: Settings) -> None:
        self._token: bytes | None = None
        self._loopback = False
        self._hosts: frozenset[str] = frozenset()
        self.follow(settings)

    def follow(self, settings: Settings) -> None:
        """Go by these settings from the next request on."""
        http = settings.http
        self._token = None if http.token is None else http.token.get_secret_value().encode()
        self._loopback = http.loopback
        self._hosts = frozenset(
            name.rstrip(".").lower() for name in (http.host, settings.server.hostname, *http.hosts)
        )

    def refusal(self, request: web.Request) -> web.Response | None:
        """Return the answer to a request that may not go on, None for one that may."""
        if request.path in OPEN:
            return None
        if not self._is_ours(request.headers.get("Host", "")):
            return problem(
                421, "this relay does not go by the name in Host; add it to http.hosts in the configuration"
            )
        if self._token is None:
            if self._loopback:
                return None
            return problem(403, "without http.token_file page and API answer on a loopback address only")
        if self._has_token(request.headers.get("Authorization", "")):
            return None
        return problem(
            401,
            "send the token of http.token_file: Authorization: Bearer TOKEN, or as the password of Basic",
            headers={"WWW-Authenticate": _CHALLENGE},
        )

    def _is_ours(self, host: str) -> bool:
        name = host.rpartition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
        try:
            ip_address(name)
        except ValueError:
            name = name.rstrip(".").lower()
            return name == "localhost" or name.endswith(".localhost") or name in self._hosts
        return True

    def _has_token(self, authorization: str) -> bool:
        scheme, _, credentials = authorization.strip().partition(" ")
        given = credentials.strip().encode("utf-8", "surrogateescape")
        if scheme.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        elif scheme.lower() != "bearer":
            return False
        return self._token is not None and hmac.compare_digest(given, self._token)

    @property
    def middleware(self) -> Callable[..., Awaitable[web.StreamResponse]]:
        """What stands before every handler."""

        @web.middleware
        async def guard(
            request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
        ) -> web.StreamResponse:
            refusal = self.refusal(request)  # false, as an empty mapping is, before aiohttp 3.12
            return await handler(request) if refusal is None else refusal

        return guard
