"""Opening: what is made, what is left alone, and what the operator is told."""

from __future__ import annotations

import asyncio
import hashlib
import os
import sqlite3
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest

from relay.records.errors import RejectedRecordError, StoreError
from relay.records.migrations import upgrade
from relay.records.retention import Retention
from relay.records.sqlite.database import Database
from relay.records.sqlite.file import path_of
from relay.records.store import open_store
from relay.records.tables import SCHEMA_VERSION, VERSION_TABLE
from tests.support.tables import BACK_TO_0001, definitions

ROOT = Path(__file__).parents[2]
RETENTION = Retention(timedelta(days=30))


async def open_error(path, **options):
    """Open what cannot be opened; return what the operator is told."""
    try:
        store = await open_store(f"sqlite:///{path}", RETENTION, **options)
    except StoreError as error:
        text = str(error)
    else:
        await store.close()
        pytest.fail("it was opened")
    assert "\n" not in text
    return text


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def unprivileged():
    """A directory of a user whom file modes hold for (they do not for root), and that user to work as."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        if os.geteuid() != 0:
            yield directory
            directory.chmod(0o700)
            return
        os.chown(directory, 65534, 65534)
        os.seteuid(65534)
        try:
            yield directory
        finally:
            os.seteuid(0)


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("sqlite:///data/task_done.db", "data/task_done.db"),
        ("sqlite:////var/lib/relay/task_done.db", "/var/lib/relay/task_done.db"),
        ("sqlite:///a%20b#c.db", "a%20b#c.db"),
    ],
)
def test_three_slashes_are_relative_and_four_absolute(url, path):
    assert path_of(url) == Path(path)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("mysql://relay:hush@db/relay", "only sqlite:///PATH and postgresql"),
        ("data/hush.db", "only sqlite:///PATH and postgresql"),
        ("sqlite://hush.db", "three slashes"),
        ("sqlite:///", "path of a file"),
        ("sqlite:///:memory:", "path of a file"),
        ("sqlite:///hush.db?mode=ro", "path of a file"),
    ],
)
def test_other_urls_are_refused_without_being_repeated(url, reason):
    with pytest.raises(StoreError, match=reason) as caught:
        path_of(url)
    assert "hush" not in str(caught.value)


async def test_a_new_file_is_made_with_its_directory_and_not_for_everyone(tmp_path):
    path = tmp_path / "a" / "b" / "task_done.db"
    before = os.umask(0)
    try:
        database = await Database.open(path, create=True, busy_timeout=1)
        modes = [stat.S_IMODE(file.stat().st_mode) for file in sorted(path.parent.iterdir())]
    finally:
        os.umask(before)
    assert len(modes) == 3  # with -wal and -shm
    assert all(mode == 0o640 for mode in modes)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o750
    await database.close()


async def test_a_tighter_umask_is_respected(tmp_path):
    before = os.umask(0o077)
    try:
        database = await Database.open(tmp_path / "t.db", create=True, busy_timeout=1)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "t.db").stat().st_mode) == 0o600
    await database.close()


async def test_what_waits_in_line_at_the_close_does_not_wait_for_a_lock_too(tmp_path):
    database = await Database.open(tmp_path / "t.db", create=True, busy_timeout=1)
    go_on = threading.Event()
    first = database.run(lambda _: go_on.wait())
    second = database.run(lambda raw: raw.execute("PRAGMA busy_timeout").fetchone()[0])
    closing = asyncio.create_task(database.close())
    await asyncio.sleep(0)
    go_on.set()
    assert await first
    assert await second == 0
    await closing


async def test_a_path_with_characters_that_mean_something_in_a_uri(tmp_path):
    path = tmp_path / "50%25 of?#ü.db"
    database = await Database.open(path, create=True, busy_timeout=1)
    await database.close()
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


async def test_the_pragmas_hold(tmp_path):
    database = await Database.open(tmp_path / "t.db", create=True, busy_timeout=1.5)

    def ask(raw):
        names = ("journal_mode", "synchronous", "foreign_keys", "auto_vacuum", "busy_timeout")
        return {name: raw.execute(f"PRAGMA {name}").fetchone()[0] for name in names}

    assert await database.run(ask) == {
        "journal_mode": "wal",
        "synchronous": 2,  # FULL
        "foreign_keys": 0,
        "auto_vacuum": 2,  # INCREMENTAL
        "busy_timeout": 1500,
    }
    await database.close()


async def test_a_reading_command_makes_nothing(tmp_path):
    text = await open_error(tmp_path / "sub" / "t.db", create=False)
    assert text.startswith(f"{tmp_path}/sub/t.db: no such file")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("statement", ["", "CREATE TABLE users (id INTEGER PRIMARY KEY)"])
async def test_a_reading_command_makes_no_tables_in_a_file_that_has_none(tmp_path, statement):
    path = tmp_path / "t.db"
    path.touch()
    with closing(sqlite3.connect(path)) as raw:
        raw.execute(statement)
    before = digest(path)
    text = await open_error(path, create=False)
    assert text.startswith(f"{path}: has no tables of the relay")
    assert digest(path) == before
    assert list(tmp_path.iterdir()) == [path]


async def test_a_reading_command_leaves_an_older_schema_as_it_is(tmp_path):
    path = tmp_path / "t.db"
    await (await open_store(f"sqlite:///{path}", RETENTION)).close()
    with closing(sqlite3.connect(path)) as raw:
        raw.executescript(BACK_TO_0001)
    before = digest(path)
    text = await open_error(path, create=False, upgrade=False)
    assert text == f"{path}: has schema version 0001; the next start brings it up to date"
    assert digest(path) == before


async def test_a_start_says_that_it_brings_an_older_schema_up(tmp_path, caplog):
    """It may take minutes, and there is no way back."""
    path = tmp_path / "t.db"
    await (await open_store(f"sqlite:///{path}", RETENTION)).close()
    with closing(sqlite3.connect(path)) as raw:
        raw.executescript(BACK_TO_0001)
    assert not caplog.messages
    await (await open_store(f"sqlite:///{path}", RETENTION)).close()
    assert caplog.messages == [f"{path}: schema version 0001 is brought up to {SCHEMA_VERSION}"]


@pytest.mark.parametrize(
    "content", [b"x", b"x" * 511, b"mail\n" * 1000, b"SQLite format 3\0" + b"\xff" * 5000]
)
async def test_a_file_that_is_no_database_is_left_alone(tmp_path, content):
    path = tmp_path / "t.db"
    path.write_bytes(content)
    text = await open_error(path)
    assert str(path) in text
    assert path.read_bytes() == content


async def test_a_database_with_another_task_done_is_left_alone(tmp_path):
    path = tmp_path / "t.db"
    with closing(sqlite3.connect(path)) as raw:
        raw.execute("CREATE TABLE task_done (id INTEGER PRIMARY KEY, data TEXT)")
        raw.commit()
    before = digest(path)
    assert "task_done that the relay did not make" in await open_error(path)
    assert digest(path) == before
    assert list(tmp_path.iterdir()) == [path]


async def test_a_database_of_someone_else_keeps_its_tables(tmp_path):
    path = tmp_path / "t.db"
    with closing(sqlite3.connect(path)) as raw:
        raw.executescript(
            "CREATE TABLE alembic_version (version_num TEXT); INSERT INTO alembic_version VALUES ('f00');"
        )
    await (await Database.open(path, create=True, busy_timeout=1)).close()
    with closing(sqlite3.connect(path)) as raw:
        assert raw.execute("SELECT version_num FROM alembic_version").fetchall() == [("f00",)]
        assert raw.execute(f"SELECT version_num FROM {VERSION_TABLE}").fetchall() == [(SCHEMA_VERSION,)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (f"UPDATE {VERSION_TABLE} SET version_num = '9999'", "has schema version 9999"),
        (f"UPDATE {VERSION_TABLE} SET version_num = '0000'", "has schema version 0000"),
        (f"DELETE FROM {VERSION_TABLE}", "has schema version None"),
        ("ALTER TABLE task_done RENAME COLUMN upstream TO server", "has no column upstream"),
        ("DROP VIEW task_done_send", "task_done_send has no column"),
    ],
)
async def test_a_schema_that_is_not_of_this_version_is_left_alone(tmp_path, change, reason):
    path = tmp_path / "t.db"
    await (await Database.open(path, create=True, busy_timeout=1)).close()
    with closing(sqlite3.connect(path)) as raw:
        raw.execute(change)
        raw.commit()
    before = digest(path)
    assert reason in await open_error(path)
    assert digest(path) == before


async def test_a_directory_in_the_files_place(tmp_path):
    assert "is not a file" in await open_error(tmp_path)


async def test_a_file_in_the_directorys_place(tmp_path):
    (tmp_path / "data").write_text("")
    assert "File exists" in await open_error(tmp_path / "data" / "t.db")


async def test_a_file_that_cannot_be_written(unprivileged):
    path = unprivileged / "t.db"
    await (await Database.open(path, create=True, busy_timeout=1)).close()
    path.chmod(0o440)
    assert f"{path}: cannot be written" in await open_error(path)


async def test_a_directory_that_cannot_be_written(unprivileged):
    path = unprivileged / "t.db"
    await (await Database.open(path, create=True, busy_timeout=1)).close()
    unprivileged.chmod(0o500)
    assert f"{unprivileged}: cannot be written" in await open_error(path)
    assert "Permission denied" in await open_error(unprivileged / "other.db")
    unprivileged.chmod(0o000)
    assert "Permission denied" in await open_error(path)


@pytest.mark.parametrize("ending", ["-wal", "-shm"])
async def test_a_file_beside_that_cannot_be_written(unprivileged, ending):
    path = unprivileged / "t.db"
    database = await Database.open(path, create=True, busy_timeout=1)
    beside = unprivileged / f"t.db{ending}"
    beside.chmod(0o440)
    assert f"{beside}: cannot be written" in await open_error(path)
    beside.chmod(0o640)
    await database.close()


async def test_the_files_of_a_linked_one_stand_beside_it(unprivileged):
    """SQLite follows the link; it is there that the directory must be writable."""
    real = unprivileged / "real"
    real.mkdir()
    await (await Database.open(real / "t.db", create=True, busy_timeout=1)).close()
    link = unprivileged / "link.db"
    link.symlink_to(real / "t.db")
    real.chmod(0o500)
    assert f"{real}: cannot be written" in await open_error(link)
    real.chmod(0o700)


async def test_a_file_that_another_process_holds(tmp_path):
    path = tmp_path / "t.db"
    with closing(sqlite3.connect(path)) as raw:
        raw.execute("BEGIN EXCLUSIVE")
        assert "locked by another process for more than 0.05 s" in await open_error(path, busy_timeout=0.05)
    await (await Database.open(path, create=True, busy_timeout=1)).close()


async def test_an_error_in_the_middle_of_making_the_tables_leaves_nothing(tmp_path):
    path = tmp_path / "t.db"
    with closing(sqlite3.connect(path)) as raw:
        # The name of an index of ours, on a table that is not: one of the statements fails.
        raw.executescript("CREATE TABLE other (x); CREATE INDEX ix_task_done_sender ON other (x);")
    assert "ix_task_done_sender already exists" in await open_error(path)
    with closing(sqlite3.connect(path)) as raw:
        names = [row[0] for row in raw.execute("SELECT name FROM sqlite_schema ORDER BY name")]
    assert names == ["ix_task_done_sender", "other"]


async def test_an_error_in_the_middle_of_a_migration_leaves_what_was(tmp_path):
    path = tmp_path / "t.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as raw:
        upgrade(raw, "0003")
        raw.executescript("CREATE TABLE other (x); CREATE VIEW task_done_by_sender AS SELECT x FROM other;")
        before = definitions(raw)
    assert "task_done_by_sender already exists" in await open_error(path)
    with closing(sqlite3.connect(path)) as raw:
        assert definitions(raw) == before
        assert raw.execute(f"SELECT version_num FROM {VERSION_TABLE}").fetchall() == [("0003",)]


OPENER = textwrap.dedent("""
    import asyncio, sys
    from datetime import timedelta
    from relay.records.retention import Retention
    from relay.records.store import open_store

    async def main():
        sys.stdin.readline()
        store = await open_store("sqlite:///" + sys.argv[1], Retention(timedelta(days=1)))
        print(await store.count())
        await store.close()

    asyncio.run(main())
""")


@pytest.mark.parametrize("attempt", range(3))
def test_processes_that_open_a_new_file_at_the_same_time(tmp_path, attempt):
    path = tmp_path / "t.db"
    openers = [
        subprocess.Popen(
            [sys.executable, "-c", OPENER, str(path)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for opener in openers:
        opener.stdin.write("\n")
        opener.stdin.flush()
    for opener in openers:
        out, err = opener.communicate(timeout=50)
        assert (opener.returncode, out, err) == (0, "0\n", "")
    with closing(sqlite3.connect(path)) as raw:
        assert raw.execute("PRAGMA auto_vacuum").fetchone() == (2,)
        assert raw.execute("PRAGMA integrity_check").fetchone() == ("ok",)


async def test_stores_that_open_a_new_file_at_the_same_time_in_one_process(tmp_path):
    url = f"sqlite:///{tmp_path}/t.db"
    for store in await asyncio.gather(*(open_store(url, RETENTION) for _ in range(4))):
        assert await store.count() == 0
        await store.close()


def test_alembic_is_loaded_where_there_is_something_to_migrate_alone(tmp_path):
    script = textwrap.dedent("""
        import asyncio, sys
        from datetime import timedelta
        from relay.records.retention import Retention
        from relay.records.store import open_store

        async def main():
            store = await open_store("sqlite:///" + sys.argv[1], Retention(timedelta(days=1)))
            await store.close()

        asyncio.run(main())
        print("alembic" in sys.modules)
    """)
    with closing(sqlite3.connect(tmp_path / "old.db", isolation_level=None)) as raw:
        upgrade(raw, "0003")

    def open_it(name):
        run = [sys.executable, "-c", script, str(tmp_path / name)]
        return subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert [open_it("new.db"), open_it("new.db")] == ["False\n"] * 2
    assert [open_it("old.db"), open_it("old.db")] == ["True\n", "False\n"]


async def test_a_transaction_that_fails_is_undone(tmp_path):
    database = await Database.open(tmp_path / "t.db", create=True, busy_timeout=1)

    def fail(raw):
        raw.execute("INSERT INTO task_done_state (name, value) VALUES ('a', 'b')")
        raise LookupError("on purpose")

    with pytest.raises(LookupError):
        await database.transaction(fail)
    assert await database.run(lambda raw: raw.in_transaction) is False
    assert await database.read(lambda raw: raw.execute("SELECT * FROM task_done_state").fetchall()) == []
    await database.close()


async def test_a_reader_cannot_write(tmp_path):
    database = await Database.open(tmp_path / "t.db", create=True, busy_timeout=1)
    with pytest.raises(StoreError, match="SQLITE_READONLY"):
        await database.read(lambda raw: raw.execute("DELETE FROM task_done"))
    await database.close()


async def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "t.db"
    await (await Database.open(path, create=True, busy_timeout=1)).close()
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 4096 * 8)
    assert f"{path}: is damaged" in await open_error(path)


@pytest.mark.parametrize("begin", ["BEGIN", "BEGIN IMMEDIATE"])
async def test_the_switch_to_write_ahead_logging_waits_as_long_as_for_any_lock(tmp_path, begin):
    path = tmp_path / "t.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as someone_else:
        someone_else.execute("CREATE TABLE other (x)")
        someone_else.execute(begin)
        someone_else.execute("SELECT * FROM other").fetchall()
        assert "locked by another process" in await open_error(path, busy_timeout=0.05)
        opening = asyncio.create_task(Database.open(path, create=True, busy_timeout=30))
        await asyncio.sleep(0.05)
        assert not opening.done()
        someone_else.execute("ROLLBACK")
        await (await opening).close()


async def test_a_path_that_is_too_long_for_sqlite(tmp_path):
    assert "cannot be opened" in await open_error(tmp_path.joinpath(*["d" * 200] * 3, "t.db"))


async def test_a_value_that_sqlite3_cannot_bind_is_rejected(tmp_path):
    database = await Database.open(tmp_path / "t.db", create=True, busy_timeout=1)
    with pytest.raises(RejectedRecordError):
        await database.run(lambda raw: raw.execute("SELECT ?", (object(),)))
    await database.close()


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("tail", ["", "-wal"])
@pytest.mark.parametrize("restored", [False, True])
async def test_a_file_that_was_removed_or_replaced_takes_no_more_rows(tmp_path, replace, tail, restored):
    path = tmp_path / "t.db"
    path.touch()
    if restored:  # by VACUUM INTO, say, which leaves no write-ahead logging
        await (await Database.open(path, create=True, busy_timeout=1)).close()
        with closing(sqlite3.connect(path)) as raw:
            raw.execute("PRAGMA journal_mode = DELETE")
    link = tmp_path / "link.db"
    link.symlink_to(path)
    database = await Database.open(link, create=True, busy_timeout=1)
    await database.transaction(lambda raw: raw.execute("DELETE FROM task_done_state"))
    file = path.with_name(path.name + tail)
    file.rename(tmp_path / "moved")
    if replace:
        file.write_bytes(b"")
    with pytest.raises(StoreError, match=f"{tail}: was removed or replaced"):
        await database.transaction(lambda raw: raw.execute("DELETE FROM task_done_state"))
    await database.close()


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("noticed", [False, True])
async def test_a_backup_that_is_put_in_place_under_the_relay_is_not_spoiled(tmp_path, moved, noticed):
    path, backup, old = tmp_path / "t.db", tmp_path / "backup.db", tmp_path / "old.db"
    database = await Database.open(path, create=True, busy_timeout=1)
    with closing(sqlite3.connect(path)) as raw:
        raw.execute("VACUUM INTO ?", (str(backup),))
    await database.transaction(lambda raw: raw.execute("CREATE TABLE later (x)"))
    if moved:
        path.rename(old)
    backup.rename(path)
    if noticed:
        with pytest.raises(StoreError, match="was removed or replaced"):
            await database.transaction(lambda raw: raw.execute("DELETE FROM later"))
        assert (tmp_path / "t.db-wal").stat().st_size == 0  # at once, for who is killed before a stop
    await database.close()
    await (await Database.open(path, create=False, busy_timeout=1)).close()
    with closing(sqlite3.connect(path)) as raw:
        assert raw.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert raw.execute("SELECT name FROM sqlite_schema WHERE name = 'later'").fetchall() == []
    if moved:
        with closing(sqlite3.connect(old)) as raw:
            assert raw.execute("SELECT * FROM later").fetchall() == []


async def test_a_backup_is_not_spoiled_where_a_reader_was_in_the_way_at_first(tmp_path):
    path, backup, old = tmp_path / "t.db", tmp_path / "backup.db", tmp_path / "old.db"
    database = await Database.open(path, create=True, busy_timeout=0.01)
    with closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("VACUUM INTO ?", (str(backup),))
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM task_done").fetchone()
        await database.transaction(lambda raw: raw.execute("CREATE TABLE later (x)"))
        path.rename(old)
        backup.rename(path)
        with pytest.raises(StoreError, match="was removed or replaced"):
            await database.transaction(lambda raw: raw.execute("DELETE FROM later"))
        assert (tmp_path / "t.db-wal").stat().st_size > 0
        reader.execute("ROLLBACK")
        await database.close()
    await (await Database.open(path, create=False, busy_timeout=1)).close()
    for file, found in ((path, []), (old, [("later",)])):
        with closing(sqlite3.connect(file)) as raw:
            assert raw.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            assert raw.execute("SELECT name FROM sqlite_schema WHERE name = 'later'").fetchall() == found


async def test_rows_in_a_write_ahead_log_that_was_removed_are_there_after_a_stop_in_order(tmp_path):
    path = tmp_path / "t.db"
    database = await Database.open(path, create=True, busy_timeout=1)
    await database.transaction(lambda raw: raw.execute("CREATE TABLE kept (x)"))
    path.with_name("t.db-wal").unlink()
    await database.close()
    with closing(sqlite3.connect(path)) as found:
        assert found.execute("SELECT * FROM kept").fetchall() == []
        assert found.execute("PRAGMA quick_check").fetchone() == ("ok",)


def test_a_cancelled_read_leaves_no_thread_that_outlives_the_event_loop(tmp_path):
    """Such a thread would report to a loop that is closed, and its exception would be nobody's."""

    async def give_up_a_read(steps):
        database = await Database.open(tmp_path / "rows.db", create=True, busy_timeout=1)
        reading = asyncio.create_task(database.read(lambda raw: raw.execute("SELECT 1").fetchall()))
        for _ in range(steps):
            await asyncio.sleep(0)
        reading.cancel()
        await asyncio.wait([reading])
        await database.close()

    before = set(threading.enumerate())
    lost = []
    hook, threading.excepthook = threading.excepthook, lost.append
    try:
        for attempt in range(60):
            asyncio.run(give_up_a_read(attempt % 4))
        for thread in set(threading.enumerate()) - before:
            thread.join()
    finally:
        threading.excepthook = hook
    assert lost == []
