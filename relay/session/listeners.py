"""The sockets where clients connect: TCP over IPv4 and IPv6, and files of unix sockets.

Rules: an IPv6 address is IPv6 alone, so that every listener is what it is written as. The file of a unix
socket that nobody listens on any more is replaced, any other file is left alone; owner and group may connect.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import stat
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from relay.settings import ListenerSettings

__all__ = ["Listener"]

BACKLOG = 4096
"""Connections that the kernel may hold for us: a burst must not wait for SYN retries."""
SOCKET_MODE = 0o660


class Listener:
    """One bound address."""

    def __init__(self, settings: ListenerSettings, *, reuse_port: bool) -> None:
        """Bind it; raises OSError."""
        self._path = Path(settings.path) if settings.path else None
        if self._path is not None:
            self._socket = _bind_file(self._path)
            self._inode = self._path.stat().st_ino
            self.address = settings.address
            """The address, with the port that was really bound."""
        else:
            self._socket = _bind(settings.host, settings.port, reuse_port=reuse_port)
            host, port = self._socket.getsockname()[:2]
            self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._server: asyncio.Server | None = None

    async def serve(self, session: Callable[[], asyncio.Protocol]) -> None:
        """Accept connections, each with a new session."""
        loop = asyncio.get_running_loop()
        if self._path is not None:
            self._server = await loop.create_unix_server(session, sock=self._socket, backlog=BACKLOG)
        else:
            self._server = await loop.create_server(session, sock=self._socket, backlog=BACKLOG)

    def close(self) -> None:
        """Accept no more, and take the file away if it is still ours."""
        if self._server is not None:
            self._server.close()
        else:
            self._socket.close()
        if self._path is not None:
            with contextlib.suppress(OSError):
                if self._path.stat().st_ino == self._inode:
                    self._path.unlink()


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
