"""The faulty proxy: exactly the octets before a fault pass, and each fault looks as it is called."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.support.client import Client
from tests.support.faulty import DOWN, UP, Cut, Dribble, Fault, FaultyProxy, HalfClose, Stall, random_fault
from tests.support.wire import GoneError, Wire

SAID = bytes(range(97, 97 + 20))


class Listener:
    """The other end: it keeps its connections, and says nothing by itself."""

    def __init__(self) -> None:
        self.wires: list[Wire] = []
        self.others: list[Wire] = []
        """Who connects, through a proxy."""
        self.arrived = asyncio.Event()
        self.port = 0

    def started(self, wire: Wire) -> None:
        self.wires.append(wire)
        self.arrived.set()


@pytest.fixture
async def listener() -> AsyncIterator[Listener]:
    found = Listener()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Wire(found.started), "127.0.0.1", 0)
    found.port = server.sockets[0].getsockname()[1]
    yield found
    server.close()
    for wire in (*found.wires, *found.others):
        wire.abort()
        await wire.ended()


async def everything(wire: Wire) -> bytes:
    """Return all that comes before the other side ends."""
    said = b""
    while True:
        try:
            said += await wire.octets()
        except GoneError:
            return said


async def exactly(wire: Wire, count: int) -> bytes:
    said = b""
    while len(said) < count:
        said += await wire.octets()
    return said


async def pair(proxy: FaultyProxy, listener: Listener) -> tuple[Wire, Wire]:
    """Connect, and return both ends."""
    listener.arrived.clear()
    near = Wire()
    listener.others.append(near)
    await asyncio.get_running_loop().create_connection(lambda: near, "127.0.0.1", proxy.port)
    await listener.arrived.wait()
    return near, listener.wires[-1]


@pytest.mark.parametrize("way", [UP, DOWN])
@pytest.mark.parametrize("after", [0, 1, 7, len(SAID) - 1])
@pytest.mark.parametrize("by", ["fin", "rst"])
async def test_a_cut(by: Any, after: int, way: Any, listener: Listener) -> None:
    async with FaultyProxy(lambda: listener.port, lambda _: Cut(way, after, by)) as proxy:
        near, far = await pair(proxy, listener)
        source, sink = (near, far) if way == UP else (far, near)
        if after:
            source.send(SAID[:after])  # in a segment of its own: an RST may overtake what is not read yet
            if after > 1 or by == "fin":
                await asyncio.sleep(0)
        source.send(SAID[after:])
        heard = await everything(sink)
        assert heard == SAID[:after] if by == "fin" else SAID.startswith(heard)
        assert await everything(source) == b""
        assert (sink.eof, sink.lost) == ((True, False) if by == "fin" else (False, True))
        near.abort()
        far.abort()
        await proxy.idle()
        assert proxy.faults == {f"{by} {way}": 1}


async def test_a_half_close_leaves_the_other_way(listener: Listener) -> None:
    async with FaultyProxy(lambda: listener.port, lambda _: HalfClose(UP, 3)) as proxy:
        near, far = await pair(proxy, listener)
        near.send(SAID)
        assert await everything(far) == SAID[:3]
        far.send(b"still here")
        assert await exactly(near, 10) == b"still here"
        far.close()
        assert await everything(near) == b""


async def test_a_stall_of_one_way_leaves_the_other(listener: Listener) -> None:
    async with FaultyProxy(lambda: listener.port, lambda _: Stall(UP, 3)) as proxy:
        near, far = await pair(proxy, listener)
        near.send(SAID)
        assert await exactly(far, 3) == SAID[:3]
        far.send(b"hello?")
        assert await exactly(near, 6) == b"hello?"
        assert far.waiting == b""
        far.close()  # it gives up; the one who stalls hears of it
        assert await everything(near) == b""
        await proxy.idle()


async def test_a_stall_for_a_while_loses_nothing(listener: Listener) -> None:
    async with FaultyProxy(lambda: listener.port, lambda _: Stall(DOWN, 3, 0.05, both=True)) as proxy:
        near, far = await pair(proxy, listener)
        far.send(SAID)
        assert await exactly(near, len(SAID)) == SAID
        near.send(SAID)
        assert await exactly(far, len(SAID)) == SAID


async def test_a_dribble_comes_octet_by_octet(listener: Listener) -> None:
    async with FaultyProxy(lambda: listener.port, lambda _: Dribble(UP, 5, 0.005)) as proxy:
        near, far = await pair(proxy, listener)
        near.send(SAID)
        assert await exactly(far, len(SAID)) == SAID
        assert far.reads > 3
        near.send(SAID)
        assert await exactly(far, len(SAID)) == SAID


@pytest.mark.parametrize("somewhere", [True, False])
async def test_nobody_there(somewhere: bool, listener: Listener) -> None:
    ports = []
    if somewhere:
        server = await asyncio.get_running_loop().create_server(Wire, "127.0.0.1", 0)
        ports.append(server.sockets[0].getsockname()[1])
        server.close()
    async with FaultyProxy(lambda: ports[0] if ports else 0) as proxy, Client(proxy.port) as client:
        assert await client.expect_closed() == b""
        assert listener.wires == []


async def test_the_same_seed_the_same_faults() -> None:
    def faults(seed: int) -> list[Fault | None]:
        dice = random.Random(seed)
        return [random_fault(dice, 0.5, longest_s=1.0) for _ in range(200)]

    assert faults(1) == faults(1)
    assert len({type(fault) for fault in faults(1)}) == 5
