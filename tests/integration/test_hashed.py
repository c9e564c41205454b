"""Recipients as pseudonyms: nothing that is kept or logged names them, and who has the key finds them."""

from __future__ import annotations

import asyncio
import io
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import aiohttp
import pytest

from relay import maillog
from relay.cli import main
from relay.pseudonyms import Pseudonyms
from relay.records.model import Record
from tests.support.client import Client
from tests.support.script import Close
from tests.support.upstream import ScriptedUpstream

KEY = "0123456789abcdef0123456789abcdef"
RECORDS = {"recipients": "hashed", "recipients_key": KEY, "headers": ["Message-ID", "To"]}
NAMES = Pseudonyms(KEY)
CONTENT = b"Message-ID: <1@example.com>\r\nTo: Ann <ann.lee@example.org>, bob\r\n\r\ntext\r\n"
SECRETS = ("ann.lee", "zoe.doe", "eve.roe")


def octets_of(directory: Path) -> bytes:
    return b"".join(path.read_bytes() for path in directory.rglob("*") if path.is_file()).lower()


@pytest.fixture
def log() -> Any:
    stream = io.BytesIO()
    maillog.configure("json", "debug", stream)
    yield stream
    maillog.configure("json", "info")


async def send(
    port: int,
    recipients: list[str],
    sender: str = "bounce+ann.lee=example.org@shop.example",
    content: bytes = CONTENT,
) -> None:
    async with Client(port) as client:
        await client.greeting()
        await client.ehlo()
        await client.message(sender, recipients, content)


async def test_no_recipient_is_named_anywhere(
    start: Any, upstream: ScriptedUpstream, tmp_path: Path, log: io.BytesIO
) -> None:
    upstream.script = {
        "RCPT": {"zoe.doe@": b"550 5.1.1 <zoe.doe@example.org>: zoe.doe is unknown\r\n"},
        "end_of_data": [
            b"250 2.0.0 <ann.lee@example.org> queued as 4F\r\n",
            Close(),
            b"550 5.7.1 eve.roe!\r\n",
        ],
    }
    async with start(upstream.port, records=RECORDS) as running:
        await send(running.port, ["Ann.Lee@example.org", "zoe.doe@example.org"])
        await send(running.port, ["ann.lee@example.org"])  # in doubt
        await send(running.port, ["eve.roe@example.org"], "shop@example.com", b"Subject: x\r\n\r\ntext\r\n")
        (row,) = running.rows()
        while not (doubts := running.rows("SELECT * FROM task_in_doubt")):
            await asyncio.sleep(0.01)
        (doubt,) = doubts
        (received,) = running.rows("SELECT * FROM task_done_recipient")
        async with aiohttp.ClientSession(f"http://127.0.0.1:{running.http_port}") as client:
            for address, found in (
                ("ANN.lee@example.org", 1),
                ("@example.org", 1),
                ("zoe.doe@example.org", 0),
            ):
                async with client.get("/api/sends", params={"recipient": address}) as answer:
                    assert len((await answer.json())["sends"]) == found
            async with client.get("/api/in-doubt", params={"recipient": "ann.lee@example.org"}) as answer:
                assert len((await answer.json())["in_doubt"]) == 1
        kept = octets_of(tmp_path)
    maillog.flush()
    logged = log.getvalue().lower()
    # To is a header that the operator chose to keep; the addresses of recipients in it are told too.
    for secret in SECRETS:
        assert kept.count(secret.encode()) == 0, kept[max(0, kept.find(secret.encode()) - 300) :][:500]
        assert secret.encode() not in logged
    hidden = NAMES.address("ann.lee@example.org")
    assert received["recipient"] == hidden
    assert received["recipient_domain"] == "example.org"
    assert row["sender"] == f"bounce+{hidden.partition('@')[0]}=example.org@shop.example"
    assert row["upstream_reply"] == f"250 2.0.0 <{hidden}> queued as 4F"
    data = json.loads(row["data"])
    assert data["headers"]["To"] == f"Ann <{hidden}>, bob"
    assert data["refused"][0]["recipient"] == NAMES.address("zoe.doe@example.org")
    assert json.loads(doubt["recipients"]) == [hidden]
    assert upstream.messages[0].recipients[0] == b"<Ann.Lee@example.org>"


async def test_a_sender_with_the_local_part_of_a_recipient_stays(
    start: Any, upstream: ScriptedUpstream, log: io.BytesIO
) -> None:
    async with start(upstream.port, records=RECORDS) as running:
        await send(running.port, ["info@example.org"], "info@shop.example")
        (row,) = running.rows()
    maillog.flush()
    assert row["sender"] == "info@shop.example"
    (line,) = [each for each in map(json.loads, log.getvalue().splitlines()) if each["event"] == "message"]
    assert line["sender"] == "info@shop.example"


async def test_what_waits_in_the_spool_names_nobody(
    start: Any, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    async with start(upstream.port, records=RECORDS) as running:
        running.relay.records.recorder._go_away("a test", pause=60.0)
        await send(running.port, ["ann.lee@example.org"], "shop@example.com")
        assert running.relay.records.spool.rows == 1
        assert b"ann.lee" not in octets_of(tmp_path / "spool")


async def test_who_keeps_the_key_still_finds_them_when_new_rows_are_plain(
    start: Any, upstream: ScriptedUpstream
) -> None:
    async with start(upstream.port, records=RECORDS) as running:
        await send(running.port, ["ann.lee@example.org"])
    async with start(upstream.port, records={**RECORDS, "recipients": "plain"}) as running:
        await send(running.port, ["ann.lee@example.org"])
        async with aiohttp.ClientSession(f"http://127.0.0.1:{running.http_port}") as client:
            for address, found in (("Ann.Lee@example.org", 2), ("bob@example.org", 0)):
                async with client.get("/api/sends", params={"recipient": address}) as answer:
                    assert len((await answer.json())["sends"]) == found
                async with client.get("/sends", params={"q": address}) as answer:
                    assert (await answer.text()).count('data-name="To"') == found


async def test_a_limit_counts_them_all_the_same(start: Any, upstream: ScriptedUpstream) -> None:
    limits = [{"name": "one", "scope": "recipient", "max": 1, "per": "1h"}]
    async with start(upstream.port, records=RECORDS, limits=limits) as running:
        await send(running.port, ["ann.lee@example.org"])
        async with Client(running.port) as client:
            await client.greeting()
            await client.ehlo()
            await client.command("MAIL FROM:<a@example.com>")
            assert (await client.command("RCPT TO:<ANN.LEE@example.org>")).code == 451
            assert (await client.command("RCPT TO:<bob@example.org>")).code == 250


@pytest.mark.parametrize("only", [{}, {"sender": ["ann.lee@example.org", "nobody@*"]}])
async def test_a_limit_by_sender_counts_who_writes_to_itself(
    start: Any, upstream: ScriptedUpstream, only: dict[str, Any]
) -> None:
    limits = [{"name": "two", "scope": "sender", "max": 2, "per": "1h", **only}]
    async with start(upstream.port, records=RECORDS, limits=limits) as running:
        await send(running.port, ["bob@example.org"], "ann.lee@example.org")
        await send(running.port, ["Ann.Lee@example.org"], "Ann.Lee@example.org")
    # From here on it is counted from the store, where one of them has the pseudonym for its sender.
    async with (
        start(upstream.port, records=RECORDS, limits=limits) as running,
        Client(running.port) as client,
    ):
        await client.greeting()
        await client.ehlo()
        assert (await client.command("MAIL FROM:<ann.lee@EXAMPLE.org>")).code == 451
        assert (await client.command("MAIL FROM:<bob@example.org>")).code == 250


async def test_a_limit_by_sender_counts_what_it_wrote_to_itself_and_waits_in_the_spool(
    start: Any, upstream: ScriptedUpstream
) -> None:
    limits = [{"name": "one", "scope": "sender", "max": 1, "per": "1h"}]
    hidden = NAMES.address("zoe.doe@example.org")
    left_over = Record(
        UUID(int=1), "t", hidden, "c", datetime.now(UTC), "primary", "250 ok", 1, 1, recipients=(hidden,)
    )
    async with (
        start(upstream.port, records=RECORDS, limits=limits) as running,
        Client(running.port) as client,
    ):
        running.relay.records.recorder._go_away("a test", pause=60.0)
        await send(running.port, ["bob@example.org"], "shop@example.com")
        running.relay._services(running.relay.settings).limits.adopt([left_over])
        await client.greeting()
        await client.ehlo()
        assert (await client.command("MAIL FROM:<zoe.doe@example.org>")).code == 451
        assert (await client.command("MAIL FROM:<eve.roe@example.org>")).code == 250


async def test_a_limit_leaves_out_an_address_that_it_names(start: Any, upstream: ScriptedUpstream) -> None:
    exceptions = {"recipient": ["Ann.Lee@example.org", "*@example.net"], "sender": "eve.roe@example.org"}
    limits = [{"name": "one", "scope": "all", "max_recipients": 1, "per": "1h", "exceptions": exceptions}]
    for _ in range(2):
        async with start(upstream.port, records=RECORDS, limits=limits) as running:
            await send(running.port, ["ann.lee@example.org"])
            await send(running.port, ["zoe.doe@example.net"])
            await send(running.port, ["eve.roe@example.org"], "eve.roe@example.org")
    assert len(upstream.messages) == 6
    async with start(upstream.port, records=RECORDS, limits=limits) as running:
        await send(running.port, ["bob@example.org"])
        assert len(upstream.messages) == 7
        async with Client(running.port) as client:
            await client.greeting()
            await client.ehlo()
            await client.command("MAIL FROM:<a@example.com>")
            assert (await client.command("RCPT TO:<bob@example.org>")).code == 451


def test_the_command_line_finds_them_with_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from relay.records.retention import Retention
    from relay.records.store import open_store

    monkeypatch.chdir(tmp_path)

    async def write() -> None:
        store = await open_store("sqlite:///data/task_done.db", Retention(None))
        recipients = (NAMES.address("ann.lee@example.org"),)
        await store.write(
            [Record(UUID(int=1), "t", "a@x", "c", datetime.now(UTC), "primary", "250 ok", 1, 1, recipients)]
        )
        await store.close()

    asyncio.run(write())
    Path("key").write_text(f"{KEY}\n")
    Path("key").chmod(0o600)
    text = '[[upstreams]]\naddress = "smtp.example.com:587"\n[records]\nrecipients = "hashed"\n'
    Path("with.toml").write_text(f'{text}recipients_key_file = "key"\n')
    search = ["sends", "--recipient", "Ann.Lee@example.org", "--format", "json"]
    assert main([*search, "--config", "with.toml"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    Path("other").write_text(f"{KEY[::-1]}\n")
    Path("other").chmod(0o600)
    Path("other.toml").write_text(f'{text}recipients_key_file = "other"\n')
    assert main([*search, "--config", "other.toml"]) == 0
    assert capsys.readouterr().out == ""
