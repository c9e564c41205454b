"""The service manager's side of a start, a reload and a stop: sd_listen_fds(3) and sd_notify(3).

Rules: nothing here is needed; without the variables nothing happens. They are read once and taken out of the
environment, so that no child of ours takes them for its own. What the manager is told never holds the relay
up, and a manager that does not listen is reported once. Any supervisor that speaks the two protocols will do.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Final, Self

from relay import maillog

__all__ = ["ActivationError", "Inherited", "Supervisor", "inherited"]

FIRST: Final = 3
"""The first descriptor that is passed (SD_LISTEN_FDS_START)."""


class ActivationError(Exception):
    """What was passed cannot be used; the text is one line that names it."""


@dataclass(frozen=True, slots=True)
class Inherited:
    """A listening socket that stays the supervisor's; we hold a descriptor of our own."""

    name: str
    """FileDescriptorName= of the socket unit; "unknown" where it has none."""
    socket: socket.socket


class Supervisor:
    """Who started this process, as far as it wants to be told."""

    def __init__(self, *, notify: str = "", watchdog_s: float = 0.0) -> None:
        """`notify` is NOTIFY_SOCKET; `watchdog_s` the time after which silence counts as death, 0: never."""
        self.watchdog_s = watchdog_s
        self._address = f"\0{notify[1:]}" if notify.startswith("@") else notify
        self._alive_at = 0.0
        self._socket: socket.socket | None = None
        if notify:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)

    @classmethod
    def of(cls, environ: MutableMapping[str, str]) -> Self:
        """Return the one that the environment names, and take it out of there."""
        notify = environ.pop("NOTIFY_SOCKET", "")
        period, process = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
        ours = process in ("", str(os.getpid()))
        watchdog_s = int(period) / 1e6 if ours and period.isascii() and period.isdecimal() else 0.0
        return cls(notify=notify, watchdog_s=watchdog_s if notify else 0.0)

    def ready(self, status: str) -> None:
        """The relay listens, or has read its configuration again."""
        self._tell("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        """The configuration is read again; `ready` follows, whatever comes of it."""
        self._tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """The relay drains."""
        self._tell("STOPPING=1", "STATUS=draining")

    def alive(self, now: float) -> None:
        """The event loop turns; `now` in seconds of a monotonic clock. Told at half the watchdog's time."""
        if self.watchdog_s and now - self._alive_at >= self.watchdog_s / 2:
            self._alive_at = now
            self._tell("WATCHDOG=1")

    def close(self) -> None:
        """Tell nothing any more."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _tell(self, *lines: str) -> None:
        if self._socket is None:
            return
        try:
            self._socket.sendto("\n".join(lines).encode(), self._address)
        except BlockingIOError:
            pass  # its queue is full: the next one gets through
        except OSError as error:
            self.close()
            maillog.warning(f"NOTIFY_SOCKET: the service manager cannot be told: {error.strerror}")


def inherited(environ: MutableMapping[str, str]) -> tuple[Inherited, ...]:
    """Return the sockets that were passed to this process, and take the variables out of `environ`.

    Raises ActivationError for anything but listening stream sockets.
    """
    process = environ.pop("LISTEN_PID", "")
    count, names = environ.pop("LISTEN_FDS", ""), environ.pop("LISTEN_FDNAMES", "")
    if process != str(os.getpid()):  # for somebody above us, or nobody
        return ()
    if not (count.isascii() and count.isdecimal()):
        raise ActivationError(f"LISTEN_FDS: {count!r} is no number")
    named = names.split(":") if names else []
    found: list[Inherited] = []
    try:
        for index in range(int(count)):
            name = named[index] if index < len(named) else "unknown"
            found.append(Inherited(name, _socket(FIRST + index, name)))
    except ActivationError:
        for each in found:
            each.socket.close()
        raise
    return tuple(found)


def _socket(descriptor: int, name: str) -> socket.socket:
    what = f"descriptor {descriptor} ({name}) that was passed by LISTEN_FDS"
    try:
        os.set_inheritable(descriptor, False)
        passed = socket.socket(fileno=descriptor)
    except OSError as error:
        raise ActivationError(f"{what} is no socket: {error.strerror}") from None
    listens = False
    with contextlib.suppress(OSError):
        listens = bool(passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    families = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)
    if passed.family not in families or passed.type != socket.SOCK_STREAM or not listens:
        passed.close()
        raise ActivationError(
            f"{what} is no listening stream socket: the socket unit needs ListenStream= and Accept=no"
        )
    return passed
