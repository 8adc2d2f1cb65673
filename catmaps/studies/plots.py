"""Plots of a study, as PNG: curves, ranked bars, and a figure over a numeric field."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from catmaps.evaluation.plots import COLOURS, INK, STYLE
from catmaps.studies.measures import Curve
from catmaps.studies.ranking import Row
from catmaps.studies.sweeps import best_place, comparable, logarithmic, series_of

DPI = 110
LINES = ("-", "--", ":", "-.")


def _look(i: int) -> dict[str, Any]:
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": LINES[i // len(COLOURS) % len(LINES)]}


def plot_curves(curves: Mapping[str, Sequence[Curve]], title: str, file: Path) -> None:
    """A line per arm, the mean over seeds; every seed's own pale behind it. What a seed lacks is left out of the mean.

    Args:
        curves: By arm, a curve per seed.
        title: Of the plot.
        file: To write.
    """
    figure, axes = _figure()
    heights = []
    for i, (name, seeds) in enumerate(curves.items()):
        points: dict[float, list[float]] = {}
        for curve in seeds:
            for x, y in curve.points:
                points.setdefault(x, []).append(y)
            if len(seeds) > 1:
                axes.plot(*zip(*curve.points, strict=True), **_look(i), alpha=0.3, linewidth=0.8)
        most = max(map(len, points.values()))  # a run that was stopped has been validated more often
        mean = [(x, sum(ys) / len(ys)) for x, ys in sorted(points.items()) if len(ys) == most]
        axes.plot(*zip(*mean, strict=True), **_look(i), marker="o", markersize=3, label=name)
        heights += [y for _, y in mean]
    one = next(iter(curves.values()))[0]
    axes.set_xlabel(one.x)
    axes.set_ylabel(one.y)
    if one.points[-1][0] >= 10_000:
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    if min(heights) > 0 and max(heights) / min(heights) > 10:
        axes.set_yscale("log")
    _legend(axes, len(curves))
    _save(figure, title, file)


def plot_bars(rows: Sequence[Row], name: str, file: Path) -> None:
    """Ranked bars, the best on top, with standard errors; baselines in another colour. The axis need not start at 0."""
    figure, axes = _figure(height=1.2 + 0.32 * len(rows))
    means = np.array([row.mean for row in rows])
    errors = np.nan_to_num(np.array([row.error for row in rows]))
    place = np.arange(len(rows))[::-1]
    colours = [COLOURS[1] if row.arm == row.baseline else COLOURS[0] for row in rows]
    axes.barh(place, means, xerr=errors, color=colours, height=0.62, capsize=3, ecolor=INK)
    for y, row in zip(place, rows, strict=True):
        axes.plot([figure.value for figure in row.values.values()], [y] * len(row.values), "|", color=INK, markersize=7)
    axes.set_yticks(place, [row.arm.name for row in rows])
    low, high = (means - errors).min(), (means + errors).max()
    room = 0.15 * (high - low) or 0.05 * abs(high) or 1.0
    if low > 0 and high / low < 2:  # bars from 0 would all look alike
        axes.set_xlim(max(0.0, low - 2 * room), high + room)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(f"{name} (bars: standard errors; ticks: seeds; orange: compared against)")
    _save(figure, name, file)


def plot_field(rows: Sequence[Row], field: str, name: str, file: Path) -> None:
    """A figure over a field with standard errors, a line for every choice of the other fields, the best of the
    `comparable` points marked; log-log where the field's values are positive and span a factor of three."""
    series, better = series_of(rows, field), rows[0].better
    figure, axes = _figure()
    for i, (label, points) in enumerate(series.items()):
        x, y, error = (np.array(column, dtype=float) for column in zip(*(point[:3] for point in points), strict=True))
        bars = {"yerr": np.nan_to_num(error), "capsize": 3, "marker": "o", "markersize": 4}
        axes.errorbar(x, y, **bars, **_look(i), label=label or None)
        if better != "neither":
            full = comparable(points)
            best = full[best_place(full, better)]
            axes.plot(best.x, best.y, marker="o", markersize=9, fillstyle="none", color=COLOURS[i % len(COLOURS)])
    values = sorted({point.x for points in series.values() for point in points})
    heights = [point.y for points in series.values() for point in points]
    if logarithmic(values):
        axes.set_xscale("log")
        if min(heights) > 0:
            axes.set_yscale("log")
            _plain_ticks(axes)
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.minorticks_off()
    axes.set_xlabel(field)
    axes.set_ylabel(name)
    if any(series):
        _legend(axes, len(series))
    _save(figure, f"{name} over {field}", file)


def plot_laws(
    laws: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float]]], name: str, file: Path
) -> None:
    """Figures over compute, logarithmic; a point per training, and the fitted line: (x, y, fitted y) by name."""
    figure, axes = _figure()
    for i, (label, (x, y, fitted)) in enumerate(laws.items()):
        order = np.argsort(x)
        axes.plot(np.array(x)[order], np.array(fitted)[order], **_look(i), linewidth=1, label=label or None)
        axes.plot(x, y, marker="o", markersize=4, linestyle="none", color=COLOURS[i % len(COLOURS)])
    axes.set_xscale("log")
    axes.set_yscale("log")
    _plain_ticks(axes)
    axes.minorticks_off()
    axes.set_xlabel("training FLOPs (6 x parameters x tokens)")
    axes.set_ylabel(name)
    if any(laws):
        _legend(axes, len(laws))
    _save(figure, f"{name} over compute", file)


def _plain_ticks(axes: Any) -> None:
    """A few plain numbers on a logarithmic axis, whose own ticks may all lie outside a narrow range."""
    low, high = axes.get_ylim()
    ticks = np.geomspace(low, high, 5)
    digits = max(0, 2 - math.floor(math.log10(high - low)) - 1)
    axes.set_yticks(ticks, [f"{tick:.{digits}f}" for tick in ticks])


def _legend(axes: Any, entries: int) -> None:
    axes.legend(fontsize=8, ncols=1 + (entries > 8))


def _figure(height: float = 3.6) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    with _style():
        figure = Figure(figsize=(7.2, height), layout="constrained")
        return figure, figure.add_subplot()


def _save(figure: Any, title: str, file: Path) -> None:
    with _style():
        figure.suptitle(title, fontsize=10)
        figure.savefig(file, dpi=DPI, metadata={"Software": None})  # the same data give the same file


def _style() -> Any:
    from matplotlib import rc_context

    own: Any = STYLE
    return rc_context(own)
