from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from dataclasses import fields
from datetime import UTC, datetime, timedelta, timezone

import pytest
import sqlalchemy as sa
from alembic.script import ScriptDirectory
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateIndex, CreateTable

from relay.records import schema, tables
from relay.records.migrations import alembic_config, upgrade
from relay.records.sends import InDoubt, Send
from relay.records.sqlite.database import Database
from tests.support import tables as support


@pytest.fixture
def migrated():
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as raw:
        upgrade(raw)
        yield raw


def definitions(raw):
    """Every table and index as SQLite keeps it, whatever the spacing."""
    found = raw.execute(
        "SELECT name, sql FROM sqlite_schema WHERE sql IS NOT NULL AND type IN ('table', 'index')"
    )
    return {name: re.sub(r"\s+", "", sql).lower() for name, sql in found if name != tables.VERSION_TABLE}


def test_the_migrations_make_what_the_metadata_says(migrated):
    with closing(sqlite3.connect(":memory:")) as raw:
        engine = sa.create_engine("sqlite://", creator=lambda: raw, poolclass=sa.StaticPool)
        schema.metadata.create_all(engine)
        assert definitions(migrated) == definitions(raw)


async def test_a_new_file_is_made_as_the_migrations_make_it(migrated, tmp_path):
    """If not: python -m tests.support.tables > relay/records/sqlite/tables.sql"""
    await (await Database.open(tmp_path / "t.db", create=True, busy_timeout=1)).close()
    with closing(sqlite3.connect(tmp_path / "t.db")) as raw:
        assert support.definitions(raw) == support.definitions(migrated)
        versions = f"SELECT * FROM {tables.VERSION_TABLE}"
        assert raw.execute(versions).fetchall() == migrated.execute(versions).fetchall()


def test_the_view_has_the_columns_that_the_metadata_says(migrated):
    columns = [row[1] for row in migrated.execute("PRAGMA table_info(task_done_send)")]
    assert columns == [column.name for column in schema.task_done_send.columns]


def test_the_revisions_are_the_schema_versions():
    newest_first = ScriptDirectory.from_config(alembic_config()).walk_revisions()
    assert [script.revision for script in newest_first] == list(reversed(tables.SCHEMA_VERSIONS))
    assert tables.SCHEMA_VERSIONS[-1] == tables.SCHEMA_VERSION


def test_to_migrate_again_changes_nothing(migrated):
    before = definitions(migrated)
    upgrade(migrated)
    assert definitions(migrated) == before
    assert not migrated.in_transaction


@pytest.mark.parametrize("version", tables.SCHEMA_VERSIONS[:-1])
def test_a_store_of_an_older_version_is_brought_up_and_keeps_what_it_has(migrated, version):
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as raw:
        upgrade(raw, version)
        raw.execute("INSERT INTO task_done_state VALUES ('kept', 'as it was', NULL)")
        upgrade(raw)
        assert definitions(raw) == definitions(migrated)
        assert raw.execute("SELECT value FROM task_done_state").fetchall() == [("as it was",)]
        newest = raw.execute(f"SELECT version_num FROM {tables.VERSION_TABLE}").fetchall()
        assert newest == [(tables.SCHEMA_VERSION,)]


def add_send(raw, identity):
    values = dict.fromkeys(tables.COLUMNS["task_done"], "x") | {"id": identity, "task_id": identity}
    raw.execute(f"INSERT INTO task_done VALUES ({', '.join('?' * len(values))})", list(values.values()))
    add_recipient(raw, identity)


def add_recipient(raw, identity):
    raw.execute("INSERT INTO task_done_recipient VALUES (?, 0, 'a@b.test', 'b.test', 'x')", (identity,))


def test_recipients_go_with_their_row_where_no_foreign_key_is_enforced(migrated):
    """As in the command-line shell of SQLite: the next row may get the same id."""
    assert migrated.execute("PRAGMA foreign_keys").fetchone() == (0,)
    for identity in (1, 2):
        add_send(migrated, identity)
    migrated.execute("DELETE FROM task_done WHERE id = 2")
    assert migrated.execute("SELECT task_done_id FROM task_done_recipient").fetchall() == [(1,)]


@pytest.mark.parametrize("kept", [[], [1, 3]], ids=["no row is left", "rows are left"])
def test_recipients_whose_row_had_gone_go_too(kept):
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as raw:
        upgrade(raw, "0004")
        for identity in kept:
            add_send(raw, identity)
        for identity in (2, 4):
            add_recipient(raw, identity)
        upgrade(raw)
        left = raw.execute("SELECT task_done_id FROM task_done_recipient ORDER BY 1").fetchall()
        assert left == [(identity,) for identity in kept]


def test_the_columns_are_those_of_the_contract():
    assert tables.COLUMNS["task_done"] == (
        *("id", "task_id", "client_task_id", "task_type", "sender", "sender_domain", "client", "sent_at"),
        *("expires_at", "upstream", "upstream_reply", "message_id", "size", "duration_ms", "data"),
    )
    assert [column.name for column in schema.task_done_recipient.columns] == [
        *("task_done_id", "ordinal", "recipient", "recipient_domain", "sent_at")
    ]
    assert tables.COLUMNS["task_in_doubt"] == (
        *("id", "task_id", "client_task_id", "task_type", "sender", "sender_domain", "client", "since"),
        *("expires_at", "upstream", "reason", "message_id", "size", "duration_ms", "recipients", "data"),
    )


@pytest.mark.parametrize("table", [schema.task_done, schema.task_done_send, schema.task_in_doubt], ids=str)
def test_the_metadata_has_the_columns_that_plain_sql_goes_by(table):
    assert tuple(column.name for column in table.columns) == tables.COLUMNS[table.name]


def test_what_a_read_finds_has_the_columns_too():
    sent = [field.name for field in fields(Send)]
    assert sent == [*tables.COLUMNS["task_done"], "recipients"]
    assert {field.name for field in fields(InDoubt)} == set(tables.COLUMNS["task_in_doubt"])


def test_the_names_are_those_of_the_tables_and_views(migrated):
    found = {
        row[0] for row in migrated.execute("SELECT name FROM sqlite_schema WHERE type IN ('table', 'view')")
    }
    assert set(tables.NAMES) <= found


@pytest.mark.parametrize(
    ("query", "index"),
    [
        ("task_done WHERE lower(sender) = lower('A@b') AND sent_at > '2026'", "ix_task_done_sender"),
        ("task_done WHERE sender_domain = 'b' AND sent_at > '2026'", "ix_task_done_sender_domain"),
        ("task_done WHERE client = 'c' AND sent_at > '2026'", "ix_task_done_client"),
        ("task_done WHERE task_type = 't' AND sent_at > '2026'", "ix_task_done_task_type"),
        ("task_done WHERE sent_at > '2026' ORDER BY sent_at DESC, id DESC", "ix_task_done_sent_at"),
        ("task_done WHERE message_id = '<m>'", "ix_task_done_message_id"),
        ("task_done WHERE client_task_id = 'c'", "ix_task_done_client_task_id"),
        ("task_done WHERE expires_at <= '2026' ORDER BY expires_at", "ix_task_done_expires_at"),
        ("task_done WHERE task_id = 't'", "sqlite_autoindex_task_done_1"),
        ("task_in_doubt WHERE since > '2026' ORDER BY since DESC, id DESC", "ix_task_in_doubt_since"),
        ("task_in_doubt WHERE expires_at <= '2026' ORDER BY expires_at", "ix_task_in_doubt_expires_at"),
        ("task_in_doubt WHERE task_id = 't'", "sqlite_autoindex_task_in_doubt_1"),
        (
            "task_done_recipient WHERE lower(recipient) = lower('A@b') AND sent_at > '2026'",
            "ix_task_done_recipient_recipient",
        ),
        (
            "task_done_send WHERE recipient_domain = 'b'",
            "ix_task_done_recipient_recipient_domain",
        ),
        ("task_done_send WHERE lower(recipient) = 'a@b'", "ix_task_done_recipient_recipient"),
    ],
)
def test_each_search_has_its_index(migrated, query, index):
    plan = [row[3] for row in migrated.execute(f"EXPLAIN QUERY PLAN SELECT * FROM {query}")]
    assert any(re.search(rf"USING (COVERING )?INDEX {index} \(", step) for step in plan), plan
    assert not any("TEMP B-TREE" in step for step in plan)


def test_the_same_metadata_makes_postgresql_tables():
    dialect = postgresql.dialect()
    table = str(CreateTable(schema.task_done).compile(dialect=dialect))
    assert "id BIGINT GENERATED ALWAYS AS IDENTITY" in table
    assert "task_id UUID" in table
    assert "sent_at TIMESTAMP WITH TIME ZONE" in table
    assert "data JSONB" in table
    doubts = str(CreateTable(schema.task_in_doubt).compile(dialect=dialect))
    assert "recipients JSONB" in doubts
    assert "since TIMESTAMP WITH TIME ZONE" in doubts
    indexes = {index.name: index for index in schema.task_done.indexes}
    assert str(CreateIndex(indexes["ix_task_done_expires_at"]).compile(dialect=dialect)).endswith(
        "(expires_at) WHERE expires_at IS NOT NULL"
    )


@pytest.mark.parametrize(
    ("moment", "text"),
    [
        (datetime(2026, 11, 23, 7, 46, 0, 123456, tzinfo=UTC), "2026-11-23 07:46:00.123456"),
        (datetime(2026, 11, 23, 7, 46, tzinfo=UTC), "2026-11-23 07:46:00.000000"),
        (datetime(2026, 11, 23, 0, 30, tzinfo=timezone(timedelta(hours=2))), "2026-11-22 22:30:00.000000"),
        (datetime.max.replace(tzinfo=UTC), "9999-12-31 23:59:59.999999"),
    ],
)
def test_times_are_utc_text_of_fixed_width(moment, text):
    assert tables.utc_text(moment) == text


def test_a_time_without_a_zone_is_refused():
    with pytest.raises(ValueError, match="without a zone"):
        tables.utc_text(datetime(2026, 11, 23))  # noqa: DTZ001


def test_sqlalchemy_reads_and_compares_what_utc_text_wrote(migrated):
    moment = datetime(2026, 11, 23, 7, 46, 0, 123456, tzinfo=UTC)
    migrated.execute(
        "INSERT INTO task_done_state VALUES ('a', 'b', ?), ('c', 'd', NULL)", (tables.utc_text(moment),)
    )
    engine = sa.create_engine("sqlite://", creator=lambda: migrated, poolclass=sa.StaticPool)
    state = schema.task_done_state
    elsewhere = moment.astimezone(timezone(timedelta(hours=-5)))
    with engine.connect() as connection:
        assert connection.scalars(sa.select(state.c.expires_at).order_by(state.c.name)).all() == [
            moment,
            None,
        ]
        assert connection.scalars(sa.select(state.c.name).where(state.c.expires_at == elsewhere)).all() == [
            "a"
        ]
        with pytest.raises(sa.exc.StatementError, match="without a zone"):
            connection.execute(sa.select(state).where(state.c.expires_at == datetime(2026, 11, 23)))  # noqa: DTZ001


def test_postgresql_keeps_the_zone_and_returns_utc():
    kind = schema.UtcDateTime()
    dialect = postgresql.dialect()
    moment = datetime(2026, 11, 23, 7, 46, tzinfo=timezone(timedelta(hours=2)))
    assert kind.process_bind_param(moment, dialect) == moment
    assert kind.process_bind_param(None, dialect) is None
    assert kind.process_result_value(moment, dialect).tzinfo is UTC
