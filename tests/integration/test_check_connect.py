"""`relay check --connect` as an operator runs it: a process of its own, a real upstream, a real file."""

from __future__ import annotations

import asyncio
import sqlite3
import sys
from contextlib import closing
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from relay.records.retention import Retention
from relay.records.spool import Spool
from relay.records.spool_line import encode
from relay.records.store import open_store
from tests.support.rows import make_record
from tests.support.tables import BACK_TO_0001
from tests.support.upstream import ScriptedUpstream

if TYPE_CHECKING:
    from pathlib import Path


async def check(
    tmp_path: Path,
    upstream: str,
    database: str = "rows.db",
    module: str = "relay",
    spool: str = "spool",
) -> tuple[int, list[str]]:
    config = tmp_path / "relay.toml"
    config.write_text(
        f'[[upstreams]]\naddress = "{upstream}"\nname = "primary"\ntls = "none"\n'
        f'[records]\nurl = "sqlite:///{tmp_path}/{database}"\nspool = "{tmp_path}/{spool}"\n'
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, "check", "--connect", "--config", str(config),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    said, _ = await asyncio.wait_for(process.communicate(), 30)
    return process.returncode or 0, said.decode().splitlines()


async def test_it_says_what_works_and_makes_nothing(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    status, said = await check(tmp_path, upstream.address)

    assert status == 0
    store, spool, connected = said[-3:]
    assert store.split() == [
        "ok",
        "store",
        *f"sqlite:///{tmp_path}/rows.db: does not exist yet, the first start makes it".split(),
    ]
    assert spool == f"  ok  spool {tmp_path}/spool: does not exist yet, the first start makes it"
    assert connected.startswith(
        f"  ok  upstream primary {upstream.address}: connected, TLS none, offers 8BITMIME "
    )
    assert not (tmp_path / "rows.db").exists()
    assert not (tmp_path / "spool").exists()
    assert upstream.messages == []


@pytest.mark.parametrize("where", ["kept/rows.db", "kept/below/rows.db", "link.db"])
async def test_a_store_that_no_start_can_make_fails_the_check(
    tmp_path: Path, upstream: ScriptedUpstream, where: str
) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept").chmod(0o555)
    (tmp_path / "link.db").symlink_to("nowhere.db")

    status, said = await check(tmp_path, upstream.address, where, module="tests.support.without_rights")

    assert status == 1
    assert said[-3].startswith(f"  failed  store sqlite:///{tmp_path}/{where}: {tmp_path}/{where}: ")
    assert "records.url" in said[-3]
    assert not (tmp_path / "kept" / "below").exists()


@pytest.mark.parametrize(
    ("spool", "reason"),
    [
        ("kept/spool", "kept cannot be written; change records.spool, or the rights of its path"),
        ("kept", "kept cannot be written; change records.spool, or the rights of its path"),
        ("file/spool", "file is not a directory; change records.spool"),
        ("link", "link is not a directory; change records.spool"),
        ("locked", "lock cannot be written; give the relay's user the file"),
    ],
)
async def test_a_spool_that_no_start_can_use_fails_the_check(
    tmp_path: Path, upstream: ScriptedUpstream, spool: str, reason: str
) -> None:
    (tmp_path / "kept").mkdir(0o555)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked" / "lock").touch(0o400)
    before = sorted(tmp_path.rglob("*"))

    status, said = await check(tmp_path, upstream.address, "rows.db", "tests.support.without_rights", spool)

    assert status == 1
    assert said[-2].startswith(f"  failed  spool {tmp_path}/{spool}: {tmp_path}/")
    assert said[-2].endswith(reason)
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "relay.toml"])


async def test_a_spool_in_use_is_looked_at_beside_its_relay(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    spool = Spool(tmp_path / "spool")
    spool.append([encode(make_record())])
    try:
        status, said = await check(tmp_path, upstream.address)
    finally:
        spool.close()
    assert (status, said[-2]) == (0, f"  ok  spool {tmp_path}/spool: can be written, 1 row waits")


async def test_a_link_to_an_empty_file_is_filled_by_the_start(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    (tmp_path / "empty.db").touch()
    (tmp_path / "link.db").symlink_to("empty.db")
    status, said = await check(tmp_path, upstream.address, "link.db")
    assert (status, said[-3][:4]) == (0, "  ok")


async def test_an_older_schema_is_left_to_the_start(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    path = tmp_path / "rows.db"
    store = await open_store(f"sqlite:///{path}", Retention(timedelta(days=30)))
    await store.close()
    with closing(sqlite3.connect(path)) as raw:
        raw.executescript(BACK_TO_0001)
    before = path.read_bytes()

    status, said = await check(tmp_path, upstream.address)

    assert status == 0
    assert "has schema version 0001, the next start brings it up to date" in said[-3]
    assert path.read_bytes() == before


async def test_an_upstream_that_refuses_fails_the_check(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    upstream.script = {"greeting": b"554 no service\r\n"}

    status, said = await check(tmp_path, upstream.address)

    assert status == 1
    assert "failed" in said[-1]
    assert "no service" in said[-1]


async def test_a_foreign_file_fails_the_check_and_is_left_alone(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    (tmp_path / "rows.db").write_text("not a database, but somebody's only copy of something" * 100)
    before = (tmp_path / "rows.db").read_bytes()

    status, said = await check(tmp_path, upstream.address)

    assert status == 1
    assert "rows.db" in said[-3]
    assert (tmp_path / "rows.db").read_bytes() == before


async def test_every_upstream_is_tried(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    async with ScriptedUpstream({"greeting": b"554 no service\r\n"}) as closed, ScriptedUpstream() as drained:
        config = tmp_path / "relay.toml"
        config.write_text(
            f'[[upstreams]]\naddress = "{upstream.address}"\nname = "primary"\ntls = "none"\n'
            f'[[upstreams]]\naddress = "{closed.address}"\nname = "closed"\ntls = "none"\npriority = 20\n'
            'match = { sender_domain = ["example.com", "!<>"] }\n'
            f'[[upstreams]]\naddress = "{drained.address}"\nname = "drained"\ntls = "none"\nweight = 0\n'
            f'[records]\nurl = "sqlite:///{tmp_path}/rows.db"\nspool = "{tmp_path}/spool"\n'
        )
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "relay", "check", "--connect", "--config", str(config),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        said = (await asyncio.wait_for(process.communicate(), 30))[0].decode()
    assert process.returncode == 1
    assert "connections, priority 10, weight 1\n" in said
    assert "connections, priority 20, weight 1, sender_domain example.com !<>\n" in said
    assert "connections, priority 10, drained\n" in said
    assert f"ok  upstream primary {upstream.address}: connected" in said
    assert f"failed  upstream closed {closed.address}: " in said
    assert f"ok  upstream drained {drained.address} (drained): connected" in said
