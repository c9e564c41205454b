"""The spool's reserve: who may count on which part of the disk space that is taken ahead.

Rules: arithmetic only. A message is promised a place before its end of data goes up, and gives it back when
its row is durable, wherever. The event loop promises and releases, the spool's thread says what there is; the
lock is held for a comparison and an addition, so neither waits for the other's work.
"""

from __future__ import annotations

import threading

__all__ = ["Reserve"]


class Reserve:
    """Disk space in octets: `free` is taken and not written yet, `promised` is the part spoken for."""

    __slots__ = ("_lock", "free", "promised")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.free = 0
        self.promised = 0

    def promise(self, octets: int) -> bool:
        """Keep `octets` for one message; return False, with nothing kept, where they do not fit."""
        with self._lock:
            if self.promised + octets > self.free:
                return False
            self.promised += octets
            return True

    def release(self, octets: int) -> None:
        """Give back what was promised."""
        with self._lock:
            self.promised -= octets

    def became(self, free: int) -> None:
        """Say what there is now, be it less than is promised: rows were written, or the disk has failed."""
        with self._lock:
            self.free = free

    def may_become(self, free: int) -> bool:
        """Go over to a reserve of another size, unless more than that is promised; return whether it did."""
        with self._lock:
            if self.promised > free:
                return False
            self.free = free
            return True
