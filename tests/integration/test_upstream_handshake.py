"""TLS and AUTH with the upstream: what is asked for is had or nothing is sent; credentials go out once."""

from __future__ import annotations

import asyncio
import base64
import io
from typing import TYPE_CHECKING, Any

import pytest

from relay import maillog
from tests.support.certificates import Certificates
from tests.support.client import Client
from tests.support.upstream import EXTENSIONS, ScriptedUpstream
from tests.support.watch import counted

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


# TLS


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
        running.relay.pool.sweep(asyncio.get_running_loop().time() + 61)
        await upstream.wait_for(lambda: not upstream.open_connections)
        assert upstream.connections[0].lines[-1] == b"QUIT"
    assert upstream.violations == []
    assert [record for record in caplog.records if record.name == "asyncio"] == []


async def test_opportunistic_goes_on_without_tls_where_none_is_offered(
    trusting: dict[str, str], start: Any, upstream: ScriptedUpstream
) -> None:
    async with start(upstream.port, upstream={"tls": "opportunistic", **trusting}) as running:
        await passes(running, upstream)


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


async def test_octets_smuggled_in_before_tls_answer_nothing_within(
    certificates: Certificates, trusting: dict[str, str], start: Any
) -> None:
    """What comes in clear behind the 220 must not count as said within TLS (RFC 3207 section 4.2)."""
    async with (
        ScriptedUpstream(tls=certificates.server()) as upstream,
        start_smuggled(start, upstream, trusting) as running,
    ):
        await passes(running, upstream)
        assert "XSMUGGLED" not in running.relay.pool.capabilities
        assert "SMTPUTF8" in running.relay.pool.capabilities


def start_smuggled(start: Any, upstream: ScriptedUpstream, trusting: dict[str, str]) -> Any:
    upstream.script = {"STARTTLS": b"220 2.0.0 go ahead\r\n250-upstream.test\r\n250 XSMUGGLED\r\n"}
    return start(upstream.port, upstream={"tls": "starttls", **trusting})


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
