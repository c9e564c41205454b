"""The relay as a process of its own: `python -m relay serve --config FILE`, its log, its memory, its ends.

Rules: every port is 0 in the configuration and read from the log, so that nothing can be taken between a
look and a start, and no client can meet a stranger on the port of a relay that is down. Signals go to the
one process id that was started here. What was started is ended, at the latest when `async with` ends. The
log goes to a file, so that a test that is busy never holds the relay up.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Self

__all__ = ["ROOT", "RelayProcess", "toml"]

ROOT = Path(__file__).resolve().parents[2]
"""The directory in which `python -m relay` finds the package."""

_START_S = 60.0
_STOP_S = 60.0
_POLL_S = 0.005


class RelayProcess:
    """One relay on its own files in `directory`, started and ended as often as a test likes.

    `async with` starts nothing, and kills what still runs at its end.
    `over` holds sections of the configuration that are laid over the defaults of `configuration`; `module`
    is what `python -m` runs. Between `start` and the end of the process `pid`, `port` and `http_port` hold.
    """

    def __init__(
        self, directory: Path, upstream_port: int, *, module: str = "relay", **over: dict[str, Any]
    ) -> None:
        self.directory = directory
        self.module = module
        self.database = directory / "data" / "rows.db"
        self.spool = directory / "data" / "spool"
        self.config = directory / "relay.toml"
        self.log_file = directory / "relay.log"
        self.error_file = directory / "relay.err"
        self.config.write_text(toml(self._configuration(upstream_port, over)))
        self.environment: dict[str, str] = {}
        """Laid over the environment of the next process."""
        self.starts = 0
        self.port = 0
        """Of the listener; 0 while nothing listens there."""
        self.http_port = 0
        self.launcher: tuple[str, ...] = ()
        """What runs the command, in front of it."""
        self.options: tuple[str, ...] = ()
        """Of `relay serve`, beside `--config`."""
        self.descriptors_passed: tuple[int, ...] = ()
        self._upstream_port = upstream_port
        self._process: asyncio.subprocess.Process | None = None
        self._log_begin = 0  # where in the log file the present process began

    def text(self, **over: dict[str, Any]) -> str:
        """Return a configuration, whole, as `__init__` makes it, for `write`."""
        return toml(self._configuration(self._upstream_port, over))

    def write(self, text: str) -> None:
        """Put a configuration in place in one step."""
        fresh = self.config.with_suffix(".new")
        fresh.write_text(text)
        fresh.replace(self.config)

    def signal(self, number: int) -> None:
        """Send a signal, and wait for nothing."""
        assert self._process is not None
        self._process.send_signal(number)

    async def reload(self) -> list[dict[str, Any]]:
        """SIGHUP; return the lines that it brings, up to the first that says what came of it."""
        before = len(self.log())
        self.signal(signal.SIGHUP)
        end = time.monotonic() + _START_S
        while time.monotonic() < end:
            lines = self.log()[before:]
            for count, line in enumerate(lines, 1):
                if line["event"] in ("reloaded", "reload refused", "reload ignored"):
                    return lines[:count]
            await asyncio.sleep(_POLL_S)
        raise AssertionError(f"no reload in the log: {self.log()[before:]} {self.errors()}")

    def _configuration(self, upstream_port: int, over: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        upstream = {"name": "primary", "address": f"127.0.0.1:{upstream_port}", "tls": "none"}
        sections: dict[str, Any] = {
            "server": {"hostname": "relay.test"},
            "records": {"url": f"sqlite:///{self.database}", "spool": str(self.spool)},
            "http": {"address": "127.0.0.1:0"},
        }
        for name in sections.keys() | (over.keys() - {"upstream", "listener"}):
            sections[name] = sections.get(name, {}) | over.get(name, {})
        sections["upstreams"] = [upstream | over.get("upstream", {})]
        sections["listeners"] = [{"address": "127.0.0.1:0"} | over.get("listener", {})]
        return sections

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.running:
            await self.kill()

    # Start and end

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.returncode is None

    @property
    def pid(self) -> int:
        """The process id; only while it is known."""
        assert self._process is not None
        return self._process.pid

    async def spawn(self) -> None:
        """Start the process and wait for nothing."""
        assert not self.running
        self.port = self.http_port = 0
        self.starts += 1
        serve = ("serve", "--config", str(self.config), *self.options)
        command = (*self.launcher, sys.executable, "-m", self.module, *serve)
        with self.log_file.open("ab") as log, self.error_file.open("ab") as errors:
            self._log_begin = log.tell()
            self._process = await asyncio.create_subprocess_exec(
                *command,
                cwd=ROOT,
                stdout=log,
                stderr=errors,
                env=os.environ | self.environment,
                pass_fds=self.descriptors_passed,
            )

    async def start(self) -> None:
        """Start the process and wait until it listens; AssertionError with what it said if it does not."""
        await self.spawn()
        line = await self.event("started", timeout_s=_START_S)
        self.port = int(line["listeners"][0].rpartition(":")[2])
        self.http_port = int(line["http"].rpartition(":")[2])

    async def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        await self._end(signal.SIGKILL, _STOP_S)

    async def terminate(self, timeout_s: float = _STOP_S) -> int:
        """SIGTERM; return the exit status."""
        return await self._end(signal.SIGTERM, timeout_s)

    async def ended(self, timeout_s: float = _STOP_S) -> int:
        """Return the exit status once the process has ended by itself (negative: the signal)."""
        assert self._process is not None
        async with asyncio.timeout(timeout_s):
            return await self._process.wait()

    async def _end(self, number: int, timeout_s: float) -> int:
        assert self._process is not None
        # A client that tried a port on which nobody listens could, by TCP's simultaneous open, meet itself.
        self.port = self.http_port = 0
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)
        return await self.ended(timeout_s)

    # What it says

    def log(self) -> list[dict[str, Any]]:
        """The whole lines that the present process has logged, parsed."""
        with self.log_file.open("rb") as file:
            file.seek(self._log_begin)
            octets = file.read()
        return [json.loads(line) for line in octets[: octets.rfind(b"\n") + 1].splitlines()]

    def errors(self) -> str:
        """What all processes wrote to standard error."""
        return self.error_file.read_text()

    async def event(self, name: str, *, timeout_s: float = _START_S) -> dict[str, Any]:
        """Return the first line of the present process's log with this event, once it is there."""
        end = time.monotonic() + timeout_s
        while True:
            for line in self.log():
                if line["event"] == name:
                    return line
            if not self.running or time.monotonic() > end:
                raise AssertionError(f"no {name!r} in the log: {self.log()} {self.errors()}")
            await asyncio.sleep(_POLL_S)

    async def get(self, path: str) -> tuple[int, str]:
        """Return status and body of a GET from the HTTP side."""
        return await asyncio.to_thread(_get, f"http://127.0.0.1:{self.http_port}{path}")

    async def metric(self, name: str, **labels: str) -> float:
        """Return a sample of /metrics."""
        _, text = await self.get("/metrics")
        shown = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
        start = f"smtp_relay_{name}{{{shown}}} " if labels else f"smtp_relay_{name} "
        (value,) = (line.removeprefix(start) for line in text.splitlines() if line.startswith(start))
        return float(value)

    async def until(self, name: str, value: float, *, timeout_s: float = 20.0, **labels: str) -> None:
        """Return once a sample of /metrics has this value."""
        end = time.monotonic() + timeout_s
        while (found := await self.metric(name, **labels)) != value:
            assert time.monotonic() < end, f"{name} {labels} is {found}, not {value}"
            await asyncio.sleep(0.02)

    # What it holds

    def memory(self, field: str = "VmRSS") -> int:
        """Return VmRSS (resident now) or VmHWM (the most since `forget_peak`), in octets."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
        raise AssertionError(f"no {field} in /proc/{self.pid}/status")

    def forget_peak(self) -> None:
        """Let VmHWM begin anew at what is resident now (proc(5), clear_refs)."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def descriptors(self) -> int:
        """Return how many file descriptors are open."""
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def rows(self, query: str = "SELECT * FROM task_done ORDER BY id") -> list[dict[str, Any]]:
        """Return the committed rows."""
        with contextlib.closing(sqlite3.connect(f"file:{self.database}?mode=ro", uri=True)) as connection:
            connection.row_factory = sqlite3.Row
            return [dict(row) for row in connection.execute(query)]


def toml(sections: Mapping[str, Any]) -> str:
    """Return a configuration as TOML: sections of scalars and lists, and lists of sections."""
    lines = []
    for name, section in sections.items():
        for table in section if isinstance(section, list) else [section]:
            lines.append(f"[[{name}]]" if isinstance(section, list) else f"[{name}]")
            lines += [f"{key} = {_value(value)}" for key, value in table.items()]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    # JSON's strings, numbers, booleans and lists of them are TOML's, too.
    return json.dumps(value, ensure_ascii=False)


def _get(url: str) -> tuple[int, str]:
    try:
        answer: IO[bytes] = urllib.request.urlopen(url, timeout=10)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        return answer.status, answer.read().decode()  # type: ignore[attr-defined]
