"""A TCP proxy that fails on purpose: between clients and the relay, or between the relay and an upstream.

Rules: each connection that is accepted gets one `Fault`, from a plan that the test gives; None: octets pass
as they come. It counts octets from the connection's beginning, each way by itself: UP is what the one who
connected says, DOWN what it hears. Exactly the octets before the fault pass. Every fault ends by itself:
a stall that nobody gives up on lasts `LONGEST_S` at most. The octets themselves are never changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Self

__all__ = [
    "DOWN",
    "LONGEST_S",
    "UP",
    "Cut",
    "Dribble",
    "Fault",
    "FaultyProxy",
    "HalfClose",
    "Stall",
    "random_fault",
]

LONGEST_S = 20.0
"""Seconds after which a stalled connection is reset, if neither end has given up on it."""

Way = Literal["up", "down"]
UP: Way = "up"
DOWN: Way = "down"

_BLOCK = 64 * 1024


@dataclass(frozen=True)
class Cut:
    """End both connections once `after` octets have passed this way: by FIN, or by RST.

    With `late` not before another octet wants to pass: the answer is under way, and is lost.
    """

    way: Way
    after: int
    by: Literal["fin", "rst"]
    late: bool = False


@dataclass(frozen=True)
class HalfClose:
    """Once `after` octets have passed this way, say FIN to whom they went; the other way goes on."""

    way: Way
    after: int


@dataclass(frozen=True)
class Stall:
    """Once `after` octets have passed this way let nothing through for so many seconds, None: for good.

    The other way goes on, or stalls as well if `both`. `late` is as in `Cut`.
    """

    way: Way
    after: int
    seconds: float | None = None
    both: bool = False
    late: bool = False


@dataclass(frozen=True)
class Dribble:
    """Pass octets this way one by one, each in a segment of its own, the first `octets` of them."""

    way: Way
    octets: int
    pause_s: float = 0.0


Fault = Cut | HalfClose | Stall | Dribble
Plan = Callable[[int], Fault | None]
"""From the number of the connection, 0 for the first, to what happens to it."""


class FaultyProxy:
    """Listens on a port of 127.0.0.1 and connects each client on to the port that `target` says.

    Where `target` says 0, or nobody listens there, the client is reset, as by a machine without the service.
    `faults` counts those that came about, by name. `plan` may be changed while it runs.
    """

    def __init__(self, target: Callable[[], int], plan: Plan = lambda _: None) -> None:
        self.target = target
        self.plan = plan
        self.port = 0
        self.accepted = 0
        """Connections so far."""
        self.ports: dict[int, int] = {}
        """From the port from which a connection goes on to its number."""
        self.faults: Counter[str] = Counter()
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._pairs: set[asyncio.Task[None]] = set()
        self._failures: list[BaseException] = []

    async def __aenter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        self._accepting = asyncio.create_task(self._accept(self._listener))
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        assert self._accepting is not None
        assert self._listener is not None
        tasks = (self._accepting, *self._pairs)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        self._listener.close()
        if self._failures and kind is None:
            raise self._failures[0]

    async def idle(self) -> None:
        """Return once every connection is over."""
        while self._pairs:
            await asyncio.wait(self._pairs)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            near, _ = await loop.sock_accept(listener)
            near.setblocking(False)
            task = asyncio.create_task(self._serve(near, self.accepted, self.plan(self.accepted)))
            self.accepted += 1
            self._pairs.add(task)
            task.add_done_callback(self._served)

    def _served(self, task: asyncio.Task[None]) -> None:
        self._pairs.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failures.append(error)

    async def _serve(self, near: socket.socket, number: int, fault: Fault | None) -> None:
        with near:
            far = await self._connected()
            if far is None:
                _reset(near)
                return
            with far:
                self.ports[far.getsockname()[1]] = number
                await _Pair(near, far, fault, self.faults).run()

    async def _connected(self) -> socket.socket | None:
        port = self.target()
        if not port:
            return None
        far = socket.socket()
        far.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(far, ("127.0.0.1", port))
            # TCP's simultaneous open: on a port without listener a connection may meet itself.
            if far.getsockname() != far.getpeername():
                return far
        except OSError:
            pass
        except BaseException:
            far.close()
            raise
        far.close()
        return None


class _Pair:
    """Two connections, the octets between them, and what happens to these."""

    def __init__(
        self, near: socket.socket, far: socket.socket, fault: Fault | None, faults: Counter[str]
    ) -> None:
        self._ends = {UP: (near, far), DOWN: (far, near)}
        self._fault = fault
        self._faults = faults
        self._flows = {UP: asyncio.Event(), DOWN: asyncio.Event()}
        for flows in self._flows.values():
            flows.set()
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    async def run(self) -> None:
        """Carry octets until both ways are over, or the fault has ended the pair."""
        ways = [asyncio.create_task(self._carry(way)) for way in (UP, DOWN)]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for way in ways:
                way.cancel()
            ends = await asyncio.gather(*ways, return_exceptions=True)
        for end in ends:
            match end:
                case _StruckError(by="fin"):
                    await self._finish()
                    return
                case _StruckError() | OSError():  # where one side was reset the other is
                    self._reset()
                    return
                case Exception():
                    raise end

    async def _carry(self, way: Way) -> None:
        loop = asyncio.get_running_loop()
        source, sink = self._ends[way]
        fault = self._fault if self._fault is not None and self._fault.way == way else None
        passed = 0
        if isinstance(fault, Cut | HalfClose | Stall) and fault.after == 0 and not _late(fault):
            await self._strike(fault, sink)
            fault = None
        while octets := await loop.sock_recv(source, _BLOCK):
            await self._flows[way].wait()
            if isinstance(fault, Dribble):
                alone = max(0, fault.octets - passed)
                passed += len(octets)
                await self._dribble(sink, octets[:alone], fault)
                octets = octets[alone:]
            elif fault is not None and passed + len(octets) >= fault.after + _late(fault):
                await loop.sock_sendall(sink, octets[: fault.after - passed])
                octets, struck, fault = octets[fault.after - passed :], fault, None
                await self._strike(struck, sink)
            else:
                passed += len(octets)
            await self._flows[way].wait()
            await loop.sock_sendall(sink, octets)
        await self._flows[way].wait()
        sink.shutdown(socket.SHUT_WR)

    async def _dribble(self, sink: socket.socket, octets: bytes, fault: Dribble) -> None:
        loop = asyncio.get_running_loop()
        if octets:
            self._faults[f"dribble {fault.way}"] += 1
        for number in range(len(octets)):
            await loop.sock_sendall(sink, octets[number : number + 1])
            await asyncio.sleep(fault.pause_s)

    async def _strike(self, fault: Cut | HalfClose | Stall, sink: socket.socket) -> None:
        match fault:
            case Cut(way, _, by):
                self._faults[f"{by} {way}"] += 1
                raise _StruckError(by)
            case HalfClose(way):
                self._faults[f"half-close {way}"] += 1
                sink.shutdown(socket.SHUT_WR)
                await _swallow(self._ends[way][0])
            case Stall(way, _, seconds, both):
                self._faults[
                    f"stall {'both' if both else way}{'' if seconds is None else ', for a while'}"
                ] += 1
                flows = [self._flows[each] for each in ((UP, DOWN) if both else (way,))]
                for each in flows:
                    each.clear()
                if seconds is None:
                    await self._until_given_up()
                    raise _StruckError("rst")
                await asyncio.sleep(seconds)
                for each in flows:
                    each.set()

    async def _until_given_up(self) -> None:
        """Wait for either end to leave, octets unread or not."""
        loop = asyncio.get_running_loop()
        end = loop.time() + LONGEST_S
        while loop.time() < end and not any(map(_gone, self._ends[UP])):
            await asyncio.sleep(0.01)

    async def _finish(self) -> None:
        """Say FIN to both, and let them talk on into the void: a close with octets unread would be an RST."""
        for end in self._ends[UP]:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_WR)
        await asyncio.gather(*map(_swallow, self._ends[UP]))

    def _reset(self) -> None:
        for end in self._ends[UP]:
            _reset(end)


def _late(fault: Cut | HalfClose | Stall) -> bool:
    return not isinstance(fault, HalfClose) and fault.late


class _StruckError(Exception):
    """The fault ends the pair."""

    def __init__(self, by: str) -> None:
        super().__init__(by)
        self.by = by


async def _swallow(source: socket.socket) -> None:
    """Read what comes until it ends."""
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(LONGEST_S):
            while await asyncio.get_running_loop().sock_recv(source, _BLOCK):
                pass


def _reset(end: socket.socket) -> None:
    with contextlib.suppress(OSError):  # closed already
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.close()


def _gone(end: socket.socket) -> bool:
    """Whether the other side has closed or reset the connection (tcp(7), TCP_INFO: its first octet)."""
    try:
        state = end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    except OSError:
        return True
    return state != _ESTABLISHED


_ESTABLISHED = 1


def random_fault(dice: random.Random, share: float, *, longest_s: float, octets: int = 2000) -> Fault | None:
    """Return a fault for a `share` of connections, at most `octets` in; stalls up to `longest_s` seconds."""
    if dice.random() >= share:
        return None
    way: Way = dice.choice((UP, DOWN))
    after = dice.randrange(octets)
    return dice.choice(
        [
            Cut(way, after, "fin"),
            Cut(way, after, "rst"),
            HalfClose(way, after),
            Stall(way, after, dice.uniform(0.0, longest_s), both=dice.random() < 0.3),
            Stall(way, after, both=dice.random() < 0.3),
            Dribble(way, dice.randrange(1, 400), dice.choice((0.0, 0.0005))),
        ]
    )
