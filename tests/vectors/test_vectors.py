"""Known attacks on SMTP relays, each against a running relay: the file `vectors.json` says what must hold.

`must_hold` is the requirement; `expect` says it for a machine, and a `note` beside it says where this
relay's contract reads it differently. After each vector the file's global invariants are checked. None is
left out.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import re
import ssl
import tracemalloc
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from relay import app as app_module
from relay import maillog
from relay.auth import guard as guard_module
from relay.auth.hashing import Hasher
from relay.session import content as content_module
from relay.session import dialogue as dialogue_module
from relay.session import session as session_module
from relay.session.session import Session
from tests.conftest import merged
from tests.support.attack import Attack, Cut, Traffic, Vector, octets, one_by_one, vectors
from tests.support.certificates import Certificates
from tests.support.client import Client
from tests.support.content import ContentScanner, unstuff
from tests.support.watch import eventually, nothing_left

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Running
    from tests.support.upstream import Message, ScriptedUpstream

VECTORS = {vector.id: vector for vector in vectors()}

TLS_STEPS = {"starttls_inject", "starttls_version", "tls_close_notify_then_plain", "proxy_then_starttls"}

SMUGGLING = [vector.id for vector in VECTORS.values() if vector.category == "smuggling"]
CUT = [vector.id for vector in VECTORS.values() if vector.segmentations]


def needs_tls(vector: Vector) -> bool:
    """Whether the vector begins within TLS, or has a step around it."""
    return vector.setup.startswith(("tls_", "smtps_")) or bool(vector.macros & TLS_STEPS)


WITHIN_TLS = [name for name, vector in VECTORS.items() if needs_tls(vector)]

UNTRUSTED = {"clients": {"allow": ["192.0.2.0/24"]}}
SETTINGS: dict[str, dict[str, Any]] = {
    "limit:max_recipients=1000": {"server": {"max_recipients": 1000}},
    "limit:message_size=1048576": {"server": {"max_message_size": "1MiB"}},
    "limit:command_deadline=10": {"server": {"idle_timeout": "500ms"}},
    "limit:min_data_rate=500": {"server": {"min_data_rate": "500B"}},
    "limit:write_timeout=10": {},  # a constant, shortened below
    "limit:upstream_timeout=2": {"upstream": {"reply_timeout": "300ms", "end_of_data_timeout": "300ms"}},
    "upstream_tls_required": {"upstream": {"tls": "starttls", "connect_timeout": "1s"}},
    "upstream_pool": {},
    "proxy_protocol": {},  # not offered: the header of a peer that is not trusted is no SMTP
    "auth": {},
    "tls": {},
    "logs": {},
}
"""What a vector's `requires` means in settings; times are shortened."""

CHECKED = {
    *("sink_max", "sink_min", "sink_acc_max", "sink_suffix", "sink_rcpts_eq_acked", "sink_data_forbid_re"),
    *("sink_rcpt_forbid_re", "sink_mail_forbid_re", "sink_cmd_forbid_re", "sink_rcpt_identical_or_none"),
    *("last_reply_re", "reply_any_re", "reply_none_re", "dialogue_replies_max", "closed_within_s"),
    *("closed_or_reply_within_s", "log_require_re"),
    *("rows_max", "rows_eq_acks", "rows_eq_sink", "rss_growth_max_mib", "log_forbid_re"),
}
"""What a vector may expect of its own."""
ALWAYS_CHECKED = {
    *("sink_wire_no_bare_crlf", "reply_no_control", "log_json_lines"),
    "max_reply_s",  # no vector here waits longer than the client's deadline
    "fd_leak",  # no session and no task is left
}
"""What is checked after every vector, asked for or not."""

PRINTABLE_REPLY = re.compile(rb"(?:[2-5]\d\d[ -][\t\x20-\x7e]*\r\n)+")
WHOLE_2YZ = re.compile(rb"2\d\d(?:[ -][^\r\n\0]*)?\r\n")
BACKGROUND = {"sweep", "expiry", "expiry lag"}  # tasks that run as long as the relay
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


@pytest.fixture(autouse=True)
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the waits that are constants: what is waited for is the same."""
    monkeypatch.setattr(app_module, "SWEEP_INTERVAL", 0.05)
    monkeypatch.setattr(dialogue_module, "ERROR_WAIT", 0.005)
    monkeypatch.setattr(content_module, "DATA_RATE_GRACE", 0.3)
    monkeypatch.setattr(session_module, "WRITE_TIMEOUT", 0.3)
    monkeypatch.setattr(guard_module, "MIN_DELAY_S", 0.01)
    monkeypatch.setattr(guard_module, "MAX_DELAY_S", 0.05)


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> Traffic:
    traffic = Traffic()
    monkeypatch.setattr(Session, "data_received", lambda session, data: traffic.data_received(session, data))
    monkeypatch.setattr(Session, "write", lambda session, data: traffic.write(session, data))
    return traffic


@pytest.fixture(autouse=True)
def log() -> Iterator[io.BytesIO]:
    stream = io.BytesIO()
    maillog.configure("json", "debug", stream)
    yield stream
    maillog.configure("json", "info")


@pytest.mark.parametrize("name", VECTORS)
async def test_what_must_hold(
    name: str, start: Any, upstream: ScriptedUpstream, traffic: Traffic, log: io.BytesIO, tmp_path: Path
) -> None:
    vector = VECTORS[name]
    certificates = Certificates()
    over = settings_of(vector)
    if needs_tls(vector):
        over = merged(over, within_tls(vector, certificates, tmp_path))
    async with start(upstream.port, **over) as running:
        await prove(vector, running, upstream, traffic, log, certificates.client())


@pytest.mark.parametrize("name", SMUGGLING)
async def test_smuggling_where_stray_newlines_are_refused(
    name: str, start: Any, upstream: ScriptedUpstream, traffic: Traffic, log: io.BytesIO
) -> None:
    async with start(upstream.port, server={"bare_newlines": "refuse"}) as running:
        await prove(VECTORS[name], running, upstream, traffic, log)


@pytest.mark.parametrize("bare_newlines", ["normalize", "refuse"])
@pytest.mark.parametrize("name", CUT)
async def test_smuggling_however_it_is_cut(
    name: str, bare_newlines: str, start: Any, upstream: ScriptedUpstream, traffic: Traffic, log: io.BytesIO
) -> None:
    """Octet by octet, and in two at every offset: verdict and octets do not depend on the segments."""
    vector = VECTORS[name]
    size = len(vector.text)
    async with start(upstream.port, server={"bare_newlines": bare_newlines}) as running:
        seen = set()
        for cut in (None, one_by_one, *(two_at(offset) for offset in range(1, size))):
            traffic.blocks.clear()
            before = len(upstream.messages)
            attack = Attack(vector, running, upstream, traffic, cut)
            async with Client(running.port) as client:
                await attack.carry_out(client)
                await client.command(b"NOOP", 250)  # in step, and nothing was said in between
            pieces = [*(cut or whole)(vector.text)]
            assert traffic.blocks[-len(pieces) - 1 : -1] == pieces
            as_expected(vector, attack, running, upstream, before, before)
            seen.add((str(attack.replies[0])[:9], *(message.wire for message in upstream.messages[before:])))
        await nothing_left(running)
        invariants(running, upstream, log)
        assert len(seen) == 1


@pytest.mark.parametrize("name", [name for name in WITHIN_TLS if name.startswith("AUTH")])
async def test_credentials_on_clear_text_are_not_tried_and_not_kept(
    name: str, start: Any, upstream: ScriptedUpstream, traffic: Traffic, log: io.BytesIO
) -> None:
    """The same without TLS: no AUTH succeeds, and nothing of it is in the log."""
    vector = VECTORS[name]
    async with start(upstream.port) as running:
        attack = Attack(vector, running, upstream, traffic)
        async with Client(running.port) as client:
            await attack.run(client, setup=vector.setup.removeprefix("tls_"))
        assert attack.replies
        assert not [reply for reply in attack.replies if reply.code in (235, 334)]
        assert attack.replies[0].code >= 500
        await nothing_left(running)
        invariants(running, upstream, log)
    secrets = [word for word in vector.text.split() if word.upper() not in (b"AUTH", b"PLAIN", b"LOGIN")]
    for secret in secrets:
        if len(secret) > 4:
            assert secret not in log.getvalue()


def test_the_file_is_whole() -> None:
    assert len(VECTORS) == 205
    assert len(SMUGGLING) == 20
    assert len(CUT) == 15
    assert len(WITHIN_TLS) == 18


def test_every_expectation_is_checked() -> None:
    """A key that nothing here reads would be a requirement that nothing holds."""
    named = {key for vector in VECTORS.values() for key in vector.expect}
    assert named <= CHECKED | ALWAYS_CHECKED


# How


def within_tls(vector: Vector, certificates: Certificates, directory: Path) -> dict[str, Any]:
    """Return what a vector that needs TLS for clients needs in the settings, its files made."""
    cert, key = certificates.write_server(directory)
    listener: dict[str, Any] = {"address": "127.0.0.1:0", "tls": "starttls"}
    over: dict[str, Any] = {"listeners": [listener], "tls": {"cert": str(cert), "key": str(key)}}
    if vector.setup.startswith("smtps_"):
        listener["tls"] = "implicit"
    if "auth" in vector.requires:
        users = directory / "users.toml"
        users.write_text(f'[users.user]\npassword = "{Hasher(memory_kib=1024, passes=1).hash("pass")}"\n')
        users.chmod(0o600)
        over["clients"] = {"auth": "users", "users_file": str(users), "allow": ["127.0.0.0/8"]}
    if "proxy_then_starttls" in vector.macros:
        # The policy is for the client whom the header names: on no listener may the proxy itself relay.
        over["listeners"] = [{"address": "127.0.0.1:0"}, listener | {"proxy_protocol": True}]
        over["clients"] = {"allow": ["9.9.9.9/32"], "trusted_proxies": ["127.0.0.0/8"]}
    return over


def port_of(vector: Vector, running: Running) -> int:
    """Return where the vector's client connects: the last listener."""
    return int(running.relay.reception.addresses[-1].rpartition(":")[2])


def settings_of(vector: Vector) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for requirement in vector.requires:
        settings |= SETTINGS[requirement]
    if vector.profile == "untrusted":
        settings |= UNTRUSTED
    if vector.category == "upstream":
        quick = {"reply_timeout": "1s", "end_of_data_timeout": "500ms"}
        settings["upstream"] = quick | settings.get("upstream", {})
    return settings


def whole(block: bytes) -> list[bytes]:
    return [block]


def two_at(offset: int) -> Cut:
    return lambda block: (block[:offset], block[offset:])


async def prove(
    vector: Vector,
    running: Running,
    upstream: ScriptedUpstream,
    traffic: Traffic,
    log: io.BytesIO,
    tls: ssl.SSLContext | None = None,
) -> None:
    """Run a vector in one segment, then check what it expects, and all that must hold after any."""
    await eventually(lambda: running.pool.last_error is not None or upstream.connections)
    if vector.upstream.get("IDLE_421"):
        await one_message(running)
        (idle,) = [connection for connection in upstream.connections if connection.idle]
        idle.say(b"421 4.4.2 idle for too long\r\n")
    attack = Attack(vector, running, upstream, traffic, tls=tls)
    upstream.script = attack.script()
    if upstream.script:  # connections from before the script are of no use
        for connection in upstream.open_connections:
            connection.close()
        await eventually(lambda: not upstream.open_connections)
    messages, rows = len(upstream.messages), len(running.rows())
    tasks = tasks_of_the_relay(upstream)
    limit = vector.expect.get("rss_growth_max_mib")
    if limit:
        tracemalloc.start()
    try:
        async with Client(port_of(vector, running)) as client:
            await attack.run(client)
            await ended(vector, attack)
    finally:
        if limit:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < limit * 1024 * 1024
    await nothing_left(running)
    as_expected(vector, attack, running, upstream, messages, rows)
    cut_off_upstream(vector, upstream)
    await eventually(lambda: tasks_of_the_relay(upstream) <= tasks)  # also the upstream's own are ending
    invariants(running, upstream, log)
    logged(vector, log)
    await usable(vector, running, upstream)


async def ended(vector: Vector, attack: Attack) -> None:
    within = vector.expect.get("closed_within_s")
    if within is None or attack.closed:
        return
    attack.client.deadline_s = float(within)
    said = await attack.client.expect_closed()
    assert PRINTABLE_REPLY.fullmatch(said) or not said


def tasks_of_the_relay(upstream: ScriptedUpstream) -> int:
    """Return how many tasks there are but the upstream's and those that run as long as the relay."""
    theirs = {connection.task for connection in upstream.connections}
    return len([task for task in asyncio.all_tasks() - theirs if task.get_name() not in BACKGROUND])


def as_expected(
    vector: Vector, attack: Attack, running: Running, upstream: ScriptedUpstream, messages: int, rows: int
) -> None:
    """Check `expect`; `messages` and `rows` are the numbers from before the vector."""
    seen = upstream.messages[messages:]
    expect = vector.expect
    assert all(PRINTABLE_REPLY.fullmatch(reply.raw) for reply in attack.replies)
    lines = [line for reply in attack.replies for line in reply.raw.decode("ascii").split("\r\n")[:-1]]
    shown = f"{lines} {upstream.transcript()}"
    if "sink_max" in expect:
        assert len(seen) <= expect["sink_max"], shown
    if "sink_min" in expect:
        assert len(seen) >= expect["sink_min"], shown
    if "sink_acc_max" in expect:
        assert len([message for message in seen if taken(message)]) <= expect["sink_acc_max"], shown
    if "last_reply_re" in expect:
        assert re.search(expect["last_reply_re"], lines[-1] if lines else ""), shown
    if "closed_or_reply_within_s" in expect:
        assert attack.closed or attack.replies, shown
    if "reply_any_re" in expect:
        assert any(re.search(expect["reply_any_re"], line) for line in lines), shown
    if "reply_none_re" in expect:
        assert not any(re.search(expect["reply_none_re"], line) for line in lines), shown
    if "dialogue_replies_max" in expect:
        assert len(attack.replies) <= expect["dialogue_replies_max"], shown
    if "sink_suffix" in expect:
        assert [message.content for message in seen] == [octets(expect["sink_suffix"])]
    if expect.get("sink_rcpts_eq_acked"):
        acknowledged = [reply for reply in attack.replies if reply.code == 250][: -attack.acceptances or None]
        assert attack.acceptances == len(seen) == 1, shown
        assert len(seen[0].rcpts) == len(acknowledged), shown
    rows_now = len(running.rows()) - rows
    if "rows_max" in expect:
        assert rows_now <= expect["rows_max"], shown
    if expect.get("rows_eq_acks"):
        assert rows_now == attack.acceptances, shown
    if expect.get("rows_eq_sink"):
        assert rows_now == len([message for message in seen if taken(message)]) == len(seen), shown
    upstream_saw(vector, upstream, seen)
    envelope_is_the_clients(attack, seen)


def upstream_saw(vector: Vector, upstream: ScriptedUpstream, seen: list[Message]) -> None:
    """Check what `expect` says of command lines and content."""
    expect = vector.expect
    lines = [line for connection in upstream.connections for line in connection.lines]
    for key, verb in (
        ("sink_rcpt_forbid_re", b"RCPT"),
        ("sink_mail_forbid_re", b"MAIL"),
        ("sink_cmd_forbid_re", b""),
    ):
        if key in expect:
            forbidden = [
                line
                for line in lines
                if line.startswith(verb) and re.search(expect[key], line.decode("latin-1"))
            ]
            assert not forbidden, key
    if "sink_rcpt_identical_or_none" in expect:
        path = octets(expect["sink_rcpt_identical_or_none"])
        assert [line for line in lines if line.startswith(b"RCPT")] in ([], [b"RCPT TO:" + path])
    if "sink_data_forbid_re" in expect:
        pattern = octets(expect["sink_data_forbid_re"]).decode("latin-1")
        assert not [message for message in seen if re.search(pattern, message.wire.decode("latin-1"))]


def envelope_is_the_clients(attack: Attack, seen: list[Message]) -> None:
    """G3: what the upstream got is what the client sent, octet for octet, or the client was told no."""
    said = b"".join(attack.commands)
    for message in seen:
        for line in (message.mail, *message.rcpts, *message.refused):
            assert line + b"\r\n" in said
    if attack.vector.setup != "data" or not attack.acceptances:
        return
    content, _ = ContentScanner().feed(attack.vector.text)
    newlines = content.count(b"\r\n")
    if content.count(b"\r") == content.count(b"\n") == newlines:
        assert seen[0].wire == content
        assert seen[0].content == unstuff(content)


def taken(message: Message) -> bool:
    """Whether the verdict was an acceptance by the letter of RFC 5321 4.2: one whole 2yz reply."""
    return (
        message.reply is not None
        and WHOLE_2YZ.fullmatch(message.reply) is not None
        and len(message.reply) < 4096
    )


def cut_off_upstream(vector: Vector, upstream: ScriptedUpstream) -> None:
    """An upstream that does not answer, or does not read, is left for good."""
    if "EOD_STALL" in vector.upstream or "READ_STALL" in vector.upstream:
        assert not [connection for connection in upstream.open_connections if connection.messages]
        assert len(upstream.messages) == ("EOD_STALL" in vector.upstream)


def invariants(running: Running, upstream: ScriptedUpstream, log: io.BytesIO) -> None:
    """Check G1, G2 and G4 to G7, on all that was seen since the relay began."""
    rows = running.rows()
    assert len(rows) == len([message for message in upstream.messages if taken(message)])
    assert len({row["task_id"] for row in rows}) == len(rows)
    assert upstream.violations == []
    for connection in upstream.connections:
        for message in connection.messages:
            pairs = message.wire.count(b"\r\n")
            assert message.wire.count(b"\r") == message.wire.count(b"\n") == pairs
            assert b"\0" not in message.wire
            assert b"\r\n.\r\n" not in message.wire
    for line in log.getvalue().decode("utf-8").split("\n")[:-1]:
        assert not CONTROLS.search(line)
        entry = json.loads(line)
        assert isinstance(entry, dict)
        assert "Traceback" not in line
        assert entry["event"] != "unforeseen"


def logged(vector: Vector, log: io.BytesIO) -> None:
    text = log.getvalue().decode("utf-8")
    if "log_forbid_re" in vector.expect:
        assert not re.search(vector.expect["log_forbid_re"], text)
    if "log_require_re" in vector.expect:
        assert re.search(vector.expect["log_require_re"], text)


async def usable(vector: Vector, running: Running, upstream: ScriptedUpstream) -> None:
    """G8: a fresh connection is greeted, and a normal message goes as policy and upstream have it."""
    upstream.script = {}
    if vector.profile == "untrusted" or "proxy_then_starttls" in vector.macros:
        expected = 550
    elif "upstream_tls_required" in vector.requires:
        expected = 451  # the upstream offers no TLS now, and clear text is no way out
    else:
        expected = 250
    before = len(running.rows())
    async with asyncio.timeout(10):
        while (code := await one_message(running)) != expected:
            assert code == 451, code  # the upstream is only just back
            await asyncio.sleep(0.02)
    assert len(running.rows()) == before + (expected == 250)
    await nothing_left(running)


async def one_message(running: Running) -> int:
    """Send a normal message on a connection of its own; return the code of its last reply."""
    async with Client(running.port) as client:
        await client.ehlo()
        code = (await client.command(b"MAIL FROM:<a@local.test>")).code
        if code == 250:
            await client.command(b"RCPT TO:<b@local.test>", 250)
            await client.command(b"DATA", 354)
            code = (await client.command(b"Subject: x\r\n\r\nx\r\n.")).code
        with contextlib.suppress(ConnectionError):
            await client.quit()
    return code
