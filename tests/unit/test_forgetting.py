"""A person is erased from the records, on both databases."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from relay.cli import main
from relay.records import forgetting
from relay.records.errors import StoreError
from relay.records.forgetting import GONE, forget, mentions, open_eraser
from relay.records.model import Doubt, Record
from relay.records.queries import open_queries
from relay.records.retention import Retention
from relay.records.sends import SendFilter
from relay.records.spool_line import encode
from relay.records.sqlite import eraser as eraser_module
from relay.records.store import open_store

ANN = "ann@example.org"
NOW = datetime(2026, 11, 23, 7, 46, tzinfo=UTC)
ROW = Record(
    task_id=UUID(int=1),
    task_type="mention",
    sender="shop@example.com",
    client="app",
    sent_at=NOW,
    upstream="primary",
    upstream_reply="250 ok",
    size=1000,
    duration_ms=10,
    recipients=("bob@example.net",),
    data={"tags": ["a"]},
)
ROWS = [
    replace(ROW, sender="Ann@Example.org"),
    replace(ROW, recipients=("ANN@example.org",)),
    replace(ROW, recipients=("bob@example.net", ANN, "cat@example.net"), upstream_reply=f"250 <{ANN}> ok"),
    replace(
        ROW,
        data={
            "refused": [
                {"recipient": "Ann@Example.org", "reply": "550"},
                {"recipient": "z@x", "reply": "550"},
            ]
        },
    ),
    replace(ROW, data={"headers": {"To": f"Ann <{ANN}>, bob"}, "client_reply": None}),
    replace(ROW, sender="bounce+ann=example.org@shop.example"),
    replace(ROW, client=ANN, data={"headers": {"From": ANN}}),
    replace(ROW, recipients=("joann@example.org", "ann@example.org.uk", "ann@other")),
    replace(ROW, data={"headers": {"To": 'bob, "cat o"@example.org'}}),
    replace(ROW, recipients=()),
    replace(ROW, message_id=f"<{ANN}>"),
    replace(ROW, client_task_id=f"welcome:{ANN}"),
]
DOUBT = Doubt(
    since=NOW,
    reason=f"closed after {ANN}",
    **{name: getattr(ROW, name) for name in ("task_type", "sender", "client", "upstream", "size")},
    **{name: getattr(ROW, name) for name in ("duration_ms", "data")},
    recipients=("bob@example.net",),
    task_id=UUID(int=99),
)
DOUBTS = [
    replace(DOUBT, task_id=UUID(int=101)),
    replace(DOUBT, task_id=UUID(int=102), recipients=(ANN,), reason="closed"),
    replace(DOUBT, task_id=UUID(int=103), recipients=("Ann@Example.org", "bob@example.net"), reason="closed"),
    replace(DOUBT, task_id=UUID(int=104), reason="closed"),
    replace(DOUBT, task_id=UUID(int=105), reason="closed", recipients=()),
    replace(DOUBT, task_id=UUID(int=106), reason="closed", client=ANN),
    replace(DOUBT, task_id=UUID(int=107), reason="closed", message_id=f"<{ANN}>"),
    replace(DOUBT, task_id=UUID(int=108), reason="closed", client_task_id=f"welcome:{ANN}"),
    replace(DOUBT, task_id=UUID(int=109), reason="closed", data={"headers": {"To": ANN}}),
]


async def contents(url: str) -> tuple[dict[int, Any], dict[int, Any]]:
    queries = await open_queries(url)
    try:
        sends = await queries.page(SendFilter(), 200)
        doubts = await queries.page_of_doubts(SendFilter(), 200)
    finally:
        await queries.close()
    return (
        {UUID(each.task_id).int: each for each in sends},
        {UUID(each.task_id).int: each for each in doubts},
    )


@pytest.fixture
async def url(database: Any) -> str:
    store = await open_store(database.url, Retention(None))
    await store.write([replace(row, task_id=UUID(int=at)) for at, row in enumerate(ROWS, 1)])
    await store.write(DOUBTS)
    await store.close()
    return str(database.url)


async def erase(url: str, *names: str, dry_run: bool = False) -> tuple[int, int, int]:
    eraser = await open_eraser(url)
    try:
        done = await forget(eraser, names, dry_run=dry_run)
    finally:
        await eraser.close()
    return done.deleted, done.changed, done.doubts


async def test_a_person_is_gone_and_the_others_stay(url: str) -> None:
    before = await contents(url)
    assert await erase(url, ANN, dry_run=True) == (3, 6, 7)
    assert await contents(url) == before

    assert await erase(url, ANN) == (3, 6, 7)

    sends, doubts = await contents(url)
    assert sorted(sends) == [3, 4, 5, 6, 8, 9, 10, 11, 12]
    assert sends[3].recipients == ("bob@example.net", "cat@example.net")
    assert sends[3].upstream_reply == f"250 <{GONE}> ok"
    assert sends[4].data == {"refused": [{"recipient": "z@x", "reply": "550"}]}
    assert sends[5].data == {"headers": {"To": f"Ann <{GONE}>, bob"}, "client_reply": None}
    assert sends[6].sender == f"bounce+{GONE}@shop.example"
    assert sends[8] == before[0][8]
    assert sends[11].message_id == f"<{GONE}>"
    assert sends[12].client_task_id == f"welcome:{GONE}"
    assert sorted(doubts) == [101, 103, 104, 105, 107, 108, 109]
    assert doubts[101].reason == f"closed after {GONE}"
    assert doubts[103].recipients == ("bob@example.net",)
    assert doubts[104] == before[1][104]
    assert doubts[105] == before[1][105]
    assert doubts[107].message_id == f"<{GONE}>"
    assert doubts[108].client_task_id == f"welcome:{GONE}"
    assert doubts[109].data["headers"] == {"To": GONE}
    assert await erase(url, ANN) == (0, 0, 0)


async def test_an_address_that_json_escapes(url: str) -> None:
    assert await erase(url, '"cat o"@example.org') == (0, 1, 0)
    assert (await contents(url))[0][9].data == {"headers": {"To": f"bob, {GONE}"}}


async def test_an_address_with_other_letters_than_those_of_ascii(database: Any) -> None:
    """In capitals, which the lower() of SQLite leaves as they are."""
    name = "JÖRG@example.org"
    store = await open_store(database.url, Retention(None))
    rows = [
        replace(ROW, sender=name),
        replace(ROW, recipients=(name, "bob@example.net")),
        replace(ROW, data={"headers": {"To": name}}),
    ]
    await store.write([replace(row, task_id=UUID(int=at)) for at, row in enumerate(rows, 1)])
    await store.close()
    assert await erase(database.url, name) == (1, 2, 0)
    sends, _ = await contents(database.url)
    assert (sends[2].recipients, sends[3].data) == (("bob@example.net",), {"headers": {"To": GONE}})


@pytest.mark.parametrize("name", ["jörg@example.org", '"a\\b"@example.org'])
async def test_an_address_of_unusual_characters(name: str, database: Any) -> None:
    store = await open_store(database.url, Retention(None))
    await store.write(
        [
            replace(ROW, upstream_reply=f"250 <{name}> ok"),
            replace(ROW, task_id=UUID(int=2), data={"headers": {"To": name}}),
        ]
    )
    await store.close()
    assert await erase(database.url, name) == (0, 2, 0)
    sends, _ = await contents(database.url)
    assert sends[1].upstream_reply == f"250 <{GONE}> ok"
    assert sends[2].data == {"headers": {"To": GONE}}


@pytest.mark.parametrize(
    "other",
    [
        *("joann@example.org", "jo.ann@example.org", "mary-ann@example.org", "jo+ann@example.org"),
        *("ann@example.organic", "ann@example.org.uk", "ann@example.org-x.net"),
        *("bounce+joann=example.org@shop.example", "bounce+jo.ann=example.org@shop.example"),
        *("bounce+ann=example.organic@shop.example", "bounce+ann=example.org.uk@shop.example"),
    ],
)
async def test_an_address_that_holds_the_persons_is_somebody_elses(other: str, database: Any) -> None:
    store = await open_store(database.url, Retention(None))
    await store.write(
        [replace(ROW, sender=other, upstream_reply=f"250 <{other}> ok", data={"headers": {"From": other}})]
    )
    await store.close()
    before = await contents(database.url)
    assert await erase(database.url, ANN) == (0, 0, 0)
    assert await contents(database.url) == before


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (f"{ANN}.", f"{GONE}."),
        (f"sent to {ANN}, <{ANN.upper()}>", f"sent to {GONE}, <{GONE}>"),
        (f"prvs=0123456789={ANN}", f"prvs=0123456789={GONE}"),
        ("bounce-7-ann=example.org@shop.example", f"bounce-7-{GONE}@shop.example"),
        ("bounce-ann=example.org-7@shop.example", f"bounce-{GONE}-7@shop.example"),
        ("ann=example.org@shop.example", f"{GONE}@shop.example"),
    ],
)
async def test_an_address_is_found_between_what_may_stand_beside_it(
    text: str, left: str, database: Any
) -> None:
    store = await open_store(database.url, Retention(None))
    await store.write([replace(ROW, sender=text)])
    await store.close()
    assert await erase(database.url, ANN) == (0, 1, 0)
    sends, _ = await contents(database.url)
    assert sends[1].sender == left


async def test_a_pseudonym_is_a_name_too(url: str) -> None:
    assert await erase(url, "nobody@x", "cat@example.net") == (0, 1, 0)
    assert (await contents(url))[0][3].recipients == ("bob@example.net", ANN)


async def test_many_rows_go_in_batches(database: Any) -> None:
    store = await open_store(database.url, Retention(None))
    for begin in range(0, 1500, 500):
        await store.write(
            [replace(ROW, task_id=UUID(int=n + 1), recipients=(ANN,)) for n in range(begin, begin + 500)]
        )
    await store.close()
    assert await erase(database.url, ANN) == (1500, 0, 0)


async def test_a_mention_is_found_wherever_a_stretch_begins_and_ends(
    database: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forgetting, "STRETCH", 2)
    store = await open_store(database.url, Retention(None))
    await store.write(
        [replace(ROW, task_id=UUID(int=n), upstream_reply=f"250 <{ANN}> ok") for n in range(1, 7)]
    )
    await store.close()
    assert await erase(database.url, ANN) == (0, 6, 0)


async def test_rows_that_have_gone_long_ago_are_not_looked_for(database: Any) -> None:
    """Years of mail, of which the last is there: ids go on."""
    store = await open_store(database.url, Retention(None))
    if database.kind == "postgres":
        database.execute("ALTER TABLE task_done ALTER COLUMN id RESTART WITH 1000000000")
    await store.write([replace(ROW, upstream_reply=f"250 <{ANN}> ok")])
    if database.kind == "sqlite":
        database.execute("UPDATE task_done SET id = 1000000000")
    await store.close()
    told: list[int] = []
    eraser = await open_eraser(database.url)
    done = await forget(eraser, [ANN], on_progress=told.append)
    await eraser.close()
    assert (done.changed, told) == (1, [0])


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a relay"])
async def test_what_is_deleted_is_not_left_in_the_file(beside: bool, tmp_path: Path) -> None:
    def left() -> bytes:
        return b"".join(each.read_bytes() for each in tmp_path.iterdir())

    url = f"sqlite:///{tmp_path / 't.db'}"
    store = await open_store(url, Retention(None))
    await store.write(
        [replace(ROW, task_id=UUID(int=1), recipients=(ANN,)), replace(ROW, task_id=UUID(int=2))]
    )
    if not beside:
        await store.close()
    assert ANN.encode() in left()
    try:
        await erase(url, ANN)
        assert ANN.encode() not in left()
    finally:
        await store.close()


async def test_a_file_that_another_process_holds_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eraser_module, "BUSY_TIMEOUT_S", 0.01)
    url = f"sqlite:///{tmp_path / 't.db'}"
    store = await open_store(url, Retention(None))
    await store.write([replace(ROW, recipients=(ANN,))])
    with closing(sqlite3.connect(tmp_path / "t.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="locked by another process"):
            await erase(url, ANN)
    assert await store.count() == 1
    await store.close()


def test_a_mention_anywhere_is_found() -> None:
    assert mentions({"recipients": ["x", ["ANN@example.org"]]}, [ANN])
    assert not mentions({"recipients": ["joann@example.org"], "n": 1}, [ANN])


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import asyncio

    monkeypatch.chdir(tmp_path)
    Path("relay.toml").write_text('[[upstreams]]\naddress = "smtp.example.com:587"\n')

    async def write() -> None:
        store = await open_store("sqlite:///data/task_done.db", Retention(None))
        await store.write([replace(row, task_id=UUID(int=at)) for at, row in enumerate(ROWS, 1)])
        await store.close()

    command = ["forget", "<Ann@example.org>", "--config", "relay.toml"]
    assert main(command) == 1
    assert "no such file" in capsys.readouterr().err
    assert not Path("data").exists()
    asyncio.run(write())
    assert main([*command, "--dry-run"]) == 0
    assert capsys.readouterr().out == (
        "3 sends would be deleted, 6 others would be changed\n"
        "0 messages in doubt would be deleted or changed\n"
    )
    assert main(command) == 0
    assert "3 sends deleted, 6 others changed" in capsys.readouterr().out
    for wrong in ("", "@example.org", "a*@example.org"):
        assert main(["forget", wrong, "--config", "relay.toml"]) == 2
    spool = Path("data/spool")
    spool.mkdir()
    (spool / "rejected.jsonl").write_bytes(encode(replace(ROW, recipients=(ANN,)), "a reason"))
    assert main(command) == 1
    captured = capsys.readouterr()
    assert "1 row in the spool data/spool name the address" in captured.err
