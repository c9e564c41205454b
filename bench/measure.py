"""One run of one case against one target: started for it, counted at both ends, stopped.

Rules: before the clock starts, a warm-up opens connections and tells how many messages fill the time. A run
counts only if every message was answered 250, the sink counted exactly as many, and a target that keeps rows
has exactly as many more in its table, counted after it has stopped. The time ends with the last message at
the sink, also for those that queue; the CPU when the target has come to rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench import table
from bench.cases import Case
from bench.ends import OwnSink, Sink, await_count, send, sink
from bench.errors import RunError
from bench.processes import Running
from bench.targets import RELAYS, Target, rows, started

KIB = 1024
OPENING = 50
"""Sessions that are being opened at the same time: a burst of SYNs is not what is measured."""


@dataclass(frozen=True)
class Result:
    """One run."""

    case: str
    target: str
    round: int
    values: dict[str, float] = field(default_factory=dict)
    """What was measured, by the names of `report.COLUMNS`; `stolen`: see `_share_stolen`."""


def measure(
    case: Case, target: Target, number: int, seconds: float, directory: Path, *, postfix: bool
) -> Result:
    """Run it; raises RunError where it does not count."""
    run = {"load": _load, "idle": _idle, "work": _work, "start": _start}[case.kind]
    with _table(case, directory) as rows_before:
        with sink(case, directory, postfix=postfix) as taking:
            with started(target, case, taking, directory) as (port, process):
                before = _processors()
                sent, values = run(case, target, port, process, taking, seconds, postfix=postfix)
                values["stolen"] = _share_stolen(before, _processors())
            if (arrived := taking.count()) != sent:
                raise RunError(f"{sent} messages sent, {arrived} arrived")
        if process and target.counts_rows:
            if process.process.returncode:
                raise RunError(f"the target ended with {process.process.returncode} when told to stop")
            if (kept := rows(directory) - rows_before) != sent:
                raise RunError(f"{sent} messages sent, task_done has {kept} rows of them")
    return Result(case.name, target.name, number, values)


def _processors() -> list[int]:
    """The time of all processors since the machine's start, in jiffies, by what they did (proc(5))."""
    return [int(spent) for spent in Path("/proc/stat").read_text("ascii").split("\n", 1)[0].split()[1:9]]


def _share_stolen(before: list[int], after: list[int]) -> float:
    """How much of the time the host of a virtual machine gave to others, in per cent."""
    spent = [end - begin for begin, end in zip(before, after, strict=True)]
    return 100 * spent[7] / max(1, sum(spent))


@contextlib.contextmanager
def _table(case: Case, directory: Path) -> Iterator[int]:
    """Put the table of the case in place; it is made once and used again by the next round, a bit fuller."""
    if not case.rows:
        yield 0
        return
    kept, used = directory.parent / f"{case.name}.db", directory / "task_done.db"
    if kept.exists():
        kept.rename(used)
    else:
        table.fill(used, case.rows)
    try:
        yield rows(directory)
    finally:
        used.rename(kept)


Outcome = tuple[int, dict[str, float]]


def _load(
    case: Case,
    target: Target,
    port: int,
    process: Running | None,
    taking: Sink,
    seconds: float,
    *,
    postfix: bool,
) -> Outcome:
    ca = taking.ca if isinstance(taking, OwnSink) and target.name == "direct" else None
    warm_up = case.warm_up
    first = send(port, case, warm_up, postfix=postfix, ca=ca)
    took = max(await_count(taking, warm_up), first.ended) - first.began
    count = min(case.most, max(case.least, int(warm_up / took * seconds)))
    if process:
        process.settle()
    before = process.cpu_s() if process else 0.0
    sent = send(port, case, count, postfix=postfix, ca=ca)
    took = max(await_count(taking, warm_up + count), sent.ended) - sent.began
    values = {"messages": float(count), "rate": count / took, "ms": took * 1e3 / count}
    if sent.p50_ms is not None and sent.p99_ms is not None:
        values |= {"p50_ms": sent.p50_ms, "p99_ms": sent.p99_ms}
    if process:
        process.settle()
        values["cpu_ms"] = (process.cpu_s() - before) * 1e3 / count
        values["peak_mib"] = process.peak() / KIB / KIB
    return warm_up + count, values


def _start(
    case: Case,
    target: Target,
    port: int,
    process: Running | None,
    taking: Sink,
    seconds: float,  # noqa: ARG001
    *,
    postfix: bool,
) -> Outcome:
    """How long it took is known already; one message shows that it works."""
    if process is None:
        raise RunError("there is nobody who starts")
    values = {"start_ms": process.start_s * 1e3, "peak_mib": process.peak() / KIB / KIB}
    send(port, case, 1, postfix=postfix)
    await_count(taking, 1)
    if target.name in RELAYS:
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-P", "-m", "relay", "--help"],
            env=os.environ | RELAYS[target.name](),
            capture_output=True,
            check=False,
        )
        if done.returncode:
            raise RunError(f"relay --help ended with {done.returncode}")
        values["help_ms"] = (time.perf_counter() - began) * 1e3
    return 1, values


# Memory: sessions that only stand there, and sessions in the middle of a body


def _idle(
    case: Case,
    target: Target,  # noqa: ARG001 - as all runs
    port: int,
    process: Running | None,
    taking: Sink,
    seconds: float,  # noqa: ARG001
    *,
    postfix: bool,
) -> Outcome:
    if process is None:
        raise RunError("there is nobody whose memory could be measured")
    warm = Case("warm-up", "", sessions=20, keep=False, own_client=case.own_client)
    send(port, warm, 100, postfix=postfix)
    await_count(taking, 100)
    process.settle()

    async def look() -> dict[str, float]:
        before, cpu = process.memory(), process.cpu_s()
        async with _sessions(port, case.sessions) as _:
            await asyncio.to_thread(process.settle)
            held = (process.memory() - before) / KIB / case.sessions
            opening = (process.cpu_s() - cpu) * 1e3 / case.sessions
            # Whether it still serves others: that message is counted with all the rest.
            await asyncio.to_thread(send, port, warm, 1, postfix=postfix)
        return {"kib": held, "opening_ms": opening}

    values = asyncio.run(look())
    await_count(taking, 101)
    return 101, values


def _work(
    case: Case,
    target: Target,  # noqa: ARG001
    port: int,
    process: Running | None,
    taking: Sink,
    seconds: float,  # noqa: ARG001
    *,
    postfix: bool,
) -> Outcome:
    """All sessions have sent half of their body when the memory is read; then each sends the rest."""
    if process is None:
        raise RunError("there is nobody whose memory could be measured")
    warm = Case("warm-up", "", sessions=20, keep=False, own_client=True)
    send(port, warm, 100, postfix=postfix)
    await_count(taking, 100)
    process.settle()
    line = b"x" * 70 + b"\r\n"
    half = line * (case.size // 2 // len(line))

    async def look() -> dict[str, float]:
        before, cpu = process.memory(), process.cpu_s()
        async with _sessions(port, case.sessions) as sessions:
            began = time.perf_counter()
            await _each(sessions, lambda s: s.say(b"MAIL FROM:<sender@bench.test>\r\n", b"250"))
            await _each(sessions, lambda s: s.say(b"RCPT TO:<recipient@example.test>\r\n", b"250"))
            await _each(sessions, lambda s: s.say(b"DATA\r\n", b"354"))
            await _each(sessions, lambda s: s.push(b"Subject: load\r\n\r\n" + half))
            await asyncio.to_thread(process.settle)
            held = (process.memory() - before) / KIB / case.sessions
            await _each(sessions, lambda s: s.say(half + b".\r\n", b"250"))
            took = time.perf_counter() - began
        await asyncio.to_thread(process.settle)
        used = (process.cpu_s() - cpu) * 1e3 / case.sessions
        peak = process.peak() / KIB / KIB
        return {"kib": held, "cpu_ms": used, "rate": case.sessions / took, "peak_mib": peak}

    values = asyncio.run(look())
    await_count(taking, 100 + case.sessions)
    return 100 + case.sessions, values


class _Session:
    """One session of ours, a command at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def say(self, octets: bytes, wanted: bytes) -> None:
        """Send, and take one reply; RunError unless it has this code."""
        await self.push(octets)
        await self.hear(wanted)

    async def push(self, octets: bytes) -> None:
        self._writer.write(octets)
        await self._writer.drain()

    async def hear(self, wanted: bytes) -> None:
        while True:
            line = await asyncio.wait_for(self._reader.readline(), 120)
            if line[:3] != wanted:
                raise RunError(f"{wanted.decode()} was expected, the target said {line!r}")
            if line[3:4] == b" ":
                return

    def abort(self) -> None:
        self._writer.transport.abort()


async def _each(sessions: list[_Session], do: Callable[[_Session], Awaitable[None]]) -> None:
    limit = asyncio.Semaphore(OPENING)

    async def one(session: _Session) -> None:
        async with limit:
            await do(session)

    await asyncio.gather(*(one(session) for session in sessions))


@contextlib.asynccontextmanager
async def _sessions(port: int, count: int) -> AsyncIterator[list[_Session]]:
    """Open sessions, up to EHLO."""
    limit = asyncio.Semaphore(OPENING)
    sessions: list[_Session] = []

    async def one() -> None:
        async with limit:
            session = _Session(*await asyncio.wait_for(asyncio.open_connection("127.0.0.1", port), 60))
            sessions.append(session)
            await session.hear(b"220")
            await session.say(b"EHLO idle.bench\r\n", b"250")

    try:
        await asyncio.gather(*(one() for _ in range(count)))
        yield sessions
    except (OSError, TimeoutError) as error:
        raise RunError(
            f"{len(sessions)} of {count} sessions opened: {type(error).__name__} {error}"
        ) from error
    finally:
        for session in sessions:
            session.abort()
        await asyncio.sleep(0.1)
