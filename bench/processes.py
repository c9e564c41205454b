"""Processes that are measured: started and ended by their ids, with all that they start.

Rules: CPU is the kernel's own account of the family, children that have ended included: from a control group
of its own where one can be made (root; exact to the nanosecond), else the sum over /proc (ticks of 10 ms,
and what a child used is lost where its parent did not wait for it). Memory is that of all its processes:
PSS, so that what they share counts once. Only what was started here is ended here.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from bench.errors import RunError

ROOT = Path(__file__).resolve().parent.parent
STOP_S = 40.0
_CPUACCT = Path("/sys/fs/cgroup/cpuacct")
_UNIFIED = Path("/sys/fs/cgroup")
_numbers = itertools.count()


class Family(Protocol):
    """A process and all that it starts."""

    def cpu_s(self) -> float: ...
    def pids(self) -> list[int]: ...
    def enter(self) -> None: ...
    def close(self) -> None: ...


class ControlGroup:
    """A family by a control group that it is born in: nothing that it starts can leave the account."""

    def __init__(self, parent: Path, account: str) -> None:
        self._directory = parent / f"bench-{os.getpid()}-{next(_numbers)}"
        self._directory.mkdir()
        self._account = self._directory / account

    def cpu_s(self) -> float:
        text = self._account.read_text("ascii")
        if self._account.name == "cpuacct.usage":
            return int(text) / 1e9
        return int(text.split()[1]) / 1e6  # "usage_usec N" is the first line of cpu.stat

    def pids(self) -> list[int]:
        return [int(pid) for pid in (self._directory / "cgroup.procs").read_text("ascii").split()]

    def enter(self) -> None:
        (self._directory / "cgroup.procs").write_text(str(os.getpid()), "ascii")

    def close(self) -> None:
        for _ in range(50):
            with contextlib.suppress(OSError):
                self._directory.rmdir()
                return
            time.sleep(0.02)


class Descendants:
    """A family by /proc: the leader of a session, its descendants and whoever is in the session."""

    leader = 0

    def cpu_s(self) -> float:
        ticks = 0
        for pid in self.pids():
            with contextlib.suppress(OSError):
                fields = _stat(pid)
                ticks += sum(int(field) for field in fields[11:15])
        return ticks / os.sysconf("SC_CLK_TCK")

    def pids(self) -> list[int]:
        parents: dict[int, int] = {}
        family = {self.leader}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    fields = _stat(int(entry.name))
                    parents[int(entry.name)] = int(fields[1])
                    if int(fields[3]) == self.leader:
                        family.add(int(entry.name))
        while more := {pid for pid, parent in parents.items() if parent in family} - family:
            family |= more
        return [pid for pid in family if pid in parents]

    def enter(self) -> None:
        """Be one by birth."""

    def close(self) -> None:
        """Leave nothing behind."""


def _stat(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()


def _family() -> ControlGroup | Descendants:
    for parent, account in ((_CPUACCT, "cpuacct.usage"), (_UNIFIED, "cpu.stat")):
        if (parent / account).is_file() or (
            account == "cpu.stat" and (parent / "cgroup.controllers").is_file()
        ):
            with contextlib.suppress(OSError):
                return ControlGroup(parent, account)
    return Descendants()


class Running:
    """A process that was started here, with its family's accounts."""

    def __init__(self, process: subprocess.Popen[str], family: ControlGroup | Descendants) -> None:
        self.process = process
        self.family = family
        self.start_s = 0.0
        """From its start to its first greeting."""

    def check(self) -> None:
        """Raise RunError if it has ended."""
        if self.process.poll() is not None:
            raise RunError(f"the target ended with {self.process.returncode} under load")

    def cpu_s(self) -> float:
        """User and system time of all its processes so far."""
        self.check()
        return self.family.cpu_s()

    def settle(self, seconds: float = 5.0) -> None:
        """Wait until it uses no CPU to speak of: a queue is cleaned up after the last delivery."""
        before = self.family.cpu_s()
        for _ in range(int(seconds / 0.1)):
            time.sleep(0.1)
            now = self.family.cpu_s()
            if now - before < 0.002:
                return
            before = now

    def pids(self) -> list[int]:
        return self.family.pids()

    def memory(self) -> int:
        """Octets of memory of all its processes, pages that they share counted once (PSS)."""
        total = 0
        for pid in self.pids():
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{pid}/smaps_rollup").read_text("ascii").splitlines():
                    if line.startswith("Pss:"):
                        total += int(line.split()[1]) * 1024
                        break
        return total

    def peak(self) -> int:
        """The most memory that each of its present processes has held, added up (VmHWM)."""
        total = 0
        for pid in self.pids():
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{pid}/status").read_text("ascii").splitlines():
                    if line.startswith("VmHWM:"):
                        total += int(line.split()[1]) * 1024
        return total


@contextlib.contextmanager
def running(
    command: Sequence[str],
    log: Path,
    *,
    says_port: bool = False,
    environment: Mapping[str, str] | None = None,
    accounted: bool = True,
) -> Iterator[Running]:
    """Start a command in the project's directory; end it, and whatever it has started, at the end."""
    family = _family() if accounted else Descendants()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if says_port else output,
            stderr=output,
            text=True,
            env=None if environment is None else os.environ | environment,
            preexec_fn=family.enter,  # noqa: PLW1509 - no other thread runs yet
            start_new_session=True,
        )
    if isinstance(family, Descendants):
        family.leader = process.pid
    try:
        yield Running(process, family)
    finally:
        _end(process, family)


def _end(process: subprocess.Popen[str], family: ControlGroup | Descendants) -> None:
    """TERM to the process; whoever of its family is there after a while is killed by its id."""
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 5
    while (left := family.pids()) and time.monotonic() < deadline + 5:
        if time.monotonic() > deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    if process.stdout:
        process.stdout.close()
    family.close()
