"""Rules, their tests, the scrape example and the dashboard: they parse, they name what there is, they fire when due."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from flows.metrics import Metrics, Stats
from gateway.view_metrics import FAMILIES, CounterSums, exposition
from tests.deploy.promtool import Evaluator, firing, parse_series, seconds, selectors

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
RULES = {rule["alert"]: rule for rule in yaml.safe_load((PROMETHEUS / "rules.yml").read_text())["groups"][0]["rules"]}
RULES_TEST = yaml.safe_load((PROMETHEUS / "rules_test.yml").read_text())
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "tuanyuan.json").read_text())
TARGETS = [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]
LABELS = {
    "partner",
    "shard",
    "shards",
    "reason",
    "kind",
    "route",
    "status",
    "role",
    "outcome",
    "figure",
    "version",
    "le",
}
FROM_PROMETHEUS = {"up"}


def exposed() -> set[str]:
    """Names of samples that /metrics gives before anything was counted, and of a histogram's parts."""
    body, _ = exposition(Stats([Metrics().snapshot()]), CounterSums())
    names: set[str] = set()
    for family in text_string_to_metric_families(body.decode()):
        if family.type == "counter":
            names.add(f"{family.name}_total")
        elif family.type == "histogram":
            names |= {f"{family.name}_{part}" for part in ("bucket", "sum", "count")}
        else:
            names.add(family.name)
    return names


def plain(expression: str) -> str:
    """Grafana's variables as durations."""
    return expression.replace("$__rate_interval", "1m").replace("$__range", "1h")


@pytest.mark.parametrize("expression", [rule["expr"] for rule in RULES.values()] + [plain(expr) for _, expr in TARGETS])
def test_expression_parses_and_names_metrics_that_are_exposed(expression: str) -> None:
    promql_parser.parse(expression)
    known = exposed() | FROM_PROMETHEUS
    found = selectors(expression)
    assert found
    for name, labels in found:
        assert name in known, expression
        assert set(labels) <= LABELS | {"job"}, expression


def test_every_rule_says_how_bad_it_is_and_where_to_read_on() -> None:
    page = (ROOT / "docs" / "operators.md").read_text()
    anchors = {
        re.sub(r"[^a-z0-9 -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in page.splitlines()
        if line.startswith("#")
    }
    for name, rule in RULES.items():
        assert name.startswith("Tuanyuan")
        assert rule["labels"]["severity"] in ("warning", "critical")
        path, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert path == "docs/operators.md"
        assert anchor in anchors, name


@pytest.mark.parametrize("case", RULES_TEST["tests"], ids=lambda case: case["name"])
def test_rules_fire_when_they_should_and_only_then(case: dict[str, Any]) -> None:
    interval_s = seconds(case["interval"])
    evaluator = Evaluator([parse_series(one["series"], one["values"], interval_s) for one in case["input_series"]])
    for expected in case["alert_rule_test"]:
        rule = RULES[expected["alertname"]]
        found = firing(rule, evaluator, seconds(expected["eval_time"]), seconds(RULES_TEST["evaluation_interval"]))
        assert found == (expected["exp_alerts"] or []), (expected["alertname"], expected["eval_time"])


def test_every_rule_has_a_case_in_which_it_fires() -> None:
    fired = {one["alertname"] for case in RULES_TEST["tests"] for one in case["alert_rule_test"] if one["exp_alerts"]}
    assert fired == set(RULES)


def test_dashboard_shows_every_kind_of_figure_with_a_unit() -> None:
    named = {name for _, expression in TARGETS for name, _ in selectors(plain(expression))}
    for name in (
        "tuanyuan_pings_accepted_total",
        "tuanyuan_pushes_total",
        "tuanyuan_publish_to_queue_seconds_bucket",
        "tuanyuan_ping_to_queue_seconds_bucket",
        "tuanyuan_lag_seconds",
        "tuanyuan_queue_entries",
        "tuanyuan_queue_pending",
        "tuanyuan_pings_refused_total",
        "tuanyuan_dead_letters_total",
        "tuanyuan_checkpoint_age_seconds",
        "tuanyuan_server_memory_bytes",
        "tuanyuan_checkpoint_disk_free_bytes",
    ):
        assert name in named
    for panel in DASHBOARD["panels"]:
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)


def test_scrape_example_asks_for_metrics_with_a_key_from_a_file() -> None:
    example = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    (job,) = example["scrape_configs"]
    assert job["metrics_path"] == "/metrics"
    assert job["authorization"].keys() == {"type", "credentials_file"}
    assert example["rule_files"] == ["rules.yml"]


def test_every_metric_of_the_source_has_a_kind_and_help() -> None:
    counted = re.compile(r"metrics\.(count|count_each|gauge|observe)\(\s*\"([a-z_]+)\"")
    found: dict[str, str] = {"alarm": "gauge"}
    for path in [*(ROOT / "flows").glob("*.py"), *(ROOT / "gateway").glob("*.py")]:
        for method, name in counted.findall(path.read_text()):
            found[name] = {"gauge": "gauge", "observe": "histogram"}.get(method, "counter")
    assert len(found) > 60
    for name, kind in found.items():
        assert name in FAMILIES, f"{name} has no help"
        assert FAMILIES[name][0] == kind, name
