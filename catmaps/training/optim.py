"""Optimisers, their parameter groups, and the learning rate over the run."""

import torch
from torch import Tensor
from torch.optim import Optimizer

from catmaps.config import OptimiserConfig
from catmaps.network.tokens import Network
from catmaps.network.trunk import Block


def build_optimisers(network: Network, config: OptimiserConfig) -> list[Optimizer]:
    """One or two optimisers that hold every parameter that learns exactly once.

    Muon takes the matrices of the blocks' projections; AdamW everything else. Weights that are not matrices, and the
    small functions of time, are not decayed.
    """
    muon = _block_matrices(network) if config.name == "muon" else []
    taken = {id(p) for p in muon}
    learning = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    named = [(name, p) for name, p in learning if id(p) not in taken]
    plain = {id(p) for name, p in named if p.ndim < 2 or name.startswith("gain_") or ".near_" in name}
    groups = [
        {"params": [p for _, p in named if id(p) not in plain], "weight_decay": config.weight_decay},
        {"params": [p for _, p in named if id(p) in plain], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    optimisers: list[Optimizer] = [torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=True)]
    if muon:
        optimisers.append(torch.optim.Muon(muon, lr=config.muon_lr, weight_decay=config.weight_decay))
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["initial_lr"] = group["lr"]
    held = [id(p) for o in optimisers for g in o.param_groups for p in g["params"]]
    assert len(held) == len(set(held)) == len(learning)
    return optimisers


def _block_matrices(network: Network) -> list[Tensor]:
    blocks = [block for block in network.trunk.blocks if isinstance(block, Block)]
    return [layer.weight for b in blocks for layer in (b.qkv, b.attention_out, b.up, b.down)]


def rate(step: int, steps: int, config: OptimiserConfig) -> float:
    """The learning rate's factor at `step` of `steps` (counted from 1): warm-up, stable, linear decay to zero."""
    warm = min(1.0, step / config.warmup) if config.warmup else 1.0
    left = (steps - step + 1) / max(1.0, config.decay * steps)
    return warm * min(1.0, left)


def set_rate(optimisers: list[Optimizer], factor: float) -> None:
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = group["initial_lr"] * factor
