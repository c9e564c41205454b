"""The provider's id in its reply."""

from __future__ import annotations

import pytest

from relay.provider import accepted_as


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ("250 2.0.0 Ok: queued as 4F3A", "4F3A"),
        ("250 2.0.0 Ok: queued as 3Zk5Jv0Yb6z9sSW", "3Zk5Jv0Yb6z9sSW"),
        ("250 Ok: queued as nhIMmON9SFOPcT0ii4nt2A", "nhIMmON9SFOPcT0ii4nt2A"),
        ("250 OK queued as 019b1c7e-5a2f-4c31-9d0e-3f5b8a6c2d14", "019b1c7e-5a2f-4c31-9d0e-3f5b8a6c2d14"),
        ("250 OK: queued as <2026112307.12345@smtp.example.com>", "2026112307.12345@smtp.example.com"),
        ("250 OK id=1tGx3K-0000000AbCd-0abc", "1tGx3K-0000000AbCd-0abc"),
        (
            "250 Ok 0100018e2f4a7c31-9d0e3f5b-8a6c-4d14-9e2f-019b1c7e5a2f-000000",
            "0100018e2f4a7c31-9d0e3f5b-8a6c-4d14-9e2f-019b1c7e5a2f-000000",
        ),
        ("250 2.0.0 OK  1436801113 x3si14160585iod.35 - gsmtp", "x3si14160585iod.35"),
        (
            ("250 2.6.0 <1@example.com> [InternalId=73057, Hostname=X.prod.outlook.com] 9 bytes in 0.1, "
            "70 KB/sec Queued mail for delivery"),
            "73057",
        ),
        ("250 2.0.0 3ABN7Rm0012345 Message accepted for delivery", "3ABN7Rm0012345"),
        ("250 2.0.0: 1a2b3c4d Message accepted for delivery", "1a2b3c4d"),
        ("250 2.0.0 Ok: queued on smtp3m.mail.yandex.net as 1430081058-6lt-iHE", "1430081058-6lt-iHE"),
        ("250 Message Queued (0A1B2C3D-1)", "0A1B2C3D-1"),
        ("250 ok 1700000000 qp 12345", "1700000000 qp 12345"),
        ("250 2.0.0 OK 4F/3A-12345-ABCDEF56", "4F/3A-12345-ABCDEF56"),
        ("250-2.0.0 Ok:\n250 2.0.0 queued as 7B", "7B"),
        ("250 OK 019b1c7e-5a2f-4c31-9d0e-3f5b8a6c2d14", "019b1c7e-5a2f-4c31-9d0e-3f5b8a6c2d14"),
        ("250 Great success", None),
        ("250 2.0.0 Ok", None),
        ("250 Message accepted for delivery", None),
        ("", None),
    ],
)  # fmt: skip
def test_the_id_is_picked_out(reply: str, found: str | None) -> None:
    assert accepted_as(reply) == found


@pytest.mark.parametrize("part", ["x", "1.", "<", "x "])
def test_a_long_reply_is_looked_through_once(part: str) -> None:
    """Were a form tried anew at each place of a word, this would take hours; an upstream may say anything."""
    assert accepted_as(f"250 2.0.0 {part * 1_000_000}") is None
