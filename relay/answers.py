"""What a transaction says to clients where no upstream does: fitting code, enhanced code, and the reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

from relay.content import Fault
from relay.reply import Reply

if TYPE_CHECKING:
    from uuid import UUID

MAX_RECEIVED = 50
"""Received fields that a message may carry before it is taken to be in a loop (RFC 5321 6.3)."""

HELD = Reply.own(250, "1.0", "Ok")

# No upstream, or none any more
NO_ROUTE = Reply.own(451, "4.4", "No upstream server takes this message now, try again later")
OTHER_ROUTE = Reply.own(452, "5.3", "This recipient takes another route: send it in a message of its own")
LOST = Reply.own(451, "4.2", "The upstream server closed the connection or did not answer, try again later")
SILENT = Reply.own(451, "4.2", "Silent for too long: the upstream connection was given up, try again")
NO_CHUNKING = Reply.own(451, "3.3", "The upstream server does not take BDAT now, try again later")

# What follows from an earlier reply
NO_MAIL = Reply.own(503, "5.1", "MAIL was not accepted")
NO_RECIPIENTS = Reply.own(554, "5.1", "No valid recipients")

# Content that does not go up
FAULTS = {
    Fault.TOO_LARGE: Reply.own(552, "3.4", "The message is larger than this relay or its upstream takes"),
    Fault.STRAY_NEWLINE: Reply.own(550, "5.2", "The message holds a bare CR or LF (RFC 5321 2.3.8)"),
    Fault.NUL: Reply.own(550, "6.0", "The message holds a NUL octet (RFC 5321 4.1.1.4)"),
}
LOOP = Reply.own(554, "4.6", f"Mail loop: more than {MAX_RECEIVED} Received fields")
NO_PLACE = Reply.own(451, "3.0", "The relay cannot keep the record of this message now, try again later")


def in_doubt(task_id: UUID) -> Reply:
    """No verdict after the end of data: the client may send again, and the log has the rest under the id."""
    text = f"The upstream server did not answer: the message may have been sent, see {task_id}"
    return Reply.own(451, "4.2", text)


def internal(task_id: UUID) -> Reply:
    """An error of ours before the end of data; the log has the cause under the id."""
    return Reply.own(451, "3.0", f"Internal error, see {task_id}")
