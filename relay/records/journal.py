"""The journal: which messages have their end of data up and no outcome yet, for the start after a SIGKILL.

A file `journal` beside the spool, mapped into memory, with one slot for each such message. To enter a message
is a copy into the map and to free its slot another: no system call, no fsync, nothing that waits for a disk.
What stands in a shared map outlives the process however it ends; it does not outlive a failure of the power,
after which the messages under way are known to the upstream alone.

Rules:
- A slot is a header of eight octets, length and CRC-32 of what follows, and one JSON array. The payload is
  written first and the header last, and a free slot's header is zero. So a slot that a kill tore was about to
  be entered, when nothing had gone up yet, or about to be freed, when all was said: it is no doubt.
- The file's blocks are taken in advance (`posix_fallocate`): on a file system that writes in place, a store
  into the map never needs room on the disk, the lack of which would be a SIGBUS.
- Where there is no room for the slots, or the file has been removed, nothing may go up: `refusal` says so.
- The slot freed last is used next, so that few pages are touched.
- Whoever has the spool's lock has the journal: open it after the spool, close it before.
- One thread.
"""

from __future__ import annotations

import contextlib
import json
import logging
import mmap
import os
import struct
import time
import zlib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple
from uuid import UUID

from relay.records.line import whole_line
from relay.records.model import Doubt, Json
from relay.records.spool import SpoolError

__all__ = ["KILLED", "ROOM", "SLOT_SIZE", "Found", "Journal", "line_of"]

SLOT_SIZE: Final = 16 * 1024
"""Octets of a slot: whole pages, and room for some hundred recipients."""
ROOM: Final = SLOT_SIZE - 8
"""Octets that a message may take."""
KILLED: Final = "the relay was killed before the upstream's answer came"
"""The reason of a doubt that was found in the journal."""

_LONGEST_TEXT: Final = 128  # characters of a text (12 octets each, as JSON) where it would not fit otherwise
_RETRY_S: Final = 1.0
_FREE: Final = bytes(8)
_header: Final = struct.Struct("=II").pack
_log: Final = logging.getLogger(__name__)


class Found(NamedTuple):
    """A message that the process before this one has left: its slot, and what is known of it."""

    slot: int
    doubt: Doubt


class Journal:
    """The journal in `directory`, with room for `slots` messages, and more when they are needed.

    Raises SpoolError when the file cannot be opened or read. Room that cannot be had is no error here: the
    relay can start, and `refusal` says why it takes no mail.
    """

    def __init__(self, directory: Path, slots: int) -> None:
        self.path = directory / "journal"
        self._free: list[int] = []
        self._slots = 0
        self._failure: str | None = None
        self._tried_at = 0.0
        self._removed = False
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise SpoolError(f"{self.path}: {error.strerror or error}") from error
        try:
            # Only what has its blocks is mapped; a copy from a backup, say, may have lost them.
            size = os.fstat(self._file).st_size
            left = -(-size // SLOT_SIZE)
            if left:
                os.posix_fallocate(self._file, 0, left * SLOT_SIZE)
            self._map = self._mapped(left)
        except OSError as error:
            os.close(self._file)
            raise SpoolError(f"{self.path}: {error.strerror or error}") from error
        self.found: Sequence[Found] = self._read(left)
        """What was left; each slot is in use until it is freed."""
        self._slots = left
        if slots > left:
            self._grow(slots - left)

    @property
    def slots(self) -> int:
        """How many there are."""
        return self._slots

    @property
    def in_use(self) -> int:
        """How many of them hold a message."""
        return self._slots - len(self._free)

    def enter(self, line: bytes) -> int | None:
        """Write a message, as `line_of` makes it, into a slot and return that; None: there is no room."""
        if not self._free and not self._grow(max(self._slots, 1)):
            return None
        slot = self._free.pop()
        begin = slot * SLOT_SIZE + 8
        room = self._map
        room[begin : begin + len(line)] = line
        room[begin - 8 : begin] = _header(len(line), zlib.crc32(line))
        return slot

    def free(self, slot: int) -> None:
        """Forget the message in `slot`: its outcome is durable, or there is nothing to keep of it.

        After `close` it stays, for the next start.
        """
        if self._map.closed:
            return
        self._map[slot * SLOT_SIZE : slot * SLOT_SIZE + 8] = _FREE
        self._free.append(slot)

    def refusal(self) -> str | None:
        """Return why new mail must be refused now, or None; tries once a second to have room again.

        After a kill the next start would find nothing in what was removed.
        """
        if self._removed:
            return f"{self.path}: was removed while it was in use; restart the relay"
        if self._free:
            return None
        if self._failure is None or time.monotonic() - self._tried_at >= _RETRY_S:
            self._grow(max(self._slots, 1))
        return self._failure

    def look(self) -> None:
        """See whether the file has been removed under the relay; to be called every second or so."""
        if not self._removed and os.fstat(self._file).st_nlink == 0:
            self._removed = True
            _log.error("%s: was removed while it was in use; restart the relay", self.path)

    def close(self) -> None:
        """Close the file. What is in use stays in it, for the next start."""
        self._map.close()
        os.close(self._file)

    def _grow(self, slots: int) -> bool:
        """Add so many slots, or fail and say why."""
        self._tried_at = time.monotonic()
        begin, end = self._slots * SLOT_SIZE, (self._slots + slots) * SLOT_SIZE
        try:
            os.posix_fallocate(self._file, begin, end - begin)
            if begin:
                self._map.resize(end)
            else:
                self._map = self._mapped(slots)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, begin)  # what it got of it: others may need the room
            if self._failure is None:
                _log.error("%s: no room for messages under way: %s", self.path, error.strerror or error)
            self._failure = f"{self.path}: {error.strerror or error}"
            return False
        if self._failure is not None:
            _log.warning("%s: there is room again", self.path)
            self._failure = None
        # The lowest is used first; those that are warm already stay before them.
        self._free = [*range(self._slots + slots - 1, self._slots - 1, -1), *self._free]
        self._slots += slots
        return True

    def _mapped(self, slots: int) -> mmap.mmap:
        # A map of nothing is no map; one that is never written stands for it.
        return mmap.mmap(self._file, slots * SLOT_SIZE) if slots else mmap.mmap(-1, SLOT_SIZE)

    def _read(self, slots: int) -> list[Found]:
        """Return the messages that were left; what is torn is reported and freed."""
        found = []
        for slot in range(slots):
            begin = slot * SLOT_SIZE
            if self._map[begin : begin + 8] == _FREE:
                self._free.append(slot)
                continue
            try:
                found.append(Found(slot, _doubt_in(self._map[begin : begin + SLOT_SIZE])))
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                _log.error("%s: slot %d is torn, and freed: %s", self.path, slot, error)
                self.free(slot)
        self._free.reverse()
        return found


def line_of(doubt: Doubt) -> bytes:
    """Return a message as a slot holds it; it has no reason yet.

    What does not fit is left out, recipients first: `data.recipient_count` then says how many there were.
    """
    line = whole_line(*_values(doubt, doubt.recipients, doubt.data))
    return line if len(line) <= ROOM else _cut(doubt)


def _cut(doubt: Doubt) -> bytes:
    """Return as much of a message as fits."""
    data = {name: value for name, value in doubt.data.items() if name not in ("refused", "headers", "tags")}
    data["recipient_count"] = len(doubt.recipients)
    values = _values(doubt, (), data)
    left = ROOM - len(_json(values))
    if left < 0:
        values = [each[:_LONGEST_TEXT] if isinstance(each, str) else each for each in values]
        values[-1] = {"recipient_count": len(doubt.recipients)}
        return _json(values)
    recipients = []
    for recipient in doubt.recipients:
        left -= len(_json(recipient)) + 1
        if left < 0:
            break
        recipients.append(recipient)
    return _json(_values(doubt, recipients, data))


def _json(values: object) -> bytes:
    return json.dumps(values, default=str, separators=(",", ":")).encode("ascii")


def _values(doubt: Doubt, recipients: Sequence[str], data: dict[str, Json]) -> list[Any]:
    return [
        doubt.task_id,
        doubt.task_type,
        doubt.sender,
        doubt.client,
        doubt.since,
        doubt.upstream,
        doubt.size,
        doubt.duration_ms,
        doubt.client_task_id,
        doubt.message_id,
        recipients,
        data,
    ]


def _doubt_in(slot: bytes) -> Doubt:
    """Return what a slot holds; raise ValueError, TypeError or KeyError when it is not as it was written."""
    length, checksum = struct.unpack_from("=II", slot)
    line = slot[8 : 8 + length]
    if zlib.crc32(line) != checksum:
        raise ValueError("checksum differs")
    values = json.loads(line)
    task_id, task_type, sender, client, since, upstream, size, duration_ms, *others = values
    client_task_id, message_id, recipients, data = others
    return Doubt(
        task_id=UUID(task_id),
        task_type=task_type,
        sender=sender,
        client=client,
        since=datetime.fromisoformat(since).astimezone(UTC),
        upstream=upstream,
        reason=KILLED,
        size=size,
        duration_ms=duration_ms,
        recipients=tuple(recipients),
        client_task_id=client_task_id,
        message_id=message_id,
        # Its client lost the connection in the same moment.
        data={"client_reply": None} | data | {"journal": True},
    )
