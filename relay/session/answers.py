"""What the relay itself says to clients: fitting code, enhanced code, and a text that names the reason."""

from __future__ import annotations

from relay.reply import Reply

OK = Reply.own(250, "0.0", "OK")
BYE = Reply.own(221, "0.0", "Bye")
VRFY = Reply.own(252, "5.2", "Cannot VRFY, but the address can be tried with RCPT")
HELP = Reply.own(214, "0.0", "EHLO HELO MAIL RCPT DATA RSET NOOP VRFY HELP QUIT (RFC 5321)")
START_TLS = Reply.own(220, "0.0", "Begin TLS now")

# Commands that are wrong
START = Reply.own(503, "5.1", "Say EHLO or HELO first")
NESTED = Reply.own(503, "5.1", "A transaction is open: RSET ends it")
NO_TRANSACTION = Reply.own(503, "5.1", "MAIL comes first")
NO_RCPT = Reply.own(503, "5.1", "RCPT comes first")
MIXED = Reply.own(503, "5.1", "DATA and BDAT do not mix, and BODY=BINARYMIME needs BDAT (RFC 3030)")
NO_ARGUMENT = Reply.own(501, "5.4", "This command takes no argument")
NEEDS_NAME = Reply.own(501, "5.4", "A host name is missing")
UNKNOWN = Reply.own(500, "5.1", "Command not known here")
NOT_HERE = Reply.own(502, "5.1", "Command not available here")
LINE_TOO_LONG = Reply.own(500, "5.2", "The line is too long (RFC 5321 4.5.3.1.4)")
CONTROLS = Reply.own(500, "5.2", "The line holds control octets or is not text")

# STARTTLS and AUTH that are wrong
TLS_ALREADY = Reply.own(503, "5.1", "TLS is active already")
TLS_FIRST = Reply.own(530, "7.0", "STARTTLS comes first (RFC 3207)")
TLS_FOR_AUTH = Reply.own(538, "7.11", "AUTH needs TLS: STARTTLS comes first")
AUTH_ALREADY = Reply.own(503, "5.1", "Logged in already")
AUTH_IN_TRANSACTION = Reply.own(503, "5.1", "A transaction is open: AUTH comes before MAIL (RFC 4954)")
MECHANISM = Reply.own(504, "5.4", "This AUTH mechanism is not offered here")
AUTH_LINE_TOO_LONG = Reply.own(500, "5.6", "The AUTH exchange line is too long (RFC 4954)")

# Policy
AUTH_FIRST = Reply.own(530, "7.0", "Relaying needs AUTH (RFC 4954)")
LOG_IN_AGAIN = Reply.own(530, "7.0", "This login is not valid any more: connect and log in again")
NOT_YOUR_SENDER = Reply.own(550, "7.1", "The user that is logged in may not send from this address")
NOT_ALLOWED = Reply.own(550, "7.1", "Relaying is not allowed from this address")
TOO_LARGE = Reply.own(552, "3.4", "The message is larger than this relay takes")
NO_RECORDS = Reply.own(451, "3.0", "The relay cannot keep its records now, try again later")
TOO_MANY_RECIPIENTS = Reply.own(452, "5.3", "Too many recipients: send the rest in another transaction")

# The last word of a session
NOT_CRLF = Reply.own(500, "5.2", "Lines end with CR LF (RFC 5321 2.3.8); closing")
ENDLESS_LINE = Reply.own(500, "5.2", "The line does not end; closing")
NO_CHUNKING = Reply.own(502, "5.1", "BDAT is not offered here; closing")
BAD_CHUNK = Reply.own(501, "5.4", "Syntax: BDAT size [LAST]; closing")
OUT_OF_STEP = Reply.own(554, "5.0", "Out of step: input came before the reply that it depends on; closing")
NOT_SMTP = Reply.own(554, "5.1", "This is an SMTP port; closing")
TOO_MANY_ERRORS = Reply.own(421, "7.0", "Too many errors; closing")
LOGINS_CROWDED = Reply.own(454, "7.0", "Too many logins at the same time, try again later")
TOO_MANY_LOGINS = Reply.own(421, "7.0", "Too many failed logins, try again later; closing")
IDLE_COMMANDS = Reply.own(421, "7.0", "Too many commands without a message; closing")
TIMEOUT = Reply.own(421, "4.2", "Silent for too long; closing")
TOO_SLOW = Reply.own(421, "4.2", "The message comes too slowly; closing")
DRAINING = Reply.own(421, "3.2", "The relay is shutting down; closing")
TOO_MANY_CONNECTIONS = Reply.own(421, "7.0", "Too many connections, try again later")
CROWDED = Reply.own(421, "4.2", "Idle while others wait for a connection; closing")
TOO_MANY_FROM_CLIENT = Reply.own(421, "7.0", "Too many connections from your address, try again later")


def login_failed(identity: object) -> Reply:
    """An error of ours while somebody logs in; the log has the cause under the id."""
    return Reply.own(454, "7.0", f"Temporary authentication failure, see {identity}")


def internal(identity: object) -> Reply:
    """An error of ours: the client gets the id under which the log has the cause."""
    return Reply.own(451, "3.0", f"Internal error, reported as {identity}; closing")
