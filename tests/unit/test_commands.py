"""Command lines as values: what safety needs is checked, and not one octet is changed."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.session.commands import CommandError, is_text, mail_for, parse_bdat, parse_mail, parse_rcpt
from relay.upstream.capabilities import Capabilities

PATHS = [
    b"a@example.test",
    b"a..b@example.test",
    b"user+tag=x@example.test",
    b'"quoted string"@example.test',
    b'"a>b"@example.test',
    b'"a\\"b\\\\c"@example.test',
    b"@one.test,@two.test:user@example.test",
    b"user@[192.0.2.1]",
    b"user@[IPv6:2001:db8::1]",
    b"user%host@example.test",
    b"host!user",
    b"a@b@example.test",
    b"Postmaster",
    b"!#$%&'*+-/=?^_`{|}~@example.test",
    b"x" * 64 + b"@" + b"y" * 180,
]


@pytest.mark.parametrize("path", PATHS)
def test_a_path_is_taken_octet_for_octet(path: bytes) -> None:
    assert parse_mail(b"FROM:<" + path + b">").reverse_path == path
    assert parse_rcpt(b"to: <" + path + b"> NOTIFY=NEVER", smtputf8=False) == path


def test_the_null_reverse_path_is_a_path_and_a_null_recipient_is_not() -> None:
    assert parse_mail(b"FROM:<>").reverse_path == b""
    with pytest.raises(CommandError):
        parse_rcpt(b"TO:<>", smtputf8=False)


@pytest.mark.parametrize(
    "argument",
    [
        b"",
        b"FROM",
        b"FROM:",
        b"TO:<a@b>",
        b"FROM:a@b",
        b"FROM:<a@b",
        b"FROM:a@b>",
        b"FROM:<a@b> <c@d>",
        b"FROM:<a@b><c@d>",
        b"FROM:<a b@c>",
        b"FROM:<a\tb@c>",
        b"FROM:<a\\>b@c>",
        b'FROM:<"a@b>',
        b'FROM:<"a\x01b"@c>',
        b"FROM:<a\x00@b>",
        b"FROM:<a\x7f@b>",
        b"FROM:<a@b>SIZE=1",
        b"FROM:<a@b> =",
        b"FROM:<a@b> =1",
        b"FROM:<a@b> SIZE=",
        b"FROM:<a@b> SIZE=1 size=2",
        b"FROM:<a@b> SIZE=-1",
        b"FROM:<a@b> SIZE=abc",
        b"FROM:<a@b> SIZE",
        b"FROM:<a@b> SIZE=\xc2\xb2",
        b"FROM:<a@b> SIZE=" + b"9" * 21,
        b"FROM:<a@b> -X=1",
        b"FROM:<a@b> X_Y=1",
        b"FROM:<\xc3\xa9@b>",
        b"FROM:<\xff@b> SMTPUTF8",
        b"FROM:<\xc0\xaf@b> SMTPUTF8",
        b"FROM:<a\xc2\x85b@c> SMTPUTF8",
        b"FROM:<a\xe2\x80\xa8b@c> SMTPUTF8",
    ],
)
def test_what_is_no_path_or_parameter_is_refused_for_good(argument: bytes) -> None:
    with pytest.raises(CommandError) as refused:
        parse_mail(argument)
    assert re.match(rb"5\d\d 5\.\d\.\d ", refused.value.reply.wire)


def test_mail_tells_what_the_relay_needs() -> None:
    mail = parse_mail(b"from:<\xc3\xa9@example.test> SIZE=1234 BODY=8BITMIME smtputf8 ENVID=a+2Bb AUTH=<>")
    assert (mail.size, mail.smtputf8) == (1234, True)
    assert parse_mail(b"FROM:<a@b>") == (b"a@b", None, False, False, (), 0)
    assert parse_mail(b"FROM:<a@b> body=BinaryMime").binary


@pytest.mark.parametrize(
    ("argument", "without"),
    [
        (b"FROM:<a@b> AUTH=<>", b"FROM:<a@b>"),
        (b"FROM:<a@b> SIZE=1", b"FROM:<a@b>"),
        (b"FROM:<a@b> size=1", b"FROM:<a@b>"),
        (b"FROM:<> SIZE=1  ", b"FROM:<>  "),
        (b"FROM:<a@b> SIZE=1 auth=c+40d  BODY=7BIT ", b"FROM:<a@b>  BODY=7BIT "),
        (b"FROM:<>   AUTH=<>   ENVID=AUTH=1", b"FROM:<>   ENVID=AUTH=1"),
        (b'FROM:<" AUTH=<>"@b> AUTH=<>', b'FROM:<" AUTH=<>"@b>'),
        (b'FROM:<" SIZE=1"@b> ENVID=SIZE=1 SIZE=2', b'FROM:<" SIZE=1"@b> ENVID=SIZE=1'),
        (b"FROM:<a@b> AUTH", b"FROM:<a@b> AUTH"),
        (b"FROM:<a@b> XAUTH=1 XSIZE=1", b"FROM:<a@b> XAUTH=1 XSIZE=1"),
        (b"FROM:<a@b>", b"FROM:<a@b>"),
    ],
)
def test_parameters_of_the_relays_own_are_for_upstreams_that_offer_them(
    argument: bytes, without: bytes
) -> None:
    mail = parse_mail(argument)
    assert mail_for(argument, mail, Capabilities.of({"SIZE": "", "AUTH": ""})) == b"MAIL %b\r\n" % argument
    assert mail_for(argument, mail, Capabilities.of({"XAUTH": ""})) == b"MAIL %b\r\n" % without


@pytest.mark.parametrize(
    ("argument", "size", "last"),
    [
        (b"0", 0, False),
        (b"007", 7, False),
        (b"5 LAST", 5, True),
        (b"5 last", 5, True),
        (b"9" * 20, 10**20 - 1, False),
    ],
)
def test_bdat_is_a_size_and_perhaps_last(argument: bytes, size: int, last: bool) -> None:
    assert parse_bdat(argument) == (size, last)


@pytest.mark.parametrize(
    "argument",
    [
        *(
            b"",
            b" ",
            b"LAST",
            b" 5",
            b"5 ",
            b"5  LAST",
            b"5 LAST ",
            b"5LAST",
            b"5\tLAST",
            b"5 LAST x",
            b"5 FIRST",
        ),
        *(
            b"-1",
            b"+1",
            b"1.0",
            b"1e3",
            b"0x5",
            b"5,",
            b"\xb2",
            b"\xd9\xa5",
            b"5\0",
            b"1" * 21,
            b"5\n",
            b"5_0",
        ),
    ],
)
def test_what_is_no_bdat(argument: bytes) -> None:
    assert parse_bdat(argument) is None


def test_utf8_recipients_need_smtputf8_on_mail() -> None:
    with pytest.raises(CommandError) as refused:
        parse_rcpt("TO:<josé@example.test>".encode(), smtputf8=False)
    assert refused.value.reply.code == 553
    assert parse_rcpt("TO:<josé@example.test>".encode(), smtputf8=True) == "josé@example.test".encode()


@given(st.binary(max_size=80))
def test_whatever_passes_holds_no_control_and_is_as_it_was(octets: bytes) -> None:
    argument = b"TO:<" + octets + b">"
    try:
        path = parse_rcpt(argument, smtputf8=True)
    except CommandError:
        return
    assert b"<" + path + b">" in argument
    assert is_text(path)
    assert path.decode("utf-8").isprintable() or not path.isascii()


@given(
    st.one_of(st.sampled_from(PATHS), st.binary(max_size=12)),
    st.sampled_from([b"", b" SIZE=", b" size=", b" Size="]),
    st.one_of(st.from_regex(rb"\A[0-9]{0,22}\Z"), st.binary(max_size=4)),
)
def test_what_is_usual_is_read_as_all_else_is(path: bytes, keyword: bytes, size: bytes) -> None:
    """A blank at the end, which some clients write, makes a line unusual, and nothing else of it."""
    parameter = keyword + size if keyword else b""
    for parse, argument in (
        (parse_mail, b"FROM:<" + path + b">" + parameter),
        (partial(parse_rcpt, smtputf8=False), b"TO:<" + path + b">" + parameter),
    ):
        assert outcome(parse, argument) == outcome(parse, argument + b" ")


def outcome(parse: Callable[[bytes], object], argument: bytes) -> object:
    try:
        return parse(argument)
    except CommandError as error:
        return error.reply
