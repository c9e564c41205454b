"""Pseudonyms of recipients."""

from __future__ import annotations

import hashlib
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.pseudonyms import PREFIX, Pseudonyms

NAMES = Pseudonyms("0123456789abcdef")
ANN = NAMES.address("ann@example.org")
HIDDEN = ANN.partition("@")[0]


def test_it_is_the_keyed_hash_of_the_address_with_its_domain() -> None:
    digest = hmac.new(b"0123456789abcdef", b"ann@example.org", hashlib.sha256).hexdigest()
    assert f"{PREFIX}{digest[:32]}@example.org" == ANN
    assert NAMES.address("ANN@Example.ORG") == f"{HIDDEN}@Example.ORG"
    assert NAMES.address(ANN) == ANN
    assert NAMES.address("postmaster").startswith(PREFIX)
    assert Pseudonyms("another key that is long").address("ann@example.org") != ANN


def test_what_a_search_looks_for_too() -> None:
    assert NAMES.aliases("ann@example.org") == (ANN,)
    assert [NAMES.aliases(each) for each in ("", "@example.org", "a*@example.org")] == [(), (), ()]


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("250 2.0.0 Ok: queued as 4F3A", "250 2.0.0 Ok: queued as 4F3A"),
        ("550 5.1.1 <Ann@example.org>: no such user", f"550 5.1.1 <{ANN}>: no such user"),
        ("550 5.1.1 ann... User unknown", f"550 5.1.1 {HIDDEN}... User unknown"),
        ("550 5.1.1 annual report", "550 5.1.1 annual report"),
        ("550-no ann\n550 no ANN", f"550-no {HIDDEN}\n550 no {HIDDEN}"),
        ("bounce+ann=example.org@shop.example", f"bounce+{HIDDEN}=example.org@shop.example"),
        ("xann@example.org", f"x{ANN}"),
    ],
)
def test_text_tells_no_address(said: str, told: str) -> None:
    assert NAMES.text(said, ["ann@example.org"]) == told


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("", ""),
        ("ann@shop.example", "ann@shop.example"),
        ("bounce+ann@shop.example", f"bounce+{HIDDEN}@shop.example"),
        ("mary-ann@shop.example", "mary-ann@shop.example"),
        ("joann@example.org", "joann@example.org"),
        ("ann@example.org.test", "ann@example.org.test"),
        ("Ann@example.org", ANN),
        ("@relay.test:ann@example.org", f"@relay.test:{ANN}"),
        ("bounce_ann=example.org@shop.example", f"bounce_{HIDDEN}=example.org@shop.example"),
        ("prvs=4F3A=ann@example.org", f"prvs=4F3A={ANN}"),
    ],
)
def test_a_sender_stays_but_for_an_address_in_it(path: str, told: str) -> None:
    assert NAMES.path(path, ["bob@example.net", "ann@example.org", "postmaster"]) == told


def test_octets_that_are_no_text_stay_in_a_sender() -> None:
    address = "\\xfc\\1@ex\\xfcample.org"
    assert NAMES.path(address, [address]) == NAMES.address(address)


def test_a_local_part_that_is_a_code_does_not_change_the_code() -> None:
    assert NAMES.text("250 2.0.0 250 ok", ["250@example.org"]).startswith("250 2.0.0 hmac-")


@given(
    st.from_regex(r"[a-z]{3,12}(\.[a-z]{1,8})?", fullmatch=True),
    st.text(st.sampled_from("<>:; ()\n,"), max_size=4),
    st.text(st.sampled_from("<>:; ()\n,"), max_size=4),
)
def test_no_local_part_is_left(local: str, before: str, after: str) -> None:
    address = f"{local}@example.org"
    for said in (address, local, f"{local}=example.org", address.upper()):
        told = NAMES.text(f"550 5.1.1 {before}{said}{after}", [address])
        assert local not in told.lower().replace(HIDDEN, "")
