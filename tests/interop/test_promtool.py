"""A scrape of a relay that has worked, judged by Prometheus' own linter."""

from __future__ import annotations

import asyncio
import re
import urllib.request
from typing import Any

import pytest

from tests.interop.peers import command, needs, run
from tests.support.client import Client
from tests.support.upstream import ScriptedUpstream

NAMES = {
    "messages_total": "counter",
    "recipients_total": "counter",
    "message_bytes_total": "counter",
    "message_size_bytes": "histogram",
    "transaction_seconds": "histogram",
    "transaction_wait_seconds_total": "counter",
    "upstream_reply_seconds": "histogram",
    "client_sessions": "gauge",
    "client_sessions_total": "untyped",  # as a counter its family would be the gauge's
    "client_rejects_total": "counter",
    "auth_total": "counter",
    "upstream_connections": "gauge",
    "upstream_connects_total": "counter",
    "upstream_up": "gauge",
    "upstream_drained": "gauge",
    "upstream_failovers_total": "counter",
    "upstream_wait_seconds": "histogram",
    "records_total": "counter",
    "record_commit_seconds": "histogram",
    "record_batch_rows": "histogram",
    "records_pending": "gauge",
    "records_spooled": "gauge",
    "records_reserve_bytes": "gauge",
    "record_errors_total": "counter",
    "expired_rows_total": "counter",
    "expiry_lag_seconds": "gauge",
    "expiry_last_run_timestamp_seconds": "gauge",
    "expiry_duration_seconds": "gauge",
    "config_last_reload_successful": "gauge",
    "config_last_reload_success_timestamp_seconds": "gauge",
    "build_info": "gauge",
}
"""Public interface: the instruments of this version, without the prefix."""


async def scrape(port: int) -> str:
    def get() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            return answer.read().decode()

    return await asyncio.to_thread(get)


async def scrape_after_work(start: Any, upstream: ScriptedUpstream) -> str:
    """Return a scrape after one message was accepted, one refused, and a client was out of step."""
    upstream.script = {"end_of_data": [None, b"554 5.7.1 looks like spam\r\n"]}
    async with start(upstream.port) as running:
        async with Client(running.port) as client:
            await client.ehlo()
            for _ in range(2):
                await client.message("a@example.test", ["b@example.test"], b"Subject: x\r\n\r\n")
        async with Client(running.port) as client:
            await client.greeting()
            await client.send(b"GET / HTTP/1.1\r\n\r\n")
            await client.expect_closed()
        return await scrape(running.http_port)


async def test_every_instrument_is_there(start: Any, upstream: ScriptedUpstream) -> None:
    text = await scrape_after_work(start, upstream)
    found = dict(re.findall(r"^# TYPE smtp_relay_(\S+) (\S+)$", text, re.MULTILINE))
    assert found == NAMES
    for name, kind in NAMES.items():
        sample = f"smtp_relay_{name}" + ("_count" if kind == "histogram" else "")
        assert re.search(rf"^{sample}(\{{.*\}})? ", text, re.MULTILINE), f"no sample of {name}"


@pytest.mark.interop
@needs("promtool", "prometheus")[1]
async def test_promtool_finds_nothing_to_say(start: Any, upstream: ScriptedUpstream) -> None:
    text = await scrape_after_work(start, upstream)
    ended = await run([command("promtool"), "check", "metrics"], text.encode())
    assert (ended.status, ended.said) == (0, "")
