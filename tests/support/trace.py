"""What strace saw of a process, as calls that begin and end, and what it says about the order of a message.

Rules: time is the number of the line. A call that strace shows in two pieces (`<unfinished ...>`, `resumed`)
begins with the first and ends with the second; one that is shown in one piece ends where it begins. Strings
are looked for, never decoded: a needle is plain ASCII that begins with no digit (behind an octal escape a
digit would be part of it).
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.process import RelayProcess

__all__ = ["Call", "calls", "disorder", "traced"]

READS = ("read", "readv", "recvfrom", "recvmsg")
WRITES = ("write", "writev", "pwrite64", "pwritev", "sendto", "sendmsg")
SYNCS = ("fsync", "fdatasync")
_STRING = 16 * 1024  # octets that are shown of one argument; a page of the database has 4096

_LINE = re.compile(
    r"(?P<pid>\d+) +(?:<\.\.\. (?P<resumed>\w+) resumed>|(?P<name>\w+)\()(?P<rest>.*)", re.DOTALL
)
_UNFINISHED = " <unfinished ...>"
_RESULT = re.compile(r"\) += (?P<result>-?\d+)(?: [A-Z(].*)?\Z")
_FILE = re.compile(r"\d+<(?P<file>.*?)>(?:, |\)|$)")


@dataclass(frozen=True)
class Call:
    """One system call: in which lines it began and ended, on which file, with what, and its result."""

    name: str
    begun: int
    ended: int
    file: str
    """The file's path; of a socket, what strace says instead (`socket:[...]`)."""
    text: str
    result: int


def calls(lines: Iterable[str]) -> list[Call]:
    """Return the calls that came to an end, in that order."""
    found: list[Call] = []
    unfinished: dict[str, tuple[int, str]] = {}
    for number, line in enumerate(lines):
        match = _LINE.match(line)
        if match is None:  # a signal, an exit
            continue
        begun, rest = number, match["rest"]
        if match["resumed"]:
            if match["pid"] not in unfinished:  # begun before strace had attached
                continue
            begun, first = unfinished.pop(match["pid"])
            rest = first + rest
        elif rest.endswith(_UNFINISHED):
            unfinished[match["pid"]] = number, rest.removesuffix(_UNFINISHED)
            continue
        result = _RESULT.search(rest)
        if result is not None:  # "= ?": the process ended in it
            file = _FILE.match(rest)
            name = match["name"] or match["resumed"]
            found.append(Call(name, begun, number, file["file"] if file else "", rest, int(result["result"])))
    return found


def disorder(found: Sequence[Call], needle: str, directory: Path) -> str | None:
    """Return what is wrong with the order of the message whose verdict holds `needle`, or None.

    In order it is when the verdict was read from a socket; then the row, in which the verdict stands, was
    written to a file in `directory`; then a sync of this file began, and ended well; and only then was the
    verdict written to a socket.
    """
    about = [call for call in found if needle in call.text and call.result > 0]
    read = next((call for call in about if call.name in READS and _is_socket(call)), None)
    if read is None:
        return "the verdict was never read"
    answer = next((call for call in about if call.name in WRITES and _is_socket(call)), None)
    if answer is None:
        return "the client was never answered"
    rows = [call for call in about if call.name in WRITES and call.file.startswith(f"{directory}/")]
    rows = [call for call in rows if call.begun > read.ended]
    if not rows or rows[0].ended > answer.begun:
        return "the client was answered before the row was written"
    for row in rows:
        for sync in found:
            after = sync.begun > row.ended and sync.ended < answer.begun
            if sync.name in SYNCS and sync.file == row.file and sync.result == 0 and after:
                return None
    return "the client was answered before the row was synced"


def _is_socket(call: Call) -> bool:
    return call.file.startswith(("socket:", "TCP:", "TCPv6:", "UNIX"))


@contextlib.asynccontextmanager
async def traced(relay: RelayProcess) -> AsyncIterator[Path]:
    """Trace the relay's threads into a file, from when strace has attached to when it has let go.

    Skips the test where strace cannot trace.
    """
    file = relay.directory / "trace"
    names = ",".join((*READS, *WRITES, *SYNCS))
    tracer = await asyncio.create_subprocess_exec(
        *("strace", "-f", "-y", "-s", str(_STRING), "-e", f"trace={names}", "-o", str(file)),
        *("-p", str(relay.pid)),
        stderr=asyncio.subprocess.PIPE,
    )
    assert tracer.stderr is not None
    rest: asyncio.Task[bytes] | None = None
    try:
        said = (await tracer.stderr.readline()).decode()
        if "attached" not in said:
            pytest.skip(f"strace cannot trace a process here: {said.strip()}")
        rest = asyncio.get_running_loop().create_task(tracer.stderr.read())  # or it would wait for us
        yield file
    finally:
        with contextlib.suppress(ProcessLookupError):
            tracer.terminate()
        if rest is not None:
            await rest
        await tracer.wait()
