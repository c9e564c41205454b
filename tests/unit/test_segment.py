"""A segment holds its rows wherever it is cut, and its space whatever the disk is like."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from relay.records.segment import Segment, end_of_rows


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "000000000001.jsonl"


def test_space_is_taken_ahead_and_rows_are_written_over_it(path: Path) -> None:
    segment = Segment(path)
    segment.take(100_000)
    assert path.stat().st_size == 100_000
    assert path.stat().st_blocks * 512 >= 100_000

    segment.append(b"one\n")
    segment.append(b"two\n")
    assert (segment.size, segment.free) == (8, 99_992)
    assert path.read_bytes() == b"one\ntwo\n" + bytes(99_992)
    assert end_of_rows(path) == 8

    segment.take(100_000)
    assert path.stat().st_size == 100_008
    segment.take(5)  # there is more already
    assert segment.free == 100_000
    segment.close()
    assert path.read_bytes() == b"one\ntwo\n"


def test_rows_beyond_the_space_extend_the_file(path: Path) -> None:
    segment = Segment(path)
    segment.append(b"x" * 10)

    assert (segment.size, segment.free) == (10, 0)
    segment.close()


def test_a_segment_without_rows_goes(path: Path) -> None:
    segment = Segment(path)
    segment.take(1000)
    segment.close()

    assert not path.exists()


def test_a_file_that_is_gone_is_no_place_for_rows(path: Path) -> None:
    segment = Segment(path)
    path.unlink()

    with pytest.raises(FileNotFoundError, match="removed under the relay"):
        segment.append(b"x")
    segment.close()


def test_a_name_that_is_taken(path: Path) -> None:
    path.touch()

    with pytest.raises(FileExistsError):
        Segment(path)


def test_a_directory_that_cannot_be_synced_keeps_no_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)

    with pytest.raises(OSError, match="Input/output error"):
        Segment(path)
    assert not path.exists()


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_a_file_system_that_cannot_allocate(path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(file: int, offset: int, length: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    segment = Segment(path)
    segment.take(200_000)

    assert path.stat().st_blocks * 512 >= 200_000
    assert path.read_bytes() == bytes(200_000)
    segment.close()


@pytest.mark.parametrize("call", ["posix_fallocate", "fsync"])
def test_space_that_is_not_to_be_had(path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    segment = Segment(path)
    segment.take(1000)
    segment.append(b"row\n")

    def fail(file: int, *arguments: int) -> None:
        os.truncate(file, 1500)  # a part of it
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left"):
        segment.take(5000)

    assert segment.free == 996
    assert path.read_bytes() == b"row\n" + bytes(996)
    segment.close()


def test_space_that_cannot_be_given_back(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    segment = Segment(path)
    segment.take(1000)
    segment.append(b"row\n")

    def fail(file: int, size: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "ftruncate", fail)
    segment.close()

    assert "cannot give back the space behind its rows: " in caplog.text
    assert end_of_rows(path) == 4


@pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 65_537, 200_000])
@pytest.mark.parametrize("zeros", [0, 1, 65_535, 65_536, 131_073])
def test_the_end_of_rows_is_found(path: Path, size: int, zeros: int) -> None:
    path.write_bytes(b"x" * size + bytes(zeros))

    assert end_of_rows(path) == size
