"""Whole lines on their way out: in their order, those of one turn of the event loop in one system call."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from typing import BinaryIO, Final

__all__ = ["MAX_WAITING", "Output"]

MAX_WAITING: Final = 64 * 1024
"""Octets of lines that may wait for the end of the event loop's turn."""


class Output:
    """Writes whole lines to a binary stream, standard output when None, in their order, and never raises.

    A line waits until the event loop's turn is over, if one runs in this thread, so that all lines of a turn
    cost one system call; without a loop it is written at once. Errors do not wait, nor does more than
    MAX_WAITING. Lines that could not be written are counted, and `on_lost` hears their number once lines
    can be.
    """

    def __init__(self, stream: BinaryIO | None, on_lost: Callable[[int], None]) -> None:
        self._stream = stream
        self._on_lost = on_lost
        self._lost = 0
        self._waiting: list[bytes] = []
        self._size = 0
        self._due: asyncio.AbstractEventLoop | None = None  # will flush; one that was closed never does
        self._thread_id = 0  # in which it runs
        # Libraries log in threads of their own, and in finalizers, which may run in the midst of a flush.
        self._lock = threading.RLock()

    def line(self, line: bytes) -> None:
        """Have the line written, at the latest when the turn of the loop is over."""
        with self._lock:
            self._waiting.append(line + b"\n")
            self._size += len(line)
            due = self._due
            if due is not None and self._thread_id == threading.get_ident() and due.is_running():
                # The loop is known; to ask for it costs a system call (CPython 3.11).
                if self._size >= MAX_WAITING:
                    self.flush()
                return
            try:
                loop = asyncio.get_running_loop()
            except RuntimeError:
                self.flush()
                return
            if self._size >= MAX_WAITING:
                self.flush()
            elif self._due is not loop:
                self._due, self._thread_id = loop, threading.get_ident()
                loop.call_soon(self.flush)

    def line_at_once(self, line: bytes) -> None:
        """Write the line now, behind all that wait."""
        with self._lock:
            self._waiting.append(line + b"\n")
            self.flush()

    def flush(self) -> None:
        """Write the lines that wait."""
        with self._lock:
            self._due, self._size = None, 0
            # The new list first: between taking the lines and clearing them no finalizer may run.
            self._waiting, lines = [], self._waiting
            if not lines:
                return
            stream = self._stream or sys.stdout.buffer
            try:
                stream.write(b"".join(lines))
                stream.flush()
            except (OSError, ValueError):  # a broken pipe, a full disk; ValueError: the stream is closed
                self._lost += len(lines)
                return
            if self._lost:
                lost, self._lost = self._lost, 0
                self._on_lost(lost)
