"""The documents tell the truth: their tables equal the code, their links work, their commands run."""

from __future__ import annotations

import ast
import asyncio
import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args
from uuid import UUID

import pytest

from relay import maillog, reply
from relay.answers import MAX_RECEIVED
from relay.classify import MAX_TASK_TYPE, Classifier
from relay.cli import main
from relay.content import MAX_HEADER
from relay.maillog.values import MAX_ITEMS, MAX_TEXT
from relay.metrics import AUTH_OUTCOMES, CONNECT_OUTCOMES, REJECT_REASONS, REPLY_COMMANDS
from relay.outcome import Outcome
from relay.records.model import Record
from relay.records.spool import Spool
from relay.records.spool_line import encode
from relay.session import dialogue
from relay.session.commands import DEFAULT_LINE_LIMIT, LINE_LIMITS
from relay.session.lines import MAX_LINE
from relay.session.session import HEADER_TIMEOUT, LINGER, WRITE_TIMEOUT
from relay.session.tls import HANDSHAKE_TIMEOUT
from relay.settings import DEV_UPSTREAM, Settings, SettingsError, TaskTypeSettings, load
from relay.settings.address import Address
from relay.settings.changes import RESTART
from relay.settings.units import parse_duration, parse_size
from relay.web.crowd import MAX_CONNECTIONS
from tests.support.certificates import Certificates
from tests.support.client import Client
from tests.support.pages import SCHEMA, commands, commands_page, default, form, key_tables, settings_page
from tests.support.process import toml
from tests.support.script import Close, Delay

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Running
    from tests.support.certificates import Certificates
from tests.support.upstream import ScriptedUpstream

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))


# ------------------------------------------------------------------------------------------- Markdown


def read(name: str) -> str:
    return (DOCS / name).read_text()


def sections(text: str) -> dict[str, str]:
    """Return each heading's own text, by its title without back quotes."""
    parts = re.split(r"^#+ (.+)$", without_code(text), flags=re.MULTILINE)
    return {title.replace("`", ""): body for title, body in zip(parts[1::2], parts[2::2], strict=True)}


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def tables(text: str) -> Iterator[list[list[str]]]:
    """Return each table as rows of cells, its heading row first, the rule under it left out."""
    for found in re.finditer(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        rows = [
            [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            for line in found[0].splitlines()
        ]
        yield rows[:1] + rows[2:]


def table(text: str, heading: str) -> list[list[str]]:
    """Return the rows of the one table whose first heading cell is `heading`."""
    (found,) = [rows[1:] for rows in tables(text) if rows[0][0] == heading]
    return found


def codes(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]*)`", text)


# ------------------------------------------------------------------------------------------- settings


def test_every_key_stands_in_the_settings_with_its_default_form_and_meaning() -> None:
    documented = sections(read("settings.md"))
    titles = [title for title in documented if title.startswith("[")]
    assert titles == list(key_tables())
    for title, model in key_tables().items():
        if model is None:
            assert not list(tables(documented[title]))
            continue
        properties = SCHEMA["$defs"][model.__name__]["properties"]
        assert table(documented[title], "key") == [
            [f"`{key}`", default(model, key), form(properties[key]), properties[key]["description"]]
            for key in model.model_fields
        ]


def test_what_follows_from_the_code_is_written() -> None:
    assert settings_page(read("settings.md")) == read("settings.md"), "run: make pages"
    assert commands_page() == read("commands.md"), "run: make pages"


def test_every_section_has_the_meaning_that_the_model_gives_it() -> None:
    documented = sections(read("settings.md"))
    for name, field in Settings.model_fields.items():
        title = f"[[{name}]]" if get_args(field.annotation) else f"[{name}]"
        assert documented[title].strip().splitlines()[0] == SCHEMA["properties"][name]["description"]


# -------------------------------------------------------------------------------------------- metrics


async def test_every_metric_stands_in_the_metrics(start: Any, upstream: Any) -> None:
    async with start(upstream.port, limits=[{"scope": "all", "max": 1, "per": "1d"}]) as running:
        running.relay.metrics.certificate(0.0)  # as with a listener that has TLS
        families = [
            family
            for family in running.relay.metrics.registry.collect()
            if family.name.startswith("smtp_relay_")
        ]
    live = {}
    for family in families:
        names = {name for sample in family.samples for name in sample.labels if name != "le"}
        suffix = "_total" if family.type == "counter" else ""
        live[family.name + suffix] = [family.type, names]
    documented = {
        quoted(name)[0]: [kind, set(quoted(labels))]
        for name, kind, labels, _ in table(read("metrics.md"), "metric")
    }
    assert documented == live


async def test_every_label_value_stands_in_the_metrics(start: Any, upstream: Any) -> None:
    page = read("metrics.md")

    def values(heading: str) -> list[str]:
        return [quoted(row[0])[0] for row in table(page, heading)]

    assert values("`outcome` of messages and recipients") == [outcome.value for outcome in Outcome]
    assert values("`outcome` of connects") == list(CONNECT_OUTCOMES)
    assert values("`outcome` of AUTH") == list(AUTH_OUTCOMES)
    assert values("`reason`") == list(REJECT_REASONS)
    other = {quoted(label)[0]: quoted(found) for label, found in table(page, "other label")}
    assert other["command"] == list(REPLY_COMMANDS)
    async with start(upstream.port) as running:
        samples = [sample for family in running.relay.metrics.registry.collect() for sample in family.samples]
    for label, documented in other.items():
        assert set(documented) == {
            sample.labels[label]
            for sample in samples
            if label in sample.labels and sample.name.startswith("smtp_relay_")
        }


async def test_buckets(start: Any, upstream: Any) -> None:
    documented = {
        quoted(suffix)[0]: [float(bound) for bound in bounds.split()]
        for suffix, bounds in table(read("metrics.md"), "histograms")
    }
    async with start(upstream.port) as running:
        families = [
            family for family in running.relay.metrics.registry.collect() if family.type == "histogram"
        ]
    assert families
    for family in families:
        bounds = {float(sample.labels["le"]) for sample in family.samples if "le" in sample.labels}
        (suffix,) = [end for end in documented if family.name.endswith(end)]
        assert sorted(bounds - {float("inf")}) == documented[suffix], family.name
    assert {end for end in documented for family in families if family.name.endswith(end)} == set(documented)


# -------------------------------------------------------------------------------------------- records


async def test_every_column_stands_in_the_records(start: Any, upstream: Any) -> None:
    page = read("records.md")
    async with start(upstream.port) as running:
        live = {
            name: [row["name"] for row in running.rows(f"SELECT name FROM pragma_table_info('{name}')")]
            for name in ("task_done", "task_done_recipient", "task_done_send", "task_in_doubt")
        }
        others = running.rows("SELECT name FROM sqlite_schema WHERE type IN ('table', 'view')")
    for name, columns in live.items():
        documented = [column for row in table(page, f"`{name}`") for column in quoted(row[0])]
        assert sorted(documented) == sorted(columns)
    for row in others:
        assert f"`{row['name']}`" in page


def test_every_key_of_data_stands_in_the_records() -> None:
    tree = ast.parse((ROOT / "relay/account.py").read_text())
    written = {
        node.slice.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript)
        and isinstance(node.value, ast.Name)
        and node.value.id == "data"
        and isinstance(node.slice, ast.Constant)
    }
    documented = {quoted(row[0])[0] for row in table(read("records.md"), "key in `data`")}
    assert documented == written | {"relay"}  # which the store adds
    journal = (ROOT / "relay/records/journal.py").read_text()
    for row in table(read("records.md"), "more keys in `data`"):
        assert f'"{quoted(row[0])[0]}"' in journal


def classifier(**task_type: Any) -> Classifier:
    found = TaskTypeSettings.model_validate(task_type)
    return Classifier(
        headers=found.headers,
        default=found.default,
        id_header=found.id_header,
        rules=[(rule.sender or "<>", rule.type) for rule in found.rules],
        keep=(),
    )


@pytest.mark.parametrize(
    "row", table(read("records.md"), "in the message"), ids=lambda row: quoted(row[0])[0]
)
def test_task_types(row: list[str]) -> None:
    header = quoted(row[0])[0].replace("\\r\\n", "\r\n").encode()
    found = classifier().classify(header + b"\r\n", b"a@example.com")
    assert [found.task_type] == quoted(row[1])
    assert found.tags == quoted(row[2])


def test_every_form_of_header_is_among_the_examples() -> None:
    examples = " ".join(row[0] for row in table(read("records.md"), "in the message"))
    assert all(f"{name}:" in examples for name in TaskTypeSettings().headers)


def test_task_types_by_rule() -> None:
    (rules,) = [found for found in codes(read("records.md"), "toml") if "rules" in found]
    found = classifier(**tomllib.loads(rules)["task_type"])
    senders = [b"Digest@example.com", b"bounce+1@example.com", b"", b"else@example.com"]
    types = [found.classify(b"", sender).task_type for sender in senders]
    assert types == ["digest", "list", "bounce", "unclassified"]


@pytest.mark.parametrize("query", codes(read("records.md"), "sql"))
async def test_queries(start: Any, upstream: Any, query: str) -> None:
    async with start(upstream.port) as running:
        await send_some(running, upstream)
        assert running.rows(query)


async def send_some(running: Running, upstream: ScriptedUpstream) -> None:
    """Send messages of every kind that a row can tell of.

    A recipient is refused, a client goes too soon, the verdict does not come.
    """
    client_gone = asyncio.Event()
    upstream.script = {
        "RCPT": {"nobody@": b"550 5.1.1 no such user\r\n"},
        "end_of_data": [None, Delay(client_gone), Close()],
    }
    content = b"Message-ID: <1@example.com>\r\nX-Task-Type: mention\r\n\r\ntext\r\n"
    async with Client(running.port) as client:
        await client.greeting()
        await client.ehlo()
        await client.message("a@example.com", ["b@example.org", "nobody@example.org"], content)
        for command in ("MAIL FROM:<a@example.com>", "RCPT TO:<c@example.org>", "DATA"):
            await client.command(command)
        await client.send(content + b".\r\n")
        await upstream.wait_for(lambda: len(upstream.messages) == 2)
        client.reset()
    async with asyncio.timeout(10):
        while running.metric("client_sessions"):
            await asyncio.sleep(0.01)
        client_gone.set()
        while len(running.rows()) < 2:
            await asyncio.sleep(0.01)
    async with Client(running.port) as client:
        await client.ehlo()
        replies = await client.message("a@example.com", ["b@example.org"], content)
        assert replies[-1].code == 451
    async with asyncio.timeout(10):
        while not running.rows("SELECT * FROM task_in_doubt"):
            await asyncio.sleep(0.01)


# ----------------------------------------------------------------------------------------- operations


def calls(name: str, where: str = "**/*.py") -> Iterator[ast.Call]:
    """Return the calls of `name` (a regular expression) in the product's code."""
    for path in sorted((ROOT / "relay").glob(where)):
        tree = ast.parse(path.read_text())
        texts = {
            ast.unparse(node.targets[0]): node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and re.fullmatch(name, ast.unparse(node.func)):
                # An argument that is a name stands for what the module gives that name.
                node.args = [texts.get(ast.unparse(argument), argument) for argument in node.args]
                yield node


def pattern(text: ast.expr) -> str:
    """Return the regular expression of a text in the code, whatever an f-string puts into it."""
    if isinstance(text, ast.Constant):
        return re.escape(str(text.value))
    assert isinstance(text, ast.JoinedStr)
    parts = (re.escape(str(p.value)) if isinstance(p, ast.Constant) else ".+" for p in text.values)
    return "".join(parts)


def test_every_reply_of_the_relay_stands_in_the_operations() -> None:
    rows = [(code, enhanced, text) for code, enhanced, text, *_ in table(read("operations.md"), "code")]
    unclaimed = set(rows)
    found = 0
    for call in calls(r"Reply\.own"):
        code, detail, text = call.args
        assert isinstance(code, ast.Constant)
        assert isinstance(detail, ast.Constant)
        enhanced = f"{str(code.value)[0]}.{detail.value!s}"
        matching = {
            row
            for row in rows
            if row[:2] == (str(code.value), enhanced) and re.fullmatch(pattern(text), row[2])
        }
        assert matching, f"{code.value} {enhanced} {ast.unparse(text)}"
        unclaimed -= matching
        found += 1
    assert found > 40
    assert not unclaimed
    assert len(rows) == len(set(rows))


def test_every_event_of_the_log_stands_in_the_operations() -> None:
    used = {
        name
        for path in (ROOT / "relay").rglob("*.py")
        for name in re.findall(r"\bmaillog\.(\w+)", path.read_text())
    }
    package = ROOT / "relay/maillog"
    events = ast.parse((package / "__init__.py").read_text()).body
    lost = ast.parse((package / "destination.py").read_text()).body
    logged: dict[str, str] = {}
    for function in (node for node in (*events, *lost) if isinstance(node, ast.FunctionDef)):
        if function.name not in used and function.name != "_lines_lost":
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and "current.log" in ast.unparse(node.func):
                (event, *_) = node.args
                if isinstance(event, ast.Constant):
                    level = ast.unparse(node.func).removeprefix("current.log.")
                    logged[str(event.value)] = level if level.isalpha() else "see above"
    documented = {quoted(event)[0]: level for event, level, _ in table(read("operations.md"), "event")}
    assert documented == logged


def test_every_sentence_of_recorder_and_spool_stands_in_the_operations() -> None:
    documented = {
        re.escape(quoted(sentence)[0]).replace("…", ".*"): level
        for sentence, level, _ in table(read("operations.md"), "sentence")
    }
    unclaimed = set(documented)
    for call in calls(r"_log\.\w+"):
        (text, *_) = call.args
        assert isinstance(text, ast.Constant)
        said = re.sub(r"%[sdr]", "x", str(text.value))
        matching = {found for found in documented if re.fullmatch(found, said)}
        assert len(matching) == 1, said
        level = ast.unparse(call.func).removeprefix("_log.").replace("exception", "error")
        assert {documented[found] for found in matching} == {level}
        unclaimed -= matching
    assert not unclaimed


def test_every_field_of_a_message_line_stands_in_the_operations() -> None:
    written = list(maillog.Facts.__annotations__)
    page = read("operations.md")
    assert [quoted(row[0])[0] for row in table(page, "field of `message`")] == written
    for line in codes(page, "json"):
        assert set(json.loads(line)) <= {"time", "level", "event", *written}


async def test_the_examples_of_message_lines_are_what_the_relay_writes(
    start: Any, upstream: ScriptedUpstream
) -> None:
    accepted, in_doubt = codes(read("operations.md"), "json")
    lines = io.BytesIO()
    upstream.script = {"RCPT": {"nobody@": b"550 5.1.1 no such user\r\n"}, "end_of_data": [None, Close()]}
    content = b"Message-ID: <1@example.com>\r\nX-Task-Type: mention\r\n\r\ntext\r\n"
    maillog.configure("json", "info", lines)
    try:
        async with start(upstream.port) as running, Client(running.port) as client:
            await client.greeting()
            await client.ehlo()
            await client.message("a@example.com", ["b@example.org", "nobody@example.org"], content)
            await client.message("a@example.com", ["b@example.org"], content)
    finally:
        maillog.configure("json", "info")
    written = [line for line in map(json.loads, lines.getvalue().splitlines()) if line["event"] == "message"]
    for example, line in zip((accepted, in_doubt), written, strict=True):
        assert list(json.loads(example)) == list(line)
        for field in ("level", "outcome", "refused", "recipients"):
            assert json.loads(example).get(field) == line.get(field)
    assert json.loads(in_doubt)["reply"] == written[1]["reply"]
    assert written[1]["client_reply"].endswith(f"see {written[1]['task_id']}")
    said = [
        line["client_reply"].replace(line["task_id"], "ID") for line in (json.loads(in_doubt), written[1])
    ]
    assert said[0] == said[1]


async def test_every_line_of_readiness_stands_in_the_operations(start: Any, upstream: Any) -> None:
    documented = {quoted(row[0])[0] for row in table(read("operations.md"), "line of `/readyz`")}
    async with start(upstream.port) as running:
        ready, lines = running.relay.readiness()
        assert (ready, list(lines)) == (True, ["upstream primary: up"])
        running.relay.reception.draining = True
        ready, lines = running.relay.readiness()
        assert (ready, list(lines)) == (False, ["draining", "upstream primary: up"])
    said = ["ready", "not ready", *(pattern(call.args[0]) for call in calls(r"lines\.append", "app.py"))]
    assert all(any(re.fullmatch(text, line) for line in documented) for text in said)
    assert all(any(re.fullmatch(text, line) for text in said) for line in documented)


def lost(stream: io.BytesIO) -> Record:
    """Write the line of a lost row to `stream`; return the row."""
    record = Record(
        task_id=UUID("01a2078a-f0ab-778f-a595-b6420a3edca9"),
        task_type="grün",
        sender="a@example.com",
        client="127.0.0.1",
        sent_at=datetime(2026, 11, 23, tzinfo=UTC),
        upstream="primary",
        upstream_reply='250 2.0.0 "ok"\nas 1',
        size=1,
        duration_ms=1,
        recipients=("b@example.org",),
        data={"headers": {"Message-ID": "<1@example.com>"}},
    )
    maillog.configure("json", "info", stream)
    try:
        maillog.row_lost(record, "neither store nor spool took it")
        maillog.stopped()
    finally:
        maillog.configure("json", "info")
    return record


def test_rows_that_are_only_in_the_log_come_back_by_the_recipe(tmp_path: Path) -> None:
    (recipe,) = [found for found in codes(read("operations.md"), "sh") if "row lost" in found]
    (tmp_path / "data/spool").mkdir(parents=True)
    with (tmp_path / "relay.log").open("wb") as log:
        stream = io.BytesIO()
        record = lost(stream)
        log.write(stream.getvalue())
    subprocess.run(["sh", "-eu", "-c", recipe], cwd=tmp_path, check=True, timeout=30)
    spool = Spool(tmp_path / "data/spool")
    assert spool.read(10).records == [record]
    spool.close()


def run_tool(name: str, *arguments: str) -> str:
    """Run a program of the machine, if it is there; return what it writes."""
    program = shutil.which(name)
    if program is None:
        pytest.skip(f"{name} is not installed")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False, timeout=50)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


# ---------------------------------------------------------------------------------- links and commands


def anchors(path: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", without_code(path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


LINKED = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for text, target in re.findall(r"\[([^\]]+)\]\(([^)\s]+)\)", without_code(page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        found = (page.parent / name).resolve() if name else page
        assert found.exists(), target
        if anchor and found.suffix == ".md":
            assert anchor in anchors(found), target
        if text.startswith("`test_"):
            assert f"def {text.strip('`')}(" in found.read_text(), text


def test_every_page_is_in_the_navigation() -> None:
    """Of mkdocs.yml. The decisions are listed on a page of their own."""
    navigation = set(re.findall(r"^ +- (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert navigation == {page.name for page in PAGES} | {"adr/index.md"}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_that_are_not_run_say_why(page: Path) -> None:
    """What is marked `sh` is run; before a `console` a comment says why not, or by which test."""
    lines = page.read_text().splitlines()
    for before, line in pairwise(lines):
        if line == "```console":
            found = re.fullmatch(r"<!-- (?:not run(?: here)?: .+|run by (test_\w+)) -->", before)
            assert found, (
                f"{page.name}: a comment <!-- not run: WHY --> is missing before a block of commands"
            )
            if found[1]:
                assert f"def {found[1]}(" in Path(__file__).read_text()
        assert line not in ("```bash", "```shell", "```shell-session"), f"{page.name}: mark it sh or console"


def test_what_a_relay_says_that_does_not_start_is_what_the_troubleshooting_has(tmp_path: Path) -> None:
    text = sections(read("troubleshooting.md"))["The relay does not start"]
    said = [row[0] for row in next(tables(text))[1:] if row[0].startswith("`")]
    with pytest.raises(SettingsError) as missing:
        load(tmp_path / "relay.toml", {})
    mistakes = (ROOT / "tests/bad_settings").glob("*/expected_error")
    known = [str(missing.value), os.strerror(errno.EADDRINUSE), os.strerror(errno.EACCES)]
    known += [file.read_text() for file in mistakes]
    for each in said:
        words = each.split("`")[1]
        assert any(words in line for line in known), words


def test_every_secret_stands_in_the_settings() -> None:
    text = sections(read("settings.md"))["Secrets"]
    secrets = {
        name
        for model in SCHEMA["$defs"].values()
        for name, key in model["properties"].items()
        if form(key) == "secret"
    }
    assert secrets == {"password", "client_secret", "refresh_token", "recipients_key", "token"}
    for name in secrets:
        assert re.search(rf"`([a-z]+\.)?{name}`", text), name


def test_every_command_that_a_page_names_is_there() -> None:
    known = {name.removeprefix("relay ") for name, _ in commands()}
    groups = {name.split()[0] for name in known if " " in name}
    for page in LINKED:
        text = page.read_text()
        blocks = "\n".join(codes(text, "sh") + codes(text, "console"))
        for command in quoted(without_code(text)) + blocks.splitlines():
            found = re.match(r"(?:\$ )?(?:\S*/)?relay ([a-z][a-z-]*)(?: ([a-z]+))?", command)
            if found and "systemctl" not in command:
                name = f"{found[1]} {found[2]}" if found[1] in groups and found[2] else found[1]
                assert name in known | groups, f"{page.name}: {command}"


def test_every_target_of_make_that_the_contributing_names_is_there() -> None:
    targets = re.findall(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[0].split()
    documented = [quoted(row[0])[0].removeprefix("make ") for row in table(read("contributing.md"), "target")]
    assert documented
    assert set(documented) <= set(targets)


def test_every_page_of_the_manual_is_there() -> None:
    names = ("settings.md", "metrics.md", "records.md", "operations.md", "quirks.md", "security.md")
    assert set(names) <= {p.name for p in PAGES}


TOOLS = ("curl", "sqlite3")
"""What examples need beside the relay and a POSIX shell."""
BLOCKS = [
    pytest.param(
        block,
        id=f"{page.stem}-{number}",
        marks=[pytest.mark.interop] if any(tool in block for tool in TOOLS) else [],
    )
    for page in PAGES
    for number, block in enumerate(codes(page.read_text(), "sh"))
]


@pytest.mark.parametrize("block", BLOCKS)
async def test_commands_run(start: Any, upstream: ScriptedUpstream, tmp_path: Path, block: str) -> None:
    missing = [tool for tool in TOOLS if tool in block and shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} is not installed")
    spool = tmp_path / "data/spool"
    records = {"url": f"sqlite:///{tmp_path / 'data/task_done.db'}", "spool": str(spool)}
    async with start(upstream.port, records=records) as running:
        running.database = tmp_path / "data/task_done.db"
        await send_some(running, upstream)
        stream = io.BytesIO()
        record = lost(stream)
        (tmp_path / "relay.log").write_bytes(stream.getvalue())
        (spool / "rejected.jsonl").write_bytes(encode(record, "a reason"))
        (tmp_path / "config").mkdir()
        (tmp_path / "config/relay.toml").write_text(
            f'[[upstreams]]\naddress = "127.0.0.1:{upstream.port}"\ntls = "none"\n'
        )
        status, said = await shell(
            block.replace("127.0.0.1:9025", f"127.0.0.1:{running.http_port}").replace(
                '"127.0.0.1", 2525', f'"127.0.0.1", {running.port}'
            ),
            tmp_path,
        )
    assert status == 0, said


async def shell(script: str, directory: Path) -> tuple[int | None, str]:
    """Run `script` with the relay's own commands in its path; return its status and what it writes."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RELAY_")}
    process = await asyncio.create_subprocess_exec(
        *("sh", "-eu", "-c", script),
        cwd=directory,
        env=environ | {"PATH": path},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await asyncio.wait_for(process.communicate(), 30)
    return process.returncode, said.decode()


SETTINGS_EXAMPLES = [
    pytest.param(toml, error, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, (toml, error) in enumerate(
        re.findall(
            r"^```toml\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", page.read_text(), re.MULTILINE | re.DOTALL
        )
    )
]


@pytest.mark.parametrize(("toml", "error"), SETTINGS_EXAMPLES)
def test_examples_of_settings_do_what_is_said(
    toml: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in {"upstream_password", *re.findall(r'"/run/secrets/(\w+)"', toml)}:
        secret = Path(name)
        secret.write_text("sesame-0123456789\n")
        secret.chmod(0o600)
    certificates = Certificates()
    certificates.write_server(tmp_path, "relay.example.com")
    certificates.write_authority(tmp_path / "db-ca.pem")
    text = toml.replace("/run/secrets/", "").replace("/etc/relay/", "")
    if "[[upstreams]]" not in text:
        text += '\n[[upstreams]]\naddress = "smtp.example.com:587"\n'
    Path("config").mkdir()
    Path("config/relay.toml").write_text(text)
    if not error:
        assert load(Path("config/relay.toml"), {}).warnings == ()
        return
    with pytest.raises(SettingsError) as caught:
        load(Path("config/relay.toml"), {})
    assert [f"relay: {problem}" for problem in caught.value.problems] == error.splitlines()


def test_examples_of_values_are_values() -> None:
    kinds = {row[0]: quoted(row[1]) for row in table(read("settings.md"), "written as")}
    assert all(parse_duration(json.loads(value)) > 0 for value in kinds["duration"])
    assert all(parse_size(json.loads(value)) > 0 for value in kinds["size"])
    assert all(
        str(Address.parse(json.loads(value), unix=True)) == json.loads(value) for value in kinds["address"]
    )


@pytest.mark.interop
def test_prometheus_takes_the_queries_and_the_configuration(tmp_path: Path) -> None:
    page = read("metrics.md")
    queries = codes(page, "promql")
    assert len(queries) >= 5
    rules = [{"record": f"example:{at}", "expr": query} for at, query in enumerate(queries)]
    file = tmp_path / "rules.yml"
    file.write_text(json.dumps({"groups": [{"name": "examples", "rules": rules}]}))
    assert f"{len(queries)} rules found" in run_tool("promtool", "check", "rules", str(file))
    (scrape,) = codes(page, "yaml")
    (tmp_path / "prometheus.yml").write_text(scrape)
    run_tool("promtool", "check", "config", str(tmp_path / "prometheus.yml"))


async def test_queries_name_metrics_that_exist(start: Any, upstream: Any) -> None:
    queries = " ".join(codes(read("metrics.md"), "promql"))
    async with start(upstream.port) as running:
        live = {
            sample.name for family in running.relay.metrics.registry.collect() for sample in family.samples
        }
    named = set(re.findall(r"smtp_relay_\w+", queries))
    assert len(named) >= 5
    assert named <= live


# -------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("operations.md", f"built-in upstream at {DEV_UPSTREAM}"),
        ("operations.md", f"| {dialogue.ERRORS_END} wrong commands in one session."),
        ("operations.md", f"| {dialogue.MAX_IDLE_COMMANDS} commands in a row"),
        ("operations.md", f"| More than {MAX_LINE} octets without a line end."),
        ("operations.md", f"more than {MAX_RECEIVED} Received fields"),
        ("operations.md", f"longer than {MAX_TEXT} characters"),
        ("operations.md", f"lists longer than {MAX_ITEMS} entries"),
        ("metrics.md", f"{dialogue.ERRORS_END} errors, or {dialogue.MAX_IDLE_COMMANDS} commands"),
        ("metrics.md", f"more than {MAX_RECEIVED} Received fields"),
        ("records.md", f"at most {MAX_TASK_TYPE} characters"),
        ("quirks.md", f"limited** to {DEFAULT_LINE_LIMIT} octets"),
        ("quirks.md", f"MAIL {LINE_LIMITS[b'MAIL']} "),
        ("quirks.md", f"RCPT {LINE_LIMITS[b'RCPT']} "),
        ("quirks.md", f"more than {MAX_LINE} octets ends the session"),
        ("quirks.md", f"at most {reply.MAX_LINE} octets a line"),
        ("quirks.md", f"{reply.MAX_REPLY // 1024} KiB a reply"),
        ("quirks.md", f"more than {MAX_RECEIVED} Received fields"),
    ],
)
def test_figures(page: str, said: str) -> None:
    assert said in read(page)


# ------------------------------------------------------------------------------------------- security


def test_what_a_reload_does_is_said_of_every_key_of_the_records() -> None:
    rows = {what: then for what, then, *_ in table(read("operations.md"), "what changes")}
    at_once, restart = (
        {
            key
            for what, then in rows.items()
            if takes_a_restart == ("takes a restart" in then)
            for key in quoted(what)
        }
        for takes_a_restart in (False, True)
    )
    assert restart == set(RESTART)
    keys = {f"records.{name}" for name in SCHEMA["$defs"]["RecordSettings"]["properties"]}
    assert {key for key in at_once if key.startswith("records.")} == keys - restart


def test_the_limits_are_those_of_the_code() -> None:
    documented = {limit: default for limit, default, _ in table(read("security.md"), "limit")}
    settings = {name: documented.pop(limit) for limit in [*documented] for name in quoted(limit)}
    server = SCHEMA["$defs"]["ServerSettings"]["properties"]
    assert settings == {name: str(server[name]["default"]) for name in settings}
    assert {limit: float(default.removesuffix(" s")) for limit, default in documented.items()} == {
        "command line, octets": DEFAULT_LINE_LIMIT,
        "line without an end, octets": MAX_LINE,
        "input that waits, octets": dialogue.MAX_INPUT,
        "replies that are owed": dialogue.MAX_OWED,
        "errors that slow a session": dialogue.ERRORS_SLOW,
        "errors that end a session": dialogue.ERRORS_END,
        "commands in a row without a message": dialogue.MAX_IDLE_COMMANDS,
        "a client that does not read its replies": WRITE_TIMEOUT,
        "a client that goes on sending behind the last word": LINGER,
        "a TLS handshake": HANDSHAKE_TIMEOUT,
        "a PROXY header that does not come": HEADER_TIMEOUT,
        "connections to the HTTP side": MAX_CONNECTIONS,
        "header section that is looked at, octets": MAX_HEADER,
        "Received headers": MAX_RECEIVED,
        "line of an upstream's reply, octets": reply.MAX_LINE,
        "reply of an upstream, octets": reply.MAX_REPLY,
    }


@pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is this machine on Linux only")
async def test_the_example_of_the_self_test_is_what_it_says(
    start: Any, upstream: ScriptedUpstream, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = [block for block in codes(read("security.md"), "console") if "relay selftest" in block]
    over = {"server": {"hostname": "relay.example.com"}, "clients": {"allow": ["127.0.0.1/32", "::1/128"]}}
    config = tmp_path / "relay.toml"
    async with start(upstream.port, **over) as running:
        listeners = {"listeners": [{"address": f"127.0.0.1:{running.port}"}]}
        upstreams = {"upstreams": [{"address": upstream.address, "tls": "none"}]}
        config.write_text(toml(over | listeners | upstreams))
        capsys.readouterr()
        assert await asyncio.to_thread(main, ["selftest", "--config", str(config)]) == 0
        said = capsys.readouterr().out.replace(str(running.port), "2525")

    def comparable(text: str) -> list[str]:
        """Lines without the token of the greeting, what depends on the machine's other addresses left out."""
        lines = (re.sub(r"ESMTP [0-9a-f]+", "ESMTP TOKEN", line) for line in text.splitlines())
        return [line for line in lines if not re.match(r"\$|[0-9]+ ok|\{|.* from (?!127\.).*probes", line)]

    assert comparable(said) == comparable(example)
