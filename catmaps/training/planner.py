"""What a training costs before anyone pays for it: memory, FLOPs, time, files and traffic. Arithmetic alone.

`plan` puts together the parameters (`shapes`), FLOPs (`flops`) and bytes (`memory`) of a configuration on a cluster.
Collectives follow FSDP2 with a reduction in fp32, or a replica per device.
"""

import math
from dataclasses import dataclass, replace

from catmaps.config import Config
from catmaps.errors import UserError
from catmaps.training.flops import RoleWork, gram, muon_step, per_token, roles
from catmaps.training.memory import BF16, FP32, Memory, memory
from catmaps.training.shapes import Number, Parameters, Shape, block_parameters, exported_bytes, parameters

USABLE = 0.92  # share of a device's memory that a plan may fill: the rest is the runtime's and the allocator's
DENSE_LENGTH = 512  # on CPUs attention forms its L x L matrix up to this length


@dataclass(frozen=True)
class Hardware:
    """A device: dense bf16 FLOP/s and bytes of memory, from its vendor's data sheet."""

    name: str
    flops: Number
    memory: Number
    source: str


HARDWARE = {
    device.name: device
    for device in (
        Hardware("a100", 312e12, 80e9, "NVIDIA A100 80GB SXM data sheet"),
        Hardware("h100", 989e12, 80e9, "NVIDIA H100 SXM data sheet, half of the figure with sparsity"),
        Hardware("h200", 989e12, 141e9, "NVIDIA H200 SXM data sheet, half of the figure with sparsity"),
        Hardware("b200", 2250e12, 180e9, "NVIDIA DGX B200 data sheet, an eighth, half of the figure with sparsity"),
        Hardware("cpu", 160e9, 8e9, "nominal: one core, two 512-bit fp32 units at 2.5 GHz"),
    )
}


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where a training is to run and how."""

    gpus: int = 1
    hardware: Hardware = HARDWARE["h100"]
    shard: int | None = None
    """Devices that share a copy of the state (FSDP2); None: all; 1: a replica on every device (DDP)."""
    mfu: Number = 0.4
    """Share of the peak that all matrix products reach, recomputation included."""
    checkpointing: bool = False
    """Activation checkpointing, block by block."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that a device sends per step, by rings."""

    gather: Number
    """Weights, before every forward and backward pass."""
    scatter: Number
    """Gradients, to the device that keeps their share."""
    reduce: Number
    """Gradients, between replicas."""
    gathers: int = 0
    """Collectives of a step."""
    scatters: int = 0
    reductions: int = 0
    once: tuple[int, Number] = (0, 0.0)
    """Gathers, and their bytes, that a step makes whatever its micro-batches; counted above."""

    @property
    def total(self) -> Number:
        return self.gather + self.scatter + self.reduce


@dataclass(frozen=True)
class Elementwise:
    """Vocabulary-wide numbers made per token; not among the FLOPs."""

    normals: Number
    exponentials: Number


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The bill."""

    config: Config
    cluster: Cluster
    shape: Shape
    shard: int
    """Devices that share a copy of the state."""
    distilled: bool
    parameters: Parameters
    sequences: int
    """Of a device, per step."""
    micro_batch: int
    passes: int
    """Micro-batches of a step."""
    mixture: tuple[RoleWork, ...]
    tiled: bool
    tile_positions: int
    flops_per_token: Number
    elementwise: Elementwise
    memory: Memory
    tokens: Number
    steps: int
    step_seconds: Number
    traffic: Traffic

    @property
    def step_tokens(self) -> int:
        return self.config.training.batch * self.shape.length

    @property
    def seconds(self) -> Number:
        return self.step_seconds * self.tokens / self.step_tokens

    @property
    def tokens_per_second(self) -> Number:
        return self.step_tokens / self.step_seconds

    @property
    def device_hours(self) -> Number:
        return self.seconds / 3600 * self.cluster.gpus

    @property
    def flops(self) -> Number:
        return self.flops_per_token * self.tokens

    @property
    def bandwidth(self) -> Number:
        """Bytes per second and device below which collectives take longer than the matrix products."""
        return self.traffic.total / self.step_seconds

    @property
    def bytes_used(self) -> Number:
        return self.memory.total(self.cluster.checkpointing)

    @property
    def fits(self) -> bool:
        return self.bytes_used <= USABLE * self.cluster.hardware.memory

    @property
    def exported(self) -> int:
        """model.safetensors."""
        return exported_bytes(self.shape)

    @property
    def checkpoint(self) -> Number:
        """What --resume reads: weights, average and optimiser, of all devices together."""
        copies = 1 if self.shard == 1 else self.shard
        return copies * (self.memory.weights + self.memory.average + self.memory.optimiser)

    @property
    def data(self) -> Number:
        """Token shards, every token once."""
        return self.tokens * (2 if self.shape.vocabulary <= 65536 else 4)


def plan(config: Config, vocabulary: int, cluster: Cluster, tokens: Number | None = None) -> Plan:
    """The plan of a training.

    Args:
        config: The run's; a distillation has `base` set.
        vocabulary: V.
        cluster: Devices.
        tokens: To train on; None: the steps of the configuration.

    Raises:
        UserError: Another family than flow, or batch, devices and shards that do not divide.
    """
    shard, sequences = _check(config, cluster, tokens)
    training, distilled = config.training, config.base is not None
    fused = cluster.hardware.name != "cpu" or config.data.length > DENSE_LENGTH
    shape = Shape.of(config, vocabulary, fused=fused)
    micro = min(training.micro_batch, sequences)
    passes = math.ceil(sequences / micro)

    def mixed(tiled: bool) -> tuple[RoleWork, ...]:
        return roles(shape, config.objective, teacher=distilled, tiled=tiled, checkpointing=cluster.checkpointing)

    positions = max(1, training.tile_numbers(shape.projects) // shape.vocabulary)
    tiled = micro * shape.length > positions
    mixture = mixed(tiled)
    step_tokens = training.batch * shape.length
    flops = per_token(mixture).total + gram(shape) * len(mixture) * passes * cluster.gpus / step_tokens
    muon = muon_step(shape) if config.optimiser.name == "muon" else 0.0
    total = float(training.steps * step_tokens) if tokens is None else tokens
    rate = cluster.hardware.flops * cluster.mfu
    return Plan(
        config=config,
        cluster=cluster,
        shape=shape,
        shard=shard,
        distilled=distilled,
        parameters=parameters(shape),
        sequences=sequences,
        micro_batch=micro,
        passes=passes,
        mixture=mixture,
        tiled=tiled,
        tile_positions=min(positions, micro * shape.length),
        flops_per_token=flops + muon * cluster.gpus / step_tokens,
        elementwise=_elementwise(shape, mixture, tiled),
        memory=memory(
            shape,
            mixture,
            config.optimiser,
            teacher=distilled,
            shard=shard,
            replicas=cluster.gpus // shard,
            precision=BF16 if training.precision == "bf16" else FP32,
            compiled=training.compile,
            tokens=micro * shape.length,
            tile=positions if tiled else None,
            average_teaches=config.average_teaches,
        ),
        tokens=total,
        steps=math.ceil(total / step_tokens),
        step_seconds=(flops * sequences * shape.length + muon) / rate,
        traffic=_traffic(config, shape, mixture, shard, cluster.gpus // shard, passes),
    )


def _check(config: Config, cluster: Cluster, tokens: Number | None) -> tuple[int, int]:
    """(devices of a shard group, sequences of a device)."""
    gpus, batch = cluster.gpus, config.training.batch
    shard = gpus if cluster.shard is None else cluster.shard
    if config.family != "flow":
        raise UserError(f"plan knows flows, not the family {config.family}: leave out --family")
    if gpus < 1 or shard < 1:
        raise UserError("--gpus and --shard must be at least 1")
    if batch % gpus:
        lower, upper = batch // gpus * gpus, (batch // gpus + 1) * gpus
        near = f"{lower} or {upper}" if lower else str(upper)
        raise UserError(f"training.batch {batch} is not a multiple of the {gpus} devices; try {near}")
    if gpus % shard:
        raise UserError(f"--shard {shard} does not divide the {gpus} devices")
    if not 0 < cluster.mfu <= 1:
        raise UserError(f"--mfu must lie in (0, 1], not {cluster.mfu}")
    if tokens is not None and tokens <= 0:
        raise UserError("--tokens must be positive")
    return shard, batch // gpus


def _elementwise(shape: Shape, mixture: tuple[RoleWork, ...], tiled: bool) -> Elementwise:
    """Where x is held its noise is made once; in tiles for every call, for the loss and for the backward pass."""
    normals = exponentials = 0.0
    for role in mixture:
        made = role.calls
        encodes = made.plain + made.tangent + made.own + made.own_tangent + made.teacher
        learning = (made.plain + made.tangent) * int(tiled)
        reads = encodes + made.again + made.still
        beliefs = 0 if shape.linear else encodes + learning
        times = encodes * shape.width / shape.vocabulary if shape.projects else encodes + 1 + learning if tiled else 1
        normals += role.share * times * shape.vocabulary
        exponentials += role.share * (reads + beliefs) * shape.vocabulary
    return Elementwise(normals, exponentials)


def _traffic(
    config: Config, shape: Shape, mixture: tuple[RoleWork, ...], shard: int, replicas: int, passes: int
) -> Traffic:
    """Sharded, a call gathers each block, and once more for its backward pass. All else is gathered in fp32, once a
    micro-batch; of a teacher it stays gathered, of a moving average that teaches to the end of the step. Gradients of a
    block's calls are added, then scattered once; replicas add theirs once a step."""
    count, block = parameters(shape).total, block_parameters(shape)
    if shard == 1:
        between = 2 * (replicas - 1) / replicas
        return Traffic(gather=0.0, scatter=0.0, reduce=between * FP32 * count, reductions=int(replicas > 1))
    learning = sum(role.calls.plain + role.calls.tangent for role in mixture)
    silent = sum(role.calls.own + role.calls.own_tangent + role.calls.teacher for role in mixture)
    precision = BF16 if config.training.precision == "bf16" else FP32
    rest, ring, between = count - shape.blocks * block, (shard - 1) / shard, 2 * (replicas - 1) / replicas
    blocks, calls = shape.blocks * block, 2 * learning + silent
    once = int(config.average_teaches), ring * FP32 * rest * config.average_teaches
    return Traffic(
        gather=ring * passes * (FP32 * rest + calls * precision * blocks) + once[1],
        scatter=ring * passes * FP32 * count,
        reduce=between * FP32 * count / shard,
        gathers=passes * (1 + calls * shape.blocks) + once[0],
        scatters=passes * (1 + shape.blocks),
        reductions=1 + shape.blocks if replicas > 1 else 0,
        once=once,
    )


def advice(made: Plan, vocabulary: int) -> tuple[str, ...]:
    """For a plan that does not fit: single changes that make it fit, else the nearest there is."""
    config, cluster = made.config, made.cluster
    tries: list[tuple[str, Config, Cluster]] = []
    if not cluster.checkpointing:
        tries.append(("activation checkpointing", config, replace(cluster, checkpointing=True)))
    micro = made.micro_batch
    while micro > 1:
        micro //= 2
        smaller = replace(config, training=replace(config.training, micro_batch=micro))
        tries.append((f"micro-batches of {micro}", smaller, cluster))
    if made.shard < cluster.gpus:
        tries.append((f"sharding over all {cluster.gpus} devices", config, replace(cluster, shard=None)))
    gpus = cluster.gpus
    while gpus * 2 <= min(config.training.batch, 64 * cluster.gpus) and config.training.batch % (gpus * 2) == 0:
        gpus *= 2
        tries.append((f"{gpus} devices", config, replace(cluster, gpus=gpus, shard=None)))
    if cluster.hardware.name in ("h100", "a100"):
        tries.append(("h200", config, replace(cluster, hardware=HARDWARE["h200"])))
    works: list[str] = []
    for kind in ("activation", "micro", "sharding", "devices", "h200"):
        for name, other, where in tries:
            if kind in name and plan(other, vocabulary, where, made.tokens).fits:
                works.append(name)
                break
    if works:
        return tuple(works)
    least = replace(config, training=replace(config.training, micro_batch=1))
    best = plan(least, vocabulary, replace(cluster, checkpointing=True, shard=None), made.tokens)
    verdict = "fits" if best.fits else f"still takes {best.bytes_used / 1e9:.0f} GB; take more or larger devices"
    return (f"checkpointing, micro-batches of 1 and full sharding together: {verdict}",)
