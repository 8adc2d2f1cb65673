"""Losses per position. Each takes a `weight` (mask x time weight / global token count, so that weighted sums over all
processes add up to the mean) and returns the differentiable weighted sum and detached per-position values in nats.

An off-diagonal loss is one function (flow_map, teacher, state, times, weight) -> TokenLoss; to add one, write it here
and enter it in OFF_DIAGONAL. `teacher` supplies diagonal posteriors: the frozen base, or the map itself.

Times satisfy s < u < t wherever weight > 0. They are not checked here: reading them would stall an accelerator.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from catmaps.flow.flow_map import FlowMap, kl_divergence
from catmaps.flow.interpolant import State, advance, move, step_fraction
from catmaps.flow.times import Pair

RATIO_FLOOR = 1e-2  # floor of the target of (12), as a share of the map; at an exact map they are equal


class TokenLoss(NamedTuple):
    """A loss to differentiate (nats) and what it was at every position, detached."""

    total: Float[Tensor, ""]
    values: Float[Tensor, "b l"]
    squared_error: Float[Tensor, "b l"] | None = None
    """||e - mu||^2 where the loss knows the token: the integrand of the likelihood bound (14)."""


def _weighted(values: Tensor, weight: Tensor, squared_error: Tensor | None = None) -> TokenLoss:
    # A position without weight must not bring its NaN or infinity along: 0 * inf is NaN.
    total = torch.where(weight > 0, values * weight, torch.zeros_like(values)).sum()
    return TokenLoss(total, values.detach(), squared_error)


def endpoint_cross_entropy(
    flow_map: FlowMap,
    state: State,
    t: Float[Tensor, "b #l"],
    tokens: Int[Tensor, "b l"],
    weight: Float[Tensor, "b l"],
) -> TokenLoss:
    """-log mu_{t,t}(x_t)[token]: the base loss. Its minimiser is the exact posterior for any positive weight.

    Source: Roos et al. 2026, arXiv:2602.12233; docs/maths.md (b).
    """
    log_mu = flow_map.log_endpoint(state, t, t)
    log_right = log_mu.gather(-1, tokens[..., None])[..., 0]
    with torch.no_grad():
        mu = log_mu.exp()
        square = 1 - 2 * log_right.exp() + mu.square().sum(-1)
    return _weighted(-log_right, weight, square)


def soft_cross_entropy(
    flow_map: FlowMap, teacher: FlowMap, state: State, t: Float[Tensor, "b #l"], weight: Float[Tensor, "b l"]
) -> TokenLoss:
    """KL(teacher's mu_{t,t} || mu_{t,t}): holds the diagonal of a map to the frozen base, without sampling noise."""
    with torch.no_grad():
        target = teacher.endpoint(state, t, t)
    return _weighted(kl_divergence(target, flow_map.log_endpoint(state, t, t)), weight)


def _average(first: Tensor, second: Tensor, times: Pair) -> Tensor:
    """a first + (1 - a) second with the weights of the semigroup, eq. (10)."""
    s, u, t = times
    gap = torch.where(t > s, t - s, torch.ones_like(s))
    share = ((u - s) * (1 - t) / (gap * (1 - u).clamp_min(torch.finfo(u.dtype).tiny))).clamp(0, 1)
    return torch.lerp(second, first, share[..., None].to(first.dtype))


def psd(flow_map: FlowMap, teacher: FlowMap, state: State, times: Pair, weight: Float[Tensor, "b l"]) -> TokenLoss:
    """Progressive self-distillation in KL form: two short jumps teach one long one.

        mu_{s,t}(x) = a mu_{s,u}(x) + (1 - a) mu_{u,t}(X_{s,u}(x)),   a = (u-s)(1-t) / ((t-s)(1-u)),            (10)

    a convex mixture, hence a valid soft target. Targets come from the map itself without gradient. Any semigroup
    satisfies (10): `anchor` must tie the map to the flow.

    Source: DFM, arXiv:2604.09784, eqs. 23-27; docs/maths.md (c3).
    """
    del teacher
    s, u, t = times
    with torch.no_grad():
        first = flow_map.endpoint(state, s, u)
        second = flow_map.endpoint(advance(state, first, step_fraction(s, u)), u, t)
        target = _average(first, second, times)
    return _weighted(kl_divergence(target, flow_map.log_endpoint(state, s, t)), weight)


def anchor(flow_map: FlowMap, teacher: FlowMap, state: State, times: Pair, weight: Float[Tensor, "b l"]) -> TokenLoss:
    """KL of short jumps against two solver steps of the frozen base, s -> u -> t: continuity at s = t.

    The same average (10) with the teacher's diagonal, mu_{s,u} ~ mu_{s,s} and mu_{u,t} ~ mu_{u,u}. Its bias vanishes
    with the gap.

    Source: docs/maths.md (c3), "Anchor it".
    """
    s, u, t = times
    with torch.no_grad():
        first = teacher.endpoint(state, s, s)
        second = teacher.endpoint(advance(state, first, step_fraction(s, u)), u, u)
        target = _average(first, second, times)
    return _weighted(kl_divergence(target, flow_map.log_endpoint(state, s, t)), weight)


def _along_t(times: Pair) -> tuple[Tensor, Tensor]:
    """Tangent (ds, dt) = (0, 1), and 0 where a position is clean."""
    moving = (times.t > times.s).to(times.t.dtype)
    return torch.zeros_like(moving), moving


def lsd(flow_map: FlowMap, teacher: FlowMap, state: State, times: Pair, weight: Float[Tensor, "b l"]) -> TokenLoss:
    """Lagrangian self-distillation: squared norm over the vocabulary of

        mu_{s,t}(x) - mu_{t,t}(X_{s,t}(x)) + (1 - t) gamma d/dt mu_{s,t}(x) = 0,                                 (8)

    which is d/dt X = v_t(X) times (1 - t), free of divisions. Only the middle term, the teacher, is held fixed.

    Source: Boffi et al. 2025, arXiv:2505.18825 (LSD); docs/maths.md (c1).
    """
    s, _, t = times
    ds, dt = _along_t(times)
    now = flow_map.endpoint_with_tangent(state, s, t, ds=ds, dt=dt)
    gamma = step_fraction(s, t)
    with torch.no_grad():
        target = teacher.endpoint(advance(state, now.endpoint, gamma), t, t)
    residual = now.endpoint - target + ((1 - t) * gamma)[..., None] * now.endpoint_rate
    return _weighted(residual.square().sum(-1), weight)


def ecld(flow_map: FlowMap, teacher: FlowMap, state: State, times: Pair, weight: Float[Tensor, "b l"]) -> TokenLoss:
    """Endpoint-consistency distillation: the cross-entropy bound on the Lagrangian residual of (8),

        2 KL(mu_{t,t}(X) || mu_{s,t}) + 2 (1 - t)^2 gamma^2 ||d/dt mu_{s,t}||^2.                                 (9)

    Constants 2 and 2 are valid because ||p - q||^2 <= KL(p || q) for distributions; the paper's 4 and 2 are looser. The
    bound's minimum is *biased* unless d/dt mu = 0: a warm-up or a regulariser rather than a fixed point.

    Source: Roos et al. 2026, arXiv:2602.12233; docs/maths.md (c2).
    """
    s, _, t = times
    ds, dt = _along_t(times)
    now = flow_map.endpoint_with_tangent(state, s, t, ds=ds, dt=dt)
    gamma = step_fraction(s, t)
    with torch.no_grad():
        target = teacher.endpoint(advance(state, now.endpoint, gamma), t, t)
    energy = ((1 - t) * gamma).square() * now.endpoint_rate.square().sum(-1)
    return _weighted(2 * kl_divergence(target, now.log_endpoint) + 2 * energy, weight)


def esd(flow_map: FlowMap, teacher: FlowMap, state: State, times: Pair, weight: Float[Tensor, "b l"]) -> TokenLoss:
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
        base = teacher.endpoint(state, s, s)
        moving = (t > s).to(s.dtype)
        rest = torch.where(t > s, 1 - s, torch.ones_like(s))
        drift = move(state, base, (moving / rest).expand(weight.shape))
        now = flow_map.endpoint_with_tangent(state, s, t, ds=moving, dt=torch.zeros_like(t), dx=drift)
        residual = (1 - t)[..., None] * (now.endpoint - base) - ((1 - s) * (t - s))[..., None] * now.endpoint_rate
        target = (now.endpoint - residual).maximum(RATIO_FLOOR * now.endpoint)
        target = target / target.sum(-1, keepdim=True)
    return _weighted(kl_divergence(target, flow_map.log_endpoint(state, s, t)), weight)


OffDiagonalLoss = Callable[[FlowMap, FlowMap, State, Pair, Float[Tensor, "b l"]], TokenLoss]
OFF_DIAGONAL: dict[str, OffDiagonalLoss] = {"psd": psd, "lsd": lsd, "esd": esd, "ecld": ecld}
LAGRANGIAN = frozenset({"lsd", "ecld"})
"""Losses on (8), which learn from d/dt mu. At t = 1 its factor 1 - t is zero and they ask for any one-hot: a map taught
there forgets the flow, so `objective` gives them pairs with t < 1."""
