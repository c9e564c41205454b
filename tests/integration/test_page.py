"""The page over HTTP: what it says, to whom, and that strangers' text stays text."""

from __future__ import annotations

import asyncio
import re
from html import unescape
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin

import aiohttp
import pytest

from tests.support.client import Client
from tests.support.script import Close

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.conftest import Running
    from tests.support.upstream import ScriptedUpstream

HOSTILE = '"><script>window.pwned=1</script><img src=x onerror=window.pwned=1>'
SEND = './sends/[^"]+'
VOID = {"meta", "link", "input", "img", "br"}


class Elements(HTMLParser):
    """The elements of a page, with their attributes, and its text; a page that does not nest fails."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
async def running(start: Any, upstream: ScriptedUpstream) -> AsyncIterator[Running]:
    async with start(upstream.port) as running:
        yield running


@pytest.fixture
async def http(running: Running) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(f"http://127.0.0.1:{running.http_port}") as client:
        yield client


async def get(http: aiohttp.ClientSession, path: str, status: int = 200) -> str:
    async with http.get(path) as answer:
        text = await answer.text()
        assert answer.status == status, text
        return text


async def send(running: Running, *messages: tuple[str, list[str], bytes]) -> None:
    async with Client(running.port) as client:
        await client.ehlo()
        for sender, recipients, content in messages:
            replies = await client.message(sender, recipients, content)
            assert replies[-1].code == 250


def content(**headers: str) -> bytes:
    lines = [f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items()]
    return "".join(lines).encode() + b"\r\ntext\r\n"


def links(text: str, pattern: str) -> list[str]:
    return [unescape(found) for found in re.findall(rf'href="({pattern})"', text)]


# ------------------------------------------------------------------------------------------- what is seen


async def test_an_empty_relay_says_what_to_do(running: Running, http: aiohttp.ClientSession) -> None:
    text = await get(http, "/")
    assert "Nothing has been sent yet" in text
    assert f'smtplib.SMTP("127.0.0.1", {running.port})' in unescape(text)
    assert "All is well" in text
    assert "Nothing has been sent yet" in await get(http, "/sends")
    assert "Nothing is in doubt" in await get(http, "/in-doubt")


async def test_the_example_works_as_it_stands(running: Running, http: aiohttp.ClientSession) -> None:
    (script,) = re.findall(
        r"<pre[^>]*>python3 - &lt;&lt;&#39;END&#39;\n(.*?)\nEND</pre>", await get(http, "/"), re.DOTALL
    )
    await asyncio.to_thread(exec, unescape(script), {})
    assert [row["task_type"] for row in running.rows()] == ["order-confirmation"]


async def test_what_was_sent_can_be_found_and_opened(running: Running, http: aiohttp.ClientSession) -> None:
    await send(
        running,
        (
            "shop@example.com",
            ["ann@example.org", "ben@example.net"],
            content(X_Task_Type="order", Message_ID="<1@a>"),
        ),
        ("news@example.com", ["cleo@example.org"], content(X_Task_Type="digest", X_Task_ID="job 7")),
    )
    for query in (
        *("q=ann@example.org", "q=shop@example.com", "q=order", "q=%3C1@a%3E", "recipient=@example.net"),
        *("type=ord*&sender=@example.com", "q=to:ben@example.net+type:order"),
    ):
        text = await get(http, f"/sends?{query}")
        (path,) = links(text, SEND)
        assert "shop@example.com" in text
        assert "news@example.com" not in text
    one = Elements(await get(http, path)).text
    for said in ("ann@example.org", "ben@example.net", "order", "<1@a>", "250", "2 accepted"):
        assert said in one
    assert "Nothing fits" in await get(http, "/sends?q=zoe@example.org")
    (digest,) = links(await get(http, "/sends?q=digest"), SEND)
    assert "job 7" in Elements(await get(http, digest)).text


async def test_pages_go_on_without_a_gap_or_a_repetition(
    running: Running, http: aiohttp.ClientSession
) -> None:
    await send(running, *((f"s{at}@example.com", ["ann@example.org"], content()) for at in range(107)))
    seen: list[str] = []
    path: str | None = "/sends?q=ann@example.org"
    pages = 0
    while path is not None:
        text = await get(http, path)
        seen += re.findall(r"s\d+@example\.com", text)
        older = links(text, './sends\\?[^"]*after=[^"]*')
        path = older[0] if older else None
        pages += 1
    assert seen == [f"s{at}@example.com" for at in reversed(range(107))]
    assert pages == 3


async def test_a_search_without_meaning_is_told(http: aiohttp.ClientSession) -> None:
    text = await get(http, "/sends?since=soon", 400)
    assert "since takes a time ago" in text
    assert 'value="soon"' in text
    assert "after takes" in await get(http, "/sends?after=x", 400)
    assert "tz takes" in await get(http, "/sends?tz=Nowhere/Else&since=2026-11-23", 400)


@pytest.mark.parametrize(
    "path", ["/sends/019b1c7e-5a2f-7c31-9d0e-3f5b8a6c2d14", "/sends/7", "/sends/%3Cscript%3E"]
)
async def test_a_send_that_is_not_there(http: aiohttp.ClientSession, path: str) -> None:
    assert "Not found" in await get(http, path, 404)


async def test_a_message_in_doubt_is_told_and_listed(
    running: Running, http: aiohttp.ClientSession, upstream: ScriptedUpstream
) -> None:
    upstream.script = {"end_of_data": [Close()]}
    async with Client(running.port) as client:
        await client.ehlo()
        replies = await client.message("a@example.com", ["ann@example.org"], content())
        assert replies[-1].code == 451
    async with asyncio.timeout(10):
        while not running.rows("SELECT * FROM task_in_doubt"):
            await asyncio.sleep(0.01)
    (path,) = links(await get(http, "/in-doubt"), SEND)
    one = Elements(await get(http, path)).text
    assert "In doubt" in one
    assert "ann@example.org" in one
    assert "./in-doubt" in links(await get(http, "/"), "./in-doubt")


async def test_the_spans_of_time_have_addresses(running: Running, http: aiohttp.ClientSession) -> None:
    await send(running, ("a@example.com", ["ann@example.org"], content(X_Task_Type="order")))
    for span, shown in (("24h", "24h"), ("7d", "7d"), ("30d", "30d"), ("nonsense", "24h")):
        text = await get(http, f"/?span={span}")
        assert re.search(r"order <b>1</b>", text), span
        assert re.findall(r'aria-current="true">([^<]+)<', text) == [shown]


async def test_limits_are_there_where_there_are_some(start: Any, upstream: ScriptedUpstream) -> None:
    limits = [
        {"name": "orders", "scope": "sender", "max": 2, "per": "1h"},
        {"name": "all", "scope": "all", "max_recipients": 100, "per": "1d"},
    ]
    async with (
        start(upstream.port, limits=limits) as running,
        aiohttp.ClientSession(f"http://127.0.0.1:{running.http_port}") as http,
    ):
        for _ in range(2):
            await send(running, ("shop@example.com", ["ann@example.org"], content()))
        text = " ".join(Elements(await get(http, "/")).text.split())
        assert "orders 2 messages in 1h for each sender, defer" in text
        assert "shop@example.com 2 100 % over, room in" in text
        assert "all 100 recipients in 1d in all, defer nobody room for all" in text


async def test_a_recipient_that_a_limit_refused_was_not_refused_by_the_upstream(
    start: Any, upstream: ScriptedUpstream
) -> None:
    async with (
        start(upstream.port, limits=[{"scope": "recipient", "max": 1, "per": "1d"}]) as running,
        aiohttp.ClientSession(f"http://127.0.0.1:{running.http_port}") as http,
    ):
        await send(running, ("shop@example.com", ["ann@example.org"], content()))
        async with Client(running.port) as client:
            await client.ehlo()
            await client.message("shop@example.com", ["ann@example.org", "ben@example.org"], content())
        task_id = running.rows("SELECT task_id FROM task_done ORDER BY id DESC LIMIT 1")[0]["task_id"]
        text = " ".join(Elements(await get(http, f"/sends/{task_id}")).text.split())
    assert "1 accepted, 1 refused" in text
    assert re.search(r"ben@example\.org Refused ann@example\.org ?451 4\.7\.1 Rate limit", text), text


async def test_without_limits_nothing_is_said_of_them(http: aiohttp.ClientSession) -> None:
    assert "Rate limits" not in await get(http, "/")


# ------------------------------------------------------------------------------------------- strangers


async def test_what_strangers_wrote_is_text(running: Running, http: aiohttp.ClientSession) -> None:
    address = '"<script>window.pwned=1</script>"@example.com'
    await send(
        running,
        (
            address,
            [address, "\"'onmouseover='window.pwned=1\"@example.org"],
            content(X_Task_Type=HOSTILE, Message_ID=HOSTILE, X_Task_ID=HOSTILE),
        ),
    )
    (path,) = links(await get(http, "/sends"), SEND)
    pages = [
        "/",
        "/live",
        "/sends",
        path,
        f"/sends?q={HOSTILE}",
        f"/sends?type={HOSTILE}",
        "/?span=" + HOSTILE,
    ]
    for each in pages:
        async with http.get(each) as answer:
            text = await answer.text()
        assert "<script>window" not in text, each
        assert "<img src=x" not in text, each
        for tag, attributes in Elements(text).found:
            assert not [name for name in attributes if name.startswith("on")], (each, tag)
            assert "style" not in attributes, "the policy forbids it"
            if tag == "script":
                assert str(attributes["src"]).startswith(("./static/", "../static/"))
            for name in ("href", "src", "action"):
                assert urljoin("http://here/", attributes.get(name) or "/").startswith("http://here/"), each
    assert HOSTILE[:30] in Elements(await get(http, path)).text


async def test_text_that_turns_round_shows_how(running: Running, http: aiohttp.ClientSession) -> None:
    await send(running, ("a@example.com", ["ann@example.org"], content(Message_ID="<in\u202eeciov@a>")))
    (path,) = links(await get(http, "/sends"), SEND)
    text = await get(http, path)
    assert "in\\u202eeciov" in text
    assert "\u202e" not in text


@pytest.mark.parametrize(
    "path", ["/", "/live", "/sends", "/in-doubt", "/sends/7", "/static/page.js", "/static/style.css"]
)
async def test_every_answer_has_its_policy(http: aiohttp.ClientSession, path: str) -> None:
    async with http.get(path) as answer:
        policy = dict(
            part.strip().split(" ", 1) for part in answer.headers["Content-Security-Policy"].split(";")
        )
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert "unsafe" not in str(policy)
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        assert answer.headers["X-Frame-Options"] == "DENY"
        assert "Server" not in answer.headers
        assert answer.charset == "utf-8"


@pytest.mark.parametrize(
    "name", ["../page.py", "..%2Fpage.py", "templates/base.html", "", "uplot/", "style.css/x"]
)
async def test_only_the_packages_own_files_are_given(http: aiohttp.ClientSession, name: str) -> None:
    async with http.get(f"/static/{name}") as answer:
        assert answer.status == 404


async def test_nothing_there_changes_anything(http: aiohttp.ClientSession) -> None:
    for path in ("/", "/sends", "/live"):
        async with http.post(path, data=b"x") as answer:
            assert answer.status == 405


async def test_with_a_token_the_page_asks_for_it(start: Any, upstream: ScriptedUpstream) -> None:
    token = "a-long-and-secret-token-for-the-page"
    login = {"Authorization": aiohttp.encode_basic_auth("me", token)}
    async with (
        start(upstream.port, http={"token": token}) as running,
        aiohttp.ClientSession(f"http://127.0.0.1:{running.http_port}") as http,
    ):
        for path in ("/", "/live", "/sends", "/static/page.js"):
            async with http.get(path) as answer:
                assert answer.status == 401
                assert answer.headers["WWW-Authenticate"].startswith("Basic ")
            async with http.get(path, headers=login) as answer:
                assert answer.status == 200
        async with http.get("/", headers={"Host": "evil.example"}) as answer:
            assert answer.status == 421


# ------------------------------------------------------------------------------------------- cost


async def test_who_has_it_is_told_so(http: aiohttp.ClientSession) -> None:
    for path in ("/static/style.css", "/sends"):
        async with http.get(path) as answer:
            tag = answer.headers["ETag"]
        async with http.get(path, headers={"If-None-Match": tag}) as answer:
            assert answer.status == 304
            assert await answer.read() == b""
            assert "Content-Security-Policy" in answer.headers


async def test_many_who_look_cost_little(
    running: Running, http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = 0
    reading = running.relay._reading
    read = reading._read

    async def counted(work: Any) -> Any:
        nonlocal reads
        reads += 1
        return await read(work)

    monkeypatch.setattr(reading, "_read", counted)
    for _ in range(5):
        await asyncio.gather(*(get(http, "/live") for _ in range(20)))
    assert reads == 3, "how many are in doubt, what was sent by type, the latest: each once"


async def test_records_that_cannot_be_read_are_told(running: Running, http: aiohttp.ClientSession) -> None:
    reading = running.relay._reading
    await reading.close()
    foreign = running.database.with_name("foreign.db")
    foreign.write_text("no database at all\n" * 100)
    reading._url = f"sqlite:///{foreign}"
    text = await get(http, "/")
    assert "is not a SQLite database" in text
    assert "the records cannot be read" in text
    assert "is not a SQLite database" in await get(http, "/sends", 503)
    assert "cannot be read" in await get(http, "/sends/019b1c7e-5a2f-7c31-9d0e-3f5b8a6c2d14", 503)
