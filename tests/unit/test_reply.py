"""Replies as values, and their strict parser."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.reply import MAX_LINE, MAX_REPLY, MalformedReplyError, Reply, ReplyParser


def parse(octets: bytes) -> list[Reply]:
    return ReplyParser().feed(octets)


def test_an_own_reply_derives_the_class_of_its_enhanced_code() -> None:
    assert Reply.own(451, "4.2", "text").wire == b"451 4.4.2 text\r\n"
    assert Reply.own(550, "7.1", "text").wire == b"550 5.7.1 text\r\n"
    assert Reply.own(250, "0.0", "OK").wire == b"250 2.0.0 OK\r\n"


def test_own_text_cannot_make_a_second_line() -> None:
    assert Reply.own(451, "3.0", "caf\u00e9 \x1b[31m").wire == b"451 4.3.0 caf? ?[31m\r\n"


@pytest.mark.parametrize(
    ("octets", "text"),
    [
        (b"250 ok\r\n", "250 ok"),
        (b"250\r\n", "250 "),
        (b"250 \r\n", "250 "),
        (b"250-one\r\n250-two\r\n250 three\r\n", "250 one\ntwo\nthree"),
        (b"250-one\r\n250\r\n", "250 one\n"),
        (b"550 5.1.1 no \xff\xfe user\r\n", "550 5.1.1 no ?? user"),
        (b"250 tab\there\x1b\x7f\r\n", "250 tab\there??"),
    ],
)
def test_replies_are_taken_as_they_are_said(octets: bytes, text: str) -> None:
    (reply,) = parse(octets)
    assert str(reply) == text
    assert reply.wire.endswith(b"\r\n")


@pytest.mark.parametrize(
    "octets",
    [
        b"25 two digits\r\n",
        b"2500 four\r\n",
        b"+250 plus\r\n",
        b" 250 blank\r\n",
        b"2_50 x\r\n",
        b"250_ok\r\n",
        b"250ok\r\n",
        b"150 preliminary\r\n",
        b"999 high\r\n",
        b"650 high\r\n",
        b"\r\n",
        b"250 bare\n",
        b"550 no\r250 ok\r\n",
        b"250 nul\0\r\n",
        b"250-one\r\n550 two codes\r\n",
        b"250-one\r\n251-two codes\r\n",
        b"HTTP/1.1 400\r\n",
        b"250 " + b"x" * MAX_LINE + b"\r\n",
    ],
)
def test_what_is_not_a_reply_is_refused_however_it_is_cut(octets: bytes) -> None:
    with pytest.raises(MalformedReplyError):
        parse(octets)
    parser = ReplyParser()
    with pytest.raises(MalformedReplyError):
        for octet in octets:
            parser.feed(bytes((octet,)))


def test_a_reply_without_end_is_bounded() -> None:
    parser = ReplyParser()
    with pytest.raises(MalformedReplyError):
        for _ in range(MAX_REPLY // 8):
            parser.feed(b"250-xxx\r\n")
    parser = ReplyParser()
    with pytest.raises(MalformedReplyError):
        parser.feed(b"250 " + b"x" * (MAX_LINE + 1))


def test_pending_tells_a_reply_that_has_begun() -> None:
    parser = ReplyParser()
    assert not parser.pending
    assert parser.feed(b"250-one\r\n") == []
    assert parser.pending
    assert [str(reply) for reply in parser.feed(b"250 two\r\n354")] == ["250 one\ntwo"]
    assert parser.pending
    assert [reply.code for reply in parser.feed(b" go\r\n")] == [354]
    assert not parser.pending


def test_replies_that_are_the_same_are_as_many_as_came() -> None:
    wire = (
        b"250 ok\r\n" * 5 + b"250 ok, too\r\n" + b"250 ok\r\n" * 2 + b"250-ok\r\n250 ok\r\n" + b"354 go\r\n"
    )
    expected = ["250 ok"] * 5 + ["250 ok, too"] + ["250 ok"] * 2 + ["250 ok\nok", "354 go"]
    for cut in range(len(wire)):
        parser = ReplyParser()
        replies = parser.feed(wire[:cut]) + parser.feed(wire[cut:])
        assert [str(reply) for reply in replies] == expected
        assert not parser.pending


def test_a_421_becomes_451_on_every_line() -> None:
    (reply,) = parse(b"421-4.3.2 closing\r\n421 4.3.2 421 really\r\n")
    assert reply.recoded(451).wire == b"451-4.3.2 closing\r\n451 4.3.2 421 really\r\n"
    assert reply.recoded(451).code == 451


def test_what_is_kept_of_a_long_reply_are_its_first_lines() -> None:
    usual = parse(b"550-5.1.1 no\r\n550 5.1.1 such user\r\n")[0]
    assert usual.brief() is usual
    lines = [b"550-%02d %b\r\n" % (number, b"x" * 193) for number in range(99)]
    (long,) = parse(b"".join(lines) + b"550 end\r\n")
    brief = long.brief()
    assert brief.wire == b"".join(lines[:19]) + b"550 19 " + b"x" * 193 + b" ...\r\n"
    assert (brief.code, brief.positive) == (550, False)
    assert parse(brief.wire) == [brief]


TEXT = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=60)


@given(
    st.integers(200, 599), st.lists(TEXT, min_size=1, max_size=5), st.lists(st.integers(0, 400), max_size=6)
)
def test_what_is_written_is_read_back_however_it_is_cut(code: int, lines: list[str], cuts: list[int]) -> None:
    wire = Reply.plain(code, *lines).wire * 2
    parser = ReplyParser()
    bounds = sorted({0, len(wire), *(cut for cut in cuts if cut < len(wire))})
    replies = [reply for start, stop in itertools.pairwise(bounds) for reply in parser.feed(wire[start:stop])]
    assert [(reply.code, reply.lines) for reply in replies] == [(code, lines)] * 2


@given(st.binary(max_size=300))
def test_any_octets_give_replies_or_the_one_error(octets: bytes) -> None:
    parser = ReplyParser()
    try:
        replies = parser.feed(octets)
    except MalformedReplyError:
        return
    for reply in replies:
        assert 200 <= reply.code <= 599
        assert all(line[:3] == b"%d" % reply.code for line in reply.wire.split(b"\r\n")[:-1])
        assert not set(reply.wire) - set(range(0x20, 0x7F)) - set(b"\t\r\n")
