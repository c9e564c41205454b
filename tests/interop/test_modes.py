"""Mail clients, unmodified, through every mode of a listener: clear, STARTTLS, implicit TLS, with logins.

Each logs in with the user name and the password that an application has; the relay knows them from its own
file, or asks the upstream. A wrong password gets nothing through, and the client is told so.
"""

from __future__ import annotations

import asyncio
import io
import json
import smtplib
import ssl
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from relay.auth import guard
from relay.cli import main
from relay.session import doorkeeper
from tests.interop.peers import AS_ROOT, NODEMAILER, command, needs, run
from tests.interop.postfix_client import sending_postfix, submit
from tests.support.certificates import Certificates
from tests.support.upstream import ScriptedUpstream

USER, PASSWORD = "app@example.test", "sesame street 1"
SENDER, RECIPIENT = "app@example.test", "first@example.org"
MESSAGE = b"Subject: every mode\r\nX-Task-Type: mode\r\n\r\nHello\r\n.dot\r\n"
MODES = ("none", "starttls", "required", "implicit")


@dataclass(frozen=True)
class Way:
    """Where a client is to send, and how."""

    port: int
    mode: str
    authority: Path
    password: str | None

    @property
    def starttls(self) -> bool:
        return self.mode in ("starttls", "required")

    @property
    def url(self) -> str:
        return f"smtp{'s' if self.mode == 'implicit' else ''}://127.0.0.1:{self.port}"


Said = tuple[bool, str]
"""Whether the client says that the mail is on its way, and all that it shows."""


@pytest.fixture(scope="module")
def authority() -> Certificates:
    return Certificates()


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long a refusal is delayed is shown where the clock is a test's."""
    monkeypatch.setattr(guard, "MAX_DELAY_S", 0.0)
    monkeypatch.setattr(doorkeeper, "MAX_DELAY_S", 0.0)


async def _smtplib(way: Way) -> Said:
    return await asyncio.to_thread(_smtplib_blocking, way)


def _smtplib_blocking(way: Way) -> Said:
    context = ssl.create_default_context(cafile=str(way.authority))
    kind = smtplib.SMTP_SSL if way.mode == "implicit" else smtplib.SMTP
    options = {"context": context} if way.mode == "implicit" else {}
    try:
        with kind("127.0.0.1", way.port, timeout=30, **options) as client:  # type: ignore[arg-type]
            if way.starttls:
                client.starttls(context=context)
            if way.password is not None:
                client.login(USER, way.password)
            client.sendmail(SENDER, [RECIPIENT], MESSAGE)
    except smtplib.SMTPException as error:
        return False, str(error)
    return True, ""


async def _swaks(way: Way, *more: str) -> Said:
    tls = {"implicit": ["--tls-on-connect"], "none": []}.get(way.mode, ["--tls"])
    check = ["--tls-verify", "--tls-ca-path", str(way.authority)] if tls else []
    login = ["--auth-user", USER, "--auth-password", way.password] if way.password is not None else []
    login = [*login, "--auth", *(more or ("PLAIN",))[:1]] if login else []
    ended = await run(
        [
            *(command("swaks"), "--server", f"127.0.0.1:{way.port}", "--from", SENDER, "--to", RECIPIENT),
            *tls,
            *check,
            *login,
            *more[1:],
            *("--data", "-"),
        ],
        MESSAGE.replace(b"\r\n", b"\n"),
    )
    return ended.status == 0, ended.said


async def _swaks_login(way: Way) -> Said:
    return await _swaks(way, "LOGIN", "--pipeline")


async def _msmtp(way: Way) -> Said:
    tls = {"none": ["--tls=off"], "implicit": ["--tls=on", "--tls-starttls=off"]}
    login = [f"--user={USER}", f"--passwordeval=printf %s '{way.password}'", "--auth=plain"]
    ended = await run(
        [
            *(command("msmtp"), "--host=127.0.0.1", f"--port={way.port}", f"--from={SENDER}"),
            *tls.get(way.mode, ["--tls=on", "--tls-starttls=on"]),
            *([] if way.mode == "none" else [f"--tls-trust-file={way.authority}"]),
            *([] if way.password is None else login),
            RECIPIENT,
        ],
        MESSAGE.replace(b"\r\n", b"\n"),
    )
    return ended.status == 0, ended.said


async def _curl(way: Way) -> Said:
    ended = await run(
        [
            *(command("curl"), "--silent", "--show-error", "--verbose", "--url", way.url),
            *(["--ssl-reqd"] if way.mode != "none" else []),
            *("--cacert", str(way.authority), "--mail-from", SENDER, "--mail-rcpt", RECIPIENT),
            *([] if way.password is None else ["--user", f"{USER}:{way.password}"]),
            *("--upload-file", "-"),
        ],
        MESSAGE,
    )
    return ended.status == 0, ended.said


async def _nodemailer(way: Way) -> Said:
    options: dict[str, Any] = {"host": "127.0.0.1", "port": way.port, "secure": way.mode == "implicit"}
    options |= {"requireTLS": way.starttls, "ignoreTLS": way.mode == "none"}
    options |= {"tls": {"ca": way.authority.read_text()}}
    if way.password is not None:
        options["auth"] = {"user": USER, "pass": way.password}
    mail = {"envelope": {"from": SENDER, "to": [RECIPIENT]}, "raw": MESSAGE.decode()}
    script = NODEMAILER.parent.parent / "nodemailer_send.cjs"
    asked = json.dumps({"options": options, "mails": [mail]}).encode()
    ended = await run([command("node"), str(script)], asked)
    (report,) = json.loads(ended.out)
    return report["ok"], report["text"]


NODE = [
    pytest.mark.interop,
    pytest.mark.skipif(not NODEMAILER.exists(), reason="nodemailer: npm install in tests/interop"),
]
CLIENTS = [
    pytest.param(_smtplib, id="smtplib"),
    pytest.param(_swaks, id="swaks", marks=needs("swaks", "swaks")),
    pytest.param(_swaks_login, id="swaks-login-pipelined", marks=needs("swaks", "swaks")),
    pytest.param(_msmtp, id="msmtp", marks=needs("msmtp", "msmtp")),
    pytest.param(_curl, id="curl", marks=needs("curl", "curl")),
    pytest.param(_nodemailer, id="nodemailer", marks=NODE),
]
Sends = Callable[[Way], Awaitable[Said]]


class _Door:
    """Starts a relay with one listener of a mode and one way to log in."""

    def __init__(self, start: Any, authority: Certificates, tmp_path: Path) -> None:
        self._start = start
        self._directory = tmp_path
        self.cert, self.key = authority.write_server(tmp_path)
        self.authority = authority.write_authority(tmp_path / "ca.pem")

    def __call__(self, upstream: ScriptedUpstream, mode: str, auth: str) -> Any:
        clients: dict[str, Any] = {"auth": auth}
        if auth == "users":
            clients["users_file"] = str(self._directory / "users.toml")
        if mode == "none" and auth != "none":
            clients["auth_without_tls"] = True
        listeners = [{"address": "127.0.0.1:0", "tls": mode}]
        tls = {"cert": str(self.cert), "key": str(self.key)}
        return self._start(upstream.port, listeners=listeners, tls=tls, clients=clients)


@pytest.fixture
def door(
    start: Any, authority: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PASSWORD.encode())))
    assert main(["user", "add", USER, "--file", str(tmp_path / "users.toml")]) == 0
    return _Door(start, authority, tmp_path)


def upstream_for(auth: str) -> ScriptedUpstream:
    """With pass-through it is the upstream that knows the user, and takes no mail from others."""
    return ScriptedUpstream(users={USER: PASSWORD} if auth == "passthrough" else None)


@pytest.mark.parametrize("auth", ["none", "users", "passthrough"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("send", CLIENTS)
async def test_a_mail_goes_through(send: Sends, mode: str, auth: str, door: Any) -> None:
    async with (
        upstream_for(auth) as upstream,
        door(upstream, mode, auth) as running,
    ):
        way = Way(running.port, mode, door.authority, None if auth == "none" else PASSWORD)
        sent, said = await send(way)

        assert sent, said
        (message,) = upstream.accepted
        assert MESSAGE.partition(b"\r\n\r\n")[0] in message.content  # msmtp puts fields before it
        assert message.content.rstrip().endswith(b"Hello\r\n.dot")
        (row,) = running.rows()
        assert row["task_type"] == "mode"
        assert row["client"] == ("127.0.0.1" if auth == "none" else USER)
        assert ("client_address" in json.loads(row["data"])) is (auth != "none")
        assert running.metric("auth_total", outcome="ok") == (auth != "none")


@pytest.mark.parametrize("auth", ["users", "passthrough"])
@pytest.mark.parametrize("mode", ["starttls", "implicit"])
@pytest.mark.parametrize("send", CLIENTS)
async def test_a_wrong_password_gets_nothing_through(send: Sends, mode: str, auth: str, door: Any) -> None:
    async with (
        upstream_for(auth) as upstream,
        door(upstream, mode, auth) as running,
    ):
        sent, said = await send(Way(running.port, mode, door.authority, "wrong"))

        assert not sent
        assert "535" in said or "denied" in said or "authentication failed" in said.lower(), said
        assert upstream.messages == []
        assert running.rows() == []
        assert running.metric("auth_total", outcome="failed") >= 1
        assert running.metric("auth_total", outcome="ok") == 0


@pytest.mark.parametrize("mode", ["starttls", "required", "implicit"])
@needs("openssl", "openssl")[0]
@needs("openssl", "openssl")[1]
async def test_openssl_s_client(mode: str, door: Any) -> None:
    async with ScriptedUpstream() as upstream, door(upstream, mode, "none") as running:
        process = await asyncio.create_subprocess_exec(
            *(command("openssl"), "s_client", "-quiet", "-verify_return_error", "-crlf"),
            *("-CAfile", str(door.authority), "-connect", f"127.0.0.1:{running.port}"),
            *([] if mode == "implicit" else ["-starttls", "smtp"]),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            said = b""
            for line, awaited in (
                (b"EHLO c.test\n", b"250 "),
                (b"MAIL FROM:<a@example.test>\n", b"250 "),
                (b"rcpt TO:<b@example.test>\n", b"250 "),  # a capital R renegotiates in s_client
                (b"DATA\n", b"354 "),
                (MESSAGE.replace(b"\r\n", b"\n").replace(b"\n.dot", b"\n..dot") + b".\n", b"250 "),
            ):
                process.stdin.write(line)
                said = b""
                while not said.startswith(awaited):
                    said = await asyncio.wait_for(process.stdout.readline(), 20)
                    assert said, f"closed after {line!r}"
            assert upstream.accepted[0].content == MESSAGE
            assert len(running.rows()) == 1
        finally:
            process.kill()
            await process.wait()


# Postfix as a client


def postfix_sends(test: Any) -> Any:
    for mark in (*needs("postfix", "postfix"), *needs("sendmail", "postfix"), AS_ROOT):
        test = mark(test)
    return test


@postfix_sends
@pytest.mark.parametrize(
    ("mode", "auth"), [("starttls", "users"), ("required", "passthrough"), ("implicit", "users")]
)
@pytest.mark.parametrize("password", [PASSWORD, "wrong"], ids=["right", "wrong"])
async def test_postfix_as_a_client(mode: str, auth: str, password: str, door: Any) -> None:
    """relayhost with SASL and TLS, as a server that hands all its mail to the relay has it."""
    if not any(Path("/usr/lib").glob("**/sasl2/libplain.so*")):
        pytest.skip("Postfix cannot log in: apt-get install libsasl2-modules")
    async with (
        upstream_for(auth) as upstream,
        door(upstream, mode, auth) as running,
    ):
        postfix = sending_postfix(
            running.port,
            implicit=mode == "implicit",
            user=USER,
            password=password,
            authority=door.authority,
        )
        with postfix as directory:
            await asyncio.to_thread(submit, directory, SENDER, RECIPIENT, MESSAGE.replace(b"\r\n", b"\n"))
            if password == PASSWORD:
                message = await upstream.message(timeout_s=30)
                assert message.content.endswith(b"Hello\r\n.dot\r\n")
                await eventually(lambda: len(running.rows()) == 1)
                assert running.rows()[0]["client"] == USER
            else:
                await eventually(lambda: running.metric("auth_total", outcome="failed") > 0)
                assert upstream.messages == []


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)
