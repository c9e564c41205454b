"""A picture of a run: CPU a message, a bar for each target, as SVG.

Rules: drawn here, since bars need no library. Bars grow with the logarithm: the targets are a hundred times
apart. It reads on a light page and on a dark one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from bench.report import figure

WIDTH = 760
NAME = 130
VALUE = 70
BAR = 15
GAP = 5
PANEL_HEAD = 34
STYLE = """\
text { font: 12px system-ui, sans-serif; fill: #333 }
.title { font-weight: 600 }
.bar { fill: #9bb } .own { fill: #c60 }
@media (prefers-color-scheme: dark) { text { fill: #ddd } .bar { fill: #577 } .own { fill: #f93 } }"""


def bars(panels: Sequence[tuple[str, Mapping[str, float]]], *, own: str = "relay") -> str:
    """Return a picture with a panel for each title; in it a bar for each name, the shortest first."""
    height = sum(PANEL_HEAD + len(values) * (BAR + GAP) for _, values in panels) + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" role="img">',
        f"<style>{STYLE}</style>",
    ]
    top = 0
    for title, values in panels:
        parts.append(f'<text class="title" x="0" y="{top + 20}">{escape(title)}</text>')
        top += PANEL_HEAD
        scale = _scale(list(values.values()))
        for name, value in sorted(values.items(), key=lambda item: item[1]):
            kind = "bar own" if name == own else "bar"
            length, base = scale(value), top + BAR - 3
            parts += [
                f'<text x="{NAME - 8}" y="{base}" text-anchor="end">{escape(name)}</text>',
                f'<rect class="{kind}" x="{NAME}" y="{top}" width="{length:.1f}" height="{BAR}" rx="2"/>',
                f'<text x="{NAME + length + 6:.1f}" y="{base}">{figure(value)}</text>',
            ]
            top += BAR + GAP
    return "\n".join([*parts, "</svg>", ""])


def _scale(values: Sequence[float]) -> Callable[[float], float]:
    """From a value to the length of its bar: the largest fills the width, half of the least is nothing."""
    floor = math.log(min(values) / 2)
    span = math.log(max(values)) - floor
    room = WIDTH - NAME - VALUE
    return lambda value: room * (math.log(value) - floor) / span
