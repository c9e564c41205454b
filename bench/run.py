"""Measures the relay beside a direct send and beside a naive relay, on this machine, over loopback.

    python -m bench.run [--quick] [--rounds N] [--seconds S] [--cases ...] [--targets ...] [--json FILE]

Rules: sink, target and load are processes of their own. Every round of a case starts each target afresh, one
after the other, so that a slow minute of the machine meets all of them; medians are given with the least and
the most. Before the clock starts, a warm-up opens connections and tells how many messages fill the time.
A run counts only if every message was answered 250, the sink counted exactly as many, and `task_done` has
exactly as many rows: rows are counted after the target has stopped. CPU is that of the target's process
with its threads, from /proc; rates drift with the machine, CPU-ms a message does so less.
Exit status: 0 all runs counted, 1 some did not.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TICKS = os.sysconf("SC_CLK_TCK")
START_S = 30.0
STOP_S = 40.0


@dataclass(frozen=True)
class Case:
    """What the load does. `warm_up`: messages before the clock starts; `least`: after it, at least."""

    title: str
    sessions: int
    size: int
    keep: bool
    warm_up: int
    least: int


CASES = {
    "keep": Case("20 sessions, kept open, 4 KiB", 20, 4096, keep=True, warm_up=200, least=200),
    "short": Case("20 sessions, a connection a message, 4 KiB", 20, 4096, keep=False, warm_up=200, least=200),
    "one": Case("one client, one message at a time, 4 KiB", 1, 4096, keep=True, warm_up=50, least=100),
    "large": Case("4 sessions, kept open, 10 MiB", 4, 10 << 20, keep=True, warm_up=4, least=8),
}
TARGETS = ("direct", "naive", "relay")

CONFIG = """\
[server]
hostname = "relay.bench"

[[listeners]]
address = "127.0.0.1:{port}"

[[upstreams]]
name = "sink"
address = "127.0.0.1:{sink_port}"
tls = "none"

[records]
url = "sqlite:///{directory}/task_done.db"
spool = "{directory}/spool"

[http]
address = "127.0.0.1:{http_port}"

[log]
format = "json"
level = "info"
"""


class RunError(Exception):
    """A run that does not count; the text says why."""


@dataclass(frozen=True)
class Result:
    """One timed run."""

    case: str
    target: str
    round: int
    messages: int
    rate: float
    """Messages a second, all answered."""
    p50_ms: float
    p99_ms: float
    cpu_ms: float | None
    """CPU of the target for each message, its threads included; None where there is no target."""
    peak_mib: float | None
    """The most memory that the target held (VmHWM)."""


def main() -> int:
    """Run what the arguments ask for and print the tables."""
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started here is ended here
    rounds = arguments.rounds or (1 if arguments.quick else 5)
    seconds = arguments.seconds or (1.0 if arguments.quick else 3.0)
    results: list[Result] = []
    failures: list[str] = []
    with tempfile.TemporaryDirectory(prefix="bench-", dir=arguments.directory) as scratch:
        print(
            f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, fsync {_fsync_ms(Path(scratch)):.2f} ms"
        )
        for name in arguments.cases:
            for number in range(rounds):
                for target in arguments.targets:
                    directory = Path(scratch) / f"{name}-{number}-{target}"
                    directory.mkdir()
                    try:
                        result = _measure(
                            name, target, number, seconds, directory, pipelined=arguments.pipelined
                        )
                    except RunError as error:
                        failures.append(f"{name}, {target}, round {number + 1}: {error}")
                        print(f"  {failures[-1]}", file=sys.stderr, flush=True)
                    else:
                        results.append(result)
                        _progress(result)
    print("\n" + "\n\n".join(_table(name, results, arguments.targets) for name in arguments.cases))
    if arguments.json:
        arguments.json.write_text(
            json.dumps([asdict(result) for result in results], indent=1) + "\n", "utf-8"
        )
    if failures:
        print("\nRuns that do not count:\n  " + "\n  ".join(failures))
    return 1 if failures else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one round of a second for each case")
    parser.add_argument("--rounds", type=int, help="default 5")
    parser.add_argument("--seconds", type=float, help="length of one timed run, about; default 3")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument(
        "--pipelined", action="store_true", help="clients send MAIL, RCPT and DATA in one segment"
    )
    parser.add_argument(
        "--directory", type=Path, help="where databases go; a real disk, or commits cost nothing"
    )
    parser.add_argument("--json", type=Path, help="write all runs to this file")
    return parser.parse_args()


def _measure(
    name: str, target: str, number: int, seconds: float, directory: Path, *, pipelined: bool
) -> Result:
    """Run one case once against one target, started for it."""
    case = CASES[name]
    with _sink(directory) as sink_port:
        with _target(target, sink_port, directory) as (port, process):
            warm_up = _load(port, case, case.warm_up, pipelined=pipelined)
            count = max(case.least, int(case.warm_up / warm_up["seconds"] * seconds))
            cpu = _cpu_s(process)
            load = _load(port, case, count, pipelined=pipelined)
            cpu_s = _cpu_s(process) - cpu
            peak = _peak_mib(process) if process else None
            arrived = _sink_count(sink_port)
        sent = case.warm_up + count
        if arrived != sent:
            raise RunError(f"{sent} messages sent, the sink counted {arrived}")
        if process and process.returncode:
            raise RunError(f"the target ended with {process.returncode} when told to stop")
        if process and (rows := _rows(directory / "task_done.db")) != sent:
            raise RunError(f"{sent} messages sent, task_done has {rows} rows")
    return Result(
        case=name,
        target=target,
        round=number,
        messages=count,
        rate=count / load["seconds"],
        p50_ms=load["p50_ms"],
        p99_ms=load["p99_ms"],
        cpu_ms=cpu_s * 1e3 / count if process else None,
        peak_mib=peak,
    )


def _load(port: int, case: Case, messages: int, *, pipelined: bool) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.load", "--port", str(port), "--sessions", str(case.sessions)]
    command += ["--messages", str(messages), "--size", str(case.size)]
    command += ["--keep"] * case.keep + ["--pipelined"] * pipelined
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    except subprocess.TimeoutExpired:
        raise RunError("the load took more than 300 s") from None
    if done.returncode:
        raise RunError(f"the load failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    result: dict[str, Any] = json.loads(done.stdout)
    if result["codes"] != {"250": messages}:
        raise RunError(f"of {messages} messages the server answered {result['codes']} (code: count)")
    return result


# Processes. Each is started here and ended here, by its id.


@contextmanager
def _sink(directory: Path) -> Iterator[int]:
    with _process([sys.executable, "-m", "bench.sink"], directory / "sink.log", says_port=True) as process:
        yield _said_port(process, "the sink")


@contextmanager
def _target(name: str, sink_port: int, directory: Path) -> Iterator[tuple[int, subprocess.Popen[str] | None]]:
    """Start a target and yield the port to send to; the process is None for a direct send."""
    if name == "direct":
        yield sink_port, None
        return
    log = directory / f"{name}.log"
    if name == "naive":
        command = [sys.executable, "-m", "bench.naive_relay", "--upstream-port", str(sink_port)]
        command += ["--database", str(directory / "task_done.db")]
        with _process(command, log, says_port=True) as process:
            yield _said_port(process, "the naive relay"), process
        return
    port, http_port = _free_ports(2)
    config = directory / "relay.toml"
    config.write_text(
        CONFIG.format(port=port, http_port=http_port, sink_port=sink_port, directory=directory), "utf-8"
    )
    with _process([sys.executable, "-m", "relay", "serve", "--config", str(config)], log) as process:
        _await_greeting(port, process, log)
        yield port, process


@contextmanager
def _process(
    command: Sequence[str], log: Path, *, says_port: bool = False
) -> Iterator[subprocess.Popen[str]]:
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if says_port else output,
            stderr=output,
            text=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout:
            process.stdout.close()


def _said_port(process: subprocess.Popen[str], name: str) -> int:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line.strip().isdigit():
        raise RunError(f"{name} did not start")
    return int(line)


def _await_greeting(port: int, process: subprocess.Popen[str], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            last = log.read_text("utf-8", "replace").strip().splitlines() or ["?"]
            raise RunError(f"the relay ended with {process.returncode}: {last[-1]}")
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
                if client.recv(512).startswith(b"220"):
                    return
        except ConnectionRefusedError:
            time.sleep(0.05)
    raise RunError(f"the relay does not greet on port {port}")


def _free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in held]
    for server in held:
        server.close()
    return ports


def _sink_count(port: int) -> int:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client, client.makefile("rwb") as lines:
        lines.readline()
        lines.write(b"XCOUNT\r\n")
        lines.flush()
        return int(lines.readline().split()[1])


# What is measured.


def _cpu_s(process: subprocess.Popen[str] | None) -> float:
    """Return the user and system time so far of a process, of all its threads, and of children that ended."""
    if process is None:
        return 0.0
    if process.poll() is not None:
        raise RunError(f"the target ended with {process.returncode} under load")
    fields = Path(f"/proc/{process.pid}/stat").read_text("ascii").rpartition(")")[2].split()
    return sum(int(field) for field in fields[11:15]) / TICKS


def _peak_mib(process: subprocess.Popen[str]) -> float:
    for line in Path(f"/proc/{process.pid}/status").read_text("ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RunError("no VmHWM in /proc")


def _rows(database: Path) -> int:
    try:
        with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as connection:
            return int(connection.execute("SELECT count(*) FROM task_done").fetchone()[0])
    except sqlite3.Error as error:
        raise RunError(f"the rows cannot be counted: {error}") from error


def _fsync_ms(directory: Path) -> float:
    times = []
    with (directory / "fsync").open("wb", buffering=0) as file:
        for _ in range(50):
            file.write(b"x" * 4096)
            began = time.perf_counter()
            os.fsync(file.fileno())
            times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e3


# What is printed.


def _progress(result: Result) -> None:
    cpu = "" if result.cpu_ms is None else f", {result.cpu_ms:.3f} CPU-ms a message"
    print(
        f"  {result.case:6}{result.target:7} round {result.round + 1}: {result.messages} messages, "
        f"{result.rate:,.0f}/s{cpu}",
        file=sys.stderr,
        flush=True,
    )


def _table(case: str, results: Sequence[Result], targets: Sequence[str]) -> str:
    lines = [
        f"{case}: {CASES[case].title}",
        f"{'target':8}{'messages/s':>28}{'CPU-ms a message':>30}{'p50 ms':>10}{'p99 ms':>10}{'peak MiB':>10}",
    ]
    for target in targets:
        runs = [result for result in results if (result.case, result.target) == (case, target)]
        if not runs:
            lines.append(f"{target:8}{'no run that counts':>28}")
            continue
        cpu = [run.cpu_ms for run in runs if run.cpu_ms is not None]
        peak = [run.peak_mib for run in runs if run.peak_mib is not None]
        lines.append(
            f"{target:8}{_spread([run.rate for run in runs], ',.0f'):>28}{_spread(cpu, '.3f'):>30}"
            f"{statistics.median(run.p50_ms for run in runs):>10.2f}"
            f"{statistics.median(run.p99_ms for run in runs):>10.2f}"
            f"{f'{max(peak):.0f}' if peak else '-':>10}"
        )
    for other in ("direct", "naive"):
        pairs = _pairs(case, results, other)
        if pairs:
            rates = _spread([relay.rate / run.rate for relay, run in pairs], ".2f")
            cpu = [relay.cpu_ms / run.cpu_ms for relay, run in pairs if relay.cpu_ms and run.cpu_ms]
            lines.append(
                f"relay/{other}: messages/s {rates}"
                + (f", CPU a message {_spread(cpu, '.2f')}" if cpu else "")
            )
    return "\n".join(lines)


def _pairs(case: str, results: Sequence[Result], other: str) -> list[tuple[Result, Result]]:
    """The relay's runs, each with the other target's of the same round: the next may differ."""
    runs = {(run.target, run.round): run for run in results if run.case == case}
    return [
        (run, runs[other, number])
        for (target, number), run in runs.items()
        if target == "relay" and (other, number) in runs
    ]


def _spread(values: Sequence[float], form: str) -> str:
    """The median, and the least and the most where there are several."""
    if not values:
        return "-"
    if len(values) == 1:
        return format(values[0], form)
    median, least, most = (format(v, form) for v in (statistics.median(values), min(values), max(values)))
    return f"{median} ({least} - {most})"


if __name__ == "__main__":
    sys.exit(main())
