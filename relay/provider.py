"""The id that a provider gave a message, picked out of its reply to the end of data.

No standard says where it stands: these are the forms of servers and services that are met most. A reply that
has none of them, or says nothing (Mailgun's "Great success"), has no id. A reply is an upstream's, and may be
long: no form begins with what can be any length at any place, or it would be tried from each of them on.
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["accepted_as"]

_ID: Final = r"[\w.+=/@$!~:-]+"
_FORMS: Final = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        # 250 2.0.0 OK  1436801113 x3si14160585iod.35 - gsmtp (Google)
        r"(?<!\S)(?P<id>\S+) - gsmtp",
        # 250 2.6.0 <1@example.com> [InternalId=123, Hostname=X.prod.outlook.com] ... (Microsoft)
        r"\[InternalId=(?P<id>[0-9]+)[^\]]*\]",
        # 250 OK id=1tGx3K-0000000AbCd-0abc (Exim)
        rf"\bid=<?(?P<id>{_ID})>?",
        # 250 2.0.0 Ok: queued on smtp3m.mail.yandex.net as 1430081058-6ltgNFKSir-iHEKdOrm (Yandex)
        rf"queued on \S+ as (?P<id>{_ID})",
        # 250 2.0.0 Ok: queued as 4F3A (Postfix, SendGrid, Mailjet, ZoneMTA and many more)
        rf"queued(?: mail)? as <?(?P<id>{_ID})>?",
        # 250 Ok 0100018e2f4a7c31-9d0e3f5b-8a6c-4d14-9e2f-019b1c7e5a2f-000000 (Amazon SES)
        r"\bOk (?P<id>[0-9a-f]{16}-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}-[0-9]{6})\b",
        # 250 2.0.0 3abc12345 Message accepted for delivery (Sendmail, OpenSMTPD)
        rf"\s(?P<id>(?=\S*[0-9]){_ID}) Message accepted for delivery",
        # 250 Message Queued (0A1B-2C3D.1) (Haraka)
        r"Message Queued \((?P<id>[^)\s]+)\)",
        # 250 ok 1700000000 qp 12345 (qmail)
        r"\bok (?P<id>[0-9]{9,11} qp [0-9]+)",
        # 250 2.0.0 OK 4F/3A-12345-ABCDEF56 (Momentum)
        r"\bOK (?P<id>[0-9A-F]{2}/[0-9A-F]{2}-[0-9]+-[0-9A-F]+)\b",
        # 250 2.0.0 OK:48 letters and digits (Campaign Monitor)
        r"\bOK:(?P<id>[a-z0-9]{48})\b",
        # 250 OK 019b1c7e-5a2f-4c31-9d0e-3f5b8a6c2d14 (Postmark and others)
        r"(?P<id>\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b)",
    )
)


def accepted_as(reply: str) -> str | None:
    """Return the id that the reply names, None if it names none."""
    for form in _FORMS:
        if (found := form.search(reply)) is not None:
            return found["id"].rstrip(".:")
    return None
