"""One process of many, without the others: a real step on torch's fake process group, whose collectives do nothing.

The networks, their shards, the passes and the optimiser are those of training; what is gathered has no meaning, but the
collectives, their number and their bytes are those of a cluster. Sequences are cut to a few tokens and a step to two
micro-batches: neither changes what a micro-batch sends.
"""

import time
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode

from catmaps.config import Config, ParallelConfig
from catmaps.errors import UserError
from catmaps.flow.times import Law
from catmaps.model import starting_law
from catmaps.network.denoiser import uniform_log_prior
from catmaps.network.tokens import Network
from catmaps.training.module import FlowTrainModule
from catmaps.training.parallelize import device_mesh, local, sharded_network
from catmaps.training.planner import Plan
from catmaps.training.shapes import Number, block_matrices

LENGTH, PASSES = 4, 2
SMALL = 2**16  # bytes: below are norms and statistics of a step, not gradients


@dataclass(frozen=True)
class Simulated:
    """What process 0 held and sent in one step of `passes` micro-batches; bytes as sent in rings."""

    processes: int
    shard: int
    passes: int
    parameters: int
    """Numbers of its share of the weights."""
    moments: int
    gathers: int
    gather_bytes: int
    scatters: int
    scatter_bytes: int
    reductions: int
    reduce_bytes: int
    build_seconds: float
    step_seconds: float
    peak_bytes: int
    """Of the simulating process, everything included."""


class _Collectives(TorchDispatchMode):
    """Notes the bytes of every collective."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, list[int]] = {"gather": [], "scatter": [], "reduce": []}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        name = func.name() if hasattr(func, "name") else ""
        if name == "c10d::_allgather_base_":
            self.sent["gather"].append(_nbytes(args[0]) - _nbytes(args[1]))
        elif name == "c10d::_reduce_scatter_base_":
            self.sent["scatter"].append(_nbytes(args[1]) - _nbytes(args[0]))
        elif name == "c10d::allreduce_" and _nbytes(args[0][0]) > SMALL:
            size = dist.get_process_group_ranks(dist.ProcessGroup.unbox(args[1]))
            self.sent["reduce"].append(2 * _nbytes(args[0][0]) * (len(size) - 1) // len(size))
        return func(*args, **(kwargs or {}))


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class _Alone(FlowTrainModule):
    """Needs no trainer."""

    def __init__(self, config: Config, network: Network, average: Network, teacher: Network | None, law: Law) -> None:
        super().__init__(config, network, average, teacher, law)
        self._trainer: Any = SimpleNamespace(global_step=1)

    def record_metric(self, *args: Any, **kwargs: Any) -> None:
        """There is nobody to tell."""


@dataclass(frozen=True)
class Comparison:
    """A figure as planned and as simulated."""

    name: str
    planned: Number
    simulated: Number

    @property
    def agrees(self) -> bool:
        """Within half a percent: shards are padded to equal sizes."""
        return abs(self.simulated - self.planned) <= 0.005 * self.planned


def compare(simulated: Simulated, made: Plan) -> tuple[Comparison, ...]:
    """A step of the plan beside the simulated one, scaled from its micro-batches to the plan's."""
    times, traffic = made.passes / simulated.passes, made.traffic
    gathers, gathered = traffic.once  # which its micro-batches share
    moments = made.parameters.total * (2 if made.config.optimiser.name == "adamw" else 1)
    if made.config.optimiser.name == "muon":
        moments += made.parameters.total - block_matrices(made.shape)
    return (
        Comparison("weights of a device", made.parameters.total / made.shard, simulated.parameters),
        Comparison("moments of a device", moments / made.shard, simulated.moments),
        Comparison("gathers a step", traffic.gathers, (simulated.gathers - gathers) * times + gathers),
        Comparison("bytes gathered", traffic.gather, (simulated.gather_bytes - gathered) * times + gathered),
        Comparison("scatters a step", traffic.scatters, simulated.scatters * times),
        Comparison("bytes scattered", traffic.scatter, simulated.scatter_bytes * times),
        Comparison("all-reductions a step", traffic.reductions, simulated.reductions),
        Comparison("bytes all-reduced", traffic.reduce, simulated.reduce_bytes),
    )


def simulate(config: Config, vocabulary: int, processes: int, shard: int | None = None) -> Simulated:
    """One step of process 0 of `processes`, `shard` of which share a copy (None: all).

    Raises:
        UserError: There is a process group already, or numbers do not divide.
    """
    if dist.is_initialized():
        raise UserError("a simulation needs a process of its own, outside of torchrun")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    small = _cut(config, processes, shard)
    dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    try:
        return _step(small, vocabulary, processes)
    finally:
        dist.destroy_process_group()


def _cut(config: Config, processes: int, shard: int | None) -> Config:
    degree = processes if shard is None else shard
    if degree < 2 or processes % degree:
        raise UserError(f"--simulate needs at least 2 devices that share a copy, not {degree} of {processes}")
    whole = degree == processes
    shared = ParallelConfig(strategy="fsdp" if whole else "hsdp", shard_degree=None if whole else degree)
    shared = replace(shared, checkpoint_activations=config.parallel.checkpoint_activations)
    micro = max(1, min(config.training.micro_batch, config.training.batch // processes))
    training = replace(config.training, micro_batch=micro, batch=PASSES * micro * processes, compile=False)
    return replace(config, training=training, data=replace(config.data, length=LENGTH), parallel=shared)


def _step(config: Config, vocabulary: int, processes: int) -> Simulated:
    began, device = time.monotonic(), torch.device("cpu")
    mesh = device_mesh(config.parallel, device)
    assert mesh is not None
    torch.manual_seed(config.training.seed)
    prior = uniform_log_prior(vocabulary)
    network, average = (sharded_network(config, prior, mesh, drawn=drawn) for drawn in (True, False))
    teacher = None if config.base is None else sharded_network(config, prior, mesh)
    for net in (average, teacher):
        for parameter in () if net is None else net.parameters():
            local(parameter.detach()).zero_()
    if isinstance(teacher, FSDPModule):
        teacher.unshard()  # its tables stay gathered from the first call on
    module = _Alone(config, network, average, teacher, starting_law(config.clock, vocabulary))
    built, rows = time.monotonic(), config.training.batch // processes
    tokens = torch.randint(vocabulary, (rows, LENGTH), generator=torch.Generator().manual_seed(0))
    with _Collectives() as noted:
        module.train_batch({"input_ids": tokens})
        module.optim_step()
    moments = [t for o in module.optimisers for s in o.state.values() for t in s.values() if t.ndim]
    sent = noted.sent
    return Simulated(
        processes=processes,
        shard=mesh.size(mesh.ndim - 1),
        passes=PASSES,
        parameters=sum(local(p).numel() for p in network.parameters()),
        moments=sum(local(t).numel() for t in moments),
        gathers=len(sent["gather"]),
        gather_bytes=sum(sent["gather"]),
        scatters=len(sent["scatter"]),
        scatter_bytes=sum(sent["scatter"]),
        reductions=len(sent["reduce"]),
        reduce_bytes=sum(sent["reduce"]),
        build_seconds=built - began,
        step_seconds=time.monotonic() - built,
        peak_bytes=_peak(),
    )


def _peak() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
