"""Does `catmaps plan` say what a step costs? FLOPs, peak memory and saved activations of small steps on a CPU.

A step is forward and backward of one micro-batch: its FLOPs as torch counts matrix products, its peak the bytes of all
storages that its operations made and that were alive together. Compiled blocks are measured by what torch's partitioner
keeps of them, which is the same for every backend. Bars: FLOPs within 3%, saved activations and peaks within 15%.
"""

import argparse
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from common import record
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from catmaps.config import Config, DataConfig, ParallelConfig, TrainingConfig
from catmaps.flow.flow_map import FlowMap
from catmaps.flow.objective import ObjectiveConfig, batch_loss
from catmaps.flow.objective import plan as draw
from catmaps.flow.times import uniform
from catmaps.model import build_network, configure
from catmaps.network.denoiser import FlowNetwork, NetworkConfig, uniform_log_prior
from catmaps.training.memory import Memory, trunk_bytes
from catmaps.training.objectives import objective_of
from catmaps.training.parallelize import device_mesh, sharded_network
from catmaps.training.planner import HARDWARE, Cluster, plan
from catmaps.training.shapes import Number, low_precision_copies

BATCH = 4
# Neighbours, where nothing is differentiated: elementwise work, done as a convolution.
ELEMENTWISE = {torch.ops.aten.convolution: lambda *args, **options: 0}
WORLDS = (2, 8)


class Size(NamedTuple):
    network: NetworkConfig
    vocabulary: int
    length: int
    tile_megabytes: int


SIZES = {
    "symbols": Size(NetworkConfig(width=128, blocks=4, heads=4), 27, 128, 128),
    "subwords": Size(NetworkConfig(width=128, blocks=4, heads=4), 4096, 128, 128),
    "subwords in tiles": Size(NetworkConfig(width=128, blocks=4, heads=4), 8192, 256, 4),
}
MIXTURES = {
    "base": (ObjectiveConfig(), False),
    "psd": (ObjectiveConfig(off_diagonal=1.0, anchor=0.0), True),
    "lsd": (ObjectiveConfig(loss="lsd", off_diagonal=1.0, anchor=0.0), True),
    "esd": (ObjectiveConfig(loss="esd", off_diagonal=1.0, anchor=0.0), True),
}


class Live(TorchDispatchMode):
    """Bytes of the storages that operations made and that still live, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for made in tree_leaves(out):
            if not isinstance(made, Tensor):
                continue
            storage = made.untyped_storage()
            key = storage._cdata
            if key in self.known or key in given:
                continue
            self.known[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, key)
        return out

    def _freed(self, key: int) -> None:
        self.now -= self.known.pop(key, 0)

    @contextmanager
    def resizes(self) -> Iterator[None]:
        """Within, it also sees storages that are emptied and filled again, as FSDP does with what it gathers."""
        plain = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            before, key = storage.nbytes(), storage._cdata
            out = plain(storage, size)
            if key not in self.known:
                weakref.finalize(storage, self._freed, key)
                before = 0
            self.known[key] = size
            self.now += size - before
            self.peak = max(self.peak, self.now)
            return out

        with patch.object(torch.UntypedStorage, "resize_", resize):
            yield


def configuration(size: Size, objective: ObjectiveConfig, distilled: bool) -> Config:
    return Config(
        base="base" if distilled else None,
        network=size.network,
        data=DataConfig(length=size.length),
        objective=objective,
        training=TrainingConfig(batch=BATCH, micro_batch=BATCH, compile=False, tile_megabytes=size.tile_megabytes),
    )


def step(size: Size, objective: ObjectiveConfig, distilled: bool) -> Callable[[], None]:
    """Forward and backward of a micro-batch, on fresh networks."""
    torch.manual_seed(0)
    nets = [build_network(size.network, uniform_log_prior(size.vocabulary)) for _ in range(2)]
    for net in nets:
        configure(net, TrainingConfig(tile_megabytes=size.tile_megabytes))
    own, teacher = FlowMap(nets[0]), FlowMap(nets[1].requires_grad_(False))
    drawn = draw(objective, uniform(), BATCH, size.length, torch.Generator().manual_seed(0))
    tokens = torch.randint(size.vocabulary, (BATCH, size.length))

    def run() -> None:
        noise = own.noise((0, 0), torch.arange(BATCH), size.length)
        guide = teacher if distilled else None
        batch_loss(own, guide, objective, tokens, noise, drawn, float(tokens.numel())).total.backward()

    return run


def one(size: Size, objective: ObjectiveConfig, distilled: bool) -> dict[str, float]:
    """FLOPs per token and peak bytes, planned and measured."""
    made = plan(configuration(size, objective, distilled), size.vocabulary, Cluster(hardware=HARDWARE["cpu"]))
    with FlopCounterMode(display=False, custom_mapping=ELEMENTWISE) as counter:
        step(size, objective, distilled)()
    live = Live()
    with live:
        step(size, objective, distilled)()
    flops = counter.get_total_flops() / (BATCH * size.length)
    peak = in_passes(made.memory)
    planned = made.flops_per_token - muon_share(made)
    return {
        "flops_per_token": flops,
        "flops_planned": planned,
        "flops_ratio": round(planned / flops, 4),
        "peak_bytes": live.peak,
        "peak_planned": peak,
        "peak_ratio": round(peak / live.peak, 3),
    }


def sharded(size: Size, objective: ObjectiveConfig, distilled: bool, world: int) -> dict[str, float]:
    """Peak bytes of a step of one process among `world` that share a copy, planned and measured.

    The others are torch's fake process group: what is gathered has no meaning, but takes its place.
    """
    config = replace(configuration(size, objective, distilled), parallel=ParallelConfig(strategy="fsdp"))
    config = replace(config, training=replace(config.training, batch=BATCH * world, micro_batch=BATCH))
    cluster = Cluster(hardware=HARDWARE["cpu"], gpus=world, shard=world)
    memory = plan(config, size.vocabulary, cluster).memory
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        mesh = device_mesh(config.parallel, torch.device("cpu"))
        assert mesh is not None
        prior = uniform_log_prior(size.vocabulary)
        nets = [sharded_network(config, prior, mesh, drawn=True) for _ in range(2)]
        teacher = nets[1].requires_grad_(False) if distilled else None
        batch = objective_of(config, nets[0], teacher).batch(uniform(), BATCH * world, size.length, (0, 0))
        tokens, index = torch.randint(size.vocabulary, (BATCH, size.length)), torch.arange(BATCH) * world
        live = Live()
        with live, live.resizes():
            for _ in range(2):  # the second micro-batch adds to the gradients of the first
                batch.loss(tokens, index, torch.arange(BATCH * world)).total.backward()
    finally:
        dist.destroy_process_group()
    peak = in_passes(memory)
    return {"peak_bytes": live.peak, "peak_planned": peak, "peak_ratio": round(peak / live.peak, 3)}


def in_passes(memory: Memory) -> Number:
    """What the forward and backward passes of a step add to weights, average, teacher and optimiser."""
    held = memory.weights + memory.average + memory.teacher + memory.optimiser + memory.reduction
    return memory.total(False) - held


def muon_share(made: Any) -> float:
    """A step of the optimiser is not part of what is measured."""
    from catmaps.training.flops import muon_step

    return muon_step(made.shape) * made.cluster.gpus / made.step_tokens


def saved(network: FlowNetwork, length: int, precision: torch.dtype) -> int:
    """Bytes that the trunk saves for its backward pass, weights apart."""
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    x = torch.randn(BATCH, length, network.config.width, dtype=precision, requires_grad=True)
    condition = torch.randn(BATCH, 2, network.config.conditioning, dtype=precision, requires_grad=True)
    index = (torch.arange(length) < 3).long().expand(BATCH, -1)
    kept: dict[int, Tensor] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t
        return t

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16), hooks:
        out = network.trunk(x, condition, index)
    kept.setdefault(out.untyped_storage().data_ptr(), out)
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in own)


def activations(size: Size, length: int, precision: torch.dtype, compiled: bool) -> dict[str, float]:
    """Saved bytes of the trunk, planned and measured."""
    network = build_network(size.network, uniform_log_prior(27))
    if compiled:
        for part in [*network.trunk.blocks, network.trunk.final_norm]:
            part.compile(backend="aot_eager_decomp_partition")
    config = replace(configuration(size, ObjectiveConfig(), False), data=DataConfig(length=length))
    made = plan(config, 27, Cluster(hardware=HARDWARE["cpu"]))
    bytes_each = precision.itemsize
    ours = BATCH * length * trunk_bytes(made.shape, bytes_each, compiled=compiled)
    if bytes_each == 2:
        ours += 2 * (low_precision_copies(made.shape) - 2 * 27 * size.network.width)
    found = saved(network, length, precision)
    return {"bytes": found, "planned": ours, "ratio": round(ours / found, 3)}


def shown(name: str, row: dict[str, float]) -> dict[str, float]:
    print(f"{name:<40}", *(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    steps: dict[str, dict[str, float]] = {}
    trunk: dict[str, dict[str, float]] = {}
    for where in SIZES:
        for what in MIXTURES:
            steps[f"{where}, {what}"] = shown(f"{where}, {what}", one(SIZES[where], *MIXTURES[what]))
    for length, precision, compiled in product((128, 640), (torch.float32, torch.bfloat16), (False, True)):
        name = f"length {length}, {str(precision)[6:]}, {'compiled' if compiled else 'eager'}"
        trunk[name] = shown(name, activations(SIZES["symbols"], length, precision, compiled))
    shares: dict[str, dict[str, float]] = {}
    for where, what, world in product(SIZES, MIXTURES, WORLDS):
        name = f"{where}, {what}, one of {world}"
        shares[name] = shown(name, sharded(SIZES[where], *MIXTURES[what], world))
    print(record("planner", {"steps": steps, "trunk": trunk, "sharded": shares}))


if __name__ == "__main__":
    main()
