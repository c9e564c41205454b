"""Several relays on one PostgreSQL, haproxy in front of them, and Prometheus that scrapes them all.

Rules: what is started here is ended here, by its id. A relay is started again on the port that it had, since
haproxy knows no other.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import urllib.parse
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tests.interop.peers import command, daemon_directory, free_port

from .process import RelayProcess

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from .databases import PostgresDatabase

__all__ = ["Fleet", "haproxy", "prometheus"]

_LISTENS_S = 20.0

HAPROXY = """\
global
    maxconn 2000
defaults
    mode tcp
    timeout connect 2s
    timeout client 60s
    timeout server 60s
    option redispatch
    retries 2
frontend smtp
    bind 127.0.0.1:{port}
    default_backend relays
backend relays
    balance leastconn
    option tcp-check
    default-server inter 200ms fall 1 rise 1 on-marked-down shutdown-sessions
{servers}
"""

PROMETHEUS = """\
global:
  scrape_interval: 1s
scrape_configs:
  - job_name: relays
    static_configs:
      - targets: {targets}
"""


class Fleet:
    """The relays, seen as one by a `Storm`: their rows are those of the database."""

    def __init__(
        self, directory: Path, database: PostgresDatabase, upstream_port: int, count: int, **over: Any
    ) -> None:
        self.database = database
        self.relays: list[RelayProcess] = []
        for number in range(count):
            home = directory / f"relay-{number}"
            home.mkdir()
            self.relays.append(
                RelayProcess(
                    home,
                    upstream_port,
                    server={"hostname": f"relay-{number}.test"},
                    records={"url": database.url, "spool": str(home / "spool")},
                    http={"address": f"127.0.0.1:{free_port()}"},
                    **over,
                    listener={"address": f"127.0.0.1:{free_port()}", "proxy_protocol": True},
                    clients={"trusted_proxies": ["127.0.0.1/32"]},
                )
            )
        self.spool = directory / "no-spool-of-all"

    @property
    def ports(self) -> list[int]:
        """Where the relays listen, whether they run or not."""
        return [int(_value(relay, "listeners").rpartition(":")[2]) for relay in self.relays]

    @property
    def http_ports(self) -> list[int]:
        """Where they serve their metrics."""
        return [int(_value(relay, "http").rpartition(":")[2]) for relay in self.relays]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for relay in self.relays:
            if relay.running:
                await relay.kill()

    def rows(self, query: str) -> list[dict[str, Any]]:
        """Return the committed rows."""
        return self.database.dictionaries(query)

    def spooled(self) -> int:
        """Return how many lines wait in the spools of relays that do not run."""
        return sum(
            segment.read_bytes().count(b"\n")
            for relay in self.relays
            for segment in (relay.directory / "spool").glob("[0-9]*.jsonl")
        )


def _value(relay: RelayProcess, section: str) -> str:
    """Return the address that stands in a section of the configuration."""
    import tomllib

    found = tomllib.loads(relay.config.read_text())[section]
    return str((found[0] if isinstance(found, list) else found)["address"])


@contextlib.asynccontextmanager
async def haproxy(ports: Sequence[int]) -> AsyncIterator[int]:
    """Run haproxy in front of relays, and give the port where it takes clients."""
    port = free_port()
    servers = "\n".join(
        f"    server relay{number} 127.0.0.1:{each} check check-send-proxy send-proxy-v2"
        for number, each in enumerate(ports)
    )
    with daemon_directory() as directory:
        configuration = directory / "haproxy.cfg"
        configuration.write_text(HAPROXY.format(port=port, servers=servers))
        async with _daemon(command("haproxy"), "-f", str(configuration), "-db"):
            await _until_it_listens(port)
            yield port


@contextlib.asynccontextmanager
async def prometheus(ports: Sequence[int], data: Path) -> AsyncIterator[Prometheus]:
    """Run Prometheus, which scrapes these ports every second."""
    port = free_port()
    configuration = data / "prometheus.yml"
    configuration.write_text(PROMETHEUS.format(targets=json.dumps([f"127.0.0.1:{each}" for each in ports])))
    async with _daemon(
        command("prometheus"),
        f"--config.file={configuration}",
        f"--storage.tsdb.path={data / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ):
        await _until_it_listens(port)
        yield Prometheus(port)


class Prometheus:
    """A running Prometheus."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def ask(self, query: str) -> dict[str, float]:
        """Return the values of an instant query, by instance."""
        url = f"http://127.0.0.1:{self._port}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
        text = await asyncio.to_thread(_get, url)
        return {
            each["metric"].get("instance", ""): float(each["value"][1])
            for each in json.loads(text)["data"]["result"]
        }


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        text: str = answer.read().decode()
    return text


@contextlib.asynccontextmanager
async def _daemon(*arguments: str) -> AsyncIterator[None]:
    process = await asyncio.create_subprocess_exec(
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


async def _until_it_listens(port: int) -> None:
    async with asyncio.timeout(_LISTENS_S):
        while True:
            with contextlib.suppress(ConnectionError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                return
            await asyncio.sleep(0.05)
