"""What a start loads before the relay listens, and what is left for later: modules are counted, not seconds.

Asked of a real process, by what Python itself says of its imports (PYTHONPROFILEIMPORTTIME).
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tests.support.client import Client
from tests.support.process import RelayProcess

UPSTREAM_PORT = 1
"""Of the upstream that the files name: with --dev it is not used."""
LATER = {
    *("alembic", "asyncpg", "cryptography", "jinja2", "mako", "pygments", "rich", "sqlalchemy", "tomlkit"),
}
"""Libraries that are loaded when they are needed first."""
NEEDED = {
    *("aiosmtpd.smtp", "aiosmtplib", "aiosqlite", "prometheus_client", "ssl", "uvloop"),
    *("relay.session.session", "relay.upstream.dial", "relay.records.sqlite.insert", "relay.maillog.line"),
    *("aiohttp.web", "relay.web.api", "relay.web.page"),
}
"""Some of what a message takes, and HTTP."""


def trial(directory: Path) -> RelayProcess:
    relay = RelayProcess(directory, UPSTREAM_PORT)
    relay.options = ("--dev",)
    relay.environment = {"PYTHONPROFILEIMPORTTIME": "1"}
    return relay


def loaded(relay: RelayProcess) -> set[str]:
    """The modules that the process has loaded until now."""
    return set(re.findall(r"^import time: .*\| +(\S+)$", relay.errors(), re.MULTILINE))


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
        at_first = loaded(relay)
        assert libraries(at_first) & LATER == set()
        assert at_first >= NEEDED

        await send(relay)
        assert (await relay.get("/metrics"))[0] == (await relay.get("/readyz"))[0] == 200
        assert libraries(loaded(relay) - at_first) == set()

        status, page = await relay.get("/")
        assert (status, "b@example.org" in page) == (200, True)
        assert libraries(loaded(relay)) & LATER == {"jinja2", "sqlalchemy"}
        assert await relay.terminate() == 0


async def test_what_limits_count_by_is_loaded_before_it_listens(tmp_path: Path) -> None:
    async with trial(tmp_path) as relay:
        relay.write(relay.text() + '[[limits]]\nscope = "sender"\nmax = 9\nper = "1h"\n')
        await relay.start()
        at_first = loaded(relay)
        assert "relay.records.counts" in at_first
        await send(relay)
        assert libraries(loaded(relay) - at_first) == set()
        assert await relay.terminate() == 0


async def test_a_library_that_cannot_be_loaded_ends_the_start(tmp_path: Path) -> None:
    async with trial(tmp_path) as relay:
        break_library(relay, "aiohttp")
        await relay.spawn()
        assert await relay.ended() == 1
        assert relay.errors().startswith("relay: ImportError: broken on purpose (relay/web/")
        assert relay.errors().count("\n") == 1
        assert "started" not in [line["event"] for line in relay.log()]


async def test_one_that_cannot_be_loaded_later_is_an_error_of_what_needs_it(tmp_path: Path) -> None:
    async with trial(tmp_path) as relay:
        break_library(relay, "sqlalchemy")
        await relay.start()
        assert (await relay.get("/"))[0] == 500
        line = await relay.event("unforeseen")
        assert (line["where"], line["error"]) == ("http", "ImportError: broken on purpose")
        await send(relay)
        assert await relay.terminate() == 0


def break_library(relay: RelayProcess, name: str) -> None:
    """Have the process find a library that cannot be loaded."""
    place = relay.directory / "broken"
    place.mkdir()
    (place / f"{name}.py").write_text("raise ImportError('broken on purpose')\n")
    relay.environment = {"PYTHONPATH": str(place)}
