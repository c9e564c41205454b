"""What a start loads before the relay listens, and what is left for later: modules are counted, not seconds.

Asked of a real process, by what Python itself says of its imports (PYTHONPROFILEIMPORTTIME).
"""

from __future__ import annotations

import asyncio
import re
import signal
import sys
from pathlib import Path

from tests.support.client import Client
from tests.support.listening import LISTENS
from tests.support.process import RelayProcess

UPSTREAM_PORT = 1
"""Of the upstream that the files name: with --dev it is not used."""
LATER = {"alembic", "asyncpg", "cryptography", "jinja2", "mako", "pygments", "rich", "sqlalchemy", "tomlkit"}
"""Libraries that are loaded when they are needed first."""
NEEDED = {
    *("aiosmtpd.smtp", "aiosmtplib", "aiosqlite", "prometheus_client", "ssl", "uvloop"),
    *("relay.session.session", "relay.upstream.dial", "relay.records.sqlite.insert", "relay.maillog.line"),
}
"""Some of what a message takes."""


def trial(directory: Path) -> RelayProcess:
    relay = RelayProcess(directory, UPSTREAM_PORT, module="tests.support.listening")
    relay.options = ("--dev",)
    relay.environment = {"PYTHONPROFILEIMPORTTIME": "1"}
    return relay


def loaded(relay: RelayProcess) -> tuple[set[str], set[str]]:
    """The modules that the process had loaded when it began to listen, and those that it has since."""
    before, listens, since = relay.errors().partition(LISTENS)
    assert listens
    one, other = (
        set(re.findall(r"^import time: .*\| +(\S+)$", text, re.MULTILINE)) for text in (before, since)
    )
    return one, other


def libraries(modules: set[str]) -> set[str]:
    """The packages of the modules but for the standard library's."""
    return {module.partition(".")[0] for module in modules} - sys.stdlib_module_names


async def send(relay: RelayProcess) -> None:
    async with Client(relay.port, deadline_s=30.0) as client:
        await client.ehlo()
        assert (await client.message("a@example.com", ["b@example.org"], b"\r\ntext\r\n"))[-1].code == 250


async def test_what_is_loaded_before_it_listens_and_what_is_not(tmp_path: Path) -> None:
    async with trial(tmp_path) as relay:
        await relay.start()
        before, _ = loaded(relay)
        assert libraries(before) & LATER == set()
        assert before >= NEEDED

        assert (await relay.get("/metrics"))[0] == (await relay.get("/readyz"))[0] == 200
        _, http = loaded(relay)
        assert libraries(http) & LATER == set()
        await send(relay)
        _, since = loaded(relay)
        assert libraries(since - http) == set()

        status, page = await relay.get("/")
        assert (status, "b@example.org" in page) == (200, True)
        _, since = loaded(relay)
        assert libraries(since) & LATER == {"jinja2", "sqlalchemy"}
        assert await relay.terminate() == 0


async def test_what_limits_count_by_is_loaded_before_it_listens(tmp_path: Path) -> None:
    async with trial(tmp_path) as relay:
        relay.write(relay.text() + '[[limits]]\nscope = "sender"\nmax = 9\nper = "1h"\n')
        await relay.start()
        before, _ = loaded(relay)
        assert before >= {"relay.records.counts", "relay.records.sqlite.reader"}
        await relay.get("/healthz")
        _, http = loaded(relay)
        await send(relay)
        _, since = loaded(relay)
        assert libraries(since - http) == set()
        assert await relay.terminate() == 0


async def test_mail_does_not_wait_for_what_answers_http(tmp_path: Path) -> None:
    go = tmp_path / "go"
    async with trial(tmp_path) as relay:
        replace_library(relay, "aiohttp", WAITS.format(go=str(go)))
        await relay.start()
        await send(relay)
        asked = asyncio.create_task(relay.get("/readyz"))
        await send(relay)
        assert not asked.done()
        go.touch()
        status, text = await asked
        assert (status, text.partition("\n")[0]) == (200, "ready")
        assert await relay.terminate() == 0


async def test_a_relay_that_is_told_to_end_does_not_wait_for_it_either(tmp_path: Path) -> None:
    go = tmp_path / "go"
    async with trial(tmp_path) as relay:
        replace_library(relay, "aiohttp", WAITS.format(go=str(go)))
        await relay.start()
        relay.signal(signal.SIGTERM)
        await relay.event("stopped")
        go.touch()  # the interpreter ends its threads in order
        assert await relay.ended() == 0


async def test_without_what_answers_http_the_relay_ends_in_order(tmp_path: Path) -> None:
    async with trial(tmp_path) as relay:
        replace_library(relay, "aiohttp", BROKEN)
        await relay.spawn()
        assert await relay.ended() == 1
        said = [line for line in relay.errors().splitlines() if not line.startswith("import time:")]
        assert said[0] == LISTENS
        assert [line.partition(" (")[0] for line in said[1:]] == ["relay: ImportError: broken on purpose"]
        events = [line["event"] for line in relay.log()]
        assert events.index("started") < events.index("draining") < events.index("stopped")


async def test_where_memory_is_short_for_what_answers_http_the_log_says_so(tmp_path: Path) -> None:
    async with trial(tmp_path) as relay:
        replace_library(relay, "aiohttp", "raise MemoryError\n")
        await relay.spawn()
        assert await relay.ended() == 1
        said = [line for line in relay.errors().splitlines() if not line.startswith("import time:")]
        line = await relay.event("limit reached")
        assert (line["where"], line["reason"]) == ("http", NO_MEMORY)
        assert said[1:] == [f"relay: {NO_MEMORY}"]


async def test_where_memory_is_short_for_what_a_page_needs_it_is_no_defect(tmp_path: Path) -> None:
    async with trial(tmp_path) as relay:
        replace_library(relay, "sqlalchemy", "raise MemoryError\n")
        await relay.start()
        assert (await relay.get("/"))[0] == 500
        line = await relay.event("limit reached")
        assert (line["where"], line["reason"], line["error"]) == ("http", NO_MEMORY, "MemoryError")
        await send(relay)
        assert await relay.terminate() == 0
        assert "unforeseen" not in {line["event"] for line in relay.log()}


async def test_a_start_without_a_thread_says_which_limit_to_raise(tmp_path: Path) -> None:
    """Each thread asks for a stack as large as the limit of stacks, which here is more than there may be."""
    async with trial(tmp_path) as relay:
        relay.launcher = ("sh", "-c", 'ulimit -Ss 67108864 && ulimit -Sv 33554432 && exec "$@"', "sh")
        await relay.spawn()
        assert await relay.ended() == 1
        said = [line for line in relay.errors().splitlines() if not line.startswith("import time:")]
        assert len(said) == 1
        assert said[0].startswith("relay: this process may have no more threads: raise its limit of tasks (")


async def test_one_that_cannot_be_loaded_later_is_an_error_of_what_needs_it(tmp_path: Path) -> None:
    async with trial(tmp_path) as relay:
        replace_library(relay, "sqlalchemy", BROKEN)
        await relay.start()
        assert (await relay.get("/"))[0] == 500
        line = await relay.event("unforeseen")
        assert (line["where"], line["error"]) == ("http", "ImportError: broken on purpose")
        await send(relay)
        assert await relay.terminate() == 0


NO_MEMORY = "this process may have no more memory: raise its limit (LimitAS, ulimit -v)"
BROKEN = "raise ImportError('broken on purpose')\n"
WAITS = """
import importlib, sys, time
from pathlib import Path
while not Path({go!r}).exists():
    time.sleep(0.005)
sys.path.remove(str(Path(__file__).parent))
del sys.modules["aiohttp"]
sys.modules["aiohttp"] = importlib.import_module("aiohttp")
"""


def replace_library(relay: RelayProcess, name: str, source: str) -> None:
    """Have the process find this in place of a library."""
    place = relay.directory / "in place"
    place.mkdir()
    (place / f"{name}.py").write_text(source)
    relay.environment["PYTHONPATH"] = str(place)
