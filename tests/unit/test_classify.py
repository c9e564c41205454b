"""What a header section says: real forms of real applications, then anything at all."""

from __future__ import annotations

import email.header
import json
from email.message import EmailMessage
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relay.classify import (
    MAX_ID,
    MAX_KEPT,
    MAX_REPEATS,
    MAX_TAG,
    MAX_TAGS,
    MAX_TASK_TYPE,
    Classification,
    Classifier,
)

DEFAULT_HEADERS = ["X-Task-Type", "X-MC-Tags", "X-Mailgun-Tag", "X-PM-Tag", "X-SES-Message-Tags", "X-SMTPAPI"]
SENDER = b"app@example.com"


def classifier(**changed: Any) -> Classifier:
    settings: dict[str, Any] = {
        "headers": DEFAULT_HEADERS,
        "default": "unclassified",
        "id_header": "X-Task-ID",
        "rules": [],
        "keep": ["Message-ID"],
    }
    return Classifier(**{**settings, **changed})


def classify(header: bytes, sender: bytes = SENDER, **changed: Any) -> Classification:
    return classifier(**changed).classify(header, sender)


@pytest.mark.parametrize(
    ("header", "task_type", "tags"),
    [
        # Plain headers.
        (b"X-Task-Type: mention\r\n", "mention", ["mention"]),
        (b"x-task-TYPE:mention", "mention", ["mention"]),
        (b"X-Task-Type :\t mention \t\r\n", "mention", ["mention"]),
        (b"Subject: x\r\nX-PM-Tag: welcome, all of it\r\n", "welcome, all of it", ["welcome, all of it"]),
        (b"X-Mailgun-Tag: one\r\nTo: a@b\r\nX-Mailgun-Tag: two\r\n", "one", ["one", "two"]),
        # The order is the configuration's, not the message's; an empty one does not win.
        (b"X-PM-Tag: second\r\nX-Task-Type: first\r\n", "first", ["first", "second"]),
        (b"X-Task-Type: \r\nX-PM-Tag: second\r\n", "second", ["second"]),
        (b"X-Mailgun-Tag:\r\nX-Mailgun-Tag: two\r\n", "two", ["two"]),
        (b"X-PM-Tag: same\r\nX-Task-Type: same\r\n", "same", ["same"]),
        # Folded.
        (b"X-Task-Type:\r\n mention\r\n", "mention", ["mention"]),
        (b"X-Task-Type: a\r\n\tb\r\n  c\r\nTo: d\r\n", "a b c", ["a b c"]),
        # Mandrill.
        (b"X-MC-Tags: welcome, onboarding ,,b2b\r\n", "welcome", ["welcome", "onboarding", "b2b"]),
        (b"X-MC-Tags: ,\r\nX-PM-Tag: p\r\n", "p", ["p"]),
        # SES.
        (b"X-SES-MESSAGE-TAGS: app=shop, kind=receipt\r\n", "shop", ["app=shop", "kind=receipt"]),
        (b"X-SES-MESSAGE-TAGS: app=shop,\r\n Type=receipt\r\n", "receipt", ["app=shop", "Type=receipt"]),
        (b"X-SES-MESSAGE-TAGS: category=c, task_type=t\r\n", "c", ["category=c", "task_type=t"]),
        (b"X-SES-MESSAGE-TAGS: app=, type= , x=y=z\r\n", "y=z", ["app=", "type=", "x=y=z"]),
        (b"X-SES-MESSAGE-TAGS: bare\r\n", "unclassified", ["bare"]),
        # SendGrid.
        (b'X-SMTPAPI: {"category": "newuser"}\r\n', "newuser", ["newuser"]),
        (b'X-SMTPAPI: {"to": ["a@b"],\r\n "category": ["Orders",\r\n "x"]}\r\n', "Orders", ["Orders", "x"]),
        (b'X-SMTPAPI: {"category": "Ord\r\n\ters"}\r\n', "Ord ers", ["Ord ers"]),
        (b'X-SMTPAPI: {"category": [1, null, "", "real"]}\r\n', "real", ["real"]),
        (rb'X-SMTPAPI: {"category": "gr\u00fcn\u0000\ud800"}', "grün", ["grün"]),
        # Malformed JSON is a header that is not there.
        (b'X-SMTPAPI: {"category": "cut\r\n', "unclassified", []),
        (b"X-SMTPAPI: []\r\n", "unclassified", []),
        (b'X-SMTPAPI: "category"\r\n', "unclassified", []),
        (b'X-SMTPAPI: {"category": {"a": 1}}\r\n', "unclassified", []),
        (b"X-SMTPAPI: " + b"[" * 60_000, "unclassified", []),
        (b'X-SMTPAPI: {"category": ' + b"9" * 5000 + b"}", "unclassified", []),
        # Eight-bit, controls, other blanks.
        ("X-Task-Type: grüße\r\n".encode(), "grüße", ["grüße"]),
        (b"X-Task-Type: gr\xfc\r\n", r"gr\xfc", [r"gr\xfc"]),
        (b"X-Task-Type: a\x00b\x1b[31m\x7fc\r\n", "ab[31mc", ["ab[31mc"]),
        ("X-Task-Type: a\u2028b\u00a0c\u200bd\r\n".encode(), "a b cd", ["a b cd"]),
        (b"X-Task-Type: \x00\r\nX-PM-Tag: p\r\n", "p", ["p"]),
        # Names that only look like it.
        (b"X-Task-Types: a\r\nNot-X-Task-Type: b\r\nX-Task-Type b: c\r\nX-Task-Type\r\n", "unclassified", []),
        (b"Subject: a\r\n X-Task-Type: folded into the subject\r\n", "unclassified", []),
        # A line ends at CRLF and nowhere else.
        (b"Subject: a\nX-Task-Type: b\r\nTo: c\rX-Task-Type: d", "unclassified", []),
        (b"Subject: a\x0bX-Task-Type: b\x0cX-Task-Type: c\x85X-Task-Type: d\r\n", "unclassified", []),
        (b"X-Task-Type: a\nX-PM-Tag: b\r\n", "a X-PM-Tag: b", ["a X-PM-Tag: b"]),
        # The receiver deletes a dot at the beginning of a line.
        (b".X-Task-Type: a\r\n", "a", ["a"]),
        (b"To: b\r\n.X-Task-Type: a\r\n", "a", ["a"]),
        (b"To: b\r\n..X-Task-Type: a\r\n", "unclassified", []),
        (b"X-Task-Type: .a\r\n", ".a", [".a"]),
        # No header at all.
        (b"", "unclassified", []),
        (b" starts folded\r\n", "unclassified", []),
    ],
)
def test_task_type_and_tags(header: bytes, task_type: str, tags: list[str]) -> None:
    found = classify(header)
    assert found.task_type == task_type
    assert found.tags == tags


@pytest.mark.parametrize(
    ("value", "task_type"),
    [
        (b"=?utf-8?q?gr=C3=BC=C3=9Fe_an?=", "grüße an"),
        (b"=?UTF-8?B?Z3LDvMOfZQ==?=", "grüße"),
        (b"=?utf-8?b?Z3LDvMOfZQ?=", "grüße"),  # padding forgotten
        (b"=?iso-8859-1*de?Q?gr=FC=DFe?= plain", "grüße plain"),
        (b"a =?utf-8?q?b?=\r\n =?iso-8859-1?q?=FC?= c", "a bü c"),
        (b"=?utf-8?q?gr=C3?= =?utf-8?q?=BC?=", "grü"),  # a character cut in two
        (b"=?utf-8?q?x=0D=0AX-PM-Tag:_y=00?=", "x X-PM-Tag: y"),
        (b"=?iso-2022-jp?B?GyRCRnxLXBsoQg==?=", "日本"),
        # Not decodable: left as it stands.
        (b"=?utf-8?q?=FF?=", "=?utf-8?q?=FF?="),
        (b"=?utf-8?b?Z?=", "=?utf-8?b?Z?="),
        (b"=?rot13?q?abc?=", "=?rot13?q?abc?="),
        (b"=?unicode_escape?q?=5Cx41?=", "=?unicode_escape?q?=5Cx41?="),
        (b"=?zlib?q?abc?=", "=?zlib?q?abc?="),
        (b"=?utf-8?x?abc?=", "=?utf-8?x?abc?="),
        (b"=?utf-8?q?a b?=", "=?utf-8?q?a b?="),
        (b"=?utf-8?q?abc", "=?utf-8?q?abc"),
    ],
)
def test_encoded_words(value: bytes, task_type: str) -> None:
    assert classify(b"X-Task-Type: " + value + b"\r\n").task_type == task_type


def test_encoded_lists_and_json() -> None:
    tags = email.header.Header("grün, blau", "utf-8").encode().encode()
    assert classify(b"X-MC-Tags: " + tags).tags == ["grün", "blau"]
    api = email.header.Header(json.dumps({"category": ["grün"]}, ensure_ascii=False), "utf-8").encode()
    assert classify(b"X-SMTPAPI: " + api.replace("\n", "\r\n").encode()).task_type == "grün"


def test_what_the_standard_library_writes_is_read() -> None:
    message = EmailMessage()
    message["Message-ID"] = "<abc@example.com>"
    message["X-Task-Type"] = "Erwähnung in einem sehr langen Namen, der über die Zeile hinausgeht 🎉"
    message["X-SMTPAPI"] = json.dumps({"category": ["a" * 60, "b" * 60], "unique_args": {"k": "v" * 60}})
    message.set_content("x")
    header = message.as_bytes().partition(b"\n\n")[0].replace(b"\n", b"\r\n")
    found = classify(header)
    assert found.task_type == str(message["X-Task-Type"])[:MAX_TASK_TYPE].strip()
    assert found.tags == [str(message["X-Task-Type"]), "a" * 60, "b" * 60]
    assert found.message_id == "<abc@example.com>"


# ----------------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize(
    ("sender", "task_type"),
    [
        (b"digest@example.com", "digest"),
        (b"DIGEST@Example.COM", "digest"),
        (b"xdigest@example.com", "unclassified"),
        (b"digest@example.com.evil", "unclassified"),
        (b"digest@exampleXcom", "unclassified"),
        (b"bounce+123@mail.example.com", "bounce"),
        (b"bounce+@mail.a.b.example.com", "bounce"),
        (b"bounce@mail.example.com", "unclassified"),
        (b"anyone@news.example", "news"),
        (b"@news.example", "news"),
        (b"", "null"),
        (b"\xff@news.example", "news"),
        ("GRÜSSE@example.com".encode(), "unclassified"),
        ("GRÜßE@example.com".encode(), "greeting"),
    ],
)
def test_rules_look_at_the_sender(sender: bytes, task_type: str) -> None:
    rules = [
        ("digest@example.com", "digest"),
        ("bounce+*@mail.*example.com", "bounce"),
        ("*@news.example", "news"),
        ("<>", "null"),
        ("grüße@example.com", "greeting"),
        ("digest@*.com", "later"),
    ]
    found = classify(b"X-Other: x\r\n", sender, rules=rules)
    assert found.task_type == task_type


def test_a_header_comes_before_the_rules_and_the_first_rule_wins() -> None:
    rules = [("*", "first"), ("app@example.com", "second")]
    assert classify(b"X-Task-Type: header", rules=rules).task_type == "header"
    assert classify(b"X-Task-Type: ", rules=rules).task_type == "first"


def test_many_wildcards_are_no_trap() -> None:
    rules = [("*a" * 40 + "b", "never")]
    assert classify(b"", b"a" * 5000, rules=rules).task_type == "unclassified"


# -------------------------------------------------------------------------------- ids and kept headers


def test_ids() -> None:
    found = classify(
        b"message-id:\r\n <1@example.com>\r\nMessage-ID: <2@example.com>\r\n"
        b"X-Task-ID: \r\nX-TASK-ID: =?utf-8?q?a?=-7\r\n"
    )
    assert found.message_id == "<1@example.com>"
    assert found.client_task_id == "a-7"


def test_without_ids() -> None:
    assert classify(b"Message-ID:\r\nX-Task-ID:\x00\r\n")[1:3] == (None, None)
    assert classify(b"To: a\r\n")[1:3] == (None, None)
    assert classify(b"X-Task-ID: 7\r\n", id_header=None).client_task_id is None


def test_kept_headers_are_as_given() -> None:
    found = classify(
        b"Subject: =?utf-8?q?not_decoded?=  two\r\nX-Raw: \xff\x00\xc3\xbc\r\n"
        b"X-Two: a\r\nX-TWO:\r\nReceived: r\r\n",
        keep=["subject", "X-Raw", "X-Two", "X-Absent", "Received"],
    )
    assert found.headers == {
        "subject": "=?utf-8?q?not_decoded?=  two",
        "X-Raw": r"\xff\x00ü",
        "X-Two": ["a", ""],
        "Received": "r",
    }
    assert found.received == 1


def test_one_header_may_serve_for_everything() -> None:
    found = classify(b"X-A: a\r\n", headers=["X-A"], id_header="x-a", keep=["X-a"])
    assert found == ("a", "a", None, {"X-a": "a"}, ["a"], 0)


def test_names_are_taken_literally() -> None:
    assert classify(b"X-A: 1\r\nX.A: 2\r\n", headers=["X.A"]).task_type == "2"


@pytest.mark.parametrize(
    ("header", "received"),
    [
        (b"Received: a\r\n\tb\r\nRECEIVED:c\r\nreceived : d\r\n", 3),
        (b"Received-SPF: pass\r\nX-Received: x\r\nSubject: a\r\n Received: b\r\n", 0),
        (b"Received: x\r\n" * 3000, 3000),
        (b"To: a\r\n.Received: b\r\n", 1),
    ],
)
def test_received_fields_are_counted(header: bytes, received: int) -> None:
    assert classify(header).received == received


# ---------------------------------------------------------------------------------------------- bounds


def test_a_task_type_is_cut_at_64_characters() -> None:
    assert classify(b"X-Task-Type: " + b"a" * 1000).task_type == "a" * 64
    assert classify(b"X-Task-Type: " + b"a" * 63 + b" bc").task_type == "a" * 63


def test_everything_is_bounded() -> None:
    header = b"X-MC-Tags: " + b",".join(b"%d" % number + b"-" * 300 for number in range(200)) + b"\r\n"
    header += b"X-Mailgun-Tag: " + b"m" * 400 + b"\r\n"
    header += b"Message-ID: " + b"i" * 5000 + b"\r\nX-Task-ID: " + b"t" * 5000 + b"\r\n"
    header += b"X-Many: x\r\n" * 500
    found = classify(header, keep=["Message-ID", "X-Many"])
    check_bounds(found)
    assert len(found.tags) == MAX_TAGS
    assert found.message_id == "i" * MAX_KEPT
    assert found.client_task_id == "t" * MAX_ID
    assert found.headers == {"Message-ID": "i" * MAX_KEPT, "X-Many": ["x"] * MAX_REPEATS}


def check_bounds(found: Classification) -> None:
    assert 0 < len(found.task_type) <= MAX_TASK_TYPE
    assert found.task_type.isprintable()
    assert found.task_type == found.task_type.strip()
    assert len(found.tags) <= MAX_TAGS
    assert len(set(found.tags)) == len(found.tags)
    for tag in found.tags:
        assert 0 < len(tag) <= MAX_TAG
        assert tag.isprintable()
    if found.client_task_id is not None:
        assert 0 < len(found.client_task_id) <= MAX_ID
        assert found.client_task_id.isprintable()
    for value in (found.message_id, *found.headers.values()):
        for text in value if isinstance(value, list) else [value]:
            if text is not None:
                assert isinstance(text, str)
                assert len(text) <= MAX_KEPT
                assert "\0" not in text
                text.encode()  # can be stored


FIELD = st.builds(
    lambda dot, name, colon, value: dot + name + colon + value,
    st.sampled_from([b"", b"", b"", b".", b" ", b"\t"]),
    st.sampled_from(
        [*(name.encode() for name in DEFAULT_HEADERS), b"Message-ID", b"X-Task-ID", b"Received", b""]
    ),
    st.sampled_from([b": ", b":", b" :", b""]),
    st.one_of(
        st.binary(max_size=40),
        st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.builds(
            b"=?%b?%b?%b?=".__mod__,
            st.tuples(
                st.sampled_from(
                    [b"utf-8", b"iso-8859-1", b"iso-2022-jp", b"big5", b"utf-7", b"idna", b"hex"]
                ),
                st.sampled_from([b"q", b"B", b"x"]),
                st.binary(max_size=20),
            ),
        ),
        st.recursive(
            st.none() | st.text(max_size=5) | st.integers() | st.floats(),
            lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["category", "to"]), inner),
            max_leaves=8,
        ).map(lambda value: json.dumps(value).encode()),
        st.lists(st.sampled_from([b"type=a", b"b=c", b"=", b"x", b""])).map(b",".join),
    ),
)


@given(
    st.one_of(st.binary(), st.lists(FIELD, max_size=12).map(b"\r\n".join)),
    st.binary(max_size=20),
)
@example(b"X-Task-Type: =?utf-8?q?=00?=\r\n", b"")
def test_nothing_raises_and_everything_is_bounded(header: bytes, sender: bytes) -> None:
    keep = ["Message-ID", "X-SMTPAPI", "Received"]
    check_bounds(classify(header, sender, keep=keep, rules=[("a*b*", "ab"), ("<>", "null")]))


@given(st.lists(FIELD, max_size=6).map(b"\r\n".join), st.integers(min_value=0))
def test_a_cut_section_is_no_danger(header: bytes, cut: int) -> None:
    check_bounds(classify(header[: cut % (len(header) + 1)]))


def test_a_settings_object_is_reused() -> None:
    reused = classifier()
    assert reused.classify(b"X-MC-Tags: a,b", SENDER).tags == ["a", "b"]
    assert reused.classify(b"X-MC-Tags: c", SENDER).tags == ["c"]
