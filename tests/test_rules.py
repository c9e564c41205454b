"""Rules, dashboard and their documentation name what exists, and nothing is left without its runbook."""

from __future__ import annotations

import asyncio
import json
import re
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.interop.peers import command, needs, run
from tests.support.certificates import Certificates

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.upstream import ScriptedUpstream

ROOT = Path(__file__).parent.parent
PROMETHEUS = ROOT / "config/prometheus"
GRAFANA = ROOT / "config/grafana"
PLAYED = ROOT / "tests/interop/prometheus/alerts.test.yml"
DASHBOARD = json.loads((GRAFANA / "dashboards/relay.json").read_text())
FAMILIES = re.compile(r"\b(?:smtp_relay|process|python)_\w+")


def rules(name: str) -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / name).read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


RECORDED = rules("relay.rules.yml")
ALERTS = rules("relay.alerts.yml")
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def expressions() -> Iterator[tuple[str, str]]:
    """Yield every query with the place where it stands."""
    for rule in (*RECORDED, *ALERTS):
        yield rule.get("record") or rule["alert"], rule["expr"]
    for panel in PANELS:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["definition"]


async def test_every_metric_that_is_named_is_in_a_scrape(
    start: Any, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    cert, key = Certificates().write_server(tmp_path, "relay.example.com")
    over = {
        "listeners": [{"address": "127.0.0.1:0", "tls": "starttls"}],
        "tls": {"cert": str(cert), "key": str(key)},
        "limits": [{"scope": "sender", "max": 100, "per": "1d"}],
    }
    async with start(upstream.port, **over) as running:
        url = f"http://127.0.0.1:{running.http_port}/metrics"
        text = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=10).read().decode())
    scraped = set(re.findall(r"^(\w+)[ {]", text, re.MULTILINE))
    named = {(place, name) for place, query in expressions() for name in metrics_in(query)}
    page = (ROOT / "docs/alerts.md").read_text()
    named |= {("docs/alerts.md", name) for name in FAMILIES.findall(page)}
    assert len(named) > 50
    assert sorted(use for use in named if use[1] not in scraped) == []


def metrics_in(query: str) -> set[str]:
    """Return the scraped metrics that a query names; what rules record has colons in its name."""
    without = re.sub(r"\w+(?::\w+)+", "", re.sub(r'"[^"]*"', "", query))
    return set(FAMILIES.findall(without))


def test_every_recorded_series_that_is_named_is_recorded() -> None:
    recorded = {rule["record"] for rule in RECORDED}
    named = {
        name
        for _, query in expressions()
        for name in re.findall(r"\bjob_\w+(?::\w+)+", re.sub(r'"[^"]*"', "", query))
    }
    assert named <= recorded


def test_every_alert_has_a_severity_a_summary_and_its_runbook() -> None:
    names = [rule["alert"] for rule in ALERTS]
    assert len(names) == len(set(names))
    page = (ROOT / "docs/alerts.md").read_text()
    chapters = dict(re.findall(r"^## (\w+)\n\n\*\*(\w+)\.\*\*", page, re.MULTILINE))
    assert chapters == {rule["alert"]: rule["labels"]["severity"] for rule in ALERTS}
    for rule in ALERTS:
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["runbook"] == f"docs/alerts.md#{rule['alert'].lower()}"


def test_every_alert_is_played_both_ways() -> None:
    tests = yaml.safe_load(PLAYED.read_text())["tests"]
    quiet, *loud = tests
    assert {each["alertname"] for each in quiet["alert_rule_test"]} == {rule["alert"] for rule in ALERTS}
    assert all(each["exp_alerts"] == [] for each in quiet["alert_rule_test"])
    assert quiet["input_series"]
    fires = {each["alertname"] for test in loud for each in test["alert_rule_test"] if each["exp_alerts"]}
    assert fires == {rule["alert"] for rule in ALERTS}


@pytest.mark.interop
@needs("promtool", "prometheus")[1]
async def test_promtool_takes_rules_and_configuration() -> None:
    for subject, files in (
        ("rules", ["relay.rules.yml", "relay.alerts.yml"]),
        ("config", ["prometheus.yml"]),
    ):
        paths = [str(PROMETHEUS / name) for name in files]
        ended = await run([command("promtool"), "check", subject, *paths])
        assert ended.status == 0, ended.said


@pytest.mark.interop
@needs("promtool", "prometheus")[1]
async def test_alerts_fire_when_they_should_and_only_then() -> None:
    ended = await run([command("promtool"), "test", "rules", str(PLAYED)])
    assert ended.status == 0, ended.said


@pytest.mark.interop
@needs("promtool", "prometheus")[1]
async def test_prometheus_takes_every_query_of_the_dashboard(tmp_path: Path) -> None:
    queries = [target["expr"] for panel in PANELS for target in panel["targets"]]
    plain = [re.sub(r"\$\w+", ".*", query.replace("$__rate_interval", "1m")) for query in queries]
    entries = [{"record": f"dashboard:query:{at}", "expr": query} for at, query in enumerate(plain)]
    file = tmp_path / "rules.yml"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": entries}]}))
    ended = await run([command("promtool"), "check", "rules", str(file)])
    assert ended.status == 0, ended.said
    assert f"{len(queries)} rules found" in ended.said


def test_the_dashboard_is_whole() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
    for panel in PANELS:
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["targets"]
        for target in panel["targets"]:
            assert re.search(r'job=~"\$job"', target["expr"]), panel["title"]
    for label in ("upstream", "task_type", "outcome"):
        assert any(f"by ({label}" in query or f", {label}" in query for _, query in expressions())


def test_provisioning_finds_the_dashboard_and_its_data() -> None:
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    assert source["type"] == "prometheus"
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/relay.yml").read_text())["providers"]
    assert provider["type"] == "file"
    (scrape,) = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]
    assert scrape["job_name"] == "smtp-relay"
    jobs = set(re.findall(r'job="([^"]+)"', " ".join(rule["expr"] for rule in ALERTS)))
    assert jobs == {scrape["job_name"]}
