"""What mkdocs does beside rendering: links out of docs/ lead to copies of those files, decisions are listed.

On a code host such links show the file; a site that stands alone brings what it links to, as text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\]\(((?:\.\./)+[^)#\s]+)(#[^)\s]*)?\)")


def _outside(page: str, target: str) -> Path | None:
    """Return the file of the repository, outside of docs/, that a page's link means."""
    place = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    return None if place.startswith("docs/") else ROOT / place


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what pages link to."""
    for page in list(files.documentation_pages()):
        for target, _ in LINK.findall(page.content_string):
            source = _outside(page.src_uri, target)
            if source is not None and source.is_file():
                name = f"source/{source.relative_to(ROOT)}.txt"
                if files.get_file_from_path(name) is None:
                    files.append(File.generated(config, name, content=source.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Point links at those copies; list the decisions on their page."""
    if page.file.src_uri == "adr/index.md":
        markdown += _decisions()
    here = posixpath.dirname(page.file.src_uri)

    def point(found: re.Match[str]) -> str:
        source = _outside(page.file.src_uri, found[1])
        if source is None or not source.exists():
            return found[0]
        if source.is_dir():
            return "]"  # a directory has no copy: its name in brackets is all
        copy = f"source/{source.relative_to(ROOT)}.txt"
        return f"]({posixpath.relpath(copy, here or '.')})"

    return LINK.sub(point, markdown)


def _decisions() -> str:
    rows = ["", "| | |", "| --- | --- |"]
    for path in sorted((ROOT / "docs/adr").glob("0*.md")):
        number, _, title = path.read_text().splitlines()[0].removeprefix("# ").partition(". ")
        rows.append(f"| [{number}]({path.name}) | {title} |")
    return "\n".join(rows) + "\n"
