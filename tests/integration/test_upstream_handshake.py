"""TLS and AUTH with the upstream: what is asked for is had or nothing is sent; credentials go out once."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import socket
import ssl
from typing import TYPE_CHECKING, Any

import pytest

from relay import maillog
from tests.support.certificates import Certificates
from tests.support.client import Client
from tests.support.upstream import EXTENSIONS, Close, ScriptedUpstream
from tests.support.watch import DEADLINE_S, counted

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from tests.conftest import Running
    from tests.support.client import Reply

CONTENT = b"Subject: one\r\n\r\ntext\r\n"
USER, PASSWORD = "relay@example.test", "correct horse \N{LATIN SMALL LETTER U WITH DIAERESIS}ber"
LOGIN = {"username": USER, "password": PASSWORD}


@pytest.fixture
def certificates() -> Certificates:
    return Certificates()


@pytest.fixture
def trusting(certificates: Certificates, tmp_path: Path) -> dict[str, str]:
    """The setting by which the relay trusts the test's authority."""
    return {"ca_file": str(certificates.write_authority(tmp_path / "ca.pem"))}


@pytest.fixture
def log() -> Iterator[io.BytesIO]:
    """The log at its most talkative."""
    stream = io.BytesIO()
    maillog.configure("json", "debug", stream)
    yield stream
    maillog.configure("json", "info")


async def send(running: Running) -> list[Reply]:
    async with Client(running.port) as client:
        await client.ehlo()
        return await client.message("a@example.test", ["b@example.test"], CONTENT)


async def passes(running: Running, upstream: ScriptedUpstream) -> None:
    assert (await send(running))[-1].code == 250
    assert upstream.messages[0].content == CONTENT
    await counted(running, accepted=1)


async def is_refused(running: Running, upstream: ScriptedUpstream, stage: str) -> None:
    """No message, no MAIL, no credentials: 451 4.7.0, and the stage is counted."""
    replies = await send(running)
    assert replies[0].raw.startswith(b"451 4.7.0 ")
    assert not any(line.startswith(b"MAIL") for each in upstream.connections for line in each.lines)
    await counted(running, unavailable=1)
    assert running.metric("upstream_connects_total", upstream="primary", outcome=stage) >= 1
    assert running.metric("upstream_up", upstream="primary") == 0


# EHLO


@pytest.mark.parametrize("code", [500, 501, 502, 503, 504])
async def test_where_ehlo_is_not_understood_helo_follows(code: int, start: Any) -> None:
    script: Any = {"EHLO": [b"%d not here\r\n" % code, b"250 upstream.test\r\n"]}
    async with ScriptedUpstream(script) as upstream, start(upstream.port) as running:
        await passes(running, upstream)
        assert [line.partition(b" ")[0] for line in upstream.connections[0].lines][:3] == [
            b"EHLO",
            b"HELO",
            b"MAIL",
        ]


async def test_where_ehlo_is_refused_nothing_follows(start: Any) -> None:
    async with (
        ScriptedUpstream({"EHLO": b"550 5.7.1 not you\r\n"}) as upstream,
        start(upstream.port) as running,
    ):
        assert (await send(running))[0].raw.startswith(b"451 4.4.1 ")
        assert not any(b"HELO" in line for each in upstream.connections for line in each.lines)


# TLS


@pytest.mark.parametrize("tls", ["starttls", "implicit"])
async def test_a_large_message_goes_through_tls(
    tls: str, certificates: Certificates, trusting: dict[str, str], start: Any
) -> None:
    """One that is written in many pieces, before the upstream says a word."""
    content = b"Subject: large\r\n\r\n" + (b"x" * 998 + b"\r\n") * 5000
    server = ScriptedUpstream(tls=certificates.server(), implicit_tls=tls == "implicit")
    async with server as upstream, start(upstream.port, upstream={"tls": tls, **trusting}) as running:
        async with Client(running.port) as client:
            await client.ehlo()
            for _ in range(2):
                assert (await client.message("a@example.test", ["b@example.test"], content))[-1].code == 250
        assert [message.content for message in upstream.messages] == [content] * 2


@pytest.mark.parametrize("tls", ["starttls", "opportunistic", "implicit"])
async def test_tls_is_used(
    tls: str,
    certificates: Certificates,
    trusting: dict[str, str],
    start: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = ScriptedUpstream(tls=certificates.server(), implicit_tls=tls == "implicit")
    async with server as upstream, start(upstream.port, upstream={"tls": tls, **trusting}) as running:
        await passes(running, upstream)
        assert upstream.connections[0].wire.secured
        hellos = [line for line in upstream.connections[0].lines if line.startswith(b"EHLO")]
        assert len(hellos) == (1 if tls == "implicit" else 2), "what was said before TLS does not count"
        running.pool.sweep(asyncio.get_running_loop().time() + 61)
        await upstream.wait_for(lambda: not upstream.open_connections)
        assert upstream.connections[0].lines[-1] == b"QUIT"
    assert upstream.violations == []
    assert [record for record in caplog.records if record.name == "asyncio"] == []


async def test_opportunistic_goes_on_without_tls_where_none_is_offered(
    trusting: dict[str, str], start: Any, upstream: ScriptedUpstream
) -> None:
    async with start(upstream.port, upstream={"tls": "opportunistic", **trusting}) as running:
        await passes(running, upstream)


@pytest.mark.parametrize("refusal", [b"454 4.7.0 TLS not available now\r\n", b"502 no\r\n"])
@pytest.mark.parametrize("tls", ["opportunistic", "starttls"])
async def test_where_tls_is_offered_and_refused_only_opportunistic_goes_on(
    tls: str, refusal: bytes, certificates: Certificates, trusting: dict[str, str], start: Any
) -> None:
    server = ScriptedUpstream({"STARTTLS": [refusal] * 4}, tls=certificates.server())
    async with server as upstream, start(upstream.port, upstream={"tls": tls, **trusting}) as running:
        if tls == "starttls":
            await is_refused(running, upstream, "tls")
            return
        await passes(running, upstream)
        assert not upstream.connections[-1].wire.secured
        said = [line.split()[0] for line in upstream.connections[-1].lines[:3]]
        assert said == [b"EHLO", b"STARTTLS", b"MAIL"]


async def test_an_upstream_that_closes_instead_of_tls_is_left(
    certificates: Certificates, trusting: dict[str, str], start: Any
) -> None:
    server = ScriptedUpstream({"STARTTLS": [Close(b"421 4.3.2 closing\r\n")] * 4}, tls=certificates.server())
    opportunistic = {"tls": "opportunistic", **trusting}
    async with server as upstream, start(upstream.port, upstream=opportunistic) as running:
        await is_refused(running, upstream, "tls")


async def test_none_does_not_ask_for_tls(certificates: Certificates, start: Any) -> None:
    async with ScriptedUpstream(tls=certificates.server()) as upstream, start(upstream.port) as running:
        await passes(running, upstream)
        assert not upstream.connections[0].wire.secured


@pytest.mark.parametrize("tls", ["starttls", "opportunistic", "implicit"])
@pytest.mark.parametrize("fault", ["wrong name", "expired", "unknown authority"])
async def test_a_certificate_that_does_not_hold_ends_the_attempt(
    fault: str, tls: str, certificates: Certificates, trusting: dict[str, str], start: Any
) -> None:
    context = {
        "wrong name": lambda: certificates.server("elsewhere.test"),
        "expired": lambda: certificates.server(expired=True),
        "unknown authority": lambda: Certificates().server(),
    }[fault]()
    server = ScriptedUpstream(tls=context, implicit_tls=tls == "implicit")
    async with server as upstream, start(upstream.port, upstream={"tls": tls, **trusting}) as running:
        await is_refused(running, upstream, "tls")


async def test_the_system_does_not_know_the_authority(certificates: Certificates, start: Any) -> None:
    async with (
        ScriptedUpstream(tls=certificates.server()) as upstream,
        start(upstream.port, upstream={"tls": "starttls"}) as running,
    ):
        await is_refused(running, upstream, "tls")


async def test_verification_can_be_switched_off(start: Any) -> None:
    async with (
        ScriptedUpstream(tls=Certificates().server("elsewhere.test")) as upstream,
        start(upstream.port, upstream={"tls": "starttls", "tls_verify": False}) as running,
    ):
        await passes(running, upstream)


def greets_and_stares(listening: socket.socket, context: ssl.SSLContext, greeting: bytes) -> None:
    """Take one connection and greet; then read octets, no TLS, to its end: nothing is answered or closed."""
    listening.settimeout(DEADLINE_S)
    accepted, _ = listening.accept()
    accepted.settimeout(DEADLINE_S)
    secured = context.wrap_socket(accepted, server_side=True)
    with contextlib.suppress(ssl.SSLEOFError, ConnectionError):  # what is too long is not read to its end
        secured.sendall(greeting)
    with socket.socket(fileno=secured.detach()) as wire, contextlib.suppress(ConnectionResetError):
        wire.settimeout(DEADLINE_S)
        while wire.recv(65536):
            pass


@pytest.mark.parametrize(
    "greeting", [b"", b"220-half\r\n", b"250-long\r\n" * 12_000], ids=["none", "half", "long"]
)
async def test_an_attempt_that_failed_within_tls_leaves_nothing_open(
    greeting: bytes, certificates: Certificates, trusting: dict[str, str], start: Any
) -> None:
    """To end TLS politely would be to wait for an answer, and to read on."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        seen = asyncio.create_task(
            asyncio.to_thread(greets_and_stares, listening, certificates.server(), greeting)
        )
        over = {"tls": "implicit", "connect_timeout": "300ms", **trusting}
        async with start(listening.getsockname()[1], upstream=over) as running:
            await seen
            assert running.metric("upstream_connects_total", upstream="primary", outcome="ok") == 0


HELLO = b"250-upstream.test\r\n250 XSMUGGLED\r\n"
GLUED = {
    "behind the 220": ({"STARTTLS": b"220 2.0.0 go ahead\r\n" + HELLO}, "tls"),
    "half a reply behind the 220": ({"STARTTLS": b"220 2.0.0 go ahead\r\n250-upst"}, "tls"),
    "behind the greeting": ({"greeting": b"220 upstream.test\r\n" + HELLO}, "protocol"),
    "behind EHLO's reply": (
        {"EHLO": [b"250-upstream.test\r\n250 STARTTLS\r\n220 go ahead\r\n" + HELLO] * 2},
        "protocol",
    ),
    "no reply": ({"EHLO": [b"250-upstream.test\r\n250 STARTTLS\r\nwhat is this\r\n"] * 2}, "protocol"),
    "behind EHLO's reply within TLS": ({"EHLO": [None, HELLO + b"235 2.7.0 welcome\r\n"] * 2}, "protocol"),
    "behind the 235": ({"AUTH": b"235 2.7.0 welcome\r\n250 2.1.0 ok\r\n"}, "auth"),
}


@pytest.mark.parametrize("place", GLUED)
async def test_octets_glued_to_a_reply_end_the_attempt(
    place: str, certificates: Certificates, trusting: dict[str, str], start: Any
) -> None:
    """What comes in clear behind the 220 must not count as said within TLS (RFC 3207 sections 4.2 and 6)."""
    script, stage = GLUED[place]
    async with ScriptedUpstream(tls=certificates.server(), users={USER: PASSWORD}) as upstream:
        upstream.script = script
        async with start(upstream.port, upstream={"tls": "starttls", **trusting, **LOGIN}) as running:
            replies = await send(running)
            assert replies[0].code == 451
            await counted(running, unavailable=1)
            assert running.metric("upstream_connects_total", upstream="primary", outcome=stage) == 2
            assert "XSMUGGLED" not in running.pool.capabilities
            said = [line.split()[0] for each in upstream.connections for line in each.lines]
            assert b"MAIL" not in said
            assert (b"AUTH" in said) == (stage == "auth"), "no credentials after it"


async def test_octets_in_clear_that_come_later_than_the_220_end_the_attempt(
    certificates: Certificates, trusting: dict[str, str], start: Any
) -> None:
    """In a segment of their own they are read as the TLS handshake, and are none."""

    def say_more(stage: str, line: bytes, connection: Any) -> bytes:
        asyncio.get_running_loop().call_soon(connection.wire._up.write, HELLO)
        return b"220 2.0.0 go ahead\r\n"

    async with (
        ScriptedUpstream({"STARTTLS": say_more}, tls=certificates.server()) as upstream,
        start(upstream.port, upstream={"tls": "starttls", **trusting}) as running,
    ):
        await is_refused(running, upstream, "tls")
        assert "XSMUGGLED" not in running.pool.capabilities


async def test_a_second_ehlo_decides_what_is_offered(
    certificates: Certificates, trusting: dict[str, str], start: Any
) -> None:
    def hello(*words: str) -> bytes:
        return "".join(f"250-{word}\r\n" for word in ("upstream.test", *words)).encode() + b"250 HELP\r\n"

    async with ScriptedUpstream(tls=certificates.server()) as upstream:
        upstream.script = {"EHLO": [hello("STARTTLS", "DSN"), hello("SMTPUTF8")]}
        over = {"tls": "starttls", **trusting}
        async with start(upstream.port, upstream=over) as running, Client(running.port) as client:
            await client.ehlo()
            assert "SMTPUTF8" in client.extensions
            assert "DSN" not in client.extensions


# AUTH


@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN", "CRAM-MD5"])
@pytest.mark.parametrize("right", [True, False], ids=["right", "wrong"])
async def test_auth(
    mechanism: str,
    right: bool,
    certificates: Certificates,
    trusting: dict[str, str],
    start: Any,
    log: io.BytesIO,
) -> None:
    async with ScriptedUpstream(
        tls=certificates.server(),
        users={USER: PASSWORD if right else "another"},
        mechanisms=[mechanism],
    ) as upstream:
        async with start(upstream.port, upstream={"tls": "starttls", **trusting, **LOGIN}) as running:
            if right:
                await passes(running, upstream)
                assert upstream.connections[0].user == USER
            else:
                await is_refused(running, upstream, "auth")
            assert attempts(upstream) == [[mechanism]] * len(upstream.connections)
        tells_nothing(log.getvalue())


async def test_a_refused_mechanism_is_not_followed_by_another(
    certificates: Certificates, trusting: dict[str, str], start: Any, log: io.BytesIO
) -> None:
    """Each further attempt with the same password brings the account nearer to its lock-out."""
    async with (
        ScriptedUpstream(tls=certificates.server(), users={USER: "another"}) as upstream,
        start(upstream.port, upstream={"tls": "starttls", **trusting, **LOGIN}) as running,
    ):
        await is_refused(running, upstream, "auth")
        assert attempts(upstream) == [["PLAIN"]] * len(upstream.connections)
        assert len(upstream.connections) == 2, "one at the start, one for the message"
        tells_nothing(log.getvalue())


async def test_in_clear_the_password_is_not_said_where_it_need_not_be(start: Any, log: io.BytesIO) -> None:
    async with (
        ScriptedUpstream(users={USER: PASSWORD}) as upstream,
        start(upstream.port, upstream=LOGIN) as running,
    ):
        await passes(running, upstream)
        assert attempts(upstream) == [["CRAM-MD5"]]
        tells_nothing(log.getvalue())


async def test_credentials_stay_here_when_starttls_is_stripped(
    trusting: dict[str, str], start: Any, log: io.BytesIO
) -> None:
    async with (
        ScriptedUpstream(users={USER: PASSWORD}) as upstream,
        start(upstream.port, upstream={"tls": "starttls", **trusting, **LOGIN}) as running,
    ):
        await is_refused(running, upstream, "tls")
        assert attempts(upstream) == [[]] * len(upstream.connections)
        tells_nothing(log.getvalue())


@pytest.mark.parametrize("mechanisms", [["GSSAPI"], ["XOAUTH2"], []], ids=["GSSAPI", "XOAUTH2", "none"])
async def test_no_mechanism_in_common(
    mechanisms: Sequence[str], certificates: Certificates, trusting: dict[str, str], start: Any
) -> None:
    extensions = [*EXTENSIONS, "AUTH " + " ".join(mechanisms)] if mechanisms else EXTENSIONS
    async with (
        ScriptedUpstream(tls=certificates.server(), extensions=extensions) as upstream,
        start(upstream.port, upstream={"tls": "starttls", **trusting, **LOGIN}) as running,
    ):
        await is_refused(running, upstream, "auth")
        assert attempts(upstream) == [[]] * len(upstream.connections)


async def test_the_connection_is_logged_in_once_for_many_messages(
    certificates: Certificates, trusting: dict[str, str], start: Any
) -> None:
    async with (
        ScriptedUpstream(tls=certificates.server(), users={USER: PASSWORD}) as upstream,
        start(upstream.port, upstream={"tls": "starttls", **trusting, **LOGIN}) as running,
    ):
        for _ in range(3):
            assert (await send(running))[-1].code == 250
        assert attempts(upstream) == [["PLAIN"]]


def attempts(upstream: ScriptedUpstream) -> list[list[str]]:
    """The mechanisms that were tried, for each connection."""
    return [
        [line.split()[1].decode() for line in connection.lines if line.startswith(b"AUTH")]
        for connection in upstream.connections
    ]


def tells_nothing(logged: bytes) -> None:
    assert b'"started"' in logged
    secret = PASSWORD.encode()
    plain = b"\0%b\0%b" % (USER.encode(), secret)
    for form in (secret, base64.b64encode(secret), base64.b64encode(plain), b"correct horse"):
        assert form not in logged


# Bearer tokens of the relay's own


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text("first-token\n")
    return path


def with_token(path: Path, **over: Any) -> dict[str, Any]:
    return {"tls": "starttls", "username": USER, "token": {"file": str(path)}, **over}


@pytest.mark.parametrize("offered", [["XOAUTH2"], ["OAUTHBEARER"], ["PLAIN", "OAUTHBEARER", "XOAUTH2"]])
@pytest.mark.parametrize("length", [20, 2000], ids=["short", "long"])
async def test_a_token_logs_in(
    length: int,
    offered: list[str],
    token: Path,
    certificates: Certificates,
    trusting: dict[str, str],
    start: Any,
) -> None:
    secret = "t" * length
    token.write_text(secret + "\n")
    server = ScriptedUpstream(tls=certificates.server(), users={USER: secret}, mechanisms=offered)
    async with server as upstream, start(upstream.port, upstream=with_token(token, **trusting)) as running:
        await passes(running, upstream)
        assert upstream.connections[0].user == USER
        assert attempts(upstream) == [["XOAUTH2" if "XOAUTH2" in offered else "OAUTHBEARER"]]
        assert all(len(line) <= 510 for line in upstream.connections[0].lines)
    assert upstream.violations == []


@pytest.mark.parametrize(("mechanism", "answer"), [("XOAUTH2", b""), ("OAUTHBEARER", b"\1")])
async def test_the_error_of_a_refused_token_is_answered_and_its_final_reply_counts(
    mechanism: str,
    answer: bytes,
    token: Path,
    certificates: Certificates,
    trusting: dict[str, str],
    start: Any,
    log: io.BytesIO,
) -> None:
    server = ScriptedUpstream(tls=certificates.server(), users={USER: "another"}, mechanisms=[mechanism])
    async with server as upstream, start(upstream.port, upstream=with_token(token, **trusting)) as running:
        await is_refused(running, upstream, "auth")
        assert [each.answers for each in upstream.connections] == [[answer], [answer]]
        assert attempts(upstream) == [[mechanism]] * 2
        assert b"535 5.7.8 wrong credentials" in log.getvalue()
        assert b"first-token" not in log.getvalue()
        upstream.users = {USER: "second-token"}
        token.write_text("second-token")
        assert (await send(running))[-1].code == 250


def repeated(response: bytes) -> bytes:
    """What a server says that shows the command which it does not take, and what was in it."""
    shown = response.translate(bytes(max(32, octet) for octet in range(256)))
    return b"501 5.5.4 AUTH PLAIN %b? (%b)\r\n" % (base64.b64encode(response), shown)


@pytest.mark.parametrize("mechanism", ["PLAIN", "XOAUTH2"])
async def test_what_a_refusal_repeats_of_a_secret_is_not_logged(
    mechanism: str,
    token: Path,
    certificates: Certificates,
    trusting: dict[str, str],
    start: Any,
    log: io.BytesIO,
) -> None:
    if mechanism == "PLAIN":
        response, over = f"\0{USER}\0first-token".encode(), {"username": USER, "password": "first-token"}
    else:
        response, over = f"user={USER}\1auth=Bearer first-token\1\1".encode(), with_token(token)
    server = ScriptedUpstream(
        {"AUTH": repeated(response)}, tls=certificates.server(), users={USER: "x"}, mechanisms=[mechanism]
    )
    async with (
        server as upstream,
        start(upstream.port, upstream=over | {"tls": "starttls"} | trusting) as running,
    ):
        await is_refused(running, upstream, "auth")
    assert b"501 5.5.4 AUTH PLAIN ***? (" in log.getvalue()
    assert b"first-token" not in log.getvalue()
    assert base64.b64encode(response) not in log.getvalue()


async def test_what_a_refusal_repeats_of_a_clients_secret_is_not_logged(
    upstream: ScriptedUpstream, start: Any, log: io.BytesIO
) -> None:
    """The client, whose own it is, hears it as it was said."""
    response = b"\0ann\0sesame"
    upstream.users = {"ann": "another"}
    upstream.script = {"AUTH": repeated(response)}
    clients = {"auth": "passthrough", "auth_without_tls": True}
    async with start(upstream.port, clients=clients) as running, Client(running.port) as client:
        await client.ehlo()
        reply = await client.command(b"AUTH PLAIN " + base64.b64encode(response))
        assert reply.raw == repeated(response)
    assert b'"login refused"' in log.getvalue()
    assert b"sesame" not in log.getvalue()
    assert base64.b64encode(response) not in log.getvalue()


async def test_without_a_token_no_connection_is_opened(
    token: Path, trusting: dict[str, str], start: Any, upstream: ScriptedUpstream
) -> None:
    token.unlink()
    async with start(upstream.port, upstream=with_token(token, **trusting)) as running:
        await is_refused(running, upstream, "auth")
        assert upstream.connections == []


@pytest.mark.parametrize("reply", [b"334 \r\n", b"250 2.0.0 ok\r\n", b"354 go on\r\n"])
@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN", "CRAM-MD5"])
async def test_only_235_is_a_login(
    mechanism: str, reply: bytes, certificates: Certificates, trusting: dict[str, str], start: Any
) -> None:
    server = ScriptedUpstream(
        {"AUTH": reply}, tls=certificates.server(), users={USER: PASSWORD}, mechanisms=[mechanism]
    )
    async with server as upstream:
        over = {"tls": "starttls", **trusting, **LOGIN, "connect_timeout": "500ms"}
        async with start(upstream.port, upstream=over) as running:
            await is_refused(running, upstream, "auth")
