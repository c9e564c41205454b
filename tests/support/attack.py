"""Attack vectors: what the file `tests/vectors/vectors.json` says, done to a relay, and what came of it.

Rules: the steps are carried out octet for octet, by a client that knows no manners; only a client whose
MAIL, RCPT or DATA was refused by the upstream stops there, since the vectors of that category attack from
the other side. Nothing here judges: `Attack` keeps what was said and seen, `test_vectors` compares.
A "sleep" is not a wait for a time: it lets the relay come to rest, so that no test depends on how fast a
machine is.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import ssl
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relay.session.dialogue import State
from relay.session.session import Session

from .client import Client, Reply
from .script import Action, Delay, HalfReply, Silence, StopReading
from .watch import eventually
from .wire import GoneError

if TYPE_CHECKING:
    from tests.conftest import Running

    from .upstream import ScriptedUpstream

__all__ = ["Attack", "Traffic", "Vector", "octets", "vectors"]

HASTE = 20
"""How much faster than written a client drips; the limits that it meets are shortened likewise."""
ROUNDS = 6
STEP_S = 0.002
"""The relay is at rest when nothing has changed for so many looks, so many seconds apart."""
STAGES: dict[str, bytes] = {
    "ehlo": b"EHLO client.test\r\n",
    "mail": b"MAIL FROM:<sender@local.test>\r\n",
    "rcpt": b"RCPT TO:<rcpt@local.test>\r\n",
    "data": b"DATA\r\n",
}
"""What a setup says, in this order, after the greeting."""

Cut = Callable[[bytes], Sequence[bytes]]


def octets(escaped: str) -> bytes:
    """Return the octets that the file writes in Python's escapes."""
    return escaped.encode("ascii").decode("unicode_escape").encode("latin-1")


@dataclass(frozen=True)
class Vector:
    """One attack, as the file has it."""

    id: str
    category: str
    profile: str
    setup: str
    steps: list[dict[str, Any]]
    expect: dict[str, Any]
    upstream: dict[str, Any]
    requires: tuple[str, ...]
    segmentations: tuple[str, ...]

    @property
    def text(self) -> bytes:
        """All octets of its `send` and `repeat` steps."""
        parts = (
            octets(step["send"]) if "send" in step else _repeated(step["repeat"])
            for step in self.steps
            if "send" in step or "repeat" in step
        )
        return b"".join(parts)

    @property
    def macros(self) -> set[str]:
        """The kinds of its steps."""
        return {kind for step in self.steps for kind in step}


def vectors() -> list[Vector]:
    """Return the vectors of the file, in its order."""
    document = json.loads((Path(__file__).parent.parent / "vectors" / "vectors.json").read_text())
    return [
        Vector(
            id=entry["id"],
            category=entry["category"],
            profile=entry["profile"],
            setup=entry["setup"],
            steps=entry["steps"],
            expect=entry["expect"],
            upstream=entry.get("upstream", {}),
            requires=tuple(entry.get("requires", ())),
            segmentations=tuple(entry.get("segmentations", ())),
        )
        for entry in document["vectors"]
    ]


class Traffic:
    """What the relay's sessions read and wrote, for attacks that depend on how TCP cuts the octets."""

    def __init__(self) -> None:
        self.blocks: list[bytes] = []
        """What was read, read by read, and of long reads the beginning: tests are about memory, too."""
        self.read = 0
        self.written = 0
        self._data_received = Session.data_received
        self._write = Session.write

    def data_received(self, session: Session, data: bytes) -> None:
        """Note a read and pass it on; stands in for Session.data_received."""
        self.blocks.append(data[:4096])
        self.read += len(data)
        self._data_received(session, data)

    def write(self, session: Session, data: bytes) -> None:
        """Note what is written and pass it on; stands in for Session.write."""
        self.written += len(data)
        self._write(session, data)


class Attack:
    """One run of a vector against a relay, with a client of its own."""

    def __init__(
        self,
        vector: Vector,
        running: Running,
        upstream: ScriptedUpstream,
        traffic: Traffic,
        cut: Cut | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`cut` says in which segments a `send` goes out; by default in one. `tls`: the client's context."""
        self.vector = vector
        self.client: Client
        self.replies: list[Reply] = []
        """The replies after the setup; those of a setup that was refused are among them."""
        self.acceptances = 0
        """How many 2yz replies to an end of data the client has seen."""
        self.commands: list[bytes] = []
        """All that was sent, setup included, in the order of the writes."""
        self.reached = True
        """Whether the setup got as far as the vector wants."""
        self.closed = False
        """Whether the relay has closed."""
        self._running = running
        self._upstream = upstream
        self._traffic = traffic
        self._before = traffic.read, traffic.written
        self._sent = 0
        self._deaf = False
        self._cut = cut
        self._tls = tls
        self._awaits_verdict = False
        self._held = asyncio.Event()

    # The upstream's part

    def script(self) -> dict[str, Action]:
        """Return what the upstream is to do, and set what is no script (its greeting)."""
        said = self.vector.upstream
        script: dict[str, Any] = {
            stage: octets(said[stage])
            for stage in ("EHLO", "STARTTLS", "MAIL", "RCPT", "DATA")
            if stage in said
        }
        if "BANNER" in said:
            script["greeting"] = octets(said["BANNER"])
        if "EOD" in said:
            script["end_of_data"] = octets(said["EOD"])
        if said.get("EOD_CLOSE"):
            script["end_of_data"] = HalfReply(octets(said["EOD"]))
        if said.get("EOD_STALL"):
            script["end_of_data"] = Silence()
        if "EOD_DELAY" in said:
            script["end_of_data"] = Delay(self._held)
        if "READ_STALL" in said:
            script["body"] = StopReading()
        if "RCPT_BAD" in said:
            refusal = octets(said.get("RCPT_BAD_REPLY", "550 5.1.1 no such user\\r\\n"))
            script["RCPT"] = {said["RCPT_BAD"]: refusal}
        unknown = said.keys() - {
            *("EHLO", "STARTTLS", "MAIL", "RCPT", "DATA", "BANNER", "EOD", "EOD_CLOSE", "EOD_STALL"),
            *("EOD_DELAY", "READ_STALL", "RCPT_BAD", "RCPT_BAD_REPLY", "IDLE_421"),
        }
        assert not unknown, unknown
        return script

    # The client's part

    async def run(self, client: Client, *, setup: str | None = None) -> None:
        """Carry the steps out, then take what the relay still says."""
        await self.carry_out(client, setup=setup)
        await self.rest()
        await self._take_waiting()

    async def carry_out(self, client: Client, *, setup: str | None = None) -> None:
        """Carry the steps out, and no more."""
        self.client = client
        await self._set_up(setup or self.vector.setup)
        if self.reached or self.vector.category != "upstream":
            for step in self.vector.steps:
                ((kind, value),) = step.items()
                await getattr(self, f"_{kind}")(value)

    async def rest(self) -> None:
        """Return once the relay has nothing more to do with what it was sent."""
        still, before = 0, None
        async with asyncio.timeout(10):
            while still < ROUNDS:
                now = self._state()
                still = still + 1 if now == before and not self._busy() else 0
                before = now
                await asyncio.sleep(STEP_S)

    async def _set_up(self, setup: str) -> None:
        if setup == "raw":
            return
        if setup.startswith("smtps_"):
            await self._secure(self._tls)
        await self.client.greeting()
        if setup == "connected":
            return
        if setup.startswith("tls_"):
            await self._write(STAGES["ehlo"])
            await self.client.expect(250)
            assert await self._starttls(self._tls)
        setup = setup.rpartition("_")[2]
        for stage, line in STAGES.items():
            await self._write(line)
            reply = await self.client.reply()
            if reply.code >= 400:
                self._note(reply)
                self.reached = False
                if self.vector.category == "upstream":
                    return
            self._awaits_verdict = reply.code == 354
            if stage == setup:
                return
        raise ValueError(f"no such setup: {setup}")

    async def _send(self, text: str) -> None:
        block = octets(text)
        if self._cut is None:
            await self._write(block)
            return
        for piece in self._cut(block):
            await self._write(piece)
            async with asyncio.timeout(10):  # each piece is a read of its own
                while not (self._has_been_read() or self._over()):
                    await asyncio.sleep(0)

    async def _repeat(self, repeat: dict[str, Any]) -> None:
        block = octets(repeat["bytes"])
        batch = max(1, 65536 // len(block))
        many = block * batch  # once: what is sent is kept, and not what a test of memory is about
        for done in range(0, repeat["count"], batch):
            await self._write(many if repeat["count"] - done >= batch else block * (repeat["count"] - done))

    async def _rcpts(self, count: int) -> None:
        await self._write(b"".join(b"RCPT TO:<u%d@local.test>\r\n" % number for number in range(count)))
        for _ in range(count):
            await self._recv(True)

    async def _recv(self, _: bool) -> None:
        try:
            self._note(await self.client.reply())
        except ConnectionError:
            self.closed = True

    async def _sleep(self, _: float) -> None:
        if "EOD_DELAY" in self.vector.upstream:
            await self._upstream.message()
            return
        if "READ_STALL" in self.vector.upstream:
            for connection in self._upstream.connections:
                if connection.open:
                    connection.wire.resume()
        await self.rest()
        await self._take_waiting()

    # Steps around TLS

    async def _starttls(self, context: ssl.SSLContext | None, behind: bytes = b"") -> bool:
        """Say STARTTLS, `behind` in the same segment, and run the handshake; whether TLS is on.

        The reply to STARTTLS is no answer to a step: it belongs to the handshake.
        """
        await self._write(b"STARTTLS\r\n" + behind)
        try:
            reply = await self.client.reply()
        except ConnectionError:
            self.closed = True
            return False
        return reply.code == 220 and await self._secure(context)

    async def _secure(self, context: ssl.SSLContext | None) -> bool:
        """Run the client's half of the handshake; whether TLS is on, else the connection is over."""
        assert context is not None, "the relay has no TLS for this vector"
        try:
            await self.client.wire.secure(context, server_name="localhost")
        except (GoneError, OSError):  # ssl.SSLError is one
            self.closed = True
            if not self.client.wire.lost:
                self.client.wire.connection_lost(None)  # asyncio does not say so where TLS never began
            return False
        return True

    async def _starttls_inject(self, text: str) -> None:
        await self._starttls(self._tls, octets(text))

    async def _starttls_version(self, version: str) -> None:
        """Offer no version above this one: TLS must not begin, and nothing goes on in clear."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_ciphers("DEFAULT:@SECLEVEL=0")  # else the client's own library would refuse
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version = context.maximum_version = ssl.TLSVersion[version.replace(".", "_")]
        assert not await self._starttls(context)

    async def _tls_close_notify_then_plain(self, text: str) -> None:
        """End TLS from our side, and go on in clear on the same connection."""
        transport: Any = self.client.wire._up
        protocol, peer = transport._ssl_protocol, transport.get_extra_info("socket")
        with contextlib.suppress(ssl.SSLWantReadError):  # the other side's close_notify is not waited for
            protocol._sslobj.unwrap()
        os.write(peer.fileno(), protocol._outgoing.read() + octets(text))

    async def _proxy_then_starttls(self, address: str) -> None:
        """Come from `address` by a PROXY header, begin TLS, and send a message."""
        await self._write(b"PROXY TCP4 %b 127.0.0.1 40000 25\r\n" % address.encode())
        await self.client.greeting()
        await self._write(STAGES["ehlo"])
        await self.client.expect(250)
        assert await self._starttls(self._tls)
        for line in (*STAGES.values(), b"Subject: x\r\n\r\nx\r\n.\r\n"):
            await self._write(line)
            await self._recv(True)

    async def _eof(self, _: bool) -> None:
        self.client.half_close()

    async def _rst(self, _: bool) -> None:
        self.client.reset()
        await eventually(lambda: repr(self._running.relay.reception).startswith("<Reception: 0 sessions"))
        self._held.set()

    async def _drip(self, drip: dict[str, Any]) -> None:
        for octet in octets(drip["bytes"]):
            if self._over():
                return
            await self._write(bytes((octet,)))
            await asyncio.sleep(drip["interval"] / HASTE)

    async def _noread(self, flood: dict[str, Any]) -> None:
        self._deaf = True
        self.client.wire.pause()
        self.client.send_unread(octets(flood["bytes"]) * flood["count"])
        await eventually(lambda: repr(self._running.relay.reception).startswith("<Reception: 0 sessions"))

    async def _write(self, block: bytes) -> None:
        self.commands.append(block)
        self._sent += len(block)
        await self.client.send(block)

    async def _take_waiting(self) -> None:
        while b"\n" in self.client.wire.waiting:
            self._note(await self.client.reply())
        assert self.client.wire.waiting == b"", "half a reply"
        self.closed = self.closed or self._over()

    def _note(self, reply: Reply) -> None:
        self.replies.append(reply)
        if self._awaits_verdict and reply.code < 300:
            self.acceptances += 1
        self._awaits_verdict = reply.code == 354

    def _state(self) -> object:
        seen = [len(connection.transcript) for connection in self._upstream.connections]
        bodies = [
            message.size for connection in self._upstream.connections for message in connection.messages
        ]
        return seen, bodies, self._traffic.read, self._traffic.written

    def _busy(self) -> bool:
        """Whether octets are on their way between client and relay, or the relay owes replies."""
        wire = self.client.wire
        arrived = wire._taken + len(wire.waiting) == self._traffic.written - self._before[1]
        if not self._over() and not (self._has_been_read() and arrived):
            return True
        dialogues = [session._dialogue for session in self._running.relay.reception._sessions]
        return any(
            dialogue._replies.owed or dialogue._slowed or dialogue._state is State.DECIDING
            for dialogue in dialogues
            if dialogue is not None
        )

    def _has_been_read(self) -> bool:
        return self._traffic.read - self._before[0] >= self._sent

    def _over(self) -> bool:
        """Whether nothing more can come: the relay has closed, or the client does not listen."""
        return self.client.wire.eof or self.client.wire.lost or self._deaf


def one_by_one(block: bytes) -> Iterator[bytes]:
    """Cut a block into its octets."""
    return (block[at : at + 1] for at in range(len(block)))


def _repeated(repeat: dict[str, Any]) -> bytes:
    return octets(repeat["bytes"]) * int(repeat["count"])
