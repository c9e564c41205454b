"""A place that is kept for a row is never too small, and costs a message next to nothing."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from relay.account import Account, Sender
from relay.classify import MAX_TAGS, Classification
from relay.envelope import Envelope, Recipient
from relay.records.bound import MAX_VERDICT
from relay.records.identity import uuid7
from relay.records.spool_line import decode, encode
from relay.records.spooler import USUAL_PLACE
from relay.reply import Reply, ReplyParser

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
paths = st.binary(max_size=60) | texts.map(str.encode)


def replies(code: int) -> st.SearchStrategy[Reply]:
    """Replies as the parser takes them off the wire, of one line and of many, with anything in them."""
    line = st.binary(max_size=400).map(lambda octets: octets.translate(None, b"\r\n\0"))

    def made(lines: list[bytes]) -> Reply:
        last = len(lines) - 1
        wire = b"".join(b"%d%b%b\r\n" % (code, b" -"[n < last :][:1], each) for n, each in enumerate(lines))
        (reply,) = ReplyParser().feed(wire)
        return reply

    return st.lists(line, min_size=1, max_size=20).map(made)


recipients = st.builds(Recipient, paths, replies(250) | replies(550) | replies(452))
classifications = st.builds(
    Classification,
    task_type=texts,
    client_task_id=st.none() | texts,
    message_id=st.none() | texts,
    headers=st.dictionaries(texts, texts | st.lists(texts, max_size=5), max_size=5),
    tags=st.lists(texts, max_size=MAX_TAGS),
    received=st.just(0),
)
senders = st.builds(Sender, client=texts, listener=st.just("127.0.0.1:25"), address=texts)


def account_of(sender: Sender, upstream: str, envelope: Envelope, **told: object) -> Account:
    account = Account(uuid7(), sender, envelope, 0.0)
    for name, value in {"upstream": upstream, "size": 10**12, "total_s": 10.0**8, **told}.items():
        setattr(account, name, value)
    return account


@given(
    senders,
    texts,
    st.builds(Envelope, paths, st.lists(recipients, max_size=8)),
    classifications,
    replies(250),
)
def test_no_row_and_no_doubt_before_it_is_longer_than_their_place(
    sender: Sender, upstream: str, envelope: Envelope, found: Classification, verdict: Reply
) -> None:
    account = account_of(sender, upstream, envelope)
    place = account.place(account.line(found))
    late = Reply.own(
        451, "4.2", f"The upstream server did not answer: the message may have been sent, see {uuid7()}"
    )
    account.client_heard = late

    doubt = account.doubt(found, f"upstream said {verdict}")
    record = account.record(found, verdict, doubted=True)

    assert len(encode(doubt)) + len(encode(record)) <= place
    assert decode(encode(record)) == record


@example(b"\xff")
@example(b"\x01")
@example("é".encode())
@example("\U0001f4e7".encode())
@example(b'"')
@given(st.binary(min_size=1, max_size=4))
def test_a_thousand_recipients_of_the_worst_kind(path: bytes) -> None:
    refusal = Reply.plain(550, *["\\" * 400] * 10)
    envelope = Envelope(path * 60)
    envelope.recipients += [Recipient(path * 60, Reply.plain(250, "ok")) for _ in range(500)]
    envelope.recipients += [Recipient(path * 60, refusal) for _ in range(500)]
    found = Classification("t", None, None, {}, [], 0)
    account = account_of(Sender("127.0.0.1", ""), "primary", envelope)

    assert len(encode(account.record(found, Reply.plain(250, "ok"), doubted=False))) <= account.place(
        account.line(found)
    )


def test_the_longest_verdict_has_its_place_and_is_cut_in_the_row() -> None:
    (verdict,) = ReplyParser().feed(b'250-"\\"\\\r\n' * 6500 + b"250 ok\r\n")
    found = Classification("t", None, None, {}, [], 0)
    account = account_of(Sender("127.0.0.1", ""), "primary", Envelope(b"a@example.com"))

    record = account.record(found, verdict, doubted=True)

    assert len(record.upstream_reply) == MAX_VERDICT
    assert record.upstream_reply.endswith(" ...")
    assert len(encode(record)) <= account.place(account.line(found))


def test_a_usual_message_fits_into_the_usual_place() -> None:
    envelope = Envelope(
        b"notifications@example.com",
        [
            Recipient(b"somebody.with.a.long.name@example.org", Reply.plain(250, "2.1.5 Ok"))
            for _ in range(10)
        ],
    )
    found = Classification(
        "mention",
        "4711",
        "<20261123084240.024131@app.example.com>",
        {"Message-ID": "<1@example.com>"},
        ["a"],
        1,
    )

    account = account_of(Sender("10.0.0.1", ""), "primary", envelope)

    assert account.place(account.line(found)) <= USUAL_PLACE
