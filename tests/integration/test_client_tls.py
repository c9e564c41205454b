"""TLS for clients: the modes of a listener, what came in clear, renewal of the certificate, other sockets."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import ssl
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from cryptography import x509

from relay.session.session import Session
from tests.support.certificates import Certificates
from tests.support.client import Client
from tests.support.upstream import ScriptedUpstream
from tests.support.watch import eventually, nothing_left

if TYPE_CHECKING:
    from pathlib import Path

MESSAGE = b"Subject: over TLS\r\n\r\nHello\r\n"
MODES = ("none", "starttls", "required", "implicit")


@pytest.fixture(scope="module")
def authority() -> Certificates:
    return Certificates()


@pytest.fixture
def tls(authority: Certificates, tmp_path: Path) -> dict[str, str]:
    cert, key = authority.write_server(tmp_path)
    return {"cert": str(cert), "key": str(key)}


def listeners(*modes: str) -> list[dict[str, Any]]:
    return [{"address": "127.0.0.1:0", "tls": mode} for mode in modes]


def ports(running: Any) -> list[int]:
    return [int(address.rpartition(":")[2]) for address in running.relay.reception.addresses]


async def test_starttls_is_offered_and_a_message_goes_through(
    start: Any, upstream: ScriptedUpstream, authority: Certificates, tls: dict[str, str]
) -> None:
    async with (
        start(upstream.port, listeners=listeners("starttls"), tls=tls) as running,
        Client(running.port) as client,
    ):
        await client.ehlo()
        assert "STARTTLS" in client.extensions
        await client.starttls(authority.client())
        await client.ehlo()
        assert "STARTTLS" not in client.extensions
        replies = await client.message("a@example.com", ["b@example.org"], MESSAGE)
        assert [reply.code for reply in replies] == [250, 250, 354, 250]
        assert (await upstream.message()).content == MESSAGE
        assert len(running.rows()) == 1


async def test_mail_goes_through_in_clear_where_tls_is_only_offered(
    start: Any, upstream: ScriptedUpstream, tls: dict[str, str]
) -> None:
    async with (
        start(upstream.port, listeners=listeners("starttls"), tls=tls) as running,
        Client(running.port) as client,
    ):
        await client.ehlo()
        assert (await client.message("a@example.com", ["b@example.org"], MESSAGE))[-1].code == 250


async def test_implicit_tls_from_the_first_octet(
    start: Any, upstream: ScriptedUpstream, authority: Certificates, tls: dict[str, str]
) -> None:
    async with start(upstream.port, listeners=listeners("implicit"), tls=tls) as running:
        client = await Client.connect(running.port, tls=authority.client())
        async with contextlib.aclosing(_Closing(client)):
            await client.ehlo()
            assert "STARTTLS" not in client.extensions
            assert (await client.message("a@example.com", ["b@example.org"], MESSAGE))[-1].code == 250
            assert (await client.command("STARTTLS")).code == 503


class _Closing:
    def __init__(self, client: Client) -> None:
        self._client = client

    async def aclose(self) -> None:
        await self._client.__aexit__(None, None, None)


async def test_required_takes_nothing_before_tls_but_what_leads_to_it(
    start: Any, upstream: ScriptedUpstream, authority: Certificates, tls: dict[str, str]
) -> None:
    async with (
        start(upstream.port, listeners=listeners("required"), tls=tls) as running,
        Client(running.port) as client,
    ):
        await client.greeting()
        for line in ("MAIL FROM:<a@example.com>", "HELO client.test", "RSET", "VRFY a", "AUTH PLAIN AAA="):
            reply = await client.command(line, 530)
            assert reply.lines[0].startswith("5.7.0 ")
        await client.command("NOOP", 250)
        await client.ehlo()
        assert "STARTTLS" in client.extensions
        await client.command("MAIL FROM:<a@example.com>", 530)
        await client.starttls(authority.client())
        await client.command("MAIL FROM:<a@example.com>", 503)
        await client.ehlo()
        assert (await client.message("a@example.com", ["b@example.org"], MESSAGE))[-1].code == 250
    assert len(upstream.accepted) == 1


async def test_starttls_is_answered_by_the_state(
    start: Any, upstream: ScriptedUpstream, authority: Certificates, tls: dict[str, str]
) -> None:
    async with start(upstream.port, listeners=listeners("none", "starttls"), tls=tls) as running:
        without, offered = ports(running)
        async with Client(without) as client:
            await client.ehlo()
            assert "STARTTLS" not in client.extensions
            await client.command("STARTTLS", 502)
        async with Client(offered) as client:
            await client.ehlo()
            await client.command("STARTTLS now", 501)
            await client.command("MAIL FROM:<a@example.com>", 250)
            await client.command("STARTTLS", 503)
            await client.command("RSET", 250)
            await client.starttls(authority.client())
            await client.command("STARTTLS", 503)


@pytest.mark.parametrize("mode", ["starttls", "implicit"])
async def test_what_is_sent_inside_tls_at_once_is_not_lost(
    start: Any, upstream: ScriptedUpstream, authority: Certificates, tls: dict[str, str], mode: str
) -> None:
    """A client's first commands can come in one segment with the end of its handshake."""
    async with start(upstream.port, listeners=listeners(mode), tls=tls) as running:
        reader, writer = await _before_the_handshake(running.port, mode)
        said = await _handshake_with(reader, writer, authority.client(), b"EHLO client.test\r\nNOOP\r\n")
        writer.close()
        assert said.count(b"250 ") == 2
        assert said.rstrip().endswith(b"250 2.0.0 OK")


@pytest.mark.parametrize("mode", ["starttls", "implicit"])
async def test_who_leaves_with_the_end_of_the_handshake_is_nothing_to_warn_of(
    start: Any,
    upstream: ScriptedUpstream,
    authority: Certificates,
    tls: dict[str, str],
    mode: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As a health check does."""
    async with start(upstream.port, listeners=listeners(mode), tls=tls) as running:
        reader, writer = await _before_the_handshake(running.port, mode)
        shaken = await _shake_hands(reader, writer, authority.client())
        with contextlib.suppress(ssl.SSLWantReadError):
            shaken.tls.unwrap()
        writer.write(shaken.outgoing.read())
        await asyncio.wait_for(reader.read(), 10)
        writer.close()
        await eventually(lambda: running.metric("client_sessions") == 0)
    assert [record.message for record in caplog.records if record.name == "asyncio"] == []


async def _before_the_handshake(port: int, mode: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect; return the streams where the client's handshake comes next."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    if mode == "starttls":
        await reader.readline()
        writer.write(b"STARTTLS\r\n")
        await reader.readline()
    return reader, writer


class _Shaken(NamedTuple):
    tls: ssl.SSLObject
    incoming: ssl.MemoryBIO
    outgoing: ssl.MemoryBIO
    """Not sent yet: the end of the client's handshake."""


async def _shake_hands(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, context: ssl.SSLContext
) -> _Shaken:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    while True:
        try:
            tls.do_handshake()
        except ssl.SSLWantReadError:
            writer.write(outgoing.read())
            incoming.write(await reader.read(65536))
        else:
            return _Shaken(tls, incoming, outgoing)


async def _handshake_with(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, context: ssl.SSLContext, octets: bytes
) -> bytes:
    """Shake hands, send `octets` in one write with the end of the handshake; return what is said to them."""
    tls, incoming, outgoing = await _shake_hands(reader, writer, context)
    tls.write(octets)
    writer.write(outgoing.read())
    said = b""
    while not said.endswith(b"OK\r\n"):
        incoming.write(await asyncio.wait_for(reader.read(65536), 10))
        with contextlib.suppress(ssl.SSLWantReadError):
            while part := tls.read(65536):
                said += part
    return said


@pytest.mark.parametrize("together", [True, False], ids=["one segment", "two segments"])
async def test_what_came_in_clear_behind_starttls_never_counts(
    start: Any, upstream: ScriptedUpstream, authority: Certificates, tls: dict[str, str], together: bool
) -> None:
    async with (
        start(upstream.port, listeners=listeners("starttls"), tls=tls) as running,
        Client(running.port) as client,
    ):
        await client.ehlo()
        injected = b"EHLO evil\r\nMAIL FROM:<evil@example.com>\r\nRCPT TO:<victim@example.org>\r\n"
        if together:
            await client.send(b"STARTTLS\r\n" + injected)
            assert (await client.reply()).code == 554
        else:
            await client.command("STARTTLS", 220)
            await client.send(injected)
        with pytest.raises((ConnectionError, ValueError)):  # closed; a TLS alert may come first
            await client.reply()
    assert not any("MAIL" in line for line in upstream.transcript().splitlines())


async def test_a_handshake_that_fails_ends_the_session_and_is_counted(
    start: Any, upstream: ScriptedUpstream, tls: dict[str, str]
) -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname = False
    old.verify_mode = ssl.CERT_NONE
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        old.minimum_version = ssl.TLSVersion.TLSv1
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    old.set_ciphers("ALL:@SECLEVEL=0")
    async with start(upstream.port, listeners=listeners("starttls", "implicit"), tls=tls) as running:
        offered, implicit = ports(running)
        async with Client(offered) as client:
            await client.ehlo()
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await client.starttls(old)
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await Client.connect(implicit, tls=old)
        async with Client(implicit) as client:
            await client.send(b"EHLO in.clear\r\n")
            with pytest.raises((ConnectionError, ValueError)):
                await client.reply()
        async with Client(offered) as client:  # gone in the middle of the handshake
            await client.ehlo()
            await client.command("STARTTLS", 220)
            await client.send(b"\x16\x03\x01\x02\x00\x01")
        await _until(lambda: running.metric("client_sessions") == 0)
        assert running.metric("client_rejects_total", reason="tls") == 4
        async with Client(offered) as client:
            await client.ehlo()


async def _until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def test_no_message_without_its_end_inside_tls(
    start: Any, upstream: ScriptedUpstream, authority: Certificates, tls: dict[str, str]
) -> None:
    """The end of data in clear, behind an orderly end of TLS, is no end of data."""
    async with start(upstream.port, listeners=listeners("starttls"), tls=tls) as running:
        raw = socket.create_connection(("127.0.0.1", running.port))
        await asyncio.to_thread(_end_in_clear, raw, authority.client())
        await _until(lambda: running.metric("client_sessions") == 0)
        assert running.rows() == []
    assert upstream.accepted == []


def _end_in_clear(raw: socket.socket, context: ssl.SSLContext) -> None:
    raw.recv(4096)
    raw.sendall(b"STARTTLS\r\n")
    raw.recv(4096)
    secured = context.wrap_socket(raw, server_hostname="localhost")
    for line in (
        b"EHLO c\r\n",
        b"MAIL FROM:<a@example.com>\r\n",
        b"RCPT TO:<b@example.org>\r\n",
        b"DATA\r\n",
    ):
        secured.sendall(line)
        secured.recv(4096)
    secured.sendall(b"Subject: half\r\n\r\nhalf")
    with contextlib.suppress(OSError):
        raw = secured.unwrap()
        raw.sendall(b"\r\n.\r\n")
    raw.close()


# The certificate


def _serial(port: int, context: ssl.SSLContext) -> int:
    with (
        socket.create_connection(("127.0.0.1", port)) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as secured,
    ):
        return x509.load_der_x509_certificate(secured.getpeercert(binary_form=True) or b"").serial_number


async def test_a_new_certificate_is_taken_and_no_session_is_dropped(
    start: Any, upstream: ScriptedUpstream, authority: Certificates, tls: dict[str, str], tmp_path: Path
) -> None:
    async with start(upstream.port, listeners=listeners("implicit"), tls=tls) as running:
        relay, context = running.relay, authority.client()
        expiry = running.metric("certificate_expiry_timestamp_seconds")
        assert 29 < (expiry - time.time()) / 86400 < 31
        first = await asyncio.to_thread(_serial, running.port, context)
        client = await Client.connect(running.port, tls=context)
        async with contextlib.aclosing(_Closing(client)):
            await client.ehlo()
            authority.write_server(tmp_path, days=90)
            relay.reread()
            assert await asyncio.to_thread(_serial, running.port, context) != first
            assert 89 < (running.metric("certificate_expiry_timestamp_seconds") - time.time()) / 86400 < 91
            assert (await client.message("a@example.com", ["b@example.org"], MESSAGE))[-1].code == 250


async def test_a_bad_pair_changes_nothing(
    start: Any, upstream: ScriptedUpstream, authority: Certificates, tls: dict[str, str], tmp_path: Path
) -> None:
    async with start(upstream.port, listeners=listeners("implicit"), tls=tls) as running:
        context = authority.client()
        first = await asyncio.to_thread(_serial, running.port, context)
        good = (tmp_path / "key.pem").read_bytes()
        (tmp_path / "key.pem").write_bytes(b"no key\n")
        running.relay.reread()
        assert await asyncio.to_thread(_serial, running.port, context) == first
        (tmp_path / "key.pem").unlink()
        running.relay.reread()
        assert await asyncio.to_thread(_serial, running.port, context) == first
        (tmp_path / "key.pem").write_bytes(good)
        running.relay.reread()
        assert await asyncio.to_thread(_serial, running.port, context) == first


async def test_a_pair_that_becomes_good_without_a_new_time_is_taken(
    start: Any, upstream: ScriptedUpstream, authority: Certificates, tls: dict[str, str], tmp_path: Path
) -> None:
    """As by chown, where root has written a key that the relay could not read yet."""
    key = tmp_path / "key.pem"
    async with start(upstream.port, listeners=listeners("implicit"), tls=tls) as running:
        context = authority.client()
        first = await asyncio.to_thread(_serial, running.port, context)
        authority.write_server(tmp_path)
        good, written = key.read_bytes(), key.stat().st_mtime_ns
        key.write_bytes(bytes(len(good)))
        os.utime(key, ns=(written, written))
        running.relay.reread()
        assert await asyncio.to_thread(_serial, running.port, context) == first
        key.write_bytes(good)
        os.utime(key, ns=(written, written))
        running.relay.reread()
        assert await asyncio.to_thread(_serial, running.port, context) != first


async def test_a_pair_that_could_not_be_read_is_read_again(
    start: Any,
    upstream: ScriptedUpstream,
    authority: Certificates,
    tls: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with start(upstream.port, listeners=listeners("implicit"), tls=tls) as running:
        context = authority.client()
        first = await asyncio.to_thread(_serial, running.port, context)
        authority.write_server(tmp_path)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            running.relay.reread()
            running.relay.reread()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert await asyncio.to_thread(_serial, running.port, context) == first
        running.relay.reread()
        assert await asyncio.to_thread(_serial, running.port, context) != first
    assert capsys.readouterr().out.count("certificate refused") == 1


# Several listeners, other sockets


async def test_every_mode_beside_the_others(
    start: Any, upstream: ScriptedUpstream, authority: Certificates, tls: dict[str, str]
) -> None:
    async with start(upstream.port, listeners=listeners(*MODES), tls=tls) as running:
        for mode, port in zip(MODES, ports(running), strict=True):
            client = await Client.connect(port, tls=authority.client() if mode == "implicit" else None)
            async with contextlib.aclosing(_Closing(client)):
                await client.ehlo()
                if "STARTTLS" in client.extensions:
                    await client.starttls(authority.client())
                    await client.ehlo()
                assert (await client.message("a@example.com", ["b@example.org"], MESSAGE))[-1].code == 250
    assert len(upstream.accepted) == len(MODES)


async def test_a_unix_socket(start: Any, upstream: ScriptedUpstream, tmp_path: Path) -> None:
    path = tmp_path / "relay.sock"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    async with start(upstream.port, listeners=[{"address": f"unix:{path}"}]) as running:
        assert running.relay.reception.addresses == [f"unix:{path}"]
        assert path.stat().st_mode & 0o777 == 0o660
        reader, writer = await asyncio.open_unix_connection(str(path))
        writer.write(b"EHLO c\r\nMAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.org>\r\nDATA\r\n")
        while not (await asyncio.wait_for(reader.readline(), 10)).startswith(b"354"):
            pass
        writer.write(MESSAGE + b".\r\n")
        assert (await asyncio.wait_for(reader.readline(), 10)).startswith(b"250")
        writer.close()
        assert running.rows()[0]["client"] == "unix"
    assert not path.exists()


async def test_a_unix_socket_never_takes_the_place_of_something_else(
    start: Any, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    path = tmp_path / "relay.sock"
    path.write_text("mine")
    with pytest.raises(Exception, match="a file that is no socket stands there"):
        async with start(upstream.port, listeners=[{"address": f"unix:{path}"}]):
            pass
    assert path.read_text() == "mine"
    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(Exception, match="somebody listens there already"):
            async with start(upstream.port, listeners=[{"address": f"unix:{path}"}]):
                pass


async def test_ipv6(start: Any, upstream: ScriptedUpstream) -> None:
    async with start(upstream.port, listeners=[{"address": "[::1]:0"}]) as running:
        async with Client(running.port, host="::1") as client:
            await client.ehlo()
            assert (await client.message("a@example.com", ["b@example.org"], MESSAGE))[-1].code == 250
        assert running.rows()[0]["client"] == "::1"


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_client_that_goes_before_tls_begins_leaves_no_handshake_behind(
    loop: str, start: Any, tls: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """TLS does not hear of it: it would wait until that is thrown away, which is logged as a defect."""

    def secure(self: Session, received: bytes = b"", *, original: Any = Session.secure) -> None:
        original(self, received)
        self.cut()  # as when the client's RST is found just now

    async def come() -> None:
        async with (
            ScriptedUpstream() as upstream,
            start(upstream.port, listeners=listeners("implicit"), tls=tls) as running,
        ):
            async with Client(running.port) as client:
                await client.expect_closed()
            await nothing_left(running)
            await eventually(lambda: not any("_secure" in repr(task) for task in asyncio.all_tasks()))
            assert running.metric("client_rejects_total", reason="tls") == 1

    monkeypatch.setattr(Session, "secure", secure)
    factory = asyncio.new_event_loop if loop == "asyncio" else pytest.importorskip("uvloop").new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(come())
