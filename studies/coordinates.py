"""Do activations move equally far in a step at every width? The coordinate check of width transfer.

Networks of several widths take a few steps on the same texts at the same rates: once with Muon on the blocks' matrices,
the default, whose update has the spectral norm sqrt(max(1, rows / columns)), its transfer multiplier; and once with
AdamW on everything, which has none. Figures: the root mean square of the change since the start of the embedded
text, of every second block's output and of the logits, at fixed texts and noise; and the slope of its logarithm over
that of the width, where 0 means that a rate found at one width does the same at another.

Source: Yang et al. 2022, arXiv:2203.03466 (coordinate check).
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import RESULTS, in_parallel, record
from jaxtyping import Float, Int
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor

from catmaps.config import Config, OptimiserConfig
from catmaps.evaluation.plots import COLOURS, STYLE
from catmaps.flow.flow_map import FlowMap
from catmaps.flow.interpolant import AnyState, interpolate
from catmaps.flow.losses import endpoint_cross_entropy
from catmaps.flow.times import stratified, warp
from catmaps.model import build_network
from catmaps.network.denoiser import FlowNetwork, NetworkConfig, smoothed_log_prior
from catmaps.text.shards import sequences
from catmaps.training.optim import build_optimisers, set_rate
from catmaps.training.train import find_shards

BLOCKS, BATCH, LENGTH, VOCABULARY, WARMUP = 4, 16, 64, 27, 4
LR = 3e-3


class Job(NamedTuple):
    optimiser: str
    width: int
    steps: int
    seed: int


def texts() -> Int[Tensor, "n l"]:
    return torch.from_numpy(sequences(find_shards(Config()), "train", LENGTH))


def coordinates(network: FlowNetwork, state: AnyState, t: Float[Tensor, "b 1"]) -> dict[str, Float[Tensor, "b l n"]]:
    """What is watched: the embedded text, blocks' outputs, logits."""
    seen: dict[str, Tensor] = {}
    blocks = {"embedding": None, **{f"block {i + 1}": block for i, block in enumerate(network.trunk.blocks) if i % 2}}
    hooks = [
        block.register_forward_hook(lambda _, __, out, name=name: seen.__setitem__(name, out.detach()))
        for name, block in blocks.items()
        if block is not None
    ]
    hooks.append(
        network.trunk.register_forward_pre_hook(lambda _, given: seen.__setitem__("embedding", given[0].detach()))
    )
    with torch.no_grad():
        seen["logits"] = FlowMap(network).logits(state, t, t)
    for hook in hooks:
        hook.remove()
    return seen


def changes(job: Job) -> dict[str, list[float]]:
    """Root mean square of every coordinate's change since the start, after each step."""
    torch.manual_seed(job.seed)
    data, draw = texts(), torch.Generator().manual_seed(job.seed)
    prior = smoothed_log_prior(torch.bincount(data[:: max(1, len(data) // 4096)].flatten(), minlength=VOCABULARY))
    network = build_network(NetworkConfig(width=job.width, blocks=BLOCKS, heads=job.width // 32), prior)
    optimisers = build_optimisers(network, OptimiserConfig(name=job.optimiser, lr=LR))  # pyright: ignore[reportArgumentType]
    law, flow_map = warp(VOCABULARY), FlowMap(network)

    def batch() -> tuple[Tensor, AnyState, Tensor]:
        tokens = data[torch.randint(len(data), (BATCH,), generator=draw)].long()
        t = law.quantile(stratified(BATCH, draw))[:, None]
        return tokens, interpolate(tokens, torch.randn(BATCH, LENGTH, VOCABULARY, generator=draw), t), t

    _, state, t = batch()
    first, moved = coordinates(network, state, t), []
    for step in range(1, job.steps + 1):
        tokens, noisy, at = batch()
        set_rate(optimisers, min(1.0, step / WARMUP))
        weight = torch.full(tokens.shape, 1 / tokens.numel())
        endpoint_cross_entropy(flow_map, noisy, at, tokens, weight).total.backward()
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        network.forget_casts()
        now = coordinates(network, state, t)
        moved.append({name: (now[name] - first[name]).square().mean().sqrt().item() for name in first})
    return {name: [row[name] for row in moved] for name in first}


def slope(widths: list[int], values: list[float]) -> float:
    """Of the logarithm over that of the width."""
    return float(np.polyfit(np.log(widths), np.log(values), 1)[0])


def plot(means: dict[str, dict[str, list[float]]], widths: list[int], steps: int) -> Path:
    """The change after all steps over the width, a panel per optimiser."""
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    style: Any = {**STYLE, "lines.markersize": 4}
    with rc_context(style):
        panels = figure.subplots(1, len(means), sharey=True)
        for panel, (optimiser, rows) in zip(panels, means.items(), strict=True):
            for colour, (name, values) in zip(COLOURS, rows.items(), strict=False):
                label = f"{name}, slope {slope(widths, values):+.2f}"
                panel.loglog(widths, values, marker="o", color=colour, label=label)
            panel.set_xticks(widths, [str(width) for width in widths])
            panel.minorticks_off()
            panel.set(title=optimiser, xlabel="width")
            panel.legend(fontsize=7)
        panels[0].set_ylabel(f"change after {steps} steps (RMS)")
        file = RESULTS / "coordinates.png"
        figure.savefig(file, dpi=150)
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128, 256, 512])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2, help="one-core processes")
    options = parser.parse_args()
    optimisers = ["muon", "adamw"]
    widths: list[int] = options.widths
    cells = [(o, width) for o in optimisers for width in widths]
    jobs = [Job(o, width, options.steps, seed) for o, width in cells for seed in options.seeds]
    found = dict(zip(jobs, in_parallel(changes, jobs, options.workers), strict=True))
    means = {
        optimiser: {
            name: [
                float(np.mean([found[Job(optimiser, width, options.steps, seed)][name][-1] for seed in options.seeds]))
                for width in widths
            ]
            for name in found[jobs[0]]
        }
        for optimiser in optimisers
    }
    slopes = {o: {name: slope(widths, values) for name, values in rows.items()} for o, rows in means.items()}
    for optimiser, rows in slopes.items():
        print(optimiser, {name: round(value, 2) for name, value in rows.items()})
    print(plot(means, widths, options.steps))
    rows = [{**job._asdict(), "changes": value} for job, value in found.items()]
    print(record("coordinates", {"widths": widths, "slopes": slopes, "means": means, "rows": rows}))


if __name__ == "__main__":
    main()
