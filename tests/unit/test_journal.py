"""What a killed process has left is found, whole or not at all, and nothing else is."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import stat
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.records import journal as journal_module
from relay.records.identity import uuid7
from relay.records.journal import KILLED, ROOM, SLOT_SIZE, Journal, line_of
from relay.records.model import Doubt
from relay.records.spool import SpoolError

SINCE = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


def make_doubt(**changes: Any) -> Doubt:
    values: dict[str, Any] = {
        "task_id": uuid7(),
        "task_type": "mention",
        "sender": "a@example.com",
        "client": "127.0.0.1",
        "since": SINCE,
        "upstream": "primary",
        "reason": KILLED,
        "size": 1234,
        "duration_ms": 56,
        "recipients": ("b@example.org", "ü@example.org"),
        "client_task_id": "job-1",
        "message_id": "<m@example.com>",
        "data": {"tags": ["x"]},
    }
    return Doubt(**(values | changes))


def found_again(doubt: Doubt) -> Doubt:
    """The doubt as the next start gives it."""
    return Doubt(
        **{name: getattr(doubt, name) for name in doubt.__dataclass_fields__ if name != "data"},
        data={"client_reply": None} | doubt.data | {"journal": True},
    )


def entered(journal: Journal, doubt: Doubt) -> int:
    slot = journal.enter(line_of(doubt))
    assert slot is not None
    return slot


def left_in(directory: Path) -> list[Doubt]:
    """What the next start would find, in a copy: the file stays as it is."""
    copy = directory / "copy"
    copy.mkdir()
    shutil.copyfile(directory / "journal", copy / "journal")
    journal = Journal(copy, 0)
    found = [each.doubt for each in journal.found]
    journal.close()
    shutil.rmtree(copy)
    return found


# ---- what is entered is found


def test_a_message_without_an_outcome_is_found_whole(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 3)
    assert journal.found == []
    doubt = make_doubt()
    entered(journal, doubt)
    journal.close()

    journal = Journal(tmp_path, 3)
    [(slot, found)] = journal.found
    assert found == found_again(doubt)
    assert (journal.slots, journal.in_use) == (3, 1)
    journal.free(slot)
    journal.close()
    assert left_in(tmp_path) == []


def test_what_is_entered_is_there_without_a_close(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 2)
    doubt = make_doubt()
    slot = entered(journal, doubt)
    assert left_in(tmp_path) == [found_again(doubt)]
    journal.free(slot)
    assert left_in(tmp_path) == []
    journal.close()


def test_what_was_found_stays_until_it_is_freed(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 1)
    first = make_doubt()
    entered(journal, first)
    for _ in range(3):  # killed again before it was kept elsewhere
        journal.close()
        journal = Journal(tmp_path, 1)
        assert [each.doubt for each in journal.found] == [found_again(first)]
    second = make_doubt()
    entered(journal, second)
    assert {each.task_id for each in left_in(tmp_path)} == {first.task_id, second.task_id}
    journal.close()


def test_what_its_client_heard_before_the_end_of_data_stays(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 1)
    entered(journal, make_doubt(data={"client_reply": "451 4.4.2 late", "headers": {"X": ["a", "b"]}}))
    (found,) = left_in(tmp_path)
    assert found.data == {"client_reply": "451 4.4.2 late", "headers": {"X": ["a", "b"]}, "journal": True}
    journal.close()


def test_times_come_back_in_utc(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 1)
    entered(journal, make_doubt(since=SINCE.astimezone(timezone(timedelta(hours=5)))))
    (found,) = left_in(tmp_path)
    assert (found.since, found.since.tzinfo) == (SINCE, UTC)
    journal.close()


def test_only_the_owner_may_read_it(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 1)
    assert stat.S_IMODE(journal.path.stat().st_mode) == 0o600
    journal.close()


text = st.text(max_size=40)


@given(
    st.builds(
        make_doubt,
        task_id=st.uuids(),
        sender=text,
        client=text,
        recipients=st.lists(text, max_size=3).map(tuple),
        client_task_id=st.none() | text,
        size=st.integers(min_value=0),
        data=st.dictionaries(text, text | st.integers() | st.none(), max_size=3),
    )
)
def test_any_text_comes_back(tmp_path_factory: pytest.TempPathFactory, doubt: Doubt) -> None:
    directory = tmp_path_factory.mktemp("journal")
    journal = Journal(directory, 1)
    entered(journal, doubt)
    assert left_in(directory) == [found_again(doubt)]
    journal.close()
    shutil.rmtree(directory)


# ---- what does not fit


def test_recipients_that_do_not_fit_are_cut_and_their_number_stays(tmp_path: Path) -> None:
    recipients = tuple(f"{number:04}@example.org" for number in range(2000))
    refused = [{"recipient": "x@example.org", "reply": "550 5.1.1 " + "no " * 200}] * 100
    line = line_of(make_doubt(recipients=recipients, data={"refused": refused, "client_address": "::1"}))
    assert ROOM - 20 < len(line) <= ROOM
    journal = Journal(tmp_path, 1)
    assert journal.enter(line) is not None
    (found,) = left_in(tmp_path)
    assert found.recipients == recipients[: len(found.recipients)]
    assert len(found.recipients) > 700
    assert found.data == {
        "client_reply": None,
        "client_address": "::1",
        "recipient_count": 2000,
        "journal": True,
    }
    journal.close()


def test_a_message_that_just_fits_is_kept_whole(tmp_path: Path) -> None:
    doubt = make_doubt()
    doubt = make_doubt(task_id=doubt.task_id, sender=doubt.sender + "x" * (ROOM - len(line_of(doubt))))
    assert len(line_of(doubt)) == ROOM
    journal = Journal(tmp_path, 1)
    entered(journal, doubt)
    assert left_in(tmp_path) == [found_again(doubt)]
    journal.close()


@pytest.mark.parametrize("name", ["headers", "tags", "refused"])
def test_what_takes_much_room_goes_before_recipients(tmp_path: Path, name: str) -> None:
    data = {name: ["x" * ROOM], "client_address": "::1"}
    journal = Journal(tmp_path, 1)
    entered(journal, make_doubt(data=data))
    (found,) = left_in(tmp_path)
    assert found.recipients == make_doubt().recipients
    assert found.data == {
        "client_reply": None,
        "client_address": "::1",
        "recipient_count": 2,
        "journal": True,
    }
    journal.close()


@pytest.mark.parametrize("recipients", [(), ("b@example.org",), ("x" * ROOM,), ("b@example.org",) * 1500])
@pytest.mark.parametrize("sender", ["a@example.com", "\U0001f989" * 3000])
@pytest.mark.parametrize("tag", ["t", "\\" * 9000])
def test_whatever_is_entered_fits(tmp_path: Path, recipients: tuple[str, ...], sender: str, tag: str) -> None:
    doubt = make_doubt(
        recipients=recipients, sender=sender, message_id=sender, data={"tags": [tag], "a": tag}
    )
    line = line_of(doubt)
    assert len(line) <= ROOM
    journal = Journal(tmp_path, 2)
    journal.enter(line)
    journal.enter(line_of(make_doubt()))
    found = left_in(tmp_path)
    assert len(found) == 2
    (found_doubt,) = [each for each in found if each.task_id == doubt.task_id]
    assert doubt.sender.startswith(found_doubt.sender)
    assert found_doubt.data.get("recipient_count", len(found_doubt.recipients)) == len(recipients)
    journal.close()


# ---- torn


def test_a_kill_at_any_octet_of_an_entry_makes_no_doubt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    line = line_of(make_doubt())
    journal = Journal(tmp_path, 1)
    journal.enter(line)
    journal.close()
    whole = journal.path.read_bytes()
    payload_first = [*range(8, 8 + len(line)), *range(8)]

    torn = bytearray(len(whole))
    for count, at in enumerate(payload_first):
        journal.path.write_bytes(torn)
        caplog.clear()
        again = Journal(tmp_path, 1)
        assert again.found == []
        assert again.in_use == 0
        # An octet of the header that is zero by chance leaves the slot as free as it was.
        assert bool(caplog.records) == any(torn[:8])
        again.close()
        assert journal.path.read_bytes()[:8] == bytes(8), count
        torn[at] = whole[at]
    assert bytes(torn) == whole


def test_a_kill_at_any_octet_of_the_freeing_makes_no_doubt(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 1)
    entered(journal, make_doubt())
    journal.close()
    whole = journal.path.read_bytes()
    for count in range(9):
        journal.path.write_bytes(bytes(count) + whole[count:])
        again = Journal(tmp_path, 1)
        assert len(again.found) == (whole[:count] == bytes(count))
        again.close()


def test_any_octet_that_differs_is_found_out(tmp_path: Path) -> None:
    line = line_of(make_doubt())
    journal = Journal(tmp_path, 1)
    journal.enter(line)
    journal.close()
    whole = journal.path.read_bytes()
    for at in range(8 + len(line)):
        octets = bytearray(whole)
        octets[at] ^= 0x20
        journal.path.write_bytes(octets)
        again = Journal(tmp_path, 1)
        assert again.found == [], at
        again.close()


@pytest.mark.parametrize("line", [b"[]", b"{}", b"rubbish", b"[" * 10_000, b'["x",2,3,4,5,6,7,8,9,10,11,12]'])
def test_what_is_no_message_is_freed_and_said(
    tmp_path: Path, line: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(tmp_path, 2)
    journal.enter(line)
    doubt = make_doubt()
    entered(journal, doubt)
    journal.close()
    journal = Journal(tmp_path, 2)
    assert [each.doubt for each in journal.found] == [found_again(doubt)]
    assert "slot 0 is torn" in caplog.text
    journal.close()


def test_a_file_of_any_size_is_taken(tmp_path: Path) -> None:
    doubt = make_doubt()
    journal = Journal(tmp_path, 3)
    entered(journal, doubt)
    journal.close()
    octets = journal.path.read_bytes()
    for size in (0, 1, SLOT_SIZE - 1, SLOT_SIZE, SLOT_SIZE + 1, 3 * SLOT_SIZE, 5 * SLOT_SIZE + 7):
        journal.path.write_bytes(octets[:size].ljust(size, b"\0"))
        again = Journal(tmp_path, 2)
        assert len(again.found) == (size >= SLOT_SIZE - 1)
        assert again.slots == max(2, -(-size // SLOT_SIZE))
        again.close()


# ---- slots


def test_the_slot_freed_last_is_used_next(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 4)
    line = line_of(make_doubt())
    slots = [journal.enter(line) for _ in range(3)]
    assert slots == [0, 1, 2]
    journal.free(0)
    journal.free(2)
    assert [journal.enter(line) for _ in range(3)] == [2, 0, 3]
    journal.close()


def test_it_grows_when_it_is_full_and_keeps_what_it_has(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 2)
    doubts = [make_doubt() for _ in range(50)]
    slots = [entered(journal, doubt) for doubt in doubts]
    assert sorted(slots) == list(range(50))
    assert journal.slots == 64
    assert {each.task_id for each in left_in(tmp_path)} == {doubt.task_id for doubt in doubts}
    for slot in slots[:49]:
        journal.free(slot)
    assert [each.task_id for each in left_in(tmp_path)] == [doubts[49].task_id]
    journal.close()


def test_it_begins_with_nothing_if_need_be(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 0)
    assert journal.slots == 0
    assert journal.refusal() is None
    doubt = make_doubt()
    entered(journal, doubt)
    assert left_in(tmp_path) == [found_again(doubt)]
    journal.close()


def test_its_blocks_are_taken_in_advance_also_those_of_a_file_with_holes(tmp_path: Path) -> None:
    (tmp_path / "journal").write_bytes(b"")
    os.truncate(tmp_path / "journal", 8 * SLOT_SIZE)
    journal = Journal(tmp_path, 10)
    taken = journal.path.stat()
    assert taken.st_size == 10 * SLOT_SIZE
    assert taken.st_blocks * 512 >= taken.st_size
    journal.close()


def test_after_the_close_a_slot_stays_for_the_next_start(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 1)
    slot = entered(journal, make_doubt())
    journal.close()
    journal.free(slot)
    assert len(left_in(tmp_path)) == 1


# ---- no room


class Disk:
    """What `posix_fallocate` finds: room, or none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = False
        self.asked = 0
        self._take: Callable[[int, int, int], None] = os.posix_fallocate
        monkeypatch.setattr(journal_module.os, "posix_fallocate", self._fallocate)
        monkeypatch.setattr(journal_module.time, "monotonic", lambda: self.now)
        self.now = 1000.0

    def _fallocate(self, file: int, begin: int, octets: int) -> None:
        self.asked += 1
        if self.full:
            if begin + octets > os.fstat(file).st_size:
                os.ftruncate(file, begin + octets // 2)  # some file systems leave what they could get
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._take(file, begin, octets)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def test_without_room_at_start_new_mail_is_refused_until_there_is_some(
    tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    disk.full = True
    journal = Journal(tmp_path, 4)
    assert journal.path.stat().st_size == 0
    for _ in range(10):
        refusal = journal.refusal()
        assert refusal is not None
        assert "No space left on device" in refusal
    assert disk.asked == 1  # not for every MAIL
    assert len(caplog.records) == 1
    assert journal.enter(line_of(make_doubt())) is None
    disk.full = False
    disk.now += 1.0
    assert journal.refusal() is None
    assert [record.levelno for record in caplog.records] == [logging.ERROR, logging.WARNING]
    entered(journal, make_doubt())
    assert len(left_in(tmp_path)) == 1
    journal.close()


def test_without_room_to_grow_it_goes_on_with_what_it_has(tmp_path: Path, disk: Disk) -> None:
    journal = Journal(tmp_path, 2)
    line = line_of(make_doubt())
    slots = [journal.enter(line), journal.enter(line)]
    disk.full = True
    assert journal.enter(line) is None
    assert journal.refusal() is not None
    assert journal.path.stat().st_size == 2 * SLOT_SIZE
    assert slots[0] is not None
    journal.free(slots[0])
    assert journal.refusal() is None
    assert journal.enter(line) == slots[0]
    disk.full = False
    assert len(left_in(tmp_path)) == 2
    journal.close()


def test_a_file_that_was_removed_takes_nothing_more_and_is_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(tmp_path, 1)
    journal.look()
    assert journal.refusal() is None
    journal.path.unlink()
    for _ in range(3):
        journal.look()
    assert "was removed while it was in use" in (journal.refusal() or "")
    assert len(caplog.records) == 1
    journal.close()


def test_a_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "journal").mkdir()
    with pytest.raises(SpoolError, match=r"journal: Is a directory"):
        Journal(tmp_path, 1)


def test_old_slots_whose_blocks_cannot_be_had_are_an_error_and_stay(tmp_path: Path, disk: Disk) -> None:
    journal = Journal(tmp_path, 1)
    entered(journal, make_doubt())
    journal.close()
    before = journal.path.read_bytes()
    disk.full = True
    with pytest.raises(SpoolError, match=r"journal: No space left"):
        Journal(tmp_path, 1)
    assert journal.path.read_bytes() == before


@settings(max_examples=50)
@given(st.data())
def test_a_journal_is_a_set_of_messages(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Against a model: entered, freed, killed, started again, in any order."""
    directory = tmp_path_factory.mktemp("journal")
    journal = Journal(directory, data.draw(st.integers(0, 3)))
    held: dict[int, UUID] = {}
    for _ in range(data.draw(st.integers(1, 30))):
        step = data.draw(st.sampled_from(["enter", "enter", "free", "kill"]))
        if step == "enter":
            doubt = make_doubt(sender="x" * data.draw(st.integers(0, 9000)))
            slot = entered(journal, doubt)
            assert slot not in held
            held[slot] = doubt.task_id
        elif step == "free" and held:
            slot = data.draw(st.sampled_from(sorted(held)))
            journal.free(slot)
            del held[slot]
        elif step == "kill":
            killed, journal = journal, Journal(directory, 1)
            killed.close()
            assert {slot: doubt.task_id for slot, doubt in journal.found} == held
        assert journal.in_use == len(held)
    journal.close()
    shutil.rmtree(directory)
