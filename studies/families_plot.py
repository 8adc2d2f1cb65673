"""The pictures of `families.py`: likelihood over tokens seen, and quality of samples over network calls."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from catmaps.evaluation.plots import COLOURS, INK, STYLE
from catmaps.evaluation.quality import HELDOUT

Rows = Sequence[dict[str, Any]]
ORDER = {"autoregressive": 0, "masked": 1, "uniform": 2, "flow": 3}
QUALITY = {
    "forward_bits": "forward bits per character",
    "reverse_bits": "reverse bits per character",
    "token_entropy": "token entropy (nats)",
}


def write_plots(rows: Rows, controls: dict[str, dict[str, Any]], stem: Path) -> list[Path]:
    """Writes STEM-likelihood.png and STEM-quality.png: a column for every tokenizer and size."""
    settings = list(dict.fromkeys((row["tokenizer"], row["size"]) for row in rows))
    groups = {setting: [row for row in rows if (row["tokenizer"], row["size"]) == setting] for setting in settings}
    files = [stem.with_name(f"{stem.name}-{what}.png") for what in ("likelihood", "quality")]
    style: Any = {**STYLE, "lines.markersize": 4}
    with rc_context(style):
        figure, axes = _grid(1, len(settings))
        for panel, (setting, group) in zip(axes[0], groups.items(), strict=True):
            panel.set_title(", ".join(setting))
            _likelihood(panel, group)
        figure.savefig(files[0], dpi=150)
        figure, axes = _grid(len(QUALITY), len(settings))
        for column, (setting, group) in enumerate(groups.items()):
            axes[0][column].set_title(", ".join(setting))
            for line, (figure_name, label) in enumerate(QUALITY.items()):
                _quality(axes[line][column], group, figure_name, controls[setting[0]][HELDOUT][figure_name])
                axes[line][column].set_ylabel(label)
        figure.savefig(files[1], dpi=150)
    return files


def _grid(lines: int, columns: int) -> tuple[Figure, list[list[Any]]]:
    figure = Figure(figsize=(4.2 * columns, 3.1 * lines), layout="constrained")
    return figure, [
        [figure.add_subplot(lines, columns, i * columns + j + 1) for j in range(columns)] for i in range(lines)
    ]


def _by_family(group: Rows, draw: Callable[[dict[str, Any], str, str | None], None]) -> None:
    seen: set[str] = set()
    for row in group:
        draw(row, COLOURS[ORDER[row["family"]]], None if row["family"] in seen else row["family"])
        seen.add(row["family"])


def _likelihood(panel: Any, group: Rows) -> None:
    def draw(row: dict[str, Any], colour: str, label: str | None) -> None:
        tokens, bits = zip(*row["curve"], strict=True) if row["curve"] else ((), ())
        panel.plot([t / 1e6 for t in tokens], bits, color=colour, alpha=0.6)
        bound = row["bound"]
        place, error = row["tokens"] / 1e6, 2 * bound["stderr"]
        panel.errorbar(
            [place], [bound["bits_per_char"]], yerr=[error], color=colour, marker="o", capsize=3, label=label
        )

    _by_family(group, draw)
    panel.set_xlabel("tokens seen (millions)")
    panel.set_ylabel("NLL or NELBO (bits per character)")
    panel.legend()


def _quality(panel: Any, group: Rows, name: str, real: float) -> None:
    def draw(row: dict[str, Any], colour: str, label: str | None) -> None:
        calls = [quality["calls"] for quality in row["quality"]]
        panel.plot(calls, [quality[name] for quality in row["quality"]], color=colour, marker="o", label=label)

    _by_family(group, draw)
    panel.axhline(real, color=INK, linestyle=(0, (4, 3)), linewidth=1.1, label="held-out text")
    # One Euler step of a flow writes one and the same text; it would flatten all the rest.
    shown = [quality[name] for row in group for quality in row["quality"] if quality["token_entropy"] > 1]
    if shown:
        low, high = min([*shown, real]), max([*shown, real])
        panel.set_ylim(low - 0.08 * (high - low), high + 0.08 * (high - low))
    panel.set_xscale("log", base=2)
    calls = sorted({quality["calls"] for row in group for quality in row["quality"]})
    panel.set_xticks(calls, [str(n) for n in calls])
    panel.minorticks_off()
    panel.set_xlabel("network calls per sample")
    panel.legend(fontsize=8)
