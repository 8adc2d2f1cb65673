"""Figures over a numeric field: lines through arms that are alike in all else, and where each line is best."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from catmaps.studies.ranking import Row
from catmaps.studies.study import Arm, Overrides

SPAN = 3.0  # largest / smallest value from which a field is looked at in its logarithm


class Point(NamedTuple):
    """A figure at a value of a numeric field."""

    x: float
    y: float
    error: float
    """NaN: not known."""
    seeds: int = 1


def numeric_field(arms: Sequence[Arm]) -> str | None:
    """The numeric field of most values among those in which arms differ, over which a line can be drawn; or None."""
    names = dict.fromkeys(name for arm in arms for name in arm.overrides)
    best, most = None, 1
    for name in names:
        values = [arm.overrides.get(name) for arm in arms]
        numbers = {value for value in values if isinstance(value, int | float) and not isinstance(value, bool)}
        whole = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        if whole and len(numbers) > most:
            best, most = name, len(numbers)
    return best


def series_of(rows: Sequence[Row], field: str) -> dict[str, list[Point]]:
    """Points over a field, a series for every choice of the other fields."""
    series: dict[str, list[Point]] = {}
    for row in rows:
        others = {name: value for name, value in row.arm.overrides.items() if name != field}
        point = Point(float(row.arm.overrides[field]), row.mean, row.error, len(row.values))
        series.setdefault(spoken(others), []).append(point)
    return {name: sorted(points) for name, points in series.items()}


def spoken(fields: Overrides) -> str:
    """Fields and values in a few words."""
    return ", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in fields.items())


def logarithmic(values: Sequence[float]) -> bool:
    """Whether a field of these values is looked at in its logarithm."""
    return min(values) > 0 and max(values) / min(values) >= SPAN


def comparable(points: Sequence[Point]) -> list[Point]:
    """Those of most seeds: a mean over fewer is off by what those seeds have in common."""
    most = max(point.seeds for point in points)
    return [point for point in points if point.seeds == most]


def best_place(points: Sequence[Point], better: str) -> int:
    """Index of the best point; `better` is lower or higher."""
    sign = 1 if better == "lower" else -1
    return min(range(len(points)), key=lambda i: sign * points[i].y)


def between(points: Sequence[Point], better: str) -> float | None:
    """Where the parabola through the best point and its two neighbours is best, in the field's logarithm if its values
    span a factor of three; None if the best point is the first or the last, so that the best may lie beyond."""
    place = best_place(points, better)
    if place in (0, len(points) - 1):
        return None
    in_logs = logarithmic([point.x for point in points])
    (a, fa), (b, fb), (c, fc) = ((math.log(p.x) if in_logs else p.x, p.y) for p in points[place - 1 : place + 2])
    left, right = (b - a) * (fb - fc), (b - c) * (fb - fa)
    vertex = b if left == right else b - ((b - a) * left - (b - c) * right) / (2 * (left - right))
    return math.exp(vertex) if in_logs else vertex


def best_values(rows: Sequence[Row], field: str) -> list[tuple[str, str, str, str]]:
    """For every line over a field, of three `comparable` points or more: its name, the best value tried, the best
    `between`, and the number of seeds."""
    better, found = rows[0].better, []
    if better == "neither":
        return found
    for name, points in series_of(rows, field).items():
        if len(points := comparable(points)) < 3:
            continue
        place = between(points, better)
        tried = points[best_place(points, better)]
        best = "at the edge of what was tried" if place is None else f"{place:.3g}"
        found.append((name, f"{tried.x:g}", best, str(tried.seeds)))
    return found
