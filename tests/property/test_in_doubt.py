"""Doubts and their ends, in any batches and replayed from any point, come to what the messages came to."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

from hypothesis import given, settings
from hypothesis import strategies as st

from relay.records.model import Doubt, Entry, Record, Settled
from relay.records.retention import Retention
from relay.records.spool_line import decode, encode
from relay.records.store import open_store

NOW = datetime(2026, 1, 2, tzinfo=UTC)

LIVES = {
    "accepted": "r",
    "accepted, killed before its slot was freed": "rd",
    "accepted late": "dR",
    "accepted late, killed before its slot was freed": "dRd",
    "refused late": "ds",
    "in doubt": "d",
    "in doubt, killed before its slot was freed": "dd",
}
"""What the recorder is given of one message, in this order: record (R: marked as doubted), doubt, its end."""


def entry(number: int, kind: str) -> Entry:
    task_id = UUID(int=number)
    if kind == "s":
        return Settled(task_id)
    if kind == "d":
        return Doubt(task_id, "t", "a@b", "c", NOW, "u", "lost", 1, 1, ("d@e",))
    return Record(task_id, "t", "a@b", "c", NOW, "u", "250 ok", 1, 1, ("d@e",), doubted=kind == "R")


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[str], list[list[Entry]]]:
    """The lives of some messages, and their entries, interleaved and in batches."""
    lives = draw(st.lists(st.sampled_from(sorted(LIVES)), min_size=1, max_size=6))
    left = [list(LIVES[life]) for life in lives]
    batches: list[list[Entry]] = [[]]
    while any(left):
        number = draw(st.sampled_from([number for number, kinds in enumerate(left) if kinds]))
        batches[-1].append(entry(number, left[number].pop(0)))
        if draw(st.booleans()):
            batches.append([])
    return lives, batches


def from_spool(batch: Sequence[Entry]) -> list[Entry]:
    return [decode(encode(each)) for each in batch]


def replayed(batches: list[list[Entry]], begins: list[int | None]) -> list[list[Entry]]:
    """Have the batches from an earlier one on written again behind some, as a replay that was cut does."""
    result: list[list[Entry]] = []
    for end, batch in enumerate(batches, 1):
        result.append(batch)
        begin = begins[end % len(begins)]
        if begin is not None:
            result += map(from_spool, batches[min(begin, end) : end])
    return result


@settings(max_examples=60, deadline=None)
@given(histories(), st.lists(st.none() | st.integers(0, 12), min_size=1, max_size=12))
def test_what_is_in_doubt_in_the_end(
    history: tuple[list[str], list[list[Entry]]], begins: list[int | None]
) -> None:
    lives, batches = history
    # Nothing is drawn from here on: it would end the example with the store open, and its thread waiting.
    done, doubtful = asyncio.run(written(replayed(batches, begins)))
    assert done == [number for number, life in enumerate(lives) if life.startswith("accepted")]
    assert doubtful == [number for number, life in enumerate(lives) if life.startswith("in doubt")]


async def written(batches: list[list[Entry]]) -> tuple[list[int], list[int]]:
    """Return the messages that are done, and those in doubt, when all is written."""
    with tempfile.TemporaryDirectory() as directory:
        database = Path(directory) / "rows.db"
        store = await open_store(f"sqlite:///{database}", Retention(None))
        try:
            for batch in batches:
                await store.write(batch)
        finally:
            await store.close()
        with contextlib.closing(sqlite3.connect(database)) as raw:
            return ids(raw, "task_done"), ids(raw, "task_in_doubt")


def ids(raw: sqlite3.Connection, table: str) -> list[int]:
    return sorted(UUID(row[0]).int for row in raw.execute(f"SELECT task_id FROM {table}"))
