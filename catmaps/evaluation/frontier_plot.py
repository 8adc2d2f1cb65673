"""The picture of a frontier: bits per character against token entropy, real text and controls marked."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from catmaps.errors import UserError
from catmaps.evaluation.frontier_rows import FrontierRow, steps_of
from catmaps.evaluation.matched import crossing, curves, interpolate
from catmaps.evaluation.plots import COLOURS, INK, STYLE
from catmaps.evaluation.quality import HELDOUT
from catmaps.text.metrics import Mean

DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))  # one a run
MARGIN = 0.12  # of the frame, around curves and real text
GREY = "#7b848c"
NOTE = "T: temperature. Bars: standard errors."
OPEN = "Open: repeats itself more than held-out text."
RING = "Ring: at the entropy of held-out text."
CHARS = 88  # of a line of the note, a panel


class Outside(NamedTuple):
    """A control that lies outside of a panel's frame, and its bits in words."""

    row: FrontierRow
    bits: str


def write_plot(file: Path, rows: Sequence[FrontierRow], title: str) -> None:
    """Writes a frontier as PNG: forward bits and, if there are any, the causal judge's.

    Curves go through the temperatures of one run and number of steps; open points are flattered by repetition; a ring
    marks where a curve has the entropy of held-out text. Controls far from the curves are named at the foot.

    Raises:
        UserError: If matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("the frontier's picture needs matplotlib: pip install 'catmaps[report]'") from error
    from matplotlib.figure import Figure

    panels = [False, True] if any(row.judge_bits is not None for row in rows) else [False]
    style: dict[Any, Any] = {**STYLE}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(0.8 + 5.4 * len(panels), 5.2), layout="constrained", facecolor="white")
        notes = [NOTE] + ([OPEN] if any(row.flattered and not row.is_control for row in rows) else [])
        outside: dict[str, list[str]] = {}
        for i, judged in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), i + 1)
            ringed, far = _panel(axes, rows, judged)
            notes += [RING] if ringed and RING not in notes else []
            for row, bits in far:
                outside.setdefault(f"{row.series} (entropy {row.token_entropy:.2f}", []).append(bits)
        figure.axes[0].legend(loc="best")
        figure.suptitle(title, fontsize=11)
        if outside:
            words = [", ".join([name, *bits]) + " bits)" for name, bits in outside.items()]
            notes.append(f"Outside the frame: {'; '.join(words)}.")
        lines = textwrap.wrap(" ".join(notes), CHARS * len(panels))
        figure.supxlabel("\n".join(lines), fontsize=8, color=GREY, linespacing=1.4)
        figure.savefig(file, format="png", dpi=150)


def _panel(axes: Any, rows: Sequence[FrontierRow], judged: bool) -> tuple[bool, list[Outside]]:
    """Draws one panel; returns whether a curve crosses real text's entropy, and the controls outside of the frame."""
    real = next((row for row in rows if row.series == HELDOUT), None)
    drawn, ringed = curves(rows), False
    runs = list(dict.fromkeys(series for series, _ in drawn))
    for i, ((series, steps), curve) in enumerate(drawn.items()):
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[runs.index(series) % len(DASHES)]
        _curve(axes, curve, judged, colour, dash, f"{series}, {steps_of(steps)}")
        place = crossing(curve, real.token_entropy) if real is not None else None
        bits = interpolate(place, real.entropy, judged=judged) if place is not None and real is not None else None
        if bits is not None and real is not None:
            axes.plot(real.token_entropy, bits.mean, "o", color=colour, ms=10, mfc="none", mew=1.4, zorder=4)
            ringed = True
    if real is not None and (bits := real.bits(judged)) is not None:
        axes.axvline(real.token_entropy, color=INK, linestyle=(0, (4, 3)), linewidth=0.9, zorder=1)
        axes.plot(real.token_entropy, bits.mean, "*", color=INK, ms=13, zorder=5, label=HELDOUT)
    _frame(axes, [row for row in rows if not row.is_control or row is real], judged)
    outside = _controls(axes, [row for row in rows if row.is_control and row is not real], judged)
    axes.set_xlabel("token entropy of a text (nats)")
    axes.set_ylabel("bits per character under the " + ("causal judge" if judged else "6-gram model"))
    return ringed, outside


def _curve(axes: Any, curve: Sequence[FrontierRow], judged: bool, colour: str, dash: Any, label: str) -> None:
    known = [(row, bits) for row in curve if (bits := row.bits(judged)) is not None]
    if not known:
        return
    x, y = [row.token_entropy for row, _ in known], [bits.mean for _, bits in known]
    errors = [row.token_entropy_stderr for row, _ in known], [_error(bits) for _, bits in known]
    axes.errorbar(x, y, errors[1], errors[0], color=colour, linestyle="none", elinewidth=0.7, alpha=0.6, zorder=2)
    axes.plot(x, y, color=colour, linestyle=dash, zorder=2)
    axes.plot([], [], "o", color=colour, linestyle=dash, ms=5, label=label)
    for row, bits in known:
        fill = "white" if row.flattered else colour
        axes.plot(row.token_entropy, bits.mean, "o", color=colour, mfc=fill, ms=5, zorder=3)
    (first, _), (last, _) = known[0], known[-1]
    if first is not last:
        _label(axes, (x[-1], y[-1]), f"T {last.temperature:g}", colour, "left")
    if first is not last or first.steps > 1:  # one call knows no temperature
        _label(axes, (x[0], y[0]), f"T {first.temperature:g}", colour, "right")


def _label(axes: Any, point: tuple[float, float], words: str, colour: str, at: str = "center") -> None:
    """Words above a point, or beside it; `at` is the point's side of the words."""
    away = {"center": (0, 7), "left": (9, -3), "right": (-9, -3)}[at]
    axes.annotate(words, point, away, textcoords="offset points", ha=at, fontsize=8, color=colour, zorder=6)


def _error(bits: Mean) -> float:
    return 0.0 if bits.stderr != bits.stderr else bits.stderr


def _frame(axes: Any, rows: Sequence[FrontierRow], judged: bool) -> None:
    """Limits that hold the curves and real text, whatever the controls are."""
    known = [(row.token_entropy, bits.mean) for row in rows if (bits := row.bits(judged)) is not None]
    for values, setter in zip(zip(*known, strict=True), (axes.set_xlim, axes.set_ylim), strict=True):
        room = MARGIN * (max(values) - min(values) or 1.0)
        setter(min(values) - room, max(values) + room)


def _controls(axes: Any, controls: Sequence[FrontierRow], judged: bool) -> list[Outside]:
    outside, (left, right), (low, high) = [], axes.get_xlim(), axes.get_ylim()
    for row in controls:
        bits = row.bits(judged)
        if bits is None:
            continue
        if not (left < row.token_entropy < right and low < bits.mean < high):
            outside.append(Outside(row, f"{'judge' if judged else '6-gram'} {bits.mean:.2f}"))
            continue
        axes.plot(row.token_entropy, bits.mean, "D", color=GREY, ms=6, zorder=3)
        _label(axes, (row.token_entropy, bits.mean), row.series, GREY)
    return outside
