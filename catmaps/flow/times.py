"""Laws of time: where training draws t and (s, t), where the likelihood puts its samples, where samplers step.

A law is data: a distribution function tabulated on a grid of t. A new schedule is one function that returns a `Law`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

GRID = 8193  # nodes in t: the error of linear interpolation of the steepest warp (V = 200k) stays below 1e-5


@dataclass(frozen=True)
class Law:
    """A law of t on [0, 1] as a table: `t` and its distribution function `cdf`, fp64, both rising from 0 to 1.

    As a *clock* it maps t to tau = cdf(t); as a sampler it maps uniform q to t = quantile(q). Between nodes it is
    linear, hence `density` is exactly the derivative of `cdf`.
    """

    t: Float[Tensor, "n"]
    table: Float[Tensor, "n"]

    def __post_init__(self) -> None:
        rising = bool((self.table.diff() > 0).all()) and bool((self.t.diff() > 0).all())
        if not rising or abs(self.table[0].item()) > 1e-12 or abs(self.table[-1].item() - 1) > 1e-12:
            raise ValueError("a law of time needs a table that rises strictly from 0 to 1")

    @classmethod
    def from_cdf(cls, cdf: Callable[[Tensor], Tensor], nodes: int = GRID) -> "Law":
        """Tabulates a distribution function on [0, 1]; flat stretches get a slope of 1e-9 to be invertible."""
        t = torch.linspace(0, 1, nodes, dtype=torch.float64)
        table = cdf(t).double().cummax(0).values
        table = (table - table[0]) / (table[-1] - table[0])
        return cls(t, (1 - 1e-9) * table + 1e-9 * t)

    def _locate(self, knots: Tensor, values: Tensor) -> Tensor:
        # A small random draw is sorted into the table on the CPU or GPU that holds it; ends belong to the end cells.
        return (torch.searchsorted(knots, values.contiguous()) - 1).clamp(0, len(knots) - 2)

    def _interpolate(self, x: Tensor, from_: Tensor, to: Tensor) -> Tensor:
        from_, to = from_.to(x.device), to.to(x.device)
        wide = x.double()
        i = self._locate(from_, wide)
        share = (wide - from_[i]) / (from_[i + 1] - from_[i])
        return torch.lerp(to[i], to[i + 1], share).to(x.dtype)

    def cdf(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """tau(t) in [0, 1]."""
        return self._interpolate(t, self.t, self.table).clamp(0, 1)

    def quantile(self, q: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """t such that cdf(t) = q."""
        return self._interpolate(q, self.table, self.t).clamp(0, 1)

    def density(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """d cdf / dt, per unit of t."""
        knots, table = self.t.to(t.device), self.table.to(t.device)
        i = self._locate(knots, t.double())
        return ((table[i + 1] - table[i]) / (knots[i + 1] - knots[i])).to(t.dtype)

    def midpoint(self, s: Float[Tensor, "*shape"], t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The time halfway between s and t on this law's clock; strictly inside wherever s < t."""
        middle = self.quantile((self.cdf(s) + self.cdf(t)) / 2)
        # Where the clock is nearly flat rounding could return an end: fall back on the plain middle.
        return torch.where((middle > s) & (middle < t), middle, (s + t) / 2)


def uniform() -> Law:
    """t ~ U(0, 1)."""
    return Law.from_cdf(lambda t: t, nodes=2)


def logit_normal(mean: float = -0.4, std: float = 1.0) -> Law:
    """t = sigmoid(mean + std z), z ~ N(0, 1)."""
    if std <= 0:
        raise ValueError(f"logit_normal needs std > 0, not {std}")
    return Law.from_cdf(lambda t: torch.special.ndtr((torch.logit(t) - mean) / std))


def decoding_error(vocab_size: int) -> Law:
    """The clock of decoding errors: tau(t) = 1 - V/(V-1) P(argmax of a lone noisy one-hot is wrong), eq. (7).

    The error probability E_z[1 - Phi(z + u)^(V-1)], z ~ N(0, 1) and u = t/(1-t), is integrated by the trapezoidal rule
    over z in [-8.5, 8.5], which converges geometrically for this smooth integrand; powers are taken in logarithms, so
    that it holds to about 1e-12 for any V (checked to V = 200k).

    Source: FLM, arXiv:2602.16813; docs/maths.md eq. (7).
    """
    if vocab_size < 2:
        raise ValueError(f"a decoding-error clock needs a vocabulary of at least 2, not {vocab_size}")

    def cdf(t: Tensor) -> Tensor:
        z = torch.linspace(-8.5, 8.5, 401, dtype=torch.float64)
        weight = torch.exp(-z.square() / 2) * (z[1] - z[0]) / math.sqrt(2 * math.pi)
        u = (t / (1 - t).clamp_min(1e-12))[:, None]
        wrong = -torch.expm1((vocab_size - 1) * torch.special.log_ndtr(z + u))
        return 1 - vocab_size / (vocab_size - 1) * (wrong @ weight)

    return Law.from_cdf(cdf)


def mixture(parts: Sequence[tuple[float, Law]]) -> Law:
    """The mixture of laws with positive weights (normalised here)."""
    total = sum(weight for weight, _ in parts)
    if not parts or total <= 0 or any(weight < 0 for weight, _ in parts):
        raise ValueError("a mixture of laws needs non-negative weights with a positive sum")
    return Law.from_cdf(lambda t: sum((w / total * law.cdf(t) for w, law in parts), torch.zeros_like(t)))


def warp(vocab_size: int, uniform_share: float = 0.1) -> Law:
    """The default clock: 0.9 decoding-error warp + 0.1 uniform (resolution at both ends)."""
    return mixture([(1 - uniform_share, decoding_error(vocab_size)), (uniform_share, uniform())])


def information_uniform(clock: Law, information: Float[Tensor, "bins"], uniform_share: float = 0.1) -> Law:
    """The law under which every draw carries the same share of the likelihood bound.

    Args:
        clock: The clock whose unit interval is cut into equal bins.
        information: Mean of d NELBO / d tau in each bin, non-negative, any unit: u MSE du/dtau.
        uniform_share: Share of the clock's own law that is kept, so that no bin is starved.

    Source: docs/maths.md (b), "Optimal time law".
    """
    total = information.double().sum()
    if not torch.isfinite(total) or total <= 0:
        return clock
    bins = len(information)
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    mass = (1 - uniform_share) * information.double() / total + uniform_share / bins
    cumulative = torch.cat([torch.zeros(1, dtype=torch.float64), mass.cumsum(0)])
    in_tau = Law(edges, cumulative / cumulative[-1])
    return Law.from_cdf(lambda t: in_tau.cdf(clock.cdf(t)))


class Pair(NamedTuple):
    """Times of an off-diagonal pair, (B, 1) or (B, L) each: start s, middle u, end t; s = u = t where clean."""

    s: Float[Tensor, "b #l"]
    u: Float[Tensor, "b #l"]
    t: Float[Tensor, "b #l"]


def stratified(batch: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Float[Tensor, "{batch}"]:
    """One uniform draw in each of `batch` equal cells of [0, 1), in random order, from a rotation and a permutation."""
    shift = torch.rand((), generator=generator, dtype=torch.float64)
    order = torch.randperm(batch, generator=generator)
    below_one = 1 - torch.finfo(dtype).eps / 2  # rounding must not carry the last draw to t = 1
    return ((order + shift) / batch).to(dtype).clamp_max(below_one)


def pairs(
    clock: Law, gap: Float[Tensor, "b"], start: Float[Tensor, "b"], boundary: Float[Tensor, "b"], share: float
) -> Pair:
    """Pairs s < t in the clock: gap d = `gap`, s = start (1 - d) in tau; where `boundary` < share, (s, t) = (0, 1).

    All three arguments are uniform draws in [0, 1). Gaps are kept above 1/512 of the clock, so that s < u < t hold in
    fp32.

    Source: FLM, arXiv:2602.16813 (law of pairs); docs/maths.md (b).
    """
    whole = boundary < share
    gap = torch.where(whole, torch.ones_like(gap), gap.clamp_min(1 / 512))
    tau_s = torch.where(whole, torch.zeros_like(start), start * (1 - gap))
    s, t = clock.quantile(tau_s), clock.quantile((tau_s + gap).clamp_max(1))
    return Pair(s[:, None], clock.midpoint(s, t)[:, None], t[:, None])


def final_pairs(clock: Law, start: Float[Tensor, "b"]) -> Pair:
    """Jumps to the end, (s, 1): s at `start` of the clock, uniform in [0, 1), and at least 1/512 of it from the end."""
    s = clock.quantile(start.clamp_max(1 - 1 / 512))[:, None]
    t = torch.ones_like(s)
    return Pair(s, clock.midpoint(s, t), t)


LADDER = 6  # grids of 1, 2, 4, ..., 32 steps


def ladder_pairs(clock: Law, rung: Float[Tensor, "b"], place: Float[Tensor, "b"]) -> Pair:
    """Single steps of sampling grids (`grid`) of 1, 2, 4, ..., 32 steps, with the step's middle on the next finer grid.

    A map that is right on each rung, given the one below, samples in any of these numbers of calls. Arguments are
    uniform draws in [0, 1): which grid, and which of its steps.

    Source: the dyadic times of shortcut models, Frans et al. 2024, arXiv:2410.12557.
    """
    steps = (rung.double() * LADDER).floor().exp2()
    left = (place.double() * steps).floor()
    s, u, t = (clock.quantile((left + part) / steps).to(rung.dtype)[:, None] for part in (0.0, 0.5, 1.0))
    return Pair(s, u, t)


def grid(clock: Law, steps: int, bend: float = 1.0) -> Float[Tensor, "n"]:
    """Times 0 = t_0 < ... < t_steps = 1: equally spaced on the clock, or at (i / steps)^bend of it."""
    if steps < 1:
        raise ValueError(f"a sampler needs at least 1 step, not {steps}")
    times = clock.quantile(torch.linspace(0, 1, steps + 1, dtype=torch.float64) ** bend)
    times[0], times[-1] = 0.0, 1.0
    return times.float()
