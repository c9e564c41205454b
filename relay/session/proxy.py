"""The PROXY protocol header, versions 1 and 2: who the client behind a proxy is. No sockets, no clock.

The grammar is haproxy's proxy-protocol.txt, section 2. Rules: whether a header comes is for the configuration
to say, never guessed (section 2); what does not match to the octet is an error as soon as that can be known,
however TCP cuts it. What is held is bounded by the largest header. What the proxy says of its own connection
(LOCAL, UNKNOWN, UNSPEC) names no client, and this module never puts the proxy's address in its place.
"""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Final, NamedTuple, cast

from relay.policy import client_address

if TYPE_CHECKING:
    from relay.policy import Address

__all__ = ["MAX_HEADER", "Header", "ProxyError", "Result", "Source"]

V1_MAX: Final = 107
"""Octets of the longest header of version 1, CRLF included (section 2.1)."""
V2_MAX_BLOCK: Final = 4096
"""Octets of addresses and TLVs that a header of version 2 may have; real ones stay below 536 (section 2)."""

_V1_START: Final = b"PROXY "
_V2_START: Final = b"\r\n\r\n\0\r\nQUIT\n"
_V2_FIXED: Final = len(_V2_START) + 4

MAX_HEADER: Final = _V2_FIXED + V2_MAX_BLOCK
"""Octets of the longest header that is taken."""

_LOCAL: Final = 0x20  # version 2 in the high half, the command in the low one
_PROXY: Final = 0x21
_UNSPEC: Final = 0x00
_TCP4: Final = 0x11
_TCP6: Final = 0x21
_UNIX: Final = 0x31
_ADDRESS_SIZES: Final = {_TCP4: 12, _TCP6: 36, _UNIX: 216}
"""By family and protocol: octets of both addresses and both ports."""
_TLV_CRC32C: Final = 0x03

_CRLF: Final = b"\r\n"
_NO_TEXT = re.compile(rb"[^ -~]")
_PORT = re.compile(r"0|[1-9][0-9]{0,4}")
_IPV6 = re.compile(r"[0-9A-Fa-f:.]+")  # no zone: it has a meaning on the proxy only


class ProxyError(Exception):
    """The octets are no PROXY header that can be believed; the text says why, for the log."""


class Source(NamedTuple):
    """Where the client connects from."""

    address: Address
    """An IPv4 address that came mapped into IPv6 is IPv4, as `policy.client_address` has it."""
    port: int


class Result(NamedTuple):
    """A whole header."""

    source: Source | None
    """None: the header names no client (LOCAL, UNKNOWN, UNSPEC, a unix socket on the proxy's machine)."""
    rest: bytes
    """What came behind the header: the client's own octets."""


class Header:
    """The header of one connection, as its octets come."""

    def __init__(self) -> None:
        self._held = b""

    def feed(self, octets: bytes) -> Result | None:
        """Take octets; return the result once the header is whole, None while it is not.

        Not to be called again after a result or an error. Raises ProxyError.
        """
        self._held += octets
        held = self._held
        if _begins(held, _V2_START):
            return _version_2(held)
        if _begins(held, _V1_START):
            return _version_1(held)
        raise ProxyError("no PROXY header")


def _begins(held: bytes, start: bytes) -> bool:
    """Whether the octets begin with `start`, as far as they have come."""
    return held[: len(start)] == start[: len(held)]


# Version 1: one line of text (section 2.1)


def _version_1(held: bytes) -> Result | None:
    head = held[:V1_MAX]
    line, end, _ = head.partition(_CRLF)
    if _NO_TEXT.search(line if end else line.removesuffix(b"\r")):
        raise ProxyError("version 1: an octet that is no text, or a bare CR or LF")
    if end:
        return Result(_source_1(line.decode("ascii")), held[len(line) + len(end) :])
    if len(head) == V1_MAX:
        raise ProxyError("version 1: no CRLF within 107 octets")
    return None


def _source_1(line: str) -> Source | None:
    """Read `PROXY TCP4 source destination port port`, its words separated by single spaces."""
    _, family, *words = line.split(" ")
    if family == "UNKNOWN":
        return None  # what follows must be ignored (section 2.1)
    if family not in ("TCP4", "TCP6"):
        raise ProxyError("version 1: the family is not TCP4, TCP6 or UNKNOWN")
    if len(words) != 4:
        raise ProxyError("version 1: not two addresses and two ports")
    address, destination, port, destination_port = words
    _check_address(family, address)
    _check_address(family, destination)
    _check_port(port)
    _check_port(destination_port)
    return _source(address, int(port))


def _check_address(family: str, text: str) -> None:
    """Require an address of the family that was said.

    IPv4 without leading zeros; IPv6 also with its last 32 bits in decimal, which is how inet_ntop(3) and so
    haproxy write mapped addresses.
    """
    try:
        if family == "TCP4":
            IPv4Address(text)
        elif _IPV6.fullmatch(text):
            IPv6Address(text)
        else:
            raise ValueError
    except ValueError:
        raise ProxyError(f"version 1: not an address of {family}") from None


def _check_port(text: str) -> None:
    if not _PORT.fullmatch(text) or int(text) > 65535:
        raise ProxyError("version 1: not a port")


# Version 2: binary (section 2.2)


def _version_2(held: bytes) -> Result | None:
    # An octet that is not there yet is looked at when it is.
    command, kind = held[12:13], held[13:14]
    if command and command[0] not in (_LOCAL, _PROXY):
        raise ProxyError("version 2: another version or an unknown command")
    names_client = command == bytes([_PROXY]) and kind != bytes([_UNSPEC])
    if kind and names_client and kind[0] not in _ADDRESS_SIZES:
        raise ProxyError("version 2: an unknown family, or no stream")
    if len(held) < _V2_FIXED:
        return None
    length = int.from_bytes(held[14:16], "big")
    if length > V2_MAX_BLOCK:
        raise ProxyError(f"version 2: longer than {V2_MAX_BLOCK} octets")
    if names_client and length < _ADDRESS_SIZES[kind[0]]:
        raise ProxyError("version 2: no room for the addresses of its family")
    size = _V2_FIXED + length
    if len(held) < size:
        return None
    source = _source_2(held[:size], kind[0]) if names_client else None
    return Result(source, held[size:])


def _source_2(header: bytes, kind: int) -> Source | None:
    _check_tlvs(header, _V2_FIXED + _ADDRESS_SIZES[kind])
    block = header[_V2_FIXED:]
    if kind == _TCP4:
        return _source(str(IPv4Address(block[:4])), int.from_bytes(block[8:10], "big"))
    if kind == _TCP6:
        return _source(str(IPv6Address(block[:16])), int.from_bytes(block[32:34], "big"))
    return None


def _check_tlvs(header: bytes, at: int) -> None:
    """Walk over the TLVs from offset `at` to the end; a checksum among them must be right (2.2.3)."""
    checked = False
    while at < len(header):
        value = at + 3
        end = value + int.from_bytes(header[at + 1 : value], "big")
        if value > len(header) or end > len(header):
            raise ProxyError("version 2: a TLV goes beyond the header")
        if header[at] == _TLV_CRC32C:
            if checked or end - value != 4:
                raise ProxyError("version 2: a checksum too many, or not of 32 bits")
            checked = True
            if int.from_bytes(header[value:end], "big") != crc32c(header[:value] + bytes(4) + header[end:]):
                raise ProxyError("version 2: the checksum is wrong")
        at = end


def _source(address: str, port: int) -> Source:
    return Source(cast("Address", client_address(address)), port)


# The checksum (RFC 9260 Appendix A): CRC-32 with Castagnoli's polynomial, which zlib does not have.


def _remainder(octet: int) -> int:
    for _ in range(8):
        octet = octet >> 1 ^ (0x82F63B78 if octet & 1 else 0)
    return octet


_REMAINDERS = tuple(_remainder(octet) for octet in range(256))


def crc32c(octets: bytes) -> int:
    """Return the CRC-32C of `octets`."""
    crc = 0xFFFFFFFF
    for octet in octets:
        crc = _REMAINDERS[(crc ^ octet) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF
