"""One directory for each mistake, in bad_settings/: the file, and beside it what the operator must be told.

`environment`, where it is there, has the variables that are set, one on each line. Three dots stand for words
that are Python's and differ from version to version.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from relay.settings import SettingsError, load

CASES = sorted(path for path in (Path(__file__).parent / "bad_settings").iterdir() if path.is_dir())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused_for_the_right_reason(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(case)
    variables = Path("environment")
    lines = variables.read_text().splitlines() if variables.exists() else []
    environ = dict(line.split("=", 1) for line in lines)

    with pytest.raises(SettingsError) as caught:
        load(Path("relay.toml"), environ)

    expected = Path("expected_error").read_text().splitlines()
    assert len(caught.value.problems) == len(expected)
    for problem, line in zip(caught.value.problems, expected, strict=True):
        assert problem == line or re.fullmatch(re.escape(line).replace(r"\.\.\.", ".*"), problem)
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_case_is_complete(case: Path) -> None:
    assert {"relay.toml", "expected_error"} <= {path.name for path in case.iterdir()}
    assert (case / "expected_error").read_text().strip()
