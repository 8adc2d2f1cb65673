"""The pictures of concepts.md, from a run: python docs/figures.py runs/base (a map does as well)."""

import contextlib
import io
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from catmaps.commands.score import Score
from catmaps.flow.times import Law, decoding_error, logit_normal, uniform, warp
from catmaps.generation import default_sampling, generate
from catmaps.model import Run, load_run

IMAGES = Path(__file__).parent / "images"
STEPS = (1, 2, 4, 8, 16, 32, 64)
WINDOWS = 64
DRAFTS = 16  # steps of the trajectory
QUIET = "#8a93a6"


def figure(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams |= {"svg.hashsalt": "catmaps", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")


def save(drawn: Any, name: str) -> None:
    drawn.savefig(IMAGES / name, metadata={"Date": None} if name.endswith(".svg") else {"Software": None}, dpi=110)
    print(IMAGES / name)


def laws(run: Run) -> None:
    """Densities of the laws of time, and of the run's own after training."""
    vocabulary = run.tokenizer.vocab_size
    named: dict[str, tuple[Law, str]] = {
        "uniform": (uniform(), QUIET),
        "logit_normal": (logit_normal(), "#c58b2a"),
        "decoding_error": (decoding_error(vocabulary), "#5a9e6f"),
        "warp, the start": (warp(vocabulary), "#3b6fd4"),
        "this run's, when trained": (run.law, "#c2334d"),
    }
    t = torch.linspace(0.002, 0.998, 499, dtype=torch.float64)
    drawn, axes = figure(6, 2.8)
    for name, (law, colour) in named.items():
        axes.plot(t, law.density(t), label=name, color=colour, lw=1.6)
    axes.set(xlabel="t: 0 noise, 1 data", ylabel="density", xlim=(0, 1), ylim=(0, None))
    axes.legend(frameon=False)
    save(drawn, "law-of-time.svg")


def trajectory(run: Run) -> None:
    """How sure the endpoint is of each position after each step, and the likeliest text then."""
    rows: list[tuple[float, torch.Tensor, str]] = []

    def watch(t: float, endpoint: torch.Tensor) -> None:
        likeliest = run.tokenizer.decode(endpoint[0].argmax(-1).cpu().numpy())
        rows.append((t, endpoint[0].amax(-1).float().cpu(), likeliest))

    config = replace(default_sampling(run, DRAFTS), sampler="euler", seed=3)
    for _ in generate(run, 1, config, length=64, watch=watch):
        pass
    drawn, axes = figure(9, 4)
    sure = torch.stack([row for _, row, _ in rows])
    image = axes.imshow(sure, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for at, (_, _, text) in enumerate(rows):
        for place, letter in enumerate(text):
            colour = "white" if sure[at, place] > 0.6 else "#445"
            axes.text(place, at, letter, ha="center", va="center", family="monospace", fontsize=8, color=colour)
    axes.set_yticks(range(len(rows)), [f"{t:.2f}" for t, _, _ in rows])
    axes.set(xlabel="position", ylabel="t after the step")
    drawn.colorbar(image, label="probability of the likeliest symbol", pad=0.01)
    save(drawn, "trajectory.png")


def bounds(folder: Path) -> None:
    """The bound of few ancestral steps against their number, beside the NELBO."""

    def score(**options: Any) -> tuple[float, float]:
        with contextlib.redirect_stdout(io.StringIO()):
            said = Score(folder, split="test", windows=WINDOWS, **options).run()
        rate = next(value for name, value in said.items() if name.endswith("_bits_per_char") and "stderr" not in name)
        return rate, said["stderr_bits_per_char_windows"]

    rates = [score(bound="finite-step", steps=steps, samples=2) for steps in STEPS]
    limit, _ = score(samples=8)
    drawn, axes = figure(6, 2.8)
    axes.errorbar(STEPS, [rate for rate, _ in rates], [2 * error for _, error in rates], fmt="o-", color="#3b6fd4")
    axes.axhline(limit, color="#c2334d", lw=1.4)
    axes.text(STEPS[0], limit - 0.04, f"NELBO, {limit:.2f}", color="#c2334d", va="top")
    axes.set(xscale="log", xlabel="ancestral steps", ylabel="bound, bits per character")
    axes.set_xticks(STEPS, [str(steps) for steps in STEPS])
    axes.set_ylim(math.floor(limit * 4 - 1) / 4, None)
    save(drawn, "bound-steps.svg")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    run = load_run(folder)
    IMAGES.mkdir(exist_ok=True)
    laws(run)
    trajectory(run)
    bounds(folder)
