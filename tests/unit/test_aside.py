"""Lines that are set aside: whole, on disk, and never in a file that was taken away."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from relay.records.aside import append_line, take_away


def test_lines_follow_each_other(tmp_path: Path) -> None:
    path = tmp_path / "rejected.jsonl"
    append_line(path, b"one\n")
    append_line(path, b"two\n")

    assert path.read_bytes() == b"one\ntwo\n"


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rejected.jsonl"
    append_line(path, b"one\n")
    write = os.write

    def full(file: int, octets: bytes) -> int:
        if len(octets) < 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, octets[:3])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        append_line(path, b"a longer one\n")

    assert path.read_bytes() == b"one\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a file for somebody else")
def test_what_root_sets_aside_is_for_the_owner_of_the_spool(tmp_path: Path) -> None:
    """As by `relay spool replay`: the relay, which is not root, appends to it, or reads it again."""
    path = tmp_path / "rejected.jsonl"
    os.chown(tmp_path, 12345, 12346)
    append_line(path, b"one\n")
    found = path.stat()

    assert (found.st_uid, found.st_gid) == (12345, 12346)


def test_taking_away(tmp_path: Path) -> None:
    path, taken = tmp_path / "rejected.jsonl", tmp_path / "taken"
    assert not take_away(path, taken)
    append_line(path, b"one\n")

    assert take_away(path, taken)
    append_line(path, b"two\n")

    assert (taken.read_bytes(), path.read_bytes()) == (b"one\n", b"two\n")


def test_no_line_is_lost_to_a_file_that_is_taken_away(tmp_path: Path) -> None:
    path, taken = tmp_path / "rejected.jsonl", tmp_path / "taken"
    found = b""

    def write() -> None:
        for number in range(300):
            append_line(path, b"%d\n" % number)

    writer = threading.Thread(target=write)
    writer.start()
    while writer.is_alive() or path.exists():
        if take_away(path, taken):
            found += taken.read_bytes()
            taken.unlink()
    writer.join()

    assert [int(line) for line in found.splitlines()] == list(range(300))
