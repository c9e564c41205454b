"""What stands in the store's place: a real relay refuses it in one line and leaves it as it was, or serves.

Refused means: exit status 1, one line that names the file and what to do; and no octet, mode or time of
anything in the directory has changed, nor has anything been added.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from relay.records.model import Record
from relay.records.retention import Retention
from relay.records.store import open_store
from relay.records.tables import SCHEMA_VERSION, VERSION_TABLE
from tests.support.client import Client
from tests.support.process import RelayProcess
from tests.support.tables import BACK_TO_0001
from tests.support.upstream import ScriptedUpstream

PAGE = 4096
BOUND_BY_MODES = "tests.support.without_rights"
CONTENT = b"Subject: x\r\n\r\nx\r\n"
Build = Callable[[Path], Any]


async def make_store(path: Path, rows: int = 0) -> None:
    """A store as a relay leaves it, closed in order."""
    store = await open_store(f"sqlite:///{path}", Retention(timedelta(days=30)))
    now = datetime.now(UTC)
    for start in range(0, rows, 500):
        await store.write(
            [
                Record(
                    task_id=UUID(int=number),
                    task_type="mention",
                    sender=f"sender{number}@example.com",
                    client="127.0.0.1",
                    sent_at=now,
                    upstream="primary",
                    upstream_reply="250 Ok",
                    size=1,
                    duration_ms=1,
                    recipients=(f"r{number}@example.net",),
                )
                for number in range(start, min(rows, start + 500))
            ]
        )
    await store.close()


def sql(path: Path, script: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as raw:
        raw.executescript(script)


def overwrite(path: Path, offset: int, octets: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(octets)


def noise(count: int) -> bytes:
    return random.Random(4).randbytes(count)


# What is refused


def text(path: Path) -> None:
    path.write_text("From: postmaster\n" * 1000)


def short_text(path: Path) -> None:
    path.write_text("TODO: put the database here\n")


def encrypted(path: Path) -> None:
    path.write_bytes(noise(20 * PAGE))


def other_table_of_that_name(path: Path) -> None:
    sql(
        path,
        "CREATE TABLE task_done (id INTEGER PRIMARY KEY, name TEXT); INSERT INTO task_done VALUES (1, 'x');",
    )


async def newer(path: Path) -> None:
    await make_store(path, 10)
    sql(path, f"UPDATE {VERSION_TABLE} SET version_num = '9999'")


async def lost_column(path: Path) -> None:
    await make_store(path, 10)
    sql(path, "ALTER TABLE task_done RENAME COLUMN upstream TO server")


async def damaged_magic(path: Path) -> None:
    await make_store(path, 10)
    overwrite(path, 0, b"SQLite formAt 3\0")


async def damaged_page_size(path: Path) -> None:
    await make_store(path, 10)
    overwrite(path, 16, b"\x12\x34")


async def damaged_format(path: Path) -> None:
    await make_store(path, 10)
    overwrite(path, 18, b"\x07\x07")  # read and write versions of a SQLite to come


async def damaged_schema(path: Path) -> None:
    await make_store(path, 10)
    overwrite(path, 100, noise(PAGE - 100))


async def half_restored(path: Path) -> None:
    """A copy that is under way: the file has less pages than its header says."""
    await make_store(path, 2000)
    os.truncate(path, path.stat().st_size // PAGE // 2 * PAGE)


async def torn_restored(path: Path) -> None:
    await make_store(path, 2000)
    os.truncate(path, 3 * PAGE + 77)


def directory(path: Path) -> None:
    path.mkdir()


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/full")


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def dangling(path: Path) -> None:
    path.symlink_to("nowhere.db")


async def read_only_file(path: Path) -> None:
    await make_store(path, 10)
    path.chmod(0o440)


async def read_only_directory(path: Path) -> None:
    await make_store(path, 10)
    path.parent.chmod(0o550)


async def closed_directory(path: Path) -> None:
    await make_store(path, 10)
    path.parent.chmod(0o000)


async def unreadable_file(path: Path) -> None:
    await make_store(path, 10)
    path.chmod(0o200)


async def left_after_a_crash(path: Path, *, made: bool = False) -> None:
    """The file, the log and its index, as a relay that was killed leaves them."""
    if not made:
        await make_store(path, 10)
    before = path.with_name("before.db")
    shutil.copyfile(path, before)
    with contextlib.closing(sqlite3.connect(path)) as raw:
        raw.execute("PRAGMA wal_autocheckpoint = 0")
        raw.execute("UPDATE task_done SET task_type = 'from the log'")
        raw.commit()
        for ending in ("-wal", "-shm"):
            shutil.copyfile(f"{path}{ending}", f"{path}{ending}.kept")
    before.replace(path)
    for ending in ("-wal", "-shm"):
        Path(f"{path}{ending}.kept").replace(f"{path}{ending}")


async def log_without_rights(path: Path) -> None:
    await left_after_a_crash(path)
    Path(f"{path}-wal").chmod(0o440)


async def index_without_rights(path: Path) -> None:
    await left_after_a_crash(path)
    Path(f"{path}-shm").chmod(0o440)


async def log_is_a_directory(path: Path) -> None:
    await make_store(path, 10)
    Path(f"{path}-wal").mkdir()


NOT_A_DATABASE = "is not a SQLite database; it was left alone, name another file in records.url"
DAMAGED = "is damaged; move it away, or put a backup in its place"
NOT_A_FILE = "is not a file; name a file in records.url"
RIGHTS = "give the relay's user the file"
REFUSED: list[tuple[Build, str]] = [
    (text, NOT_A_DATABASE),
    (short_text, NOT_A_DATABASE),
    (encrypted, NOT_A_DATABASE),
    (other_table_of_that_name, "task_done that the relay did not make"),
    (newer, "has schema version 9999"),
    (lost_column, "has no column upstream; put a backup"),
    (damaged_magic, NOT_A_DATABASE),
    (damaged_page_size, NOT_A_DATABASE),
    (damaged_format, NOT_A_DATABASE),
    (damaged_schema, DAMAGED),
    (half_restored, DAMAGED),
    (torn_restored, DAMAGED),
    (directory, NOT_A_FILE),
    (fifo, NOT_A_FILE),
    (device, NOT_A_FILE),
    (loop, NOT_A_FILE),
    (dangling, NOT_A_FILE),
    (read_only_file, RIGHTS),
    (read_only_directory, "cannot be written, and SQLite keeps files beside its own there"),
    (closed_directory, "Permission denied"),
    (unreadable_file, RIGHTS),
    (log_without_rights, RIGHTS),
    (index_without_rights, RIGHTS),
    (log_is_a_directory, "cannot be opened"),
]


@pytest.fixture
def store_path(tmp_path: Path) -> Iterator[Path]:
    """Where the store is to be: a directory of its own, so that a look shows everything beside it."""
    directory = tmp_path / "store"
    directory.mkdir()
    yield directory / "rows.db"
    directory.chmod(0o700)


def relay_on(
    path: Path, upstream_port: int = 25, *, module: str = BOUND_BY_MODES, **over: Any
) -> RelayProcess:
    over["records"] = {"url": f"sqlite:///{path}"} | over.get("records", {})
    relay = RelayProcess(path.parent.parent, upstream_port, module=module, **over)
    relay.database = path
    return relay


async def built(build: Build, path: Path) -> None:
    made = build(path)
    if made is not None:
        await made


def seen(directory: Path) -> dict[str, Any]:
    """Everything in a directory: kind and mode, time of change, octets."""
    mode = directory.stat().st_mode
    directory.chmod(0o700)
    try:
        return {".": (mode, b"")} | {
            file.name: (
                file.lstat().st_mode,
                file.lstat().st_mtime_ns,
                file.read_bytes() if file.is_file() and not file.is_symlink() else b"",
            )
            for file in sorted(directory.iterdir())
        }
    finally:
        directory.chmod(mode & 0o777)


async def refused(relay: RelayProcess) -> str:
    """Start the relay, which must end by itself with status 1; return its one line."""
    await relay.spawn()
    assert await relay.ended() == 1, relay.errors()
    (line,) = relay.errors().splitlines()
    assert line.startswith("relay: ")
    return line


@pytest.mark.parametrize(("build", "reason"), REFUSED, ids=[build.__name__ for build, _ in REFUSED])
async def test_it_is_refused_and_left_as_it_was(store_path: Path, build: Build, reason: str) -> None:
    await built(build, store_path)
    before = seen(store_path.parent)
    async with relay_on(store_path) as relay:
        line = await refused(relay)
    assert str(store_path.parent) in line
    assert reason in line
    assert seen(store_path.parent) == before


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system without a free page."""
    disk = tmp_path / "store"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("no right to mount a small disk")
    with contextlib.suppress(OSError), (disk / "ballast").open("wb", buffering=0) as ballast:
        while True:
            ballast.write(bytes(PAGE))
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


async def test_a_disk_that_is_full(full_disk: Path) -> None:
    async with relay_on(full_disk / "rows.db", module="relay") as relay:
        line = await refused(relay)
    assert f"{full_disk}/rows.db: " in line
    assert "the disk is full; make room" in line


HOLDER = """
import sqlite3, sys
raw = sqlite3.connect(sys.argv[1], isolation_level=None)
raw.execute("PRAGMA locking_mode = EXCLUSIVE")
raw.execute("BEGIN EXCLUSIVE")
print("held", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def held() -> Iterator[Callable[[Path], None]]:
    """Has another process take the whole file. Not this one: it would lose its lock by reading the file."""
    with contextlib.ExitStack() as holders:

        def hold(path: Path) -> None:
            command = [sys.executable, "-c", HOLDER, str(path)]
            holder = holders.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"

        yield hold


async def test_another_process_holds_it(store_path: Path, held: Callable[[Path], None]) -> None:
    await make_store(store_path, 10)
    held(store_path)
    before = seen(store_path.parent)
    async with relay_on(store_path) as relay:
        line = await refused(relay)
    assert f"{store_path}: locked by another process for more than 5 s; find what holds it open" in line
    assert seen(store_path.parent) == before


async def test_a_newer_one_that_was_left_by_a_crash_keeps_all_it_has(store_path: Path) -> None:
    """SQLite carries the log into the file when it closes it: octets move, the content does not change."""
    await make_store(store_path, 10)
    sql(store_path, f"UPDATE {VERSION_TABLE} SET version_num = '9999'")
    await left_after_a_crash(store_path, made=True)
    async with relay_on(store_path) as relay:
        assert "has schema version 9999" in await refused(relay)
    with contextlib.closing(sqlite3.connect(store_path)) as raw:
        assert raw.execute("SELECT DISTINCT task_type FROM task_done").fetchall() == [("from the log",)]
        assert raw.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


# What is served


def empty(path: Path) -> None:
    path.touch()


def of_another_application(path: Path) -> None:
    sql(path, "CREATE TABLE users (id INTEGER PRIMARY KEY, name TEXT); INSERT INTO users VALUES (1, 'ada');")


async def older(path: Path) -> None:
    """As the first version made it."""
    await make_store(path, 10)
    sql(path, BACK_TO_0001)


async def link(path: Path) -> None:
    other = path.parent.parent / "elsewhere"
    other.mkdir()
    await make_store(other / "real.db", 10)
    path.symlink_to(other / "real.db")


async def index_is_noise(path: Path) -> None:
    """SQLite makes the log's index anew."""
    await left_after_a_crash(path)
    Path(f"{path}-shm").write_bytes(noise(32768))


async def log_is_noise(path: Path) -> None:
    """A log without a valid header has nothing that was ever committed."""
    await make_store(path, 10)
    Path(f"{path}-wal").write_bytes(noise(5 * PAGE))


async def log_is_torn(path: Path) -> None:
    """The last frames of a power failure: what was committed before them counts."""
    await left_after_a_crash(path)
    log = Path(f"{path}-wal")
    overwrite(log, log.stat().st_size, noise(PAGE))


SERVED: list[tuple[Build, int]] = [
    (empty, 0),
    (of_another_application, 0),
    (older, 10),
    (link, 10),
    (left_after_a_crash, 10),
    (index_is_noise, 10),
    (log_is_noise, 10),
    (log_is_torn, 10),
]


@pytest.mark.parametrize(("build", "rows"), SERVED, ids=[build.__name__ for build, _ in SERVED])
async def test_it_is_served(store_path: Path, upstream: ScriptedUpstream, build: Build, rows: int) -> None:
    await built(build, store_path)
    async with relay_on(store_path, upstream.port) as relay:
        await relay.start()
        async with Client(relay.port) as client:
            await client.greeting()
            await client.ehlo()
            replies = await client.message("a@example.test", ["b@example.test"], CONTENT)
        assert replies[-1].code == 250
        assert await relay.terminate() == 0
        assert len(relay.rows()) == rows + 1
        assert relay.rows(f"SELECT * FROM {VERSION_TABLE}") == [{"version_num": SCHEMA_VERSION}]
        assert relay.rows("PRAGMA integrity_check") == [{"integrity_check": "ok"}]
        if build is of_another_application:
            assert relay.rows("SELECT * FROM users") == [{"id": 1, "name": "ada"}]
        if "crash" in build.__name__ or build is log_is_torn:
            assert relay.rows()[0]["task_type"] == "from the log"
    assert not relay.errors()


# Damage that a start does not see


async def test_damage_that_a_start_does_not_see(store_path: Path, upstream: ScriptedUpstream) -> None:
    """Mail flows, its rows wait in the spool, log and readiness say why; a file that is whole gets them."""
    await make_store(store_path, 3000)
    pages = store_path.stat().st_size // PAGE
    backup = store_path.with_name("backup.db")
    shutil.copyfile(store_path, backup)
    # The roots and the schema stand at the beginning, where they were made; the leaves of all trees follow.
    overwrite(store_path, 60 * PAGE, noise((pages - 60) * PAGE))
    async with relay_on(store_path, upstream.port) as relay:
        await relay.start()
        async with Client(relay.port) as client:
            await client.greeting()
            await client.ehlo()
            for _ in range(3):
                replies = await client.message("a@example.test", ["b@example.test"], CONTENT)
                assert replies[-1].code == 250
        said = f"{store_path}: {DAMAGED} (SQLITE_CORRUPT"
        assert any(line["event"].startswith(f"rows go to the spool: {said}") for line in relay.log())
        status, body = await relay.get("/readyz")
        assert status == 200
        assert f"rows go to the spool: {said}" in body
        assert await relay.metric("records_spooled") == 3
        assert await relay.terminate() == 0
        store_path.rename(store_path.with_name("damaged.db"))
        for ending in ("-wal", "-shm"):
            Path(f"{store_path}{ending}").unlink(missing_ok=True)
        backup.rename(store_path)
        await relay.start()
        await relay.until("records_spooled", 0)
        assert "rows go to the spool" not in (await relay.get("/readyz"))[1]
        assert await relay.terminate() == 0
        assert len(relay.rows()) == 3003
    assert len(upstream.accepted) == 3
