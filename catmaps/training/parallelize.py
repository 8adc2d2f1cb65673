"""Networks whose weights, gradients, optimiser and average are shared out among processes: FSDP2, or HSDP.

The order is activation checkpointing, a compiled kernel per block, sharding. Every block is a unit: its weights are
gathered for a call, in the precision of the run, and let go after it; its gradients are summed in fp32. All the rest,
the two vocabulary tables and the small functions of time, is one unit more. It is gathered in fp32, once for a
micro-batch: tiles of vocabulary-sized work differ in number from process to process, so nothing may be gathered inside
them. A network is made on the meta device and filled one part at a time: no process ever holds all of it.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Float
from olmo_core.distributed.utils import get_world_size
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from catmaps.config import Config, ParallelConfig
from catmaps.errors import UserError
from catmaps.model import (
    PRECISION,
    START,
    TEACHER,
    best_device,
    compile_blocks,
    configure,
    must_match,
    network_of,
    reading,
)
from catmaps.network.denoiser import FlowNetwork
from catmaps.network.published import PublishedNetwork
from catmaps.network.tokens import Network
from catmaps.network.trunk import Block

CALLS = ("encode", "encode_with_tangent")
"""What is called of a network besides `forward`. Reads of the logits follow one, which has gathered the tables."""


def shard_degree(config: ParallelConfig, processes: int) -> int:
    """How many processes share one copy of the weights; 1: each has its own.

    Raises:
        UserError: They do not divide into groups of that size.
    """
    if config.strategy == "ddp" or processes == 1:
        return 1
    if config.strategy == "fsdp":
        return processes
    degree = config.shard_degree or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if processes % degree:
        raise UserError(f"parallel.shard-degree {degree} does not divide the {processes} processes")
    return degree


def device_mesh(config: ParallelConfig, device: torch.device) -> DeviceMesh | None:
    """The processes as (replicas, sharers), or (sharers,) where there is one copy; None if nothing is shared."""
    world = get_world_size()
    degree = shard_degree(config, world)
    if degree == 1:
        return None
    if degree == world:
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (world // degree, degree), mesh_dim_names=("replicate", "shard"))


def sharded_networks(
    config: Config, log_prior: Float[Tensor, "v"], folder: Path, mesh: DeviceMesh
) -> tuple[Network, Network, Network | None]:
    """(in training, moving average, teacher), all alike at the start, as whole networks would be.

    Args:
        config: The run's; without source the weights are drawn from its seed.
        log_prior: log of the smoothed unigram, (V,).
        folder: The run's, which holds the weights of the frozen base of a distillation, or those to begin with.
        mesh: The processes.
    """
    torch.manual_seed(config.training.seed)
    network = sharded_network(config, log_prior, mesh, drawn=config.base is None and config.start is None)
    average = sharded_network(config, log_prior, mesh)
    frozen = None if config.base is None else sharded_network(config, log_prior, mesh)
    if frozen is not None:
        load_sharded(frozen.requires_grad_(False), folder / TEACHER)
        copy_into(network, frozen)
    elif config.start is not None:
        load_sharded(network, folder / START)
    if frozen is not None and isinstance(network, FlowNetwork) and network.projects:
        network.embedding.table.weight.requires_grad_(False)
    copy_into(average, network)
    return network, average, frozen


def sharded_network(config: Config, log_prior: Float[Tensor, "v"], mesh: DeviceMesh, *, drawn: bool = False) -> Network:
    """A network of which this process holds its share, random if `drawn` and else still to be filled."""
    device = best_device()
    network = network_of(config, log_prior, device=torch.device("meta"))
    configure(network, config.training, config.parallel)
    if config.training.compile:
        compile_blocks(network)
    for part in _parts(network):
        if drawn:
            _draw(part)
        if isinstance(part, Block):
            _share(part, mesh, PRECISION[config.training.precision])
    if drawn:
        assert not isinstance(network, PublishedNetwork)  # these are not trained
        network.reset_parameters()
    _share(network, mesh, torch.float32)
    if not drawn:
        buffers = [buffer.clone() for buffer in network.buffers()]
        network.to_empty(device=device)
        for buffer, kept in zip(network.buffers(), buffers, strict=True):
            buffer.copy_(kept)
    return network.to(device)


def _parts(network: Network) -> Iterator[nn.Module]:
    """The modules that hold parameters, in the order in which they are made."""
    for name, child in network.named_children():
        if name == "trunk":
            yield from network.trunk.blocks
            yield network.trunk.final_norm
        else:
            yield child


def _draw(part: nn.Module) -> None:
    """Makes a part's weights on the CPU with the draws of its constructor: children first, each as it was made."""
    if any(p.is_meta for p in part.parameters(recurse=False)):
        for name, parameter in list(part.named_parameters(recurse=False)):
            part.register_parameter(name, nn.Parameter(torch.empty_like(parameter, device="cpu")))
    for child in part.children():
        _draw(child)
    if hasattr(part, "reset_parameters"):
        part.reset_parameters()  # pyright: ignore[reportCallIssue]


def _share(unit: Network | Block, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    fully_shard(unit, mesh=mesh, mp_policy=policy)
    assert isinstance(unit, FSDPModule)
    # Losses are divided by counts over all processes: their gradients are added, not averaged.
    unit.set_gradient_divide_factor(1.0)
    unit.set_force_sum_reduction_for_comms(True)
    for name in CALLS if isinstance(unit, FlowNetwork) else ():
        register_fsdp_forward_method(unit, name)


def is_sharded(network: Network) -> bool:
    return isinstance(network, FSDPModule)


def let_go(network: Network) -> None:
    """Lets go of what calls without a backward pass have gathered, and of casts of it."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    forget_casts(network)


def forget_casts(network: Network) -> None:
    """Gathered weights change in place, under the same address and version: what was kept of them must go."""
    if isinstance(network, FlowNetwork):
        network.forget_casts()


def local(tensor: Tensor) -> Tensor:
    """This process's share of a tensor: all of it where nothing is shared."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, put together from its shares; every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def copy_into(network: Network, other: Network) -> None:
    """Copies weights and buffers, share by share."""
    for own, value in zip(network.state_dict().values(), other.state_dict().values(), strict=True):
        local(own).copy_(local(value))


@torch.no_grad()
def load_sharded(network: Network, file: Path) -> None:
    """`model.load_weights`, one tensor at a time, of which this process keeps its share."""
    own = network.state_dict()
    with reading(file), safe_open(file, framework="pt") as stored:
        shapes = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
        must_match({name: tuple(value.shape) for name, value in own.items()}, shapes, file)
        for name, value in own.items():
            tensor = stored.get_tensor(name).to(value.dtype)
            if isinstance(value, DTensor):
                tensor = distribute_tensor(tensor, value.device_mesh, value.placements, src_data_rank=None).to_local()
            local(value).copy_(tensor)
