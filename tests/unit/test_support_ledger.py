"""The ledgers' checker lets nothing through: each contradiction is found, and a good account has none."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.ledger import Ledger, check, id_of, kinds

GOOD = Ledger(
    told={
        "sent": 250,
        "refused": 550,
        "later": 451,
        "late": 451,
        "late refusal": 451,
        "gone": None,
        "vanished": None,
        "silence": 451,
        "silence, client gone": None,
    },
    uncertain=["late", "late refusal", "silence"],
    accepted=["sent", "late", "gone"],
    refused=["refused", "late refusal"],
    unanswered=["silence", "silence, client gone"],
    rows=["gone", "sent", "late"],
    in_doubt=["silence", "silence, client gone"],
)
AFTER_A_KILL = Ledger(
    told={"lost on the way": None, "accepted": None, "refused": None, "lost": 451},
    uncertain=["lost"],
    accepted=["accepted"],
    refused=["refused"],
    in_doubt=["lost on the way", "accepted", "refused", "lost"],
)


def test_a_good_account_has_no_contradictions() -> None:
    assert check(GOOD) == []


def test_after_a_kill_doubt_is_honest() -> None:
    assert check(AFTER_A_KILL, settled=False) == []


def test_without_a_kill_the_same_doubt_is_not() -> None:
    assert check(AFTER_A_KILL) == [
        "accepted: in doubt, and the upstream has accepted it",
        "lost: in doubt, and the upstream has never had it whole",
        "lost on the way: in doubt, and the upstream has never had it whole",
        "refused: in doubt, and the upstream has refused it",
    ]


@pytest.mark.parametrize(
    ("ledger", "complaint"),
    [
        (Ledger(told={"m": 250}, rows=["m"]), "m: a row, but the upstream has not accepted it"),
        (
            Ledger(told={"m": 550}, refused=["m"], rows=["m"]),
            "m: a row, but the upstream has not accepted it",
        ),
        (Ledger(told={"m": 250}, accepted=["m"]), "m: the client was told 250, and there is no row"),
        (Ledger(told={"m": 251}), "m: the client was told 251, and there is no row"),
        (Ledger(told={"m": 250}, accepted=["m"], rows=["m", "m"]), "m: 2 rows"),
        (
            Ledger(told={"m": None}, accepted=["m"]),
            "m: accepted by the upstream, and there is neither row nor entry in doubt",
        ),
        (
            Ledger(told={"m": 451}, accepted=["m"]),
            "m: accepted by the upstream, and there is neither row nor entry in doubt",
        ),
        (
            Ledger(told={"m": None}, unanswered=["m"]),
            "m: the upstream has it whole and never answered, and there is no entry in doubt",
        ),
        (
            Ledger(told={"m": 451}, uncertain=["m"]),
            "m: the client was told that it may have been sent, and there is no entry in doubt",
        ),
        (
            Ledger(told={"m": 250}, accepted=["m"], rows=["m"], in_doubt=["m"]),
            "m: in doubt, and there is a row",
        ),
        (
            Ledger(told={"m": 451}, unanswered=["m"], in_doubt=["m"]),
            "m: in doubt, and the client was told 451",
        ),
        (
            Ledger(told={"m": 550}, refused=["m"], in_doubt=["m"]),
            "m: in doubt, and the client was told 550",
        ),
        (Ledger(told={"m": None}, unanswered=["m"], in_doubt=["m", "m"]), "m: 2 entries in doubt"),
        (
            Ledger(told={"m": None}, unanswered=["m", "m"], in_doubt=["m"]),
            "m: the upstream got it 2 times",
        ),
        (Ledger(unanswered=["m"], in_doubt=["m"]), "m: no client sent it"),
        (Ledger(told={"m": 451}, accepted=["m", "m"], rows=["m"]), "m: the upstream got it 2 times"),
        (
            Ledger(told={"m": 250}, accepted=["m"], refused=["m"], rows=["m"]),
            "m: the upstream got it 2 times",
        ),
        (Ledger(accepted=["m"], rows=["m"]), "m: no client sent it"),
        (Ledger(refused=["m"]), "m: no client sent it"),
    ],
)
def test_each_contradiction_is_found(ledger: Ledger, complaint: str) -> None:
    assert complaint in check(ledger)
    assert complaint in check(ledger, settled=False)


def test_contradictions_are_counted_by_kind() -> None:
    assert kinds(["a: 2 rows", "b: 2 rows", "c: no client sent it"]) == {"2 rows": 2, "no client sent it": 1}


BOOKS = ("accepted", "refused", "unanswered", "rows", "in_doubt")
ENTRIES = [(book, key) for book in BOOKS for key in getattr(GOOD, book)]
UNMISSED = ("refused", "refused")
"""Nobody can tell whether the upstream's refusal or the relay's own is what the client heard."""


@given(st.sampled_from(ENTRIES), st.booleans())
def test_any_change_to_a_good_account_is_found(entry: tuple[str, str], more: bool) -> None:
    book, key = entry
    entries = [*getattr(GOOD, book), key] if more else [e for e in getattr(GOOD, book) if e != key]
    assert (check(replace(GOOD, **{book: entries})) == []) == (not more and entry == UNMISSED)


def test_the_id_is_taken_from_the_header_section_alone() -> None:
    assert id_of(b"Subject: x\r\nx-task-id:  a-1 \r\nTo: b\r\n\r\nX-Task-ID: body\r\n") == "a-1"


@pytest.mark.parametrize("head", [b"Subject: x", b"X-Task-ID: a\r\nX-Task-ID: a", b"X-Task-ID: "])
def test_a_message_without_one_id_is_an_error(head: bytes) -> None:
    with pytest.raises(ValueError, match="X-Task-ID"):
        id_of(head + b"\r\n\r\nbody\r\n")
