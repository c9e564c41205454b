"""Bearer tokens from an OAuth 2.0 token endpoint, the only part of the upstream's side that speaks HTTP.

Rules: those of `tokens`; and the secrets go to the address that is configured, and nowhere else.
"""

from __future__ import annotations

import json
import re
import time
from typing import TYPE_CHECKING, Any, Final

import aiohttp

from relay import maillog
from relay.upstream.tokens import MAX_OCTETS, TIMEOUT, TOKEN, Shared, TokenError, bounded

if TYPE_CHECKING:
    from collections.abc import Callable

    from relay.settings import TokenSettings

__all__ = ["EndpointTokens"]

MARGIN: Final = 60.0
"""Seconds before its end from which a token is not used again: the login must be over by then."""
LIFETIME_UNKNOWN: Final = 300.0
"""Seconds that a token is kept whose endpoint does not say how long it holds (RFC 6749 5.1)."""

_ERROR: Final = re.compile(r"[a-z0-9_.-]{1,64}")
"""What an error code of a token endpoint may look like to be shown (RFC 6749 5.2)."""


class EndpointTokens:
    """Tokens from an OAuth 2.0 token endpoint, kept until they are about to expire or were refused.

    With a refresh token the grant is that of RFC 6749 section 6, else client_credentials (section 4.4).
    Client id and secret go in the body (section 2.3.1), the form that the large providers document. A new
    refresh token in an answer takes the place of the one before, in memory only.
    """

    def __init__(self, settings: TokenSettings, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._url = settings.url or ""
        self._name = f"token endpoint {self._url.partition('?')[0]}"
        form = {"client_id": settings.client_id or ""}
        if settings.client_secret is not None:
            form["client_secret"] = settings.client_secret.get_secret_value()
        if settings.scope is not None:
            form["scope"] = settings.scope
        if settings.refresh_token is not None:
            form |= {
                "grant_type": "refresh_token",
                "refresh_token": settings.refresh_token.get_secret_value(),
            }
        else:
            form["grant_type"] = "client_credentials"
        self._form = form
        self._clock = clock
        self._kept: str | None = None
        self._kept_until = 0.0
        self._shared = Shared(self._fetch)

    async def token(self) -> str:
        """Return the token that is kept, or a new one; raise TokenError if the endpoint gives none."""
        if self._kept is not None and self._clock() < self._kept_until:
            return self._kept
        return await self._shared.result()

    def refused(self, token: str) -> None:
        """Forget the token if it is the one that is kept; a newer one stays."""
        if token == self._kept:
            self._kept = None

    async def _fetch(self) -> str:
        asked = self._clock()
        try:
            status, octets = await self._post()
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise TokenError(f"{self._name}: {_reason(error)}") from None
        answer = _json_object(octets)
        if status != 200:
            raise TokenError(f"{self._name} answered {status}{self._error_code(answer)}")
        token = answer.get("access_token")
        kind = answer.get("token_type", "bearer")
        if not isinstance(token, str) or not TOKEN.fullmatch(token):
            raise TokenError(f"{self._name} gave no access token")
        if not isinstance(kind, str) or kind.lower() != "bearer":
            raise TokenError(f"{self._name} gave a token that is no bearer token")
        self._rotate(answer.get("refresh_token"))
        self._kept, self._kept_until = token, asked + _usable_for(answer.get("expires_in"))
        return token

    async def _post(self) -> tuple[int, bytes]:
        """Return status and body of the answer; a body beyond the limit is cut."""
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT)) as session,
            session.post(
                self._url,
                data=self._form,
                headers={"Accept": "application/json"},
                allow_redirects=False,  # the secrets are for the address that is configured
            ) as response,
        ):
            return response.status, await bounded(response.content)

    def _error_code(self, answer: dict[str, Any]) -> str:
        """Return the error code of the answer, if it looks like one; never its description."""
        code = answer.get("error")
        if not isinstance(code, str) or not _ERROR.fullmatch(code) or code in self._form.values():
            return ""
        return f": {code}"

    def _rotate(self, refresh_token: object) -> None:
        used = self._form.get("refresh_token")
        if used is not None and refresh_token and isinstance(refresh_token, str) and refresh_token != used:
            self._form["refresh_token"] = refresh_token
            maillog.warning(f"{self._name} gave a new refresh token: kept in memory only")


def _json_object(octets: bytes) -> dict[str, Any]:
    if len(octets) > MAX_OCTETS:
        return {}
    try:
        answer = json.loads(octets)
    except (ValueError, RecursionError):
        return {}
    return answer if isinstance(answer, dict) else {}


def _usable_for(expires_in: object) -> float:
    """Return for how many seconds a token is used; some endpoints write the number as text."""
    try:
        seconds = float(expires_in)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return LIFETIME_UNKNOWN
    return seconds - min(MARGIN, seconds / 2) if 0 < seconds < float("inf") else 0.0


def _reason(error: Exception) -> str:
    """Say why a request failed, in words that cannot hold what was sent."""
    if isinstance(error, TimeoutError):
        return f"no answer in {TIMEOUT:g} s"
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"cannot be reached: {error.os_error.strerror or 'no such host or certificate'}"
    return type(error).__name__
