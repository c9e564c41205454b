"""How long rows are kept where the files of several relays differ, on both databases."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.records.agreement import LIFE, Agreement
from relay.records.retention import Retention
from relay.records.store import open_store

NOW = datetime(2026, 11, 23, 7, 46, tzinfo=UTC)
DAY = timedelta(days=1)

periods = st.none() | st.timedeltas(min_value=timedelta(microseconds=1))
retentions = st.builds(Retention, periods, st.dictionaries(st.text(max_size=3), periods, max_size=3))


@given(retentions)
def test_what_is_said_is_heard(retention):
    assert Retention.of_text(retention.to_text()) == retention


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"default": "x", "by_type": {}}'])
def test_what_is_no_retention(text):
    with pytest.raises(ValueError, match=r".*"):
        Retention.of_text(text)


@given(st.lists(retentions, min_size=1, max_size=4), st.text(max_size=3))
def test_the_longest_keeps_every_row_as_long_as_any(some, task_type):
    longest = some[0].longest(some[1:])
    wanted = [each.by_type.get(task_type, each.default) for each in some]
    assert longest.by_type.get(task_type, longest.default) == (None if None in wanted else max(wanted))


class Relays:
    """Relays on one database, each with its agreement and what it was told."""

    def __init__(self, database):
        self._database = database
        self.now = NOW
        self.stores = []

    async def join(self, name, retention):
        store = await open_store(self._database.url, retention, clock=lambda: self.now)
        self.stores.append(store)
        told = []
        return Agreement(store, name, retention, clock=lambda: self.now, on_differ=told.append), told


@pytest.fixture
async def relays(database):
    made = Relays(database)
    yield made
    for store in made.stores:
        await store.close()


async def test_the_longer_wins_whoever_comes_first(relays):
    long, short = Retention(30 * DAY, {"mention": DAY}), Retention(10 * DAY, {"mention": 5 * DAY})
    both = Retention(30 * DAY, {"mention": 5 * DAY})
    one, told = await relays.join("one", long)
    assert (await one.reach()).canonical() == long.canonical()
    other, told_other = await relays.join("other", short)
    assert (await other.reach()).canonical() == both.canonical()
    assert (await one.reach()).canonical() == both.canonical()
    assert (told, told_other) == ([["other"]], [["one"]])
    await one.reach()
    assert told == [["other"]]  # once


async def test_the_same_files_agree_without_a_word(relays):
    one, told = await relays.join("one", Retention(DAY))
    other, told_other = await relays.join("other", Retention(DAY))
    assert (await one.reach()).canonical() == (await other.reach()).canonical() == Retention(DAY).canonical()
    assert told == told_other == []


async def test_one_that_ends_or_dies_counts_no_more(relays):
    short, told = await relays.join("short", Retention(DAY))
    ends, _ = await relays.join("ends", Retention(None))
    dies, _ = await relays.join("dies", Retention(5 * DAY))
    await ends.reach()
    await dies.reach()
    assert (await short.reach()).default is None
    await ends.leave()
    assert (await short.reach()).default == 5 * DAY
    relays.now = NOW + LIFE
    assert (await short.reach()).default == DAY
    assert told == [["dies", "ends"], ["dies"]]


async def test_a_restart_with_another_file_replaces_what_was_said(relays):
    other, _ = await relays.join("other", Retention(DAY))
    before, _ = await relays.join("one", Retention(9 * DAY))
    await before.reach()
    after, _ = await relays.join("one", Retention(2 * DAY))
    await after.reach()
    assert (await other.reach()).default == 2 * DAY


async def test_words_of_another_version_are_passed_over(relays, database):
    one, told = await relays.join("one", Retention(DAY))
    database.execute(
        "INSERT INTO task_done_state VALUES ('retention:new', 'v2', '2027-01-01 00:00:00.000000')"
    )
    assert (await one.reach()).default == DAY
    assert told == []
