"""What is measured: sending directly, this relay, two yardsticks, and whichever peers are installed.

Rules: a target is started afresh for each run, on files and ports of its own. `keeps` says whether its 250
follows the upstream's, and what record it keeps. Rows are counted after it has stopped.
"""

from __future__ import annotations

import contextlib
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from bench import installed
from bench.cases import Case
from bench.ends import OwnSink, Sink, await_greeting, free_port
from bench.errors import RunError
from bench.peers import debian, node, python
from bench.processes import Running, running

CONFIG = """\
[server]
hostname = "relay.bench"
max_connections = 12000
max_connections_per_client = 12000
lease_idle_timeout = "5m"

[[listeners]]
address = "127.0.0.1:{port}"

[[upstreams]]
name = "sink"
address = "{host}:{sink_port}"
max_connections = {connections}
lease_wait_timeout = "60s"
{security}

[records]
url = "sqlite:///{directory}/task_done.db"
spool = "{directory}/spool"

[http]
address = "127.0.0.1:{http_port}"

[log]
format = "json"
level = "info"
"""
SECURITY = """\
tls = "starttls"
ca_file = "{ca}"
username = "bench"
password = "secret"
"""


@dataclass(frozen=True)
class Target:
    """One target. `command` makes its files in a directory and returns what starts it, from port to sink."""

    name: str
    does: str
    """In a few words: whether its 250 follows the upstream's, what it keeps."""
    command: Callable[[Path, int, int], list[str]] | None = None
    missing: Callable[[], str | None] = lambda: None
    """What of it is not installed; None: it is there."""
    version: Callable[[], str] = lambda: ""
    counts_rows: bool = False


@contextlib.contextmanager
def started(target: Target, case: Case, sink: Sink, directory: Path) -> Iterator[tuple[int, Running | None]]:
    """Start it; yield the port to send to, and the processes: None for a direct send."""
    if target.name == "direct":
        yield sink.port, None
        return
    port = free_port()
    environment = {}
    if target.name in RELAYS:
        command = _relay(case, sink, directory, port)
        environment = RELAYS[target.name]()
    else:
        assert target.command is not None
        command = target.command(directory, port, sink.port)
    log = directory / f"{target.name}.log"
    began = time.perf_counter()
    with running(command, log, environment=environment) as process:
        process.start_s = await_greeting(port, process.process, log) - began
        yield port, process


def configuration(
    directory: Path,
    port: int,
    http_port: int,
    sink_port: int,
    *,
    connections: int = 250,
    ca: Path | None = None,
) -> str:
    """The relay's, as the benchmarks run it: all defaults, with room for as many as the cases bring."""
    return CONFIG.format(
        port=port,
        http_port=http_port,
        sink_port=sink_port,
        connections=connections,
        directory=directory,
        host="localhost" if ca else "127.0.0.1",
        security=SECURITY.format(ca=ca) if ca else 'tls = "none"',
    )


def _relay(case: Case, sink: Sink, directory: Path, port: int) -> list[str]:
    ca = sink.ca if isinstance(sink, OwnSink) else None
    connections = case.sessions if case.kind == "work" else 250
    config = directory / "relay.toml"
    text = configuration(directory, port, free_port(), sink.port, connections=connections, ca=ca)
    config.write_text(text, "utf-8")
    return installed.command(config)


def _naive(directory: Path, port: int, sink_port: int) -> list[str]:
    return _yardstick("bench.naive_relay", directory, port, sink_port)


def _bare(directory: Path, port: int, sink_port: int) -> list[str]:
    return _yardstick("bench.bare_relay", directory, port, sink_port)


def _yardstick(module: str, directory: Path, port: int, sink_port: int) -> list[str]:
    command = [sys.executable, "-m", module, "--port", str(port), "--upstream-port", str(sink_port)]
    return [*command, "--database", str(directory / "task_done.db")]


def rows(directory: Path) -> int:
    """The rows in `task_done` of a target that has stopped."""
    database = directory / "task_done.db"
    try:
        with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as connection:
            return int(connection.execute("SELECT count(*) FROM task_done").fetchone()[0])
    except sqlite3.Error as error:
        raise RunError(f"the rows cannot be counted: {error}") from error


RECORDED = "250 after the upstream's and the commit of its row; metrics, log line"
RELAYS = {"relay": installed.environment, "relay-python": installed.sources}
SYNC = "250 after the upstream's; no record"
QUEUE = "250 after its own fsync, sends later; log"
TARGETS = {
    target.name: target
    for target in (
        Target("direct", "no relay: the client talks to the sink"),
        Target("relay", RECORDED, counts_rows=True),
        Target("relay-python", "the same from its sources, where there is no compiler", counts_rows=True),
        Target("naive", "250 after the upstream's and a commit of its own", _naive, counts_rows=True),
        Target("bare", "250 after the upstream's and the commit of its row; looks at nothing", _bare,
               counts_rows=True),
        Target("nginx-stream", "a TCP proxy that knows no SMTP; no record", debian.nginx_stream,
               debian.no_nginx_stream, debian.nginx_version),
        Target("nginx-mail", SYNC, debian.nginx_mail, debian.no_nginx_mail, debian.nginx_version),
        Target("postfix-proxy", SYNC, debian.postfix_proxy, debian.no_postfix, debian.postfix_version),
        Target("postfix", QUEUE, debian.postfix, debian.no_postfix, debian.postfix_version),
        Target("opensmtpd", QUEUE, debian.opensmtpd, debian.no_opensmtpd, debian.opensmtpd_version),
        Target("exim-cutthrough", SYNC, debian.exim_cutthrough, debian.no_exim, debian.exim_version),
        Target("exim", QUEUE, debian.exim, debian.no_exim, debian.exim_version),
        Target("haraka", SYNC, node.haraka, node.no_haraka, node.haraka_version),
        Target("nodemailer", SYNC, node.nodemailer, node.no_nodemailer, node.nodemailer_version),
        Target("aiosmtpd-proxy", SYNC, python.aiosmtpd_proxy, python.no_aiosmtpd, python.aiosmtpd_version),
        Target("slimta", SYNC, python.slimta, python.no_slimta, python.slimta_version),
    )
}  # fmt: skip
