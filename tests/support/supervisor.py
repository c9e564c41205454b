"""A service manager as systemd is one to its services: it passes listening sockets, and is told of states.

Rules: the sockets stay open for as long as `with` lasts, whichever relays come and go. `LISTEN_PID` must be
the relay's own id, which only the process itself knows: a launcher in front of it sets the variables, puts
the sockets where they belong and becomes the relay by exec, as systemd's own child does.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from types import TracebackType
from typing import Self

from .process import RelayProcess

__all__ = ["Supervisor"]

LAUNCHER = """
import fcntl, os, sys
passed = [int(each) for each in sys.argv[1].split(",") if each]
high = [fcntl.fcntl(each, fcntl.F_DUPFD, 100) for each in passed]
for place, each in enumerate(high, 3):
    os.dup2(each, place, inheritable=True)
    os.close(each)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(passed)), "LISTEN_FDNAMES": sys.argv[2]}
os.execv(sys.argv[3], sys.argv[3:])
"""


class Supervisor:
    """Passes `sockets`, by name, to the relays that it is given; hears what they tell."""

    def __init__(self, **sockets: socket.socket) -> None:
        self._sockets = sockets
        self._path = f"\0relay-tests-{os.getpid()}-{id(self)}"
        self._heard = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._heard.bind(self._path)
        self._heard.setblocking(False)
        self.states: list[dict[str, str]] = []
        """What was told so far, each as its variables."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._heard.close()
        for each in self._sockets.values():
            each.close()

    def adopt(self, relay: RelayProcess, *, watchdog_s: float = 0.0) -> None:
        """Have the relay started by this supervisor from now on."""
        descriptors = tuple(each.fileno() for each in self._sockets.values())
        passed = ",".join(map(str, descriptors))
        relay.launcher = (sys.executable, "-ISc", LAUNCHER, passed, ":".join(self._sockets))
        relay.descriptors_passed = descriptors
        relay.environment["NOTIFY_SOCKET"] = self._path.replace("\0", "@")
        if watchdog_s:
            relay.environment["WATCHDOG_USEC"] = str(int(watchdog_s * 1e6))

    def listen(self) -> list[dict[str, str]]:
        """Take what was told, and return all of it."""
        while True:
            try:
                text = self._heard.recv(4096).decode()
            except BlockingIOError:
                return self.states
            self.states.append(dict(line.split("=", 1) for line in text.splitlines()))

    async def told(self, key: str, value: str, times: int = 1) -> dict[str, str]:
        """Return the state with this variable, once it was told so many times."""
        async with asyncio.timeout(30):
            while True:
                found = [state for state in self.listen() if state.get(key) == value]
                if len(found) >= times:
                    return found[times - 1]
                await asyncio.sleep(0.005)
