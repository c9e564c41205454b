from __future__ import annotations

import base64

import pytest

from relay.credentials import Password, Token
from relay.reply import Reply
from relay.upstream import sasl

ALL = frozenset(("PLAIN", "LOGIN", "CRAM-MD5", "XOAUTH2", "OAUTHBEARER"))
ACTING = Password("ann", "sesame", "boss")


def first(login: sasl.Login, *offered: str, secured: bool = True) -> bytes | None:
    exchange = login(frozenset(offered or ALL), secured=secured)
    return None if exchange is None else next(exchange)


def test_under_tls_it_is_plain_and_in_clear_cram_md5() -> None:
    login = sasl.with_password("ann", "sesame")
    assert first(login) == b"AUTH PLAIN " + base64.b64encode(b"\0ann\0sesame")
    assert first(login, secured=False) == b"AUTH CRAM-MD5"


@pytest.mark.parametrize(
    ("login", "offered"),
    [
        (sasl.with_password("ann", "sesame"), "XOAUTH2"),
        (sasl.with_token("ann", "t", "h", 25), "PLAIN"),
        (sasl.of_client(Token("XOAUTH2", "ann", b"t")), "OAUTHBEARER"),
        (sasl.of_client(ACTING), "GSSAPI"),
    ],
)
def test_without_a_mechanism_in_common_nothing_is_said(login: sasl.Login, offered: str) -> None:
    assert first(login, offered) is None


def test_whom_to_act_as_goes_by_plain_also_in_clear_or_not_at_all() -> None:
    login = sasl.of_client(ACTING)
    assert first(login, secured=False) == b"AUTH PLAIN " + base64.b64encode(b"boss\0ann\0sesame")
    with pytest.raises(sasl.RefusedError) as caught:
        login(frozenset(("LOGIN",)), secured=True)
    assert caught.value.reply == sasl.ACTS_FOR_NOBODY


def test_the_example_of_rfc_2195() -> None:
    exchange = sasl.with_password("tim", "tanstaaftanstaaf")(frozenset(("CRAM-MD5",)), secured=False)
    assert exchange is not None
    next(exchange)
    challenge = base64.b64encode(b"<1896.697170952@postoffice.reston.mci.net>").decode()
    answer = exchange.send(Reply.plain(334, challenge))
    assert base64.b64decode(answer) == b"tim b913a602c7eda7a495b4e6e7334d3890"


def test_a_challenge_that_is_not_base64_is_not_answered() -> None:
    exchange = sasl.with_password("tim", "x")(frozenset(("CRAM-MD5",)), secured=False)
    assert exchange is not None
    next(exchange)
    with pytest.raises(StopIteration):
        exchange.send(Reply.plain(334, "not base64!"))


def test_a_name_is_escaped_in_oauthbearer() -> None:
    """RFC 5801 section 4: comma and equals sign have a meaning of their own there."""
    line = first(sasl.with_token("a,b=c", "tok", "smtp.test", 587), "OAUTHBEARER")
    assert line is not None
    said = base64.b64decode(line.split()[2])
    assert said == b"n,a=a=2Cb=3Dc,\1host=smtp.test\1port=587\1auth=Bearer tok\1\1"


@pytest.mark.parametrize("length", [300, 400])
def test_a_long_response_goes_in_a_line_of_its_own(length: int) -> None:
    """RFC 4954 section 4: a command line has 512 octets at most."""
    exchange = sasl.of_client(Token("xoauth2", "ann", b"t" * length))(ALL, secured=True)
    assert exchange is not None
    line = next(exchange)
    encoded = base64.b64encode(b"t" * length)
    if length == 300:
        assert line == b"AUTH XOAUTH2 " + encoded
    else:
        assert line == b"AUTH XOAUTH2"
        assert exchange.send(Reply.plain(334, "")) == encoded
    assert exchange.send(Reply.plain(334, "")) == b"", "the error of a refused token"
