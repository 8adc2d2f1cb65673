"""The planner against what it plans: built networks, counted FLOPs, saved tensors, optimisers' own state.

FLOPs are of matrix products alone: elementwise work is listed apart by the planner.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from catmaps.cli import main
from catmaps.commands.info import count_parameters
from catmaps.commands.plan import quantity
from catmaps.config import Config, DataConfig, OptimiserConfig, TrainingConfig
from catmaps.errors import UserError
from catmaps.flow.flow_map import FlowMap
from catmaps.flow.objective import ObjectiveConfig, batch_loss
from catmaps.flow.objective import plan as draw
from catmaps.flow.times import uniform
from catmaps.model import build_network, read_config
from catmaps.models import located
from catmaps.network.denoiser import FlowNetwork, NetworkConfig, uniform_log_prior
from catmaps.presets import DISTILLATIONS, PRESETS
from catmaps.training.flops import gram, muon_step, per_token, roles
from catmaps.training.memory import memory, optimiser_bytes, trunk_bytes
from catmaps.training.optim import build_optimisers
from catmaps.training.planner import HARDWARE, Cluster, Plan, advice, plan
from catmaps.training.shapes import (
    Shape,
    block_matrices,
    exported_bytes,
    low_precision_copies,
    parameter_tensors,
    parameters,
)

pytest.importorskip("olmo_core")

BATCH = 8
# Neighbours, where nothing is differentiated: elementwise work, done as a convolution.
ELEMENTWISE = {torch.ops.aten.convolution: lambda *args, **options: 0}
SIZES = [
    (NetworkConfig(width=32, blocks=2, heads=2, conditioning=8), 61, 24),
    (NetworkConfig(width=64, blocks=3, heads=4, conditioning=16, neighbours=2), 27, 64),
    (NetworkConfig(width=48, blocks=1, heads=2, conditioning=8, mlp_ratio=2), 300, 48),
]
IDS = [f"d{network.width}-v{v}-l{length}" for network, v, length in SIZES]
MIXTURES = {
    "base": (ObjectiveConfig(), False),
    "soft": (ObjectiveConfig(), True),
    "psd": (ObjectiveConfig(off_diagonal=1.0, anchor=0.0), True),
    "anchor": (ObjectiveConfig(off_diagonal=1.0, anchor=1.0), True),
    "lsd": (ObjectiveConfig(loss="lsd", off_diagonal=1.0, anchor=0.0), True),
    "lsd_kl": (ObjectiveConfig(loss="lsd_kl", off_diagonal=1.0, anchor=0.0), True),
    "ecld": (ObjectiveConfig(loss="ecld", off_diagonal=1.0, anchor=0.0), True),
    "esd": (ObjectiveConfig(loss="esd", off_diagonal=1.0, anchor=0.0), True),
    "joint": (ObjectiveConfig(off_diagonal=0.5, anchor=0.5), False),
    "distill": (ObjectiveConfig(off_diagonal=0.5, anchor=0.5), True),
}


def config(network: NetworkConfig, length: int, objective: ObjectiveConfig | None = None, **training: Any) -> Config:
    return Config(
        network=network,
        data=DataConfig(length=length),
        objective=objective or ObjectiveConfig(),
        training=TrainingConfig(**{"batch": 8, "micro_batch": 4, **training}),
    )


def counted(
    network: NetworkConfig, v: int, length: int, objective: ObjectiveConfig, teacher: bool, tiles: int
) -> float:
    """FLOPs per token of a step, forward and backward, as torch counts them."""
    nets = [build_network(network, uniform_log_prior(v)) for _ in range(2)]
    for net in nets:
        net.precision, net.tile = torch.bfloat16, BATCH * length * v // tiles
    own, frozen = FlowMap(nets[0]), FlowMap(nets[1].requires_grad_(False))
    drawn = draw(objective, uniform(), BATCH, length, torch.Generator().manual_seed(0))
    tokens = torch.randint(v, (BATCH, length), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False, custom_mapping=ELEMENTWISE) as counter:
        noise = own.noise((0, 0), torch.arange(BATCH), length)
        guide = frozen if teacher else None
        batch_loss(own, guide, objective, tokens, noise, drawn, float(BATCH * length)).total.backward()
    return counter.get_total_flops() / (BATCH * length)


def planned(
    network: NetworkConfig, v: int, length: int, objective: ObjectiveConfig, teacher: bool, tiles: int
) -> float:
    shape = Shape.of(config(network, length, objective), v, fused=False)
    mixture = roles(shape, objective, teacher=teacher, tiled=tiles > 1)
    return per_token(mixture).total + gram(shape) * len(mixture) / (BATCH * length)


@pytest.mark.parametrize("name", [*PRESETS])
@pytest.mark.parametrize("v", [27, 50_304])
def test_parameters_are_those_of_the_network(name: str, v: int) -> None:
    network = PRESETS[name]().network
    mine = parameters(Shape.of(PRESETS[name](), v))
    assert (mine.body, mine.embedding + mine.head) == count_parameters(network, v)


@pytest.mark.parametrize(("network", "v", "length"), SIZES, ids=IDS)
@pytest.mark.parametrize("mixture", MIXTURES)
def test_flops_are_those_that_torch_counts(network: NetworkConfig, v: int, length: int, mixture: str) -> None:
    objective, teacher = MIXTURES[mixture]
    ours = planned(network, v, length, objective, teacher, 1)
    assert ours == pytest.approx(counted(network, v, length, objective, teacher, 1), rel=0.001)


@pytest.mark.parametrize("mixture", [name for name in MIXTURES if name not in ("joint", "distill")])
def test_flops_in_tiles(mixture: str) -> None:
    objective, teacher = MIXTURES[mixture]
    network, _, length = SIZES[0]  # of a vocabulary at which tables weigh as much as blocks
    ours = planned(network, 600, length, objective, teacher, 4)
    assert ours == pytest.approx(counted(network, 600, length, objective, teacher, 4), rel=0.01)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("mixture", ["base", "psd", "lsd", "esd"])
def test_flops_of_the_linear_input(mixture: str, skip: bool) -> None:
    objective, teacher = MIXTURES[mixture]
    network, v, length = SIZES[0]
    network = replace(network, input="linear", skip=skip)  # v > d: without a skip noise is drawn in d dimensions
    ours = planned(network, v, length, objective, teacher, 1)
    assert ours == pytest.approx(counted(network, v, length, objective, teacher, 1), rel=0.03)


def test_flops_of_attention_in_fused_kernels() -> None:
    objective, shape = ObjectiveConfig(), Shape.of(config(SIZES[0][0], 24), 61)
    fused, dense = (
        per_token(roles(replace(shape, fused=f), objective, teacher=False, tiled=False)) for f in (True, False)
    )
    assert fused.attention == pytest.approx(dense.attention * 3.5 / 3)  # scores are multiplied again
    assert replace(fused, attention=0.0) == replace(dense, attention=0.0)


def test_flops_of_muon() -> None:
    net = build_network(SIZES[0][0], uniform_log_prior(61))
    muon = build_optimisers(net, OptimiserConfig(name="muon"))[1]
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    with FlopCounterMode(display=False, custom_mapping=ELEMENTWISE) as counter:
        muon.step()
    assert counter.get_total_flops() == muon_step(Shape.of(config(SIZES[0][0], 24), 61))


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize(("network", "v", "length"), SIZES, ids=IDS)
def test_state_is_exact(name: Any, network: NetworkConfig, v: int, length: int) -> None:
    net, options = build_network(network, uniform_log_prior(v)), OptimiserConfig(name=name)
    optimisers = build_optimisers(net, options)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    for optimiser in optimisers:
        optimiser.step()
    shape = Shape.of(config(network, length), v)
    held = [t for o in optimisers for state in o.state.values() for t in state.values() if isinstance(t, Tensor)]
    assert optimiser_bytes(shape, options) == sum(t.nbytes for t in held)
    weights = sum(p.nbytes for p in net.parameters())
    made = memory(
        shape,
        roles(shape, ObjectiveConfig(), teacher=True, tiled=False),
        options,
        teacher=True,
        shard=1,
        replicas=2,
        precision=2,
        compiled=False,
        tokens=length,
        tile=None,
    )
    assert made.weights == made.gradients == made.average == made.teacher == made.reduction == weights
    assert parameter_tensors(shape) == len(list(net.parameters()))
    assert exported_bytes(shape) == sum(t.nbytes for t in net.state_dict().values())
    parts = ("qkv.weight", "attention_out.weight", "up.weight", "down.weight")
    matrices = [p for name, p in net.trunk.blocks.named_parameters() if name.endswith(parts)]
    assert block_matrices(shape) == sum(m.numel() for m in matrices)


def saved(network: FlowNetwork, length: int, precision: torch.dtype, tangent: bool) -> int:
    """Bytes of the storages that the trunk's forward pass saves for its backward pass, weights and tables apart."""
    trunk, config, lean = network.trunk, network.config, precision == torch.bfloat16
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    x = torch.randn(4, length, config.width, dtype=precision, requires_grad=True)
    condition = torch.randn(4, 2, config.conditioning, dtype=precision, requires_grad=True)
    index = (torch.arange(length) < 3).long().expand(4, -1)
    kept: dict[int, Tensor] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t  # held: a storage that is freed could lend its address to another
        return t

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)
    with torch.autocast("cpu", torch.bfloat16, enabled=lean), hooks:
        if tangent:
            out = trunk.forward_with_tangent((x, x * 2), (condition, condition * 2), index)[0]
        else:
            out = trunk(x, condition, index)
    kept.setdefault(out.untyped_storage().data_ptr(), out)
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in own)


def trunk_of(network: NetworkConfig, v: int) -> FlowNetwork:
    torch.manual_seed(0)
    return build_network(network, uniform_log_prior(v))


@pytest.mark.parametrize("tangent", [False, True])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("network", "v", "length"), SIZES, ids=IDS)
def test_activations_are_those_that_autograd_saves(
    network: NetworkConfig, v: int, length: int, precision: torch.dtype, tangent: bool
) -> None:
    shape = Shape.of(config(network, length), v, fused=False)
    size = precision.itemsize
    copies = 2 * low_precision_copies(shape) if size == 2 else 0
    copies -= size * 2 * v * network.width if size == 2 else 0  # the tables are outside the trunk
    ours = 4 * length * trunk_bytes(shape, size, compiled=False, tangent=tangent) + copies
    assert ours == pytest.approx(saved(trunk_of(network, v), length, precision, tangent), rel=0.15)


def test_activations_of_long_texts() -> None:
    """Beyond 512 positions attention is one fused kernel, as on accelerators."""
    network, v, length = SIZES[1][0], 27, 640
    ours = 4 * length * trunk_bytes(Shape.of(config(network, length), v), 4, compiled=False)
    assert ours == pytest.approx(saved(trunk_of(network, v), length, torch.float32, False), rel=0.05)


def test_checkpointing_keeps_inputs_and_one_block() -> None:
    shape = Shape.of(PRESETS["1.7b"](), 50_304)
    whole, less = (trunk_bytes(shape, 2, compiled=True, checkpointing=c) for c in (False, True))
    assert less < whole / 10
    mixed = roles(shape, ObjectiveConfig(), teacher=False, tiled=True, checkpointing=True)
    assert per_token(mixed, "recomputed").linears == pytest.approx(per_token(mixed, "gradient").linears / 3)


def made(**changes: Any) -> Plan:
    cluster = {"gpus": 256, "hardware": HARDWARE["h100"], **changes}
    return plan(PRESETS["1.7b"](), 50_304, Cluster(**cluster), 2.1e12)


def test_time_is_flops_over_what_the_devices_reach() -> None:
    one = made()
    assert one.seconds == pytest.approx(one.flops_per_token * 2.1e12 / (256 * 989e12 * 0.4))
    assert one.flops_per_token == pytest.approx(6 * one.parameters.total, rel=0.1)  # the rule of thumb
    assert made(mfu=0.2).seconds == pytest.approx(2 * one.seconds)
    assert one.device_hours == pytest.approx(made(gpus=128).device_hours)
    assert one.steps == math.ceil(2.1e12 / (4096 * 1024))


def test_sharding_divides_the_state() -> None:
    whole, shared, both = made(shard=1), made(), made(shard=8)
    assert whole.memory.weights == 256 * shared.memory.weights == 8 * both.memory.weights
    assert whole.traffic.gather == whole.traffic.scatter == shared.traffic.reduce == 0
    assert whole.traffic.reduce == pytest.approx(2 * 255 / 256 * 4 * whole.parameters.total)
    assert both.traffic.reduce == pytest.approx(2 * 31 / 32 * 4 * whole.parameters.total / 8)
    # two micro-batches; blocks twice in bf16, the rest once in fp32
    assert shared.traffic.gather == pytest.approx(255 / 256 * 2 * 4 * whole.parameters.total)
    assert whole.checkpoint == pytest.approx(shared.checkpoint)


def test_a_plan_that_does_not_fit_says_what_helps() -> None:
    base = PRESETS["1.7b"]()
    large = replace(base, training=replace(base.training, micro_batch=64))
    found = plan(large, 50_304, Cluster(gpus=64), 2.1e12)
    assert not found.fits
    mends = advice(found, 50_304)
    assert "activation checkpointing" in mends
    assert "micro-batches of 16" in mends
    assert plan(large, 50_304, Cluster(gpus=64, checkpointing=True), 2.1e12).fits
    alone = plan(large, 50_304, Cluster(hardware=HARDWARE["cpu"]), 1e9)
    assert "still takes" in advice(alone, 50_304)[0]


def test_a_distillation_holds_a_teacher_and_costs_more() -> None:
    base = PRESETS["1.7b"]()
    second = replace(DISTILLATIONS["distill"](base), base="run")
    found = plan(second, 50_304, Cluster(gpus=256))
    assert found.memory.teacher == found.memory.weights
    assert 1.4 < found.flops_per_token / made().flops_per_token < 1.8
    assert [role.role for role in found.mixture] == ["diagonal", "psd", "anchor"]
    assert sum(role.share for role in found.mixture) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpus": 7}, "not a multiple of the 7 devices"),
        ({"gpus": 0}, "at least 1"),
        ({"shard": 3}, "does not divide"),
        ({"mfu": 0.0}, "--mfu must lie"),
    ],
)
def test_clusters_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        made(**changes)


@pytest.mark.parametrize(
    ("text", "value"), [("2.1T", 2.1e12), ("300B", 3e11), ("5m", 5e6), ("1e3", 1000), ("64k", 64e3)]
)
def test_quantities(text: str, value: float) -> None:
    assert quantity(text, "--tokens") == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "many", "-3B", "0", "3X", "T"])
def test_quantities_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match=r"such as 2\.1T"):
        quantity(text, "--tokens")


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "1.7b", "--gpus", "256", "--tokens", "2.1T", "--distill", "--objective.loss", "lsd"]
    assert main([*words, "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["tokens"] == 2.1e12
    assert found["vocabulary"] == 50_304
    assert set(found["flops_per_token"]["roles"]) == {"diagonal", "lsd", "anchor"}
    assert found["files"]["data"] == 4.2e12
    assert found["verdict"] in " ".join(said.err.split())
    assert main(["plan", "small", "--gpu", "cpu", "--data.tokenizer", "bytes"]) == 0
    assert "fits" in capsys.readouterr().out


def test_the_distillation_of_a_model_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert read_config(located(Path("letters-base"))).start is not None  # trained on from another base
    assert main(["plan", "letters-base", "--distill", "--gpu", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["vocabulary"] == 27
    assert "anchor" in found["flops_per_token"]["roles"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan"], "which preset or run?"),
        (["plan", "huge"], "no preset or run huge"),
        (["plan", "small", "--gpu", "tpu"], "no device tpu is known"),
        (["plan", "small", "--gpus", "7"], "try 63 or 70"),
        (["plan", "small", "--tokens", "lots"], "--tokens 'lots'"),
        (["plan", "small", "--vocabulary", "1"], "--vocabulary must be at least 2"),
        (["plan", "small", "--family", "masked"], "plan knows flows"),
    ],
)
def test_mistakes(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err
