"""Optimisers, their parameter groups, and the learning rate over the run."""

# torch's optimisers are made of its _foreach functions, which it does not export.
# pyright: reportPrivateImportUsage=false

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributed.tensor import DTensor
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
        optimisers.append(Muon(muon, lr=config.muon_lr, weight_decay=config.weight_decay))
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["initial_lr"] = group["lr"]
    held = [id(p) for o in optimisers for g in o.param_groups for p in g["params"]]
    assert len(held) == len(set(held)) == len(learning)
    return optimisers


class Muon(torch.optim.Muon):
    """torch's. On an accelerator matrices of one shape step together: one by one they are some 25 small kernels each,
    which take longer to launch than to run. On CPUs, and where a matrix is shared among processes, it is torch's own.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """As torch's."""
        learning = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if closure is not None or any(isinstance(p, DTensor) or p.device.type == "cpu" for p in learning):
            return super().step(closure)
        for group in self.param_groups:
            step_together([p for p in group["params"] if p.grad is not None], self.state, group)
        return None


def step_together(matrices: Sequence[Tensor], state: dict[Tensor, Any], group: dict[str, Any]) -> None:
    """A step of Muon on matrices of any shapes, equal ones stacked; `state` and `group` as torch's Muon has them.

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; torch.optim.Muon.
    """
    by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
    for matrix in matrices:
        by_shape[matrix.shape].append(matrix)
        if "momentum_buffer" not in state[matrix]:
            state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
    for (rows, columns), same in by_shape.items():
        gradients = [m.grad for m in same if m.grad is not None]
        momenta = [state[m]["momentum_buffer"] for m in same]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, momenta, group["momentum"]) if group["nesterov"] else momenta
        stack = torch.stack(list(ahead)).bfloat16()
        update = _orthogonal(stack.mT, group).mT if rows > columns else _orthogonal(stack, group)
        torch._foreach_mul_(same, 1 - group["lr"] * group["weight_decay"])
        scale = group["lr"] * math.sqrt(max(1, rows / columns))
        torch._foreach_add_(same, list(update.float().unbind()), alpha=-scale)


def _orthogonal(stack: Float[Tensor, "n i j"], group: dict[str, Any]) -> Float[Tensor, "n i j"]:
    """Newton-Schulz iteration of every matrix of a stack, i <= j, in bf16."""
    a, b, c = group["ns_coefficients"]
    x = stack / stack.norm(dim=(1, 2), keepdim=True).clamp_min(group["eps"])
    for _ in range(group["ns_steps"]):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


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
