"""The PROXY header: its grammar to the octet, however TCP cuts it, and never more held than allowed."""

from __future__ import annotations

import itertools
import socket
import struct
from ipaddress import IPv4Address, IPv6Address, ip_address

import crc32c as independent_crc32c
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from proxyprotocol.result import ProxyResultIPv4, ProxyResultIPv6, ProxyResultLocal, ProxyResultUnix
from proxyprotocol.tlv import ProxyProtocolTLV
from proxyprotocol.v1 import ProxyProtocolV1
from proxyprotocol.v2 import ProxyProtocolV2

from relay.session.proxy import MAX_HEADER, Header, ProxyError, Result, Source, crc32c

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
INET = bytes([192, 0, 2, 1, 192, 0, 2, 9]) + struct.pack("!HH", 40000, 25)
INET6 = IPv6Address("2001:db8::1").packed + IPv6Address("2001:db8::9").packed + struct.pack("!HH", 40000, 25)
UNIX = b"/run/client.sock".ljust(108, b"\0") + b"/run/relay.sock".ljust(108, b"\0")
CLIENT = Source(IPv4Address("192.0.2.1"), 40000)
CLIENT6 = Source(IPv6Address("2001:db8::1"), 40000)


def v2(command: int, kind: int, block: bytes = b"", *, length: int | None = None) -> bytes:
    return SIGNATURE + struct.pack("!BBH", command, kind, len(block) if length is None else length) + block


def tlv(kind: int, value: bytes) -> bytes:
    return struct.pack("!BH", kind, len(value)) + value


def checksummed(kind: int, addresses: bytes, *, before: bytes = b"", after: bytes = b"") -> bytes:
    """A header with the checksum that another implementation of CRC-32C gives."""
    blank = v2(0x21, kind, addresses + before + tlv(3, bytes(4)) + after)
    checksum = independent_crc32c.crc32c(blank).to_bytes(4, "big")
    return v2(0x21, kind, addresses + before + tlv(3, checksum) + after)


def outcome(*pieces: bytes) -> Result | str | None:
    """Feed pieces; what comes behind the header in a piece of its own counts as the rest."""
    header = Header()
    result: Result | None = None
    for number, piece in enumerate(pieces):
        try:
            result = header.feed(piece)
        except ProxyError as error:
            return str(error)
        if result is not None:
            return result._replace(rest=result.rest + b"".join(pieces[number + 1 :]))
    return None


GOOD = {
    # The example of proxy-protocol.txt, section 2.1
    b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n": Source(IPv4Address("192.168.0.1"), 56324),
    b"PROXY TCP4 192.0.2.1 192.0.2.9 40000 25\r\n": CLIENT,
    b"PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n": Source(
        IPv4Address("255.255.255.255"), 65535
    ),
    b"PROXY TCP4 0.0.0.0 0.0.0.0 0 0\r\n": Source(IPv4Address("0.0.0.0"), 0),
    b"PROXY TCP6 2001:db8::1 2001:DB8:0:0:0:0:0:9 40000 25\r\n": CLIENT6,
    b"PROXY TCP6 %b %b 65535 65535\r\n" % ((b"ffff:" * 7 + b"ffff",) * 2): Source(
        IPv6Address(2**128 - 1), 65535
    ),
    b"PROXY TCP6 ::ffff:192.0.2.1 ::1 40000 25\r\n": CLIENT,
    b"PROXY TCP6 ::ffff:c000:201 ::1 40000 25\r\n": CLIENT,
    b"PROXY UNKNOWN\r\n": None,
    b"PROXY UNKNOWN \r\n": None,
    b"PROXY UNKNOWN %b %b 65535 65535\r\n" % ((b"ffff:" * 7 + b"ffff",) * 2): None,  # 107 octets
    b"PROXY UNKNOWN and whatever else stands here\r\n": None,
    v2(0x21, 0x11, INET): CLIENT,
    v2(0x21, 0x11, INET + tlv(4, b"") + tlv(0xE0, b"\r\nMAIL") + tlv(4, bytes(300))): CLIENT,
    v2(0x21, 0x11, INET + tlv(4, bytes(4096 - 12 - 3))): CLIENT,
    v2(0x21, 0x21, INET6): CLIENT6,
    v2(0x21, 0x21, IPv6Address("::ffff:192.0.2.1").packed + INET6[16:]): CLIENT,
    v2(0x21, 0x31, UNIX): None,
    v2(0x21, 0x00): None,
    v2(0x21, 0x00, b"ignored"): None,
    v2(0x20, 0x00): None,
    v2(0x20, 0x11, INET): None,
    v2(0x20, 0x99, b"ignored, and the family with it"): None,
    checksummed(0x11, INET): CLIENT,
    checksummed(0x21, INET6, before=tlv(5, b"id"), after=tlv(2, b"mail.test")): CLIENT6,
    checksummed(0x31, UNIX): None,
}

BAD_1 = [
    b"PROXY TCP4 192.0.2.1 192.0.2.9 40000 25\n",
    b"PROXY TCP4 192.0.2.1 192.0.2.9 40000 25\r\r\n",
    b"PROXY TCP4 192.0.2.1 192.0.2.9 40000\n25\r\n",
    b"PROXY TCP4 192.0.2.1 192.0.2.9 40000\t25\r\n",
    b"PROXY TCP4  192.0.2.1 192.0.2.9 40000 25\r\n",
    b"PROXY  TCP4 192.0.2.1 192.0.2.9 40000 25\r\n",
    b"PROXY TCP4 192.0.2.1 192.0.2.9 40000 25 \r\n",
    b"PROXY TCP4 192.0.2.1 192.0.2.9 40000 25 26\r\n",
    b"PROXY TCP4 192.0.2.1 192.0.2.9 40000\r\n",
    b"PROXY TCP4\r\n",
    b"PROXY \r\n",
    b"PROXY TCP4 192.0.2.1 192.0.2.9 040000 25\r\n",
    b"PROXY TCP4 192.0.2.1 192.0.2.9 40000 025\r\n",
    b"PROXY TCP4 192.0.2.1 192.0.2.9 65536 25\r\n",
    b"PROXY TCP4 192.0.2.1 192.0.2.9 40000 65536\r\n",
    b"PROXY TCP4 192.0.2.1 192.0.2.9 -1 25\r\n",
    b"PROXY TCP4 192.0.2.1 192.0.2.9 +1 25\r\n",
    b"PROXY TCP4 192.0.2.1 192.0.2.9 4_0 25\r\n",
    b"PROXY TCP4 192.0.2.1 192.0.2.9 40000 25\xa0\r\n",
    b"PROXY TCP4 192.0.2.1 192.0.2.9 \xd9\xa1 25\r\n",
    b"PROXY TCP4 192.0.2.01 192.0.2.9 40000 25\r\n",
    b"PROXY TCP4 192.0.2.256 192.0.2.9 40000 25\r\n",
    b"PROXY TCP4 192.0.2 192.0.2.9 40000 25\r\n",
    b"PROXY TCP4 3221225985 192.0.2.9 40000 25\r\n",
    b"PROXY TCP4 localhost 192.0.2.9 40000 25\r\n",
    b"PROXY TCP4 2001:db8::1 192.0.2.9 40000 25\r\n",
    b"PROXY TCP4 192.0.2.1 2001:db8::9 40000 25\r\n",
    b"PROXY TCP6 192.0.2.1 2001:db8::9 40000 25\r\n",
    b"PROXY TCP6 2001:db8::1 192.0.2.9 40000 25\r\n",
    b"PROXY TCP6 fe80::1%eth0 2001:db8::9 40000 25\r\n",
    b"PROXY TCP6 [2001:db8::1] 2001:db8::9 40000 25\r\n",
    b"PROXY TCP6 2001::db8::1 2001:db8::9 40000 25\r\n",
    b"PROXY TCP6 2001:db8::11111 2001:db8::9 40000 25\r\n",
    b"PROXY TCP44 192.0.2.1 192.0.2.9 40000 25\r\n",
    b"PROXY tcp4 192.0.2.1 192.0.2.9 40000 25\r\n",
    b"PROXY UDP4 192.0.2.1 192.0.2.9 40000 25\r\n",
    b"PROXY UNKNOWNX\r\n",
    b"PROXY unknown\r\n",
    b"PROXY UNKNOWN a\rb\r\n",
    b"PROXY UNKNOWN a\0b\r\n",
    b"PROXY UNKNOWN " + b"x" * 92 + b"\r\n",  # 108 octets
    b"PROXY TCP6 " + b"f" * 100 + b"\r\n",
]

BAD_2 = [
    v2(0x11, 0x11, INET),
    v2(0x31, 0x11, INET),
    v2(0x22, 0x11, INET),
    v2(0x2F, 0x11, INET),
    v2(0x21, 0x01, INET),
    v2(0x21, 0x10, INET),
    v2(0x21, 0x12, INET),
    v2(0x21, 0x22, INET6),
    v2(0x21, 0x32, UNIX),
    v2(0x21, 0x13, INET),
    v2(0x21, 0x41, INET),
    v2(0x21, 0xF1, INET),
    v2(0x21, 0x11),
    v2(0x21, 0x11, INET[:-1]),
    v2(0x21, 0x21, INET6[:-1]),
    v2(0x21, 0x31, UNIX[:-1]),
    v2(0x21, 0x11, INET + b"\x04"),
    v2(0x21, 0x11, INET + b"\x04\x00"),
    v2(0x21, 0x11, INET + tlv(4, b"ab")[:-1]),
    v2(0x21, 0x11, INET + tlv(4, b"ab") + b"\x04\xff\xff"),
    v2(0x21, 0x11, INET + tlv(3, bytes(4))),
    v2(0x21, 0x11, INET + tlv(3, b"")),
    v2(0x21, 0x11, INET + tlv(3, bytes(5))),
    v2(0x21, 0x11, INET, length=4097),
    v2(0x20, 0x00, length=4097),
    v2(0x21, 0x00, length=0xFFFF),
    checksummed(0x11, INET)[:-1] + b"\0",
    checksummed(0x11, INET, before=tlv(3, bytes(4))),
    checksummed(0x11, INET, after=tlv(3, bytes(4))),
]

NO_HEADER = [
    *(b"E", b"QUIT\r\n", b"\n", b"\0", b"\x16\x03\x01", b"GET / HTTP/1.1\r\n", b" PROXY TCP4", b"proxy "),
    *(b"PROXX", b"PROXY\r\n", b"PROXY\t", b"\r\n\r\n\0\r\nQUIT\r", b"\r\n\r\n\r\n", b"\r\r", SIGNATURE[1:]),
]


@pytest.mark.parametrize("octets", GOOD, ids=repr)
def test_a_header_and_what_is_behind_it_wherever_it_is_cut(octets: bytes) -> None:
    for rest in (b"", b"EHLO client.test\r\n", b"PROXY TCP4 127.0.0.1 127.0.0.1 1 25\r\n", b"\r\n", bytes(9)):
        whole = octets + rest
        expected = Result(GOOD[octets], rest)
        assert outcome(whole) == expected
        for cut in range(len(whole)):
            assert outcome(whole[:cut], whole[cut:]) == expected
        assert outcome(*(whole[at : at + 1] for at in range(len(whole)))) == expected


@pytest.mark.parametrize("octets", GOOD, ids=repr)
def test_no_part_of_a_header_is_one(octets: bytes) -> None:
    for end in range(len(octets)):
        assert outcome(octets[:end]) is None


@pytest.mark.parametrize("octets", [*BAD_1, *BAD_2, *NO_HEADER], ids=repr)
def test_what_does_not_match_is_refused_wherever_it_is_cut(octets: bytes) -> None:
    reason = outcome(octets)
    assert isinstance(reason, str)
    for cut in range(len(octets)):
        assert outcome(octets[:cut], octets[cut:]) == reason
    assert outcome(octets + b"EHLO client.test\r\n") == reason
    assert outcome(*(octets[at : at + 1] for at in range(len(octets)))) == reason


@pytest.mark.parametrize("octet", sorted(set(range(256)) - {ord("P"), ord("\r")}))
def test_the_first_octet_that_cannot_begin_a_header_is_refused_at_once(octet: int) -> None:
    assert outcome(bytes([octet])) == "no PROXY header"


def test_what_can_be_known_early_is_not_waited_for() -> None:
    assert outcome(b"PROX") is None
    assert outcome(b"PROXX") == "no PROXY header"
    assert outcome(SIGNATURE + b"\x22") == "version 2: another version or an unknown command"
    assert outcome(SIGNATURE + b"\x21\x12") == "version 2: an unknown family, or no stream"
    assert outcome(SIGNATURE + b"\x21\x11\x10\x01") == "version 2: longer than 4096 octets"
    assert outcome(SIGNATURE + b"\x21\x11\x00\x0b") == "version 2: no room for the addresses of its family"
    assert outcome(b"PROXY \n") == "version 1: an octet that is no text, or a bare CR or LF"
    assert outcome(b"PROXY TCP4".ljust(106)) is None
    assert outcome(b"PROXY TCP4".ljust(107)) == "version 1: no CRLF within 107 octets"


near = st.one_of(
    st.binary(max_size=200),
    st.binary(max_size=200).map(lambda tail: SIGNATURE + tail),
    st.builds(v2, st.sampled_from([0x20, 0x21]), st.integers(0, 255), st.binary(max_size=300)),
    st.builds(lambda tail: v2(0x21, 0x11, INET + tail), st.binary(max_size=30)),
    st.text("PROXYTCPUNKW46 .:0129af\r\n\0", max_size=120).map(lambda text: b"PROXY " + text.encode()),
    st.builds(
        lambda header, at, octet: header[:at] + bytes([octet]) + header[at + 1 :],
        st.sampled_from(sorted(GOOD)),
        st.integers(0, 260),
        st.integers(0, 255),
    ),
)


@given(near, st.lists(st.integers(0, 300), max_size=5))
@example(SIGNATURE + b"\x21\x11\xff\xff", [])
def test_whatever_comes_is_a_result_an_error_or_too_little(octets: bytes, cuts: list[int]) -> None:
    found = outcome(octets)
    assert found is None or isinstance(found, Result | str)
    bounds = sorted({0, len(octets), *(cut for cut in cuts if cut < len(octets))})
    assert outcome(*(octets[a:b] for a, b in itertools.pairwise(bounds))) == found
    if found is None:
        assert len(octets) < MAX_HEADER
        # More is never asked for than the bound, whatever comes.
        assert outcome(octets + b"x" * (MAX_HEADER - len(octets))) is not None
    elif isinstance(found, Result):
        header = octets[: len(octets) - len(found.rest)]
        assert octets.endswith(found.rest)
        assert outcome(header) == Result(found.source, b"")
        assert len(header) <= (107 if header.startswith(b"P") else MAX_HEADER)


# Headers made by another implementation

ports = st.integers(0, 65535)


@given(st.ip_addresses(v=4), st.ip_addresses(v=4), ports, ports)
def test_tcp4_of_another_implementation(
    source: IPv4Address, destination: IPv4Address, port: int, destination_port: int
) -> None:
    made = ProxyResultIPv4((source, port), (destination, destination_port), protocol=socket.SOCK_STREAM)
    for octets in (ProxyProtocolV1().pack(made), ProxyProtocolV2().pack(made)):
        assert outcome(octets + b"EHLO") == Result(Source(source, port), b"EHLO")


@given(st.ip_addresses(v=6), st.ip_addresses(v=6), ports, ports)
@example(ip_address("::ffff:192.0.2.1"), ip_address("::1"), 1, 25)
@example(ip_address("::"), ip_address("::"), 0, 0)
def test_tcp6_of_another_implementation(
    source: IPv6Address, destination: IPv6Address, port: int, destination_port: int
) -> None:
    made = ProxyResultIPv6((source, port), (destination, destination_port), protocol=socket.SOCK_STREAM)
    for octets in (ProxyProtocolV1().pack(made), ProxyProtocolV2().pack(made)):
        assert outcome(octets) == Result(Source(source.ipv4_mapped or source, port), b"")


@given(st.binary(max_size=500), st.text("abc.", max_size=60))
def test_checksums_of_another_implementation(unique_id: bytes, authority: str) -> None:
    tlvs = ProxyProtocolTLV(unique_id=unique_id, authority=authority)
    made = ProxyResultIPv4(
        (IPv4Address("192.0.2.1"), 40000),
        (IPv4Address("192.0.2.9"), 25),
        protocol=socket.SOCK_STREAM,
        tlv=tlvs,
    )
    octets = ProxyProtocolV2().pack(made)
    assert b"\x03\x00\x04" in octets
    assert outcome(octets) == Result(CLIENT, b"")
    wrong = octets[:20] + bytes([octets[20] ^ 1]) + octets[21:]  # the destination, which no one else looks at
    assert outcome(wrong) == "version 2: the checksum is wrong"


def test_connections_of_the_proxy_itself_by_another_implementation() -> None:
    assert outcome(ProxyProtocolV2().pack(ProxyResultLocal())) == Result(None, b"")
    unix = ProxyResultUnix("/client", "/relay", protocol=socket.SOCK_STREAM)
    assert outcome(ProxyProtocolV2().pack(unix)) == Result(None, b"")


@given(st.binary(max_size=300))
@example(b"123456789")
def test_the_checksum_is_crc_32c(octets: bytes) -> None:
    assert crc32c(octets) == independent_crc32c.crc32c(octets)
