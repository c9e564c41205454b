"""The pool under any order of events: the bound holds, no permit is lost, nothing that failed is used again.

Nobody is given a connection of another identity, and whose turn it is gets what comes: who holds least, in
order among equals. Leases are asked for by clients with and without credentials, given up while they wait,
given back clean or in the middle of a transaction; dials succeed, fail, are refused, or turned away; the
upstream closes, says 421 or talks out of turn on any connection, idle or not; time passes. The upstream is in
memory: it answers RSET and QUIT and does else what the machine decides.
"""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from relay.credentials import Credentials, Password
from relay.metrics import Metrics
from relay.reply import Reply
from relay.settings import UpstreamSettings
from relay.upstream import breaker, health
from relay.upstream.allowance import PAUSE
from relay.upstream.capabilities import Capabilities
from relay.upstream.connection import Connection, Failure
from relay.upstream.dial import UNREACHABLE, Dialed, DialError
from relay.upstream.pool import Pool, UnavailableError
from relay.upstream.shares import Waiter

MAX_CONNECTIONS = 3
MAX_ASKED = 8
LEASE_WAIT_S = 3600.0
CLIENTS = "abc"
LOGINS = [None, Password("x", "1"), Password("x", "2"), Password("y", "1")]
REFUSED = Reply.own(535, "7.8", "wrong")
CAPABILITIES = Capabilities(frozenset({"PIPELINING"}))


class MemoryTransport(asyncio.Transport):
    """The upstream's end of one connection."""

    def __init__(self, loop: asyncio.AbstractEventLoop, credentials: Credentials | None) -> None:
        super().__init__()
        self.credentials = credentials
        self._loop = loop
        self._protocol: Any = None
        self.over = False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Nothing waits here: it is told when to pause."""
        del high, low

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol

    def resume_reading(self) -> None:
        """It is never paused."""

    def is_closing(self) -> bool:
        return self.over

    def write(self, data: Any) -> None:
        if data == b"RSET\r\n":
            self._loop.call_soon(self.say, b"250 2.0.0 reset\r\n")
        elif data == b"QUIT\r\n":
            self._loop.call_soon(self.say, b"221 2.0.0 bye\r\n")

    def say(self, octets: bytes) -> None:
        if not self.over:
            self._protocol.data_received(octets)

    def close(self) -> None:
        if not self.over:
            self.over = True
            self._loop.call_soon(self._protocol.connection_lost, None)

    abort = close


class MachineDialer:
    """Dials end when the machine says so, and as it says."""

    def __init__(self) -> None:
        self.pending: list[asyncio.Future[str]] = []
        self.transports: list[MemoryTransport] = []
        self.failed: set[object] = set()
        """The tasks whose dials have failed, until they wait again."""

    @property
    def open(self) -> list[MemoryTransport]:
        return [transport for transport in self.transports if not transport.over]

    async def dial(self, credentials: Credentials | None = None) -> Dialed:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[str] = loop.create_future()
        self.pending.append(answer)
        self.failed.discard(asyncio.current_task())
        end = "cancelled"
        try:
            end = await answer
        finally:
            self.pending.remove(answer)
            if end != "succeeds":
                self.failed.add(asyncio.current_task())
        if end == "is refused" and credentials is not None:
            raise DialError("auth", "refused", REFUSED, verdict=True)
        if end == "is turned away":
            raise DialError("greeting", "421 too many", UNREACHABLE, turned_away=True)
        if end != "succeeds":
            raise DialError("unreachable", "refused", UNREACHABLE)
        self.transports.append(MemoryTransport(loop, credentials))
        return Dialed(self.transports[-1], CAPABILITIES, REFUSED)


class Holder:
    """Who has a connection on lease."""

    def __init__(self, connection: Connection, client: str) -> None:
        self.connection = connection
        self.client = client
        connection.lessee = self
        connection.transactions += 1

    def connection_failed(self, failure: Failure) -> None:
        """It notices when it gives the lease back."""

    def pause_content(self) -> None:
        """It sends none."""

    def resume_content(self) -> None:
        """It sends none."""

    def burst(self, begins: bool) -> None:
        """It holds no replies."""


class PoolMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        # It has tests of its own: here a dial that fails is followed by the next, and each is somebody's.
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(breaker, "THRESHOLD", 1 << 30)
        self.patch.setattr(health, "AGAIN_S", math.inf)
        self.dialer = MachineDialer()
        upstream = UpstreamSettings.model_validate(
            {
                "name": "primary",
                "address": "127.0.0.1:25",
                "tls": "none",
                "max_connections": MAX_CONNECTIONS,
                "max_messages": 4,
                "lease_wait_timeout": f"{LEASE_WAIT_S:g}s",
            }
        )
        metrics = Metrics(upstreams=["primary"], listeners=[], task_types=[])

        async def made() -> Pool:
            return Pool(upstream, self.dialer, metrics.upstreams["primary"])  # type: ignore[arg-type]

        self.pool = self.loop.run_until_complete(made())
        self.asked: list[asyncio.Task[Connection]] = []
        self.who: dict[object, tuple[str, Credentials | None]] = {}
        """By task: the client that asks, and its credentials."""
        self.grant = self.pool._grant
        self.pool._grant = self.granted  # type: ignore[method-assign]
        self.wait = self.pool._shares.wait
        self.pool._shares.wait = self.waits  # type: ignore[method-assign]
        self.handed: list[tuple[str, Connection]] = []
        """To whom a connection was given whose task has not gone on yet."""
        self.holders: list[Holder] = []
        self.failed: set[int] = set()

    def waits(self, waiter: Waiter) -> None:
        self.dialer.failed.discard(asyncio.current_task())
        self.wait(waiter)

    def granted(self, waiter: Waiter, connection: Connection | None) -> None:
        """Look whether it was the turn of who is given something, by the machine's own count."""
        queue = [each for waiting in self.pool._shares._waiters.values() for each in waiting.values()]
        held = {
            client: sum(each.client == client and each.connection.usable for each in self.holders)
            + sum(
                self.who[task][0] == client and task not in self.dialer.failed and not task.cancelling()
                for task in self.asked
            )
            - sum(each.client == client and not each.granted.cancelled() for each in queue)
            # What died on the way to its task is no lease, and the task does not know yet.
            - sum(who == client and not handed.usable for who, handed in self.handed)
            for client in CLIENTS
        }
        rivals = [
            each
            for each in queue
            if not each.granted.done()
            and (connection is None or (not each.fresh and each.identity == connection.identity))
        ]
        assert waiter is min(rivals, key=lambda each: (held[each.client], each.number)), "not its turn"
        if connection is not None:
            handed = waiter.client, connection
            self.handed.append(handed)
            # Behind its task, which has waited for longer.
            waiter.granted.add_done_callback(lambda _: self.handed.remove(handed))
        self.grant(waiter, connection)

    def run(self, act: Any = None) -> None:
        """Do something in the loop, then let everything that follows from it happen."""

        async def steps() -> None:
            if act is not None:
                act()
            for _ in range(12):
                await asyncio.sleep(0)

        self.loop.run_until_complete(steps())
        self.collect()

    def collect(self) -> None:
        """Take up the leases that have been granted."""
        for task in [task for task in self.asked if task.done()]:
            self.asked.remove(task)
            client, credentials = self.who.pop(task)
            if task.cancelled():
                continue
            if isinstance(task.exception(), UnavailableError):
                continue
            connection = task.result()
            assert connection.usable, "a lease on a connection that is gone"
            assert connection.lessee is None, "a lease on a connection that somebody has"
            assert id(connection) not in self.failed, "a lease on a connection that was not clean"
            transport: Any = connection._transport
            assert transport.credentials == credentials, "a connection of another identity"
            self.holders.append(Holder(connection, client))

    def begin(self, client: str, credentials: Credentials | None, *, fresh: bool) -> None:
        def act() -> None:
            task = self.loop.create_task(self.pool.acquire(client, credentials, fresh=fresh))
            self.who[task] = client, credentials
            self.asked.append(task)

        self.run(act)

    @precondition(lambda self: len(self.asked) + len(self.holders) < MAX_ASKED)
    @rule(client=st.sampled_from(CLIENTS), credentials=st.sampled_from(LOGINS), fresh=st.booleans())
    def ask(self, client: str, credentials: Credentials | None, fresh: bool) -> None:
        self.begin(client, credentials, fresh=fresh)

    @precondition(lambda self: len(self.asked) + len(self.holders) < MAX_ASKED)
    @rule(client=st.sampled_from(CLIENTS), credentials=st.sampled_from(LOGINS))
    def take(self, client: str, credentials: Credentials | None) -> None:
        async def act() -> Connection | None:
            return self.pool.take(client, credentials)

        connection = self.loop.run_until_complete(act())
        if connection is not None:
            transport: Any = connection._transport
            assert transport.credentials == credentials, "a connection of another identity"
            assert id(connection) not in self.failed
            self.holders.append(Holder(connection, client))
        self.run()

    @precondition(lambda self: self.pool.avoided)
    @rule()
    def the_upstream_is_back(self) -> None:
        """Three failed dials in a row open the breaker, and nobody is given a connection while it is open."""
        self.pool._health._breaker.connected()

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def stop_waiting(self, data: st.DataObject) -> None:
        task = data.draw(st.sampled_from(self.asked))
        self.run(task.cancel)

    @precondition(lambda self: self.asked and self.holders)
    @rule(data=st.data())
    def stop_waiting_as_a_connection_comes(self, data: st.DataObject) -> None:
        task = data.draw(st.sampled_from(self.asked))
        holder = self.holders.pop()

        def act() -> None:
            self.pool.release(holder.connection, reset=False)
            task.cancel()

        self.run(act)

    @precondition(lambda self: self.dialer.pending)
    @rule(how=st.sampled_from(["succeeds", "succeeds", "fails", "is refused", "is turned away"]))
    def dial_ends(self, how: str) -> None:
        self.run(lambda: self.dialer.pending[0].set_result(how))

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), reset=st.booleans())
    def give_back(self, data: st.DataObject, reset: bool) -> None:
        holder = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        self.run(lambda: self.pool.release(holder.connection, reset=reset))

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def give_back_as_it_dies(self, data: st.DataObject) -> None:
        holder = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        self.failed.add(id(holder.connection))

        def act() -> None:
            self.pool.release(holder.connection, reset=False)
            holder.connection.eof_received()

        self.run(act)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def give_up_in_the_middle(self, data: st.DataObject) -> None:
        self._give_up(self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1))))

    def _give_up(self, holder: Holder) -> None:
        self.failed.add(id(holder.connection))

        def act() -> None:
            holder.connection.lessee = None
            holder.connection.abort("content unfinished")

        self.run(act)

    @precondition(lambda self: self.dialer.open)
    @rule(
        data=st.data(), how=st.sampled_from([b"", b"421 4.3.2 bye\r\n", b"what is this\r\n", b"250 ok\r\n"])
    )
    def the_upstream_fails(self, data: st.DataObject, how: bytes) -> None:
        transport = data.draw(st.sampled_from(self.dialer.open))
        self.failed.add(id(transport._protocol))
        self.run(lambda: transport.say(how) if how else transport._protocol.eof_received())

    @rule(seconds=st.sampled_from([1.0, 11.0, 61.0, 301.0]))
    def time_passes(self, seconds: float) -> None:
        self.run(lambda: self.pool.sweep(self.loop.time() + seconds))

    @invariant()
    def the_bound_holds(self) -> None:
        assert len(self.dialer.open) + len(self.dialer.pending) <= MAX_CONNECTIONS
        assert self.pool._used == len(self.dialer.open) + len(self.dialer.pending), "a permit lost or made up"

    @invariant()
    def nobody_waits_without_need(self) -> None:
        waiting = len(self.asked) - len(self.dialer.pending)
        if waiting:
            in_use = [holder for holder in self.holders if holder.connection.usable]
            assert not self.pool._allowance.room(len(in_use) + len(self.dialer.pending))
            assert in_use or self.dialer.pending, "there is nothing to wait for"

    def teardown(self) -> None:
        """Whatever has happened: all who wait are served, all connections can be had again, and all go."""
        try:
            self._end()
        finally:
            self.patch.undo()

    def _end(self) -> None:
        for _ in range(10 * MAX_ASKED):
            if self.dialer.pending:
                self.dial_ends("succeeds")
            elif self.holders:
                self.give_back_last()
        assert not self.asked, "somebody waits for ever"
        self.the_upstream_is_back()
        self.time_passes(PAUSE)
        for client in CLIENTS[:MAX_CONNECTIONS]:
            self.begin(client, None, fresh=False)
            if self.dialer.pending:
                self.dial_ends("succeeds")
        assert len(self.holders) == MAX_CONNECTIONS
        while self.holders:
            self.give_back_last()
        self.loop.run_until_complete(self.pool.close())
        assert repr(self.pool) == "<Pool primary: 0 active, 0 idle, 0 connecting, 0 waiting>"
        assert repr(self.pool._shares) == "<Shares: 0 leases, 0 waiting>"
        assert self.pool._idle._by_identity.keys() <= {None}, "something is kept of an identity"
        assert self.dialer.open == []
        self.loop.close()

    def fill(self) -> None:
        """Have one client hold as many connections as there may be."""
        for _ in range(MAX_CONNECTIONS):
            self.begin("a", None, fresh=False)
            self.dial_ends("succeeds")

    def give_up_last(self) -> None:
        self._give_up(self.holders.pop())

    def give_back_last(self) -> None:
        holder = self.holders.pop()
        self.run(lambda: self.pool.release(holder.connection, reset=False))


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_who_is_turned_away_goes_before_who_came_later() -> None:
    machine = PoolMachine()
    machine.begin("a", None, fresh=False)
    machine.dial_ends("succeeds")
    machine.begin("b", None, fresh=False)
    machine.begin("b", None, fresh=False)
    first, second = machine.asked
    machine.run(lambda: machine.dialer.pending[1].set_result("is turned away"))
    assert "1 connecting, 1 waiting" in repr(machine.pool)
    machine.dial_ends("is turned away")
    assert "0 connecting, 2 waiting" in repr(machine.pool)
    machine.begin("b", None, fresh=False)
    for served in (first, second):
        machine.give_back_last()
        assert served.done()
        assert len(machine.dialer.open) == 1
    machine.teardown()


def test_who_is_turned_away_waits_no_longer_in_all_than_others() -> None:
    """The attempt itself is no wait for a connection, however long it takes."""
    machine = PoolMachine()
    clock, later = machine.loop.time, 0.0
    machine.loop.time = lambda: clock() + later  # type: ignore[method-assign]
    machine.fill()
    machine.begin("b", None, fresh=False)
    later = LEASE_WAIT_S - 60.0
    machine.give_up_last()
    assert "2 active, 0 idle, 1 connecting, 0 waiting" in repr(machine.pool)
    attempt = 30.0
    later += attempt
    machine.dial_ends("is turned away")
    later = LEASE_WAIT_S + attempt - 25.0
    machine.run()
    assert len(machine.asked) == 1
    later = LEASE_WAIT_S + attempt + 25.0
    machine.run()
    assert machine.asked == []
    machine.teardown()


def test_no_more_connections_make_room_than_are_waited_for() -> None:
    machine = PoolMachine()
    machine.fill()
    machine.begin("b", LOGINS[1], fresh=False)
    back = [machine.holders.pop().connection for _ in range(2)]

    def act() -> None:
        for connection in back:
            machine.pool.release(connection, reset=False)

    machine.run(act)
    assert repr(machine.pool) == "<Pool primary: 1 active, 1 idle, 1 connecting, 0 waiting>"
    machine.dial_ends("succeeds")
    machine.teardown()


def test_an_idle_connection_that_makes_room_is_enough_for_one_who_waits() -> None:
    machine = PoolMachine()
    for end in ("succeeds", "succeeds", "is turned away"):
        machine.begin("a", None, fresh=False)
        machine.dial_ends(end)
    (turned_away,) = machine.asked
    machine.run(turned_away.cancel)
    machine.give_back_last()
    last = machine.holders.pop().connection

    def act() -> None:
        machine.asked.append(machine.loop.create_task(machine.pool.acquire("b", LOGINS[1])))
        machine.who[machine.asked[-1]] = "b", LOGINS[1]
        machine.loop.call_soon(lambda: machine.pool.release(last, reset=False))

    machine.run(act)
    assert repr(machine.pool) == "<Pool primary: 0 active, 1 idle, 1 connecting, 0 waiting>"
    machine.dial_ends("succeeds")
    machine.teardown()


def test_an_attempt_that_finds_no_room_is_made_again() -> None:
    machine = PoolMachine()
    clock, later = machine.loop.time, 0.0
    machine.loop.time = lambda: clock() + later  # type: ignore[method-assign]
    machine.fill()
    shut = machine.pool._health._breaker
    shut._pause(machine.loop.time())
    machine.time_passes(PAUSE)
    assert "half-open" in repr(shut)
    later = LEASE_WAIT_S + 1.0
    machine.run()
    assert "Breaker open" in repr(shut)
    machine.give_back_last()
    machine.time_passes(PAUSE)
    machine.dial_ends("succeeds")
    assert "closed" in repr(shut)
    machine.teardown()


def test_a_connection_that_dies_as_it_is_handed_on_is_not_leased() -> None:
    machine = PoolMachine()
    for _ in range(MAX_CONNECTIONS + 1):
        machine.begin("a", None, fresh=False)
    for _ in range(MAX_CONNECTIONS):
        machine.dial_ends("succeeds")
    assert "1 waiting" in repr(machine.pool)
    dying = machine.holders.pop().connection

    def act() -> None:
        machine.pool.release(dying, reset=False)
        dying.eof_received()

    machine.run(act)
    assert len(machine.dialer.pending) == 1, "who waited has the permit now, and opens a new one"
    machine.dial_ends("succeeds")
    assert len(machine.holders) == MAX_CONNECTIONS
    machine.teardown()


@pytest.mark.parametrize("permit", [False, True])
def test_what_comes_to_one_that_stops_waiting_goes_to_the_next(permit: bool) -> None:
    machine = PoolMachine()
    for _ in range(MAX_CONNECTIONS + 2):
        machine.begin("a", None, fresh=False)
    for _ in range(MAX_CONNECTIONS):
        machine.dial_ends("succeeds")
    first, second = machine.asked
    coming = machine.holders.pop().connection

    def act() -> None:
        if permit:
            coming.lessee = None
            coming.abort("content unfinished")
            machine.loop.call_soon(first.cancel)  # behind the end of the connection
        else:
            machine.pool.release(coming, reset=False)
            first.cancel()

    machine.run(act)
    assert first.cancelled()
    if permit:
        machine.dial_ends("succeeds")
    assert second.done()
    machine.teardown()
