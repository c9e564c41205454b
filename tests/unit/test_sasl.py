"""The server's side of a SASL exchange."""

from __future__ import annotations

import base64
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.credentials import PASSWORD_MECHANISMS, TOKEN_MECHANISMS, Credentials, Password, Token
from relay.reply import Reply
from relay.session.lines import MAX_AUTH_LINE
from relay.session.sasl import Exchange, SaslError

MECHANISMS = (*PASSWORD_MECHANISMS, *TOKEN_MECHANISMS)
XOAUTH2 = b"user=app@example.com\x01auth=Bearer ya29.token\x01\x01"
OAUTHBEARER = b"n,a=app@example.com,\x01host=smtp.example.com\x01port=587\x01auth=Bearer ya29.token\x01\x01"


def b64(octets: bytes) -> bytes:
    return base64.b64encode(octets)


def refusal(mechanism: str, *lines: bytes | None) -> str:
    """Return the reply that ends an exchange at its last line."""
    exchange = Exchange(mechanism)
    for line in lines[:-1]:
        assert isinstance(exchange.step(line), bytes)
    with pytest.raises(SaslError) as caught:
        exchange.step(lines[-1])
    return str(caught.value.reply)


# ------------------------------------------------------------------------------------- what goes well


@pytest.mark.parametrize(
    ("response", "credentials"),
    [
        (b"\0user\0pass", Password("user", "pass")),
        (b"\0user\0", Password("user", "")),
        (b"admin\0user\0pass", Password("user", "pass", "admin")),
        (b"\0us er\0 pass ", Password("us er", " pass ")),
        ("\0ü@example.com\0pässwörd".encode(), Password("ü@example.com", "pässwörd")),
        (b"\0*)(uid=*\0x", Password("*)(uid=*", "x")),
        (b"\0user\0tab\tand\nnewline", Password("user", "tab\tand\nnewline")),
    ],
)
def test_plain(response: bytes, credentials: Password) -> None:
    assert Exchange("PLAIN").step(b64(response)) == credentials

    asked = Exchange("PLAIN")
    assert asked.step(None) == b""
    assert asked.step(b64(response)) == credentials


def test_login_asks_for_both() -> None:
    exchange = Exchange("LOGIN")
    assert exchange.step(None) == b"Username:"
    assert exchange.step(b64(b"user")) == b"Password:"
    assert exchange.step(b64(b"pass")) == Password("user", "pass")


def test_login_takes_an_initial_response_as_the_user_name() -> None:
    exchange = Exchange("LOGIN")
    assert exchange.step(b64(b"user")) == b"Password:"
    assert exchange.step(b"") == Password("user", "")


@pytest.mark.parametrize(
    ("mechanism", "response", "user"),
    [
        ("XOAUTH2", XOAUTH2, "app@example.com"),
        ("XOAUTH2", b"auth=bearer x\x01user=a\x01\x01", "a"),
        ("OAUTHBEARER", OAUTHBEARER, "app@example.com"),
        ("OAUTHBEARER", b"n,,\x01auth=Bearer x\x01\x01", ""),
        ("OAUTHBEARER", b"y,a=a=2Cb=3Dc,\x01auth=Bearer x\x01\x01", "a,b=c"),
    ],
)
def test_a_token_is_kept_as_it_came(mechanism: str, response: bytes, user: str) -> None:
    assert Exchange(mechanism).step(b64(response)) == Token(mechanism, user, response)

    asked = Exchange(mechanism)
    assert asked.step(None) == b""
    assert asked.step(b64(response)) == Token(mechanism, user, response)


# ----------------------------------------------------------------------------------- what is malformed


@pytest.mark.parametrize(
    "response",
    [
        b"",
        b"u\0p",
        b"\0u\0p\0x",
        b"\0\0\0\0",
        b"\0\0p",
        b"\0\x1b[2J\0p",
        b"\0u\r\nRCPT TO:<x@example.com>\0p",
        b"\0u\x7f\0p",
        "\0u\x85\0p".encode(),
        "\0u\u2028\0p".encode(),
        b"\0\xff\0p",
        b"\0u\0\xff",
        b"a\nb\0u\0p",
        b"\xc0\x80u\0p",
    ],
)
def test_plain_that_is_none(response: bytes) -> None:
    assert refusal("PLAIN", b64(response) or b"=").startswith("501 5.5.2 ")
    assert refusal("PLAIN", None, b64(response)).startswith("501 5.5.2 ")


@pytest.mark.parametrize("user", [b"", b"\0", b"a\0b", b"\x1b", b"\xff"])
def test_login_with_a_name_that_is_none(user: bytes) -> None:
    assert refusal("LOGIN", None, b64(user)).startswith("501 5.5.2 ")


@pytest.mark.parametrize("password", [b"a\0b", b"\xff"])
def test_login_with_a_password_that_is_none(password: bytes) -> None:
    assert refusal("LOGIN", None, b64(b"user"), b64(password)).startswith("501 5.5.2 ")


@pytest.mark.parametrize(
    "response",
    [
        b"",
        b"\x01\x01",
        XOAUTH2[:-1],
        b"auth=Bearer x\x01\x01",
        b"user=\x01auth=Bearer x\x01\x01",
        b"user=a\x01\x01",
        b"user=a\x01auth=\x01\x01",
        b"user=a\x01auth=Bearer \x01\x01",
        b"user=a\x01auth=Basic x\x01\x01",
        b"user=a\x01auth=Bearer x y\x01\x01",
        b"user=a\x01auth=Bearer x\xff\x01\x01",
        b"user=a\x01user=b\x01auth=Bearer x\x01\x01",
        b"user=a\x01USER=b\x01auth=Bearer x\x01\x01",
        b"user=a\0\x01auth=Bearer x\x01\x01",
        b"user=a\r\nb\x01auth=Bearer x\x01\x01",
        b"user=\xff\x01auth=Bearer x\x01\x01",
        b"user\x01auth=Bearer x\x01\x01",
        XOAUTH2 + b"\x01\x01",
    ],
)
def test_xoauth2_that_is_none(response: bytes) -> None:
    assert refusal("XOAUTH2", b64(response) or b"=").startswith("501 5.5.2 ")


@pytest.mark.parametrize(
    "response",
    [
        b"",
        XOAUTH2,
        b"p=tls-unique,a=a,\x01auth=Bearer x\x01\x01",
        b"n,a=,\x01auth=Bearer x\x01\x01",
        b"n,a=a\x01auth=Bearer x\x01\x01",
        b"n,a=a=,\x01auth=Bearer x\x01\x01",
        b"n,a=a=2c,\x01auth=Bearer x\x01\x01",
        b"n,a=a\0,\x01auth=Bearer x\x01\x01",
        b"n,a=\xff,\x01auth=Bearer x\x01\x01",
        b"n,a=a,",
        b"n,a=a,\x01\x01",
        b"n,a=a,\x01host=x\x01\x01",
    ],
)
def test_oauthbearer_that_is_none(response: bytes) -> None:
    assert refusal("OAUTHBEARER", b64(response) or b"=").startswith("501 5.5.2 ")


@pytest.mark.parametrize(
    ("mechanism", "line"),
    list(
        product(
            MECHANISMS, [b"!!!!", b"AA", b"AAAA=", b"AA==AA==", b"AAAA AAAA", b"=AAA", b"A", b"-_-_", b"\xff"]
        )
    ),
)
def test_what_is_not_base64(mechanism: str, line: bytes) -> None:
    assert refusal(mechanism, line).startswith("501 5.5.2 That is not base64")
    assert refusal(mechanism, None, line).startswith("501 5.5.2 That is not base64")


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_an_exchange_can_be_given_up(mechanism: str) -> None:
    assert refusal(mechanism, None, b"*").startswith("501 5.7.0 ")


def test_an_exchange_can_be_given_up_before_the_password() -> None:
    assert refusal("LOGIN", None, b64(b"user"), b"*").startswith("501 5.7.0 ")


def test_an_equals_sign_is_an_empty_response_only_where_it_is_the_first() -> None:
    assert refusal("LOGIN", b"=").startswith("501 5.5.2 The login is malformed: the user name is empty")
    assert refusal("LOGIN", None, b"=").startswith("501 5.5.2 That is not base64")


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_a_line_has_a_limit(mechanism: str) -> None:
    longest = b"A" * ((MAX_AUTH_LINE - 2) // 4 * 4)
    assert refusal(mechanism, longest + b"AAAA").startswith("500 5.5.6 ")
    assert refusal(mechanism, None, longest + b"AAAA").startswith("500 5.5.6 ")
    assert "5.5.6" not in refusal(mechanism, None, longest)


def test_a_long_password_is_one() -> None:
    password = "x" * 9000
    assert Exchange("PLAIN").step(b64(b"\0u\0" + password.encode())) == Password("u", password)


# ------------------------------------------------------------------------------------ whatever comes

LINES = st.one_of(
    st.binary(max_size=60),
    st.binary(max_size=60).map(b64),
    st.lists(st.sampled_from([b"\0", b"\x01", b"user=", b"auth=Bearer ", b"n,a=", b",", b"=2C", b"x"]))
    .map(b"".join)
    .map(b64),
    st.sampled_from([b"=", b"*", b"", b64(XOAUTH2), b64(OAUTHBEARER), b64(b"\0u\0p")]),
)


def step(exchange: Exchange, line: bytes | None) -> bytes | Credentials | Reply:
    try:
        return exchange.step(line)
    except SaslError as error:
        return error.reply


@given(st.sampled_from(MECHANISMS), st.none() | LINES, LINES, LINES)
def test_any_octets_end_in_credentials_or_a_reply(
    mechanism: str, initial: bytes | None, second: bytes, third: bytes
) -> None:
    exchange = Exchange(mechanism)
    for line in (initial, second, third):
        answer = step(exchange, line)
        if isinstance(answer, Reply):
            assert answer.code in (500, 501)
            return
        if isinstance(answer, Credentials):
            assert answer.user or mechanism == "OAUTHBEARER"
            assert not any(ord(character) < 32 for character in answer.user)
            return
        assert answer in (b"", b"Username:", b"Password:")
    pytest.fail("no mechanism asks three times")


@given(st.text(st.characters(codec="utf-8", exclude_categories=("C", "Zl", "Zp")), min_size=1), st.text())
def test_any_name_and_password_come_through(user: str, password: str) -> None:
    password = password.replace("\0", "")
    expected = Password(user, password)

    assert Exchange("PLAIN").step(b64(f"\0{user}\0{password}".encode())) == expected
    login = Exchange("LOGIN")
    assert login.step(b64(user.encode())) == b"Password:"
    assert login.step(b64(password.encode())) == expected
