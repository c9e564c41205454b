"""The page in real Chromium: what people do with it, and what strangers cannot."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

import pytest
from playwright.async_api import Browser, Page, Request, async_playwright

from relay.web import kept
from tests.interop.peers import AXE, command, needs
from tests.support.client import Client
from tests.support.script import Close

if TYPE_CHECKING:
    from tests.conftest import Running
    from tests.support.upstream import ScriptedUpstream

pytestmark = [*needs("chromium", "chromium"), pytest.mark.timeout(400)]

HOSTILE = '"><script>window.pwned=1</script><img src=x onerror="window.pwned=1">'
WIDTHS = {"narrow": 375, "wide": 1400}
GUARD_MS = 120_000
"""Against a page that never shows what is waited for; no measure."""


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        # The sandbox needs rights that a container's root has not; every page here is the relay's own.
        browser = await playwright.chromium.launch(executable_path=command("chromium"), args=["--no-sandbox"])
        yield browser
        await browser.close()


@dataclass
class Looked:
    """A tab that looks at a relay; everything that it loaded, and all that went wrong in it."""

    running: Running
    page: Page
    requests: list[Request] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    async def open(self, path: str) -> None:
        await self.page.goto(f"http://127.0.0.1:{self.running.http_port}{path}")

    def seen(self, path: str) -> int:
        return sum(urlsplit(request.url).path == path for request in self.requests)

    @property
    def address(self) -> str:
        parts = urlsplit(self.page.url)
        return f"{parts.path}?{parts.query}" if parts.query else parts.path


async def look(browser: Browser, running: Running, **context: Any) -> Looked:
    options = {"viewport": {"width": WIDTHS["wide"], "height": 900}, "timezone_id": "Europe/Berlin"}
    page = await (await browser.new_context(**{**options, **context})).new_page()
    looked = Looked(running, page)
    page.on("request", lambda request: looked.requests.append(request))
    page.on("console", lambda said: looked.errors.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: looked.errors.append(str(error)))
    page.on("dialog", lambda dialog: looked.errors.append(f"dialog: {dialog.message}"))
    return looked


@pytest.fixture
async def running(
    start: Any, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Running]:
    # On a machine that is busy a reading may take a second, and would rest for minutes.
    monkeypatch.setattr(kept, "_REST", 0)
    async with start(upstream.port) as running:
        yield running


@pytest.fixture
async def looked(browser: Browser, running: Running) -> AsyncIterator[Looked]:
    looked = await look(browser, running)
    yield looked
    assert looked.errors == []
    hosts = {urlsplit(request.url).netloc for request in looked.requests}
    assert hosts == {f"127.0.0.1:{running.http_port}"}, "nothing is loaded from other hosts"


async def send(running: Running, sender: str, recipients: list[str], **headers: str) -> None:
    lines = [f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items()]
    async with Client(running.port) as client:
        await client.ehlo()
        replies = await client.message(sender, recipients, "".join(lines).encode() + b"\r\ntext\r\n")
        assert replies[-1].code == 250


async def fill(running: Running, upstream: ScriptedUpstream) -> None:
    """Send of every kind, hostile ones too."""
    for at in range(12):
        kind = ("order", "digest", "password-reset")[at % 3]
        await send(running, "shop@example.com", [f"ann{at}@example.org"], X_Task_Type=kind)
    await send(running, "a@example.com", ["x@example.org"], X_Task_Type=HOSTILE, Message_ID=HOSTILE)
    upstream.script = {"end_of_data": [b"554 5.7.1 spam\r\n", Close()]}
    for code in (554, 451):
        async with Client(running.port) as client:
            await client.ehlo()
            replies = await client.message("a@example.com", ["b@example.org"], b"\r\n")
            assert replies[-1].code == code
    async with asyncio.timeout(10):
        while not running.rows("SELECT * FROM task_in_doubt"):
            await asyncio.sleep(0.01)


# ------------------------------------------------------------------------------------- what people do


async def test_search_and_open_a_send(looked: Looked) -> None:
    await send(looked.running, "shop@example.com", ["ann@example.org"], X_Task_Type="order")
    await send(looked.running, "news@example.com", ["ben@example.org"], X_Task_Type="digest")
    await looked.open("/")
    page = looked.page
    await page.get_by_label("Search what was sent").fill("ann@example.org")
    await page.get_by_role("button", name="Search").click()
    await page.wait_for_url("**/sends?**")
    assert looked.address == "/sends?q=ann%40example.org", "no more than what was asked for"
    rows = page.locator(".sends tbody tr")
    assert await rows.count() == 1
    await rows.get_by_role("link").click()
    assert "ann@example.org" in await page.get_by_role("heading", level=1).inner_text()
    await page.get_by_text("The row, as it is kept").click()
    assert '"task_type": "order"' in await page.locator("pre").inner_text()
    await page.go_back()
    assert await rows.count() == 1, "the address is enough"


async def test_filters_of_their_own(looked: Looked) -> None:
    for at in range(3):
        await send(looked.running, "shop@example.com", [f"ann{at}@example.org"], X_Task_Type=f"t{at}")
    await looked.open("/sends")
    page = looked.page
    await page.get_by_text("More filters").click()
    await page.get_by_label("Type").fill("t1")
    await page.get_by_label("Since").fill("1h")
    await page.get_by_role("button", name="Search").click()
    await page.wait_for_url("**type=t1**")
    assert "tz=Europe%2FBerlin" in looked.address, "times without a zone are the reader's"
    assert await page.locator(".sends tbody tr").count() == 1
    assert await page.get_by_label("Type").is_visible(), "filters that are set are open"
    assert await page.locator(".chips li").all_inner_texts() == ["Type: t1", "Since: 1h", "clear"]


async def test_the_page_follows_what_happens(looked: Looked) -> None:
    await looked.open("/")
    page = looked.page
    assert await page.get_by_text("Nothing has been sent yet").is_visible()
    await send(looked.running, "shop@example.com", ["late@example.org"], X_Task_Type="order")
    await page.locator("#part-recent").get_by_text("late@example.org").wait_for(timeout=GUARD_MS)
    legend = page.locator("#outcomes .legend")
    assert " ".join((await legend.inner_text()).split()) == "accepted 1"
    assert looked.seen("/") == 1, "without loading the page again"
    assert await page.locator("#outcomes canvas").count() == 1


async def test_it_can_be_paused(looked: Looked) -> None:
    await looked.open("/")
    page = looked.page
    await page.wait_for_event("requestfinished", lambda request: "/live" in request.url, timeout=GUARD_MS)
    pause = page.get_by_role("button", name="Pause")
    await pause.click()
    assert await pause.get_attribute("aria-pressed") == "true"
    assert "Paused at" in await page.locator(".freshness").inner_text()
    await send(looked.running, "shop@example.com", ["late@example.org"])
    seen = looked.seen("/live")
    await pause.click()
    await page.locator("#part-recent").get_by_text("late@example.org").wait_for(timeout=GUARD_MS)
    assert looked.seen("/live") > seen


async def test_a_relay_that_has_gone_is_told(
    browser: Browser, start: Any, upstream: ScriptedUpstream
) -> None:
    async with start(upstream.port) as running:
        looked = await look(browser, running)
        await looked.open("/")
    told = looked.page.locator(".freshness.stale")
    await told.wait_for(timeout=GUARD_MS)
    assert "No answer from the relay since" in await told.inner_text()


async def test_times_are_the_readers_and_utc_is_at_hand(looked: Looked) -> None:
    await send(looked.running, "shop@example.com", ["ann@example.org"])
    (row,) = looked.running.rows()
    await looked.open("/sends")
    time = looked.page.locator(".sends time")
    assert await time.get_attribute("title") == f"{row['sent_at'][:19]} UTC"
    shown, hour = await time.inner_text(), int(row["sent_at"][11:13])
    assert int(shown[11:13]) in ((hour + 1) % 24, (hour + 2) % 24), "Berlin"
    assert "GMT+" in await looked.page.locator(".sends thead").inner_text()


async def test_the_keyboard_is_enough(looked: Looked) -> None:
    await send(looked.running, "shop@example.com", ["ann@example.org"])
    await looked.open("/")
    page = looked.page
    await page.keyboard.press("Tab")
    focused = page.locator(":focus")
    assert await focused.inner_text() == "Skip to the content"
    assert await focused.evaluate("e => e.getBoundingClientRect().top >= 0"), "it comes into sight"
    await page.keyboard.press("Enter")
    await page.wait_for_url("**#main")  # the address follows an event
    for _ in range(20):
        await page.keyboard.press("Tab")
        if await focused.get_attribute("name") == "q":
            break
    await page.keyboard.type("ann@example.org")
    await page.keyboard.press("Enter")
    await page.wait_for_url("**/sends?**")
    for _ in range(20):
        await page.keyboard.press("Tab")
        if "/sends/" in (await focused.get_attribute("href") or ""):
            break
    assert await focused.evaluate("e => getComputedStyle(e).outlineStyle") == "solid", "one sees where one is"
    await page.keyboard.press("Enter")
    await page.wait_for_url("**/sends/*-*")


async def test_it_works_without_scripts(
    browser: Browser, running: Running, upstream: ScriptedUpstream
) -> None:
    await fill(running, upstream)
    looked = await look(browser, running, java_script_enabled=False)
    await looked.open("/")
    page = looked.page
    assert await page.locator("#part-recent tbody tr").count() == 10
    assert "UTC" in await page.locator("#part-recent time").first.inner_text()
    assert not await page.locator(".plot").first.is_visible(), "no empty frame where a chart would be"
    assert not await page.get_by_role("button", name="Pause").is_visible(), "there is nothing to pause"
    await page.locator("#outcomes summary").click()
    assert await page.locator("#outcomes tbody tr").first.is_visible()
    await page.get_by_label("Search what was sent").fill("digest")
    await page.get_by_role("button", name="Search").click()
    assert await page.locator(".sends tbody tr").count() == 4
    assert looked.errors == []


async def test_on_paper_a_chart_says_which_colour_is_which(
    looked: Looked, upstream: ScriptedUpstream
) -> None:
    await fill(looked.running, upstream)
    await looked.open("/")
    page = looked.page
    await page.emulate_media(media="print")
    panels = await page.locator(".panel:visible").evaluate_all(
        "all => all.map(each => each.innerText.trim())"
    )
    assert all(panels), "no empty frame where the search is on the screen"
    for each in await page.locator(".legend i").all():
        adjusted = "i => getComputedStyle(i).printColorAdjust"
        assert await each.evaluate(adjusted) == "exact", "else browsers print no backgrounds"


async def test_a_long_reply_leaves_types_and_addresses_on_one_line(
    looked: Looked, upstream: ScriptedUpstream
) -> None:
    reply = (
        "250 2.6.0 <0102030405060708090a@app.example.com> [InternalId=114168393466382, "
        "Hostname=AM9PR05MB8394.eurprd05.prod.outlook.com] 10345 bytes in 0.123, 98.765 KB/sec "
        "Queued mail for delivery"
    )
    upstream.script = {"end_of_data": [f"{reply}\r\n".encode()]}
    await send(
        looked.running, "newsletter@mail.example.com", ["ann.smith@example.org"], X_Task_Type="password-reset"
    )
    await looked.open("/sends")
    lines = await looked.page.evaluate("""() => {
        const range = document.createRange();
        return Array.from(document.querySelectorAll(".sends tbody td:not(.time)"), (cell) => {
            const texts = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
            range.selectNode(texts.nextNode());
            return range.getClientRects().length;
        });
    }""")
    assert lines[:3] == [1, 1, 1]
    assert lines[3] > 1


async def test_charts_show_what_their_tables_say(looked: Looked, upstream: ScriptedUpstream) -> None:
    await fill(looked.running, upstream)
    await looked.open("/")
    page = looked.page
    for chart, told in (
        ("#outcomes", {"accepted": 13, "rejected": 1}),
        ("#types", {"order": 4, "digest": 4}),
    ):
        items = await page.locator(f"{chart} .legend li").all_inner_texts()
        legend = dict(item.replace("\n", " ").rsplit(" ", 1) for item in items)
        assert {name: int(legend[name]) for name in told} == told
        painted = await page.locator(f"{chart} canvas").evaluate(
            "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(v => v !== 0)"
        )
        assert painted
    plot = page.locator("#outcomes .u-over")
    box = await plot.bounding_box()
    assert box is not None
    await page.mouse.move(box["x"] + box["width"] - 3, box["y"] + box["height"] / 2)
    assert "accepted" in await page.locator("#outcomes .tip").inner_text()


async def test_a_bar_that_is_a_day_of_utc_says_so_in_the_readers_zone(
    browser: Browser, running: Running
) -> None:
    looked = await look(browser, running, timezone_id="Pacific/Kiritimati")  # UTC+14, without summer time
    await send(running, "shop@example.com", ["ann@example.org"])
    await looked.open("/?span=30d")
    over = looked.page.locator("#types .u-over")
    await over.wait_for(timeout=GUARD_MS)
    await over.scroll_into_view_if_needed()
    box = await over.bounding_box()
    assert box is not None
    await looked.page.mouse.move(box["x"] + box["width"] - 3, box["y"] + box["height"] / 2)
    told = (await looked.page.locator("#types .tip p").first.inner_text()).split(" to ")
    begin, end = (datetime.strptime(text, "%Y-%m-%d %H:%M").replace(tzinfo=UTC) for text in told)
    assert (begin.hour, begin.minute, end - begin) == (14, 0, timedelta(days=1))
    assert looked.errors == []


# -------------------------------------------------------------------------------- what strangers cannot


async def test_what_strangers_wrote_never_runs(looked: Looked) -> None:
    address = '"<img/src=x/onerror=window.pwned=1>"@example.com'
    await send(looked.running, address, [address], X_Task_Type=HOSTILE, Message_ID=HOSTILE, X_Task_ID=HOSTILE)
    page = looked.page
    await looked.open("/")
    await looked.open("/sends")
    await page.locator(".sends tbody a").click()
    await looked.open(f"/sends?type={quote(HOSTILE)}")
    await looked.open("/")
    await page.locator("#types summary").click()
    await page.wait_for_event("requestfinished", lambda request: "/live" in request.url, timeout=GUARD_MS)
    assert await page.evaluate("window.pwned") is None
    assert await page.locator("img").count() == 1, "the relay's own"


async def test_the_policy_lets_nothing_run_that_is_not_the_pages_own(
    browser: Browser, running: Running
) -> None:
    looked = await look(browser, running)
    await looked.open("/")
    page = looked.page
    await page.evaluate(
        """() => {
            const inline = document.createElement("script");
            inline.textContent = "window.ran = 'inline'";
            document.body.append(inline);
            const image = document.createElement("img");
            image.setAttribute("onerror", "window.ran = 'handler'");
            image.src = "data:,";
            document.body.append(image);
        }"""
    )
    stranger = await page.evaluate(
        "fetch('http://127.0.0.1:1/').then(() => 'reached', error => String(error))"
    )
    assert "TypeError" in stranger
    assert await page.evaluate("window.ran") is None
    assert any("Content Security Policy" in error for error in looked.errors)


async def test_no_other_site_may_frame_it(
    browser: Browser, running: Running, upstream: ScriptedUpstream
) -> None:
    looked = await look(browser, running)
    await looked.page.set_content(f'<iframe src="http://127.0.0.1:{running.http_port}/"></iframe>')
    async with asyncio.timeout(20):
        while not looked.errors:
            await asyncio.sleep(0.05)
    assert any("frame" in error.lower() for error in looked.errors)


# ----------------------------------------------------------------------------------- for everybody's eyes


@pytest.mark.skipif(not AXE.exists(), reason="axe-core is missing: npm install in tests/interop")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
async def test_axe_finds_nothing(
    browser: Browser, running: Running, upstream: ScriptedUpstream, scheme: str, width: int
) -> None:
    looked = await look(browser, running, color_scheme=scheme, viewport={"width": width, "height": 812})
    paths = ["/", "/sends", "/in-doubt"]
    for path in paths:  # empty
        await axe(looked, path)
    await fill(running, upstream)
    (doubt,) = running.rows("SELECT task_id FROM task_in_doubt")
    sent = running.rows()[-1]
    paths += ["/sends?q=digest&since=1h", "/sends?since=soon", "/sends?q=nobody@example.com", "/sends/7"]
    for path in (*paths, f"/sends/{sent['task_id']}", f"/sends/{doubt['task_id']}"):
        await axe(looked, path)


async def axe(looked: Looked, path: str) -> None:
    """Open every fold of a page, and let axe look at it; nothing is wider than the window."""
    page = looked.page
    await looked.open(path)
    for summary in await page.locator("summary").all():
        if not await summary.evaluate("s => s.parentElement.open"):
            await summary.click()
    await page.evaluate(AXE.read_text() + ";0")
    found = await page.evaluate("axe.run(document)")
    violations = [(each["id"], [node["html"] for node in each["nodes"]]) for each in found["violations"]]
    assert violations == [], path
    assert {"color-contrast", "label", "landmark-one-main"} <= {each["id"] for each in found["passes"]} | (
        set() if await page.locator("form").count() else {"label"}
    )
    wide = await page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide <= 0, path


async def test_dark_and_light_differ_and_the_charts_follow(browser: Browser, running: Running) -> None:
    looked = await look(browser, running, color_scheme="light")
    await send(running, "a@example.com", ["b@example.org"])
    await looked.open("/")
    page = looked.page
    ground = "getComputedStyle(document.body).backgroundColor"
    pixels = "document.querySelector('#outcomes canvas').toDataURL()"
    light, drawn = await page.evaluate(ground), await page.evaluate(pixels)
    await page.emulate_media(color_scheme="dark")
    assert await page.evaluate(ground) != light
    await page.wait_for_function(f"drawn => {pixels} !== drawn", arg=drawn)  # charts follow an event
