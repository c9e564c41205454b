"""The classic ways in which servers were talked into relaying, as values.

They are those of abuse.net's relay test and of nmap's smtp-open-relay, and the ways in which a client may
claim to be somebody else. Every address is under a name that RFC 2606 reserves: nobody has a mailbox there.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["HELLO", "SENDER", "Probe", "probes"]

HELLO = "EHLO selftest.invalid"
SENDER = "selftest@example.org"
_USER = "selftest"
_DOMAIN = "example.com"


class Probe(NamedTuple):
    """One attempt: `sender` and `recipient` with their angle brackets, MAIL's parameters behind the first.

    `claims` are commands before MAIL that say who we are; `together`: MAIL and RCPT go out in one piece.
    """

    name: str
    sender: str
    recipient: str
    hello: str = HELLO
    claims: tuple[str, ...] = ()
    together: bool = False

    @property
    def special(self) -> bool:
        """Whether it needs a session of its own."""
        return self.hello != HELLO or bool(self.claims)

    def __str__(self) -> str:
        said = () if self.hello == HELLO else (self.hello,)
        mail = (f"MAIL FROM:{self.sender}", f"RCPT TO:{self.recipient}")
        return f"{self.name}: {' | '.join((*said, *self.claims, *mail))}"


def probes(hostname: str, literal: str, allowed: str) -> list[Probe]:
    """Return the probes for a server called `hostname` at the IP address `literal`.

    `allowed` is the IP address of somebody who may relay.
    """
    own = f"[IPv6:{literal}]" if ":" in literal else f"[{literal}]"
    sender, to = f"<{SENDER}>", f"{_USER}@{_DOMAIN}"
    plain = f"<{to}>"
    senders = [
        ("stranger to stranger", sender),
        ("null reverse-path", "<>"),
        ("from the recipient's own domain", f"<{_USER}2@{_DOMAIN}>"),
        ("from the recipient itself", plain),
        ("from this server's name", f"<{_USER}@{hostname}>"),
        ("from this server's postmaster", f"<postmaster@{hostname}>"),
        ("from this server's address", f"<{_USER}@{own}>"),
        ("from localhost", f"<{_USER}@localhost>"),
        ("from a name without domain", f"<{_USER}>"),
        ("without angle brackets", SENDER),
        ("says that it is authenticated", f"{sender} AUTH=postmaster@{hostname}"),
    ]
    recipients = [
        ("percent hack", f"{_USER}%{_DOMAIN}"),
        ("percent hack at this server's name", f"{_USER}%{_DOMAIN}@{hostname}"),
        ("percent hack at this server's address", f"{_USER}%{_DOMAIN}@{own}"),
        ("quoted", f'"{to}"'),
        ("quoted percent hack", f'"{_USER}%{_DOMAIN}"'),
        ("quoted at this server's name", f'"{to}"@{hostname}'),
        ("quoted at this server's address", f'"{to}"@{own}'),
        ("two domains, this server's name last", f"{to}@{hostname}"),
        ("two domains, this server's address last", f"{to}@{own}"),
        ("source route by this server's name", f"@{hostname}:{to}"),
        ("source route by this server's address", f"@{own}:{to}"),
        ("bang path", f"{_DOMAIN}!{_USER}"),
        ("bang path at this server's name", f"{_DOMAIN}!{_USER}@{hostname}"),
        ("bang path at this server's address", f"{_DOMAIN}!{_USER}@{own}"),
    ]
    attributes = f"ADDR={'IPV6:' if ':' in allowed else ''}{allowed}"
    return [
        *(Probe(name, path, plain) for name, path in senders),
        *(Probe(name, sender, f"<{path}>") for name, path in recipients),
        Probe("RCPT behind MAIL without waiting", sender, plain, together=True),
        Probe("EHLO as localhost", sender, plain, hello="EHLO localhost"),
        Probe("HELO as this server", sender, plain, hello=f"HELO {hostname}"),
        Probe("XCLIENT claims an allowed address", sender, plain, claims=(f"XCLIENT {attributes}", HELLO)),
        Probe("XFORWARD claims an allowed address", sender, plain, claims=(f"XFORWARD {attributes}",)),
    ]
