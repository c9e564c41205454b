"""The HTTP side, asked over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Sequence

import aiohttp
import aiohttp.web as aiohttp_web
import pytest

from relay.metrics import Metrics
from relay.settings import Settings
from relay.web import BindError, Overview, Web
from relay.web.access import Access
from relay.web.crowd import MAX_CONNECTIONS
from relay.web.server import Server, Site


class Readiness:
    """What the relay would say of itself; the test sets it."""

    def __init__(self) -> None:
        self.answer: tuple[bool, Sequence[str]] = (True, ["upstream primary: up"])

    def __call__(self) -> tuple[bool, Sequence[str]]:
        return self.answer


@pytest.fixture
def readiness() -> Readiness:
    return Readiness()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(upstreams=["primary"], listeners=["a"], task_types=[])


@pytest.fixture
async def web(metrics: Metrics, readiness: Readiness) -> AsyncIterator[Web]:
    web = Web(lambda: Server(metrics, readiness))
    await web.start("127.0.0.1", 0)
    yield web
    await web.stop()


@pytest.fixture
async def client(web: Web) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(f"http://127.0.0.1:{web.port}") as client:
        yield client


async def test_health_is_good_while_the_process_lives(
    client: aiohttp.ClientSession, readiness: Readiness
) -> None:
    readiness.answer = (False, ["the store and the spool take no rows"])
    async with client.get("/healthz") as answer:
        assert answer.status == 200
        assert answer.content_type == "text/plain"
        assert await answer.text() == "ok\n"


async def test_readiness_follows_the_relay(client: aiohttp.ClientSession, readiness: Readiness) -> None:
    async with client.get("/readyz") as answer:
        assert answer.status == 200
        assert await answer.text() == "ready\nupstream primary: up\n"
        assert answer.headers["Cache-Control"] == "no-store"
    readiness.answer = (False, ["draining", "upstream primary: up"])
    async with client.get("/readyz") as answer:
        assert answer.status == 503
        assert await answer.text() == "not ready\ndraining\nupstream primary: up\n"


@pytest.mark.parametrize("path", ["/metrics", "/healthz", "/readyz"])
async def test_head_has_the_headers_and_no_body(client: aiohttp.ClientSession, path: str) -> None:
    async with client.head(path) as answer:
        assert answer.status == 200
        assert await answer.read() == b""
        assert int(answer.headers["Content-Length"]) > 0


@pytest.mark.parametrize(("path", "status"), [("/metrics", 405), ("/healthz", 405), ("/nothing", 404)])
async def test_other_methods_and_paths_get_one_line(
    client: aiohttp.ClientSession, path: str, status: int
) -> None:
    async with client.post(path, data=b"x") as answer:
        assert answer.status == status
        assert answer.content_type == "text/plain"
        assert (await answer.text()).startswith(f"{status} ")
        assert answer.headers.get("Allow") == ("GET,HEAD" if status == 405 else None)
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    async with client.get("/") as answer:
        assert answer.status == 404
        assert await answer.text() == "404 Not Found\n"


@pytest.mark.parametrize("path", ["/" * 90_000, "/a" * 45_000, "/api/" + "%61" * 1000])
async def test_a_path_that_none_of_ours_comes_near_is_not_looked_for(web: Web, path: str) -> None:
    # To look for the first two took a second of the event loop.
    reader, writer = await asyncio.open_connection("127.0.0.1", web.port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
    answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 414 ")
    assert b"\r\nX-Content-Type-Options: nosniff\r\n" in answer
    assert b"aiohttp" not in answer
    writer.close()


@pytest.mark.parametrize("path", ["/metrics", "/healthz", "/readyz", "/nothing"])
async def test_no_answer_names_the_server(client: aiohttp.ClientSession, path: str) -> None:
    async with client.get(path) as answer:
        assert "Server" not in answer.headers
        assert "aiohttp" not in await answer.text()


@pytest.mark.parametrize(
    "octets",
    [
        b"EHLO there\r\n\r\n",
        b"GET /healthz?\xff HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n",
    ],
)
async def test_what_is_no_http_is_refused_and_no_error_of_ours(
    web: Web, octets: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", web.port)
    writer.write(octets)
    assert b" 400 Bad Request\r\n" in await reader.read()
    writer.close()
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_a_body_that_nobody_asked_for_is_not_unpacked(
    web: Web, caplog: pytest.LogCaptureFixture
) -> None:
    # A megabyte that unpacked to a thousand held up the event loop; what did not unpack was an error of ours.
    request = b"GET /healthz HTTP/1.1\r\nHost: a\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", web.port)
    writer.write(request + b"Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\nabcd")
    writer.write(request + b"Connection: close\r\n\r\n")
    assert (await reader.read()).count(b"HTTP/1.1 200 OK\r\n") == 2
    writer.close()
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_metrics_are_those_of_the_relay(client: aiohttp.ClientSession, metrics: Metrics) -> None:
    metrics.session_opened("a")
    async with client.get("/metrics") as answer:
        assert "smtp_relay_client_sessions 1.0\n" in await answer.text()


async def test_an_address_in_use_is_named_on_one_line(
    metrics: Metrics, readiness: Readiness, web: Web
) -> None:
    second = Web(lambda: Server(metrics, readiness))
    with pytest.raises(BindError) as caught:
        await second.start("127.0.0.1", web.port)
    text = str(caught.value)
    assert text.startswith(f"http.address: cannot listen on 127.0.0.1 port {web.port}: ")
    assert "in use" in text
    assert "\n" not in text
    await second.stop()


async def test_a_host_that_is_not_here_is_named(metrics: Metrics, readiness: Readiness) -> None:
    with pytest.raises(BindError, match=r"cannot listen on 192\.0\.2\.1 port 9025"):
        await Web(lambda: Server(metrics, readiness)).start("192.0.2.1", 9025)


async def test_stop_frees_the_port_and_may_be_called_twice(metrics: Metrics, readiness: Readiness) -> None:
    web = Web(lambda: Server(metrics, readiness))
    await web.start("127.0.0.1", 0)
    port = web.port
    await web.stop()
    await web.stop()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)
    await web.start("127.0.0.1", port)
    assert web.port == port
    await web.stop()


async def test_settings_that_change_before_it_answers_are_those_it_answers_by(
    metrics: Metrics, readiness: Readiness
) -> None:
    def settings(*hosts: str) -> Settings:
        upstream = {"name": "primary", "address": "192.0.2.1:25"}
        return Settings.model_validate({"upstreams": [upstream], "http": {"hosts": hosts}})

    site = Site(Access(settings("before.example")), Overview(metrics, readiness), [])
    web = Web(lambda: Server(metrics, readiness, site))
    await web.listen("127.0.0.1", 0)
    web.follow(settings("after.example"))
    await web.answer()
    asked = {}
    async with aiohttp.ClientSession() as client:
        for host in ("before.example", "after.example"):
            url = f"http://127.0.0.1:{web.port}/nothing"
            async with client.get(url, headers={"Host": host}) as answer:
                asked[host] = answer.status
    await web.stop()
    assert asked == {"before.example": 421, "after.example": 404}


async def test_what_says_what_was_sent_asks_for_the_token(metrics: Metrics, readiness: Readiness) -> None:
    upstream = {"name": "primary", "address": "192.0.2.1:25"}
    settings = Settings.model_validate({"upstreams": [upstream], "http": {"token": "a-token-of-some-length"}})
    site = Site(Access(settings), Overview(metrics, readiness), [])
    web = Web(lambda: Server(metrics, readiness, site))
    await web.start("127.0.0.1", 0)
    told = []
    async with aiohttp.ClientSession() as client:
        for path, token in (
            ("/api/x", ""),
            ("/api/x", "another"),
            ("/api/x", "a-token-of-some-length"),
            ("/healthz", ""),
        ):
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            async with client.get(f"http://127.0.0.1:{web.port}{path}", headers=headers) as answer:
                told.append(answer.status)
    await web.stop()
    assert told == [401, 401, 404, 200]


async def test_stop_does_not_wait_for_an_idle_scraper(web: Web) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", web.port)
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    assert await reader.readuntil(b"ok\n")
    await asyncio.wait_for(web.stop(), 10)
    assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
async def test_a_crowd_that_says_nothing_is_bounded_and_keeps_nobody_out(web: Web) -> None:
    talks, says = await asyncio.open_connection("127.0.0.1", web.port)

    async def ask() -> None:
        says.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await talks.readuntil(b"ok\n")).startswith(b"HTTP/1.1 200 OK\r\n")

    crowd = []
    for at in range(MAX_CONNECTIONS + 10):
        crowd.append(await asyncio.open_connection("127.0.0.1", web.port))
        crowd[-1][1].write(b"GET / HTTP/1.1\r\nHost: lo" if at % 2 else b"")
        await ask()
    ended = [asyncio.create_task(reader.read()) for reader, _ in crowd]
    first = ended[:11]  # one place is taken by who talks
    await asyncio.wait_for(asyncio.gather(*first, return_exceptions=True), 10)
    await ask()
    assert not any(each.done() for each in ended[11:])
    for each in ended[11:]:
        each.cancel()
    for _, writer in (*crowd, (talks, says)):
        writer.transport.abort()


async def test_a_crowd_that_is_being_answered_stays(metrics: Metrics, readiness: Readiness) -> None:
    asked, answer = asyncio.Semaphore(0), asyncio.Event()

    class Slow:
        def routes(self) -> list[aiohttp_web.RouteDef]:
            async def slow(_request: aiohttp_web.Request) -> aiohttp_web.Response:
                asked.release()
                await answer.wait()
                return aiohttp_web.Response(text="slow")

            return [aiohttp_web.get("/slow", slow)]

    settings = Settings.model_validate({"upstreams": [{"address": "127.0.0.1:25", "tls": "none"}]})
    site = Site(Access(settings), Overview(metrics, readiness), [Slow()])
    web = Web(lambda: Server(metrics, readiness, site))
    await web.start("127.0.0.1", 0)
    crowd = []
    for _ in range(MAX_CONNECTIONS):
        crowd.append(await asyncio.open_connection("127.0.0.1", web.port))
        crowd[-1][1].write(b"GET /slow HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        await asyncio.wait_for(asked.acquire(), 10)
    late, writer = await asyncio.open_connection("127.0.0.1", web.port)
    with contextlib.suppress(ConnectionResetError):
        assert await asyncio.wait_for(late.read(), 10) == b""
    answer.set()
    answers = await asyncio.gather(*(reader.read() for reader, _ in crowd))
    assert all(each.endswith(b"slow") for each in answers)
    for each in (writer, *(writer for _, writer in crowd)):
        each.transport.abort()
    await web.stop()


async def test_ipv6_works(metrics: Metrics, readiness: Readiness) -> None:
    web = Web(lambda: Server(metrics, readiness))
    try:
        await web.start("::1", 0)
    except BindError as error:
        pytest.skip(str(error))
    async with aiohttp.ClientSession() as client, client.get(f"http://[::1]:{web.port}/healthz") as answer:
        assert answer.status == 200
    await web.stop()
