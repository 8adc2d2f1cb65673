"""What a batch does: which sequence gets which loss, at which times, with which positions clean.

A batch is planned as a whole from explicit generators, by global sample index, so that any division into processes and
micro-batches sees the same draws. Base training is the plan without off-diagonal rows; joint training and distillation
differ in the mixture and in the teacher alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from catmaps.flow.flow_map import FlowMap
from catmaps.flow.interpolant import AnyState, interpolate
from catmaps.flow.losses import LAGRANGIAN, OFF_DIAGONAL, anchor, endpoint_cross_entropy, soft_cross_entropy
from catmaps.flow.noise import Noise
from catmaps.flow.reduction import TokenLoss
from catmaps.flow.times import Law, Pair, final_pairs, ladder_pairs, pairs, stratified

DIAGONAL, OFF_DIAGONAL_ROW, ANCHOR = 0, 1, 2
GOLDEN = 0.6180339887498949  # multiples of it modulo 1 spread evenly over every stride: each process gets its share


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The mixture of losses."""

    loss: Literal["psd", "lsd", "lsd_kl", "esd", "ecld"] = "psd"
    """Off-diagonal loss."""
    off_diagonal: float = 0.0
    """Share of sequences with s < t, anchors included; 0 trains a base."""
    jumps: Literal["map", "average"] = "map"
    """Whose jumps psd composes, and whose diagonal is a target where there is no frozen base: those of the map as it
    is, or of the moving average of its weights."""
    anchor: float = 0.25
    """Share of the off-diagonal sequences that tie small gaps to the frozen base."""
    anchor_gap: float = 1 / 64
    """Largest gap of an anchor, in units of the clock."""
    boundary: float = 0.25
    """Share of the other off-diagonal sequences with (s, t) = (0, 1); not for Lagrangian losses (lsd, lsd_kl, ecld)."""
    final: float = 0.0
    """Share of the others that end at t = 1: the jumps of renoising, from times spread over the sampling clock; not for
    Lagrangian losses."""
    ladder: float = 0.0
    """Share of what is left that are single steps of a sampling grid of 1, 2, 4, ... or 32 steps; not for Lagrangian
    losses."""
    weighting: Literal["unit", "likelihood", "snr", "learned", "inverse_variance"] = "unit"
    """Of the diagonal loss by its time, beside the law of time (`flow/weighting.py`); a teacher's diagonal has unit."""
    clean: float = 0.25
    """Share of sequences with a clean prefix or span, for prompts and conditional scores."""

    def __post_init__(self) -> None:
        for name in ("off_diagonal", "anchor", "anchor_gap", "boundary", "final", "ladder", "clean"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"objective.{name} must lie in [0, 1], not {getattr(self, name)}")


class Plan(NamedTuple):
    """The draws of a batch: row i of each belongs to sequence i."""

    role: Int[Tensor, "b"]
    """DIAGONAL, OFF_DIAGONAL_ROW or ANCHOR."""
    times: Pair
    """(B, 1) each; s = u = t on the diagonal."""
    known: Bool[Tensor, "b l"]
    """Clean positions, which carry no loss."""
    weight: Float[Tensor, "b 1"]
    """What a row counts beside others."""

    def rows(self, index: Tensor, device: torch.device | None = None) -> "Plan":
        """The draws of some sequences, moved to a device."""
        times = Pair(*(time[index].to(device) for time in self.times))
        return Plan(self.role[index].to(device), times, self.known[index].to(device), self.weight[index].to(device))

    def lacking(self, index: Int[Tensor, "b"], together: Int[Tensor, "n"]) -> Int[Tensor, "m"]:
        """One row of every role that is among the rows `together` but not among `index`."""
        have = set(self.role[index].tolist())
        rows = {int(self.role[row]): int(row) for row in together}
        return torch.tensor([row for role, row in sorted(rows.items()) if role not in have], dtype=torch.long)


Weigh = Callable[[Float[Tensor, "b"]], Float[Tensor, "b"]]


def plan(
    config: ObjectiveConfig,
    law: Law,
    batch: int,
    length: int,
    generator: torch.Generator,
    sampling: Law | None = None,
    weigh: Weigh | None = None,
) -> Plan:
    """Draws roles, times (stratified over the batch) and clean positions for a global batch.

    Args:
        config: The mixture.
        law: Law of diagonal times, and the clock of pairs.
        batch: Sequences over all processes.
        length: Tokens of a sequence.
        generator: Source of randomness, the same on every process.
        sampling: The clock of sampling grids, on which the ladder's pairs are drawn; None: `law`.
        weigh: Weights of diagonal times; None: one.
    """
    place = (torch.arange(batch, dtype=torch.float64) + 0.5) * GOLDEN % 1
    off = place < config.off_diagonal
    anchored = place < config.off_diagonal * config.anchor
    role = off.long() + anchored.long()
    t = law.quantile(stratified(batch, generator))[:, None]
    draws = [stratified(batch, generator) for _ in range(8)]  # also where no row needs them: bases keep their numbers
    pair = _pairs(config, law, sampling or law, anchored, draws) if bool(off.any()) else Pair(t, t, t)
    known = clean_positions(batch, length, config.clean, generator)
    weight = torch.ones_like(t) if weigh is None else torch.where(off[:, None], 1.0, weigh(t[:, 0])[:, None])
    return Plan(role, Pair(*(torch.where(off[:, None], p, t) for p in pair)), known, weight)


def _pairs(
    config: ObjectiveConfig, law: Law, sampling: Law, anchored: Bool[Tensor, "b"], draws: Sequence[Float[Tensor, "b"]]
) -> Pair:
    """Off-diagonal times of every row: anchors, (0, 1), final jumps, rungs of the ladder, and general pairs.

    Lagrangian losses get anchors and general pairs alone: the others end at t = 1.
    """
    gap, start, boundary, final, early, ladder, rung, place = draws
    gap = torch.where(anchored, gap * config.anchor_gap, gap)
    if config.loss in LAGRANGIAN:
        return pairs(law, gap, start, boundary, share=0.0)
    boundary = torch.where(anchored, torch.ones_like(boundary), boundary)
    pair = pairs(law, gap, start, boundary, config.boundary)
    free = ~anchored & (boundary >= config.boundary)
    ends = free & (final < config.final)
    for chosen, other in (
        (ends, final_pairs(sampling, early)),
        (free & ~ends & (ladder < config.ladder), ladder_pairs(sampling, rung, place)),
    ):
        pair = Pair(*(torch.where(chosen[:, None], a, b) for a, b in zip(other, pair, strict=True)))
    return pair


def clean_positions(batch: int, length: int, share: float, generator: torch.Generator) -> Bool[Tensor, "{batch} l"]:
    """In a share of the sequences a prefix (half of them) or a span is clean; at least one position stays noisy."""
    chosen, prefix, a, b = (torch.rand(batch, 1, generator=generator) for _ in range(4))
    low, high = torch.minimum(a, b) * length, torch.maximum(a, b) * length
    low = torch.where(prefix < 0.5, torch.zeros_like(low), low)
    position = torch.arange(length)
    known = (chosen < share) & (position >= low.floor()) & (position < high.ceil())
    return known & ~known.all(1, keepdim=True)


class BatchLoss(NamedTuple):
    """The loss of some rows of a batch; `parts` are the detached sums of values and of their positions by role."""

    total: Float[Tensor, ""]
    squared_error: Float[Tensor, "n"]
    """Mean over each diagonal row's noisy positions of ||e - mu||^2; empty when the target is a teacher's."""
    diagonal_times: Float[Tensor, "n"]
    cross_entropy: Float[Tensor, "n"]
    """Mean loss of the same positions."""
    sums: Float[Tensor, "3"]
    counts: Float[Tensor, "3"]


def batch_loss(
    flow_map: FlowMap,
    teacher: FlowMap | None,
    config: ObjectiveConfig,
    tokens: Int[Tensor, "b l"],
    noise: Float[Tensor, "b l v"] | Noise,
    plan: Plan,
    normaliser: float,
    average: FlowMap | None = None,
) -> BatchLoss:
    """The weighted loss of these rows: sum over noisy positions / `normaliser` (noisy positions of the global batch).

    Args:
        flow_map: The map in training.
        teacher: The frozen base, target of diagonal rows and anchors and supplier of diagonal posteriors; None trains
            from the tokens and teaches itself.
        config: Its off-diagonal loss is used.
        tokens: (B, L).
        noise: x_0, (B, L, V), held or not.
        plan: Draws of these rows; one that is clean throughout is called like the others and counts for nothing.
        normaliser: Positive.
        average: Supplies what the map would teach itself; None: it does.
    """
    weight = plan.weight * (~plan.known).float() / normaliser
    s, u, t = (torch.where(plan.known, 1.0, time) if bool(plan.known.any()) else time for time in plan.times)
    zero = torch.zeros((), device=tokens.device)
    total, sums, counts = zero, [zero] * 3, [zero] * 3
    errors, at, entropies = (zero.new_empty(0) for _ in range(3))
    for role in (DIAGONAL, OFF_DIAGONAL_ROW, ANCHOR):
        rows = (plan.role == role).nonzero()[:, 0]
        if len(rows) == 0:
            continue
        state = interpolate(tokens[rows], noise[rows], s[rows])
        times, w = Pair(s[rows], u[rows], t[rows]), weight[rows]
        loss = _role_loss(role, flow_map, teacher, average or flow_map, config, state, times, tokens[rows], w)
        noisy = w > 0
        total = total + loss.total
        sums[role] = torch.where(noisy, loss.values, 0.0).sum()
        counts[role] = noisy.sum().float()
        if loss.squared_error is not None:
            counted = noisy.any(1)
            errors, entropies = (
                ((value * noisy).sum(1) / noisy.sum(1))[counted] for value in (loss.squared_error, loss.values)
            )
            at = plan.times.t[rows, 0][counted]
    return BatchLoss(total, errors, at, entropies, torch.stack(sums), torch.stack(counts))


def _role_loss(
    role: int,
    flow_map: FlowMap,
    teacher: FlowMap | None,
    own: FlowMap,
    config: ObjectiveConfig,
    state: AnyState,
    times: Pair,
    tokens: Tensor,
    weight: Tensor,
) -> TokenLoss:
    guide = own if teacher is None else teacher
    if role == ANCHOR:
        return anchor(flow_map, guide, state, times, weight)
    if role == OFF_DIAGONAL_ROW:  # a base makes no jumps
        return OFF_DIAGONAL[config.loss](flow_map, own if config.loss == "psd" else guide, state, times, weight)
    if teacher is None:
        return endpoint_cross_entropy(flow_map, state, times.t, tokens, weight)
    return soft_cross_entropy(flow_map, teacher, state, times.t, weight)
