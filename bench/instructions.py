"""Counts the instructions that a message costs the relay, under valgrind's callgrind.

    python -m bench.instructions [--store] [--tolerance 0.05]

Rules: what is counted does not depend on how busy the machine is, so that a change of a twentieth shows where
times would drown it in noise. It counts user code only; system calls are an instruction each: `bench.run` has
their cost. One client sends one message at a time, so that each has a commit of its own. A figure is the
least of three counts: what runs by the clock beside a message only ever adds to it.
The stored figures belong to one version of Python on one kind of machine with the pinned libraries, which
they name; elsewhere the figures are shown and nothing is compared. Whoever changes what a message costs
stores them anew (`--store`), in the same commit.
Exit status: 0 within tolerance, or nothing to compare with; 1 more (a regression), 2 no valgrind.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

from bench import installed
from bench.cases import Case
from bench.ends import Sink, await_count, await_greeting, free_port, send, sink, tool
from bench.processes import running
from bench.targets import configuration

REFERENCE = Path(__file__).with_suffix(".json")
TOLERANCE = 0.05
BLOCK = 64 << 10
RECIPIENTS = 50
BLOCKS = 16
SMALL = 4096
COUNTS = 3


@dataclass(frozen=True)
class Load:
    """What is sent while instructions are counted."""

    messages: int
    keep: bool = True
    recipients: int = 1
    size: int = SMALL

    @property
    def case(self) -> Case:
        return Case(
            "instructions",
            "",
            sessions=1,
            size=self.size,
            keep=self.keep,
            recipients=self.recipients,
            style="plain" if self.recipients == 1 else "pipelined",
            own_client=True,
        )


KEPT = Load(100)
SHORT = Load(100, keep=False)
TO_ONE = Load(50, recipients=2)
TO_MANY = Load(50, recipients=2 + RECIPIENTS)
LONG = Load(20, size=SMALL + BLOCKS * BLOCK)


def main() -> int:
    """Count, print, compare or store."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", action="store_true", help="make these figures the reference")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="share by which one may be more")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started here is ended here
    if not (tool("valgrind") and tool("callgrind_control")):
        print("valgrind is not installed: nothing was counted", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="bench-instructions-") as scratch:
        figures = measured(Path(scratch))
    reference = stored()
    print(table(figures, reference))
    if arguments.store:
        REFERENCE.write_text(
            json.dumps({"where": where(), "instructions": figures}, indent=1) + "\n", "utf-8"
        )
        return 0
    if reference is None:
        print(f"The stored figures are not for {where()}: nothing to compare with.")
        return 0
    worse = regressions(figures, reference, arguments.tolerance)
    for line in worse:
        print(line)
    return 1 if worse else 0


def where() -> str:
    """What the figures belong to."""
    return f"Python {platform.python_version()}, {platform.machine()}"


def stored() -> dict[str, int] | None:
    """The reference, if there is one for this Python and this machine."""
    if not REFERENCE.exists():
        return None
    reference = json.loads(REFERENCE.read_text("utf-8"))
    figures: dict[str, int] = reference["instructions"]
    return figures if reference["where"] == where() else None


def regressions(figures: Mapping[str, int], reference: Mapping[str, int], tolerance: float) -> list[str]:
    """A line for each figure that is more than the reference allows."""
    return [
        f"{name}: {figure:,} instructions, {figure / reference[name] - 1:.1%} more than stored"
        for name, figure in figures.items()
        if name in reference and figure > reference[name] * (1 + tolerance)
    ]


def table(figures: Mapping[str, int], reference: Mapping[str, int] | None) -> str:
    """The figures beside the stored ones."""
    lines = [f"{'instructions for':40}{'now':>14}{'stored':>14}{'beside':>9}"]
    for name, figure in figures.items():
        known = (reference or {}).get(name)
        beside = f"{known:>14,}{figure / known:>9.3f}" if known else ""
        lines.append(f"{name:40}{figure:>14,}{beside}")
    return "\n".join(lines)


def measured(directory: Path) -> dict[str, int]:
    """Count them all, in one relay."""
    with _counter(directory) as count:
        kept, short, one, many, long = (count(load) for load in (KEPT, SHORT, TO_ONE, TO_MANY, LONG))
    return {
        "a message, connection kept open": kept,
        "a message with a connection of its own": short,
        "a recipient more": (many - one) // RECIPIENTS,
        "64 KiB of content more": (long - kept) // BLOCKS,
    }


class _Counter:
    """A relay under callgrind; called with a load it returns the instructions for a message of it."""

    def __init__(self, directory: Path, port: int, pid: int, taking: Sink) -> None:
        self._directory = directory
        self._port = port
        self._pid = pid
        self._taking = taking
        self._sent = 0

    def __call__(self, load: Load) -> int:
        self._send(load, 10)
        return min(self._count(load) for _ in range(COUNTS)) // load.messages

    def _count(self, load: Load) -> int:
        self.control("-z")
        self._send(load, load.messages)
        before = set(self._directory.glob("callgrind.*"))
        self.control("-d")
        (dump,) = set(self._directory.glob("callgrind.*")) - before
        found = re.search(r"^totals: (\d+)", dump.read_text("utf-8"), re.MULTILINE)
        assert found is not None
        return int(found[1])

    def _send(self, load: Load, messages: int) -> None:
        send(self._port, load.case, messages, postfix=False)
        self._sent += messages
        await_count(self._taking, self._sent)

    def control(self, *what: str) -> None:
        """Tell callgrind."""
        command = [tool("callgrind_control") or "callgrind_control", *what, str(self._pid)]
        subprocess.run(command, check=True, capture_output=True, timeout=60)


@contextmanager
def _counter(directory: Path) -> Iterator[_Counter]:
    port, http_port = free_port(), free_port()
    with sink(KEPT.case, directory, postfix=False) as taking:
        config = directory / "relay.toml"
        config.write_text(configuration(directory, port, http_port, taking.port), "utf-8")
        valgrind = [tool("valgrind") or "valgrind", "--tool=callgrind", "--instr-atstart=no"]
        valgrind.append(f"--callgrind-out-file={directory}/callgrind")
        command = [*valgrind, *installed.command(config)]
        log = directory / "relay.log"
        with running(command, log, environment={"PYTHONHASHSEED": "0"} | installed.environment()) as relay:
            await_greeting(port, relay.process, log, seconds=300)
            urlopen(f"http://127.0.0.1:{http_port}/healthz", timeout=300).close()  # all is loaded by then
            counter = _Counter(directory, port, relay.process.pid, taking)
            counter.control("-i", "on")
            yield counter


if __name__ == "__main__":
    sys.exit(main())
