"""PostgreSQL: what is made, what is left alone, what the operator is told, what happens while it is away."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import subprocess
import sys
import textwrap
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID
from zoneinfo import ZoneInfo

import asyncpg
import pytest
from sqlalchemy.dialects import postgresql

from relay.records.by import By
from relay.records.errors import (
    MissingStoreError,
    OlderStoreError,
    RejectedRecordError,
    StoreError,
    UnreachableError,
)
from relay.records.migrations import upgrade_postgres
from relay.records.model import Record
from relay.records.postgres.database import Database
from relay.records.queries import open_queries
from relay.records.retention import Retention
from relay.records.schema import metadata
from relay.records.search import page_of_sends
from relay.records.sends import SendFilter
from relay.records.store import check_makeable, open_store
from relay.records.tables import SCHEMA_VERSION, SCHEMA_VERSIONS, VERSION_TABLE
from tests.support import postgres
from tests.support.certificates import Certificates

ROOT = Path(__file__).parents[2]
NOW = datetime(2026, 11, 23, 7, 46, tzinfo=UTC)
MONTH = Retention(timedelta(days=30))
TABLES = "SELECT count(*) FROM pg_class WHERE relname LIKE 'task%' AND relkind IN ('r', 'v')"


def record(number=0, **changes):
    values = {
        "task_id": UUID(int=number),
        "task_type": "mention",
        "sender": "a@x",
        "client": "127.0.0.1",
        "sent_at": NOW,
        "upstream": "primary",
        "upstream_reply": "250 Ok",
        "size": 4096,
        "duration_ms": 12,
        "recipients": ("b@y",),
    }
    return Record(**(values | changes))


async def refusal(url, **options):
    """Open what cannot be opened; return what the operator is told, and the kind of error."""
    with pytest.raises(StoreError) as caught:
        await (await open_store(url, MONTH, **options)).close()
    text = str(caught.value)
    assert "\n" not in text
    assert "sesame" not in text
    return text, type(caught.value)


@pytest.fixture
def empty(cluster):
    made = cluster.database(empty=True)
    yield made
    made.drop()


@pytest.fixture
def own_server():
    """A server that a test may stop, kill and configure."""
    with postgres.Server(postgres.directory_of(postgres.NEWEST)) as server:
        yield server


# Making


async def test_tables_have_native_types_and_everything_has_a_comment(postgres_database):
    types = dict(
        postgres_database.rows(
            "SELECT column_name::text, data_type || ' ' || coalesce(identity_generation, '') "
            "FROM information_schema.columns WHERE table_name = 'task_done'"
        )
    )
    assert types["id"] == "bigint ALWAYS"
    assert types["task_id"] == "uuid "
    assert types["sent_at"] == types["expires_at"] == "timestamp with time zone "
    assert types["data"] == "jsonb "
    bare = postgres_database.rows(
        "SELECT c.relname || '.' || a.attname FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid "
        "WHERE c.relname LIKE 'task%' AND c.relkind IN ('r', 'v') AND attnum > 0 "
        "AND (col_description(c.oid, attnum) IS NULL OR obj_description(c.oid, 'pg_class') IS NULL)"
    )
    assert bare == []


async def test_the_migrations_make_what_the_metadata_says(cluster, postgres_database, empty):
    definitions = (
        "SELECT indexdef FROM pg_indexes WHERE schemaname = 'public' AND tablename <> 'task_done_version' "
        "UNION ALL SELECT table_name || ' ' || column_name || ' ' || data_type || ' ' || is_nullable "
        "|| coalesce(identity_generation, '') FROM information_schema.columns c "
        "JOIN information_schema.tables USING (table_schema, table_name) "
        "WHERE table_schema = 'public' AND table_type = 'BASE TABLE' AND table_name <> 'task_done_version' "
        "UNION ALL SELECT conname || pg_get_constraintdef(oid) FROM pg_constraint "
        "WHERE connamespace = 'public'::regnamespace AND conname NOT LIKE '%version%' "
        "AND contype <> 'n' ORDER BY 1"
    )
    from sqlalchemy.ext.asyncio import create_async_engine

    engine = create_async_engine("postgresql+asyncpg://", async_creator=lambda: asyncpg.connect(empty.url))
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
    await engine.dispose()
    assert postgres_database.rows(definitions) == empty.rows(definitions)


@pytest.mark.parametrize("version", SCHEMA_VERSIONS[:-1])
async def test_a_database_of_an_older_version_is_brought_up_and_keeps_what_it_has(empty, version):
    await upgrade_postgres(lambda: asyncpg.connect(empty.url), version)
    empty.execute("INSERT INTO task_done_state VALUES ('kept', 'as it was', NULL)")
    text, kind = await refusal(empty.url, create=False, upgrade=False)
    assert f"has schema version {version}; the next start brings it up to date" in text
    assert kind is OlderStoreError
    assert empty.rows(f"SELECT version_num FROM {VERSION_TABLE}") == [(version,)]
    store = await open_store(empty.url, MONTH, create=False)
    await store.write([record()])
    await store.close()
    assert empty.rows("SELECT value FROM task_done_state") == [("as it was",)]
    assert empty.rows(f"SELECT version_num FROM {VERSION_TABLE}") == [(SCHEMA_VERSION,)]


STARTER = textwrap.dedent("""
    import asyncio, sys
    from datetime import timedelta
    from relay.records.retention import Retention
    from relay.records.store import open_store

    async def main():
        print("ready", flush=True)
        sys.stdin.readline()
        store = await open_store(sys.argv[1], Retention(timedelta(days=1)))
        print(await store.count())
        await store.close()

    asyncio.run(main())
""")


def test_ten_that_start_at_once_make_the_tables_once(empty):
    with contextlib.ExitStack() as stack:
        starters = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", STARTER, empty.url],
                    cwd=ROOT,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            for _ in range(10)
        ]
        for starter in starters:
            assert starter.stdout.readline() == "ready\n"
        for starter in starters:
            starter.stdin.write("\n")
            starter.stdin.flush()
        for starter in starters:
            found, wrong = starter.communicate(timeout=50)
            assert (found, wrong) == ("0\n", "")
    assert empty.rows(f"SELECT version_num FROM {VERSION_TABLE}") == [(SCHEMA_VERSION,)]


async def test_who_only_reads_makes_nothing(empty):
    text, kind = await refusal(empty.url, create=False)
    assert "has no tables of the relay" in text
    assert kind is MissingStoreError
    with pytest.raises(MissingStoreError, match="has no tables"):
        await open_queries(empty.url)
    assert empty.rows(TABLES) == [(0,)]


# Refusing


async def test_foreign_tables_are_left_alone(empty):
    empty.execute("CREATE TABLE task_done (mine int)")
    text, _ = await refusal(empty.url)
    assert "that the relay did not make" in text
    assert empty.rows(TABLES) == [(1,)]


async def test_a_newer_schema_is_refused(postgres_database):
    postgres_database.execute(f"UPDATE {VERSION_TABLE} SET version_num = '9999'")
    text, _ = await refusal(postgres_database.url)
    assert "install the newer version" in text
    postgres_database.execute(f"UPDATE {VERSION_TABLE} SET version_num = '{SCHEMA_VERSIONS[0]}'")
    with pytest.raises(StoreError, match="start the relay on it once"):
        await open_queries(postgres_database.url)


async def test_a_column_that_is_gone(postgres_database):
    postgres_database.execute("ALTER TABLE task_done DROP COLUMN size CASCADE")
    text, _ = await refusal(postgres_database.url)
    assert "has no column size" in text


async def test_a_database_that_is_not_there(cluster):
    text, kind = await refusal(cluster.server.url("nowhere"))
    assert 'database "nowhere" does not exist; make it (createdb)' in text
    assert kind is StoreError


async def test_rows_are_not_entrusted_to_a_database_that_does_not_wait_for_its_disk(cluster, empty):
    cluster.run(cluster.admin(f"ALTER DATABASE {empty.name} SET synchronous_commit = off"))
    text, _ = await refusal(empty.url)
    assert "synchronous_commit is off" in text


async def test_a_role_that_may_not_make_tables(cluster, empty):
    cluster.run(cluster.admin("DROP ROLE IF EXISTS nobody_much"))
    cluster.run(cluster.admin("CREATE ROLE nobody_much LOGIN"))
    text, _ = await refusal(cluster.server.url(empty.name, user="nobody_much"))
    assert "permission denied for schema public; GRANT CREATE" in text
    with pytest.raises(StoreError, match="may not make tables; GRANT CREATE"):
        await check_makeable(cluster.server.url(empty.name, user="nobody_much"))
    await check_makeable(empty.url)


@pytest.mark.parametrize("style", ["SQL, DMY", "German", "Postgres, MDY"])
async def test_times_are_counted_however_the_database_writes_them(cluster, postgres_database, style):
    for setting in (f"datestyle = '{style}'", "timezone = 'Asia/Kolkata'"):
        cluster.run(cluster.admin(f"ALTER DATABASE {postgres_database.name} SET {setting}"))
    store = await open_store(postgres_database.url, MONTH)
    await store.write([record(1), record(2, sent_at=NOW - timedelta(days=1))])
    await store.close()
    queries = await open_queries(postgres_database.url)
    found = {
        (by, zone): [
            count.keys[0] for count in (await queries.statistics(SendFilter(), [by], zone=zone)).counts
        ]
        for by, zone in [(By.DAY, UTC), (By.HOUR, UTC), (By.DAY, ZoneInfo("Asia/Kolkata"))]
    }
    await queries.close()
    assert found[By.DAY, UTC] == found[By.DAY, ZoneInfo("Asia/Kolkata")] == ["2026-11-22", "2026-11-23"]
    hours = found[By.HOUR, UTC]
    assert (len(hours), hours[0], hours[-1]) == (25, "2026-11-22T07:00:00+00:00", "2026-11-23T07:00:00+00:00")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("ask", ["say_retention", "count"])
async def test_a_cancelled_wait_for_a_server_that_does_not_answer_is_cancelled(own_server, ask):
    """Whoever ends a loop of such questions would have to wait for the loop for ever, else."""
    store = await open_store(own_server.url(own_server.database()), MONTH)
    arguments = ("one", MONTH.to_text(), NOW) if ask == "say_retention" else ()
    await getattr(store, ask)(*arguments)
    with own_server.frozen():
        asking = asyncio.ensure_future(getattr(store, ask)(*arguments))
        await asyncio.wait((asking,), timeout=0.5)
        asking.cancel()
        await asyncio.wait((asking,), timeout=30)
        assert asking.cancelled()
    await getattr(store, ask)(*arguments)
    await store.close()


async def test_a_password(own_server):
    own_server.sql("CREATE ROLE secretive LOGIN SUPERUSER PASSWORD 'sesame'")
    database = own_server.database()
    (own_server.data / "pg_hba.conf").write_text("host all all 127.0.0.1/32 scram-sha-256\n")
    own_server.stop()
    url = f"postgresql://secretive:{{}}@{own_server.address}/{database}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PGPASSFILE", str(own_server.home / "none"))
        own_server.start()
        text, kind = await refusal(url.format("wrong"))
        assert "change records.password_file" in text
        assert kind is StoreError
        await (await open_store(url.format("sesame"), MONTH)).close()
        passwords = own_server.home / "passwords"
        passwords.write_text("*:*:*:secretive:sesame\n")
        passwords.chmod(0o600)
        patch.setenv("PGPASSFILE", str(passwords))
        await (await open_store(url.replace(":{}", ""), MONTH)).close()


@pytest.fixture
def debian_server():
    """A server that knows TLS, which the one from the package does not."""
    programs = postgres.directory_of(postgres.DEBIAN)
    if programs is None:
        pytest.skip("PostgreSQL of Debian is not installed")
    with postgres.Server(programs) as server:
        yield server


@pytest.mark.interop
async def test_tls(debian_server, tmp_path):
    own_server = debian_server
    database = own_server.database()
    text, _ = await refusal(f"{own_server.url(database)}?sslmode=require")
    assert "the server has no TLS" in text
    certificates = Certificates()
    cert, key = certificates.write_server(own_server.home, "localhost")
    own_server.adopt(cert, key)
    own_server.stop()
    own_server.start(f"ssl_cert_file={cert}", f"ssl_key_file={key}", "ssl=on")
    authority = tmp_path / "ca.pem"
    certificates.write_authority(authority)
    by_name = own_server.url(database).replace("127.0.0.1", "localhost")
    store = await open_store(f"{by_name}?sslmode=verify-full&sslrootcert={authority}", MONTH)
    await store.write([record()])
    await store.close()
    other = tmp_path / "other.pem"
    Certificates().write_authority(other)
    text, _ = await refusal(f"{by_name}?sslmode=verify-full&sslrootcert={other}")
    assert "TLS failed" in text


# Data that never fits


@pytest.mark.parametrize(
    "bad",
    [
        {"sender": "a\0b@x"},
        {"recipients": ("a\0b@x",)},
        {"data": {"x": "\0"}},
        {"size": 2**63},
        {"upstream": None},
        {"data": {"n": 10**400}},
    ],
    ids=str,
)
async def test_what_postgresql_will_never_take_is_rejected(postgres_database, bad):
    store = await open_store(postgres_database.url, MONTH)
    with pytest.raises(RejectedRecordError):
        await store.write([record(1), record(2, **bad)])
    assert await store.count() == 0
    await store.write([record(1)])
    assert await store.count() == 1
    await store.close()


async def test_a_message_id_may_be_longer_than_an_entry_of_a_btree(postgres_database):
    store = await open_store(postgres_database.url, MONTH)
    long = "".join(chr(0x4E00 + number * 7 % 20000) for number in range(998))
    await store.write([record(1, message_id=long)])
    await store.close()
    queries = await open_queries(postgres_database.url)
    [[send]] = [page async for page in queries.sends(SendFilter(message_id=long))]
    await queries.close()
    assert send.message_id == long


# Away


async def test_one_that_cannot_be_reached_is_opened_later_by_who_needs_it(own_server):
    database = own_server.database()
    own_server.stop()
    text, kind = await refusal(own_server.url(database))
    assert "cannot be reached" in text
    assert kind is UnreachableError
    store = await open_store(own_server.url(database), MONTH, later=True)
    with pytest.raises(UnreachableError):
        await store.write([record(1)])
    own_server.start()
    await store.write([record(1)])
    assert await store.count() == 1
    await store.close()


async def test_while_all_are_standbys_the_primary_is_awaited(own_server):
    """`target_session_attrs` is how a failover is followed: in its midst nobody is what it asks for."""
    database = own_server.database()
    own_server.stop()
    standby = own_server.data / "standby.signal"
    standby.touch()
    own_server.adopt(standby)
    own_server.start()
    url = f"{own_server.url(database)}?target_session_attrs=primary"
    text, kind = await refusal(url)
    assert "target_session_attrs" in text
    assert kind is UnreachableError
    store = await open_store(url, MONTH, later=True)
    with pytest.raises(UnreachableError):
        await store.write([record(1)])
    own_server.sql("SELECT pg_promote()")
    await store.write([record(1)])
    assert await store.count() == 1
    await store.close()


async def test_one_that_is_there_and_wrong_is_refused_also_later(cluster):
    text, _ = await refusal(cluster.server.url("nowhere"), later=True)
    assert "does not exist" in text


async def test_a_server_that_crashes_and_comes_back_is_found_again(own_server):
    database = own_server.database()
    store = await open_store(own_server.url(database), MONTH)
    await store.write([record(1)])
    for number in range(2, 5):
        own_server.kill()
        with pytest.raises(StoreError) as caught:
            await store.write([record(number)])
        assert not isinstance(caught.value, RejectedRecordError)
        own_server.start()
        async with asyncio.timeout(20):
            while True:
                try:
                    await store.write([record(number)])
                    break
                except StoreError:
                    await asyncio.sleep(0.05)
    assert await store.count() == 4
    await store.close()


async def test_sessions_that_are_ended_by_the_server_cost_one_write_at_most(postgres_database):
    store = await open_store(postgres_database.url, MONTH)
    await store.write([record(1)])
    postgres_database.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    with contextlib.suppress(StoreError):
        await store.write([record(2)])
    await store.write([record(2)])
    assert await store.count() == 2
    await store.close()


async def test_whenever_the_server_ends_a_session_the_store_says_that_it_is_away(postgres_database):
    """Between two statements too, where the driver finds itself in a state that it does not expect."""
    store = await open_store(postgres_database.url, MONTH)
    over = False

    async def writes(begin):
        for number in itertools.count(begin):
            if over:
                return
            with contextlib.suppress(UnreachableError):
                await store.write([record(number)])

    writing = [asyncio.create_task(writes(begin * 1_000_000)) for begin in range(1, 3)]
    other = await asyncpg.connect(postgres_database.url)
    for _ in range(200):
        await other.fetch(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND application_name = 'smtp-relay'"
        )
    over = True
    await asyncio.gather(*writing)
    await other.close()
    await store.write([record(1)])
    await store.close()


async def test_a_transaction_whose_session_is_ended_says_why(postgres_database):
    database = await Database.open(postgres_database.url, create=False, later=False)
    with pytest.raises(UnreachableError, match="terminating connection due to administrator command"):
        async with database.transaction() as connection:
            await connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")
    await database.close()


async def test_a_session_that_failed_is_not_used_again(postgres_database):
    """One that began while the database was read-only, say, would stay so when that is over."""
    other = await asyncpg.connect(postgres_database.url)  # which may write all the time
    change = f"ALTER DATABASE {await other.fetchval('SELECT current_database()')}"
    await other.execute(f"{change} SET default_transaction_read_only = on")
    store = await open_store(postgres_database.url, MONTH)
    with pytest.raises(UnreachableError, match="read-only"):
        await store.write([record(1)])
    await other.execute(f"{change} RESET default_transaction_read_only")
    await other.close()
    await store.write([record(1)])
    assert await store.count() == 1
    await store.close()


async def test_a_pooler_that_loses_prepared_statements_is_named(postgres_database):
    """As one in transaction mode does that does not know them: the session is another one meanwhile."""
    database = await Database.open(postgres_database.url, create=False, later=False)
    with pytest.raises(StoreError) as caught:
        async with database.connection() as connection:
            await connection.fetchval("SELECT $1::int", 1)
            await connection.execute("DEALLOCATE ALL")
            await connection.fetchval("SELECT $1::int", 1)
    with pytest.raises(StoreError) as twice:
        async with database.connection() as connection:
            await connection.execute("PREPARE again AS SELECT 1")
            await connection.execute("PREPARE again AS SELECT 1")
    await database.close()
    for error in (caught, twice):
        text = str(error.value)
        assert "max_prepared_statements" in text
        assert "statement_cache_size" not in text, "no setting of the relay"


# Many at once


async def test_inserts_do_not_wait_for_each_other(postgres_database):
    """While one transaction has written and not ended, others write and end."""
    store = await open_store(postgres_database.url, MONTH)
    other = await asyncpg.connect(postgres_database.url)
    async with other.transaction():
        await other.execute(
            "INSERT INTO task_done (task_id, task_type, sender, sender_domain, client, sent_at, upstream, "
            "upstream_reply, size, duration_ms, data) VALUES "
            "('00000000-0000-0000-0000-0000000000ff', 't', 's', 'd', 'c', now(), 'u', 'r', 1, 1, '{}')"
        )
        async with asyncio.timeout(20):
            await store.write([record(number) for number in range(1, 50)])
    await other.close()
    await store.close()
    assert postgres_database.rows("SELECT count(*) FROM task_done") == [(50,)]


async def test_expiry_leaves_rows_that_another_holds_and_ends(postgres_database):
    store = await open_store(postgres_database.url, Retention(timedelta(days=1)), clock=lambda: NOW)
    await store.write([record(number, sent_at=NOW - timedelta(days=2)) for number in range(100)])
    other = await asyncpg.connect(postgres_database.url)
    async with other.transaction():
        await other.execute(
            "SELECT 1 FROM task_done WHERE task_id < '00000000-0000-0000-0000-00000000000a' FOR UPDATE"
        )
        async with asyncio.timeout(20):
            assert await store.expire(NOW, 5000) == 90
    await other.close()
    assert await store.expire(NOW, 5000) == 10
    await store.close()


async def test_the_statements_of_the_page_for_readers_work(cluster, postgres_database):
    """The roles that docs/records.md tells an operator to make."""
    page = (ROOT / "docs/records.md").read_text()
    blocks = [part.split("```")[0] for part in page.split("```pgsql\n")[1:]]
    assert len(blocks) == 2
    reading = blocks[1].replace("DATABASE relay", f"DATABASE {postgres_database.name}")
    for statement in reading.split(";\n"):
        if statement.strip():
            postgres_database.execute(statement)
    try:
        reader = await asyncpg.connect(cluster.server.url(postgres_database.name, user="analyst"))
        assert await reader.fetchval("SELECT count(*) FROM task_done_by_hour") == 0
        with pytest.raises(asyncpg.PostgresError):
            await reader.execute("DELETE FROM task_done")
        await reader.close()
    finally:
        postgres_database.execute("DROP OWNED BY analyst")
        postgres_database.execute("DROP ROLE analyst")


# Plans


@pytest.mark.parametrize(
    "wanted",
    [
        {"sender": "s7@d7.example"},
        {"sender": "@d7.example"},
        {"recipient": "r7@e7.example"},
        {"recipient": "@e7.example"},
        {"task_type": "t7"},
        {"client": "c7"},
        {"message_id": "m7"},
        {"task_id": UUID(int=7)},
        {"since": NOW + timedelta(seconds=29_990)},
        {},
    ],
    ids=str,
)
async def test_a_search_reads_an_index_and_not_the_table(postgres_database, wanted):
    postgres_database.execute(
        "INSERT INTO task_done (task_id, task_type, sender, sender_domain, client, sent_at, upstream, "
        "upstream_reply, message_id, size, duration_ms, data) "
        "SELECT lpad(to_hex(n), 32, '0')::uuid, 't' || n % 1000, 's' || n || '@d' || n % 1000 || '.example', "
        "'d' || n % 1000 || '.example', 'c' || n % 1000, "
        "'2026-11-23 07:46+00'::timestamptz + n * interval '1 s', "
        "'u', '250', 'm' || n, 1, 1, '{}' FROM generate_series(1, 30000) AS n"
    )
    postgres_database.execute(
        "INSERT INTO task_done_recipient SELECT id, 0, 'r' || id || '@e' || id % 1000 || '.example', "
        "'e' || id % 1000 || '.example', sent_at FROM task_done"
    )
    postgres_database.execute("ANALYZE")
    page = page_of_sends(SendFilter(**wanted), 20)
    text = page.compile(dialect=postgresql.dialect(), compile_kwargs={"literal_binds": True})
    plan = "\n".join(line for (line,) in postgres_database.rows(f"EXPLAIN {text}"))
    assert "Seq Scan" not in plan, plan
    assert "Index" in plan
