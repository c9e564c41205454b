"""The tables of a run, in Markdown, and their place in the documentation.

Rules: medians over the rounds, with least and most where there are several. A column stands in a case's table
only if a target has it. What is not installed, and runs that do not count, are named below the tables.
The part of `docs/benchmarks.md` between the markers is replaced as a whole, and nothing else is.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.cases import CASES, FAMILIES, Case
from bench.measure import Result
from bench.targets import TARGETS

COLUMNS = {
    "start_ms": "start to greeting, ms",
    "help_ms": "relay --help, ms",
    "rate": "messages/s",
    "cpu_ms": "CPU-ms a message",
    "opening_ms": "CPU-ms to open one",
    "p50_ms": "p50 ms",
    "p99_ms": "p99 ms",
    "kib": "KiB a session",
    "peak_mib": "peak MiB",
}
BEGIN = "<!-- begin: written by `make bench` -->"
END = "<!-- end: written by `make bench` -->"


class Runs:
    """All runs, by case and target."""

    def __init__(self, results: Sequence[Result]) -> None:
        self._results = results

    def values(self, case: str, target: str, name: str) -> list[float]:
        return [
            run.values[name]
            for run in self._results
            if (run.case, run.target) == (case, target) and name in run.values
        ]

    def median(self, case: str, target: str, name: str) -> float | None:
        values = self.values(case, target, name)
        return statistics.median(values) if values else None

    def ratios(self, case: str, target: str, other: str, name: str) -> list[float]:
        """`target` beside `other`, round by round: the next round may differ."""
        by_round = {run.round: run.values for run in self._results if (run.case, run.target) == (case, other)}
        return [
            run.values[name] / by_round[run.round][name]
            for run in self._results
            if (run.case, run.target) == (case, target)
            and name in run.values
            and by_round.get(run.round, {}).get(name)
        ]


def tables(cases: Sequence[str], targets: Sequence[str], runs: Runs) -> list[str]:
    """A table for each case, those of one family in one table."""
    shown: list[str] = []
    families_done: set[str] = set()
    for name in cases:
        case = CASES[name]
        if not case.family or case.family == "waiting":
            shown.append(_case(case, targets, runs))
        elif case.family not in families_done:
            families_done.add(case.family)
            members = [CASES[member] for member in FAMILIES[case.family] if member in cases]
            shown.append(_family(case.family, members, targets, runs))
    return shown


def _case(case: Case, targets: Sequence[str], runs: Runs) -> str:
    taking_part = [name for name in targets if not case.only or name in case.only]
    columns = [
        name for name in COLUMNS if any(runs.values(case.name, target, name) for target in taking_part)
    ]
    lines = [
        f"### {case.name}: {case.title}",
        "",
        *_head(["target", *(COLUMNS[name] for name in columns)]),
    ]
    for target in taking_part:
        if target == "direct" and case.kind != "load":
            continue
        cells = [spread(runs.values(case.name, target, name)) for name in columns]
        lines.append(_row([target, *cells] if any(cells) else [target, "no run that counts"]))
    notes = [
        f"relay/{other}: messages/s {spread(rates, '.2f')}"
        + (f", CPU a message {spread(cpu, '.2f')}" if cpu else "")
        for other in ("direct", "naive", "bare")
        if (rates := runs.ratios(case.name, "relay", other, "rate"))
        for cpu in [runs.ratios(case.name, "relay", other, "cpu_ms")]
    ]
    stolen = [share for target in taking_part for share in runs.values(case.name, target, "stolen")]
    if any(share >= 1 for share in stolen):
        notes.append(f"of the processors' time the host gave others {spread(stolen, '.0f')} %")
    return "\n".join([*lines, *(["", "; ".join(notes) + "."] if notes else [])])


def _family(family: str, cases: Sequence[Case], targets: Sequence[str], runs: Runs) -> str:
    """One row for each step; the last column is the cost beside the first step's, of the same round."""
    lines = [f"### {family}", ""]
    lines += _head(["case", "messages/s", "CPU-ms a message", f"beside {cases[0].name}"])
    target = next(name for name in targets if not cases[0].only or name in cases[0].only)
    first = runs.values(cases[0].name, target, "cpu_ms")
    for case in cases:
        cpu = runs.values(case.name, target, "cpu_ms")
        beside = [one / base for one, base in zip(cpu, first, strict=False)]
        rate = spread(runs.values(case.name, target, "rate"))
        lines.append(_row([case.title, rate, spread(cpu), spread(beside, ".2f")]))
    if family == "recipients" and len(cases) > 1:
        least, most = cases[0], cases[-1]
        costs = [
            (many - one) * 1e3 / (most.step - least.step)
            for one, many in zip(first, runs.values(most.name, target, "cpu_ms"), strict=False)
        ]
        lines += ["", f"A recipient costs {spread(costs, '.1f')} µs of CPU."]
    return "\n".join(lines)


def spread(values: Sequence[float], form: str = "") -> str:
    """The median, and the least and the most where there are several; nothing for none."""
    if not values:
        return ""
    median, least, most = (
        format(v, form) if form else figure(v) for v in (statistics.median(values), min(values), max(values))
    )
    return median if least == most else f"{median} ({least} - {most})"


def figure(value: float) -> str:
    """Three digits that tell something."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:,.{digits}f}"


def described(targets: Sequence[str]) -> str:
    """What each target is, and in which version it was found."""
    lines = [_row(["target", "what it does", "version"]), _row(["---"] * 3)]
    lines += [_row([name, TARGETS[name].does, TARGETS[name].version()]) for name in targets]
    return "\n".join(lines)


def complaints(missing: Mapping[str, str], failures: Sequence[str]) -> list[str]:
    """What is not in the tables, and why."""
    lines = []
    if missing:
        lines.append("Not measured: " + "; ".join(f"{name} ({why})" for name, why in missing.items()) + ".")
    if failures:
        lines.append("Runs that do not count:\n\n" + "\n".join(f"- {failure}" for failure in failures))
    return lines


def put(page: Path, text: str) -> None:
    """Write the text between the page's markers; ValueError where they are not."""
    old = page.read_text("utf-8")
    head, begin, rest = old.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} has no place for the tables: a line {BEGIN!r} and a line {END!r}")
    page.write_text(f"{head}{BEGIN}\n\n{text.strip()}\n\n{END}{tail}", "utf-8")


def _head(cells: Sequence[str]) -> list[str]:
    return [_row(cells), _row(["---"] + ["---:"] * (len(cells) - 1))]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |".replace("  ", " ")
