"""Optimisers: who holds which parameter, the learning rate over the run, the gradient's norm, the moving average."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import pytest
import torch
from tiny_runs import began, rows, tiny, trained, weights
from torch import Tensor, nn
from torch.optim import AdamW

from catmaps.config import OptimiserConfig
from catmaps.model import build_network
from catmaps.network.denoiser import FlowNetwork, NetworkConfig, uniform_log_prior
from catmaps.training.optim import Muon, build_optimisers, rate, set_rate, step_together

pytest.importorskip("olmo_core")


def network() -> FlowNetwork:
    config = NetworkConfig(width=16, blocks=2, heads=2, conditioning=8, mlp_ratio=2)
    return build_network(config, uniform_log_prior(11))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_is_held_exactly_once(name: Literal["adamw", "muon"]) -> None:
    net = network()
    optimisers = build_optimisers(net, OptimiserConfig(name=name))
    held = [id(p) for o in optimisers for group in o.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in net.parameters())
    assert [type(o) for o in optimisers] == ([AdamW, Muon] if name == "muon" else [AdamW])


def test_muon_takes_the_matrices_of_the_blocks() -> None:
    net = network()
    names = {id(p): name for name, p in net.named_parameters()}
    muon = build_optimisers(net, OptimiserConfig(name="muon"))[1]
    taken = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    parts = ("qkv", "attention_out", "up", "down")
    assert taken == {f"trunk.blocks.{block}.{part}.weight" for block in (0, 1) for part in parts}


def test_matrices_that_step_together_step_as_torch_has_them_step() -> None:
    shapes, generator = [(8, 8), (24, 8), (8, 8), (8, 32), (24, 8)], torch.Generator().manual_seed(0)
    alone = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    together = [nn.Parameter(p.detach().clone()) for p in alone]
    theirs, ours = (torch.optim.Muon(ps, lr=0.02, weight_decay=0.1) for ps in (alone, together))
    for _ in range(3):
        for a, b in zip(alone, together, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        theirs.step()
        with torch.no_grad():
            step_together(together, ours.state, ours.param_groups[0])
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.02 * 2**-7)
        torch.testing.assert_close(theirs.state[a], ours.state[b])


def test_on_cpus_muon_is_torchs_own() -> None:
    nets = [network() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    matrices = [[p for p in net.trunk.blocks.parameters() if p.ndim == 2 and min(p.shape) > 8] for net in nets]
    for ours, theirs in zip(*matrices, strict=True):
        ours.grad = torch.ones_like(ours)
        theirs.grad = torch.ones_like(theirs)
    Muon(matrices[0], lr=0.1).step()
    torch.optim.Muon(matrices[1], lr=0.1).step()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*matrices, strict=True))


def test_only_matrices_outside_the_gains_are_decayed() -> None:
    net = network()
    names = {id(p): name for name, p in net.named_parameters()}
    (adamw,) = build_optimisers(net, OptimiserConfig(name="adamw", weight_decay=0.3))
    decay = {names[id(p)]: group["weight_decay"] for group in adamw.param_groups for p in group["params"]}
    expected = {
        name: 0.3 if p.ndim == 2 and not name.startswith("gain_") else 0.0 for name, p in net.named_parameters()
    }
    assert decay == expected
    assert decay["head.weight"] == 0.3
    assert decay["gain_in.inner.weight"] == 0.0


def test_the_rate_rises_stays_and_falls() -> None:
    config = OptimiserConfig(warmup=5, decay=0.4)
    rates = [rate(step, 20, config) for step in range(1, 21)]
    rise, stay = [0.2, 0.4, 0.6, 0.8, 1.0], [1.0] * 8
    fall = [k / 8 for k in range(8, 0, -1)]  # eight steps; the last still learns
    assert rates == pytest.approx(rise + stay[:7] + fall)


def test_the_rate_without_warm_up_and_decay_is_one() -> None:
    config = OptimiserConfig(warmup=0, decay=0.0)
    assert [rate(step, 7, config) for step in range(1, 8)] == [1.0] * 7


def test_the_rate_multiplies_what_each_optimiser_started_with() -> None:
    optimisers = build_optimisers(network(), OptimiserConfig(name="muon", lr=0.5, muon_lr=0.25))
    for factor in (0.1, 1.0, 0.5):  # not cumulative
        set_rate(optimisers, factor)
        assert [{group["lr"] for group in o.param_groups} for o in optimisers] == [{0.5 * factor}, {0.25 * factor}]


def test_training_uses_the_rate(tmp_path: Path, shards: Path) -> None:
    config = tiny(shards, steps=6)
    folder = trained(config, tmp_path / "run")
    expected = [rate(step, 6, config.optimiser) for step in range(1, 7)]
    assert [row["rate"] for row in rows(folder)] == pytest.approx(expected)


def watch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[list[Tensor]], list[float]]:
    """Trains; the weights after every step, and the norm of the gradient that each step was made with."""
    from catmaps.training.module import FlowTrainModule
    from catmaps.training.train import train

    path: list[list[Tensor]] = []
    norms: list[float] = []
    step = FlowTrainModule.optim_step
    clip = nn.utils.clip_grad_norm_

    def clipped(parameters: Any, limit: float) -> Tensor:
        parameters = list(parameters)
        found = clip(parameters, limit)
        norms.append(torch.cat([p.grad.flatten() for p in parameters]).norm().item())
        return found

    def recorded(module: FlowTrainModule) -> None:
        if not path:
            path.append([p.detach().clone() for p in module.network.parameters()])
        step(module)
        path.append([p.detach().clone() for p in module.network.parameters()])

    monkeypatch.setattr(FlowTrainModule, "optim_step", recorded)
    with patch("torch.nn.utils.clip_grad_norm_", clipped):
        train(folder)
    return path, norms


def test_the_average_follows_its_recursion(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(shards, steps=8)
    folder = began(replace(config, optimiser=replace(config.optimiser, ema=0.4)), tmp_path / "run")
    path, _ = watch(folder, monkeypatch)
    average = [p.double() for p in path[0]]
    for step, after in enumerate(path[1:], start=1):
        keep = min(0.4, step / (step + 9))  # 1/10, 2/11, ...: the start is soon forgotten
        average = [keep * mean + (1 - keep) * p.double() for mean, p in zip(average, after, strict=True)]
    names = [name for name, _ in build_network(config.network, uniform_log_prior(27)).named_parameters()]
    stored = weights(folder)
    for name, expected in zip(names, average, strict=True):
        torch.testing.assert_close(stored[name].double(), expected, rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(stored[name], after) for name, after in zip(names, path[-1], strict=True))


def test_the_gradient_is_clipped_and_its_norm_recorded(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(shards, steps=3)
    folder = began(replace(config, optimiser=replace(config.optimiser, clip=0.01)), tmp_path / "run")
    _, norms = watch(folder, monkeypatch)
    assert norms == pytest.approx([0.01] * 3, rel=1e-3)
    assert all(row["gradient_norm"] > 0.05 for row in rows(folder))
