"""The two ends of a run: who takes the messages and counts them, and who sends them.

Rules: what has arrived is what the sink says, never what the client believes. Postfix's `smtp-source` and
`smtp-sink` are the ends where they are installed and can do what the case asks for: everybody knows them, and
they are not ours. Else it is `bench.load` and `bench.sink`, and the report says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import trustme

from bench.cases import Case
from bench.errors import RunError
from bench.processes import ROOT, running

_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
LOAD_S = 120.0


def tool(name: str) -> str | None:
    """Where a program is, those for administrators included."""
    return shutil.which(name, path=_PATH)


class Sink(Protocol):
    """Who takes the messages."""

    @property
    def port(self) -> int: ...

    def count(self) -> int: ...


@dataclass(frozen=True)
class OwnSink:
    """`bench.sink`, asked over SMTP."""

    port: int
    inner_port: int
    """Its own port, where `port` is that of the proxy that puts it at a distance."""
    ca: Path | None = None

    def count(self) -> int:
        address = ("127.0.0.1", self.inner_port)
        with socket.create_connection(address, timeout=30) as client, client.makefile("rwb") as lines:
            lines.readline()
            lines.write(b"XCOUNT\r\n")
            lines.flush()
            return int(lines.readline().split()[1])


@dataclass(frozen=True)
class SmtpSink:
    """Postfix's, whose counter goes to a file."""

    port: int
    file: Path

    def count(self) -> int:
        with self.file.open("rb") as counters:
            counters.seek(max(0, self.file.stat().st_size - 300))
            found = re.findall(rb"mesg=(\d+)\r", counters.read())
        return int(found[-1]) if found else 0


@contextlib.contextmanager
def sink(case: Case, directory: Path, *, postfix: bool) -> Iterator[Sink]:
    """Start a sink for one run."""
    program = tool("smtp-sink")
    if postfix and program and not (case.own_client or case.delay):
        port = free_port()
        # It would take the relay's own name for a loop, and serves 256 clients by default.
        command = [program, "-4", "-c", "-h", "sink.bench", "-m", "12000"]
        command += ["-u", "nobody"] * (os.getuid() == 0) + [f"inet:127.0.0.1:{port}", "4096"]
        with running(command, directory / "sink.log", accounted=False) as process:
            await_greeting(port, process.process, directory / "sink.log")
            yield SmtpSink(port, directory / "sink.log")
        return
    command = [sys.executable, "-m", "bench.sink", "--delay", str(case.delay)]
    ca = None
    if case.distance:
        ca, certificate = directory / "ca.pem", directory / "sink.pem"
        authority = trustme.CA()
        authority.cert_pem.write_to_path(ca)
        authority.issue_cert("localhost", "127.0.0.1").private_key_and_cert_chain_pem.write_to_path(
            certificate
        )
        command += ["--certificate", str(certificate)]
    with running(command, directory / "sink.log", says_port=True, accounted=False) as process:
        port = said_port(process.process, "the sink")
        if not case.distance:
            yield OwnSink(port, port)
            return
        proxy = [sys.executable, "-m", "bench.distance", "--to", str(port)]
        proxy += ["--round-trip", str(case.distance)]
        with running(proxy, directory / "distance.log", says_port=True, accounted=False) as between:
            yield OwnSink(said_port(between.process, "the proxy that makes distance"), port, ca)


def await_count(sink: Sink, wanted: int, seconds: float = 60.0) -> float:
    """Return when the sink had counted `wanted`; RunError once the count has stood still for `seconds`."""
    last, moved = -1, time.monotonic()
    while (count := sink.count()) < wanted:
        if count != last:
            last, moved = count, time.monotonic()
        if time.monotonic() - moved > seconds:
            raise RunError(f"{wanted} messages sent, {count} arrived")
        time.sleep(0.01)
    if count > wanted:
        raise RunError(f"{wanted} messages sent, {count} arrived")
    return time.perf_counter()


@dataclass(frozen=True)
class Sent:
    """What a load says of itself. `seconds` is its own time, without that of its start, where it tells."""

    began: float
    ended: float
    p50_ms: float | None = None
    p99_ms: float | None = None


def send(port: int, case: Case, messages: int, *, postfix: bool, ca: Path | None = None) -> Sent:
    """Send; return when it began and ended. RunError unless every message was answered 250."""
    program = tool("smtp-source")
    if postfix and program and not case.own_client:
        return _smtp_source(program, port, case, messages)
    command = [sys.executable, "-m", "bench.load", "--port", str(port)]
    command += ["--sessions", str(min(case.sessions, messages)), "--messages", str(messages)]
    command += ["--size", str(case.size), "--style", case.style, "--recipients", str(case.recipients)]
    command += ["--keep"] * case.keep + (["--ca", str(ca)] if ca else [])
    output = _run(command)
    ended = time.perf_counter()
    result = json.loads(output)
    if result["codes"] != {"250": messages}:
        raise RunError(f"of {messages} messages the server answered {result['codes']} (code: count)")
    return Sent(ended - result["seconds"], ended, result["p50_ms"], result["p99_ms"])


def _smtp_source(program: str, port: int, case: Case, messages: int) -> Sent:
    command = [program, "-4", "-s", str(min(case.sessions, messages)), "-m", str(messages)]
    command += ["-l", str(case.size), "-f", "sender@bench.test", "-t", "recipient@example.test"]
    command += ["-M", "load.bench", "-C", "3"] + ["-d"] * case.keep + [f"inet:127.0.0.1:{port}"]
    began = time.perf_counter()
    _run(command)
    return Sent(began, time.perf_counter())


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=LOAD_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        raise RunError(f"the load took more than {LOAD_S:.0f} s") from None
    if done.returncode:
        raise RunError(f"the load failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return done.stdout


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        port: int = held.getsockname()[1]
        return port


def said_port(process: subprocess.Popen[str], name: str) -> int:
    """The port that a process says on its first line."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line.strip().isdigit():
        raise RunError(f"{name} did not start")
    return int(line)


def await_greeting(port: int, process: subprocess.Popen[str], log: Path, seconds: float = 60.0) -> float:
    """Wait until the process greets there, and return when it did; RunError, with its last words, if not."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            last = log.read_text("utf-8", "replace").strip().splitlines() or ["?"]
            raise RunError(f"it ended with {process.returncode} before it greeted: {last[-1]}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as client:
            client.settimeout(10)
            if client.recv(512).startswith(b"220"):
                greeted = time.perf_counter()
                client.sendall(b"QUIT\r\n")
                client.recv(512)
                return greeted
        time.sleep(0.005)
    raise RunError(f"nobody greets on port {port}")
