"""A suite's tokens per second and memory over what its cases vary, as PNG."""

from collections import defaultdict
from dataclasses import fields
from pathlib import Path
from typing import Any

from catmaps.benchmarks.case import Case

NAMES = {"vocabulary": "vocabulary V", "length": "length L", "width": "width d", "batch": "texts a step B"}
FOLLOWS = ("batch", "heads", "repeats")
"""What may change along with an axis: a suite over lengths keeps its tokens a step."""


def series(rows: dict[str, dict[str, Any]], axis: str) -> dict[str, list[dict[str, Any]]]:
    """Rows that differ by the axis alone, in its order, under a name; single ones are left out."""
    same = [field.name for field in fields(Case) if field.name not in (axis, *FOLLOWS)]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows.values():
        groups[tuple(row[name] for name in same)].append(row)
    found = [sorted(group, key=lambda row: row[axis]) for group in groups.values() if len(group) > 1]
    return {_name(group[0], axis): group for group in found}


def _name(row: dict[str, Any], axis: str) -> str:
    size = "" if axis == "vocabulary" else f", V = {row['vocabulary']:,}"
    return f"{row['work']}, {row['input'] if row['code'] == 'catmaps' else 'dense'}{size}"


def plot(rows: dict[str, dict[str, Any]], axis: str, title: str, file: Path) -> None:
    """Writes the plot; needs matplotlib.

    Args:
        rows: Of a suite's run.
        axis: Field of a case.
        title: Says on what machine.
        file: To write.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    from catmaps.evaluation.plots import COLOURS, STYLE

    own: Any = STYLE
    with rc_context(own):
        figure = Figure(figsize=(9.2, 3.6), layout="constrained")
        panels = figure.subplots(1, 2)
        for axes, key, label, unit in (
            (panels[0], "tokens_per_second", "tokens per second", 1),
            (panels[1], "peak_bytes", "MB above idle, at the peak", 2**20),
        ):
            for (name, group), colour in zip(series(rows, axis).items(), COLOURS, strict=False):
                x, y = [row[axis] for row in group], [max(row[key], 1) / unit for row in group]
                axes.plot(x, y, marker="o", markersize=4, color=colour, label=name)
            axes.set(xscale="log", yscale="log", xlabel=NAMES[axis], ylabel=label)
            axes.set_xticks(sorted({row[axis] for group in series(rows, axis).values() for row in group}))
            axes.xaxis.set_major_formatter(
                lambda value, _: f"{value / 1000:.0f}k" if value >= 10_000 else f"{value:,.0f}"
            )
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            axes.minorticks_off()
        panels[0].legend()
        figure.suptitle(title, fontsize=10)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=110, metadata={"Software": None})  # the same data give the same file
