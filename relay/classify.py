"""What a message says about itself: task type, tags, ids and kept headers, from its header section.

Rules: pure functions of octets and settings. Nothing here refuses mail: a header that is malformed is a
header that is not there. Lines end at CRLF and nowhere else, since a relay that sees other lines than the
upstream does is fooled; names are compared without regard to case; the first header of the configured order
that yields a type wins, then the rules, then the default. No header here is an address, and none is parsed
as one. Everything that comes out is bounded, printable where it is a label, and storable.

The forms of the providers' headers, as they document them: `X-MC-Tags` (Mandrill) is a list with commas;
`X-Mailgun-Tag` is repeated, one tag each; `X-PM-Tag` (Postmark) is one tag; `X-SES-Message-Tags` is a list
of `name=value` with commas; `X-SMTPAPI` (SendGrid) is a JSON object whose `category` is a string or a list.
Any other header holds one value.
"""

from __future__ import annotations

import binascii
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

from relay.records.model import Json

__all__ = [
    "MAX_ID",
    "MAX_KEPT",
    "MAX_REPEATS",
    "MAX_TAG",
    "MAX_TAGS",
    "MAX_TASK_TYPE",
    "Classification",
    "Classifier",
]

MAX_TASK_TYPE: Final = 64
"""Characters of a task type."""
MAX_TAG: Final = 256
"""Characters of a tag."""
MAX_TAGS: Final = 50
"""Tags of a message."""
MAX_ID: Final = 255
"""Characters of the application's own id."""
MAX_KEPT: Final = 998
"""Characters of a kept header: the longest line of RFC 5322 2.1.1."""
MAX_REPEATS: Final = 50
"""How often one header is looked at in one message."""


class Classification(NamedTuple):
    """What the record says about one message.

    `headers` holds the kept headers under their configured names, a list where one was repeated. `tags` are
    the values of all task-type headers, in their configured order, none twice. `received` is the number of
    Received fields, which tells a loop (RFC 5321 6.3).
    """

    task_type: str
    client_task_id: str | None
    message_id: str | None
    headers: dict[str, Json]
    tags: list[str]
    received: int


class Classifier:
    """Classifies messages by the settings it was made with.

    `headers` are the task-type headers, the first to yield a type wins; `default` is the type of a message
    that matches nothing, not empty; `id_header` carries the application's own id; `rules` are pairs of a
    sender pattern (`*` stands for anything, case does not matter, `<>` is the null reverse-path) and a
    type; `keep` are the headers to keep.
    """

    def __init__(
        self,
        *,
        headers: Sequence[str],
        default: str,
        id_header: str | None,
        rules: Sequence[tuple[str, str]],
        keep: Sequence[str],
    ) -> None:
        self._typed = [(_key(name), _READERS.get(name.lower(), _one_value)) for name in headers]
        self._default = default
        self._id = _key(id_header) if id_header else b""
        self._rules = [(_sender_pattern(sender), task_type) for sender, task_type in rules]
        self._keep = [(name, _key(name)) for name in keep]
        self._type_keys = {key for key, _ in self._typed}
        keys = {_MESSAGE_ID, _RECEIVED, *self._type_keys, *(key for _, key in self._keep)}
        self._wanted = _fields_named(keys | {self._id} if self._id else keys).findall
        self._keeps_received = any(key == _RECEIVED for _, key in self._keep)

    def classify(self, header: bytes, sender: bytes) -> Classification:
        """Return what a message's header section and its reverse-path say.

        `header` is the section as on the wire: CRLF, dot-stuffed, without the empty line, possibly cut.
        """
        fields, received = self._fields(header)
        task_type = ""
        tags: list[str] = []
        if not self._type_keys.isdisjoint(fields):
            task_type, tags = self._by_header(fields)
        kept: dict[str, Json] = {}
        for name, key in self._keep:
            if key in fields:
                values = fields[key]
                kept[name] = _text(values[0]) if len(values) == 1 else [_text(value) for value in values]
        ids = fields.get(_MESSAGE_ID)
        return Classification(
            task_type or self._by_rule(sender) or self._default,
            self._client_task_id(fields) if self._id in fields else None,
            (_text(ids[0]) or None) if ids else None,
            kept,
            tags,
            received,
        )

    def _fields(self, header: bytes) -> tuple[dict[bytes, list[bytes]], int]:
        """Return the values of the wanted fields by lower-case name, and the number of Received fields."""
        section = b"\r\n" + header
        if section.find(b"\r\n.") >= 0:  # RFC 5321 4.5.2: the receiver deletes the dot
            section = section.replace(b"\r\n.", b"\r\n")
        fields: dict[bytes, list[bytes]] = {}
        received = 0
        # One search for names and values; splitting at every line costs three times as much.
        for name, folded in self._wanted(section):
            key = name.lower()
            if key == _RECEIVED:
                received += 1
                if not self._keeps_received:
                    continue
            value = folded.replace(b"\r\n", b"").strip(b" \t")
            if key not in fields:
                fields[key] = [value]
            elif len(fields[key]) < MAX_REPEATS:
                fields[key].append(value)
        return fields, received

    def _by_header(self, fields: dict[bytes, list[bytes]]) -> tuple[str, list[str]]:
        """Return the type that a header gives, and all tags."""
        task_type = ""
        tags: list[str] = []
        for key, read in self._typed:
            if key in fields:
                found, labels = read(fields[key])
                task_type = task_type or found
                tags += labels
        return task_type, list(dict.fromkeys(tags))[:MAX_TAGS] if len(tags) > 1 else tags

    def at_mail(self, sender: bytes) -> str | None:
        """Return the type as far as the reverse-path tells; None: it takes a header, and that is to come.

        A header that comes may say otherwise than the rule that this is from.
        """
        return self._by_rule(sender) or (None if self._typed else self._default)

    def _by_rule(self, sender: bytes) -> str | None:
        if not self._rules:
            return None
        address = sender.decode("utf-8", "backslashreplace")
        matching = (task_type for pattern, task_type in self._rules if pattern.fullmatch(address))
        return next(matching, None)

    def _client_task_id(self, fields: dict[bytes, list[bytes]]) -> str | None:
        for value in fields[self._id]:
            label = _label(_decoded(value), MAX_ID)
            if label:
                return label
        return None


def _key(name: str) -> bytes:
    return name.lower().encode("utf-8")


_MESSAGE_ID: Final = _key("Message-ID")
_RECEIVED: Final = _key("Received")


def _fields_named(keys: set[bytes]) -> re.Pattern[bytes]:
    """Return what finds the fields of these lower-case names: each as written, its value still folded."""
    first = b"".join(sorted({re.escape(letter) for key in keys for letter in (key[:1], key[:1].upper())}))
    names = b"|".join(map(re.escape, sorted(keys)))
    # RFC 5322 4.5: the obsolete form has white space before the colon. 2.2.3: a line that begins with white
    # space goes on with the value. Nothing is tried twice, however long a value is: it ends the pattern.
    value = rb"[^\r]*+(?:\r(?!\n(?![ \t]))[^\r]*+)*"
    return re.compile(rb"\r\n(?=[%b])(?i:(%b))[ \t]*:(%b)" % (first, names, value))


def _sender_pattern(pattern: str) -> re.Pattern[str]:
    # Atomic groups: each literal is taken at its first place, so that no sender makes the match slow.
    literals = [re.escape(part) for part in ("" if pattern == "<>" else pattern).split("*")]
    first, *middle = literals
    if not middle:
        return re.compile(first, re.IGNORECASE)
    last = middle.pop()
    found = "".join(f"(?>.*?{literal})" for literal in middle)
    return re.compile(f"{first}{found}.*{last}", re.IGNORECASE | re.DOTALL)


# ---------------------------------------------------------------------------------------------- values


def _text(value: bytes) -> str:
    """Return a value as given, as text that can be stored: UTF-8, what is not and NUL escaped."""
    return value[: 4 * MAX_KEPT].decode("utf-8", "backslashreplace").replace("\0", "\\x00")[:MAX_KEPT]


def _decoded(value: bytes) -> str:
    text = value.decode("utf-8", "backslashreplace")
    return _ENCODED_WORDS.sub(_decode_words, text) if "=?" in text else text


def _label(text: str, limit: int) -> str:
    """Return text as a label: white space runs as one space, what does not print removed, bounded."""
    text = " ".join(text[: 4 * limit].split())
    if not text.isprintable():
        text = "".join(filter(str.isprintable, text))
    return text[:limit].strip()


def _labels(texts: Iterable[str]) -> tuple[str, list[str]]:
    """Return the first label as the type, and all as tags."""
    tags = [label for text in texts if (label := _label(text, MAX_TAG))][:MAX_TAGS]
    return (_label(tags[0], MAX_TASK_TYPE) if tags else "", tags)


def _one_value(values: list[bytes]) -> tuple[str, list[str]]:
    return _labels(map(_decoded, values))


def _comma_list(values: list[bytes]) -> tuple[str, list[str]]:
    return _labels(item for value in values for item in _decoded(value).split(",", MAX_TAGS)[:MAX_TAGS])


def _ses_tags(values: list[bytes]) -> tuple[str, list[str]]:
    """Read `name=value, name=value`.

    The type is the value of the pair named `task_type`, `type` or `category`, the first of these in the
    header, else of the first pair; a tag is a pair as written.
    """
    _, tags = _comma_list(values)
    pairs = [(name.strip().lower(), value) for name, _, value in (tag.partition("=") for tag in tags)]
    valued = [(name, label) for name, value in pairs if (label := _label(value, MAX_TASK_TYPE))]
    named = (label for name, label in valued if name in _SES_TYPE_NAMES)
    return next(named, valued[0][1] if valued else ""), tags


_SES_TYPE_NAMES: Final = ("task_type", "type", "category")


def _smtpapi_category(values: list[bytes]) -> tuple[str, list[str]]:
    return _labels(category for value in values for category in _categories(_decoded(value)))


def _categories(text: str) -> list[str]:
    try:
        # Not strict: a header folded inside a string leaves its tab there.
        parsed = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return []
    category = parsed.get("category") if isinstance(parsed, dict) else None
    listed = category if isinstance(category, list) else [category]
    return [item for item in listed[:MAX_TAGS] if isinstance(item, str)]


_READERS: Final[dict[str, Callable[[list[bytes]], tuple[str, list[str]]]]] = {
    "x-mc-tags": _comma_list,
    "x-ses-message-tags": _ses_tags,
    "x-smtpapi": _smtpapi_category,
}


# --------------------------------------------------------------------------------------- encoded-words

# RFC 2047 section 2, with the language of RFC 2231 section 5: charset, encoding, encoded text.
_ENCODED_WORD: Final = re.compile(r"=\?([\w.:-]{1,40})(?:\*[\w-]*)?\?([BbQq])\?([!->@-~]*)\?=", re.ASCII)
_WORD: Final = r"=\?[\w.:-]{1,40}(?:\*[\w-]*)?\?[BbQq]\?[!->@-~]*\?="
# White space between two encoded-words is not part of the text (RFC 2047 section 6.2).
_ENCODED_WORDS: Final = re.compile(rf"{_WORD}(?:[ \t]*{_WORD})*", re.ASCII)

# The charsets of MIME mail. Not any codec that Python has: some of those are no charsets, some are slow.
_CHARSETS: Final = frozenset(
    {
        "us-ascii", "utf-8", "gb2312", "gbk", "gb18030", "big5", "shift_jis", "iso-2022-jp",
        "euc-jp", "euc-kr", "koi8-r", "koi8-u", "tis-620",
        *(f"iso-8859-{part}" for part in range(1, 17) if part != 12),
        *(f"windows-125{page}" for page in range(9)),
    }
)  # fmt: skip


def _decode_words(run: re.Match[str]) -> str:
    """Decode a run of encoded-words; where one cannot be decoded the run stays as it is."""
    # Neighbours of one charset are joined as octets first: senders cut characters in two, though RFC 2047
    # section 5 forbids it.
    parts: list[tuple[str, bytes]] = []
    try:
        for charset, encoding, text in _ENCODED_WORD.findall(run[0]):
            octets = _unencoded(encoding, text)
            if parts and parts[-1][0] == charset.lower():
                octets = parts.pop()[1] + octets
            parts.append((charset.lower(), octets))
        return "".join(octets.decode(_known(charset)) for charset, octets in parts)
    except (ValueError, LookupError, OSError):
        # Of base64, of a charset, of octets that it does not have; or its codec cannot be loaded now.
        return run[0]


def _unencoded(encoding: str, text: str) -> bytes:
    if encoding in "Bb":
        return binascii.a2b_base64(text + "==")  # padding is often missing
    return binascii.a2b_qp(text, header=True)


def _known(charset: str) -> str:
    if charset not in _CHARSETS:
        raise ValueError(charset)
    return charset
