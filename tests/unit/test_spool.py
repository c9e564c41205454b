"""The spool keeps every row that it said it keeps, in order, whatever tears its files."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import subprocess
import sys
import threading
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import pytest

from relay.records import spool as spool_module
from relay.records.identity import uuid7
from relay.records.inspection import entries_waiting
from relay.records.model import Record, Settled
from relay.records.spool import BATCH_SIZE, RESERVE, Spool, SpoolError
from relay.records.spool_line import decode, encode
from tests.support.rows import make_record, spool_line

ROOT = Path(__file__).parents[2]


def drain(spool: Spool, limit: int = 2) -> list[Record]:
    """Read everything, as a replay does."""
    records: list[Record] = []
    while spool.rows:
        records += spool.read(limit).records
        spool.forget()
    return records


def segments(directory: Path) -> list[Path]:
    """Those with rows; what has been taken ahead holds zeros only."""
    named = sorted(path for path in directory.iterdir() if path.name[0].isdigit())
    return [path for path in named if path.read_bytes().strip(b"\0")]


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_rows_come_back_in_order_and_files_go(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "made" / "spool")
    rows = [make_record(f"{number}@example.com") for number in range(7)]
    spool.append([encode(row) for row in rows[:3]])
    spool.append([encode(row) for row in rows[3:]])

    assert spool.rows == 7
    assert drain(spool) == rows
    assert spool.rows == 0
    assert segments(spool.directory) == []
    spool.close()
    assert files(spool.directory) == ["lock"]


def test_modes(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    spool.append([encode(make_record())])
    spool.set_aside(encode(make_record(), "no such column"))

    assert stat.S_IMODE(spool.directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in spool.directory.iterdir()} == {0o600}
    spool.close()


def test_reading_again_gives_the_same_until_forgotten(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    rows = [make_record(), make_record(), make_record()]
    spool.append([encode(row) for row in rows])

    assert spool.read(2).records == rows[:2]
    assert spool.read(2).records == rows[:2]
    spool.forget()
    assert spool.read(2).records == rows[2:]
    assert segments(tmp_path) != []
    spool.close()


def test_of_big_rows_fewer_are_read_at_once(tmp_path: Path) -> None:
    """All that is read is in memory, and is a commit."""
    spool = Spool(tmp_path)
    rows = [make_record(recipients=tuple(f"{i}@example.com" for i in range(20_000))) for _ in range(5)]
    rows.append(make_record(data={"tags": ["x" * (2 * BATCH_SIZE)]}))
    lines = [encode(row) for row in rows]
    spool.append(lines)
    assert spool.size == sum(map(len, lines))

    found = []
    while spool.rows:
        batch = spool.read(500).records
        assert 1 <= len(batch) <= BATCH_SIZE // len(lines[0]) + 1
        found += batch
        spool.forget()

    assert found == rows
    assert spool.size == 0
    spool.close()


def test_appends_do_not_meet_the_replay(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    rows = [make_record() for _ in range(6)]
    spool.append([encode(row) for row in rows[:2]])
    first = spool.read(10).records
    spool.append([encode(row) for row in rows[2:4]])
    spool.forget()
    spool.append([encode(row) for row in rows[4:]])

    assert first == rows[:2]
    assert drain(spool) == rows[2:]
    spool.close()


def test_left_over_segments_are_found_at_start(tmp_path: Path) -> None:
    rows = [make_record() for _ in range(4)]
    for row in rows:
        spool = Spool(tmp_path)
        spool.append([encode(row)])
        spool.close()
    spool = Spool(tmp_path)

    assert spool.rows == 4
    assert len(segments(tmp_path)) == 4
    assert drain(spool) == rows
    spool.close()


def test_a_segment_replayed_in_part_comes_whole_after_a_restart(tmp_path: Path) -> None:
    rows = [make_record() for _ in range(3)]
    spool = Spool(tmp_path)
    spool.append([encode(row) for row in rows])
    spool.read(2)
    spool.forget()
    spool.close()
    spool = Spool(tmp_path)

    assert drain(spool) == rows
    spool.close()


def test_segments_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "SEGMENT_SIZE", 1)
    spool = Spool(tmp_path)
    rows = [make_record() for _ in range(3)]
    for row in rows:
        spool.append([encode(row)])
        spool.provide()

    assert len(segments(tmp_path)) == 3
    spool.read(10)
    spool.forget()
    assert len(segments(tmp_path)) == 2
    assert drain(spool) == rows[1:]
    spool.close()


def test_a_close_within_a_replay_keeps_what_is_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [make_record() for _ in range(3)]
    spool = Spool(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(spool_module, "SEGMENT_SIZE", 1)
        spool.append([encode(row) for row in rows[:2]])
    spool.append([encode(rows[2])])
    assert spool.read(1).records == rows[:1]
    spool.forget()
    spool.close()
    spool = Spool(tmp_path)

    assert drain(spool) == rows
    spool.close()


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_a_torn_last_line_does_not_stop_the_rest(tmp_path: Path, cut: int) -> None:
    """Cut by one octet only the newline is missing: the row is whole and is kept."""
    rows = [make_record(), make_record()]
    spool = Spool(tmp_path)
    spool.append([encode(row) for row in rows])
    spool.close()
    [segment] = segments(tmp_path)
    os.truncate(segment, segment.stat().st_size - cut)
    spool = Spool(tmp_path)
    later = make_record()
    spool.append([encode(later)])

    assert spool.rows == 3
    assert drain(spool) == [*rows[:1], *(rows[1:] if cut == 1 else []), later]
    torn = spool.corrupt_file.read_bytes() if spool.corrupt_file.exists() else b""
    assert torn == (b"" if cut == 1 else encode(rows[1])[:-cut] + b"\n")
    spool.close()


def test_corrupt_lines_are_moved_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [make_record() for _ in range(3)]
    spool = Spool(tmp_path)
    spool.append([encode(row) for row in rows])
    spool.close()
    [segment] = segments(tmp_path)
    lines = segment.read_bytes().splitlines(keepends=True)
    spoiled = lines[1].replace(b"mention", b"mansion")
    segment.write_bytes(lines[0] + spoiled + b"\0\0\0\n" + lines[2])
    spool = Spool(tmp_path)
    batch = spool.read(10)
    spool.forget()

    assert batch == ([rows[0], rows[2]], 2)
    assert spool.rows == 0
    assert spool.corrupt_file.read_bytes() == spoiled + b"\0\0\0\n"
    told = f"spool: corrupt lines in {segment}: 2, the first is line 2 (checksum differs), moved to "
    assert caplog.messages == [f"{told}{spool.corrupt_file}"]
    spool.close()


def test_a_spool_that_goes_and_comes_back_loses_no_file(tmp_path: Path) -> None:
    directory, elsewhere = tmp_path / "spool", tmp_path / "elsewhere"
    directory.mkdir()
    row = make_record()
    (directory / "000000000001.jsonl").write_bytes(encode(row))
    spool = Spool(directory)
    ended = threading.Event()

    def come_and_go() -> None:
        while not ended.is_set():
            directory.rename(elsewhere)
            elsewhere.rename(directory)

    other = threading.Thread(target=come_and_go)
    other.start()
    try:
        for _ in range(5000):
            with contextlib.suppress(SpoolError):
                assert spool.read(1).records == [row]
    finally:
        ended.set()
        other.join()
    assert spool.rows == 1
    spool.close()


def test_a_file_full_of_corrupt_lines_is_told_in_two(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    segment = tmp_path / "000000000001.jsonl"
    rubbish = [b"rubbish %d\n" % number for number in range(100)]
    row, later = make_record(), make_record()
    segment.write_bytes(encode(row) + b"".join(rubbish))
    spool = Spool(tmp_path)
    spool.append([encode(later)])
    batches = []
    while spool.rows:
        batches.append(spool.read(30))
        spool.forget()

    assert [each for batch in batches for each in batch.records] == [row, later]
    assert [batch.corrupt for batch in batches] == [29, 30, 30, 11, 0]
    assert spool.corrupt_file.read_bytes() == b"".join(rubbish)
    told = f"spool: corrupt lines in {segment}: 29, the first is line 2 (torn, or not a line of a spool)"
    assert caplog.messages == [
        f"{told}, moved to {spool.corrupt_file}",
        f"spool: corrupt lines in {segment}: 100 in all, moved to {spool.corrupt_file}",
    ]
    spool.close()


def test_a_corrupt_line_that_cannot_be_moved_is_logged_in_full(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "000000000001.jsonl").write_bytes(b"rubbish\n")
    (tmp_path / "corrupt.jsonl").mkdir()
    spool = Spool(tmp_path)

    assert spool.read(10) == ([], 1)
    assert "b'rubbish\\n'" in caplog.text
    spool.close()


def test_an_empty_left_over_segment_goes(tmp_path: Path) -> None:
    """A crash between making the file and writing to it."""
    (tmp_path / "000000000001.jsonl").touch()
    spool = Spool(tmp_path)
    row = make_record()
    spool.append([encode(row)])

    assert drain(spool) == [row]
    assert segments(tmp_path) == []
    spool.close()


def test_rejected_rows_can_be_read_and_moved_back(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    row = make_record()
    spool.set_aside(encode(row, "value too long"))
    line = spool.rejected_file.read_bytes()

    assert b'"reason":"value too long"' in line
    assert decode(line) == row
    spool.close()


def test_a_torn_rejected_line_does_not_spoil_the_next(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    first, second = make_record(), make_record()
    spool.rejected_file.write_bytes(encode(first)[:40])
    spool.set_aside(encode(second))

    torn, whole = spool.rejected_file.read_bytes().splitlines()
    assert torn == encode(first)[:40]
    assert decode(whole) == second
    spool.close()


def test_two_spools_on_one_directory(tmp_path: Path) -> None:
    first = Spool(tmp_path)

    with pytest.raises(SpoolError, match=f"{tmp_path} is in use by another process"):
        Spool(tmp_path)

    first.close()
    Spool(tmp_path).close()


def test_two_processes_on_one_directory(tmp_path: Path) -> None:
    first = Spool(tmp_path)
    code = "import sys, pathlib; from relay.records.spool import Spool; Spool(pathlib.Path(sys.argv[1]))"
    second = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False
    )

    assert second.returncode == 1
    assert f"spool {tmp_path} is in use by another process" in second.stderr
    first.close()


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(SpoolError, match="file"):
        Spool(tmp_path / "file" / "spool")


def test_a_segment_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "000000000001.jsonl").mkdir()

    with pytest.raises(SpoolError, match="directory"):
        Spool(tmp_path)
    (tmp_path / "000000000001.jsonl").rmdir()
    Spool(tmp_path).close()  # the lock was given back


def test_a_directory_that_vanished(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    spool.append([encode(make_record())])
    for path in spool.directory.iterdir():
        path.unlink()
    spool.directory.rmdir()

    with pytest.raises(SpoolError):
        spool.read(1)
    with pytest.raises(SpoolError):
        spool.set_aside(encode(make_record()))
    with pytest.raises(SpoolError):
        spool.append([encode(make_record())])
    spool.close()


def failing_call(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next `os.<call>` fail as a dying disk makes it fail; the ones after it work."""
    real = getattr(os, call)

    def fail(*arguments: int) -> None:
        monkeypatch.setattr(os, call, real)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, call, fail)


def failing(*arguments: object) -> None:
    """As `os.<call>` of a disk that has died."""
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_rows_are_synced_before_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[str, int]] = []
    spool = Spool(tmp_path)
    fsync, fdatasync = os.fsync, os.fdatasync

    def watch_fsync(file: int) -> None:
        assert stat.S_ISDIR(os.fstat(file).st_mode)
        synced.append(("directory", 0))
        fsync(file)

    def watch_fdatasync(file: int) -> None:
        synced.append(("file", os.fstat(file).st_size))
        fdatasync(file)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(os, "fdatasync", watch_fdatasync)
    line = encode(make_record())
    spool.append([line, line])
    spool.append([line])

    assert synced == [("file", spool_module.RESERVE)] * 2  # the size was there before the rows
    spool.close()


def test_a_failed_sync_takes_only_its_own_rows_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path)
    before, failed, after = make_record(), make_record(), make_record()
    spool.append([encode(before)])
    with monkeypatch.context() as disk:
        disk.setattr(os, "fdatasync", failing)
        with pytest.raises(SpoolError, match="Input/output error"):
            spool.append([encode(failed)])
    spool.append([encode(after)])

    assert spool.rows == 2
    assert len(segments(tmp_path)) == 2  # a file that failed to sync is not written to again
    assert drain(spool) == [before, after]
    spool.close()


@pytest.mark.parametrize("call", ["pwrite", "fdatasync"])
def test_a_failed_first_write_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    spool = Spool(tmp_path)
    with monkeypatch.context() as disk:
        disk.setattr(os, call, failing)
        with pytest.raises(SpoolError):
            spool.append([encode(make_record())])

    assert segments(tmp_path) == []
    assert spool.rows == 0
    assert spool.reserve.free == 0
    spool.close()


@pytest.mark.parametrize("call", ["pwrite", "fdatasync"])
def test_the_spare_takes_over_what_the_first_could_not_keep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    spool = Spool(tmp_path)
    rows = [make_record() for _ in range(3)]
    spool.append([encode(rows[0])])
    failing_call(call, monkeypatch)
    spool.append([encode(rows[1])])
    assert not spool.complete
    spool.provide()
    assert spool.complete
    spool.append([encode(rows[2])])

    assert len(segments(tmp_path)) == 2  # a file that failed to sync is not written to again
    assert drain(spool) == rows
    spool.close()


def test_rows_that_cannot_be_taken_back_are_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said to have failed, and there all the same: the store is idempotent."""
    spool = Spool(tmp_path)
    rows = [make_record(), make_record()]
    spool.append([encode(rows[0])])
    failing_call("fdatasync", monkeypatch)
    failing_call("ftruncate", monkeypatch)
    spool.append([encode(rows[1])])
    spool.close()
    spool = Spool(tmp_path)

    assert drain(spool, 10) == [*rows, rows[1]]
    assert spool.rows == 0
    assert segments(tmp_path) == []
    spool.close()


def test_a_failed_sync_leaves_no_rejected_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path)
    row = make_record()
    spool.set_aside(encode(row))
    failing_call("fdatasync", monkeypatch)
    with pytest.raises(SpoolError, match="rejected"):
        spool.set_aside(encode(make_record()))

    assert spool.rejected_file.read_bytes() == encode(row)
    spool.close()


def test_a_segment_that_vanishes_does_not_stop_the_rest(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    rows = [make_record(), make_record()]
    spool.append([encode(rows[0])])
    assert spool.read(10).records == rows[:1]
    segments(tmp_path)[0].unlink()
    spool.append([encode(rows[1])])  # a file that nobody can open any more is no place for it
    spool.forget()

    assert drain(spool) == rows[1:]
    spool.close()


@pytest.mark.parametrize("closed", [False, True])
def test_rows_behind_a_segment_that_somebody_has_removed_come(
    closed: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spool = Spool(tmp_path)
    rows = [make_record() for _ in range(5)]
    spool.append([encode(row) for row in rows[:3]])
    assert spool.read(1).records == rows[:1]
    spool.forget()
    segments(tmp_path)[0].unlink()
    if closed:  # it was found out when the next rows came
        spool.append([encode(row) for row in rows[3:]])

    batch = spool.read(10)

    assert batch == ([], 2)
    assert "000000000001.jsonl was removed under the relay; rows that waited in it: 2" in caplog.text
    assert spool.rows == (2 if closed else 0)
    spool.forget()
    if not closed:
        spool.append([encode(row) for row in rows[3:]])
    assert drain(spool) == rows[3:]
    spool.provide()
    assert spool.reserve.free == RESERVE
    spool.close()


@pytest.mark.parametrize("left", ["nothing", "rows", "a part of a row"])
@pytest.mark.parametrize("closed", [False, True])
def test_rows_behind_a_segment_that_somebody_has_cut_short_come(
    closed: bool, left: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As `> FILE` does, or a rotation of logs that takes it for one."""
    spool = Spool(tmp_path)
    rows = [make_record() for _ in range(5)]
    lines = [encode(row) for row in rows]
    spool.append(lines[:3])
    if closed:
        spool.close()
        spool = Spool(tmp_path)
    kept = {"nothing": 0, "rows": len(lines[0]), "a part of a row": len(lines[0]) + 9}[left]
    os.truncate(segments(tmp_path)[0], kept)

    found, corrupt = [], 0
    while spool.rows:
        batch = spool.read(10)
        found += batch.records
        corrupt += batch.corrupt
        spool.forget()

    assert found == (rows[:1] if kept else [])
    assert len(found) + corrupt == 3
    assert "000000000001.jsonl was cut short under the relay; rows that waited in it: " in caplog.text
    spool.append(lines[3:])
    assert drain(spool) == rows[3:]
    spool.close()


def test_all_segments_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "SEGMENT_SIZE", 1)
    spool = Spool(tmp_path)
    for _ in range(3):
        spool.append([encode(make_record())])
        spool.provide()
    for path in segments(tmp_path):
        path.unlink()

    assert spool.read(10) == ([], 3)
    assert spool.rows == 0
    spool.close()


def test_nothing_to_read_and_nothing_to_forget(tmp_path: Path) -> None:
    spool = Spool(tmp_path)

    assert spool.read(10) == ([], 0)
    spool.forget()
    assert spool.rows == 0
    spool.close()


FULL_DISK = """
import pathlib, resource, signal, sys
from relay.records.spool import Spool, SpoolError
from relay.records.spool_line import encode
from tests.support.rows import make_record

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit then fails with EFBIG, in part
spool = Spool(pathlib.Path(sys.argv[1]))
limit = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
failures = 0
while failures < 3:
    row = make_record()
    try:
        spool.append([encode(row)])
    except SpoolError:
        failures += 1
        if failures == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    else:
        print(row.task_id, flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
row = make_record()
spool.append([encode(row)])
print(row.task_id, flush=True)
"""


@pytest.mark.parametrize("limit", [700, 5_000, 20_000])
def test_a_full_disk_leaves_whole_rows_only(tmp_path: Path, limit: int) -> None:
    """The limit cuts a write in its middle: nothing of it may stay, and rows go on once there is space."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path), str(limit)]
    said = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout.split()
    spool = Spool(tmp_path)

    assert len(said) >= 2
    assert spool.rows == len(said)
    assert [str(row.task_id) for row in drain(spool)] == said
    assert not spool.corrupt_file.exists()
    spool.close()


KILLED = """
import pathlib, sys
from relay.records.spool import Spool
from relay.records.spool_line import encode
from tests.support.rows import make_record

spool = Spool(pathlib.Path(sys.argv[1]))
while True:
    rows = [make_record("x" * size + "@example.com") for size in (1, 1000, 10000)]
    spool.append([encode(row) for row in rows])
    for row in rows:
        print(row.task_id, flush=True)
"""


@pytest.mark.parametrize("after", [1, 10, 200])
def test_sigkill_loses_nothing_that_was_said(tmp_path: Path, after: int) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(after)]
        process.kill()
        said += process.stdout.readlines()
    spool = Spool(tmp_path)  # the lock went with the process
    found = [row.task_id for row in drain(spool, 500)]

    assert {UUID(line.strip()) for line in said if line.endswith("\n")} <= set(found)
    assert len(found) == len(set(found))
    spool.close()


def crashed(directory: Path, octets: bytes, behind: int = 5000) -> Spool:
    """Open a spool that a crash has left with these octets in a segment, and zeros behind them."""
    (directory / "000000000001.jsonl").write_bytes(octets + bytes(behind))
    return Spool(directory, reserve=0)


def test_a_crash_at_every_octet_of_the_last_row(tmp_path: Path) -> None:
    """Its space was taken ahead: zeros stand where the rest of it would be."""
    rows = [make_record(), make_record()]
    first, second = (encode(row) for row in rows)
    for cut in range(len(second) + 1):
        directory = tmp_path / str(cut)
        directory.mkdir()
        spool = crashed(directory, first + second[:cut])
        whole = cut >= len(second) - 1
        assert spool.rows == (2 if cut else 1)
        assert drain(spool, 10) == rows[: 1 + whole]
        torn = spool.corrupt_file.read_bytes() if spool.corrupt_file.exists() else b""
        assert torn == (b"" if whole or not cut else second[:cut] + b"\n")
        spool.close()


def test_a_block_of_zeros_among_the_rows(tmp_path: Path) -> None:
    """A disk that has lost a block: the rows around it are there, what is left of theirs is set aside."""
    rows = [make_record() for _ in range(5)]
    octets = bytearray(b"".join(encode(row) for row in rows))
    begin, length = len(encode(rows[0])) + 10, 3 * len(encode(rows[0]))
    octets[begin : begin + length] = bytes(length)
    spool = crashed(tmp_path, bytes(octets))

    assert drain(spool, 10) == [rows[0]]
    assert len(spool.corrupt_file.read_bytes().strip(b"\n").splitlines()) == 1
    spool.close()


def test_rows_behind_a_lost_block_come(tmp_path: Path) -> None:
    rows = [make_record() for _ in range(3)]
    first, second, third = (encode(row) for row in rows)
    spool = crashed(tmp_path, first + bytes(len(second) - 1) + b"\n" + third)

    assert drain(spool, 10) == [rows[0], rows[2]]
    spool.close()


def test_a_row_of_a_later_version_is_kept_for_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    later = spool_line("limit", b'{"task_id":"1","limit":"mentions"}')
    row = make_record()
    spool = crashed(tmp_path, later + encode(row))

    assert spool.read(10) == ([row], 1)
    assert spool.rejected_file.read_bytes() == later
    assert not spool.corrupt_file.exists()
    assert "not a limit of this version" in caplog.text
    spool.close()


def test_no_space_at_start_and_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as disk:
        disk.setattr(os, "posix_fallocate", failing)
        spool = Spool(tmp_path)
        assert spool.shortage == f"spool {tmp_path}: Input/output error"
        assert (spool.reserve.free, spool.complete) == (0, False)
    spool.provide()

    assert spool.complete
    assert not spool.reserve.promise(spool_module.RESERVE + 1)
    assert spool.reserve.promise(spool_module.RESERVE)
    spool.close()


def test_more_than_usual_is_not_to_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is usual is there all the same."""
    spool = Spool(tmp_path)
    rows = [make_record()]
    spool.append([encode(row) for row in rows])
    fallocate = os.posix_fallocate

    def small(file: int, offset: int, length: int) -> None:
        if offset + length > 2 * spool_module.RESERVE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fallocate(file, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", small)
    with pytest.raises(SpoolError, match="No space left"):
        spool.provide(4 * spool_module.RESERVE)

    assert spool.reserve.free == spool_module.RESERVE
    assert spool.complete
    spool.close()


def test_a_spare_that_cannot_keep_what_is_promised_takes_nothing_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_module, "SEGMENT_SIZE", 1)
    spool = Spool(tmp_path)
    fallocate = os.posix_fallocate

    def the_last(file: int, offset: int, length: int) -> None:
        fallocate(file, offset, length)
        disk.setattr(os, "posix_fallocate", failing)

    with monkeypatch.context() as disk:
        disk.setattr(os, "posix_fallocate", the_last)
        with pytest.raises(SpoolError):
            spool.provide(4 * spool_module.RESERVE)
    assert spool.reserve.promise(3 * spool_module.RESERVE)
    for _ in range(2):
        spool.append([encode(make_record())])

    assert spool.reserve.free >= spool.reserve.promised
    spool.close()


def test_what_has_waited_for_longer_than_limits_look_back_is_not_taken_into_memory(tmp_path: Path) -> None:
    row = make_record()
    old, new = (replace(row, task_id=uuid7(), sent_at=row.sent_at + timedelta(days=day)) for day in (-1, 1))
    spool = Spool(tmp_path)
    spool.append([encode(old), encode(Settled(old.task_id)), encode(new)])
    assert entries_waiting(tmp_path, row.sent_at) == [new]
    spool.close()
