"""The sockets where clients connect: TCP over IPv4 and IPv6, and files of unix sockets.

Rules: an IPv6 address is IPv6 alone, so that every listener is what it is written as. The file of a unix
socket that nobody listens on any more is replaced, any other file is left alone; owner and group may connect.
A socket that a supervisor passed stays its own: it is neither unlinked nor emptied at the end, and what waits
in its queue is for whoever comes after us.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from relay.settings import ListenerSettings

__all__ = ["Listener", "address_of"]

BACKLOG = 4096
"""Connections that the kernel may hold for us: a burst must not wait for SYN retries."""
SOCKET_MODE = 0o660


class Listener:
    """One bound address."""

    def __init__(
        self,
        settings: ListenerSettings,
        *,
        reuse_port: bool = False,
        passed: socket.socket | None = None,
    ) -> None:
        """Listen there; `passed` is a socket that does already. Raises OSError."""
        self.settings = settings
        """What holds for connections from now on."""
        self._passed = passed is not None
        self._path: Path | None = None
        if passed is not None:
            self._socket = passed
        elif settings.path:
            self._path = Path(settings.path)
            self._socket = _bind_file(self._path)
            self._inode = self._path.stat().st_ino
        else:
            self._socket = _bind(settings.host, settings.port, reuse_port=reuse_port)
        self._socket.setblocking(False)
        self._server: asyncio.Server | None = None
        try:
            self._socket.listen(BACKLOG)  # only now is it certain that the address is free
        except OSError:
            self.close()
            raise
        self.address = settings.address if settings.path else address_of(self._socket)
        """The address, with the port that was really bound."""

    async def serve(self, session: Callable[[ListenerSettings], asyncio.Protocol]) -> None:
        """Accept connections, each with a new session."""
        loop = asyncio.get_running_loop()

        def begin() -> asyncio.Protocol:
            return session(self.settings)

        if self._socket.family == socket.AF_UNIX:
            # The file is ours to remove, or the supervisor's.
            keep: dict[str, Any] = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}
            self._server = await loop.create_unix_server(begin, sock=self._socket, backlog=BACKLOG, **keep)
        else:
            self._server = await loop.create_server(begin, sock=self._socket, backlog=BACKLOG)

    def close(self) -> list[socket.socket]:
        """Accept no more, and take the file away if it is still ours.

        Returns the connections that the kernel had for us: closing the socket would reset them.
        """
        kept: socket.socket | None = None
        if not self._passed:
            with contextlib.suppress(OSError):  # no descriptor is left, none for those who wait either
                kept = self._socket.dup()
        if self._server is not None:
            self._server.close()
        else:
            self._socket.close()
        if self._path is not None:
            with contextlib.suppress(OSError):
                if self._path.stat().st_ino == self._inode:
                    self._path.unlink()
        return [] if kept is None else _emptied(kept)


def _emptied(listening: socket.socket) -> list[socket.socket]:
    """Take what is in the queue, and close the socket at once: what comes in between would be reset."""
    waiting: list[socket.socket] = []
    with listening, contextlib.suppress(OSError):  # BlockingIOError: that was the last one
        while len(waiting) < BACKLOG:
            waiting.append(listening.accept()[0])
    for connection in waiting:
        connection.setblocking(False)
    return waiting


def address_of(bound: socket.socket) -> str:
    """Return what a socket is bound to, as it would be written in the configuration."""
    name = bound.getsockname()
    if bound.family == socket.AF_UNIX:
        return f"unix:{name if isinstance(name, str) else name.decode('utf-8', 'backslashreplace')}"
    host, port = name[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _bind(host: str, port: int, *, reuse_port: bool) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind((host, port))
    except OSError:
        bound.close()
        raise
    return bound


def _bind_file(path: Path) -> socket.socket:
    _remove_stale(path)
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        bound.bind(str(path))
        path.chmod(SOCKET_MODE)
    except OSError:
        bound.close()
        raise
    return bound


def _remove_stale(path: Path) -> None:
    """Remove a socket that a relay left behind; raise OSError when something else is in the way."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise OSError("a file that is no socket stands there")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise OSError("somebody listens there already")
