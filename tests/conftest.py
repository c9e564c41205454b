"""What tests share: settings, a relay in this process, upstreams, certificates."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

from relay import maillog
from relay.app import Relay
from relay.settings import Settings
from tests.support import postgres
from tests.support.client import left_open
from tests.support.databases import Cluster, PostgresDatabase, SqliteDatabase
from tests.support.upstream import ScriptedUpstream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from relay.upstream.pool import Pool

# How long an example takes is the machine's affair. CI looks at the same examples each time; whoever runs the
# tests elsewhere looks at others.
hypothesis.settings.register_profile("dev", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep the tests of a file in one process where several run them."""
    from tests.support.distribution import ByFile

    return ByFile(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with what takes longest, where several processes run the tests."""
    if config.pluginmanager.hasplugin("xdist"):
        from tests.support.distribution import LONGEST

        items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(autouse=True)
def nothing_from_before() -> Iterator[None]:
    """Lines of the log go to this test's output, and its clients are gone when it ends."""
    maillog.configure("json", "info")
    yield
    assert left_open() == [], "a client was not closed"


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with `over` laid over it, section by section."""
    result = dict(base)
    for key, value in over.items():
        result[key] = (
            merged(result[key], value)
            if isinstance(result.get(key), dict) and isinstance(value, dict)
            else value
        )
    return result


class Running:
    """A relay that runs in this process, its port and its rows."""

    def __init__(self, relay: Relay, database: Path) -> None:
        self.relay = relay
        self.database = database
        address = relay.reception.addresses[0]
        self.port = 0 if address.startswith("unix:") else int(address.rpartition(":")[2])
        self.http_port = relay.web.port

    @property
    def pool(self) -> Pool:
        """The pool of the first upstream."""
        return next(iter(self.relay.upstreams.pools.values()))

    def rows(self, query: str = "SELECT * FROM task_done ORDER BY id") -> list[dict[str, Any]]:
        """Return rows as another process would see them: committed ones."""
        with contextlib.closing(sqlite3.connect(f"file:{self.database}?mode=ro", uri=True)) as connection:
            connection.row_factory = sqlite3.Row
            return [dict(row) for row in connection.execute(query)]

    def metric(self, name: str, **labels: str) -> float:
        """Return a sample of the registry."""
        value = self.relay.metrics.registry.get_sample_value(f"smtp_relay_{name}", labels)
        assert value is not None, f"no sample {name} {labels}"
        return value


Start = "Callable[..., contextlib.AbstractAsyncContextManager[Running]]"


@pytest.fixture
def settings_for(tmp_path: Path) -> Callable[..., Settings]:
    """Return a maker of settings: everything in tmp_path, every port free, one upstream without TLS."""

    def make(upstream_port: int, **over: Any) -> Settings:
        upstream = {"name": "primary", "address": f"127.0.0.1:{upstream_port}", "tls": "none"}
        upstream |= over.pop("upstream", {})
        base: dict[str, Any] = {
            "server": {"hostname": "relay.test", "drain_timeout": "2s"},
            "listeners": [{"address": "127.0.0.1:0"}],
            "http": {"address": "127.0.0.1:0"},
            "upstreams": [upstream],
            "records": {"url": f"sqlite:///{tmp_path / 'rows.db'}", "spool": str(tmp_path / "spool")},
        }
        return Settings.model_validate(merged(base, over))

    return make


@pytest.fixture
def start(settings_for: Callable[..., Settings], tmp_path: Path) -> Any:
    """Return a runner of relays: `async with start(upstream_port, section={...}) as running`."""

    @contextlib.asynccontextmanager
    async def run(upstream_port: int, **over: Any) -> AsyncIterator[Running]:
        relay = Relay(settings_for(upstream_port, **over))
        await relay.start()
        try:
            yield Running(relay, tmp_path / "rows.db")
        finally:
            await relay.stop()

    return run


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    """A well-behaved upstream that keeps all it saw; tests script its misbehaviour."""
    async with ScriptedUpstream() as server:
        yield server


# The store's databases

DATABASES = ["sqlite", "postgres", pytest.param("debian", marks=pytest.mark.interop)]


def _cluster(version: str) -> Iterator[Cluster]:
    programs = postgres.directory_of(version)
    if programs is None:
        pytest.skip("PostgreSQL of this version is not installed")
    with postgres.Server(programs) as server:
        cluster = Cluster(server)
        try:
            yield cluster
        finally:
            cluster.close()


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A PostgreSQL server of the newest version, from a package of Python's."""
    yield from _cluster(postgres.NEWEST)


@pytest.fixture(scope="session")
def debian_cluster() -> Iterator[Cluster]:
    """Debian's PostgreSQL, an older major version."""
    yield from _cluster(postgres.DEBIAN)


@pytest.fixture(params=DATABASES)
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SqliteDatabase | PostgresDatabase]:
    """A database for a store; a SQLite file is made by whoever opens it."""
    if request.param == "sqlite":
        yield SqliteDatabase(tmp_path / "t.db")
        return
    name = "cluster" if request.param == "postgres" else "debian_cluster"
    made = request.getfixturevalue(name).database()
    yield made
    made.drop()


@pytest.fixture
def postgres_database(cluster: Cluster) -> Iterator[PostgresDatabase]:
    """A PostgreSQL database with the tables of this version."""
    made = cluster.database()
    yield made
    made.drop()
