"""Passwords as argon2id hashes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.auth.hashing import MAX_MEMORY_KIB, Hasher, HashError, problem

WEAK = Hasher(memory_kib=8, passes=1)
SALT, DIGEST = "c29tZXNhbHRzb21lc2FsdA", "MTIzNDU2Nzg5MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTI"


def phc(memory: int = 64, passes: int = 1, lanes: int = 1, salt: str = SALT, digest: str = DIGEST) -> str:
    return f"$argon2id$v=19$m={memory},t={passes},p={lanes}${salt}${digest}"


def test_the_usual_hasher() -> None:
    hasher = Hasher()
    hashed = hasher.hash("sesame")

    assert hashed.startswith("$argon2id$v=19$m=32768,t=3,p=1$")
    assert problem(hashed) is None
    assert hasher.matches(hashed, "sesame")
    assert not hasher.matches(hashed, "Sesame")


def test_a_hash_of_another_cost_can_be_checked() -> None:
    assert Hasher(memory_kib=16, passes=2).matches(WEAK.hash("sesame"), "sesame")


def test_two_hashes_of_one_password_differ() -> None:
    assert WEAK.hash("sesame") != WEAK.hash("sesame")


@given(st.text(), st.text())
def test_a_password_matches_itself_and_nothing_else(one: str, other: str) -> None:
    hashed = WEAK.hash(one)
    assert WEAK.matches(hashed, one)
    assert WEAK.matches(hashed, other) or one != other


def test_the_form_of_unicode_does_not_matter() -> None:
    assert WEAK.matches(WEAK.hash("caf\u00e9"), "cafe\u0301")
    assert not WEAK.matches(WEAK.hash("café"), "cafe")


@pytest.mark.parametrize(
    "hashed",
    [
        "",
        "sesame",
        "$2b$12$abcdefghijklmnopqrstuv",
        phc().replace("argon2id", "argon2i"),
        phc().replace("v=19", "v=16"),
        phc(memory=0),
        phc(memory=7),
        phc(memory=8, lanes=2),
        phc(salt="c2FsdA"),
        phc(digest="MTIz"),
        phc() + "\n",
        phc(salt="!" * 22),
    ],
)
def test_what_is_no_hash(hashed: str) -> None:
    assert str(problem(hashed)).startswith("is no argon2id hash")


def test_a_hash_that_costs_too_much() -> None:
    assert problem(phc(memory=MAX_MEMORY_KIB)) is None
    assert problem(phc(memory=MAX_MEMORY_KIB + 1)) == "needs more than 256 MiB for each login"
    assert problem(phc(passes=100)) is None
    assert problem(phc(passes=101)) == "needs more than 100 passes for each login"


@pytest.mark.parametrize("damaged", [phc(salt=SALT[:-1] + "B"), phc(digest=DIGEST[:-1] + "J")])
def test_a_damaged_hash_is_told_from_a_wrong_password(damaged: str) -> None:
    assert problem(damaged) is None
    with pytest.raises(HashError):
        WEAK.matches(damaged, "sesame")
