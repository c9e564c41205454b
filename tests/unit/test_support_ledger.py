"""The ledgers' checker lets nothing through: each contradiction is found, and a good account has none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.ledger import Ledger, check, id_of

GOOD = Ledger(
    told={"sent": 250, "refused": 550, "later": 451, "late": 451, "gone": None, "vanished": None},
    accepted=["sent", "late", "gone"],
    refused=["refused"],
    rows=["gone", "sent", "late"],
)


def test_a_good_account_has_no_contradictions() -> None:
    assert check(GOOD) == []


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
        (Ledger(told={"m": None}, accepted=["m"]), "m: accepted by the upstream, and there is no row"),
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
    assert check(ledger) == [complaint]


def test_a_kill_may_cost_the_row_of_a_message_whose_client_heard_nothing() -> None:
    ledger = Ledger(told={"m": None}, accepted=["m"])
    assert check(ledger, settled=False) == []


def test_even_a_kill_may_not_cost_the_row_of_a_message_whose_client_heard_250() -> None:
    ledger = Ledger(told={"m": 250}, accepted=["m"])
    assert check(ledger, settled=False) == ["m: the client was told 250, and there is no row"]


@given(st.sampled_from(["sent", "late", "gone"]), st.sampled_from(["accepted", "rows"]), st.booleans())
def test_any_change_to_a_good_account_is_found(key: str, book: str, more: bool) -> None:
    entries = [*getattr(GOOD, book), key] if more else [e for e in getattr(GOOD, book) if e != key]
    books = {"accepted": GOOD.accepted, "rows": GOOD.rows, book: entries}
    assert check(Ledger(told=GOOD.told, refused=GOOD.refused, **books)) != []


def test_the_id_is_taken_from_the_header_section_alone() -> None:
    assert id_of(b"Subject: x\r\nx-task-id:  a-1 \r\nTo: b\r\n\r\nX-Task-ID: body\r\n") == "a-1"


@pytest.mark.parametrize("head", [b"Subject: x", b"X-Task-ID: a\r\nX-Task-ID: a", b"X-Task-ID: "])
def test_a_message_without_one_id_is_an_error(head: bytes) -> None:
    with pytest.raises(ValueError, match="X-Task-ID"):
        id_of(head + b"\r\n\r\nbody\r\n")
