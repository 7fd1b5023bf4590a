"""What `promtool test rules` does, for as much of PromQL as the rules here use: a slow and obvious evaluator.

Series are written as promtool has them (`0+10x5`, `0x4 5x36`), expressions are parsed by the `promql_parser` package.
Rates are the plain difference over a range, without Prometheus's extrapolation to its ends.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import promql_parser as promql

Labels = frozenset[tuple[str, str]]
Vector = dict[Labels, float]
"""Without the metric's name."""
STALE_S = 300.0

_SERIES = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})?")
_LABEL = re.compile(r'([a-zA-Z_]+)="([^"]*)"')
_RUN = re.compile(r"(-?[0-9.]+)(?:([+-][0-9.]+))?x([0-9]+)")


@dataclass(frozen=True, slots=True)
class Series:
    """Samples of one series."""

    name: str
    labels: Labels
    at_s: list[float]
    values: list[float]


def parse_series(text: str, values: str, interval_s: float) -> Series:
    """`m{a="b"}` and `0+10x5`."""
    found = _SERIES.fullmatch(text)
    assert found is not None, text
    numbers: list[float] = []
    for part in values.split():
        run = _RUN.fullmatch(part)
        if run is None:
            numbers.append(float(part))
        else:
            first, step, times = float(run[1]), float(run[2] or 0), int(run[3])
            numbers += [first + step * index for index in range(times + 1)]
    at_s = [interval_s * index for index in range(len(numbers))]
    return Series(found[1], frozenset(_LABEL.findall(found[2] or "")), at_s, numbers)


def seconds(text: str) -> float:
    """`15s`, `2m`, `1h`."""
    return float(text[:-1]) * {"s": 1, "m": 60, "h": 3_600}[text[-1]]


# --- expressions ------------------------------------------------------------------------------------------------------


def selectors(expression: str) -> list[tuple[str, dict[str, str]]]:
    """Every metric that an expression names, with the labels that it asks for."""
    found: list[tuple[str, dict[str, str]]] = []

    def walk(node: Any) -> None:
        if isinstance(node, promql.MatrixSelector):
            walk(node.vector_selector)
        elif isinstance(node, promql.VectorSelector):
            assert node.name is not None, "a selector names its metric here"
            found.append((node.name, {matcher.name: matcher.value for matcher in node.matchers.matchers}))
        elif isinstance(node, promql.BinaryExpr):
            walk(node.lhs)
            walk(node.rhs)
        elif isinstance(node, promql.Call):
            for argument in node.args:
                walk(argument)
        elif isinstance(node, promql.AggregateExpr | promql.ParenExpr):
            walk(node.expr)
        else:
            assert isinstance(node, promql.NumberLiteral | promql.StringLiteral), type(node)

    walk(promql.parse(expression))
    return found


class Evaluator:
    """Of some series."""

    def __init__(self, series: list[Series]) -> None:
        self._series = series

    def value(self, expression: str, at_s: float) -> Vector:
        """An expression at a moment."""
        found = self._value(promql.parse(expression), at_s)
        assert isinstance(found, dict), "a rule is a vector"
        return found

    def _value(self, node: Any, at_s: float) -> Vector | float:
        if isinstance(node, promql.ParenExpr):
            return self._value(node.expr, at_s)
        if isinstance(node, promql.NumberLiteral):
            return node.val
        if isinstance(node, promql.VectorSelector):
            return {
                series.labels: values[-1]
                for series in self._chosen(node)
                if (values := _between(series, at_s - STALE_S, at_s))
            }
        if isinstance(node, promql.AggregateExpr):
            return self._aggregate(node, at_s)
        if isinstance(node, promql.Call):
            return self._call(node, at_s)
        assert isinstance(node, promql.BinaryExpr), type(node)
        return _binary(str(node.op), self._value(node.lhs, at_s), self._value(node.rhs, at_s))

    def _chosen(self, node: Any) -> list[Series]:
        wanted = {matcher.name: matcher.value for matcher in node.matchers.matchers}
        return [
            series
            for series in self._series
            if series.name == node.name and wanted.items() <= dict(series.labels).items()
        ]

    def _aggregate(self, node: Any, at_s: float) -> Vector:
        combine: Callable[[list[float]], float] = cast(Any, {"sum": sum, "max": max, "min": min})[str(node.op)]
        kept = set(node.modifier.labels) if node.modifier is not None else set()
        groups: dict[Labels, list[float]] = {}
        for labels, value in cast(Vector, self._value(node.expr, at_s)).items():
            groups.setdefault(frozenset(pair for pair in labels if pair[0] in kept), []).append(value)
        return {labels: combine(values) for labels, values in groups.items()}

    def _call(self, node: Any, at_s: float) -> Vector:
        name = node.func.name
        if name == "histogram_quantile":
            return _quantile(node.args[0].val, cast(Vector, self._value(node.args[1], at_s)))
        (matrix,) = node.args
        range_s = matrix.range.total_seconds()
        found: Vector = {}
        for series in self._chosen(matrix.vector_selector):
            values = _between(series, at_s - range_s, at_s)
            if len(values) >= 2:
                change = values[-1] - values[0]
                if name != "delta":
                    change = sum(max(0.0, later - earlier) for earlier, later in itertools.pairwise(values))
                found[series.labels] = change / range_s if name == "rate" else change
        assert name in ("rate", "increase", "delta"), name
        return found


def _between(series: Series, first_s: float, last_s: float) -> list[float]:
    return [value for at_s, value in zip(series.at_s, series.values, strict=True) if first_s <= at_s <= last_s]


def _binary(operator: str, left: Vector | float, right: Vector | float) -> Vector | float:
    if operator == "or":
        assert isinstance(left, dict) and isinstance(right, dict)
        return right | left
    compare: Callable[[float, float], bool] | None = {
        ">": lambda a, b: a > b,
        "<": lambda a, b: a < b,
        "==": lambda a, b: a == b,
    }.get(operator)
    compute: Callable[[float, float], float] | None = {
        "/": lambda a, b: a / b if b else math.nan,
        "+": lambda a, b: a + b,
    }.get(operator)
    assert isinstance(left, dict), "a vector stands first here"
    found: Vector = {}
    for labels, value in left.items():
        other = right.get(labels) if isinstance(right, dict) else right
        if other is None:
            continue
        if compare is not None:
            if compare(value, other):
                found[labels] = value
        else:
            assert compute is not None, operator
            found[labels] = compute(value, other)
    return found


def _quantile(quantile: float, buckets: Vector) -> Vector:
    """Linear within a bucket, as Prometheus has it."""
    groups: dict[Labels, list[tuple[float, float]]] = {}
    for labels, count in buckets.items():
        bound = float(dict(labels)["le"].replace("+Inf", "inf"))
        groups.setdefault(frozenset(pair for pair in labels if pair[0] != "le"), []).append((bound, count))
    found: Vector = {}
    for labels, bounds in groups.items():
        bounds.sort()
        rank = quantile * bounds[-1][1]
        lower, below = 0.0, 0.0
        for bound, count in bounds:
            if count >= rank:
                inside = math.isinf(bound) or count == below
                found[labels] = lower if inside else lower + (bound - lower) * (rank - below) / (count - below)
                break
            lower, below = bound, count
    return found


# --- rules ------------------------------------------------------------------------------------------------------------


def firing(rule: Mapping[str, Any], evaluator: Evaluator, eval_s: float, interval_s: float) -> list[dict[str, Any]]:
    """Alerts of a rule that are firing at a moment: labels and annotations, as promtool names them."""
    for_s = seconds(rule["for"]) if "for" in rule else 0.0
    active: dict[Labels, float] = {}
    at_s = 0.0
    while at_s <= eval_s:
        now = evaluator.value(rule["expr"], at_s)
        active = {labels: active.get(labels, at_s) for labels in now}
        at_s += interval_s
    last_s = at_s - interval_s
    return [
        {
            "exp_labels": dict(labels) | rule["labels"],
            "exp_annotations": {name: _rendered(words, dict(labels)) for name, words in rule["annotations"].items()},
        }
        for labels, since_s in sorted(active.items(), key=str)
        if last_s - since_s >= for_s
    ]


def _rendered(words: str, labels: Mapping[str, str]) -> str:
    return re.sub(r"\{\{ \$labels\.([a-z_]+) \}\}", lambda found: labels.get(found[1], ""), words)
