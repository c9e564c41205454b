"""`relay selftest` against listeners that run: a closed relay, one that lies about it, none at all."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trustme

from relay.selftest import Finding, selftest
from relay.selftest.machine import own_addresses
from relay.selftest.probes import probes
from tests.support.certificates import Certificates
from tests.support.process import ROOT, toml
from tests.support.script import Close
from tests.support.upstream import ScriptedUpstream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from relay.settings import Settings

CLOSED = {"allow": ["127.0.0.1/32", "::1/128"]}
"""On Linux 127.0.0.2 is this machine as well, and is nobody to this list."""
EVERYBODY = {"allow": ["127.0.0.0/8", "::1/128", *(f"{address}" for address in own_addresses())]}
PROBES = len(probes("relay.test", "127.0.0.1", "127.0.0.1"))
REFUSED = "550 5.7.1 Relaying is not allowed from this address"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is this machine on Linux only")


@pytest.fixture
def findings(settings_for: Callable[..., Settings]) -> Callable[..., Any]:
    """Return the self-test of a configuration whose listener is at this port."""

    async def run(port: int, *, listener: dict[str, Any] | None = None, **over: Any) -> list[Finding]:
        settings = settings_for(
            1, listeners=[{"address": f"127.0.0.1:{port}"} | (listener or {})], **({"clients": CLOSED} | over)
        )
        return await asyncio.to_thread(lambda: list(selftest(settings)))

    return run


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, str]:
    """Return `[tls]` with a certificate for relay.test."""
    issued = trustme.CA().issue_cert("relay.test")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    return {"cert": str(tmp_path / "cert.pem"), "key": str(tmp_path / "key.pem")}


def failed(found: list[Finding]) -> list[str]:
    return [finding.text for finding in found if finding.level == "failed"]


def texts(found: list[Finding]) -> str:
    return "\n".join(finding.text for finding in found)


async def command(config: Path, *options: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "relay", "selftest", "--config", str(config), *options,
        cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await asyncio.wait_for(process.communicate(), 30)
    return process.returncode or 0, out.decode(), err.decode()


def configuration(tmp_path: Path, port: int, **over: Any) -> Path:
    path = tmp_path / "selftest.toml"
    sections = {
        "server": {"hostname": "relay.test"},
        "clients": CLOSED,
        "listeners": [{"address": f"127.0.0.1:{port}"}],
        "upstreams": [{"address": "127.0.0.1:1", "tls": "none"}],
    }
    path.write_text(toml(sections | over))
    return path


# ------------------------------------------------------------------------------------------ the relay


async def test_a_closed_relay_passes_and_its_upstream_hears_nothing(
    start: Any, upstream: ScriptedUpstream, findings: Any
) -> None:
    async with start(upstream.port, clients=CLOSED) as running:
        found = await findings(running.port)

    assert failed(found) == []
    assert f"from 127.0.0.2: {PROBES} probes, all refused, mostly with: {REFUSED}" in texts(found)
    header = "from 127.0.0.2: a PROXY header that claims 127.0.0.1 is not believed"
    assert f"{header}: it says 554 5.5.1 This is an SMTP port; closing" in texts(found)
    assert "takes no password in clear: AUTH PLAIN is answered 502" in texts(found)
    assert "VRFY and EXPN tell nothing" in texts(found)
    assert upstream.messages == upstream.incomplete == []


async def test_it_needs_no_password_of_an_upstream(
    start: Any, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    async with start(upstream.port, clients=CLOSED) as running:
        config = configuration(
            tmp_path, running.port, upstreams=[{"address": "smtp.example.com:587", "username": "relay"}]
        )
        status, out, err = await command(config)

    assert (status, err) == (0, ""), out


async def test_it_says_that_an_allowed_source_proves_nothing(
    start: Any, upstream: ScriptedUpstream, findings: Any
) -> None:
    async with start(upstream.port, clients=EVERYBODY) as running:
        found = await findings(running.port, clients=EVERYBODY)

    assert failed(found) == []
    assert "may relay (clients.allow): what gets through from there says nothing about strangers" in texts(
        found
    )
    assert "NOT PROVEN: no address of this machine can play a stranger" in texts(found)
    assert "--script +smtp-open-relay HOST" in texts(found)
    assert "probes" not in texts(found)
    assert upstream.messages == []


async def test_a_relay_that_allows_more_than_its_file_says_is_found(
    start: Any, upstream: ScriptedUpstream, findings: Any
) -> None:
    async with start(upstream.port) as running:  # allows all of 127.0.0.0/8; the file that is tested does not
        found = await findings(running.port)

    (text, *_) = failed(found)
    assert text.startswith("OPEN RELAY: from 127.0.0.2 got through with ")
    assert "MAIL FROM:<selftest@example.org> | RCPT TO:<selftest@example.com>: 250" in text
    assert upstream.messages == []
    assert all(not message.content for message in upstream.incomplete)


@pytest.mark.parametrize("mode", ["starttls", "required", "implicit"])
async def test_a_closed_relay_with_tls_passes(
    start: Any, upstream: ScriptedUpstream, findings: Any, pair: dict[str, str], mode: str
) -> None:
    listener = {"tls": mode}
    listeners = [{"address": "127.0.0.1:0"} | listener]
    async with start(upstream.port, listeners=listeners, tls=pair, clients=CLOSED) as running:
        found = await findings(running.port, listener=listener, tls=pair)

    said = texts(found)
    assert failed(found) == []
    assert f"from 127.0.0.2, over TLS: {PROBES} probes, all refused, mostly with: {REFUSED}" in said
    assert (f"from 127.0.0.2: {PROBES} probes, all refused" in said) is (mode == "starttls")
    assert "over TLSv1.3: offers neither STARTTLS nor AUTH" in said
    assert "its certificate is for relay.test, until " in said
    assert ("in clear: offers STARTTLS" in said) is (mode != "implicit")
    assert ("MAIL before STARTTLS is answered 530 5.7.0" in said) is (mode == "required")
    assert ("a command behind STARTTLS in the same segment" in said) is (mode != "implicit")
    assert upstream.messages == upstream.incomplete == []


async def test_a_relay_that_asks_for_a_login_passes(
    start: Any, upstream: ScriptedUpstream, findings: Any, pair: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "users").write_text("")
    clients = {"auth": "users", "users_file": str(tmp_path / "users")}
    listener = {"tls": "starttls"}
    listeners = [{"address": "127.0.0.1:0"} | listener]
    async with start(upstream.port, listeners=listeners, tls=pair, clients=clients) as running:
        found = await findings(running.port, listener=listener, tls=pair, clients=clients)

    said = texts(found)
    assert failed(found) == []
    assert "others may relay with AUTH: users" in said
    assert "in clear: offers STARTTLS\n" in said
    assert "takes no password in clear: AUTH PLAIN is answered 538 5.7.11" in said
    assert "over TLSv1.3: offers AUTH " in said
    for where in ("from 127.0.0.1", "from 127.0.0.1, over TLS"):
        assert f"{where}: {PROBES} probes, all refused, mostly with: 530 5.7.0 Relaying needs AUTH" in said
    assert upstream.messages == upstream.incomplete == []


@pytest.mark.parametrize("mode", ["none", "required", "implicit"])
async def test_a_closed_relay_behind_a_proxy_passes(
    start: Any, upstream: ScriptedUpstream, findings: Any, pair: dict[str, str], mode: str
) -> None:
    clients = CLOSED | {"trusted_proxies": ["127.0.0.1/32"]}
    listener = {"proxy_protocol": True, "tls": mode}
    over = {"clients": clients, **({"tls": pair} if mode != "none" else {})}
    listeners = [{"address": "127.0.0.1:0"} | listener]
    async with start(upstream.port, listeners=listeners, **over) as running:
        found = await findings(running.port, listener=listener, **over)

    stranger = "from 203.0.113.77 by the proxy 127.0.0.1"
    assert failed(found) == []
    assert (
        f"{stranger}{', over TLS' * (mode != 'none')}: {PROBES} probes, all refused, mostly with: {REFUSED}"
        in texts(found)
    )
    assert "from 127.0.0.2: a PROXY header that claims 127.0.0.1 is not believed: " in texts(found)
    assert upstream.messages == upstream.incomplete == []


async def test_a_relay_at_a_unix_socket_passes(
    start: Any, upstream: ScriptedUpstream, settings_for: Any, tmp_path: Path
) -> None:
    listeners = [{"address": "127.0.0.1:0"}, {"address": f"unix:{tmp_path / 'relay.sock'}"}]
    settings = settings_for(1, listeners=listeners[1:])
    async with start(upstream.port, listeners=listeners):
        found = await asyncio.to_thread(lambda: list(selftest(settings)))

    assert failed(found) == []
    assert "who can open the socket may relay: its mode is 0" in texts(found)


async def test_a_relay_that_lets_nobody_in_is_not_called_closed(
    start: Any, upstream: ScriptedUpstream, findings: Any
) -> None:
    async with start(upstream.port, clients=CLOSED) as running:
        running.relay.reception.draining = True
        found = await findings(running.port)

    assert failed(found) == [
        "cannot be tested: it says 421 4.3.2 The relay is shutting down; closing; is the relay running?"
    ]


# ---------------------------------------------------------------------------------- what it must find


async def test_an_open_server_is_found(upstream: ScriptedUpstream, findings: Any) -> None:
    found = await findings(upstream.port)

    relays = [text for text in failed(found) if text.startswith("OPEN RELAY: from 127.0.0.2")]
    assert f"got through with {PROBES} of {PROBES} probes" in relays[0]
    assert "null reverse-path: MAIL FROM:<> | RCPT TO:<selftest@example.com>: 250" in relays[0]
    assert relays[0].endswith(f"; and {PROBES - 5} more")
    assert upstream.messages == []


@pytest.mark.parametrize(
    "name",
    [str(probe) for probe in probes("relay.test", "127.0.0.1", "127.0.0.1") if not probe.special],
)
async def test_each_probe_finds_the_server_that_falls_for_it_alone(
    upstream: ScriptedUpstream, findings: Any, name: str
) -> None:
    (probe,) = [p for p in probes("relay.test", "127.0.0.1", "127.0.0.1") if str(p) == name]
    mail, rcpt = f"MAIL FROM:{probe.sender}", f"RCPT TO:{probe.recipient}"
    falls: dict[str, bool] = {"mail": False}

    def on_mail(stage: str, line: bytes, connection: object) -> None:
        falls["mail"] = line.decode() == mail

    def on_rcpt(stage: str, line: bytes, connection: object) -> bytes | None:
        return None if falls["mail"] and line.decode() == rcpt else b"550 5.7.1 no relaying\r\n"

    upstream.script = {"MAIL": on_mail, "RCPT": on_rcpt}  # type: ignore[dict-item]
    (text,) = [text for text in failed(await findings(upstream.port)) if "from 127.0.0.2 got" in text]
    assert name in text


async def test_a_server_that_ends_each_session_early_is_asked_again(
    upstream: ScriptedUpstream, findings: Any
) -> None:
    upstream.script = {
        "MAIL": lambda _s, _l, connection: (
            b"550 5.7.1 no\r\n" if len(connection.commands) < 6 else Close(b"421 4.7.0 enough\r\n")
        )
    }  # type: ignore[dict-item]

    assert f"from 127.0.0.2: {PROBES} probes, all refused" in texts(await findings(upstream.port))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"550 5.7.1 not you\r\n", f"from 127.0.0.2: {PROBES} probes, all refused"),
        (
            b"451 4.7.1 not now\r\n",
            f"from 127.0.0.2: 1 of {PROBES} probes were not decided: EHLO as localhost",
        ),
    ],
    ids=["refused", "deferred"],
)
async def test_a_greeting_that_a_server_does_not_take(
    upstream: ScriptedUpstream, findings: Any, answer: bytes, said: str
) -> None:
    upstream.script = {
        "EHLO": lambda _s, line, _c: answer if b"localhost" in line else None,
        "MAIL": lambda *_: b"550 5.7.1 no\r\n",
    }  # type: ignore[dict-item]

    assert said in texts(await findings(upstream.port))


async def test_a_server_that_hangs_up_at_mail_is_undecided(upstream: ScriptedUpstream, findings: Any) -> None:
    upstream.script = {"MAIL": lambda *_: Close()}  # type: ignore[dict-item]

    said = texts(await findings(upstream.port))
    assert f"{PROBES} of {PROBES} probes were not decided" in said
    assert "it closes the connection" in said


async def test_a_server_that_only_defers_is_undecided(upstream: ScriptedUpstream, findings: Any) -> None:
    upstream.script = {"MAIL": lambda *_: b"451 4.7.1 try again later\r\n"}  # type: ignore[dict-item]

    assert f"{PROBES} of {PROBES} probes were not decided" in texts(await findings(upstream.port))


@pytest.mark.parametrize(("wanted", "level"), [(True, "note"), (False, "failed")])
async def test_a_server_that_takes_passwords_in_clear(findings: Any, wanted: bool, level: str) -> None:
    over = {"auth": "passthrough", "auth_without_tls": True} if wanted else {}
    async with ScriptedUpstream(users={"a": "b"}) as server:
        found = await findings(server.port, clients=CLOSED | over)

    (said,) = [finding for finding in found if finding.text.startswith("takes passwords in clear")]
    assert said.level == level


@contextlib.asynccontextmanager
async def credulous(greeting: bytes, refuse: bytes = b"nothing") -> AsyncIterator[tuple[int, list[bytes]]]:
    """A server that says yes to all but `refuse` and takes a PROXY header: its port, the lines it heard."""
    heard: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 " + greeting + b"\r\n")
        while line := await reader.readline():
            heard.append(line)
            if line.startswith(refuse):
                writer.write(b"550 5.7.1 no\r\n")
            elif line.startswith(b"AUTH "):
                writer.write(b"334 \r\n")
            elif not line.startswith(b"PROXY "):
                writer.write(b"250-yes\r\n250 STARTTLS\r\n")
        writer.close()

    async with await asyncio.start_server(talk, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1], heard


async def test_a_server_that_says_yes_to_all(findings: Any) -> None:
    async with credulous(b"relay.test ESMTP Python aiosmtpd 1.4") as (port, heard):
        said = texts([finding for finding in await findings(port) if finding.level == "failed"])

    assert "tells who has a mailbox: VRFY root: 250 yes\nSTARTTLS; VRFY postmaster:" in said
    assert "tells what it is made of: 220 relay.test ESMTP Python aiosmtpd 1.4" in said
    assert "in clear: offers STARTTLS" in said  # which the configuration does not say
    assert f"OPEN RELAY: from 127.0.0.2 got through with {PROBES} of {PROBES} probes" in said
    assert "OPEN RELAY: from 127.0.0.2: a PROXY header that claims 127.0.0.1 is believed" in said
    assert b"DATA\r\n" not in heard


async def test_nothing_listens(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    upstream.unlisten()
    status, out, err = await command(configuration(tmp_path, upstream.port))

    assert status == 1
    assert "failed  cannot be tested: Connection refused; is the relay running?" in out
    assert err == ""


async def test_what_is_no_smtp_server(findings: Any) -> None:
    async def web(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(web, "127.0.0.1", 0) as server:
        (text,) = failed(await findings(server.sockets[0].getsockname()[1]))
    assert text.startswith("cannot be tested: what it says is no reply")


async def test_a_port_that_is_chosen_anew_at_each_start(findings: Any) -> None:
    assert failed(await findings(0)) == [
        "port 0 is another one at each start: name the port to have it tested"
    ]


# ------------------------------------------------------------------------------------------------ TLS

PAIR = {"tls": {"cert": "unused.pem", "key": "unused.pem"}}
STRICT = {"MAIL": lambda _stage, _line, connection: None if connection.wire.secured else b"530 5.7.0 TLS\r\n"}


@pytest.mark.parametrize("mode", ["starttls", "required", "implicit"])
async def test_the_certificate_and_the_probes_under_tls(findings: Any, mode: str) -> None:
    tls = Certificates().server("relay.test")
    async with ScriptedUpstream(STRICT, tls=tls, implicit_tls=mode == "implicit") as server:  # type: ignore[arg-type]
        found = await findings(server.port, listener={"tls": mode}, **PAIR)

    said = texts(found)
    assert "its certificate is for relay.test, until " in said
    assert "over TLSv1.3: offers neither STARTTLS nor AUTH" in said
    relays = [text for text in failed(found) if text.startswith("OPEN RELAY: from 127.0.0.2, over TLS")]
    assert f"got through with {PROBES} of {PROBES} probes" in relays[0]
    assert ("MAIL before STARTTLS is answered 530 5.7.0 TLS" in said) is (mode == "required")
    assert ("a command behind STARTTLS in the same segment is thrown away" in said) is (mode != "implicit")
    assert [f.level for f in found if f.text.startswith("in clear: offers STARTTLS")] == ["ok"] * (
        mode != "implicit"
    )


async def test_an_expired_certificate(findings: Any) -> None:
    tls = Certificates().server("relay.test", expired=True)
    async with ScriptedUpstream(tls=tls, implicit_tls=True) as server:
        found = await findings(server.port, listener={"tls": "implicit"}, **PAIR)

    assert "its certificate has expired" in failed(found)


@pytest.mark.parametrize(
    ("dates", "said"),
    [
        ({"not_after": datetime.now(UTC) + timedelta(days=5.9)}, ": 6 days left"),
        (
            {"not_before": datetime.now(UTC) + timedelta(days=2)},
            "cannot be used: certificate is not yet valid",
        ),
    ],
    ids=["ends soon", "not yet valid"],
)
async def test_a_certificate_that_is_worth_a_note(findings: Any, dates: dict[str, Any], said: str) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("relay.test", **dates).configure_cert(tls)
    async with ScriptedUpstream(tls=tls, implicit_tls=True) as server:
        found = await findings(server.port, listener={"tls": "implicit"}, **PAIR)

    (note,) = [finding for finding in found if "its certificate" in finding.text]
    assert note.level == "note"
    assert said in note.text


async def test_a_server_that_hangs_up_behind_starttls(findings: Any) -> None:
    script = {"STARTTLS": lambda _s, line, _c: Close(b"554 5.5.0 out of step\r\n")}
    async with ScriptedUpstream(script, tls=Certificates().server("relay.test")) as server:  # type: ignore[arg-type]
        found = await findings(server.port, listener={"tls": "starttls"}, **PAIR)

    assert "a command behind STARTTLS in the same segment ends it: 554 5.5.0 out of step" in texts(found)
    assert failed(found)[-1] == "cannot be tested: it says 554 5.5.0 out of step; is the relay running?"


async def test_a_server_whose_handshake_fails_behind_an_injected_command(findings: Any) -> None:
    script = {"STARTTLS": lambda _s, line, _c: Close(b"220 go\r\n")}
    async with ScriptedUpstream(script, tls=Certificates().server("relay.test")) as server:  # type: ignore[arg-type]
        found = await findings(server.port, listener={"tls": "starttls"}, **PAIR)

    assert "a command behind STARTTLS in the same segment ends the connection" in texts(found)


async def test_tls_that_is_configured_and_not_offered(upstream: ScriptedUpstream, findings: Any) -> None:
    found = await findings(upstream.port, listener={"tls": "required"}, **PAIR)

    assert "in clear: offers neither STARTTLS nor AUTH" in failed(found)
    assert "MAIL before STARTTLS is answered 250 2.1.0 ok" in texts(found)
    assert failed(found)[-1].startswith("cannot be tested: it says 5")


async def test_a_command_that_was_injected_before_tls_is_found(findings: Any) -> None:
    """The server reads ahead and keeps what it has read, as many did."""
    context = Certificates().server("relay.test")

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        kept = b""
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            writer.write(b"220 relay.test\r\n")
            while octets := await reader.read(4096):
                for line in (kept + octets).splitlines():
                    kept = b""
                    if line == b"STARTTLS":
                        writer.write(b"220 go\r\n")
                        kept = octets.partition(b"STARTTLS\r\n")[2]
                        await writer.start_tls(context)
                        if kept:
                            writer.write(b"500 what?\r\n")
                        break
                    writer.write(
                        b"250-relay.test\r\n250 STARTTLS\r\n" if line[:4] == b"EHLO" else b"550 no\r\n"
                    )
        writer.close()

    async with await asyncio.start_server(talk, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        found = await findings(port, listener={"tls": "starttls"}, **PAIR)

    assert "a command behind STARTTLS in the same segment is obeyed: 500 what?" in failed(found)


# ---------------------------------------------------------------------------- PROXY headers, unix sockets


async def test_a_trusted_proxy_tells_of_a_stranger(findings: Any) -> None:
    clients = CLOSED | {"trusted_proxies": ["127.0.0.1/32"]}
    async with credulous(b"relay.test") as (port, heard):
        found = await findings(port, listener={"proxy_protocol": True}, clients=clients)

    stranger = "from 203.0.113.77 by the proxy 127.0.0.1"
    assert f"OPEN RELAY: {stranger} got through with {PROBES} of {PROBES} probes" in texts(found)
    assert "OPEN RELAY: from 127.0.0.2: a PROXY header that claims 127.0.0.1 is believed" in texts(found)
    headers = {line for line in heard if line.startswith(b"PROXY")}
    assert headers == {
        b"PROXY TCP4 203.0.113.77 192.0.2.25 50000 25\r\n",
        b"PROXY TCP4 127.0.0.1 192.0.2.25 50000 25\r\n",
    }


async def test_a_header_that_is_read_and_not_believed(findings: Any) -> None:
    async with credulous(b"relay.test", refuse=b"MAIL") as (port, _):
        found = await findings(port)

    header = "from 127.0.0.2: a PROXY header that claims 127.0.0.1 is not believed"
    assert f"{header}: 550 5.7.1 no" in texts(found)


async def test_where_no_proxy_is_trusted_here_only_the_forged_header_is_tried(findings: Any) -> None:
    clients = CLOSED | {"trusted_proxies": ["198.51.100.1/32"]}
    async with credulous(b"relay.test") as (port, _):
        found = await findings(port, listener={"proxy_protocol": True}, clients=clients)

    assert "no address of this machine is in clients.trusted_proxies" in texts(found)
    assert "NOT PROVEN" in texts(found)
    assert failed(found) == [
        "OPEN RELAY: from 127.0.0.1: a PROXY header that claims 127.0.0.1 is believed: 250 yes\nSTARTTLS"
    ]


async def test_a_unix_socket_is_as_open_as_its_file(tmp_path: Path, findings: Any, settings_for: Any) -> None:
    path = tmp_path / "relay.sock"
    settings = settings_for(1, listeners=[{"address": f"unix:{path}"}])

    def run() -> list[Finding]:
        return list(selftest(settings))

    gone = "cannot be tested: No such file or directory; is the relay running?"
    assert failed(await asyncio.to_thread(run)) == [gone]
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(path))
    refused = "cannot be tested: Connection refused; is the relay running?"
    assert failed(await asyncio.to_thread(run)) == [refused]
    path.unlink()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 relay.test\r\n")
        while line := await reader.readline():
            writer.write(b"250 relay.test\r\n" if line[:4] == b"EHLO" else b"502 5.5.1 no\r\n")
        writer.close()

    async with await asyncio.start_unix_server(talk, path):
        path.chmod(0o660)
        found = await asyncio.to_thread(run)
    assert failed(found) == []
    assert "who can open the socket may relay: its mode is 0660" in texts(found)
    assert "takes no password in clear: AUTH PLAIN is answered 502 5.5.1 no" in texts(found)


# ---------------------------------------------------------------------------------- the configuration


async def test_what_the_configuration_says_by_itself(
    findings: Any, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(
        "relay.selftest.machine.socket.getaddrinfo", nowhere
    )  # no test asks the network's DNS
    found = await findings(
        upstream.port,
        listener={"address": "relay.invalid:2525"},
        clients={"allow": ["192.0.2.0/24", "10.0.0.0/8"]},
    )

    said = texts(found)
    assert (
        "256 public IPv4 addresses may relay without AUTH: clients.allow is 192.0.2.0/24, 10.0.0.0/8" in said
    )
    assert "listener relay.invalid:2525 has no TLS: who is in between can read the mail" in said
    assert failed(found) == ["relay.invalid has no address: Name or service not known"]


async def test_a_listener_at_every_address_is_met_at_each(start: Any, findings: Any) -> None:
    async with ScriptedUpstream() as upstream:
        listeners = [{"address": "0.0.0.0:0"}]
        async with start(upstream.port, listeners=listeners, clients=CLOSED) as running:
            address = f"0.0.0.0:{running.port}"
            found = await findings(running.port, listener={"address": address})

    assert failed(found) == []
    own = [f"{address} at {target}" for target in ("127.0.0.1", *own_addresses()) if ":" not in target]
    assert list(dict.fromkeys(finding.where for finding in found)) == ["configuration", *own]


async def test_where_nobody_is_allowed_without_auth_everybody_is_a_stranger(
    upstream: ScriptedUpstream, findings: Any
) -> None:
    clients = {"auth": "passthrough", "auth_without_tls": True}
    found = await findings(upstream.port, clients=clients)

    said = texts(found)
    assert "no public address may relay without AUTH: clients.allow is nobody" in said
    assert "others may relay with AUTH: passthrough" in said
    assert f"OPEN RELAY: from 127.0.0.1 got through with {PROBES} of {PROBES} probes" in said


# ------------------------------------------------------------------------------------------- the command


async def test_the_command_on_a_closed_relay(start: Any, upstream: ScriptedUpstream, tmp_path: Path) -> None:
    async with start(upstream.port, clients=CLOSED) as running:
        config = configuration(tmp_path, running.port)
        text, as_json = await asyncio.gather(command(config), command(config, "--format", "json"))

    status, out, err = text
    assert (status, err) == (0, "")
    assert f"  ok      from 127.0.0.2: {PROBES} probes, all refused, mostly with: {REFUSED}\n" in out
    assert out.splitlines()[-1].endswith(" 0 failed")
    status, out, err = as_json
    assert (status, err) == (0, "")
    levels = {finding["level"] for finding in json.loads(out)}
    assert levels == {"ok", "note"}


async def test_the_command_on_an_open_server(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    config = configuration(tmp_path, upstream.port)
    text, as_json = await asyncio.gather(command(config), command(config, "--format", "json"))

    assert text[0] == as_json[0] == 1
    assert "  failed  OPEN RELAY: from 127.0.0.2 got through" in text[1]
    assert "failed" in {finding["level"] for finding in json.loads(as_json[1])}


async def test_a_configuration_that_cannot_be_used(tmp_path: Path) -> None:
    status, out, err = await command(configuration(tmp_path, 1, clients={"allow": ["0.0.0.0/0"]}))

    assert (status, out) == (2, "")
    assert "would be an open relay" in err
