"""SIGKILL at every named point of a message's way: what everybody knows then, and after the next start.

This is the table of docs/reliability.md, line by line. One message is under way when the process ends; after
the next start the same message is sent again, as an application does that was told no 2yz.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from relay.records.journal import SLOT_SIZE
from tests.support.client import Client
from tests.support.killpoints import POINTS, VARIABLE
from tests.support.ledger import ID_HEADER, Ledger, check, id_of, ids
from tests.support.process import ROOT, RelayProcess
from tests.support.script import Script
from tests.support.storm import is_uncertain
from tests.support.tables import BACK_TO_0001
from tests.support.upstream import Delay, Message, ScriptedUpstream, Silence

TEXT = b"a line of text that is as long as such lines are\r\n"
LONG = TEXT * 20_000
"""More than comes in one read."""
Told = asyncio.Event
"""Set when the client has been told something, or the relay has ended."""


def silent(_: Told) -> Script:
    return {"end_of_data": Silence()}


def takes(_: Told) -> Script:
    return {}


def refuses(_: Told) -> Script:
    return {"end_of_data": b"550 5.7.1 not this one\r\n"}


def takes_late(told: Told) -> Script:
    return {"end_of_data": Delay(told)}


def refuses_late(told: Told) -> Script:
    return {"end_of_data": Delay(told, b"550 5.7.1 not this one, after all\r\n")}


OVERDUE = {"end_of_data_timeout": "1500ms", "reply_timeout": "30s"}
"""After this the client is told 451; the verdict is awaited for as long again."""
UNCERTAIN = 451
LONG_S = 120.0
"""A wait that only a process that hangs would reach: one that is killed ends it."""


@dataclass(frozen=True)
class Crash:
    """One line of the table."""

    point: str
    script: Callable[[Told], Script]
    heard: int | None
    """By the client, at the end of data."""
    upstream: str
    """What it has: part, whole (and never answered), refused, accepted."""
    kept: str
    """Where the relay has it when it has ended: row, entry (in doubt), spool, journal."""
    then: str
    """What is there after the next start: row, doubt, nothing."""
    locked: bool = False
    """Whether somebody else has the database locked until the relay has ended."""
    count: int = 1
    """The process ends when it comes to the point for so many times."""

    def __str__(self) -> str:
        words = self.script.__name__.replace("_", " ")
        return f"{self.point}, the upstream {words if self.script is not silent else 'is silent'}"

    @property
    def overdue(self) -> bool:
        """Whether the client is told that the message may have been sent before anything is known of it."""
        return self.heard == UNCERTAIN


CRASHES = [
    # point                           upstream      heard has          on disk           then
    Crash("in the content",                silent,       None, "part",     "",               ""),
    Crash("before the journal",            silent,       None, "part",     "",               ""),
    Crash("in the journal",                silent,       None, "part",     "",               ""),
    Crash("before the end of data",        silent,       None, "part",     "journal",        "doubt"),
    Crash("behind the end of data",        silent,       None, "whole",    "journal",        "doubt"),
    Crash("verdict read",                  takes,        None, "accepted", "journal",        "doubt"),
    Crash("verdict read",                  refuses,      None, "refused",  "journal",        "doubt"),
    Crash("before the commit",             takes,        None, "accepted", "journal",        "doubt"),
    Crash("behind the commit",             takes,        None, "accepted", "row, journal",   "row"),
    Crash("before the journal is freed",   takes,        None, "accepted", "row, journal",   "row"),
    Crash("behind the journal is freed",   takes,        None, "accepted", "row",            "row"),
    Crash("before the reply",              takes,        None, "accepted", "row",            "row"),
    Crash("behind the reply",              takes,        250,  "accepted", "row",            "row"),
    Crash("before the reply",              refuses,      None, "refused",  "",               ""),
    Crash("behind the reply",              refuses,      550,  "refused",  "",               ""),
    Crash("before the spool",              takes,        None, "accepted", "journal", "doubt", locked=True),
    Crash("before the spool's fdatasync", takes, None, "accepted", "spool, journal", "row", locked=True),
    Crash("behind the spool's fdatasync", takes, None, "accepted", "spool, journal", "row", locked=True),
    # The client has been told that the message may have been sent; somebody has answered, or nobody.
    Crash("behind the reply",              silent,       451,  "whole",    "journal",        "doubt"),
    Crash("before the journal is freed",   silent,       451,  "whole",    "entry, journal", "doubt"),
    Crash("before the commit",             takes_late,   451,  "accepted", "entry", "doubt", count=2),
    Crash("behind the commit",             takes_late,   451,  "accepted", "row",            "row", count=2),
    Crash("before the commit",             refuses_late, 451,  "refused",  "entry", "doubt", count=2),
    Crash("behind the commit",             refuses_late, 451,  "refused",  "",               "", count=2),
]  # fmt: skip


@pytest.mark.parametrize("crash", CRASHES, ids=str)
async def test_one_message(crash: Crash, tmp_path: Path, upstream: ScriptedUpstream) -> None:
    told_something = Told()
    upstream.script = crash.script(told_something)
    relay = RelayProcess(
        tmp_path,
        upstream.port,
        module="tests.support.killpoints",
        records={"commit_timeout": "50ms" if crash.locked else "2s"},
        upstream=OVERDUE if crash.overdue else {},
    )
    async with relay:
        relay.environment = {VARIABLE: f"{crash.point}:{crash.count}"}
        await relay.start()
        with locked(relay) if crash.locked else contextlib.nullcontext():
            told = {"first": await send(relay, "first")}
            told_something.set()
            assert await relay.ended() == -signal.SIGKILL
        await upstream.wait_for(lambda: not upstream.open_connections)
        assert told["first"] == crash.heard
        assert state_at(upstream) == crash.upstream
        found, expected = kept(relay), set(filter(None, crash.kept.split(", ")))
        assert {key for _, key in found} <= {"first"}
        # The entry of a doubt is on its way while the client is told.
        assert expected <= {place for place, _ in found} <= expected | ({"entry"} if crash.overdue else set())
        assert len(found) == len({place for place, _ in found})

        relay.environment = {}
        upstream.script = (refuses if crash.script is refuses else takes)(told_something)
        await relay.start()
        await relay.until("records_spooled", 0)
        if crash.heard in (None, UNCERTAIN):
            told["again"] = await send(relay, "again")
        assert await relay.terminate() == 0
        assert relay.errors() == ""

    rows, doubts = ids(relay.rows, "task_done"), ids(relay.rows, "task_in_doubt")
    again = ["again"] if told.get("again") == 250 else []
    assert sorted(rows) == sorted((["first"] if crash.then == "row" else []) + again)
    assert doubts == (["first"] if crash.then == "doubt" else [])
    ledger = Ledger(
        told=told,
        uncertain=["first"] if crash.overdue else [],
        rows=rows,
        in_doubt=doubts,
        **upstreams_books(upstream),
    )
    assert check(ledger, settled=False) == []


async def test_the_replay_of_the_spool(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    """A segment is replayed once more from its start; no row comes twice."""
    for point in ("before the spool forgets", "behind the spool forgot"):
        relay = RelayProcess(
            directory(tmp_path, point),
            upstream.port,
            module="tests.support.killpoints",
            records={"commit_timeout": "50ms"},
        )
        async with relay:
            relay.environment = {VARIABLE: f"{point}:1"}
            await relay.start()
            with locked(relay):
                for key in ("1", "2", "3"):
                    assert await send(relay, key) == 250
                assert [where for where, _ in kept(relay)] == ["spool"] * 3
            assert await relay.ended() == -signal.SIGKILL
            assert ids(relay.rows, "task_done") == ["1", "2", "3"]

            relay.environment = {}
            await relay.start()
            await relay.until("records_spooled", 0)
            assert await relay.terminate() == 0
            assert ids(relay.rows, "task_done") == ["1", "2", "3"]
            assert ids(relay.rows, "task_in_doubt") == []
            assert kept(relay) == [("row", key) for key in ("1", "2", "3")]
            assert relay.errors() == ""


async def test_the_expiry(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    """What a step has deleted is undone whole; the next start deletes it."""
    relay = RelayProcess(tmp_path, upstream.port, module="tests.support.killpoints")
    async with relay:
        await relay.start()
        for key in ("old", "new"):
            assert await send(relay, key) == 250
        assert await relay.terminate() == 0
        with contextlib.closing(sqlite3.connect(relay.database)) as connection, connection:
            connection.execute("UPDATE task_done SET expires_at = sent_at WHERE client_task_id = 'old'")

        relay.environment = {VARIABLE: "in the expiry:1"}
        await relay.spawn()
        assert await relay.ended() == -signal.SIGKILL
        assert ids(relay.rows, "task_done") == ["old", "new"]

        # The lease of the run that died keeps others away for a minute: let that be over.
        with contextlib.closing(sqlite3.connect(relay.database)) as connection, connection:
            connection.execute("UPDATE task_done_state SET expires_at = '2020-01-01' WHERE name = 'expiry'")
        relay.environment = {}
        await relay.start()
        await relay.until("expired_rows_total", 1)
        assert await send(relay, "newer") == 250
        assert await relay.terminate() == 0
        assert ids(relay.rows, "task_done") == ["new", "newer"]
        assert relay.rows("PRAGMA integrity_check") == [{"integrity_check": "ok"}]
        assert relay.errors() == ""


async def test_the_migration(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    """Whichever statement it comes to, the file stays as it was or is wholly new, and keeps its rows."""
    relay = RelayProcess(tmp_path, upstream.port, module="tests.support.killpoints")
    async with relay:
        await relay.start()
        assert await send(relay, "old") == 250
        assert await relay.terminate() == 0
        with contextlib.closing(sqlite3.connect(relay.database)) as connection:
            connection.executescript(BACK_TO_0001)
        old = schema(relay)

        statements = 1
        while True:
            relay.environment = {VARIABLE: f"in the migration:{statements}"}
            await relay.spawn()
            with contextlib.suppress(AssertionError):  # it has ended before
                await relay.event("started", timeout_s=LONG_S)
            if relay.running:
                break
            assert await relay.ended() == -signal.SIGKILL
            assert schema(relay) == old
            assert ids(relay.rows, "task_done") == ["old"]
            statements += 6

        assert statements > 7
        assert await relay.terminate() == 0
        assert schema(relay) != old
        relay.environment = {}
        await relay.start()
        assert await send(relay, "new") == 250
        assert await relay.terminate() == 0
        assert ids(relay.rows, "task_done") == ["old", "new"]
        assert relay.errors() == ""


async def test_the_new_file(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    """Whichever statement it comes to, the file has nothing in it or all that it is to have."""
    relay = RelayProcess(tmp_path, upstream.port, module="tests.support.killpoints")
    async with relay:
        statements = 1
        while True:
            relay.environment = {VARIABLE: f"in the new file:{statements}"}
            await relay.spawn()
            with contextlib.suppress(AssertionError):  # it has ended before
                await relay.event("started", timeout_s=LONG_S)
            if relay.running:
                break
            assert await relay.ended() == -signal.SIGKILL
            assert relay.rows("SELECT name FROM sqlite_schema") == []
            statements += 6

        assert statements > 7
        assert await relay.terminate() == 0
        relay.environment = {}
        await relay.start()
        assert await send(relay, "first") == 250
        assert await relay.terminate() == 0
        assert ids(relay.rows, "task_done") == ["first"]
        assert relay.errors() == ""


def test_the_table_is_the_one_that_operators_read() -> None:
    section = (ROOT / "docs" / "reliability.md").read_text().partition("\n## Crash points\n")[2]
    table = [line for line in section.partition("\n## ")[0].splitlines() if line.startswith("| ")]
    assert table[2 : 2 + len(CRASHES)] == [shown(crash) for crash in CRASHES]


def shown(crash: Crash) -> str:
    """Return the line of the table for people."""
    where = {
        "in the journal": "while the journal is written",
        "verdict read": "the verdict read, nothing done",
    }
    says = {silent: "is silent", takes: "accepts", refuses: "refuses", takes_late: "accepts, late"}
    has = {"part": "a part", "whole": "all of it", "refused": "refused it", "accepted": "accepted it"}
    heard = {None: "nothing", UNCERTAIN: "451: may have been sent"}
    then = {"": "nothing", "doubt": "an entry in doubt", "row": "its row"}
    words = [
        (where.get(crash.point) or crash.point) + (" (the store is away)" if crash.locked else ""),
        says.get(crash.script, "refuses, late"),
        heard.get(crash.heard, str(crash.heard)),
        has[crash.upstream],
        crash.kept or "nothing",
        then[crash.then],
    ]
    return f"| {' | '.join(words)} |"


def test_every_point_is_tried() -> None:
    apart = {"before the spool forgets", "behind the spool forgot", "in the expiry"}
    apart |= {"in the migration", "in the new file"}
    assert {crash.point for crash in CRASHES} | apart == POINTS.keys()


async def send(relay: RelayProcess, key: str) -> int | None:
    """Send one message; return the code that told what became of it, None if nobody said."""
    head = b"From: <a@example.test>\r\n%b: %b\r\n\r\n" % (ID_HEADER.encode(), key.encode())
    async with Client(relay.port) as client:
        await client.ehlo()
        try:
            replies = await client.message(b"a@example.test", [b"b@example.test"], head + LONG)
        except ConnectionError:
            return None
    assert is_uncertain(replies) == (replies[-1].code == UNCERTAIN)
    return replies[-1].code


def state_at(upstream: ScriptedUpstream) -> str:
    """What the upstream has of its one message."""
    if not upstream.messages:
        (message,) = upstream.incomplete
        return "part"
    (message,) = upstream.messages
    if message.reply is None:
        return "whole"
    return "accepted" if message.accepted else "refused"


def upstreams_books(upstream: ScriptedUpstream) -> dict[str, Any]:
    def having(state: bool | None) -> list[str]:
        def of(message: Message) -> bool | None:
            return None if message.reply is None else message.accepted

        return [id_of(message.content) for message in upstream.messages if of(message) is state]

    return {"accepted": having(True), "refused": having(False), "unanswered": having(None)}


def kept(relay: RelayProcess) -> list[tuple[str, str]]:
    """Return where the relay that has ended, or is held up, has what, and the ids."""
    lines = b"".join(path.read_bytes() for path in sorted(relay.spool.glob("[0-9]*.jsonl")))
    spooled = re.findall(rb'"client_task_id":"([^"]*)"', lines)
    journal = (relay.spool / "journal").read_bytes()
    slots = (journal[begin : begin + SLOT_SIZE] for begin in range(0, len(journal), SLOT_SIZE))
    noted = [slot for slot in slots if any(slot[:8])]
    return [
        *(("row", key) for key in ids(relay.rows, "task_done")),
        *(("entry", key) for key in ids(relay.rows, "task_in_doubt")),
        *(("spool", key.decode()) for key in spooled),
        *(("journal", "first" if b'"first"' in slot else "another") for slot in noted),
    ]


@contextlib.contextmanager
def locked(relay: RelayProcess) -> Iterator[None]:
    with contextlib.closing(sqlite3.connect(relay.database)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.rollback()


def directory(parent: Path, name: str) -> Path:
    path = parent / name.replace(" ", "-")
    path.mkdir()
    return path


def schema(relay: RelayProcess) -> list[dict[str, Any]]:
    return relay.rows("SELECT name, sql FROM sqlite_schema ORDER BY name") + relay.rows(
        "SELECT version_num FROM task_done_version"
    )
