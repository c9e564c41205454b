"""A configuration that is read again: every key changes what it should, and no session is dropped for it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import socket
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import aiohttp
import pytest
from pydantic import BaseModel, SecretStr

from relay import maillog
from relay.app import Relay
from relay.auth.hashing import Hasher
from relay.auth.passthrough import Passthrough
from relay.reload import reload
from relay.settings import RESTART, Settings, SettingsError, compare
from tests.conftest import Running
from tests.support.certificates import Certificates
from tests.support.client import Client
from tests.support.upstream import ScriptedUpstream
from tests.support.watch import eventually

MAIL, RCPT = b"MAIL FROM:<a@example.test>", b"RCPT TO:<b@example.test>"
CONTENT = b"Subject: one\r\nX-Kind: mention\r\nX-Own: 7\r\n\r\ntext\r\n"

AUTHORITY = Certificates()
Checked = Callable[["World"], Awaitable[None]]


@dataclass
class World:
    """A relay whose configuration has changed, and what was there before."""

    running: Running
    upstream: ScriptedUpstream
    other: ScriptedUpstream
    directory: Path
    session: Client
    """Past its EHLO, open since before the change."""
    lines: Callable[[], str]
    """What was logged since the change."""

    async def send(self, client: Client | None = None) -> dict[str, Any]:
        """Send a message, over the old session by default, and return its row."""
        replies = await (client or self.session).message("a@example.test", ["b@example.test"], CONTENT)
        assert [reply.code for reply in replies] == [250, 250, 354, 250]
        return self.running.rows()[-1]

    @contextlib.asynccontextmanager
    async def another(self) -> AsyncIterator[Client]:
        async with Client(self.running.port) as client:
            await client.ehlo()
            yield client


@dataclass
class Case:
    """What the configuration says of one key before and after, and what shows that it changed."""

    after: dict[str, Any]
    check: Checked
    before: dict[str, Any] = field(default_factory=dict)
    open_session: bool = True
    """Whether the session before the change gets as far as EHLO."""


def plain(user: str) -> bytes:
    return b"AUTH PLAIN " + base64.b64encode(f"\0{user}\0sesame".encode())


# ------------------------------------------------------------------------------- what shows a change


async def greets_by_its_name(world: World) -> None:
    async with Client(world.running.port) as client:
        assert (await client.greeting()).text.startswith("other.test ESMTP ")


async def takes_1000_octets(world: World) -> None:
    await world.session.command(MAIL + b" SIZE=1001", 552)
    await world.session.ehlo()
    assert world.session.extensions["SIZE"] == "1000"


async def takes_one_recipient(world: World) -> None:
    for line, code in ((MAIL, 250), (RCPT, 250), (RCPT, 452)):
        await world.session.command(line, code)


async def has_no_place_for_two(world: World) -> None:
    async with Client(world.running.port) as client:
        await client.expect(421)
    await world.send()


async def refuses_stray_newlines(world: World) -> None:
    replies = await world.session.message("a@example.test", ["b@example.test"], b"one\ntwo\r\n")
    assert replies[-1].code == 550


async def ends_idle_sessions(world: World) -> None:
    assert "4.4.2 Silent" in (await world.session.expect(421)).text


async def gives_up_idle_leases(world: World) -> None:
    await world.session.command(MAIL, 250)
    await eventually(lambda: "0 active" in repr(world.running.relay.upstreams))
    await world.session.command(RCPT, 451)


async def drains_in_no_time(world: World) -> None:
    await world.session.command(MAIL, 250)
    relay = world.running.relay
    await relay.reception.drain(relay.settings.server.drain_timeout)  # as `stop` does
    await world.session.expect_closed()


async def minds_the_pace(world: World) -> None:
    assert world.running.relay.reception.min_data_rate == 12345  # shown in test_timeouts.py


async def listens_elsewhere(world: World) -> None:
    with pytest.raises(ConnectionRefusedError):
        await Client.connect(world.running.port)
    reader, writer = await asyncio.open_unix_connection(str(world.directory / "relay.sock"))
    assert (await reader.readline()).startswith(b"220 ")
    writer.close()
    await writer.wait_closed()
    await world.send()
    assert world.running.relay.reception.addresses == [f"unix:{world.directory / 'relay.sock'}"]


async def offers_starttls(world: World) -> None:
    await world.session.ehlo()
    assert "STARTTLS" not in world.session.extensions  # it began on a listener without
    await world.send()
    async with world.another() as client:
        assert "STARTTLS" in client.extensions
        await client.starttls(AUTHORITY.client())
        await client.ehlo()
        await world.send(client)


async def awaits_a_proxy(world: World) -> None:
    await world.send()
    async with Client(world.running.port) as client:
        await client.send(b"PROXY TCP4 127.0.0.9 127.0.0.1 1 2\r\n")
        await client.ehlo()
        assert (await world.send(client))["client"] == "127.0.0.9"


async def shows_the_other_certificate(world: World) -> None:
    async with world.another() as client:
        await client.starttls(AUTHORITY.client())
        names = client.wire.certificate()["subjectAltName"]
    assert ("DNS", "other.test") in names


async def offers_auth(world: World) -> None:
    await world.send()  # loopback is still allowed
    await world.session.ehlo()
    assert world.session.extensions["AUTH"] == "PLAIN LOGIN"
    await world.session.command(plain("app"), 235)
    assert (await world.send())["client"] == "app"


async def offers_auth_in_clear(world: World) -> None:
    await world.session.ehlo()
    assert "AUTH" in world.session.extensions
    await world.session.command(plain("app"), 235)


async def knows_other_users(world: World) -> None:
    await world.session.command(plain("shop"), 235)


async def lets_nobody_relay(world: World) -> None:
    assert (await world.session.command(MAIL, 550)).text.startswith("5.7.1 Relaying is not allowed")


async def believes_another_proxy(world: World) -> None:
    async with Client(world.running.port) as client:
        await client.send(b"PROXY TCP4 127.0.0.9 127.0.0.1 1 2\r\n")
        await client.expect_closed()
    async with Client(world.running.port, source="127.0.0.5") as client:
        await client.send(b"PROXY TCP4 127.0.0.9 127.0.0.1 1 2\r\n")
        await client.ehlo()


async def goes_to_the_other_upstream(world: World) -> None:
    await world.send()
    assert len(world.other.accepted) == 1
    assert world.upstream.accepted == []


async def goes_to_the_first_upstream(world: World) -> None:
    await world.send()
    assert (len(world.upstream.accepted), world.other.accepted) == (1, [])


async def asks_the_other_upstream_about_logins(world: World) -> None:
    upstreams = world.running.relay.upstreams
    authenticator = world.running.relay.doorkeeper.authenticator
    assert isinstance(authenticator, Passthrough)
    assert authenticator._pool is upstreams.passthrough is upstreams.pools["spare"]


async def records_the_other_name(world: World) -> None:
    assert (await world.send())["upstream"] == "spare"
    assert world.running.metric("messages_total", upstream="spare", outcome="accepted") == 1


async def goes_over_other_connections(world: World) -> None:
    """Nothing of an upstream is read from anywhere but the settings of its pool, so a new pool shows it."""
    before = len(world.upstream.connections)
    await world.send()
    assert len(world.upstream.connections) > before


async def gives_the_store_3_s(world: World) -> None:
    assert world.running.relay.records.recorder._commit_timeout == 3


async def refuses_while_the_store_is_away(world: World) -> None:
    assert world.running.relay.records.recorder._refuse_while_away
    await world.send()


async def keeps_the_subject(world: World) -> None:
    assert json.loads((await world.send())["data"])["headers"] == {"Subject": "one"}


async def classifies(world: World) -> None:
    assert (await world.send())["task_type"] == "mention"


async def finds_the_id(world: World) -> None:
    assert (await world.send())["client_task_id"] == "7"


async def keeps_rows_for_ever(world: World) -> None:
    assert (await world.send())["expires_at"] is None
    await eventually(lambda: [row["expires_at"] for row in world.running.rows()] == [None, None])


async def expires_every_7_s(world: World) -> None:
    assert world.running.relay.records.expiry._interval == 7


async def expires_9_rows_at_once(world: World) -> None:
    assert world.running.relay.records.expiry._batch_size == 9


async def answers_http_elsewhere(world: World) -> None:
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", world.running.http_port)
    _, writer = await asyncio.open_connection("127.0.0.2", world.running.relay.web.port)
    writer.close()
    await writer.wait_closed()


TOKEN_OF_THE_API = "a token of 16 characters or more".replace(" ", "-")


async def asks_api(world: World, **headers: str) -> int:
    address = f"http://127.0.0.1:{world.running.http_port}/api/limits"
    async with aiohttp.ClientSession() as client, client.get(address, headers=headers) as answer:
        return answer.status


async def asks_for_the_token(world: World) -> None:
    assert await asks_api(world) == 401
    assert await asks_api(world, Authorization=f"Bearer {TOKEN_OF_THE_API}") == 200


async def goes_by_the_name(world: World) -> None:
    assert await asks_api(world, Host="mail.example.com") == 200
    assert await asks_api(world, Host="other.example.com") == 421


async def is_limited_at(world: World, command: int, code: int = 451, said: str = "") -> None:
    """The first message passes; the same again is refused at the command with this number."""
    await world.send()
    replies = await world.session.message("a@example.test", ["b@example.test"], CONTENT)
    assert replies[command].code == code
    assert said in replies[command].text


async def is_limited_at_mail(world: World) -> None:
    await is_limited_at(world, 0)


async def is_limited_at_rcpt(world: World) -> None:
    await is_limited_at(world, 1)


async def is_limited_at_the_end(world: World) -> None:
    await is_limited_at(world, -1)


async def is_rejected_at_mail(world: World) -> None:
    await is_limited_at(world, 0, 550)


async def says_whose_limit_it_is(world: World) -> None:
    await is_limited_at(world, 0, said="Rate limit mine (")


async def says_another_window(world: World) -> None:
    await is_limited_at(world, 0, said="1 messages in 2h")


async def takes_no_such_message(world: World) -> None:
    replies = await world.session.message("a@example.test", ["b@example.test"], CONTENT)
    assert replies[-1].code == 550


async def is_not_limited(world: World) -> None:
    for _ in range(3):
        await world.send()


async def defers_while_it_cannot_count(world: World) -> None:
    limits = world.running.relay.reception.services.limits
    assert limits is not None
    assert [rule.on_error for rule in limits.rules] == ["defer"]  # shown in test_limits.py


def limited(**keys: Any) -> dict[str, Any]:
    return {"limits": [{"scope": "all", "max": 1, "per": "1h"} | keys]}


def many(**keys: Any) -> dict[str, Any]:
    return {"limits": [{"scope": "all", "per": "1h"} | keys]}


def excepting(**keys: Any) -> dict[str, Any]:
    return limited(exceptions=keys)


async def logs_for_people(world: World) -> None:
    await world.send()
    assert "message outcome=accepted" in world.lines()


async def logs_errors_only(world: World) -> None:
    await world.send()
    assert world.lines() == ""


# -------------------------------------------------------------------------------------- key by key

USERS = {"auth": "users", "users_file": "users.toml", "allow": ["127.0.0.1"], "auth_without_tls": True}
TLS = {"cert": "cert.pem", "key": "key.pem"}
OTHER_TLS = {"cert": "other/cert.pem", "key": "other/key.pem"}
STARTTLS = [{"address": "127.0.0.1:0", "tls": "starttls"}]
PROXIED = [{"address": "127.0.0.1:0", "proxy_protocol": True}]
PASSTHROUGH = {"auth": "passthrough", "auth_without_tls": True, "allow": ["127.0.0.1"]}
LOGIN = {"username": "relay", "password": "sesame"}  # over loopback, in clear
TOKEN = {"username": "relay", "token": {"url": "http://127.0.0.1:9/", "client_id": "1", "client_secret": "2"}}


def upstream_case(**after: Any) -> Case:
    return Case({"upstream": after}, goes_over_other_connections)


def two(primary: dict[str, Any] | None = None, spare: dict[str, Any] | None = None) -> dict[str, Any]:
    """Two upstreams, with these values."""
    return {
        "upstreams": [
            {"name": "primary", "address": "FIRST", "tls": "none", **(primary or {})},
            {"name": "spare", "address": "OTHER", "tls": "none", **(spare or {})},
        ]
    }


def match_case(**patterns: tuple[str, str]) -> Case:
    """An upstream of its own for messages that are not meant before, and are after."""
    ((key, (before, after)),) = patterns.items()
    rules = [{"sender": "a@*", "type": "mention"}, {"sender": "z@*", "type": "digest"}]
    return Case(
        {**two(spare={"priority": 1, "match": {key: [after]}}), "task_type": {"rules": rules}},
        goes_to_the_other_upstream,
        {**two(spare={"priority": 1, "match": {key: [before]}}), "task_type": {"rules": rules}},
    )


CASES: dict[str, Case] = {
    "server.hostname": Case({"server": {"hostname": "other.test"}}, greets_by_its_name),
    "server.max_message_size": Case({"server": {"max_message_size": "1000B"}}, takes_1000_octets),
    "server.max_recipients": Case({"server": {"max_recipients": 1}}, takes_one_recipient),
    "server.max_connections": Case({"server": {"max_connections": 1}}, has_no_place_for_two),
    "server.max_connections_per_client": Case(
        {"server": {"max_connections_per_client": 1}}, has_no_place_for_two
    ),
    "server.bare_newlines": Case({"server": {"bare_newlines": "refuse"}}, refuses_stray_newlines),
    "server.idle_timeout": Case({"server": {"idle_timeout": "100ms"}}, ends_idle_sessions),
    "server.min_data_rate": Case({"server": {"min_data_rate": "12345B"}}, minds_the_pace),
    "server.lease_idle_timeout": Case({"server": {"lease_idle_timeout": "100ms"}}, gives_up_idle_leases),
    "server.drain_timeout": Case(
        {"server": {"drain_timeout": "0s"}}, drains_in_no_time, before={"server": {"drain_timeout": "1h"}}
    ),
    "listeners.address": Case({"listeners": [{"address": "unix:DIRECTORY/relay.sock"}]}, listens_elsewhere),
    "listeners.tls": Case({"listeners": STARTTLS, "tls": TLS}, offers_starttls),
    "listeners.proxy_protocol": Case(
        {"listeners": PROXIED, "clients": {"trusted_proxies": ["127.0.0.1"]}}, awaits_a_proxy
    ),
    "tls.cert": Case({"tls": OTHER_TLS}, shows_the_other_certificate, {"listeners": STARTTLS, "tls": TLS}),
    "tls.key": Case({"tls": OTHER_TLS}, shows_the_other_certificate, {"listeners": STARTTLS, "tls": TLS}),
    "clients.auth": Case({"clients": USERS}, offers_auth),
    "clients.auth_without_tls": Case(
        {"clients": {"auth_without_tls": True}},
        offers_auth_in_clear,
        {"listeners": STARTTLS, "tls": TLS, "clients": USERS | {"auth_without_tls": False}},
    ),
    "clients.users_file": Case(
        {"clients": {"users_file": "others.toml"}}, knows_other_users, {"clients": USERS}
    ),
    "clients.allow": Case({"clients": {"allow": ["192.0.2.0/24"]}}, lets_nobody_relay),
    "clients.trusted_proxies": Case(
        {"clients": {"trusted_proxies": ["127.0.0.5"]}},
        believes_another_proxy,
        {"listeners": PROXIED, "clients": {"trusted_proxies": ["127.0.0.1"]}},
        open_session=False,
    ),
    "upstreams.address": Case({"upstream": {"address": "OTHER"}}, goes_to_the_other_upstream),
    "upstreams.name": Case({"upstream": {"name": "spare"}}, records_the_other_name),
    "upstreams.tls": upstream_case(tls="opportunistic"),
    "upstreams.tls_verify": Case(
        {"upstream": {"tls_verify": False}},
        goes_over_other_connections,
        {"upstream": {"tls": "opportunistic"}},
    ),
    "upstreams.ca_file": Case(
        {"upstream": {"ca_file": "ca.pem"}},
        goes_over_other_connections,
        {"upstream": {"tls": "opportunistic"}},
    ),
    "upstreams.max_connections": upstream_case(max_connections=3),
    "upstreams.idle_timeout": upstream_case(idle_timeout="30s"),
    "upstreams.max_age": upstream_case(max_age="3m"),
    "upstreams.max_messages": upstream_case(max_messages=9),
    "upstreams.connect_timeout": upstream_case(connect_timeout="3s"),
    "upstreams.reply_timeout": upstream_case(reply_timeout="3m"),
    "upstreams.end_of_data_timeout": upstream_case(end_of_data_timeout="3m"),
    "upstreams.lease_wait_timeout": upstream_case(lease_wait_timeout="3s"),
    "upstreams.xforward": upstream_case(xforward=True),
    "upstreams.priority": Case(
        two(primary={"priority": 2}, spare={"priority": 1}),
        goes_to_the_other_upstream,
        two(primary={"priority": 1}, spare={"priority": 2}),
    ),
    "upstreams.weight": Case(
        two(primary={"weight": 0}), goes_to_the_other_upstream, two(spare={"weight": 0})
    ),
    "upstreams.match": Case(
        two(spare={"priority": 1, "match": {"sender_domain": ["other.test"]}}),
        goes_to_the_first_upstream,
        two(spare={"priority": 1}),
    ),
    "upstreams.match.sender_domain": match_case(sender_domain=("other.test", "example.test")),
    "upstreams.match.recipient_domain": match_case(recipient_domain=("other.test", "example.test")),
    "upstreams.match.client": match_case(client=("192.0.2.1", "127.0.0.1")),
    "upstreams.match.listener": match_case(listener=("!127.0.0.1:0", "127.0.0.1:0")),
    "upstreams.match.task_type": match_case(task_type=("digest", "mention")),
    "clients.passthrough_to": Case(
        {"clients": PASSTHROUGH | {"passthrough_to": "spare"}},
        asks_the_other_upstream_about_logins,
        {"clients": PASSTHROUGH | {"passthrough_to": "primary"}, **two()},
    ),
    "records.commit_timeout": Case({"records": {"commit_timeout": "3s"}}, gives_the_store_3_s),
    "records.when_unavailable": Case(
        {"records": {"when_unavailable": "refuse"}}, refuses_while_the_store_is_away
    ),
    "records.headers": Case({"records": {"headers": ["Subject"]}}, keeps_the_subject),
    "task_type.headers": Case({"task_type": {"headers": ["X-Kind"]}}, classifies),
    "task_type.default": Case({"task_type": {"default": "mention"}}, classifies),
    "task_type.id_header": Case({"task_type": {"id_header": "X-Own"}}, finds_the_id),
    "task_type.rules.sender": Case(
        {"task_type": {"rules": [{"sender": "a@*", "type": "mention"}]}},
        classifies,
        {"task_type": {"rules": [{"sender": "z@*", "type": "mention"}]}},
    ),
    "task_type.rules.type": Case(
        {"task_type": {"rules": [{"sender": "a@*", "type": "mention"}]}},
        classifies,
        {"task_type": {"rules": [{"sender": "a@*", "type": "digest"}]}},
    ),
    "retention.default": Case({"retention": {"default": "never"}}, keeps_rows_for_ever),
    "retention.by_type": Case({"retention": {"by_type": {"unclassified": "never"}}}, keeps_rows_for_ever),
    "expiry.interval": Case({"expiry": {"interval": "7s"}}, expires_every_7_s),
    "expiry.batch_size": Case({"expiry": {"batch_size": 9}}, expires_9_rows_at_once),
    "limits.scope": Case(limited(scope="recipient"), is_limited_at_rcpt, limited()),
    "limits.task_type": Case(
        limited(task_type="unclassified"), is_limited_at_the_end, limited(task_type="mention")
    ),
    "limits.sender": Case(limited(sender="a@*"), is_limited_at_mail, limited(sender="other@*")),
    "limits.recipient_domain": Case(
        limited(recipient_domain="example.test"), is_limited_at_rcpt, limited(recipient_domain="other.test")
    ),
    "limits.max": Case(limited(), is_limited_at_mail, limited(max=1000)),
    "limits.max_recipients": Case(many(max_recipients=1), is_limited_at_mail, limited(max=1000)),
    "limits.max_bytes": Case(many(max_bytes="1B"), takes_no_such_message, limited(max=1000)),
    "limits.per": Case(limited(per="2h"), says_another_window, limited()),
    "limits.action": Case(limited(action="reject"), is_rejected_at_mail, limited()),
    "limits.on_error": Case(limited(on_error="defer"), defers_while_it_cannot_count, limited()),
    "limits.exceptions": Case(excepting(sender="a@*"), is_not_limited, limited()),
    "limits.exceptions.sender": Case(excepting(sender="a@*"), is_not_limited, excepting(sender="other@*")),
    "limits.exceptions.recipient": Case(
        excepting(recipient="b@*"), is_not_limited, excepting(recipient="other@*")
    ),
    "limits.exceptions.client": Case(excepting(client="127.*"), is_not_limited, excepting(client="10.*")),
    "limits.exceptions.task_type": Case(
        excepting(task_type="unclassified"), is_not_limited, excepting(task_type="mention")
    ),
    "limits.name": Case(limited(name="mine"), says_whose_limit_it_is, limited()),
    "http.address": Case({"http": {"address": "127.0.0.2:0"}}, answers_http_elsewhere),
    "http.token": Case({"http": {"token": TOKEN_OF_THE_API}}, asks_for_the_token),
    "http.token_file": Case(
        {"http": {"token_file": "http-token", "token": TOKEN_OF_THE_API}}, asks_for_the_token
    ),
    "http.hosts": Case({"http": {"hosts": ["mail.example.com"]}}, goes_by_the_name),
    "log.format": Case({"log": {"format": "console"}}, logs_for_people),
    "log.level": Case({"log": {"level": "error"}}, logs_errors_only),
}

OF_A_LOGIN = {
    "upstreams.username": LOGIN | {"username": "other"},
    "upstreams.password": LOGIN | {"password": "other"},
    "upstreams.password_file": LOGIN | {"password_file": "password"},
    "upstreams.token": TOKEN,
    **{
        f"upstreams.token.{name}": {"username": "relay", "token": {**TOKEN["token"], name: value}}  # type: ignore[dict-item]
        for name, value in {
            "url": "http://127.0.0.1:10/",
            "client_id": "3",
            "client_secret": "4",
            "client_secret_file": "secret",
            "refresh_token": "5",
            "refresh_token_file": "refresh",
            "scope": "mail",
        }.items()
    },
    "upstreams.token.file": {"username": "relay", "token": {"file": "token"}},
    "upstreams.token.command": {"username": "relay", "token": {"command": ["echo", "token"]}},
}
"""What the relay logs in with: an upstream as it would be configured."""

ONE_VALUE = {"server.received_header"}
"""Keys that have no other value in this version."""


def keys(model: type[BaseModel], name: str = "") -> Iterator[str]:
    """Yield every key of the configuration, those of lists without a number."""
    for key, found in model.model_fields.items():
        full = f"{name}.{key}" if name else key
        models = [kind for kind in _kinds(found.annotation) if issubclass(kind, BaseModel)]
        if not models or type(None) in get_args(found.annotation):
            yield full
        for kind in models:
            yield from keys(kind, full)


def _kinds(annotation: Any) -> Iterator[type]:
    if get_origin(annotation) in (tuple, Union, types.UnionType):
        for each in get_args(annotation):
            yield from _kinds(each)
    elif isinstance(annotation, type):
        yield annotation


def test_no_key_is_forgotten() -> None:
    found = list(keys(Settings))
    assert sorted(found) == sorted([*CASES, *OF_A_LOGIN, *RESTART, *ONE_VALUE])


# --------------------------------------------------------------------------------------- the world


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Files that configurations name: two certificates, two files of users, secrets."""
    AUTHORITY.write_server(tmp_path)
    (tmp_path / "other").mkdir()
    AUTHORITY.write_server(tmp_path / "other", "other.test", "localhost")
    AUTHORITY.write_authority(tmp_path / "ca.pem")
    hashed = Hasher(memory_kib=8, passes=1).hash("sesame")
    for name, user in (("users.toml", "app"), ("others.toml", "shop")):
        (tmp_path / name).write_text(f'[users.{user}]\npassword = "{hashed}"\n')
    return tmp_path


@pytest.fixture
def written(settings_for: Any, upstream: ScriptedUpstream, directory: Path) -> Any:
    """Return a maker of settings in which files and addresses stand by their short names."""

    def make(other: ScriptedUpstream, *layers: dict[str, Any]) -> Settings:
        over: dict[str, Any] = {}
        for layer in layers:
            for section, value in layer.items():
                over[section] = over.get(section, {}) | value if isinstance(value, dict) else value
        text = json.dumps(over).replace("DIRECTORY", str(directory)).replace("OTHER", other.address)
        text = text.replace("FIRST", upstream.address)
        for name in ("cert.pem", "key.pem", "ca.pem", "users.toml", "others.toml"):
            for prefix in ("", "other/"):
                text = text.replace(f'"{prefix}{name}"', f'"{directory / prefix / name}"')
        found: Settings = settings_for(upstream.port, **json.loads(text))
        return found

    return make


@pytest.fixture
def logged(capfdbinary: pytest.CaptureFixture[bytes]) -> Iterator[Callable[[], str]]:
    """Return what reads the log since it was read last."""

    def read() -> str:
        maillog.flush()  # the lines of one turn of the loop are written behind it
        return capfdbinary.readouterr().out.decode()

    maillog.configure("json", "info")
    yield read
    maillog.configure("json", "info")


@pytest.fixture
async def other() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as server:
        yield server


@pytest.fixture
async def relay(written: Any, other: ScriptedUpstream, directory: Path) -> Any:
    """Return a starter of relays: `async with relay(section={...}) as running`."""

    @contextlib.asynccontextmanager
    async def run(**over: Any) -> AsyncIterator[Running]:
        found = Relay(written(other, over))
        await found.start()
        try:
            yield Running(found, directory / "rows.db")
        finally:
            await found.stop()

    return run


@pytest.mark.parametrize("key", CASES)
async def test_a_key_that_changes_is_in_force(
    key: str,
    relay: Any,
    written: Any,
    upstream: ScriptedUpstream,
    other: ScriptedUpstream,
    directory: Path,
    logged: Callable[[], str],
) -> None:
    case = CASES[key]
    async with relay(**case.before) as running, Client(running.port) as session:
        if case.open_session:
            await session.ehlo()
            if not case.before:
                await session.message("a@example.test", ["b@example.test"], CONTENT)
        upstream.messages.clear()
        before, after = running.relay.settings, written(other, case.before, case.after)
        assert key in map(_without_numbers, compare(before, after).names)

        await reload(running.relay, lambda: after)

        logged()
        await case.check(World(running, upstream, other, directory, session, logged))


def _without_numbers(name: str) -> str:
    return ".".join(part for part in name.split(".") if not part.isdigit())


@pytest.mark.parametrize("key", OF_A_LOGIN)
async def test_what_the_relay_logs_in_with_is_taken_for_new_connections(
    key: str, relay: Any, written: Any, other: ScriptedUpstream
) -> None:
    before = {"upstream": LOGIN if "token" not in key or key == "upstreams.token" else TOKEN}
    after = written(other, {"upstream": OF_A_LOGIN[key]})
    async with relay(**before) as running:
        pool = running.relay.upstreams.pools["primary"]
        assert key in {
            ".".join(_without_numbers(name).split(".")[: key.count(".") + 1])
            for name in compare(running.relay.settings, after).names
        }
        await reload(running.relay, lambda: after)
        assert running.relay.upstreams.pools["primary"] is not pool


@pytest.mark.parametrize("key", RESTART)
async def test_a_key_that_takes_a_restart_keeps_its_value_and_the_others_change(
    key: str, relay: Any, written: Any, other: ScriptedUpstream, logged: Callable[[], str], tmp_path: Path
) -> None:
    values = {"url": f"sqlite:///{tmp_path / 'new.db'}", "spool": str(tmp_path / "new"), "reuse_port": True}
    values |= {"relay": "another", "password": SecretStr("sesame"), "password_file": tmp_path / "password"}
    values |= {
        "recipients": "hashed",
        "recipients_key": SecretStr("sesame" * 3),
        "recipients_key_file": tmp_path,
    }
    section, _, name = key.partition(".")
    async with relay() as running, Client(running.port) as session:
        await session.ehlo()
        before = getattr(getattr(running.relay.settings, section), name)
        settings = running.relay.settings
        changed = settings.model_copy(
            update={
                section: getattr(settings, section).model_copy(update={name: values[name]}),
                "expiry": settings.expiry.model_copy(update={"interval": 7.0}),
            }
        )
        logged()
        await reload(running.relay, lambda: changed)
        lines = [json.loads(line) for line in logged().splitlines()]
        assert [line["keys"] for line in lines if line["event"] == "reload: takes a restart"] == [[key]]
        assert [line["changed"] for line in lines if line["event"] == "reloaded"] == [["expiry.interval"]]
        assert getattr(getattr(running.relay.settings, section), name) == before
        await session.message("a@example.test", ["b@example.test"], CONTENT)
        assert len(running.rows()) == 1
    assert not (tmp_path / "new.db").exists()
    assert not (tmp_path / "new").exists()


# --------------------------------------------------------------------------------------- refusals


async def refused(running: Running, load: Callable[[], Settings], logged: Callable[[], str]) -> list[str]:
    """Reload, see that nothing changes, and return the reasons that were given."""
    relay = running.relay

    def parts() -> tuple[object, ...]:
        pools = tuple(relay.upstreams.pools.values())
        greeting = relay.reception.greeting
        return (relay.settings, *pools, relay.web, relay.users, relay.certificate, greeting)

    before = parts()
    read_at = running.metric("config_last_reload_success_timestamp_seconds")
    logged()
    await reload(relay, load)
    lines = [json.loads(line) for line in logged().splitlines()]
    lines = [line for line in lines if line["event"] != "expiry done"]  # it runs by the clock
    assert {line["event"] for line in lines} == {"reload refused"}
    assert all(one is other for one, other in zip(parts(), before, strict=True))
    assert running.metric("config_last_reload_successful") == 0
    assert running.metric("config_last_reload_success_timestamp_seconds") == read_at
    async with Client(running.port) as client:
        await client.ehlo()
        assert (await client.message("a@example.test", ["b@example.test"], CONTENT))[-1].code == 250
    return [line["reason"] for line in lines]


async def test_every_mistake_has_a_line(relay: Any, logged: Callable[[], str]) -> None:
    problems = ["relay.toml: server.hostnam: unknown key", "relay.toml: log.level: must be one of ..."]

    def load() -> Settings:
        raise SettingsError(problems)

    async with relay() as running:
        assert await refused(running, load, logged) == problems


@pytest.mark.parametrize("section", ["listeners", "http"])
async def test_an_address_that_is_taken_refuses_the_whole(
    section: str,
    relay: Any,
    written: Any,
    other: ScriptedUpstream,
    logged: Callable[[], str],
    directory: Path,
) -> None:
    added = [{"address": "127.0.0.1:0"}, {"address": "unix:DIRECTORY/new.sock"}, {"address": "OTHER"}]
    over = {"listeners": added} if section == "listeners" else {"http": {"address": "OTHER"}}
    layers = {"server": {"hostname": "other.test"}, "clients": USERS, **over}
    async with relay() as running:
        (reason,) = await refused(running, lambda: written(other, layers), logged)
        assert "ddress already in use" in reason
        assert other.address.rpartition(":")[2] in reason
    assert not (directory / "new.sock").exists()


async def test_an_address_that_a_listener_of_before_holds_takes_a_restart(
    relay: Any, settings_for: Any, other: ScriptedUpstream, logged: Callable[[], str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    async with relay(listeners=[{"address": f"0.0.0.0:{port}"}]) as running:
        wanted = settings_for(other.port, listeners=[{"address": f"127.0.0.1:{port}"}])
        (reason,) = await refused(running, lambda: wanted, logged)
    assert reason == (
        f"cannot listen on 127.0.0.1:{port}: Address already in use by a listener that goes: takes a restart"
    )


async def test_users_with_a_mistake_refuse_the_whole(
    relay: Any, written: Any, other: ScriptedUpstream, logged: Callable[[], str], directory: Path
) -> None:
    async with relay(clients=USERS) as running:
        (directory / "users.toml").write_text("[users.app]\npasswort = 1\n")
        found = await refused(
            running, lambda: written(other, {"clients": USERS, "expiry": {"interval": "7s"}}), logged
        )
        assert len(found) == 2  # the unknown key and the missing one
        (directory / "others.toml").unlink()
        over = {"clients": USERS | {"users_file": "others.toml"}}
        (reason,) = await refused(running, lambda: written(other, over), logged)
        assert "no such file" in reason


async def test_a_certificate_that_cannot_be_used_refuses_the_whole(
    relay: Any, written: Any, other: ScriptedUpstream, logged: Callable[[], str], directory: Path
) -> None:
    over = {"listeners": STARTTLS, "tls": TLS}
    async with relay(**over) as running:
        after = written(other, over, {"server": {"hostname": "other.test"}})
        (directory / "key.pem").write_bytes(b"no key\n")
        (reason,) = await refused(running, lambda: after, logged)
        assert "cannot be used" in reason


async def test_a_certificate_that_no_listener_shows_is_not_watched_any_more(
    relay: Any, written: Any, other: ScriptedUpstream
) -> None:
    """Its end would be an alert for ever."""
    expiry = b"\nsmtp_relay_certificate_expiry_timestamp_seconds "
    over = {"listeners": STARTTLS, "tls": TLS}
    async with relay(**over) as running:
        metrics = running.relay.metrics
        assert expiry in metrics.exposition(None)[0]
        await reload(running.relay, lambda: written(other))
        assert running.relay.certificate is None
        assert expiry not in metrics.exposition(None)[0]
        await reload(running.relay, lambda: written(other, over))
        assert expiry in metrics.exposition(None)[0]


async def test_who_was_offered_tls_before_it_went_may_still_have_it(
    relay: Any, written: Any, other: ScriptedUpstream
) -> None:
    async with relay(listeners=STARTTLS, tls=TLS) as running, Client(running.port) as client:
        await client.ehlo()
        await reload(running.relay, lambda: written(other))
        await client.starttls(AUTHORITY.client())
        await client.ehlo()
        replies = await client.message("a@example.test", ["b@example.test"], b"\r\n")
        assert replies[-1].code == 250


async def test_what_nobody_foresaw_changes_nothing_either(relay: Any, logged: Callable[[], str]) -> None:
    def load() -> Settings:
        raise RuntimeError("unforeseen")

    async with relay() as running:
        before = running.relay.settings
        await reload(running.relay, load)
        assert running.relay.settings is before
        assert running.metric("config_last_reload_successful") == 0
        (line,) = (json.loads(each) for each in logged().splitlines() if '"unforeseen"' in each)
        assert line["where"] == "reload"


# ------------------------------------------------------------------------------ sessions that are open


async def logged_in(client: Client) -> None:
    await client.ehlo()
    await client.command(plain("app"), 235)


@pytest.mark.parametrize("change", ["gone", "password", "senders"])
async def test_a_user_who_has_changed_logs_in_again(
    change: str, relay: Any, written: Any, other: ScriptedUpstream, directory: Path
) -> None:
    text = (directory / "users.toml").read_text()
    changed = {
        "gone": text.replace("users.app", "users.shop"),
        "password": f'[users.app]\npassword = "{Hasher(memory_kib=8, passes=1).hash("new")}"\n',
        "senders": text + 'senders = ["*@other.test"]\n',
    }
    clients = USERS | {"allow": ["192.0.2.1"]}
    async with relay(clients=clients) as running, Client(running.port) as session:
        await logged_in(session)
        await session.message("a@example.test", ["b@example.test"], CONTENT)
        (directory / "users.toml").write_text(changed[change])
        await reload(running.relay, lambda: written(other, {"clients": clients}))
        assert (await session.command(MAIL, 530)).text.startswith("5.7.0 This login is not valid any more")
        assert (await session.command(MAIL, 530)).text.startswith("5.7.0 This login is not valid any more")
        await session.command(plain("app"), 503)
    assert len(running.rows()) == 1


async def test_a_transaction_under_way_is_finished_with_what_it_began_with(
    relay: Any, written: Any, upstream: ScriptedUpstream, other: ScriptedUpstream, directory: Path
) -> None:
    after = {
        "clients": {"allow": ["192.0.2.1"]},
        "upstream": {"address": "OTHER", "name": "spare"},
        "server": {"max_message_size": "10B"},
        "listeners": [{"address": "unix:DIRECTORY/relay.sock"}],
        "task_type": {"headers": ["X-Kind"]},
    }
    async with relay() as running, Client(running.port) as session:
        await session.ehlo()
        for line, code in ((MAIL, 250), (RCPT, 250), (b"DATA", 354)):
            await session.command(line, code)
        await reload(running.relay, lambda: written(other, after))
        await session.send(CONTENT + b".\r\n")
        await session.expect(250)
        await session.command(MAIL, 550)
        (row,) = running.rows()
        assert (row["upstream"], row["task_type"]) == ("primary", "unclassified")
        assert (len(upstream.accepted), len(other.accepted)) == (1, 0)


async def test_a_login_under_way_when_logins_end_is_refused(
    relay: Any, written: Any, other: ScriptedUpstream
) -> None:
    async with relay(clients=USERS) as running, Client(running.port) as session:
        await session.ehlo()
        await session.command(b"AUTH LOGIN", 334)
        await session.command(base64.b64encode(b"app"), 334)
        await reload(running.relay, lambda: written(other, {}))
        await session.command(base64.b64encode(b"sesame"), 502)
        await session.command(MAIL, 250)


async def test_a_network_that_is_allowed_anew_may_relay_over_an_open_session(
    relay: Any, written: Any, other: ScriptedUpstream
) -> None:
    async with relay(clients={"allow": ["192.0.2.1"]}) as running, Client(running.port) as session:
        await session.ehlo()
        await session.command(MAIL, 550)
        await reload(running.relay, lambda: written(other, {}))
        await session.command(MAIL, 250)


async def test_an_open_session_of_a_proxy_that_is_not_trusted_any_more_may_not_relay(
    relay: Any, written: Any, other: ScriptedUpstream
) -> None:
    before = {"listeners": PROXIED, "clients": {"trusted_proxies": ["127.0.0.1"]}}
    after = {"listeners": PROXIED, "clients": {"trusted_proxies": ["127.0.0.5"]}}
    async with relay(**before) as running, Client(running.port) as session:
        await session.send(b"PROXY TCP4 127.0.0.9 127.0.0.1 1 2\r\n")
        await session.ehlo()
        await reload(running.relay, lambda: written(other, after))
        await session.command(MAIL, 550)


async def test_logins_through_the_upstream_follow_it(
    relay: Any, written: Any, upstream: ScriptedUpstream, other: ScriptedUpstream
) -> None:
    async with relay() as running, Client(running.port) as session:
        await session.ehlo()
        await reload(running.relay, lambda: written(other, {"clients": PASSTHROUGH}))
        assert isinstance(running.relay.doorkeeper.authenticator, Passthrough)
        await session.command(MAIL, 250)


async def test_a_login_at_one_upstream_is_not_shown_to_another(
    relay: Any, written: Any, upstream: ScriptedUpstream, other: ScriptedUpstream
) -> None:
    upstream.users = other.users = {"app": "sesame"}
    clients = PASSTHROUGH | {"allow": ["192.0.2.1"]}
    before = {"clients": clients | {"passthrough_to": "primary"}, **two()}
    async with relay(**before) as running, Client(running.port) as session:
        await logged_in(session)
        await session.message("a@example.test", ["b@example.test"], CONTENT)
        await reload(
            running.relay, lambda: written(other, before | {"clients": clients | {"passthrough_to": "spare"}})
        )
        assert (await session.command(MAIL, 530)).text.startswith("5.7.0 This login is not valid any more")
        assert not any(b"AUTH" in line for each in other.connections for line in each.lines)
        async with Client(running.port) as anew:
            await logged_in(anew)
            await anew.message("a@example.test", ["b@example.test"], CONTENT)
    assert (len(upstream.accepted), len(other.accepted)) == (1, 1)


async def test_an_ipv6_address_of_http_stands_in_brackets(
    relay: Any, written: Any, other: ScriptedUpstream, logged: Callable[[], str]
) -> None:
    async with relay(http={"address": "[::1]:0"}) as running:
        assert f'"http":"[::1]:{running.http_port}"' in logged()
        await reload(running.relay, lambda: written(other, {"http": {"address": "127.0.0.1:0"}}))
        await reload(running.relay, lambda: written(other, {"http": {"address": "[::1]:0"}}))
        assert f'"event":"listening","address":"[::1]:{running.relay.web.port}"' in logged()


async def test_the_answers_of_http_stop_at_the_old_address_alone(
    relay: Any, written: Any, other: ScriptedUpstream
) -> None:
    async with relay() as running:
        before = running.relay.web
        await reload(running.relay, lambda: written(other, {"expiry": {"interval": "7s"}}))
        assert running.relay.web is before
        assert running.relay.readiness()[0]
