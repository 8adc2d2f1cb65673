"""Losses per position. Each takes a `weight` (mask x time weight / global token count, so that weighted sums over all
processes add up to the mean) and returns the differentiable weighted sum and detached per-position values in nats.

An off-diagonal loss is one function (flow_map, teacher, state, times, weight) -> TokenLoss; to add one, write it here
and enter it in OFF_DIAGONAL. `teacher` supplies targets: diagonal posteriors, of the frozen base or of the map itself,
and to `psd` jumps, of the map itself or of its moving average. It makes its network calls first; an inner function then
gives the loss of a tile of positions, of which `tile` cuts what it needs, and `weighted_sum` adds up tiles.

Times satisfy s < u < t wherever weight > 0. They are not checked here: reading them would stall an accelerator.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from catmaps.flow.cross_entropy import cross_entropy
from catmaps.flow.flow_map import Endpoint, FlowMap
from catmaps.flow.interpolant import AnyState, advance, move, step_fraction
from catmaps.flow.reduction import TokenLoss, weighted_sum
from catmaps.flow.times import Pair
from catmaps.tiles import MovingReadout, Readout, Tile, fused

RATIO_FLOOR = 1e-2
"""Floor of the targets of `lsd_kl` and `esd` as a share of the map, which an exact map equals."""


def _shifted(logits: Tensor) -> Tensor:
    """Logits with largest 0."""
    return logits - logits.amax(-1, keepdim=True).detach()


# Written so that forward and backward are sums over the vocabulary with one exponential an entry, and a compiler need
# write out no tensor of that size but the gradient: no scatter, no second pass for a normaliser.


def endpoint_cross_entropy(
    flow_map: FlowMap,
    state: AnyState,
    t: Float[Tensor, "b #l"],
    tokens: Int[Tensor, "b l"],
    weight: Float[Tensor, "b l"],
) -> TokenLoss:
    """-log mu_{t,t}(x_t)[token]: the base loss. Its minimiser is the exact posterior for any positive weight.

    Source: Roos et al. 2026, arXiv:2602.12233; docs/maths.md (b).
    """

    def work(now: Any, tile: Tile) -> tuple[Tensor, Tensor | None]:
        return cross_entropy(now.readout, tile(tokens))

    return weighted_sum(work, flow_map.read(state, t, t), weight)


def _kl_to(target: Tensor, logits: Tensor) -> Tensor:
    """KL(target || mu) for a target that sums to 1, from `_shifted` logits of mu."""
    target = target.detach()
    return logits.exp().sum(-1).log() - (torch.special.entr(target) + target * logits).sum(-1)


@fused
def _kl(target: Readout, now: Readout) -> Tensor:
    return _kl_to(target.logits().softmax(-1), _shifted(now.logits()))


def soft_cross_entropy(
    flow_map: FlowMap, teacher: FlowMap, state: AnyState, t: Float[Tensor, "b #l"], weight: Float[Tensor, "b l"]
) -> TokenLoss:
    """KL(teacher's mu_{t,t} || mu_{t,t}): holds the diagonal of a map to the frozen base, without sampling noise."""
    with torch.no_grad():
        target = teacher.read(state, t, t)

    def work(now: Any, tile: Tile) -> tuple[Tensor, Tensor | None]:
        return _kl(tile(target).readout, now.readout), None

    return weighted_sum(work, flow_map.read(state, t, t), weight)


def _first_share(times: Pair) -> Float[Tensor, "b #l"]:
    """The weight a of the first jump in the semigroup, eq. (10)."""
    s, u, t = times
    gap = torch.where(t > s, t - s, torch.ones_like(s))
    return ((u - s) * (1 - t) / (gap * (1 - u).clamp_min(torch.finfo(u.dtype).tiny))).clamp(0, 1)


@fused
def _kl_of_mixture(first: Readout, second: Readout, share: Tensor, now: Readout) -> Tensor:
    one, other = first.logits().softmax(-1), second.logits().softmax(-1)
    return _kl_to(torch.lerp(other, one, share[..., None].to(one.dtype)), _shifted(now.logits()))


def _towards(
    flow_map: FlowMap, state: AnyState, first: Endpoint, second: Endpoint, times: Pair, weight: Tensor
) -> TokenLoss:
    """KL from the mixture a first + (1 - a) second of (10) to mu_{s,t}."""
    share = _first_share(times)

    def work(now: Any, tile: Tile) -> tuple[Tensor, Tensor | None]:
        return _kl_of_mixture(tile(first).readout, tile(second).readout, tile(share), now.readout), None

    return weighted_sum(work, flow_map.read(state, times.s, times.t), weight)


def psd(flow_map: FlowMap, teacher: FlowMap, state: AnyState, times: Pair, weight: Float[Tensor, "b l"]) -> TokenLoss:
    """Progressive self-distillation in KL form: two short jumps teach one long one.

        mu_{s,t}(x) = a mu_{s,u}(x) + (1 - a) mu_{u,t}(X_{s,u}(x)),   a = (u-s)(1-t) / ((t-s)(1-u)),            (10)

    a convex mixture, hence a valid soft target. Both jumps are the teacher's, without gradient: `flow_map`'s own, or
    its moving average's. Any semigroup satisfies (10): `anchor` must tie the map to the flow.

    Source: DFM, arXiv:2604.09784, eqs. 23-27; docs/maths.md (c3).
    """
    s, u, t = times
    with torch.no_grad():
        first = teacher.read(state, s, u)
        second = teacher.read(advance(state, first, step_fraction(s, u)), u, t)
    return _towards(flow_map, state, first, second, times, weight)


def anchor(
    flow_map: FlowMap, teacher: FlowMap, state: AnyState, times: Pair, weight: Float[Tensor, "b l"]
) -> TokenLoss:
    """KL of short jumps against two solver steps of the frozen base, s -> u -> t: continuity at s = t.

    The same average (10) with the teacher's diagonal, mu_{s,u} ~ mu_{s,s} and mu_{u,t} ~ mu_{u,u}. Its bias vanishes
    with the gap.

    Source: docs/maths.md (c3), "Anchor it".
    """
    s, u, _ = times
    with torch.no_grad():
        first = teacher.read(state, s, s)
        second = teacher.read(advance(state, first, step_fraction(s, u)), u, u)
    return _towards(flow_map, state, first, second, times, weight)


def _along_t(times: Pair) -> tuple[Tensor, Tensor]:
    """Tangent (ds, dt) = (0, 1), and 0 where a position is clean."""
    moving = (times.t > times.s).to(times.t.dtype)
    return torch.zeros_like(moving), moving


def _moving(now: MovingReadout) -> tuple[Tensor, Tensor, Tensor]:
    """`_shifted` logits, mu, and d mu = mu (dz - <mu, dz>)."""
    logits, rate = now.logits()
    logits = _shifted(logits)
    weight = logits.exp()
    total = weight.sum(-1, keepdim=True)
    mean = (weight * rate).sum(-1, keepdim=True) / total
    mu = weight / total
    return logits, mu, mu * (rate - mean)


@fused
def _lagrangian(now: MovingReadout, target: Readout, factor: Tensor) -> Tensor:
    _, mu, rate = _moving(now)
    return (mu - target.logits().softmax(-1) + factor[..., None] * rate).square().sum(-1)


def lsd(flow_map: FlowMap, teacher: FlowMap, state: AnyState, times: Pair, weight: Float[Tensor, "b l"]) -> TokenLoss:
    """Lagrangian self-distillation: squared norm over the vocabulary of

        mu_{s,t}(x) - mu_{t,t}(X_{s,t}(x)) + (1 - t) gamma d/dt mu_{s,t}(x) = 0,                                 (8)

    which is d/dt X = v_t(X) times (1 - t), free of divisions. Only the middle term, the teacher, is held fixed.

    Source: Boffi et al. 2025, arXiv:2505.18825 (LSD); docs/maths.md (c1).
    """
    s, _, t = times
    ds, dt = _along_t(times)
    now, gamma = flow_map.read_with_tangent(state, s, t, ds=ds, dt=dt), step_fraction(s, t)
    with torch.no_grad():
        target = teacher.read(advance(state, now.still(), gamma), t, t)

    def work(now: Any, tile: Tile) -> tuple[Tensor, Tensor | None]:
        return _lagrangian(now.readout, tile(target).readout, tile((1 - t) * gamma)), None

    return weighted_sum(work, now, weight)


@fused
def _lagrangian_step(along: MovingReadout, ahead: Readout, factor: Tensor, now: Readout) -> Tensor:
    _, mu, rate = _moving(along)
    target = (ahead.logits().softmax(-1) - factor[..., None] * rate).maximum(RATIO_FLOOR * mu)
    return _kl_to(target / target.sum(-1, keepdim=True), _shifted(now.logits()))


def lsd_kl(
    flow_map: FlowMap, teacher: FlowMap, state: AnyState, times: Pair, weight: Float[Tensor, "b l"]
) -> TokenLoss:
    """Lagrangian self-distillation in KL form: the target is (8) solved for its first term,

        mu_{t,t}(X_{s,t}(x)) - (1 - t) gamma d/dt mu_{s,t}(x),

    floored at a small share of mu_{s,t}, where no exact map is. It carries no gradient: no pass goes back through the
    tangent. As a quotient, (11), it would divide by mu_{t,t} / mu_{s,t}, which is as small as can be at exact maps.

    Source: DFM, arXiv:2604.09784 (the quotient); docs/maths.md (c4).
    """
    s, _, t = times
    ds, dt = _along_t(times)
    gamma = step_fraction(s, t)
    with torch.no_grad():
        along = flow_map.read_with_tangent(state, s, t, ds=ds, dt=dt)
        ahead = teacher.read(advance(state, along.still(), gamma), t, t)

    def work(now: Any, tile: Tile) -> tuple[Tensor, Tensor | None]:
        return _lagrangian_step(tile(along).readout, tile(ahead).readout, tile((1 - t) * gamma), now.readout), None

    return weighted_sum(work, flow_map.read(state, s, t), weight)


@fused
def _consistency(now: MovingReadout, target: Readout, factor: Tensor) -> Tensor:
    logits, _, rate = _moving(now)
    return 2 * _kl_to(target.logits().softmax(-1), logits) + 2 * factor * rate.square().sum(-1)


def ecld(flow_map: FlowMap, teacher: FlowMap, state: AnyState, times: Pair, weight: Float[Tensor, "b l"]) -> TokenLoss:
    """Endpoint-consistency distillation: the cross-entropy bound on the Lagrangian residual of (8),

        2 KL(mu_{t,t}(X) || mu_{s,t}) + 2 (1 - t)^2 gamma^2 ||d/dt mu_{s,t}||^2.                                 (9)

    Constants 2 and 2 are valid because ||p - q||^2 <= KL(p || q) for distributions; the paper's 4 and 2 are looser. The
    bound's minimum is *biased* unless d/dt mu = 0: a warm-up or a regulariser rather than a fixed point.

    Source: Roos et al. 2026, arXiv:2602.12233; docs/maths.md (c2).
    """
    s, _, t = times
    ds, dt = _along_t(times)
    now, gamma = flow_map.read_with_tangent(state, s, t, ds=ds, dt=dt), step_fraction(s, t)
    with torch.no_grad():
        target = teacher.read(advance(state, now.still(), gamma), t, t)

    def work(now: Any, tile: Tile) -> tuple[Tensor, Tensor | None]:
        return _consistency(now.readout, tile(target).readout, tile(((1 - t) * gamma).square())), None

    return weighted_sum(work, now, weight)


@fused
def _eulerian(along: MovingReadout, base: Readout, shares: tuple[Tensor, Tensor], now: Readout) -> Tensor:
    _, mu, rate = _moving(along)
    residual = shares[0][..., None] * (mu - base.logits().softmax(-1)) - shares[1][..., None] * rate
    target = (mu - residual).maximum(RATIO_FLOOR * mu)
    return _kl_to(target / target.sum(-1, keepdim=True), _shifted(now.logits()))


def esd(flow_map: FlowMap, teacher: FlowMap, state: AnyState, times: Pair, weight: Float[Tensor, "b l"]) -> TokenLoss:
    """Eulerian self-distillation in KL form: moving the start along the flow does not move where the map leads.

    With D = d/ds along the flow (dx = v_s(x)) an exact map has

        r = (1 - t) (mu_{s,t} - mu_{s,s}) - (1 - s)(t - s) D mu_{s,t} = 0,                                      (12)

    and the target is the step mu_{s,t} - r of the residual's fixed-point iteration, floored at a small share of
    mu_{s,t}, where no exact map is. Target and tangent carry no gradient. Written as the quotient mu_{s,s} /
    (1 - t - (1 - s)(t - s) D log mu_{s,t}) the same identity is 0 / 0 at t = 1 and teaches nothing there.

    Source: DFM, arXiv:2604.09784, eq. 43 (the quotient); docs/maths.md (c5).
    """
    s, _, t = times
    with torch.no_grad():
        base = teacher.read(state, s, s)
        moving = (t > s).to(s.dtype)
        rest = torch.where(t > s, 1 - s, torch.ones_like(s))
        drift = move(state, base, (moving / rest).expand(weight.shape))
        along = flow_map.read_with_tangent(state, s, t, ds=moving, dt=torch.zeros_like(t), dx=drift)

    def work(now: Any, tile: Tile) -> tuple[Tensor, Tensor | None]:
        shares = tile(1 - t), tile((1 - s) * (t - s))
        return _eulerian(tile(along).readout, tile(base).readout, shares, now.readout), None

    return weighted_sum(work, flow_map.read(state, s, t), weight)


OffDiagonalLoss = Callable[[FlowMap, FlowMap, AnyState, Pair, Float[Tensor, "b l"]], TokenLoss]
OFF_DIAGONAL: dict[str, OffDiagonalLoss] = {"psd": psd, "lsd": lsd, "lsd_kl": lsd_kl, "esd": esd, "ecld": ecld}
LAGRANGIAN = frozenset({"lsd", "lsd_kl", "ecld"})
"""Losses on (8), which learn from d/dt mu. At t = 1 its factor 1 - t is zero and they ask for any one-hot: a map taught
there forgets the flow, so `objective` gives them pairs with t < 1."""
