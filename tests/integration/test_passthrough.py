"""Pass-through AUTH as an attacker meets it: a real upstream decides, and nobody rides on another's login."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any

import pytest

from relay.account import Sender
from relay.auth import passthrough
from relay.auth.passthrough import Passthrough
from relay.credentials import Password, Token
from relay.metrics import Metrics
from relay.settings import UpstreamSettings
from relay.upstream.dial import Dialer
from relay.upstream.idle import MAX_LOGIN_AGE
from relay.upstream.pool import Pool, UnavailableError
from tests.support.certificates import Certificates
from tests.support.client import Client
from tests.support.upstream import Close, Garbage, ScriptedUpstream
from tests.support.watch import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from relay.credentials import Credentials
    from relay.upstream.connection import Connection

ANN, BEN = Password("ann", "secret of ann"), Password("ben", "secret of ben")
USERS = {"ann": "secret of ann", "ben": "secret of ben"}
WRONG = Password("ann", "guessed")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Door:
    """What a relay in pass-through mode is made of, at an upstream that has users."""

    def __init__(self, upstream: ScriptedUpstream, **over: Any) -> None:
        settings = UpstreamSettings.model_validate(
            {"name": "primary", "address": upstream.address, "tls": "none", "connect_timeout": "5s", **over}
        )
        self.upstream = upstream
        self.metrics = Metrics(upstreams=["primary"], listeners=[], task_types=[])
        dialer = Dialer(settings, hostname="relay.test", own_token="none-of-ours")
        self.pool = Pool(settings, dialer, self.metrics.upstreams["primary"])
        self.clock = Clock()
        self.passthrough = Passthrough(self.pool, clock=self.clock)

    @property
    def exchanges(self) -> int:
        """How many logins the upstream was asked to decide."""
        return sum(line.startswith(b"AUTH") for each in self.upstream.connections for line in each.lines)

    async def login(self, credentials: Credentials) -> tuple[str, int]:
        """Log in; return the outcome and how many exchanges it cost."""
        before = self.exchanges
        verdict = await self.passthrough.login(credentials)
        assert verdict.credentials == (credentials if verdict.outcome == "ok" else None)
        assert verdict.user == (credentials.user if verdict.outcome == "ok" else "")
        return verdict.outcome, self.exchanges - before

    def known(self, credentials: Credentials) -> bool:
        """Whether a login would be answered from what is remembered."""
        return self.passthrough._remembered(self.pool.identity(credentials)) is not None

    def lease(self, credentials: Credentials) -> Connection | None:
        """Take what is idle for these credentials, as a transaction does."""
        return self.pool.take(credentials.user, credentials)

    def user(self, connection: Connection) -> str | None:
        """Who the upstream believes to be at the other end."""
        transport: Any = connection._transport
        port = transport.get_extra_info("sockname")[1]
        (found,) = (
            each.user
            for each in self.upstream.connections
            if each.open and each.wire._up.get_extra_info("peername")[1] == port
        )
        return found

    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds
        self.pool.sweep(asyncio.get_running_loop().time() + seconds)


@pytest.fixture
async def door() -> AsyncIterator[Callable[..., Any]]:
    async with contextlib.AsyncExitStack() as stack:

        async def make(*, script: Any = None, mechanisms: tuple[str, ...] = ("PLAIN",), **over: Any) -> Door:
            server = ScriptedUpstream(script, users=USERS, mechanisms=mechanisms)
            upstream = await stack.enter_async_context(server)
            made = Door(upstream, **over)
            stack.push_async_callback(made.pool.close)
            return made

        yield make


# What is offered


@pytest.mark.parametrize(
    ("offered", "mechanisms"),
    [
        (("PLAIN",), ("PLAIN", "LOGIN")),
        (("CRAM-MD5",), ("PLAIN", "LOGIN")),
        (("GSSAPI",), ()),
        (("OAUTHBEARER", "XOAUTH2", "LOGIN"), ("PLAIN", "LOGIN", "XOAUTH2", "OAUTHBEARER")),
    ],
)
async def test_what_is_offered_is_what_the_upstream_can_decide(
    offered: tuple[str, ...], mechanisms: tuple[str, ...], door: Any
) -> None:
    at = await door(mechanisms=offered)
    assert at.passthrough.mechanisms == ("PLAIN", "LOGIN"), "the upstream has not been reached yet"
    await at.pool.probe()
    assert at.passthrough.mechanisms == mechanisms


@pytest.mark.parametrize(
    ("lines", "mechanisms"),
    [
        (("AUTH=PLAIN LOGIN", "AUTH XOAUTH2"), ("PLAIN", "LOGIN", "XOAUTH2")),
        (("AUTH GSSAPI OAUTHBEARER PLAIN", "auth=login"), ("PLAIN", "LOGIN", "OAUTHBEARER")),
        (("AUTH PLAIN", "AUTH="), ("PLAIN", "LOGIN")),
    ],
)
async def test_what_the_upstream_offers_in_two_lines_is_offered(
    lines: tuple[str, ...], mechanisms: tuple[str, ...]
) -> None:
    """Servers say `AUTH=` besides, for clients of before RFC 2554, and not always with the same words."""
    async with ScriptedUpstream(extensions=["PIPELINING", *lines]) as upstream:
        at = Door(upstream)
        await at.pool.probe()
        assert at.passthrough.mechanisms == mechanisms
        await at.pool.close()


# The upstream's verdict


@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN", "CRAM-MD5"])
async def test_the_upstream_decides(mechanism: str, door: Any) -> None:
    at = await door(mechanisms=(mechanism,))
    assert await at.login(ANN) == ("ok", 1)
    assert await at.login(WRONG) == ("failed", 1)
    assert at.upstream.connections[0].user == "ann"
    sent = b"".join(at.upstream.connections[0].lines)
    assert (b"CRAM" in sent) == (mechanism == "CRAM-MD5")


@pytest.mark.parametrize(
    ("said", "heard", "outcome"),
    [
        (b"235-2.7.0 hello\r\n235 2.7.0 Ann\r\n", b"235-2.7.0 hello\r\n235 2.7.0 Ann\r\n", "ok"),
        (b"535-5.7.8 no\r\n535 5.7.8 see https://x.test\r\n",) * 2 + ("failed",),
        (b"534 5.7.9 a stronger mechanism is needed\r\n",) * 2 + ("failed",),
        (b"454 4.7.0 try later\r\n",) * 2 + ("unavailable",),
        (b"432 4.7.12 A password transition is needed\r\n",) * 2 + ("unavailable",),
        (Close(b"421 4.3.2 going down\r\n"), b"454 4.3.2 going down\r\n", "unavailable"),
        (Close(), passthrough.UNAVAILABLE.wire, "unavailable"),
        (Garbage(), passthrough.UNAVAILABLE.wire, "unavailable"),
        (b"250 2.0.0 whatever\r\n", passthrough.UNAVAILABLE.wire, "unavailable"),
        (b"334 \r\n", passthrough.UNAVAILABLE.wire, "unavailable"),
    ],
    ids=["235", "535", "534", "454", "432", "421", "close", "garbage", "250", "334"],
)
async def test_its_reply_comes_back_with_every_line(said: Any, heard: bytes, outcome: str, door: Any) -> None:
    at = await door(script={"AUTH": said})
    verdict = await at.passthrough.login(ANN)
    assert (verdict.reply.wire, verdict.outcome) == (heard, outcome)
    assert at.known(ANN) is (outcome == "ok")


async def test_an_upstream_that_cannot_be_reached_is_no_verdict(door: Any) -> None:
    at = await door()
    at.upstream.unlisten()
    verdict = await at.passthrough.login(ANN)
    assert (verdict.reply, verdict.outcome) == (passthrough.UNAVAILABLE, "unavailable")
    assert at.metrics.registry.get_sample_value("smtp_relay_upstream_up", {"upstream": "primary"}) == 0


async def test_wrong_credentials_say_nothing_of_the_upstream(door: Any) -> None:
    at = await door()
    await at.login(WRONG)
    assert at.pool.last_error is None
    assert at.metrics.registry.get_sample_value("smtp_relay_upstream_up", {"upstream": "primary"}) == 1


async def test_a_login_waits_its_turn_within_the_bound(door: Any) -> None:
    at = await door(max_connections=1, lease_wait_timeout="50ms")
    assert await at.login(ANN) == ("ok", 1)
    held = at.lease(ANN)
    assert (await at.passthrough.login(BEN)).reply == passthrough.UNAVAILABLE
    at.pool.release(held, reset=False)
    assert await at.login(BEN) == ("ok", 1), "what is idle makes room"
    assert len(at.upstream.open_connections) == 1


# Tokens


@pytest.mark.parametrize(
    ("mechanism", "response", "answer"),
    [
        ("XOAUTH2", b"user=ann\1auth=Bearer %b\1\1", b""),
        ("OAUTHBEARER", b"n,a=ann,\1host=x\1auth=Bearer %b\1\1", b"\1"),
    ],
)
async def test_a_token_goes_up_as_the_client_gave_it(
    mechanism: str, response: bytes, answer: bytes, door: Any
) -> None:
    at = await door(mechanisms=("XOAUTH2", "OAUTHBEARER"))
    at.upstream.users = {"ann": "good-token"}
    assert await at.login(Token(mechanism, "ann", response % b"good-token")) == ("ok", 1)
    assert await at.login(Token(mechanism, "ann", response % b"bad-token")) == ("failed", 1)
    assert at.upstream.connections[1].answers == [answer]
    assert await at.login(Token(mechanism, "ann", response % b"good-token")) == ("ok", 0)


async def test_a_mechanism_that_the_upstream_lost_is_no_verdict(door: Any) -> None:
    at = await door(mechanisms=("PLAIN",))
    assert await at.login(Token("XOAUTH2", "ann", b"user=ann\1auth=Bearer x\1\1")) == ("unavailable", 0)


# What is remembered


async def test_the_same_credentials_again_cost_no_exchange(door: Any) -> None:
    at = await door()
    first = await at.passthrough.login(ANN)
    assert at.known(ANN)
    at.upstream.script = {"AUTH": b"454 4.7.0 must not be asked\r\n"}
    again = await at.passthrough.login(Password("ann", "secret of ann"))  # by LOGIN it is the same
    assert again == first
    assert at.exchanges == 1
    assert repr(at.passthrough) == "<Passthrough: 1 remembered>"


async def test_a_wrong_password_after_a_success_costs_an_exchange_and_fails(door: Any) -> None:
    at = await door()
    await at.login(ANN)
    for _ in range(3):
        assert await at.login(WRONG) == ("failed", 1)
        assert at.lease(WRONG) is None
    assert await at.login(ANN) == ("ok", 0), "and it costs the right one nothing"


async def test_whether_a_user_is_known_does_not_show(door: Any) -> None:
    """The same exchanges, command by command, for a user who is logged in and for one who is not there."""
    at = await door()
    await at.login(ANN)
    seen = []
    for user in ("ann", "nobody"):
        await at.login(Password(user, "guessed"))
        seen.append([line.split()[0] for line in at.upstream.connections[-1].lines])
    assert seen == [[b"EHLO", b"AUTH"]] * 2


@pytest.mark.parametrize(
    "other",
    [
        Password("ann", "secret of ben"),
        Password("ben", "secret of ann"),
        Password("ann", "Secret of ann"),
        Password("ann", "secret of ann "),
        Password("ann", ""),
        Password("annsecret of ann", ""),
        Password("Ann", "secret of ann"),
        Token("XOAUTH2", "ann", b"secret of ann"),
    ],
    ids=lambda other: f"{other.user}-{getattr(other, 'password', 'token')}",
)
async def test_nothing_but_the_same_credentials_is_known(other: Credentials, door: Any) -> None:
    at = await door(mechanisms=("PLAIN", "XOAUTH2"), script={"AUTH": {"XOAUTH2": b"535 5.7.8 no\r\n"}})
    await at.login(ANN)
    await at.login(BEN)
    assert not at.known(other)
    assert at.lease(other) is None
    assert await at.login(other) == ("failed", 1)


async def test_another_authorization_identity_is_another_login(door: Any) -> None:
    at = await door()
    await at.login(ANN)
    acting = dataclasses.replace(ANN, authorization="boss")
    assert not at.known(acting)
    assert at.lease(acting) is None
    assert await at.login(acting) == ("ok", 1)
    assert [each.authorization for each in at.upstream.connections] == [b"", b"boss"]


@pytest.mark.parametrize("mechanisms", [("LOGIN",), ("CRAM-MD5", "LOGIN")])
async def test_an_authorization_identity_is_not_dropped(mechanisms: tuple[str, ...], door: Any) -> None:
    at = await door(mechanisms=mechanisms)
    assert await at.login(dataclasses.replace(ANN, authorization="boss")) == ("failed", 0)
    assert await at.login(dataclasses.replace(ANN, authorization="ann")) == ("ok", 1)


async def test_after_five_minutes_the_upstream_is_asked_again(door: Any) -> None:
    at = await door()
    await at.login(ANN)
    at.pass_time(MAX_LOGIN_AGE - 1)
    assert await at.login(ANN) == ("ok", 0)
    at.pass_time(1)
    assert not at.known(ANN), "using it does not prolong it"
    assert await at.login(ANN) == ("ok", 1)
    assert await at.login(ANN) == ("ok", 0)


async def test_the_time_counts_from_before_the_upstream_looked(door: Any) -> None:
    at = await door()

    def slow(*_: object) -> None:
        at.clock.now += 200

    at.upstream.script = {"AUTH": slow}
    await at.login(ANN)
    at.upstream.script = {}
    at.pass_time(MAX_LOGIN_AGE - 199)
    assert await at.login(ANN) == ("ok", 1)


async def test_so_many_logins_are_remembered_and_the_oldest_goes(
    door: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passthrough, "MAX_REMEMBERED", 2)
    at = await door()
    at.upstream.users = dict.fromkeys("abc", "x")
    for user in "abac":
        await at.login(Password(user, "x"))
    assert [at.known(Password(user, "x")) for user in "abc"] == [True, False, True]


# Revoked at the upstream


async def test_a_revoked_password_ends_within_five_minutes_also_on_open_connections(door: Any) -> None:
    at = await door(max_age="1h", idle_timeout="1h")
    await at.login(ANN)
    at.upstream.users = {"ann": "changed"}
    at.pass_time(MAX_LOGIN_AGE - 1)
    connection = at.lease(ANN)
    assert connection is not None, "so long it may go on"
    at.pool.release(connection, reset=False)
    at.pass_time(MAX_LOGIN_AGE + 1)
    assert at.lease(ANN) is None
    assert await at.login(ANN) == ("failed", 1)
    await at.upstream.wait_for(lambda: not at.upstream.open_connections)


async def test_a_connection_too_old_is_not_leased_even_before_the_sweep(
    door: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = await door(max_age="1h", idle_timeout="1h")
    await at.login(ANN)
    loop = asyncio.get_running_loop()
    later = loop.time() + MAX_LOGIN_AGE + 1
    with monkeypatch.context() as clock:
        clock.setattr(loop, "time", lambda: later)
        assert at.lease(ANN) is None


async def test_what_the_upstream_refuses_is_forgotten_with_its_connections(door: Any) -> None:
    """Also when it shows only as a connection is opened for mail: the old login must not be taken again."""
    at = await door()
    await at.login(ANN)
    idle, leased = at.lease(ANN), await at.pool.acquire("ann", ANN)
    at.pool.release(idle, reset=False)
    at.upstream.users = {"ann": "changed"}
    with pytest.raises(UnavailableError) as caught:
        await at.pool.acquire("ann", ANN, fresh=True)
    assert caught.value.reply.wire.startswith(b"530 5.7.0 ")
    assert caught.value.verdict is not None
    assert caught.value.verdict.code == 535
    assert not at.known(ANN)
    assert at.lease(ANN) is None
    at.pool.release(leased, reset=False)
    assert at.lease(ANN) is None, "one that was out is not used again either"
    await at.upstream.wait_for(lambda: not at.upstream.open_connections)


async def test_a_refusal_that_passes_forgets_nothing(door: Any) -> None:
    at = await door()
    await at.login(ANN)
    at.upstream.script = {"AUTH": [b"454 4.7.0 later\r\n", Close(b"421 4.3.2 later\r\n")]}
    for _ in range(2):
        with pytest.raises(UnavailableError) as caught:
            await at.pool.acquire("ann", ANN, fresh=True)
        assert caught.value.reply.code == 451
    assert at.known(ANN)
    assert at.lease(ANN) is not None


# Connections


async def test_everybody_gets_connections_of_the_own_login(door: Any) -> None:
    at = await door()
    await asyncio.gather(at.login(ANN), at.login(BEN), at.pool.probe())
    for _ in range(3):
        leased = [at.lease(ANN), at.lease(BEN), at.pool.take("192.0.2.1")]
        assert [at.user(each) for each in leased] == ["ann", "ben", None]
        assert [at.lease(ANN), at.lease(BEN), at.pool.take("192.0.2.1")] == [None, None, None]
        for connection in leased:
            at.pool.release(connection, reset=True)
        await eventually(lambda: ": 0 active, 3 idle" in repr(at.pool))


async def test_right_and_wrong_at_the_same_time(door: Any) -> None:
    at = await door(max_connections=3, lease_wait_timeout="1m")
    tried = [ANN, WRONG, BEN, Password("ben", "secret of ann"), dataclasses.replace(ANN, user="nobody")] * 6
    verdicts = await asyncio.gather(*(at.passthrough.login(each) for each in tried))
    assert [verdict.outcome for verdict in verdicts] == ["ok", "failed", "ok", "failed", "failed"] * 6
    assert at.known(ANN)
    assert not at.known(WRONG)
    assert len(at.upstream.open_connections) <= 3
    for credentials, user in ((ANN, "ann"), (BEN, "ben")):
        connection = await at.pool.acquire(user, credentials)
        assert at.user(connection) == user


async def test_when_another_identity_is_next_the_connection_makes_room(door: Any) -> None:
    at = await door(max_connections=1, lease_wait_timeout="1m")
    await at.login(ANN)
    held = at.lease(ANN)
    waiting = asyncio.create_task(at.pool.acquire("ben", BEN))
    await eventually(lambda: at.pool._shares.waiting)
    at.pool.release(held, reset=False)
    assert at.user(await waiting) == "ben"
    assert at.upstream.connections[0].lines[-1] == b"QUIT"
    assert len(at.upstream.open_connections) == 1


async def test_which_idle_connection_makes_room_is_the_one_that_lay_longest(door: Any) -> None:
    at = await door(max_connections=2)
    await at.login(ANN)
    await at.login(BEN)
    connection = at.lease(ANN)
    at.pool.release(connection, reset=False)  # now it is ben's that has been idle longest
    await at.pool.acquire("192.0.2.1")
    assert at.lease(BEN) is None
    assert at.lease(ANN) is connection


async def test_where_the_upstream_takes_no_more_what_makes_room_has_gone_before_the_next_comes(
    door: Any,
) -> None:
    """What it has not seen go is still one of those that it takes."""
    at = await door(lease_wait_timeout="1m")

    def full(*_: object) -> Close | None:
        return Close(b"421 4.7.0 too many connections\r\n") if len(at.upstream.open_connections) > 1 else None

    at.upstream.script = {"greeting": full}
    for turn in range(4):
        who = (ANN, BEN)[turn % 2]
        connection = await at.pool.acquire(who.user, who)
        assert at.user(connection) == who.user
        at.pool.release(connection, reset=False)
    gone, turned_away, *later = at.upstream.connections
    assert [each.lines[-1] == b"QUIT" for each in (gone, *later)] == [True, True, True, False]
    assert turned_away.lines == []


# In clear


async def test_credentials_of_clients_do_not_go_out_in_clear(
    door: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loopback is the only way without TLS, whatever the settings let through."""
    at = await door()
    monkeypatch.setattr("relay.upstream.dial._is_this_machine", lambda _: False)
    verdict = await at.passthrough.login(ANN)
    assert (verdict.reply, verdict.outcome) == (passthrough.UNAVAILABLE, "unavailable")
    assert at.exchanges == 0


@pytest.mark.parametrize(
    ("peername", "is_ours"),
    [
        (("127.0.0.1", 25), True),
        (("127.8.8.8", 25), True),
        (("::1", 25, 0, 0), True),
        (("192.0.2.1", 25), False),
        (("10.0.0.1", 25), False),
        (("2001:db8::1", 25, 0, 0), False),
        ("", False),
        ("/run/smtp.sock", False),
        (None, False),
    ],
)
def test_what_is_this_machine(peername: Any, is_ours: bool) -> None:
    from relay.upstream.dial import _is_this_machine

    assert _is_this_machine(peername) is is_ours


async def test_under_tls_the_best_mechanism_is_plain(tmp_path: Path, door: Any) -> None:
    certificates = Certificates()
    authority = certificates.write_authority(tmp_path / "ca.pem")
    at = await door(mechanisms=("CRAM-MD5", "LOGIN", "PLAIN"), tls="starttls", ca_file=str(authority))
    at.upstream.tls = certificates.server()
    assert await at.login(ANN) == ("ok", 1)
    (tried,) = (line for line in at.upstream.connections[0].lines if line.startswith(b"AUTH"))
    assert tried.startswith(b"AUTH PLAIN ")


# In a session


async def test_a_session_whose_login_was_revoked_hears_530_at_mail(start: Any) -> None:
    async with (
        ScriptedUpstream(users=USERS, mechanisms=("PLAIN",)) as upstream,
        start(
            upstream.port,
            clients={"auth": "passthrough", "auth_without_tls": True, "allow": ["127.0.0.1/32"]},
        ) as running,
        Client(running.port) as client,
    ):
        await client.ehlo()
        (session,) = running.relay.reception._sessions
        session._dialogue._sender = Sender("ann", "127.0.0.1:0", "127.0.0.1", ANN)
        replies = await client.message("a@example.test", ["b@example.test"], b"Subject: x\r\n\r\nx\r\n")
        assert replies[-1].code == 250
        assert upstream.messages[0].accepted
        upstream.users = {"ann": "changed"}
        running.pool.sweep(asyncio.get_running_loop().time() + 301)
        reply = await client.command(b"MAIL FROM:<a@example.test>", 530)
        assert reply.text == "5.7.0 The upstream server refuses this login now: connect and log in again"
        (row,) = running.rows()
        assert row["client"] == "ann"
