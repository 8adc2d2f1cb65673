"""Small networks and times for the tests of the network."""

from typing import Any

import torch
from torch import Tensor

from catmaps.flow import times
from catmaps.flow.evidence import Evidence
from catmaps.flow.interpolant import State
from catmaps.network.denoiser import FlowNetwork, NetworkConfig, smoothed_log_prior

F64 = torch.float64
B, L, V = 3, 6, 7
CLOCK = times.warp(V)
Times = tuple[Tensor, Tensor]


def fresh(**changes: Any) -> FlowNetwork:
    """A small network as training starts it, fp32."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"width": 16, "blocks": 2, "heads": 2, "conditioning": 8, "neighbours": 2}
    config = NetworkConfig(**shape | changes)
    evidence = Evidence(CLOCK)
    gains = evidence.gain_in, evidence.gain_out
    return FlowNetwork(config, evidence.features, gains, smoothed_log_prior(torch.arange(1.0, V + 1)))


def trained(seed: int = 0, **changes: Any) -> FlowNetwork:
    """The same in fp64 with every parameter drawn anew, so that nothing is silent."""
    net, generator = fresh(**changes).double(), torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        fan_in = parameter.shape[-1] if parameter.ndim > 1 else 4
        parameter.data.normal_(std=fan_in**-0.5, generator=generator)
    return net


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def times_of(kind: str) -> tuple[Times, Times]:
    """((s, t), (ds, dt)); equal times always have equal tangents."""
    generator = torch.Generator().manual_seed(5)
    s, t = torch.rand(2, B, 1 if kind == "shared" else L, generator=generator, dtype=F64).sort(0).values
    ds, dt = torch.randn(2, *s.shape, generator=generator, dtype=F64)
    if kind == "prompt":  # two distinct values: noisy, and clean at s = t = 1
        clean = torch.arange(L) < torch.tensor([[2], [0], [5]])
        s, t = (torch.where(clean, 1.0, time[:, -1:]) for time in (s, t))
        ds, dt = (torch.where(clean, 0.0, rate[:, -1:]) for rate in (ds, dt))
    if kind == "late":  # beyond the clamps of the gain (0.95) and of the log-SNR (0.982)
        s, t = 0.951 + 0.048 * s, 0.951 + 0.048 * t
    return (s, t), (ds, dt)


def outputs(net: FlowNetwork, x: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(hidden, logits)."""
    hidden = net.encode(State(x), s, t)
    return hidden, net.logits(hidden, State(x), s, t)


def twins(
    net: FlowNetwork, x: Tensor, at: Times, rates: Times, dx: Tensor | None
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """((hidden, logits), their tangents) by the hand-written methods, in the layout of torch.func.jvp."""
    direction = None if dx is None else State(dx)
    hidden, dhidden = net.encode_with_tangent(State(x), *at, *rates, direction)
    logits, dlogits = net.readout_with_tangent((hidden, dhidden), State(x), (*at, *rates), direction).logits()
    return (hidden, logits), (dhidden, dlogits)


def used(name: str, mode: str = "belief", skip: bool = True) -> bool:
    """Gains belong to the belief and to the skip: without them they are idle."""
    idle = {"gain_in": mode == "linear", "gain_out": not skip}
    return not idle.get(name.partition(".")[0], False)


MODES = [("belief", True), ("belief", False), ("linear", True), ("linear", False)]
KINDS = ["shared", "prompt", "many", "late"]
