"""A replay by command: what is cut short is done by the next."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from relay.records.model import Record
from relay.records.replay import Carried, replay, replay_rejected
from relay.records.spool import Spool, SpoolError
from relay.records.spool_line import decode, encode
from relay.records.store import RejectedRecordError, StoreError
from tests.support.rows import make_record, spool_line


class MemoryStore:
    """Takes rows, but for those of type "poison"; after `limit` rows it is away."""

    def __init__(self, limit: int = 1_000_000) -> None:
        self.rows: list[Record] = []
        self.limit = limit

    async def write(self, records: Sequence[Record]) -> None:
        if len(self.rows) + len(records) > self.limit:
            raise StoreError("gone")
        if any(each.task_type == "poison" for each in records):
            raise RejectedRecordError("value too long")
        self.rows += records


def done(_: int) -> None:
    """Take no notice of the progress."""


async def test_a_store_that_goes_away_in_the_middle(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    rows = [make_record() for _ in range(1200)]
    spool.append([encode(row) for row in rows])
    store = MemoryStore(limit=700)
    with pytest.raises(StoreError):
        await replay(spool, store, done)
    assert spool.rows == 700

    store.limit = 5000
    told: list[int] = []
    assert await replay(spool, store, told.append) == Carried(700, 0, 0)
    assert told == [500, 700]
    assert store.rows == rows
    spool.close()


async def test_poison_in_a_batch(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    rows = [make_record(task_type="poison" if number in (3, 4, 9) else "mention") for number in range(10)]
    spool.append([encode(row) for row in rows])
    store = MemoryStore()

    assert await replay(spool, store, done) == Carried(7, 3, 0)
    assert store.rows == [row for row in rows if row.task_type != "poison"]
    aside = [decode(line) for line in spool.rejected_file.read_bytes().splitlines()]
    assert aside == [row for row in rows if row.task_type == "poison"]
    spool.close()


async def test_a_replay_of_rejected_rows_that_is_cut_short(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    rows = [make_record() for _ in range(3)]
    for row in rows[:2]:
        spool.set_aside(encode(row, "no such column"))
    with pytest.raises(StoreError):
        await replay_rejected(tmp_path, MemoryStore(limit=0), done)
    assert not spool.rejected_file.exists()
    spool.set_aside(encode(rows[2], "no such column"))
    store = MemoryStore()

    assert await replay_rejected(tmp_path, store, done) == Carried(3, 0, 0)
    assert store.rows == rows
    assert not list(tmp_path.glob("rejected*"))
    spool.close()


async def test_rejected_lines_that_cannot_be_read(tmp_path: Path) -> None:
    """Rubbish goes where rubbish is; a row of another version stays until that one is back."""
    unknown = spool_line("record", b'{"kind":"something later"}')
    rejected = tmp_path / "rejected.jsonl"
    rejected.write_bytes(b"rubbish\n" + unknown + encode(make_record())[:40])

    assert await replay_rejected(tmp_path, MemoryStore(), done) == Carried(0, 1, 2)
    assert rejected.read_bytes() == unknown
    assert (tmp_path / "corrupt.jsonl").read_bytes().startswith(b"rubbish\n{")


HOLD = """
import fcntl, sys
with open(sys.argv[1], "r+b") as file:
    fcntl.lockf(file, fcntl.LOCK_EX)
    print("held", flush=True)
    sys.stdin.read()
"""


async def test_two_replays_of_rejected_rows(tmp_path: Path) -> None:
    taken = tmp_path / "rejected.replayed.jsonl"
    taken.write_bytes(encode(make_record()))
    with subprocess.Popen(  # noqa: ASYNC220 - nothing else runs in this loop
        [sys.executable, "-c", HOLD, taken], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(SpoolError, match="another command is replaying"):
            await replay_rejected(tmp_path, MemoryStore(), done)
        assert other.stdin is not None
        other.stdin.close()
    assert await replay_rejected(tmp_path, MemoryStore(), done) == Carried(1, 0, 0)


async def test_a_directory_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "rejected.jsonl").mkdir()

    with pytest.raises(SpoolError):
        await replay_rejected(tmp_path, MemoryStore(), done)
