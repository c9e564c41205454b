"""Bearer tokens for the relay's own login at an upstream: from a file, a command or a token endpoint.

Rules: every failure is a TokenError of one line that names what to change and never holds a secret. Every
wait and every answer is bounded. Work that many dials need at once is done once, for all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from pathlib import Path

    from relay.settings import TokenSettings

__all__ = [
    "MAX_OCTETS",
    "TIMEOUT",
    "TOKEN",
    "CommandTokens",
    "FileTokens",
    "Shared",
    "TokenError",
    "Tokens",
    "bounded",
    "token_source",
]

TIMEOUT: Final = 10.0
"""Seconds that a command or a token endpoint gets."""
MAX_OCTETS: Final = 64 * 1024
"""Octets of a token, or of an endpoint's answer, that are read."""
TOKEN: Final = re.compile(r"[\x21-\x7e]+")
"""RFC 6750 2.1 allows less; nothing that could break out of the SASL response (RFC 7628 3.1)."""


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
    from relay.upstream.endpoint import EndpointTokens  # an HTTP client, slow to load

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
        self._shared = Shared(self._run)

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
                octets = await bounded(process.stdout)
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


class Shared:
    """One piece of work at a time, whose result goes to all who asked while it was done.

    It goes on when those who asked have gone: a rotated refresh token must not be lost with its answer.
    """

    def __init__(self, work: Callable[[], Coroutine[Any, Any, str]]) -> None:
        self._work = work
        self._running: asyncio.Task[str] | None = None

    async def result(self) -> str:
        """Return the result of the work that is under way, or of a new one."""
        if self._running is None:
            self._running = asyncio.get_running_loop().create_task(self._work())
            self._running.add_done_callback(self._over)
        return await asyncio.shield(self._running)

    def _over(self, task: asyncio.Task[str]) -> None:
        self._running = None
        if not task.cancelled():
            task.exception()  # known to whoever waits; nobody may be left


async def bounded(stream: Any) -> bytes:
    """Read to the end, or a little beyond MAX_OCTETS."""
    octets = bytearray()
    while len(octets) <= MAX_OCTETS and (more := await stream.read(MAX_OCTETS)):
        octets += more
    return bytes(octets)


def _clean(octets: bytes, what: str) -> str:
    """Return the token in `octets`, without the white space around it."""
    token = octets.decode("ascii", "replace").strip()
    if len(octets) > MAX_OCTETS or not TOKEN.fullmatch(token):
        raise TokenError(f"{what} gave no token: one word of printable ASCII is needed")
    return token
