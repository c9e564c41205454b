"""A message's whole way: client, relay, upstream, row."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tests.support.client import Client
from tests.support.upstream import ScriptedUpstream

CONTENT = (
    b"From: a@example.test\r\nMessage-ID: <1@example.test>\r\nX-Task-Type: mention\r\nX-Task-ID: 42\r\n"
    b"\r\n..dot\r\ntext\r\n"
)


async def test_an_accepted_message_reaches_the_upstream_and_gets_its_row(
    start: Any, upstream: ScriptedUpstream
) -> None:
    async with start(upstream.port) as running:
        async with Client(running.port) as client:
            await client.greeting()
            await client.ehlo()
            replies = await client.message("a@example.test", ["b@example.test", "c@example.test"], CONTENT)
            assert [reply.code for reply in replies] == [250, 250, 250, 354, 250]
            (row,) = running.rows()
        assert upstream.accepted[0].content == CONTENT
        assert row["sender"] == "a@example.test"
        assert row["sender_domain"] == "example.test"
        assert row["task_type"] == "mention"
        assert row["client_task_id"] == "42"
        assert row["message_id"] == "<1@example.test>"
        assert row["size"] == len(CONTENT)
        assert row["upstream"] == "primary"
        assert row["upstream_reply"].startswith("250 ")
        recipients = running.rows("SELECT * FROM task_done_recipient ORDER BY ordinal")
        assert [each["recipient"] for each in recipients] == ["b@example.test", "c@example.test"]
        assert running.metric("messages_total", upstream="primary", outcome="accepted") == 1
        assert running.metric("recipients_total", upstream="primary", outcome="accepted") == 2


async def test_files_of_the_spool_are_for_the_relay_alone(
    start: Any, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    """Whatever the umask of who starts it."""
    before = os.umask(0)
    try:
        async with start(upstream.port):
            modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "spool").iterdir()}
    finally:
        os.umask(before)
    assert {"journal", "lock", "relay_id"} <= modes.keys()
    assert set(modes.values()) == {0o600}, modes
