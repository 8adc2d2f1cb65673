"""The plots of the report, each an inline SVG: no display, no network, no global state."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from catmaps.errors import UserError

COLOURS = ("#1f6fb2", "#d9722b", "#2f9e6e", "#8d5ab5", "#7a7a7a")
INK, GRID = "#333a41", "#e3e7eb"
RAW_POINTS = 800  # a longer curve is averaged down to so many points
STYLE = {
    "svg.fonttype": "path",  # looks the same whatever fonts the reader has
    "svg.hashsalt": "catmaps",  # so that the same data give the same file
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#aab2ba",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


def training_curve(steps: Sequence[int], losses: Sequence[float], label: str) -> str:
    """Loss over training steps: every value pale (averaged down if there are many), a running mean on top."""
    with _style():
        figure, (axes,) = _figure(1)
        step, loss = _thinned(np.asarray(steps, dtype=float), np.asarray(losses, dtype=float))
        keep = np.isfinite(loss)
        step, loss = step[keep], loss[keep]
        axes.plot(step, loss, color=COLOURS[0], alpha=0.3, linewidth=1)
        if len(loss) >= 20:
            width = max(3, len(loss) // 40)
            sums = np.cumsum(np.concatenate([[0.0], loss]))
            mean = (sums[width:] - sums[:-width]) / width
            axes.plot(step[width // 2 :][: len(mean)], mean, color=COLOURS[0], label=f"mean of {width} points")
            late = loss[len(loss) // 50 :]  # the first steps would flatten all that follows
            room = 0.08 * (late.max() - late.min() + 1e-9)
            axes.set_ylim(late.min() - room, late.max() + room)
            axes.legend()
        _step_axis(axes)
        axes.set_ylabel(label)
        return _svg(figure, "loss over training steps")


def clock_curve(tau: Sequence[float], ce: Sequence[float], mse: Sequence[float]) -> str:
    """Cross-entropy and squared error over clock time, one panel each."""
    with _style():
        figure, panels = _figure(2)
        labels = ("cross-entropy (nats per token)", "squared error per token")
        for axes, values, label, colour in zip(panels, (ce, mse), labels, COLOURS, strict=False):
            axes.plot(tau, values, color=colour, marker="o", markersize=3)
            axes.set_xlabel("clock time τ (0 noise, 1 data)")
            axes.set_ylabel(label)
            axes.set_xlim(-0.02, 1.02)
            axes.set_ylim(bottom=0)
        return _svg(figure, "cross-entropy and squared error over clock time")


def nelbo_curve(steps: Sequence[int], bits: Sequence[float], stderrs: Sequence[float]) -> str:
    """Likelihood bound over training steps, with bars of two standard errors."""
    with _style():
        figure, (axes,) = _figure(1)
        error = 2 * np.nan_to_num(np.asarray(stderrs, dtype=float))
        axes.errorbar(steps, bits, yerr=error, color=COLOURS[2], marker="o", markersize=4, capsize=3)
        _step_axis(axes)
        axes.set_ylabel("NELBO (bits per character)")
        return _svg(figure, "likelihood bound over training steps")


def calls_curves(
    forward: Mapping[str, Sequence[tuple[int, float]]],
    entropy: Mapping[str, Sequence[tuple[int, float]]],
    real: tuple[float, float] | None,
) -> str:
    """Forward bits and token entropy over the number of network calls.

    Args:
        forward: For each series its (calls, forward bits per character).
        entropy: For each series its (calls, token entropy in nats).
        real: Both figures of held-out text, drawn as dashed lines, or None.
    """
    with _style():
        figure, panels = _figure(2)
        labels = ("forward bits per character", "token entropy (nats)")
        for i, (axes, series, label) in enumerate(zip(panels, (forward, entropy), labels, strict=True)):
            for colour, (name, points) in zip(_cycle(len(series)), series.items(), strict=True):
                calls, values = zip(*sorted(points), strict=True)
                axes.plot(calls, values, color=colour, marker="o", markersize=4, label=name)
            if real is not None:
                axes.axhline(real[i], color=INK, linestyle=(0, (4, 3)), linewidth=1.1, label="held-out text")
            _calls_axis(axes, sorted({calls for points in series.values() for calls, _ in points}))
            axes.set_ylabel(label)
        panels[0].legend()
        return _svg(figure, "forward bits and token entropy over the number of calls")


def _step_axis(axes: Any) -> None:
    axes.xaxis.set_major_locator(_matplotlib().ticker.MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    axes.set_xlabel("training step")


def _calls_axis(axes: Any, calls: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(calls, [str(n) for n in calls])
    axes.minorticks_off()
    axes.set_xlabel("network calls per sample")


def _cycle(num: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(num)]


def _thinned(step: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of equally many neighbours, so that at most `RAW_POINTS` remain; a ragged end is averaged too."""
    width = math.ceil(len(loss) / RAW_POINTS)
    if width <= 1:
        return step, loss
    starts = np.arange(0, len(loss), width)
    sizes = np.diff(starts, append=len(loss))
    return np.add.reduceat(step, starts) / sizes, np.add.reduceat(loss, starts) / sizes


def _style() -> Any:
    return _matplotlib().rc_context(STYLE)


def _figure(panels: int) -> tuple[Any, list[Any]]:
    """A figure of one or two panels side by side, of the width that the page has for it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.9 * panels, 3.1), layout="constrained")
    return figure, [figure.add_subplot(1, panels, i + 1) for i in range(panels)]


def _svg(figure: Any, title: str) -> str:
    """The figure as an <svg> element that scales with the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    head, rest = text.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)  # the viewBox stays and keeps the proportions
    return f'{head} role="img" aria-label="{title}">{re.sub(r"<metadata>.*?</metadata>", "", rest, flags=re.S)}'


def _matplotlib() -> Any:
    try:
        import matplotlib.ticker
    except ImportError as error:
        raise UserError("the report's plots need matplotlib: pip install 'catmaps[report]'") from error
    return matplotlib
