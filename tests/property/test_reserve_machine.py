"""Whatever is promised, written, replayed and cut short, and however full the disk: a promise is kept.

The disk is a stand-in that can be full: then no file grows by a single octet. The spool is the real one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from relay.records import spool as spool_module
from relay.records.model import Record
from relay.records.spool import Spool, SpoolError
from relay.records.spool_line import encode
from tests.support.rows import make_record

USUAL = 16 * 1024
LONG = 8 * 1024
"""Octets after which a segment is ended: rows meet the change often."""


class Disk:
    """Lets files grow, or not."""

    def __init__(self) -> None:
        self.full = False
        self._fallocate, self._pwrite = os.posix_fallocate, os.pwrite

    def posix_fallocate(self, file: int, offset: int, length: int) -> None:
        self._check(file, offset + length)
        self._fallocate(file, offset, length)

    def pwrite(self, file: int, octets: Any, offset: int) -> int:
        self._check(file, offset + len(octets))
        return self._pwrite(file, octets, offset)

    def _check(self, file: int, end: int) -> None:
        if self.full and end > os.fstat(file).st_size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @contextlib.contextmanager
    def under(self) -> Iterator[None]:
        with (
            mock.patch.object(os, "posix_fallocate", self.posix_fallocate),
            mock.patch.object(os, "pwrite", self.pwrite),
            mock.patch.object(spool_module, "SEGMENT_SIZE", LONG),
        ):
            yield


def row(size: int) -> Record:
    return make_record("s" * size)


class ReserveMachine(RuleBasedStateMachine):
    """The spool beside the plainest model of it: promises that are open, rows that wait."""

    def __init__(self) -> None:
        super().__init__()
        self.disk = Disk()
        self.cleanup = contextlib.ExitStack()
        self.directory = Path(self.cleanup.enter_context(tempfile.TemporaryDirectory()))
        self.cleanup.enter_context(self.disk.under())
        self.spool = Spool(self.directory, USUAL)
        self.promises: list[bytes] = []
        self.waiting: list[Record] = []
        self.rows: dict[bytes, Record] = {}

    def teardown(self) -> None:
        self.spool.close()
        self.cleanup.close()

    @rule(size=st.integers(0, 7000))
    def promise(self, size: int) -> None:
        record = row(size)
        line = encode(record)
        reserve = self.spool.reserve
        fits = reserve.promised + len(line) <= reserve.free
        assert reserve.promise(len(line)) is fits
        if fits:
            self.rows[line] = record
            self.promises.append(line)

    @precondition(lambda self: self.promises)
    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        """Promised rows are written, whatever the disk is like; then their place is given back."""
        count = data.draw(st.integers(1, len(self.promises)))
        lines, self.promises = self.promises[:count], self.promises[count:]
        self.spool.append(lines)
        for line in lines:
            self.waiting.append(self.rows.pop(line))
            self.spool.reserve.release(len(line))

    @precondition(lambda self: self.promises)
    @rule(data=st.data())
    def go_elsewhere(self, data: st.DataObject) -> None:
        """The store took the row, or the upstream refused the message."""
        line = self.promises.pop(data.draw(st.integers(0, len(self.promises) - 1)))
        del self.rows[line]
        self.spool.reserve.release(len(line))

    @rule(octets=st.integers(0, 4 * USUAL))
    def provide(self, octets: int) -> None:
        try:
            self.spool.provide(octets)
        except SpoolError:
            assert self.disk.full
        else:
            assert self.spool.complete
            assert self.spool.reserve.free >= max(octets, USUAL)

    @rule(full=st.sampled_from([True, True, True, False]))
    def disk_becomes(self, full: bool) -> None:
        self.disk.full = full

    @rule(limit=st.sampled_from([1, 3, 1000]))
    def replay(self, limit: int) -> None:
        before = self.spool.rows
        batch = self.spool.read(limit)
        assert batch.records == self.waiting[: len(batch.records)]
        assert batch.corrupt == 0
        self.spool.forget()
        del self.waiting[: len(batch.records)]
        assert self.spool.rows == before - len(batch.records)

    @rule(killed=st.booleans())
    def begin_anew(self, killed: bool) -> None:
        """Rows that were taken from a segment come once more, rows that wait are behind them."""
        if killed:
            spool = self.spool
            for segment in (spool._segment, spool._spare):
                if segment is not None:
                    os.close(segment._file)
            os.close(spool._lock)
        else:
            self.spool.close()
        self.promises, self.rows = [], {}
        self.spool = Spool(self.directory, USUAL)
        found: list[Record] = []
        while self.spool.rows:
            batch = self.spool.read(100)
            assert batch.corrupt == 0
            found += batch.records
            self.spool.forget()
        assert found[len(found) - len(self.waiting) :] == self.waiting
        self.waiting = []

    @invariant()
    def promises_can_be_kept(self) -> None:
        reserve = self.spool.reserve
        assert reserve.promised == sum(map(len, self.promises)) <= reserve.free

    @invariant()
    def rows_are_counted(self) -> None:
        assert self.spool.rows == len(self.waiting)


TestReserve = ReserveMachine.TestCase
TestReserve.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
