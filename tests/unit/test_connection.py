"""One upstream connection: replies in step with commands, limits for each wait, one end."""

from __future__ import annotations

import asyncio
import errno
import itertools
import socket
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.metrics import Metrics
from relay.reply import Reply
from relay.upstream.capabilities import Capabilities
from relay.upstream.connection import QUIT_TIMEOUT, Connection, Failure

REPLY_TIMEOUT = 300.0
END_OF_DATA_TIMEOUT = 600.0
SOON = 0.5


class MemoryTransport(asyncio.Transport):
    """Keeps what is written; ends when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[bytes] = []
        self.aborted = False
        self.closed = False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Nothing waits here: it is told when to pause."""
        del high, low

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """The test keeps the protocol itself."""

    def resume_reading(self) -> None:
        """It is never paused."""

    def write(self, data: Any) -> None:
        self.pieces.append(bytes(data))

    @property
    def written(self) -> bytes:
        """All of it."""
        return b"".join(self.pieces)

    def is_closing(self) -> bool:
        return self.aborted or self.closed

    def abort(self) -> None:
        self.aborted = True

    def close(self) -> None:
        self.closed = True


class Talk:
    """A connection, whoever owns and has it, and all that they hear."""

    def __init__(self) -> None:
        self.metrics = Metrics(upstreams=["primary"], listeners=[], task_types=[])
        self.connection = Connection(
            self,
            Capabilities(frozenset({"PIPELINING"})),
            self.metrics.upstreams["primary"],
            reply_timeout=REPLY_TIMEOUT,
            end_of_data_timeout=END_OF_DATA_TIMEOUT,
        )
        self.transport = MemoryTransport()
        self.connection.attach(self.transport)
        self.connection.lessee = self
        self.answers: list[tuple[str, int]] = []
        self.failures: list[Failure] = []
        self.ends: list[str] = []
        self.flow: list[str] = []
        self.bursts: list[bool] = []

    def command(self, name: str) -> None:
        self.connection.send(b"%b\r\n" % name.encode(), name, lambda reply: self.heard(name, reply))

    def heard(self, name: str, reply: Reply) -> None:
        self.answers.append((name, reply.code))

    def hears(self, octets: bytes) -> None:
        self.connection.data_received(octets)

    def look(self, seconds: float) -> None:
        self.connection.check(asyncio.get_running_loop().time() + seconds)

    def refusals_counted(self) -> None:
        self.flow.append("counted")

    def connection_ended(self, connection: Connection, reason: str) -> None:
        assert connection is self.connection
        self.ends.append(reason)

    def connection_failed(self, failure: Failure) -> None:
        self.failures.append(failure)

    def pause_content(self) -> None:
        self.flow.append("pause")

    def resume_content(self) -> None:
        self.flow.append("resume")

    def burst(self, begins: bool) -> None:
        self.bursts.append(begins)

    def is_over(self) -> bool:
        """Whether it has ended, once for each who must know, and without sending what was buffered."""
        if not self.ends:
            return False
        assert len(self.ends) == len(self.failures) == 1
        assert self.transport.aborted
        assert not self.connection.usable
        return True


@pytest.fixture
async def talk() -> Talk:
    return Talk()


async def test_replies_answer_commands_in_order(talk: Talk) -> None:
    for name in ("mail", "rcpt", "data"):
        talk.command(name)
    assert talk.transport.written == b"mail\r\nrcpt\r\ndata\r\n"
    talk.hears(b"250 2.1.0 ok\r\n550-5.1.1 not\r\n550 5.1.1 here\r\n354 go")
    assert talk.answers == [("mail", 250), ("rcpt", 550)]
    talk.hears(b" ahead\r\n")
    assert talk.answers[2:] == [("data", 354)]
    assert talk.connection.usable
    assert not talk.is_over()


@given(cuts=st.lists(st.integers(0, 60), max_size=8))
def test_how_tcp_cuts_the_replies_does_not_matter(cuts: list[int]) -> None:
    wire = b"250 ok\r\n451-4.7.1 not\r\n451 now\r\n354 go ahead\r\n"

    async def hear() -> list[tuple[str, int]]:
        talk = Talk()
        for name in ("mail", "rcpt", "data"):
            talk.command(name)
        places = [0, *sorted(min(cut, len(wire)) for cut in cuts), len(wire)]
        for start, end in itertools.pairwise(places):
            talk.hears(wire[start:end])
        assert not talk.is_over()
        return talk.answers

    assert asyncio.run(hear()) == [("mail", 250), ("rcpt", 451), ("data", 354)]


async def test_lines_that_come_one_by_one_are_one_reply(talk: Talk) -> None:
    replies: list[Reply] = []
    for _ in range(2):
        talk.connection.send(b"RCPT\r\n", "rcpt", replies.append)
    for octets in (b"250-2.1.5 this\r\n", b"250 2.1.5 ok\r\n", b"550 5.1.1 no\r\n"):
        talk.hears(octets)
    assert [reply.wire for reply in replies] == [b"250-2.1.5 this\r\n250 2.1.5 ok\r\n", b"550 5.1.1 no\r\n"]
    assert not talk.is_over()


@pytest.mark.parametrize(
    "octets",
    [b"250 ok\r\n", b"2", b"what is this\r\n", b"\0", b"354 go\r\n", b"450 no\r\n", b"554 no\r\n"],
)
async def test_octets_that_answer_nothing_end_it(octets: bytes, talk: Talk) -> None:
    talk.hears(octets)
    assert talk.is_over()
    assert talk.failures[0].reply is None


@pytest.mark.parametrize("behind", [b"", b"421 4.3.2 gone\r\n"])
async def test_a_421_may_come_unasked(behind: bytes, talk: Talk) -> None:
    talk.hears(b"421 4.3.2 going down\r\n" + behind)
    assert talk.is_over()
    assert str(talk.failures[0].reply) == "421 4.3.2 going down"


async def test_a_421_that_answers_makes_it_unusable(talk: Talk) -> None:
    talk.command("mail")
    talk.hears(b"421 4.3.2 going down\r\n")
    assert talk.answers == [("mail", 421)]
    assert not talk.connection.usable


@pytest.mark.parametrize(
    ("command", "reply"),
    [
        ("mail", b"354 go\r\n"),
        ("rcpt", b"334 VXNlcg==\r\n"),
        ("data", b"250 ok\r\n"),
        ("end_of_data", b"354 go\r\n"),
    ],
)
async def test_a_reply_of_a_kind_that_cannot_answer_ends_it(command: str, reply: bytes, talk: Talk) -> None:
    talk.command(command)
    talk.hears(reply)
    assert talk.answers == []
    assert talk.is_over()


@pytest.mark.parametrize(
    "octets",
    [b"250 ok\r\n250 twice\r\n", b"250 ok\r\n250", b"250 ok\r\ngarbage\r\n"],
    ids=["a_reply", "half_a_reply", "garbage"],
)
async def test_more_than_was_asked_ends_it(octets: bytes, talk: Talk) -> None:
    talk.command("mail")
    talk.hears(octets)
    assert talk.is_over()


async def test_a_421_behind_what_was_asked_leaves_that(talk: Talk) -> None:
    talk.command("mail")
    talk.hears(b"250 ok\r\n421 4.3.2 going down\r\n")
    assert talk.answers == [("mail", 250)]
    assert talk.is_over()
    assert str(talk.failures[0].reply) == "421 4.3.2 going down"


@pytest.mark.parametrize(
    "octets",
    [b"250 ok\r\n250 twice\r\n", b"250 ok\r\n250 twice\r\n421 bye\r\n", b"250 ok\r\ngarbage\r\n"],
)
async def test_of_replies_before_what_answers_nothing_none_is_believed(octets: bytes, talk: Talk) -> None:
    talk.command("mail")
    talk.hears(octets)
    assert talk.answers == []
    assert talk.is_over()


@pytest.mark.parametrize("behind", [b"250 twice\r\n", b"421 bye\r\n", b"250", b"garbage\r\n", b"554 no\r\n"])
@pytest.mark.parametrize("verdict", [b"250 ok\r\n", b"554 no\r\n"])
async def test_a_verdict_stands_whatever_comes_behind_it(verdict: bytes, behind: bytes, talk: Talk) -> None:
    talk.command("end_of_data")
    talk.hears(verdict + behind)
    assert talk.answers == [("end_of_data", int(verdict[:3]))]
    assert talk.is_over()


@pytest.mark.parametrize("behind", [b"250 twice\r\n", b"421 bye\r\n", b"250", b"garbage\r\n", b"554 no\r\n"])
async def test_a_verdict_stands_with_the_reply_to_a_chunk_before_it(behind: bytes, talk: Talk) -> None:
    talk.command("bdat")
    talk.command("end_of_data")
    talk.hears(b"250 taken\r\n250 ok\r\n" + behind)
    assert talk.answers == [("bdat", 250), ("end_of_data", 250)]
    assert talk.is_over()


@pytest.mark.parametrize("replies", [b"354 go\r\n250 ok\r\n250 ok\r\n", b"250 ok\r\ngarbage\r\n"])
async def test_replies_to_chunks_are_no_verdict(replies: bytes, talk: Talk) -> None:
    talk.command("bdat")
    talk.command("end_of_data")
    talk.hears(replies)
    assert ("end_of_data", 250) not in talk.answers
    assert talk.is_over()


async def test_octets_that_come_before_what_they_answer_end_it(talk: Talk) -> None:
    """The reply lets the next command go up; what is behind the reply was said before that one."""
    talk.connection.send(b"RCPT\r\n", "rcpt", lambda _: talk.command("end_of_data"))
    talk.hears(b"250 ok\r\n250 forg")
    assert talk.is_over()
    assert talk.answers == []


@pytest.mark.parametrize("behind", [b"", b"250 ok\r\n"])
async def test_a_verdict_that_is_none_does_not_stand(behind: bytes, talk: Talk) -> None:
    talk.command("end_of_data")
    talk.hears(b"354 go ahead\r\n" + behind + b"garbage\r\n")
    assert talk.answers == []
    assert talk.is_over()


async def test_its_end_is_told_once(talk: Talk) -> None:
    talk.command("mail")
    talk.connection.eof_received()
    talk.connection.connection_lost(ConnectionResetError("reset"))
    talk.connection.abort("again")
    assert talk.is_over()
    assert talk.ends == ["closed by the upstream"]
    assert talk.answers == []


@pytest.mark.parametrize(
    ("command", "limit"),
    [
        ("mail", REPLY_TIMEOUT),
        ("rcpt", REPLY_TIMEOUT),
        ("data", REPLY_TIMEOUT),
        ("rset", REPLY_TIMEOUT),
        ("end_of_data", 2 * END_OF_DATA_TIMEOUT),
        ("quit", QUIT_TIMEOUT),
    ],
)
async def test_each_wait_has_its_limit(command: str, limit: float, talk: Talk) -> None:
    talk.command(command)
    talk.look(limit - SOON)
    assert not talk.is_over()
    talk.look(limit + SOON)
    assert talk.is_over()
    assert command in talk.failures[0].reason


async def test_a_command_that_follows_puts_no_limit_off(talk: Talk) -> None:
    talk.command("mail")
    asked_at = asyncio.get_running_loop().time()
    await asyncio.sleep(0.01)
    talk.command("rcpt")
    talk.connection.check(asked_at + REPLY_TIMEOUT + 0.001)
    assert talk.is_over()
    assert talk.failures[0].reason == "no reply to mail in time"


async def test_nothing_is_late_when_nothing_is_awaited(talk: Talk) -> None:
    talk.command("mail")
    talk.hears(b"250 ok\r\n")
    talk.look(100 * END_OF_DATA_TIMEOUT)
    assert not talk.is_over()


async def test_content_that_is_not_taken_ends_it(talk: Talk) -> None:
    talk.connection.pause_writing()
    talk.look(REPLY_TIMEOUT - SOON)
    assert not talk.is_over()
    talk.connection.resume_writing()
    talk.look(REPLY_TIMEOUT + SOON)
    assert not talk.is_over()
    talk.connection.pause_writing()
    talk.look(REPLY_TIMEOUT + SOON)
    assert talk.is_over()
    assert talk.flow == ["pause", "resume", "pause"]


async def test_content_that_nobody_has_on_lease_any_more_pauses_nobody(talk: Talk) -> None:
    talk.connection.lessee = None
    talk.connection.pause_writing()
    talk.connection.resume_writing()
    assert talk.flow == []
    assert talk.connection.usable


async def test_lines_behind_which_more_comes_go_up_in_one_piece(talk: Talk) -> None:
    ignored: list[Reply] = []
    for name in ("mail", "rcpt"):
        talk.connection.send(b"%b\r\n" % name.encode(), name, ignored.append, more=True)
    assert talk.transport.pieces == []
    talk.command("data")
    assert talk.transport.pieces == [b"mail\r\nrcpt\r\ndata\r\n"]
    talk.connection.send(b"rset\r\n", "rset", ignored.append, more=True)
    talk.connection.flush()
    talk.connection.flush()
    assert talk.transport.pieces[1:] == [b"rset\r\n"]


async def test_content_does_not_overtake_lines(talk: Talk) -> None:
    ignored: list[Reply] = []
    talk.connection.send(b"rcpt\r\n", "rcpt", ignored.append, more=True)
    talk.connection.write(b"content")
    assert talk.transport.written == b"rcpt\r\ncontent"


async def test_replies_that_come_at_once_are_one_burst_however_it_ends(talk: Talk) -> None:
    talk.command("mail")
    talk.hears(b"250 ok\r\n")
    assert talk.bursts == []
    for name in ("rcpt", "rcpt", "rcpt"):
        talk.command(name)
    talk.hears(b"250 ok\r\n250 ok\r\n354 out of step\r\n")
    assert talk.bursts == [True, False]
    assert talk.answers == [("mail", 250), ("rcpt", 250), ("rcpt", 250)]
    assert talk.is_over()


async def test_quit_closes_after_the_reply(talk: Talk) -> None:
    talk.connection.quit()
    assert talk.transport.written == b"QUIT\r\n"
    assert not talk.connection.usable
    talk.hears(b"221 2.0.0 bye\r\n")
    await asyncio.sleep(0)
    assert talk.transport.closed
    assert not talk.transport.aborted


async def test_an_end_of_tls_that_is_not_answered_has_its_limit(talk: Talk) -> None:
    talk.connection.quit()
    talk.hears(b"221 2.0.0 bye\r\n")
    await asyncio.sleep(0)
    talk.look(QUIT_TIMEOUT - SOON)
    assert not talk.ends
    talk.look(QUIT_TIMEOUT + SOON)
    assert talk.is_over()


async def test_replies_are_timed_by_their_command(talk: Talk) -> None:
    for name in ("mail", "quit"):
        talk.command(name)
    talk.hears(b"250 ok\r\n221 bye\r\n")

    def timed(command: str) -> float | None:
        labels = {"upstream": "primary", "command": command}
        return talk.metrics.registry.get_sample_value("smtp_relay_upstream_reply_seconds_count", labels)

    assert [timed(name) for name in ("mail", "rcpt", "quit")] == [1, 0, None]


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_what_was_said_before_a_write_fails_is_heard(loop: str) -> None:
    """A server that refuses in the middle of content says why, and closes with the rest of it unread."""

    async def refused() -> None:
        talk = Talk()
        with socket.create_server(("127.0.0.1", 0)) as server:
            transport, _ = await asyncio.get_running_loop().create_connection(
                asyncio.Protocol, *server.getsockname()
            )
            talk.connection.attach(transport)
            transport.pause_reading()  # as if the write came in the same turn of the loop
            talk.command("end_of_data")
            upstream, _ = server.accept()
            upstream.sendall(b"500 5.2.0 Line too long\r\n")
            upstream.close()  # with octets unread: a reset follows
            while not talk.ends:
                talk.connection.write(b"more\r\n")
                await asyncio.sleep(0)
        assert talk.answers == [("end_of_data", 500)]
        assert [failure.reply for failure in talk.failures] == [None]

    factory = asyncio.new_event_loop if loop == "asyncio" else pytest.importorskip("uvloop").new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(asyncio.wait_for(refused(), 30))


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_write_that_fails_where_nothing_was_said_ends_it(loop: str) -> None:
    async def lost() -> None:
        talk = Talk()
        with socket.create_server(("127.0.0.1", 0)) as server:
            transport, _ = await asyncio.get_running_loop().create_connection(
                asyncio.Protocol, *server.getsockname()
            )
            talk.connection.attach(transport)
            talk.command("mail")
            talk.connection.connection_lost(OSError(errno.EHOSTUNREACH, "No route to host"))
        assert talk.ends == ["lost: [Errno 113] No route to host"]
        assert [failure.reply for failure in talk.failures] == [None]

    factory = asyncio.new_event_loop if loop == "asyncio" else pytest.importorskip("uvloop").new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(asyncio.wait_for(lost(), 30))
