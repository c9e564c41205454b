"""Logins of local users, from the command line that makes them to the row of what they send."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import smtplib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from relay.auth import guard
from relay.auth.hashing import Hasher
from relay.cli import main
from relay.session import doorkeeper
from tests.support.certificates import Certificates
from tests.support.client import Client
from tests.support.several import configured, scripted
from tests.support.upstream import Delay, ScriptedUpstream
from tests.support.watch import eventually

User = Callable[..., None]
MESSAGE = b"Subject: mine\r\n\r\nHello\r\n"


def plain(user: str, password: str, authorization: str = "") -> str:
    return "AUTH PLAIN " + base64.b64encode(f"{authorization}\0{user}\0{password}".encode()).decode()


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long replies are delayed is shown where the clock is a test's."""
    monkeypatch.setattr(guard, "MAX_DELAY_S", 0.0)
    monkeypatch.setattr(doorkeeper, "MAX_DELAY_S", 0.0)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "users.toml"


@pytest.fixture
def user(file: Path, monkeypatch: pytest.MonkeyPatch) -> User:
    """Runs `relay user` on the file."""

    def run(*arguments: str, password: str = "") -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(password.encode())))
        assert main(["user", *arguments, "--file", str(file)]) == 0

    run("add", "app", password="sesame")
    run("add", "shop", "--sender", "*@shop.example", "--sender", "<>", password="orchid")
    return run


@pytest.fixture
def relay(start: Any, upstream: ScriptedUpstream, file: Path, user: User) -> Callable[[], Any]:
    clients = {"auth": "users", "users_file": str(file), "auth_without_tls": True}
    return lambda: start(upstream.port, clients=clients)


@pytest.fixture(scope="module")
def authority() -> Certificates:
    return Certificates()


@pytest.fixture
def with_starttls(
    start: Any, upstream: ScriptedUpstream, file: Path, user: User, authority: Certificates, tmp_path: Path
) -> Callable[[], Any]:
    cert, key = authority.write_server(tmp_path)
    return lambda: start(
        upstream.port,
        clients={"auth": "users", "users_file": str(file), "auth_without_tls": True},
        listeners=[{"address": "127.0.0.1:0", "tls": "starttls"}],
        tls={"cert": str(cert), "key": str(key)},
    )


@contextlib.asynccontextmanager
async def session(port: int) -> Any:
    async with Client(port) as client:
        await client.ehlo()
        yield client


async def test_behind_its_login_a_user_is_offered_what_its_upstreams_can_do(
    start: Any, file: Path, user: User
) -> None:
    clients = {"auth": "users", "users_file": str(file), "auth_without_tls": True}
    async with scripted(2) as (one, other):
        one.extensions.remove("DSN")
        other.extensions.remove("SMTPUTF8")
        upstreams = [
            configured("one", one, match={"client": ["app"]}),
            configured("other", other, match={"client": ["!app"]}),
        ]
        async with start(0, clients=clients, upstreams=upstreams) as running, session(running.port) as client:
            assert not {"DSN", "SMTPUTF8"} & client.extensions.keys(), "it may become either"
            await client.command(plain("app", "sesame"), 235)
            await client.ehlo()
            assert "SMTPUTF8" in client.extensions
            assert "ENHANCEDSTATUSCODES" in client.extensions
            assert "DSN" not in client.extensions


@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN"])
async def test_a_user_logs_in_and_stands_in_the_row(
    relay: Callable[[], Any], upstream: ScriptedUpstream, mechanism: str
) -> None:
    async with relay() as running, session(running.port) as client:
        assert client.extensions["AUTH"] == "PLAIN LOGIN"
        assert (await client.command("MAIL FROM:<a@example.com>")).raw.startswith(b"530 5.7.0 ")
        if mechanism == "PLAIN":
            await client.command(plain("app", "sesame"), 235)
        else:
            assert (await client.command("AUTH login", 334)).text == "VXNlcm5hbWU6"
            assert (await client.command(base64.b64encode(b"app").decode(), 334)).text == "UGFzc3dvcmQ6"
            await client.command(base64.b64encode(b"sesame").decode(), 235)
        replies = await client.message("a@example.com", ["b@example.org"], MESSAGE)
        assert [reply.code for reply in replies] == [250, 250, 354, 250]
        assert (await upstream.message()).content == MESSAGE
        (row,) = running.rows()
        assert row["client"] == "app"
        assert running.metric("auth_total", outcome="ok") == 1


async def test_a_login_in_clear_does_not_count_within_tls(
    with_starttls: Callable[[], Any], authority: Certificates
) -> None:
    async with with_starttls() as running, session(running.port) as client:
        await client.command(plain("shop", "orchid"), 235)
        await client.starttls(authority.client())
        await client.ehlo()
        assert client.extensions["AUTH"] == "PLAIN LOGIN"
        assert (await client.command("MAIL FROM:<a@example.com>")).raw.startswith(b"530 5.7.0 ")
        await client.command(plain("app", "sesame"), 235)
        assert (await client.message("a@example.com", ["b@example.org"], MESSAGE))[-1].code == 250
        (row,) = running.rows()
        assert row["client"] == "app"
        assert json.loads(row["data"])["client_address"] == "127.0.0.1"


async def test_failures_in_clear_count_within_tls(
    with_starttls: Callable[[], Any], authority: Certificates
) -> None:
    async with with_starttls() as running, session(running.port) as client:
        for _ in range(3):
            await client.command(plain("shop", "guess"), 535)
        await client.starttls(authority.client())
        await client.ehlo()
        await client.command(plain("shop", "orchid"), 421)


async def test_a_user_sends_as_it_may(relay: Callable[[], Any], upstream: ScriptedUpstream) -> None:
    async with relay() as running, session(running.port) as client:
        await client.command(plain("shop", "orchid"), 235)
        for path in ("ceo@example.com", "@shop.example:ceo@example.com", '"a@shop.example"@example.com'):
            reply = await client.command(f"MAIL FROM:<{path}>")
            assert reply.raw.startswith(b"550 5.7.1 ")
        for path in ("", "News@Shop.Example"):
            await client.command(f"MAIL FROM:<{path}>", 250)
            await client.command("RSET", 250)
        assert not upstream.messages


async def test_who_fails_hears_the_same_and_in_the_end_421(relay: Callable[[], Any]) -> None:
    async with relay() as running, session(running.port) as client:
        heard = set()
        for login in (plain("app", "wrong"), plain("nobody", "sesame"), plain("app", "sesame", "shop")):
            heard.add((await client.command(login, 535)).raw)
        assert len(heard) == 1
        await client.command(plain("app", "sesame"), 421)
        assert running.metric("auth_total", outcome="failed") == 3


async def test_an_exchange_is_cancelled_behind_its_refusal(relay: Callable[[], Any]) -> None:
    """Go's net/smtp says so to every refused login, and QUIT behind it."""
    async with relay() as running, session(running.port) as client:
        await client.command(plain("app", "wrong"), 535)
        await client.command("*", 500)
        await client.command("QUIT", 221)
        assert running.metric("client_rejects_total", reason="out_of_step") == 0


@pytest.mark.parametrize("said", [b"", b"c2Vz"], ids=["nothing", "half_a_line"])
async def test_who_leaves_in_the_midst_of_an_exchange_is_not_waited_for(
    said: bytes, relay: Callable[[], Any]
) -> None:
    async with relay() as running, session(running.port) as client:
        await client.command("AUTH LOGIN", 334)
        await client.send(said)
        client.half_close()
        await client.expect_eof()
        await eventually(lambda: running.metric("client_sessions") == 0)


async def test_an_answer_that_comes_with_the_end_of_input_is_heard(relay: Callable[[], Any]) -> None:
    async with relay() as running, session(running.port) as client:
        await client.command("AUTH PLAIN", 334)
        await client.send(plain("app", "sesame").removeprefix("AUTH PLAIN ").encode() + b"\r\n")
        client.half_close()
        await client.expect(235)
        await client.expect_eof()
        assert running.metric("auth_total", outcome="ok") == 1


async def test_a_client_that_guesses_is_not_tried_and_its_neighbour_is(relay: Callable[[], Any]) -> None:
    async with relay() as running:
        async with session(running.port) as client:
            await client.command(plain("shop", "orchid"), 235)
        for attempt in range(guard.MAX_FAILURES):
            async with session(running.port) as client:
                await client.command(plain("app", f"guess {attempt}"), 535)
        for login, code in ((plain("app", "sesame"), 421), (plain("shop", "orchid"), 235)):
            async with session(running.port) as client:
                await client.command(login, code)
        assert running.metric("auth_total", outcome="throttled") == 1


async def test_many_who_guess_at_once_get_no_more_tries(relay: Callable[[], Any]) -> None:
    async with relay() as running:

        async def heard(password: str) -> int:
            async with session(running.port) as client:
                return (await client.command(plain("app", password))).code

        codes = await asyncio.gather(*(heard(f"guess {number}") for number in range(3 * guard.MAX_FAILURES)))
        assert codes.count(535) == guard.MAX_FAILURES
        assert codes.count(421) == 2 * guard.MAX_FAILURES
        assert running.metric("auth_total", outcome="failed") == guard.MAX_FAILURES


async def test_many_who_log_in_at_once_do(relay: Callable[[], Any], file: Path) -> None:
    names = [f"app{number}" for number in range(2 * guard.MAX_FAILURES)]
    hashed = Hasher(memory_kib=8, passes=1).hash("sesame")
    file.write_text("".join(f'[users.{name}]\npassword = "{hashed}"\n' for name in names))
    async with relay() as running:

        async def heard(name: str) -> int:
            async with session(running.port) as client:
                return (await client.command(plain(name, "sesame"))).code

        assert {*await asyncio.gather(*map(heard, 3 * names))} == {235}


async def test_who_waits_too_long_for_the_others_hears_454(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doorkeeper, "TURN_S", 0.05)
    verdict = asyncio.Event()
    clients = {"auth": "passthrough", "auth_without_tls": True}
    async with (
        ScriptedUpstream({"AUTH": Delay(verdict)}, users={"app": "sesame"}) as upstream,
        start(upstream.port, clients=clients) as running,
        contextlib.AsyncExitStack() as sessions,
    ):
        several = [await sessions.enter_async_context(session(running.port)) for _ in range(11)]
        first = [
            asyncio.create_task(client.command(plain("app", f"guess {number}"), 535))
            for number, client in enumerate(several[:10])
        ]
        dialing = {"upstream": "primary", "state": "connecting"}
        await eventually(lambda: running.metric("upstream_connections", **dialing) == 10)
        reply = await several[10].command(plain("app", "guess"))
        assert reply.raw.startswith(b"454 4.7.0 Too many logins at the same time")
        verdict.set()
        await asyncio.gather(*first)


async def test_changes_are_in_force_at_once(relay: Callable[[], Any], user: User) -> None:
    async with relay() as running:

        async def heard(name: str, password: str) -> int:
            async with session(running.port) as client:
                return (await client.command(plain(name, password))).code

        assert await heard("app", "sesame") == 235
        user("add", "app", "--force", password="another")
        assert [await heard("app", "sesame"), await heard("app", "another")] == [535, 235]
        user("add", "new", password="first")
        assert await heard("new", "first") == 235
        user("remove", "app")
        assert [await heard("app", "another"), await heard("shop", "orchid")] == [535, 235]


async def test_a_mistake_in_the_file_keeps_nobody_out(relay: Callable[[], Any], file: Path) -> None:
    async with relay() as running, session(running.port) as client:
        file.write_text("not TOML")
        await client.command(plain("app", "sesame"), 235)


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        (["AUTH PLAIN AHUAcAB4"], 501),
        (["AUTH PLAIN dQBw"], 501),
        (["AUTH PLAIN ABtbMkoAcA=="], 501),
        (["AUTH PLAIN !!!!"], 501),
        (["AUTH PLAIN ="], 501),
        (["AUTH LOGIN", "*"], 501),
        (["AUTH XOAUTH2 eA=="], 504),
        (["auth plain AHVzZXIAd3Jvbmc="], 535),
        (["AUTH PLAIN ACopKHVpZD0qAHg="], 535),
        (["AUTH PLAIN AHVzZXIA"], 535),
    ],
    ids=str,
)
async def test_a_login_that_is_none_leaves_the_session_as_it_was(
    relay: Callable[[], Any], lines: list[str], code: int
) -> None:
    async with relay() as running, session(running.port) as client:
        for line in lines[:-1]:
            await client.command(line, 334)
        await client.command(lines[-1], code)
        await client.command("NOOP", 250)
        assert (await client.command("MAIL FROM:<a@example.com>")).code == 530


async def test_the_standard_library_logs_in(relay: Callable[[], Any]) -> None:
    def send(port: int) -> None:
        with smtplib.SMTP("127.0.0.1", port, timeout=10) as client:
            client.login("app", "sesame")
            assert client.sendmail("a@example.com", ["b@example.org"], MESSAGE) == {}

    async with relay() as running:
        await asyncio.to_thread(send, running.port)
        (row,) = running.rows()
        assert row["client"] == "app"
