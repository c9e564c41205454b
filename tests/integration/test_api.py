"""The API of a relay that runs: what it answers, to whom, and that its description says so."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import aiohttp
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings

from relay.records.model import Doubt, Record
from relay.web.reading import READS, WAITING, BusyError, Reading
from tests.support.client import Client

NOW = datetime.now(UTC).replace(microsecond=123456)
ROW = Record(
    task_id=UUID(int=1),
    task_type="mention",
    sender="Alice@Example.COM",
    client="127.0.0.1",
    sent_at=NOW,
    upstream="primary",
    upstream_reply="250 2.0.0 Ok: queued as 4F3A",
    size=1000,
    duration_ms=10,
    recipients=("bob@example.net", "carol@example.org"),
    client_task_id="task 7",
    message_id="<1@example.com>",
    data={"tags": ["a"]},
)
DOUBT = Doubt(
    since=NOW - timedelta(minutes=2),
    reason="closed",
    **{name: getattr(ROW, name) for name in ("task_type", "sender", "client", "upstream", "size")},
    **{name: getattr(ROW, name) for name in ("duration_ms", "recipients", "message_id", "data")},
    task_id=UUID(int=99),
)
TOKEN = "0123456789abcdef0123456789abcdef"
TYPES = ("mention", "digest")
ROWS = [
    replace(ROW, task_id=UUID(int=n), sent_at=NOW - timedelta(days=n), task_type=TYPES[n % 2])
    for n in range(1, 8)
]


@pytest.fixture
async def running(start: Any, upstream: Any) -> AsyncIterator[Any]:
    async with start(upstream.port) as running:
        for entry in (*ROWS, DOUBT):
            await running.relay.records.recorder.record(entry)
        yield running


@pytest.fixture
async def client(running: Any) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(f"http://127.0.0.1:{running.http_port}") as client:
        yield client


@contextlib.asynccontextmanager
async def asking(started: Any) -> AsyncIterator[aiohttp.ClientSession]:
    """Give a client of a relay that is being started."""
    async with started as running, aiohttp.ClientSession(f"http://127.0.0.1:{running.http_port}") as client:
        yield client


async def get(client: aiohttp.ClientSession, path: str, status: int = 200, **options: Any) -> Any:
    async with client.get(path, **options) as answer:
        document = await answer.json(content_type=None)
        assert answer.status == status, document
        problem = status >= 400
        assert answer.content_type == ("application/problem+json" if problem else "application/json")
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        if problem:
            assert document["status"] == status
            assert document["title"]
        return document


@pytest.mark.parametrize(("path", "rows"), [("/api/sends", 120), ("/api/in-doubt", 60)])
async def test_a_page_of_large_rows_ends_before_it_holds_up_mail(
    running: Any, client: aiohttp.ClientSession, path: str, rows: int
) -> None:
    recipients = tuple(f"{'r' * 60}{number}@example.org" for number in range(1000))
    for number in range(1000, 1000 + rows):
        entry = replace(
            ROW if path == "/api/sends" else DOUBT, task_id=UUID(int=number), recipients=recipients
        )
        await running.relay.records.recorder.record(entry)
    name = "sends" if path == "/api/sends" else "in_doubt"
    found, next_page, pages = [], f"{path}?limit=1000", 0
    while next_page:
        async with client.get(next_page) as answer:
            body = await answer.read()
        assert len(body) < 5 * 1024 * 1024
        page = json.loads(body)
        found += [(row["task_id"], len(row["recipients"])) for row in page[name]]
        next_page, pages = page["next"], pages + 1
    every = [entry for entry in (*ROWS, DOUBT) if isinstance(entry, Record) is (name == "sends")]
    large = {(str(UUID(int=number)), 1000) for number in range(1000, 1000 + rows)}
    assert len(found) == rows + len(every)
    assert set(found) == large | {(str(entry.task_id), 2) for entry in every}
    assert pages == rows // 60 + 1


async def test_a_send_is_told_whole(client: aiohttp.ClientSession) -> None:
    found = await get(client, f"/api/sends/{UUID(int=1)}")
    sent_at = (NOW - timedelta(days=1)).isoformat().replace("+00:00", "Z")
    assert found.pop("expires_at") > sent_at
    assert found == {
        "task_id": str(UUID(int=1)),
        "client_task_id": "task 7",
        "task_type": "digest",
        "sender": "Alice@Example.COM",
        "sender_domain": "example.com",
        "client": "127.0.0.1",
        "sent_at": sent_at,
        "upstream": "primary",
        "upstream_reply": "250 2.0.0 Ok: queued as 4F3A",
        "message_id": "<1@example.com>",
        "size": 1000,
        "duration_ms": 10,
        "data": {"relay": "relay.test", "tags": ["a"]},
        "recipients": ["bob@example.net", "carol@example.org"],
        "state": "accepted",
        "provider_id": "4F3A",
    }
    found = await get(client, f"/api/sends/{UUID(int=99)}")
    assert (found["state"], found["reason"]) == ("in_doubt", "closed")
    for missing in (UUID(int=98), "7", "x" * 36):
        assert "task_id" in (await get(client, f"/api/sends/{missing}", 404))["detail"]


@pytest.mark.parametrize(
    ("query", "numbers"),
    [
        ("", [1, 2, 3, 4, 5, 6, 7]),
        ("?type=mention&limit=2", [2, 4]),
        ("?recipient=*@example.net&since=4d12h", None),
        ("?recipient=*@example.net&since=108h", [1, 2, 3, 4]),
        ("?sender=alice@example.com&until=108h", [5, 6, 7]),
        ("?recipient=x@example.net", []),
        ("?sender=", []),
        (f"?task_id={UUID(int=3)}", [3]),
        ("?message_id=1@example.com&upstream=prim*&client=127.*&limit=1", [1]),
        ("?tz=Asia/Kolkata&since=2020-01-01T00:00&until=2020-01-02", []),
    ],
)
async def test_filters(client: aiohttp.ClientSession, query: str, numbers: list[int] | None) -> None:
    if numbers is None:
        assert (await get(client, f"/api/sends{query}", 400))["field"] == "since"
        return
    found = await get(client, f"/api/sends{query}")
    assert [UUID(send["task_id"]).int for send in found["sends"]] == numbers


async def test_pages_go_on_by_the_cursor_and_by_the_address(
    client: aiohttp.ClientSession, running: Any
) -> None:
    seen = []
    path = "/api/sends?recipient=@example.net&limit=3"
    while path is not None:
        page = await get(client, path)
        seen += [UUID(send["task_id"]).int for send in page["sends"]]
        newer = replace(ROW, task_id=UUID(int=1000 + len(seen)), sent_at=datetime.now(UTC))
        await running.relay.records.recorder.record(newer)  # moves nothing
        if page["next"] is not None:
            by_cursor = await get(
                client, f"/api/sends?limit=3&recipient=@example.net&cursor={page['cursor']}"
            )
            assert by_cursor["sends"] == (await get(client, page["next"]))["sends"]
        path = page["next"]
    assert seen == [1, 2, 3, 4, 5, 6, 7]


async def test_messages_in_doubt(client: aiohttp.ClientSession) -> None:
    found = await get(client, "/api/in-doubt?recipient=carol@example.org&limit=1")
    assert [UUID(each["task_id"]).int for each in found["in_doubt"]] == [99]
    rest = await get(client, found["next"])
    assert (rest["in_doubt"], rest["cursor"]) == ([], None)
    assert (await get(client, "/api/in-doubt?recipient=*@nowhere"))["in_doubt"] == []


async def test_statistics(client: aiohttp.ClientSession) -> None:
    found = await get(client, "/api/stats?by=type")
    assert found == {
        "by": ["type"],
        "messages": 7,
        "groups": 2,
        "counts": [
            {"keys": {"type": "digest"}, "messages": 4},
            {"keys": {"type": "mention"}, "messages": 3},
        ],
    }
    found = await get(client, "/api/stats?by=upstream&by=client&detail=true&tz=Europe/Berlin&limit=5")
    assert found["counts"] == [
        {
            "keys": {"upstream": "primary", "client": "127.0.0.1"},
            "messages": 7,
            "recipients": 14,
            "octets": 7000,
            "average_ms": 10.0,
            "slowest_ms": 10,
        }
    ]


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("sends?recipent=x", "recipent"),
        ("sends?sender=a&sender=b", "sender"),
        ("sends?limit=0", "limit"),
        ("sends?limit=1001", "limit"),
        ("sends?limit=-1", "limit"),
        ("sends?cursor=x", "cursor"),
        ("sends?cursor=1-", "cursor"),
        ("sends?task_id=1", "task_id"),
        ("sends?tz=Mars/Olympus", "tz"),
        ("in-doubt?until=soon", "until"),
        ("stats", "by"),
        ("stats?by=weather", "by"),
        ("stats?by=type&by=type", "by"),
        ("stats?by=type&by=day&by=hour", "by"),
        ("stats?by=type&detail=yes", "detail"),
        ("status?x=", "x"),
        (f"sends/{UUID(int=1)}?x=", "x"),
    ],
)
async def test_a_mistake_is_a_problem_that_names_it(
    client: aiohttp.ClientSession, path: str, field: str
) -> None:
    found = await get(client, f"/api/{path}", 400)
    assert found["field"] == field
    assert found["detail"].startswith(f"{field} takes ")


async def test_what_is_not_there_and_what_is_not_allowed(client: aiohttp.ClientSession) -> None:
    assert "/api/nothing" in (await get(client, "/api/nothing", 404))["detail"]
    async with client.post("/api/sends") as answer:
        assert (answer.status, answer.content_type) == (405, "application/problem+json")
        assert answer.headers["Allow"] == "GET,HEAD"


async def test_what_happens_now(client: aiohttp.ClientSession, running: Any) -> None:
    async with Client(running.port) as smtp:
        await smtp.greeting()
        await smtp.ehlo()
        await smtp.message("a@example.com", ["b@example.org"], b"Subject: x\r\n\r\ntext\r\n")
        found = await get(client, "/api/status")
    assert (found["ready"], found["notes"], found["sessions"]) == (True, ["upstream primary: up"], 1)
    assert found["outcomes"]["accepted"] == 1
    assert found["last_hour"][-1]["accepted"] == 1
    assert found["rate_per_s"] > 0
    (upstream,) = found["upstreams"]
    assert (upstream["name"], upstream["outcomes"]["accepted"]) == ("primary", 1)
    assert upstream["latency"]["answers"] == 1
    assert upstream["latency"]["p50_s"] > 0
    assert found["records"]["in_doubt"] == 1
    assert found["records"]["readable"] is None
    assert await get(client, "/api/limits") == {"limits": []}


async def test_while_the_store_is_away_status_answers_and_searches_say_so(
    client: aiohttp.ClientSession, running: Any
) -> None:
    away = running.database.with_suffix(".away")
    running.database.rename(away)
    assert "no records yet" in (await get(client, "/api/sends", 503))["detail"]
    found = await get(client, "/api/status")
    away.rename(running.database)
    assert found["records"]["in_doubt"] is None
    assert "no such file" in found["records"]["readable"]


# Who gets an answer


async def test_a_name_that_is_not_ours_gets_nothing(client: aiohttp.ClientSession) -> None:
    for host in ("attacker.example", "attacker.example:9025", "127.0.0.1.attacker.example", ""):
        assert "http.hosts" in (await get(client, "/api/sends", 421, headers={"Host": host}))["detail"]
    for host in ("127.0.0.1:9025", "[::1]:9025", "localhost", "LOCALHOST.:80", "relay.test", "a.localhost"):
        await get(client, "/api/limits", headers={"Host": host})
    async with client.get("/healthz", headers={"Host": "attacker.example"}) as answer:
        assert answer.status == 200


def basic(password: str, user: str = "anyone") -> str:
    return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"


async def test_with_a_token_nothing_is_answered_without(start: Any, upstream: Any) -> None:
    async with asking(start(upstream.port, http={"token": TOKEN})) as client:
        wrong = (TOKEN[:-1], TOKEN + "x", "", TOKEN.upper())
        schemes = [f"Bearer {each}" for each in wrong] + [basic(each) for each in wrong]
        for given in (*schemes, TOKEN, f"Digest {TOKEN}", "Basic %%%", "Basic", basic("x", TOKEN)):
            async with client.get("/api/status", headers={"Authorization": given}) as answer:
                assert answer.status == 401, given
                assert answer.headers["WWW-Authenticate"] == 'Basic realm="relay", charset="UTF-8"'
        await get(client, "/api/status", 401)
        await get(client, "/api/nothing", 401)
        for given in (f"Bearer {TOKEN}", f"bearer  {TOKEN}", basic(TOKEN), basic(TOKEN, "")):
            await get(client, "/api/status", headers={"Authorization": given})
        for path in ("/metrics", "/healthz", "/readyz"):
            async with client.get(path) as answer:
                assert answer.status == 200


async def test_off_loopback_there_are_no_answers_without_a_token(start: Any, upstream: Any) -> None:
    async with asking(start(upstream.port, http={"address": "0.0.0.0:0"})) as client:
        assert "http.token_file" in (await get(client, "/api/status", 403))["detail"]
        async with client.get("/metrics") as answer:
            assert answer.status == 200
    async with asking(start(upstream.port, http={"address": "0.0.0.0:0", "token": TOKEN})) as client:
        await get(client, "/api/status", 401)
        await get(client, "/api/status", headers={"Authorization": f"Bearer {TOKEN}"})


# Never in the way of the mail


async def test_a_search_that_takes_too_long_is_ended(running: Any) -> None:
    reading = Reading(f"sqlite:///{running.database}", time_limit=0.2)
    queries = await reading._open()
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
    with pytest.raises(Exception, match=r"longer than 0\.2 s"):
        await queries.reader.read(lambda connection: connection.exec_driver_sql(endless).all())


async def test_searches_beyond_their_number_are_told_to_come_again(running: Any) -> None:
    reading = Reading(f"sqlite:///{running.database}")
    gate = asyncio.Event()

    async def held(_queries: Any) -> None:
        await gate.wait()

    reads = [asyncio.create_task(reading._read(held)) for _ in range(READS + WAITING)]
    await asyncio.sleep(0)
    while not all(len(task.get_stack()) for task in reads) or reading._waiting < WAITING:
        await asyncio.sleep(0.01)
    with pytest.raises(BusyError, match="too many"):
        await reading.count_in_doubt()
    gate.set()
    await asyncio.gather(*reads)
    assert await reading.count_in_doubt() == 1
    await reading.close()


async def test_limits_are_read_within_the_same_bounds(start: Any, upstream: Any) -> None:
    """By connections of their own, of which mail needs some to know whether a limit has room."""
    gate = asyncio.Event()
    limits = [{"name": "orders", "scope": "sender", "max": 2, "per": "1h"}]
    async with (
        start(upstream.port, limits=limits) as running,
        aiohttp.ClientSession(f"http://127.0.0.1:{running.http_port}") as client,
    ):
        reading = running.relay._reading
        reads = [asyncio.create_task(reading.bounded(gate.wait)) for _ in range(READS + WAITING)]
        while reading._waiting < WAITING:
            await asyncio.sleep(0.01)
        assert "too many" in (await get(client, "/api/limits", 503))["detail"]
        gate.set()
        await asyncio.gather(*reads)
        assert [limit["name"] for limit in (await get(client, "/api/limits"))["limits"]] == ["orders"]
        reading._time_limit = 0.0
        assert "takes longer than 0 s" in (await get(client, "/api/limits", 503))["detail"]
        async with client.get("/") as answer:
            assert "To count this takes longer than 0 s." in await answer.text()


# The description


async def test_the_description_holds(running: Any) -> None:
    """Schemathesis makes requests from the description, good ones and bad ones, and judges the answers."""
    base = f"http://127.0.0.1:{running.http_port}"
    await asyncio.to_thread(explore, base)


def explore(base: str) -> None:
    document = requests.get(f"{base}/api/openapi.json", timeout=10).json()
    schema = schemathesis.openapi.from_dict(document)
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) == 7
    for operation in operations:
        for mode in schemathesis.GenerationMode:
            if mode is schemathesis.GenerationMode.NEGATIVE and not operation.query:
                continue  # nothing that could be wrong

            @settings(max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            @given(operation.as_strategy(mode))
            def judge(case: schemathesis.Case) -> None:
                case.call_and_validate(base_url=base, timeout=20)

            judge()
