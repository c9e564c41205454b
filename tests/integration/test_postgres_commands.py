"""The commands and the page on PostgreSQL: each command a process, as an operator runs it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from relay.records.identity import uuid7
from relay.records.model import Doubt, Record
from relay.records.retention import Retention
from relay.records.spool import Spool
from relay.records.spool_line import encode
from relay.records.store import open_store
from tests.support.process import ROOT, RelayProcess

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.databases import Cluster, PostgresDatabase
    from tests.support.upstream import ScriptedUpstream

NOW = datetime.now(UTC)
MONTH = Retention(timedelta(days=30))
SENT = Record(
    task_id=uuid7(),
    task_type="mention",
    sender="alice@example.com",
    client="app",
    sent_at=NOW - timedelta(minutes=2),
    upstream="primary",
    upstream_reply="250 2.0.0 Ok: queued as 4F3A",
    size=1000,
    duration_ms=12,
    recipients=("bob@example.net", "carol@example.org"),
    message_id="<1@example.com>",
    data={"headers": {"Subject": "Grüße"}},
)
LATER = replace(
    SENT,
    task_id=uuid7(),
    task_type="digest",
    sender="dora@example.com",
    client="192.0.2.7",
    sent_at=NOW - timedelta(minutes=1),
    recipients=("Bob@example.net",),
    message_id=None,
    data={},
)
EXPIRED = [replace(SENT, task_id=uuid7(), sent_at=NOW - timedelta(days=40 + n)) for n in range(3)]
DOUBT = Doubt(
    task_id=uuid7(),
    task_type="mention",
    sender="erin@example.com",
    client="app",
    since=NOW - timedelta(minutes=3),
    upstream="primary",
    reason="the connection ended without a verdict",
    size=500,
    duration_ms=7,
    recipients=("frank@example.net",),
    data={"client_reply": None},
)
LIMIT = '[[limits]]\nname = "mentions"\nscope = "sender"\nmax = 1\nper = "1d"\ntask_type = "mention"\n'


class Commands:
    """A relay's files and its database; what its commands say."""

    def __init__(self, directory: Path, database: PostgresDatabase, upstream_port: int = 1) -> None:
        self.database = database
        self.process = RelayProcess(directory, upstream_port, records={"url": database.url})
        self.process.config.write_text(self.process.config.read_text() + LIMIT)

    def run(self, *words: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        """Run `relay WORDS`, which must end with this status."""
        done = subprocess.run(
            [sys.executable, "-m", "relay", *words, "--config", str(self.process.config)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
        return done

    def found(self, *words: str) -> list[dict[str, Any]]:
        """Run a command that prints JSON, an object a line; return them."""
        return [json.loads(line) for line in self.run(*words, "--format", "json").stdout.splitlines()]

    def senders(self) -> list[str]:
        """Return the senders of all rows, in their order."""
        return [sender for (sender,) in self.database.rows("SELECT sender FROM task_done ORDER BY id")]


async def _fill(url: str) -> None:
    store = await open_store(url, MONTH)
    await store.write([*EXPIRED, SENT, LATER, DOUBT])
    await store.close()


@pytest.fixture
def commands(cluster: Cluster, postgres_database: PostgresDatabase, tmp_path: Path) -> Commands:
    """On a database with rows that a test may change."""
    cluster.run(_fill(postgres_database.url))
    return Commands(tmp_path, postgres_database)


@pytest.fixture(scope="module")
def reading(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """On a database with rows that all who only read share."""
    made = cluster.database()
    cluster.run(_fill(made.url))
    yield Commands(tmp_path_factory.mktemp("reading"), made)
    made.drop()


@pytest.mark.parametrize(
    ("filters", "wanted"),
    [
        (["--since", "1h"], [LATER, SENT]),
        (["--since", "1h", "--sender", "ALICE@example.com"], [SENT]),
        (["--sender", "@example.com", "--limit", "1"], [LATER]),
        (["--since", "1h", "--recipient", "bob@example.net"], [LATER, SENT]),
        (["--recipient", "@example.org", "--since", "1h"], [SENT]),
        (["--recipient", "*b@example.net", "--type", "digest"], [LATER]),
        (["--type", "mention", "--until", "30d"], EXPIRED),
        (["--client", "192.0.2.7", "--upstream", "primary"], [LATER]),
        (["--message-id", "1@example.com", "--since", "1h"], [SENT]),
        (["--task-id", str(SENT.task_id)], [SENT]),
        (["--sender", "nobody@example.com"], []),
    ],
    ids=lambda value: " ".join(value[::2]) if value and isinstance(value[0], str) else "",
)
def test_sends_finds_what_passes_each_filter(
    reading: Commands, filters: list[str], wanted: list[Record]
) -> None:
    found = reading.found("sends", *filters)
    assert [row["task_id"] for row in found] == [str(row.task_id) for row in wanted]


def test_sends_shows_all_of_a_row_to_people_and_to_programs(reading: Commands) -> None:
    found = reading.found("sends", "show", str(SENT.task_id))
    assert [row | {"id": 0} for row in found] == [
        {
            "id": 0,
            "task_id": str(SENT.task_id),
            "client_task_id": None,
            "task_type": "mention",
            "sender": "alice@example.com",
            "sender_domain": "example.com",
            "client": "app",
            "sent_at": f"{SENT.sent_at:%Y-%m-%dT%H:%M:%S.%fZ}",
            "expires_at": f"{SENT.sent_at + timedelta(days=30):%Y-%m-%dT%H:%M:%S.%fZ}",
            "upstream": "primary",
            "upstream_reply": SENT.upstream_reply,
            "message_id": "<1@example.com>",
            "size": 1000,
            "duration_ms": 12,
            "data": SENT.data,
            "recipients": list(SENT.recipients),
        }
    ]
    shown = reading.run("sends", "show", str(SENT.task_id)).stdout
    assert "Grüße" in shown
    assert "carol@example.org" in shown
    table = reading.run("sends", "--since", "1h")
    assert [line.split()[2:4] for line in table.stdout.splitlines()[1:]] == [
        ["digest", "dora@example.com"],
        ["mention", "alice@example.com"],
    ]
    shown = reading.run("sends", "show", str(DOUBT.task_id)).stdout
    assert DOUBT.reason in shown
    reading.run("sends", "show", str(uuid7()), status=1)


def test_sends_in_doubt(reading: Commands) -> None:
    (found,) = reading.found("sends", "--in-doubt", "--recipient", "@example.net")
    assert found["task_id"] == str(DOUBT.task_id)
    assert found["recipients"] == ["frank@example.net"]
    assert found["data"] == {"client_reply": None}
    assert reading.found("sends", "--in-doubt", "--sender", "alice@example.com") == []


def test_stats(reading: Commands) -> None:
    assert reading.found("stats", "--by", "type", "--since", "1h") == [
        {"type": "digest", "messages": 1},
        {"type": "mention", "messages": 1},
    ]
    found = reading.found(
        "stats", "--by", "sender", "--by", "day", "--since", "1h", "--detail", "--tz", "UTC"
    )
    assert sorted((row["sender"], row["recipients"], row["octets"]) for row in found) == [
        ("alice@example.com", 2, 1000),
        ("dora@example.com", 1, 1000),
    ]
    assert sum(row["messages"] for row in reading.found("stats", "--by", "recipient-domain")) == 9


def test_limits(reading: Commands) -> None:
    (limit,) = reading.found("limits")
    assert (limit["name"], limit["maximum"]) == ("mentions", 1)
    assert [(key["key"], key["used"], key["state"]) for key in limit["keys"]] == [
        ("alice@example.com", 1, "over"),
        ("erin@example.com", 1, "over"),  # in doubt, which counts
    ]
    assert "alice@example.com" in reading.run("limits").stdout


def test_expire(commands: Commands) -> None:
    assert commands.run("expire", "--dry-run").stdout == "3 expired rows would be deleted\n"
    assert len(commands.senders()) == 5
    assert commands.run("expire").stdout == "3 expired rows deleted\n"
    assert commands.senders() == ["alice@example.com", "dora@example.com"]
    assert commands.run("expire").stdout == "0 expired rows deleted\n"
    assert commands.database.rows("SELECT count(*) FROM task_done_recipient") == [(3,)]


def test_spool_replay(commands: Commands) -> None:
    waiting = [replace(SENT, task_id=uuid7(), sender=f"{n}@example.com") for n in range(3)]
    bad = replace(SENT, task_id=uuid7(), sender="bad@example.com", size=2**63)  # beyond a bigint
    spool = Spool(commands.process.spool)
    spool.append([encode(row) for row in [*waiting, bad, SENT]])
    spool.close()
    said = commands.run("spool", "replay", status=1).stdout
    assert said == "4 rows carried into the store; 1 row rejected, see rejected.jsonl\n"
    assert commands.senders()[5:] == ["0@example.com", "1@example.com", "2@example.com"]
    assert "relay.test" in {
        name for (name,) in commands.database.rows("SELECT data->>'relay' FROM task_done")
    }
    assert commands.run("spool", "replay").stdout == "0 rows carried into the store\n"


def test_forget(commands: Commands) -> None:
    said = [
        "1 send would be deleted, 4 others would be changed",
        "0 messages in doubt would be deleted or changed",
    ]
    assert commands.run("forget", "BOB@example.net", "--dry-run").stdout.splitlines() == said
    assert len(commands.senders()) == 5
    assert commands.database.rows("SELECT count(*) FROM task_done_recipient") == [(9,)]
    commands.run("forget", "bob@example.net")
    assert commands.senders() == ["alice@example.com"] * 4
    assert commands.database.rows("SELECT DISTINCT recipient FROM task_done_recipient") == [
        ("carol@example.org",)
    ]


async def test_check_connect(
    upstream: ScriptedUpstream, postgres_database: PostgresDatabase, tmp_path: Path
) -> None:
    commands = Commands(tmp_path, postgres_database, upstream.port)
    done = await asyncio.to_thread(commands.run, "check", "--connect")
    assert f"ok  store {postgres_database.url}: opens, its schema is current" in done.stdout
    commands.process.config.write_text(
        commands.process.config.read_text().replace(
            postgres_database.url, postgres_database.url + "-not-there"
        )
    )
    done = await asyncio.to_thread(lambda: commands.run("check", "--connect", status=1))
    assert "does not exist; make it (createdb), or change records.url" in done.stdout


async def test_the_page_and_the_api(commands: Commands) -> None:
    async with commands.process as relay:
        await relay.start()
        status, page = await relay.get("/")
        assert status == 200
        for text in ("alice@example.com", "dora@example.com", "erin@example.com", "mentions"):
            assert text in page, text
        status, page = await relay.get("/sends?recipient=@example.org&since=1h")
        assert status == 200
        assert "alice@example.com" in page
        assert "dora@example.com" not in page
        status, page = await relay.get(f"/sends/{SENT.task_id}")
        assert (status, "carol@example.org" in page) == (200, True)

        status, text = await relay.get("/api/sends?since=1h")
        assert status == 200
        assert [row["task_id"] for row in json.loads(text)["sends"]] == [
            str(LATER.task_id),
            str(SENT.task_id),
        ]
        status, text = await relay.get("/api/sends?since=1h&limit=1")
        cursor = json.loads(text)["cursor"]
        status, text = await relay.get(f"/api/sends?since=1h&limit=1&cursor={cursor}")
        assert [row["task_id"] for row in json.loads(text)["sends"]] == [str(SENT.task_id)]
        status, text = await relay.get("/api/in-doubt")
        assert status == 200
        assert str(DOUBT.task_id) in text
        status, text = await relay.get("/api/stats?by=type&since=1h")
        assert status == 200
        assert [(row["keys"]["type"], row["messages"]) for row in json.loads(text)["counts"]] == [
            ("digest", 1),
            ("mention", 1),
        ]
        status, text = await relay.get("/api/limits")
        assert (status, "alice@example.com" in text) == (200, True)
        assert await relay.terminate() == 0
        assert relay.errors() == ""
