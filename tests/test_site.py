"""The documentation as a site: no warning, nothing from other hosts, every link leads somewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

pytest.importorskip("mkdocs", reason="mkdocs is not installed: make .venv/dev")

ROOT = Path(__file__).parent.parent


class Links(HTMLParser):
    """What a page links to, what it loads, and the anchors that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.loads: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        if "id" in given:
            self.anchors.add(given["id"])
        if tag == "a" and "href" in given:
            self.links.add(given["href"])
        elif tag == "link" and given.get("rel") not in ("canonical", "next", "prev", "alternate"):
            self.loads.add(given.get("href", ""))
        elif "src" in given:
            self.loads.add(given["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(place)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    return place


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Links]:
    found = {path: Links(path.read_text()) for path in site.rglob("*.html")}
    assert len(found) > 30
    return found


def is_elsewhere(target: str) -> bool:
    return target.startswith(("http:", "https:", "//", "mailto:"))


def test_every_link_leads_somewhere(pages: dict[Path, Links], site: Path) -> None:
    """404.html is served from any place, and its links are from the root."""
    for path, page in pages.items():
        for link in page.links:
            if is_elsewhere(link):
                continue
            target, anchor = urldefrag(unquote(link))
            found = (site / target.lstrip("/") if path.name == "404.html" else path.parent / target).resolve()
            found = path if not target else found
            found = found / "index.html" if found.is_dir() else found
            assert found.exists(), f"{path.name}: {link}"
            if anchor and found.suffix == ".html":
                assert anchor in pages[found].anchors or anchor.startswith("__"), f"{path.name}: {link}"


def test_nothing_is_loaded_from_elsewhere(pages: dict[Path, Links], site: Path) -> None:
    for path, page in pages.items():
        assert not [load for load in page.loads if is_elsewhere(load)], path.name
    for sheet in site.rglob("*.css"):
        text = sheet.read_text()
        assert "url(http" not in text
        assert "url(//" not in text
        assert "@import" not in text


def test_the_decisions_are_listed(pages: dict[Path, Links], site: Path) -> None:
    listed = pages[site / "adr/index.html"].links
    assert {f"{path.stem}.html" for path in (ROOT / "docs/adr").glob("0*.md")} <= listed
