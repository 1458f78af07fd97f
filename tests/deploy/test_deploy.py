"""deploy/: what images, compose, Kubernetes, Prometheus and Grafana say of guardengine is so. No daemon is needed."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from serving import USER, Channel, Served, channel, served

from guardengine.cli.serve import add_command as add_serve
from guardengine.server.settings import ServerSettings

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "guardengine.json"
DOCKERFILES = ("Dockerfile", "Dockerfile.cuda")
METRIC = re.compile(r"guardengine:\w+")


def documents(path: str) -> list[Any]:
    return list(yaml.safe_load_all((DEPLOY / path).read_text()))


def parsed(arguments: list[str]) -> argparse.Namespace:
    """What our own command line makes of arguments."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    commands = parser.add_subparsers(dest="command")
    add_serve(commands)
    if importlib.util.find_spec("guardengine.proxy") is not None:
        importlib.import_module("guardengine.cli.proxy").add_command(commands)
    return parser.parse_args(arguments)


@pytest.fixture(scope="module")
def server(checkpoints) -> Iterator[Served]:
    with served(checkpoints(dtype="float32")) as server:
        yield server


@pytest.fixture(scope="module")
def families(server) -> dict[str, set[str]]:
    """The series that a server which has seen some work shows, and the labels that they have."""
    with server.http() as http:
        http.post("/v1/moderations", json={"input": "a"})
        http.post("/v1/guard", json={"messages": [USER, {"role": "assistant", "content": "b"}]})
        http.post("/v1/guard", json={"messages": []})
        with channel(server) as stream:
            append(stream)
        text = http.get("/metrics").text
    found: dict[str, set[str]] = {}
    for line in text.splitlines():
        if line.startswith("# TYPE"):
            _, _, name, kind = line.split()
            suffixes = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
            found |= {name + suffix: set() for suffix in suffixes}
        elif match := re.match(r"(guardengine:\w+)\{(.*?)\} ", line):
            found.setdefault(match[1], set()).update(re.findall(r'(\w+)="', match[2]))
    return found


def append(stream: Channel) -> None:
    stream.open()
    stream.send("append", text="Sure, why not? ", role="assistant")
    stream.until("labels")


def expressions() -> list[str]:
    dashboard = json.loads(DASHBOARD.read_text())
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    variables = [variable["query"]["query"] for variable in dashboard["templating"]["list"]]
    (rules,) = documents("prometheus/alerts.yml")
    return panels + variables + [rule["expr"] for group in rules["groups"] for rule in group["rules"]]


def test_every_metric_that_is_shown_or_watched_exists(families) -> None:
    shown = {name for expression in expressions() for name in METRIC.findall(expression)}
    assert len(shown) > 20
    assert not shown - set(families)
    bases = {re.sub("_(bucket|sum|count)$", "", name) for name in shown}
    there = {re.sub("_(bucket|sum|count)$", "", name) for name in families if not name.endswith("_created")}
    assert there - bases == set()  # and all that exist are on the dashboard


def test_every_label_exists(families) -> None:
    ours = {"instance", "le", "model_name"}  # of Prometheus, of histograms, and of every engine
    for expression in expressions():
        known = ours.union(*(families[name] for name in METRIC.findall(expression) if name in families))
        if "guardengine:failures_total" in expression:  # nothing has failed here
            known |= {"kind"}
        for group in re.findall(r"by \(([^)]*)\)", expression):
            assert set(group.replace(" ", "").split(",")) <= known, expression


def test_the_dashboard_is_whole() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    places = [tuple(panel["gridPos"].values()) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(places)
    (sources,) = documents("grafana/provisioning/datasources/prometheus.yml")
    uids = {panel["datasource"]["uid"] for panel in dashboard["panels"]}
    assert uids == {sources["datasources"][0]["uid"]}
    (providers,) = documents("grafana/provisioning/dashboards/guardengine.yml")
    (compose,) = documents("compose.yaml")
    folder = providers["providers"][0]["options"]["path"]
    assert f"./grafana/dashboards:{folder}:ro" in compose["services"]["grafana"]["volumes"]


# -- images ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DOCKERFILES)
def test_images(name) -> None:
    text = (DEPLOY / name).read_text()
    lines = [line.split() for line in text.splitlines()]
    command = json.loads(re.findall(r"^CMD (\[.*\])", text, re.MULTILINE)[-1])
    assert json.loads(re.search(r"^ENTRYPOINT (\[.*\])", text, re.MULTILINE)[1]) == ["guardengine"]
    arguments = parsed(command)
    (port,) = [int(words[1]) for words in lines if words[:1] == ["EXPOSE"]]
    assert (arguments.host, arguments.port) == ("0.0.0.0", port)
    health = text[text.index("HEALTHCHECK") :].split("ENTRYPOINT")[0]
    assert f"http://127.0.0.1:{port}/health" in health
    (user,) = [words[1] for words in lines if words[:1] == ["USER"]]
    assert user == "10001:10001"
    assert text.count("\nFROM ") == 2
    assert not re.search(r"(?i)(api_key|password|token)=", text)
    root = Path(__file__).parents[2]
    kept = [line[1:] for line in (root / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert all((root / path).exists() for path in kept)
    assert {"csrc", "guardengine", "kernels", "pyproject.toml", "setup.py", "README.md", "LICENSE"} <= set(
        kept
    )


# -- compose -----------------------------------------------------------------------------------------------


def test_compose_and_prometheus_name_the_same_services_and_ports() -> None:
    (compose,) = documents("compose.yaml")
    services = compose["services"]
    guard, llm = services["guard"], services["llm"]
    arguments = guard["command"]
    assert arguments[0] == "proxy"
    if importlib.util.find_spec("guardengine.proxy") is not None:
        parsed(arguments)
    options = dict(zip(arguments[2::2], arguments[3::2], strict=True))
    assert set(options) == {"--upstream", "--host", "--port"}
    llm_port = llm["command"][llm["command"].index("--port") + 1]
    assert options["--upstream"] == f"http://llm:{llm_port}"
    assert guard["ports"] == [f"127.0.0.1:{options['--port']}:{options['--port']}"]
    assert any(volume.endswith(f":{arguments[1]}:ro") for volume in guard["volumes"])
    assert "ports" not in llm  # nobody gets past the guard
    assert set(llm["networks"]) == {"inside"}
    assert compose["networks"]["inside"]["internal"]
    assert (DEPLOY.parent / guard["build"]["dockerfile"]).exists()
    (prometheus,) = documents("prometheus/prometheus.yml")
    assert prometheus["scrape_configs"][0]["static_configs"] == [{"targets": [f"guard:{options['--port']}"]}]
    assert all((DEPLOY / "prometheus" / name).exists() for name in prometheus["rule_files"])
    (sources,) = documents("grafana/provisioning/datasources/prometheus.yml")
    assert sources["datasources"][0]["url"] == "http://prometheus:9090"
    assert int(guard["stop_grace_period"].removesuffix("s")) > ServerSettings().drain_timeout_s


# -- Kubernetes --------------------------------------------------------------------------------------------


def test_kubernetes() -> None:
    found = {each["kind"]: each for each in documents("kubernetes/guardengine.yaml")}
    assert set(found) == {"Deployment", "Service", "PodDisruptionBudget", "HorizontalPodAutoscaler"}
    deployment = found["Deployment"]["spec"]
    pod = deployment["template"]["spec"]
    (container,) = pod["containers"]
    arguments = parsed(container["args"])
    (port,) = container["ports"]
    assert (arguments.host, arguments.port) == ("0.0.0.0", port["containerPort"])
    (pause,) = [int(word) for word in container["lifecycle"]["preStop"]["exec"]["command"][1:]]
    assert pod["terminationGracePeriodSeconds"] > arguments.drain_timeout_s + pause
    for probe, path in (("startup", "/health"), ("liveness", "/health"), ("readiness", "/ready")):
        assert container[f"{probe}Probe"]["httpGet"] == {"path": path, "port": port["name"]}
    assert container["livenessProbe"]["timeoutSeconds"] > ServerSettings().health_timeout_s
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["runAsUser"] == 10001  # as the image has it
    assert container["securityContext"]["readOnlyRootFilesystem"]
    mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    assert arguments.checkpoint.startswith(mounts["models"])
    assert arguments.api_key_file == f"{mounts['keys']}/keys"
    assert arguments.kv_cache_bytes < 2**30 * int(
        container["resources"]["limits"]["memory"].removesuffix("Gi")
    )
    labels = deployment["selector"]["matchLabels"].items()
    assert labels <= deployment["template"]["metadata"]["labels"].items()
    for selector in (
        found["Service"]["spec"]["selector"],
        found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() == labels
    assert found["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    assert found["PodDisruptionBudget"]["spec"]["minAvailable"] < deployment["replicas"]


def test_what_kubernetes_scales_by_exists(families) -> None:
    scaler = documents("kubernetes/guardengine.yaml")[-1]["spec"]
    assert scaler["scaleTargetRef"]["name"] == "guardengine"
    (adapter,) = documents("kubernetes/prometheus-adapter.yaml")
    (rule,) = adapter["rules"]
    assert scaler["metrics"][0]["pods"]["metric"]["name"] == rule["name"]["as"]
    names = {name for text in (rule["seriesQuery"], rule["metricsQuery"]) for name in METRIC.findall(text)}
    assert names == {rule["name"]["matches"]}
    assert names <= set(families)
    (monitor,) = documents("kubernetes/podmonitor.yaml")
    assert monitor["spec"]["podMetricsEndpoints"][0]["port"] == "http"
    assert monitor["spec"]["selector"]["matchLabels"] == {"app.kubernetes.io/name": "guardengine"}


def test_a_server_answers_what_the_probes_ask(server) -> None:
    with server.http() as http:
        assert http.get("/health").status_code == 200
        assert http.get("/ready").status_code == 200
        assert http.get("/metrics").headers["content-type"].startswith("text/plain")
