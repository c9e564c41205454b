"""A line of a spool says what was written, or is seen to be something else."""

from __future__ import annotations

import json
from datetime import UTC

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.records.identity import uuid7
from relay.records.model import Doubt, Entry, Record, Settled
from relay.records.spool_line import CorruptLineError, decode, encode
from tests.support.rows import SENT_AT, make_record, spool_line

text = st.text(st.characters(exclude_categories=["Cs"]))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=10,
)
records = st.builds(
    Record,
    task_id=st.uuids(),
    task_type=text,
    sender=text,
    client=text,
    sent_at=st.datetimes(timezones=st.just(UTC)),
    upstream=text,
    upstream_reply=text,
    size=st.integers(min_value=0),
    duration_ms=st.integers(min_value=0),
    recipients=st.lists(text, max_size=4).map(tuple),
    client_task_id=st.none() | text,
    message_id=st.none() | text,
    data=st.dictionaries(text, json_values, max_size=4),
)


doubts = st.builds(
    Doubt,
    task_id=st.uuids(),
    task_type=text,
    sender=text,
    client=text,
    since=st.datetimes(timezones=st.just(UTC)),
    upstream=text,
    reason=text,
    size=st.integers(min_value=0),
    duration_ms=st.integers(min_value=0),
    recipients=st.lists(text, max_size=4).map(tuple),
    client_task_id=st.none() | text,
    message_id=st.none() | text,
    data=st.dictionaries(text, json_values, max_size=4),
)
entries = records | doubts | st.builds(Settled, st.uuids())


@given(entries, st.none() | text)
def test_any_entry_survives_the_line(entry: Entry, reason: str | None) -> None:
    line = encode(entry, reason)

    assert line.count(b"\n") == 1
    assert isinstance(json.loads(line), dict)
    assert decode(line) == entry


def test_a_line_says_its_kind() -> None:
    task_id = uuid7()

    assert b'"record":{' in encode(make_record())
    assert encode(Settled(task_id)).endswith(b'"settled":{"task_id":"%b"}}\n' % str(task_id).encode())


def test_a_line_of_an_older_version_is_read() -> None:
    line = (
        b'{"crc32":"88cff8ac","record":{"task_id":"01944f8a-5b1d-7000-8000-000000000001","task_type":"mention",'
        b'"sender":"a@example.com","client":"127.0.0.1","sent_at":"2026-01-02T03:04:05.678901+00:00",'
        b'"upstream":"primary","upstream_reply":"250 2.0.0 Ok","size":1234,"duration_ms":56,'
        b'"recipients":["b@example.org"],"client_task_id":null,"message_id":null,"data":{}}}\n'
    )

    record = decode(line)

    assert isinstance(record, Record)
    assert (record.sender, record.recipients, record.sent_at) == (
        "a@example.com",
        ("b@example.org",),
        SENT_AT,
    )


def test_what_has_waited_may_be_in_doubt_meanwhile() -> None:
    record = decode(encode(make_record()))

    assert isinstance(record, Record)
    assert record.doubted


@given(entries, st.data())
def test_a_line_cut_anywhere_is_recognised(record: Entry, data: st.DataObject) -> None:
    line = encode(record)
    cut = data.draw(st.integers(min_value=0, max_value=len(line) - 2))

    with pytest.raises(CorruptLineError):
        decode(line[:cut])


@given(entries, st.data())
def test_a_flipped_bit_is_recognised(record: Entry, data: st.DataObject) -> None:
    line = bytearray(encode(record))
    bit = data.draw(st.integers(min_value=0, max_value=8 * (len(line) - 1) - 1))
    line[bit // 8] ^= 1 << bit % 8

    try:
        decoded = decode(bytes(line))
    except CorruptLineError:
        return
    assert decoded == record  # the case of a hexadecimal digit: the record is untouched


def test_a_line_that_is_no_record_is_corrupt() -> None:
    """As after a downgrade: the checksum holds, the content is not a record."""
    other = encode(make_record()).replace(b'"recipients"', b'"receivers_"')
    octets = other.split(b'"record":', 1)[1][:-2]

    with pytest.raises(CorruptLineError, match="not a record"):
        decode(spool_line("record", octets))
