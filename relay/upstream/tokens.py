"""Bearer tokens for the relay's own login at an upstream: from a file, a command or a token endpoint.

Rules: every failure is a TokenError of one line that names what to change and never holds a secret. Every
wait and every answer is bounded. Work that many dials need at once is done once, for all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import time
from typing import TYPE_CHECKING, Any, Protocol

import aiohttp

from relay import maillog

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from pathlib import Path

    from relay.settings import TokenSettings

__all__ = ["CommandTokens", "EndpointTokens", "FileTokens", "TokenError", "Tokens", "token_source"]

TIMEOUT = 10.0
"""Seconds that a command or a token endpoint gets."""
MAX_OCTETS = 64 * 1024
"""Octets of a token, or of an endpoint's answer, that are read."""
MARGIN = 60.0
"""Seconds before its end from which a token is not used again: the login must be over by then."""
LIFETIME_UNKNOWN = 300.0
"""Seconds that a token is kept whose endpoint does not say how long it holds (RFC 6749 5.1)."""

_TOKEN = re.compile(r"[\x21-\x7e]+")
"""RFC 6750 2.1 allows less; nothing that could break out of the SASL response (RFC 7628 3.1)."""
_ERROR = re.compile(r"[a-z0-9_.-]{1,64}")
"""What an error code of a token endpoint may look like to be shown (RFC 6749 5.2)."""


class TokenError(Exception):
    """No token can be had; the text is one line for the operator."""


class Tokens(Protocol):
    """Where tokens come from."""

    async def token(self) -> str:
        """Return a token to log in with now; raise TokenError if there is none."""

    def refused(self, token: str) -> None:
        """The upstream did not take this token: it is not to be given out again from a cache."""


def token_source(settings: TokenSettings) -> Tokens:
    """Return the source that the settings name."""
    if settings.file is not None:
        return FileTokens(settings.file)
    if settings.command:
        return CommandTokens(settings.command)
    return EndpointTokens(settings)


class FileTokens:
    """Tokens from a file that something else keeps up to date."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def token(self) -> str:
        """Return what the file holds now; raise TokenError if that is no token."""
        try:
            octets = await asyncio.to_thread(self._read)
        except OSError as error:
            raise TokenError(f"token file {self._path} cannot be read: {error.strerror}") from None
        return _clean(octets, f"token file {self._path}")

    def _read(self) -> bytes:
        with self._path.open("rb") as file:
            return file.read(MAX_OCTETS + 1)

    def refused(self, token: str) -> None:
        """Nothing is kept."""


class CommandTokens:
    """Tokens that a command prints. It runs without a shell; what it writes to stderr is dropped."""

    def __init__(self, command: Sequence[str], *, timeout_s: float = TIMEOUT) -> None:
        self._command = tuple(command)
        self._timeout_s = timeout_s
        self._shared = _Shared(self._run)

    async def token(self) -> str:
        """Return what the command prints; dials that ask while it runs share its answer."""
        return await self._shared.result()

    def refused(self, token: str) -> None:
        """Nothing is kept."""

    async def _run(self) -> str:
        what = f"token command {self._command[0]}"
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            raise TokenError(f"{what} cannot be run: {error.strerror}") from None
        try:
            async with asyncio.timeout(self._timeout_s):
                octets = await _bounded(process.stdout)
                status = await process.wait() if len(octets) <= MAX_OCTETS else 0
        except TimeoutError:
            raise TokenError(f"{what} took longer than {self._timeout_s:g} s") from None
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # with whatever it has started
                await process.communicate()
        if status:
            raise TokenError(f"{what} failed with exit status {status}")
        return _clean(octets, what)


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
        self._shared = _Shared(self._fetch)

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
        if not isinstance(token, str) or not _TOKEN.fullmatch(token):
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
            return response.status, await _bounded(response.content)

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


class _Shared:
    """One piece of work at a time, whose result goes to all who asked while it was done.

    It goes on when those who asked have gone: a rotated refresh token must not be lost with its answer.
    """

    def __init__(self, work: Callable[[], Coroutine[Any, Any, str]]) -> None:
        self._work = work
        self._running: asyncio.Task[str] | None = None

    async def result(self) -> str:
        if self._running is None:
            self._running = asyncio.get_running_loop().create_task(self._work())
            self._running.add_done_callback(self._over)
        return await asyncio.shield(self._running)

    def _over(self, task: asyncio.Task[str]) -> None:
        self._running = None
        if not task.cancelled():
            task.exception()  # known to whoever waits; nobody may be left


async def _bounded(stream: Any) -> bytes:
    """Read to the end, or a little beyond MAX_OCTETS."""
    octets = bytearray()
    while len(octets) <= MAX_OCTETS and (more := await stream.read(MAX_OCTETS)):
        octets += more
    return bytes(octets)


def _clean(octets: bytes, what: str) -> str:
    """Return the token in `octets`, without the white space around it."""
    token = octets.decode("ascii", "replace").strip()
    if len(octets) > MAX_OCTETS or not _TOKEN.fullmatch(token):
        raise TokenError(f"{what} gave no token: one word of printable ASCII is needed")
    return token


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
