"""Everything that can fail fails, while applications send: relay, upstreams, connections, disk, database.

Rules: one relay process, two upstreams, and a faulty proxy before each of the three. Life goes by in
episodes: the relay is started, one trouble befalls it, and it ends, by SIGKILL at a moment of the dice's
choice, by SIGKILL at a named point of a message's way, or by SIGTERM. After each the account is taken; after
the last one the troubles stop, every application gets its 250, and the checker compares the books. The dice
have a seed; what is left to chance besides is the machine's scheduling.

What a relay cannot be asked to survive is not done to it. The database is moved away under a running relay
and put back before the next start: one that starts without its file makes a new one, and what that holds is
lost to the old one when it comes back. Nor does it start on a full disk or on a locked file, which it would
refuse in one line, or find them read-only: those refusals have tests of their own. SIGKILL is not a failure
of the power: what the kernel has been given survives it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sqlite3
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .faulty import Fault, FaultyProxy, random_fault
from .killpoints import POINTS, VARIABLE
from .ledger import kinds
from .process import RelayProcess, toml
from .script import Action, Delay, Reset
from .storm import Figures, Storm
from .upstream import CHUNKING, ScriptedUpstream

__all__ = ["Chaos", "Report", "small_disk"]

PATIENCE_S = 4.0
"""How long an application waits for a reply; longer than the relay waits for its upstreams."""
LONGEST_STALL_S = 2.0
SHARE_OF_CLIENTS = 0.05
SHARE_OF_UPSTREAMS = 0.1
"""Of the connections that a fault strikes."""
NEVER_PASSED = {"in the migration", "in the expiry"}
"""Points for which these relays have no occasion."""
SPOOL_POINTS = {name for name in POINTS if "spool" in name}


@dataclass
class Report:
    """What a run came to."""

    figures: Figures
    findings: list[str]
    ends: Counter[str] = field(default_factory=Counter)
    troubles: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        def shown(counts: Counter[str]) -> str:
            return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))

        lines = [
            str(self.figures),
            f"ends of the relay: {shown(self.ends)}",
            f"troubles: {shown(self.troubles)}",
            f"faults of connections ({self.faults.total()}): {shown(self.faults)}",
            f"findings ({len(self.findings)}): {shown(kinds(self.findings)) or 'none'}",
            *self.findings[:20],
        ]
        return "\n".join(lines)


class Chaos:
    """A relay in `directory` and all that befalls it; `run` does it.

    `disk`: whether `directory / "data"`, where the relay keeps everything, is a small file system of its own,
    which may be filled.
    """

    def __init__(self, directory: Path, *, seed: int, disk: bool = False, clients: int = 20) -> None:
        self._directory = directory
        self._dice = random.Random(seed)
        self._disk = disk
        self._clients = clients
        self._ends: Counter[str] = Counter()
        self._troubles: Counter[str] = Counter()
        self._faulty = True
        self._relay: RelayProcess
        self._upstreams: tuple[ScriptedUpstream, ...]
        self._proxies: tuple[FaultyProxy, ...]

    async def run(self, episodes: int) -> Report:
        """Live through so many episodes; AssertionError where the relay does not start or end as it must."""
        async with contextlib.AsyncExitStack() as stack:
            self._upstreams = (
                await stack.enter_async_context(self._upstream()),
                await stack.enter_async_context(self._upstream()),
            )
            first, second = [
                await stack.enter_async_context(self._proxy(upstream, SHARE_OF_UPSTREAMS))
                for upstream in self._upstreams
            ]
            self._relay = await stack.enter_async_context(
                RelayProcess(self._directory, first.port, module="tests.support.killpoints")
            )
            relay = self._relay
            front = await stack.enter_async_context(
                FaultyProxy(lambda: relay.port, lambda _: self._fault(SHARE_OF_CLIENTS))
            )
            self._proxies = (front, first, second)
            relay.write(self._configuration())
            storm = Storm(
                relay,
                *self._upstreams,
                clients=self._clients,
                seed=self._dice.randrange(1 << 32),
                port=lambda: front.port if relay.port else 0,
                patience_s=PATIENCE_S,
            )
            async with storm:
                for _ in range(episodes):
                    await self._episode(storm)
                await self._calm()
            await relay.until("records_spooled", 0, timeout_s=60)
            await relay.until("records_pending", 0, timeout_s=60)
            assert await relay.terminate() == 0
            findings, figures = await storm.settle()
            assert relay.errors() == ""
            assert figures.told_yes == figures.messages
            faults = sum((proxy.faults for proxy in self._proxies), Counter[str]())
            return Report(figures, findings, self._ends, self._troubles, faults)

    # The surroundings

    def _upstream(self) -> ScriptedUpstream:
        upstream = ScriptedUpstream(
            {"RCPT": lambda *_: self._moody(0.02), "end_of_data": lambda *_: self._moody(0.06)}
        )
        upstream.extensions += CHUNKING
        return upstream

    def _moody(self, share: float) -> Action | None:
        """Refuse a share of all for now, reset the connection as often, take time with some of the rest."""
        if not self._faulty:
            return None
        return self._dice.choices(
            [b"451 4.3.0 not now\r\n", Reset(), Delay(self._dice.uniform(0.0, 0.03)), None],
            [share, share, 0.3, 0.7 - 2 * share],
        )[0]

    def _proxy(self, upstream: ScriptedUpstream, share: float) -> FaultyProxy:
        return FaultyProxy(lambda: upstream.port, lambda _: self._fault(share))

    def _fault(self, share: float) -> Fault | None:
        return random_fault(self._dice, share if self._faulty else 0.0, longest_s=LONGEST_STALL_S)

    def _configuration(self, **more: Any) -> str:
        relay = self._relay
        waits = {"connect_timeout": "1s", "reply_timeout": "1s", "end_of_data_timeout": "1s"}
        limits = {"lease_wait_timeout": "2s", "max_messages": 20, "max_connections": 15}
        _, *proxies = self._proxies
        return toml(
            {
                "server": {
                    "hostname": "relay.test",
                    "drain_timeout": "3s",
                    "idle_timeout": "5s",
                    "lease_idle_timeout": "2s",
                    "max_connections_per_client": 500,
                },
                "listeners": [{"address": "127.0.0.1:0"}],
                "upstreams": [
                    {"name": name, "address": f"127.0.0.1:{proxy.port}", "tls": "none"}
                    | waits
                    | limits
                    | more
                    for name, proxy in zip(("one", "two"), proxies, strict=True)
                ],
                "records": {
                    "url": f"sqlite:///{relay.database}",
                    "spool": str(relay.spool),
                    "commit_timeout": "100ms",
                },
                "http": {"address": "127.0.0.1:0"},
            }
        )

    # An episode

    async def _episode(self, storm: Storm) -> None:
        end = self._dice.choices(
            ["SIGKILL", "SIGKILL at a point", "SIGKILL at the start", "SIGTERM"], [0.4, 0.35, 0.1, 0.15]
        )[0]
        self._relay.environment = {}
        trouble = self._dice.choice(self._possible())
        if end == "SIGKILL at the start":
            self._ends[end] += 1
            await storm.kill(self._dice.uniform(0.0, 1.0), starting=True)
            return
        if end == "SIGKILL at a point":
            point = self._dice.choice(sorted(POINTS.keys() - NEVER_PASSED))
            if point in SPOOL_POINTS:
                trouble = self._locked
            self._relay.environment = {VARIABLE: f"{point}:{self._dice.randrange(1, 12)}"}
            await self._lives(trouble)
            # Most points are passed at once; where it has not come to one it is a kill like others.
            with contextlib.suppress(TimeoutError):
                await self._relay.ended(0.5)
            end = f"{end}: {point}" if not self._relay.running else "SIGKILL"
            await self._relay.kill()
        else:
            await self._lives(trouble)
            if end == "SIGTERM":
                assert await self._relay.terminate() == 0
            else:
                await self._relay.kill()
        self._ends[end] += 1
        if end == "SIGTERM":
            await storm.take_account()
        else:
            await storm.killed()

    async def _lives(self, trouble: Any) -> None:
        """Start the relay, and have it in trouble for a moment; it may end in the middle of that."""
        try:
            await self._relay.start()
        except AssertionError:
            # A point may be passed before it says that it has started: by what an earlier one has left.
            if self._relay.running or await self._relay.ended() != -signal.SIGKILL:
                raise
            return
        await asyncio.sleep(self._dice.uniform(0.0, 0.2))
        self._troubles[trouble.__name__.strip("_").replace("_", " ")] += 1
        async with trouble():
            await asyncio.sleep(self._dice.uniform(0.1, 0.6))
        await asyncio.sleep(self._dice.uniform(0.0, 0.3))

    async def _calm(self) -> None:
        """No more faults: everything that waits gets through."""
        self._faulty = False
        self._relay.environment = {}
        await self._relay.start()

    # Troubles

    def _possible(self) -> list[Any]:
        troubles = [
            self._none,
            self._upstream_down,
            self._both_upstreams_down,
            self._locked,
            self._swapped_away,
            self._reloads,
        ]
        return [*troubles, self._full] if self._disk else troubles

    @contextlib.asynccontextmanager
    async def _none(self) -> AsyncIterator[None]:
        yield

    @contextlib.asynccontextmanager
    async def _upstream_down(self) -> AsyncIterator[None]:
        """It dies with all its connections, and comes back."""
        upstream = self._dice.choice(self._upstreams)
        _die(upstream)
        try:
            yield
        finally:
            await upstream.listen()

    @contextlib.asynccontextmanager
    async def _both_upstreams_down(self) -> AsyncIterator[None]:
        for upstream in self._upstreams:
            _die(upstream)
        try:
            yield
        finally:
            for upstream in self._upstreams:
                await upstream.listen()

    @contextlib.asynccontextmanager
    async def _locked(self) -> AsyncIterator[None]:
        """Somebody else has the database locked, longer than the relay waits."""
        with contextlib.closing(sqlite3.connect(self._relay.database, timeout=5)) as connection:
            with contextlib.suppress(sqlite3.OperationalError):
                connection.execute("BEGIN IMMEDIATE")
            yield
            connection.rollback()

    @contextlib.asynccontextmanager
    async def _swapped_away(self) -> AsyncIterator[None]:
        """The database is moved away, an empty file stands in its place, then it is put back."""
        database = self._relay.database
        files = [database.with_name(database.name + tail) for tail in ("", "-wal", "-shm")]
        moved = [(file, file.with_name(f"away-{file.name}")) for file in files if file.exists()]
        for file, away in moved:
            file.rename(away)
        database.touch()
        try:
            yield
        finally:
            for file in files:
                file.unlink(missing_ok=True)
            for file, away in reversed(moved):
                away.rename(file)

    @contextlib.asynccontextmanager
    async def _full(self) -> AsyncIterator[None]:
        """Somebody takes every octet of the disk, those too that the relay gives back."""
        hog = self._relay.database.parent / "hog"
        eating = asyncio.create_task(_eat(hog))
        try:
            yield
        finally:
            eating.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await eating
            hog.unlink(missing_ok=True)

    @contextlib.asynccontextmanager
    async def _reloads(self) -> AsyncIterator[None]:
        """SIGHUP, with a file that has changed, and with one that is no configuration."""
        relay = self._relay
        usual = relay.config.read_text()
        try:
            for text in (self._configuration(idle_timeout="30s"), "nonsense", usual):
                relay.write(text)
                with contextlib.suppress(ProcessLookupError):
                    relay.signal(signal.SIGHUP)
                await asyncio.sleep(self._dice.uniform(0.0, 0.2))
            yield
        finally:
            relay.write(usual)


def _die(upstream: ScriptedUpstream) -> None:
    upstream.unlisten()
    for connection in upstream.open_connections:
        connection.reset()


async def _eat(hog: Path) -> None:
    """Fill the disk, and keep it full."""
    file = os.open(hog, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC)
    try:
        size, step = 0, 4 << 20
        while True:
            try:
                os.posix_fallocate(file, size, step)
                size += step
            except OSError:  # not so much; at last nothing
                step = max(step // 2, 4096)
                await asyncio.sleep(0.002 if step == 4096 else 0)
    finally:
        os.close(file)


@contextlib.contextmanager
def small_disk(path: Path, mebibytes: int) -> Iterator[bool]:
    """Mount a small file system at `path`, where that is allowed; gives whether it was."""
    path.mkdir(parents=True, exist_ok=True)
    command = ("mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(path))
    mounted = os.geteuid() == 0 and subprocess.run(command, check=False, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(("umount", "--lazy", str(path)), check=True)
