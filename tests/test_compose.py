"""`compose.yaml`, which cannot be run here: what it names is there, and the relay takes what it is given."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from relay.settings import SettingsError, load

ROOT = Path(__file__).parent.parent
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
KEYS = {
    *("build", "cap_drop", "depends_on", "environment", "healthcheck", "image", "ports", "read_only"),
    *("security_opt", "stop_grace_period", "volumes"),
}
"""Keys of a service in the Compose specification, those that are used."""


def test_it_has_what_it_should_and_no_key_is_misspelt() -> None:
    assert set(SERVICES) == {"relay", "mailpit", "postgres", "prometheus", "grafana", "metabase"}
    assert set(COMPOSE) == {"name", "services", "volumes"}
    for name, service in SERVICES.items():
        assert set(service) <= KEYS, name


def test_versions_are_pinned() -> None:
    for name, service in SERVICES.items():
        if "build" not in service:
            assert re.fullmatch(r"[a-z/-]+:v?\d+\.\d+[\d.]*", service["image"]), name
    assert (ROOT / SERVICES["relay"]["build"] / "Dockerfile").exists()


def test_ports_are_open_to_this_machine_alone() -> None:
    published = [port for service in SERVICES.values() for port in service.get("ports", ())]
    assert all(re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port) for port in published)
    outside = [port.split(":")[1] for port in published]
    assert len(set(outside)) == len(outside)


def test_what_is_mounted_is_there() -> None:
    used = set()
    for name, service in SERVICES.items():
        for volume in service.get("volumes", ()):
            source, target, *mode = volume.split(":")
            assert target.startswith("/")
            if source.startswith("./"):
                assert (ROOT / source).is_dir(), name
                assert mode == ["ro"], "what is in the repository is only read"
            else:
                used.add(source)
    assert used == set(COMPOSE["volumes"])


def test_services_need_services_that_are_there() -> None:
    for service in SERVICES.values():
        needed = service.get("depends_on", ())
        assert set(needed) <= set(SERVICES)
        for other in needed if isinstance(needed, dict) else ():
            healthy = needed[other]["condition"] == "service_healthy"
            assert not healthy or "healthcheck" in SERVICES[other]


def test_what_is_only_read_has_no_secret_that_compose_would_have_to_write() -> None:
    """Compose refuses to start it: "`file` is the sole supported option" (docker/compose#12531)."""
    for name, service in SERVICES.items():
        sources = [COMPOSE["secrets"][secret] for secret in service.get("secrets", ())]
        assert not service.get("read_only") or all("file" in source for source in sources), name


def test_the_relay_takes_its_configuration() -> None:
    environment = dict(SERVICES["relay"]["environment"])
    given = "RELAY_PAGE_TOKEN=a-password-of-16-characters-or-more docker compose up"
    assert given in (ROOT / "compose.yaml").read_text()
    # Not `:?`, with which `docker compose down` would ask for it too: the relay says that it is missing.
    assert environment["RELAY__HTTP__TOKEN"] == "${RELAY_PAGE_TOKEN:-}"
    with pytest.raises(SettingsError, match=r"http\.token"):
        load(ROOT / "config/container.toml", environment | {"RELAY__HTTP__TOKEN": ""})
    environment["RELAY__HTTP__TOKEN"] = "a-password-of-16-characters-or-more"
    settings = load(ROOT / "config/container.toml", environment)
    host, _, _ = settings.upstreams[0].address.partition(":")
    assert host in SERVICES
    assert re.fullmatch(r"postgresql://relay@(\w+)/relay", settings.records.url)
    database = SERVICES["postgres"]["environment"]
    assert settings.records.password is not None
    assert settings.records.password.get_secret_value() == database["POSTGRES_PASSWORD"]
    inside = {port.rpartition(":")[2] for port in SERVICES["relay"]["ports"]}
    assert inside == {str(settings.listeners[0].address).rpartition(":")[2], str(settings.http.port)}


def test_prometheus_and_grafana_find_what_they_look_for() -> None:
    (job,) = yaml.safe_load((ROOT / "config/prometheus/prometheus.yml").read_text())["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    assert target.partition(":")[0] in SERVICES
    provisioning = ROOT / "config/grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())["datasources"]
    assert re.fullmatch(r"http://(\w+):9090", source["url"])
    (provider,) = yaml.safe_load((provisioning / "dashboards/relay.yml").read_text())["providers"]
    mounted = dict(volume.split(":")[:2][::-1] for volume in SERVICES["grafana"]["volumes"])
    folder = mounted[provider["options"]["path"]]
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (ROOT / folder / Path(home).name).exists()


@pytest.mark.parametrize("service", SERVICES)
def test_every_service_stands_in_the_documentation(service: str) -> None:
    page = (ROOT / "docs/operations.md").read_text()
    chapter = page.split("\n## Everything at once\n")[1].split("\n## ")[0]
    assert service.lower() in chapter.lower()
