"""What a limit costs a message: a relay without limits beside relays with some, in one run.

    python -m bench.limits [--messages N] [--rounds N]

Rules: every round starts each relay afresh on a new store, one after the other, with the same load (20
sessions kept open, one message of 4 KiB at a time each); the limits let everything pass. CPU is the relay's
own, the median of the rounds with the least and the most. Prints one line for each, and JSON at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from bench.ends import await_greeting, free_port
from bench.processes import running
from bench.targets import configuration

LIMITS = {
    "none": "",
    "sender": '[[limits]]\nscope = "sender"\nmax = 1000000\nper = "1d"\n',
    "task type": '[[limits]]\nscope = "sender"\ntask_type = "bench"\nmax = 1000000\nper = "1d"\n',
    "three": (
        '[[limits]]\nscope = "sender"\nmax = 1000000\nper = "1d"\n'
        '[[limits]]\nscope = "recipient"\nmax = 1000000\nper = "1h"\n'
        '[[limits]]\nscope = "all"\nmax_bytes = "1024GiB"\nper = "1d"\n'
    ),
}


def main() -> int:
    """Measure, print, and return 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--messages", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    found: dict[str, list[float]] = {name: [] for name in LIMITS}
    for _ in range(arguments.rounds):
        for name, limits in LIMITS.items():
            found[name].append(_cpu_ms(limits, arguments.messages))
    base = statistics.median(found["none"])
    for name, figures in found.items():
        middle = statistics.median(figures)
        print(
            f"{name:<10} {middle:.3f} CPU-ms a message ({min(figures):.3f} to {max(figures):.3f}), "
            f"{middle - base:+.3f}"
        )
    print(json.dumps(found))
    return 0


def _cpu_ms(limits: str, messages: int) -> float:
    """Return the CPU-ms that one message costs a relay with these limits."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        port, http_port = free_port(), free_port()
        sink = [sys.executable, "-m", "bench.sink"]
        with running(sink, directory / "sink.log", says_port=True, accounted=False) as upstream:
            assert upstream.process.stdout is not None
            sink_port = int(upstream.process.stdout.readline())
            config = directory / "relay.toml"
            config.write_text(configuration(directory, port, http_port, sink_port) + "\n" + limits, "utf-8")
            log = directory / "relay.log"
            command = [sys.executable, "-m", "relay", "serve", "--config", str(config)]
            with running(command, log) as relay:
                await_greeting(port, relay.process, log)
                urllib.request.urlopen(
                    f"http://127.0.0.1:{http_port}/healthz"
                ).close()  # all is loaded by then
                _load(port, 500)  # connections, caches, the first look-up
                before = relay.cpu_s()
                _load(port, messages)
                time.sleep(0.1)
                used = relay.cpu_s() - before
                with urllib.request.urlopen(f"http://127.0.0.1:{http_port}/metrics", timeout=10) as scrape:
                    lines = scrape.read().decode().splitlines()
                accepted = [line for line in lines if "messages_total" in line and '"accepted"' in line]
                if sum(float(line.split()[-1]) for line in accepted) != messages + 500:
                    raise SystemExit(f"not every message was accepted: {accepted}")
    return used / messages * 1000


def _load(port: int, messages: int) -> None:
    command = [sys.executable, "-m", "bench.load", "--port", str(port), "--keep", "--sessions", "20"]
    subprocess.run([*command, "--messages", str(messages)], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main())
