"""Memory of a training step, per device. Bytes throughout.

Weights, gradients, optimiser and average are exact. Activations count what autograd saves in the blocks and the final
norm: a rule per precision, exact for eager blocks on CPUs, and for compiled ones what torch's partitioner keeps.
"""

from dataclasses import dataclass

from catmaps.config import OptimiserConfig
from catmaps.training.flops import RoleWork
from catmaps.training.shapes import (
    Number,
    Shape,
    block_matrices,
    block_parameters,
    low_precision_copies,
    parameter_tensors,
    parameters,
)

FP32, BF16 = 4, 2
WHOLE = {"diagonal": 8, "soft": 11, "psd": 15, "anchor": 15, "lsd": 18, "lsd_kl": 16, "ecld": 18, "esd": 18}
"""fp32 tensors of (positions, V) alive at the peak of a role where x is held whole, noise included (measured);
"soft" is the diagonal with a teacher."""
TILE = {"diagonal": 6, "soft": 8, "psd": 14, "anchor": 14, "lsd": 12, "lsd_kl": 17, "ecld": 12, "esd": 17}
"""The same within a tile (measured)."""


def optimiser_bytes(shape: Shape, config: OptimiserConfig) -> int:
    """AdamW: two moments and a step counter per tensor; Muon: one momentum of the blocks' matrices."""
    total, tensors = parameters(shape).total, parameter_tensors(shape)
    if config.name == "adamw":
        return FP32 * (2 * total + tensors)
    muon = block_matrices(shape)
    return FP32 * (2 * (total - muon) + muon + tensors - 4 * shape.blocks)


def block_bytes(shape: Shape, precision: int, *, compiled: bool, tangent: bool = False) -> Number:
    """What a block saves for its backward pass, per token.

    Eager, an op saves its inputs, norms in fp32; selecting a modulation by position (`times` = 2) adds four tensors.
    Compiled, what is cheap is made again. Tangents run eagerly, and always with L x L attention in fp32.
    """
    d, r, several = shape.width, shape.mlp_ratio, shape.times > 1
    scores = shape.heads * shape.length
    small = 4 * (3 * shape.heads + 2) + (2 * (1 + tangent) * 4 * d if shape.neighbours and not compiled else 0)
    if tangent:
        wide = 114 + 24 * several + 12 * r if precision == BF16 else 156 + 48 * several + 24 * r
        return wide * d + 16 * scores + small
    if compiled:
        vectors = (12 if shape.fused else 13) + several + 2 * r
        return precision * (vectors * d + (0 if shape.fused else 2 * scores)) + small
    if precision == BF16:
        wide = (48 if shape.fused else 42) + 8 * several + 4 * r
        return wide * d + (0 if shape.fused else 6 * scores) + small
    return (68 + 16 * several + 8 * r) * d + (0 if shape.fused else 4 * scores) + small


def trunk_bytes(
    shape: Shape, precision: int, *, compiled: bool, tangent: bool = False, checkpointing: bool = False
) -> Number:
    """Saved activations of the trunk per token, all blocks and the final norm with its output.

    Under checkpointing a block keeps its input alone; of one at a time everything is alive.
    """
    d, pair = shape.width, 1 + tangent
    norm = precision * 2 if compiled else (6 if precision == BF16 else 8) + precision * (shape.times > 1)
    ends = pair * (norm + precision) * d
    one = block_bytes(shape, precision, compiled=compiled, tangent=tangent)
    if checkpointing:
        return shape.blocks * pair * precision * d + one + ends
    return shape.blocks * one + ends


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    weights: Number
    gradients: Number
    optimiser: Number
    average: Number
    """The weights' moving average."""
    teacher: Number
    copies: Number
    """bf16 copies of weights; sharded: what is gathered, tables and two blocks, and gradients that wait."""
    late: Number
    """Sharded, when a backward pass ends and activations are gone: the tables' gradients and a flat copy of them."""
    reduction: Number
    """The flat buffer in which replicas sum gradients."""
    activations: Number
    activations_checkpointed: Number
    working: Number
    """What the backward pass of a block makes for itself: as much as the block saved (measured)."""
    head_gradient: Number
    """The head's gradient, whole, to which tiles add."""
    tile: Number
    """Vocabulary-wide tensors of a tile, or of the whole micro-batch where that is less."""
    dense: Number
    """For comparison: vocabulary-wide tensors of a whole micro-batch without tiles."""

    @property
    def state(self) -> Number:
        """What does not depend on the batch."""
        fixed = self.weights + self.gradients + self.optimiser + self.average
        return fixed + self.teacher + self.copies + self.reduction

    def total(self, checkpointing: bool) -> Number:
        activations = self.activations_checkpointed if checkpointing else self.activations
        return self.state + max(self.working + self.tile + self.head_gradient + activations, self.late)


def memory(
    shape: Shape,
    mixture: tuple[RoleWork, ...],
    optimiser: OptimiserConfig,
    *,
    teacher: bool,
    shard: int,
    replicas: int,
    precision: int,
    compiled: bool,
    tokens: int,
    tile: int | None,
    average_teaches: bool = False,
) -> Memory:
    """Memory of one device.

    Args:
        shape: Of the network.
        mixture: Roles; all roles of a micro-batch are alive together.
        optimiser: Which moments are kept.
        teacher: Whether a frozen base is held.
        shard: Devices that share one copy of the state.
        replicas: Copies of the state.
        precision: Bytes of a number in matrix products.
        compiled: Whether blocks are compiled.
        tokens: Of a micro-batch of one device.
        tile: Positions of a tile; None: vocabulary-wide work is done at once.
        average_teaches: Whether the moving average is called for targets (`objective.jumps`).
    """
    count = parameters(shape)
    weights = FP32 * count.total / shard
    rest = count.total - shape.blocks * block_parameters(shape)

    def saved(checkpointing: bool) -> Number:
        return tokens * sum(
            role.share
            * (role.calls.plain if not tangent else role.calls.tangent)
            * trunk_bytes(shape, precision, compiled=compiled, tangent=tangent, checkpointing=checkpointing)
            for role in mixture
            for tangent in (False, True)
        )

    others = int(any(role.calls.teacher for role in mixture)) + average_teaches
    working = [
        tokens * role.share * block_bytes(shape, precision, compiled=compiled, tangent=role.calls.tangent > 0)
        for role in mixture
    ]
    dense = sum(FP32 * shape.vocabulary * tokens * role.share * WHOLE[_wide(role)] for role in mixture)
    return Memory(
        weights=weights,
        gradients=weights,
        optimiser=optimiser_bytes(shape, optimiser) / shard,
        average=weights,
        teacher=weights if teacher else 0.0,
        copies=_copies(shape, shard, precision, others=others, several=len(mixture) > 1),
        late=2 * FP32 * rest if shard > 1 else 0.0,
        reduction=weights if shard == 1 and replicas > 1 else 0.0,
        activations=saved(False),
        activations_checkpointed=saved(True),
        working=max(working),
        head_gradient=0 if tile is None else FP32 * count.head,
        tile=dense if tile is None else FP32 * shape.vocabulary * tile * max(TILE[_wide(role)] for role in mixture),
        dense=dense,
    )


def _wide(role: RoleWork) -> str:
    return "soft" if role.role == "diagonal" and role.calls.teacher else role.role


def _copies(shape: Shape, shard: int, precision: int, *, others: int, several: bool) -> Number:
    """`others`: networks that are called beside the one in training."""
    if shard == 1:
        return precision * low_precision_copies(shape) if precision == BF16 else 0.0
    count, block = parameters(shape), block_parameters(shape)
    rest = count.total - shape.blocks * block
    cast = precision * count.head if precision == BF16 else 0
    # Where several roles call a block its gradients wait for the last.
    waiting = precision * shape.blocks * block if several else 0
    return FP32 * rest * (1 + others) + cast + precision * 2 * block + waiting
