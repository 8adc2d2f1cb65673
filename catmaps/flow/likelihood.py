"""How likely the base model finds a text: the semi-discrete bounds (14) and (15).

    -log p(x) <= int_0^umax u sum_l E||e_l - mu_l(x_t)||^2 du  +  sum_l E[-log mu_l(x_tmax)[x_l]],   u = t/(1-t)    (14)

The prior term is exactly zero and with the exact posterior the bound is an equality, for every text. It scores the
diagonal mu_{t,t} (sampled ancestrally); no tight bound is known for the deterministic few-step map. In (15) a multiple
of the cross-entropy stands for the squared error: simpler, and about twice as large.

`path_draws` and `end_draws` are single draws of the two terms, by row and token; the bounds are their means.

Source: Kingma et al. 2021, arXiv:2107.00630 (VDM); this path: docs/maths.md (f1), (f2), eqs. (14), (15).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from catmaps.flow.flow_map import Endpoint, FlowMap, positionwise
from catmaps.flow.interpolant import interpolate
from catmaps.flow.noise import Noise
from catmaps.flow.times import Law, information_uniform

CROSS_ENTROPY_FACTOR = 0.814529  # max over p of 2 (1 - p)^2 / (-ln p), at p = 0.28467: the best constant in (15)

Integrand = Callable[[Float[Tensor, "b l v"], Int[Tensor, "b l"]], Float[Tensor, "b l"]]
"""What (14) integrates over u du, by position, from log mu and the tokens."""


class Bound(NamedTuple):
    """An upper bound on -log p per sequence, nats, fp64, on the CPU."""

    nats: Float[Tensor, "b"]
    stderr: Float[Tensor, "b"]
    """Standard error of the Monte-Carlo mean."""
    per_token: Float[Tensor, "b l"]
    """What each position adds to `nats`; 0 at known ones."""


def squared_error(log_mu: Float[Tensor, "b l v"], tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b l"]:
    """||e - mu||^2 per position, without a one-hot: (1 - mu_x)^2 + sum of the other mu_k^2, each term exact near 0."""
    log_right = log_mu.gather(-1, tokens[..., None])
    others = log_mu.exp().scatter(-1, tokens[..., None], 0.0)  # 1 - 2 mu_x + sum mu^2 would cancel
    return torch.expm1(log_right).square()[..., 0] + others.square().sum(-1)


def capped_cross_entropy(log_mu: Float[Tensor, "b l v"], tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b l"]:
    """0.814529 (-log mu_x) >= ||e - mu||^2 per position: the integrand of the cross-entropy form (15)."""
    return -CROSS_ENTROPY_FACTOR * log_mu.gather(-1, tokens[..., None])[..., 0]


def projected_error(basis: Float[Tensor, "v d"]) -> Integrand:
    """||basis' (e - mu)||^2 per position: (14) for a model that sees only the projection of x onto `basis`.

    Such a model is a flow in d < V dimensions, whose bound counts the error in these alone. Its tokens come from the
    cross-entropy at t_max, which may have to be later than for a model that sees all of x. The bound does not hold if
    any output, for instance a skip from x to the logits, depends on the rest of x.

    Args:
        basis: Orthonormal columns that span what is seen, for h = x W those of W.

    Source: docs/maths.md (f1), "Projected form".
    """

    def integrand(log_mu: Tensor, tokens: Tensor) -> Tensor:
        # Small errors would cancel in basis[x] - mu @ basis: the token's own share is taken off first, by expm1.
        right = tokens[..., None]
        gap = log_mu.exp().scatter(-1, right, torch.expm1(log_mu.gather(-1, right)))  # mu - e
        return (gap @ basis.to(gap)).square().sum(-1)

    return integrand


def posterior(
    flow_map: FlowMap,
    tokens: Int[Tensor, "b l"],
    noise: Float[Tensor, "b l v"] | Noise,
    t: Float[Tensor, "b"],
    known: Bool[Tensor, "b l"] | None,
) -> Endpoint:
    """mu_{t,t}(x_t) on the path of `tokens` with this noise, known positions clean; one time t per row."""
    times = t.to(noise.dtype)[:, None]
    times = times if known is None else torch.where(known, 1.0, times)
    return flow_map.read(interpolate(tokens, noise, times), times, times)


def unless_known(values: Float[Tensor, "b l"], known: Bool[Tensor, "b l"] | None) -> Float[Tensor, "b l"]:
    """fp64, and 0 at known positions."""
    values = values.double()
    return values if known is None else values.masked_fill(known, 0.0)


@torch.no_grad()
def path_draws(
    flow_map: FlowMap,
    tokens: Int[Tensor, "b l"],
    place: Float[Tensor, "b"],
    law: Law,
    noise: Float[Tensor, "b l v"] | Noise,
    *,
    t_max: float = 0.9,
    known: Bool[Tensor, "b l"] | None = None,
    integrand: Integrand = squared_error,
) -> Float[Tensor, "b l"]:
    """One unbiased draw per row of the integral in (14) up to t_max, by token: u ||e - mu||^2 du/dq, one network call.

    Rows are independent of each other and may be any mixture of texts and samples. With `place` uniform in [0, 1) and
    standard normal noise the mean over draws is the integral, whatever the law.

    Args:
        flow_map: Only its diagonal is called.
        tokens: Ids in [0, V), (B, L).
        place: Position of each row's time in the law cut at t_max, [0, 1), fp64: t = quantile(place cdf(t_max)).
        law: Law of t; the best is proportional to u times the squared error (`information_uniform`).
        noise: x_0, whose dtype is the state's.
        t_max: Where the path is cut, in (0, 1); `end_draws` accounts for the rest.
        known: Positions given as clean text; they are not scored.
        integrand: `squared_error` for (14), `capped_cross_entropy` for (15), or `projected_error(basis)`.

    Returns:
        Nats by token, fp64; 0 at known positions.
    """
    cut = law.cdf(torch.tensor(t_max, dtype=torch.float64)).item()
    t = law.quantile(place.double() * cut).clamp_max(t_max)
    weight = t / (1 - t).pow(3) / law.density(t) * cut  # u du/dt over the density of the law that is cut
    endpoint = posterior(flow_map, tokens, noise, t, known)
    value = positionwise(endpoint, lambda log_mu, tile: integrand(log_mu, tile(tokens)))
    return weight[:, None] * unless_known(value, known)


@torch.no_grad()
def end_draws(
    flow_map: FlowMap,
    tokens: Int[Tensor, "b l"],
    noise: Float[Tensor, "b l v"] | Noise,
    *,
    t_max: float = 0.9,
    known: Bool[Tensor, "b l"] | None = None,
) -> Float[Tensor, "b l"]:
    """One draw per row of the cross-entropy at t_max, -log mu_l(x_tmax)[x_l], by token; arguments as `path_draws`.

    Returns:
        Nats by token, fp64; 0 at known positions.
    """
    t = torch.full((len(tokens),), t_max, dtype=torch.float64, device=tokens.device)
    endpoint = posterior(flow_map, tokens, noise, t, known)
    value = positionwise(endpoint, lambda log_mu, tile: -log_mu.gather(-1, tile(tokens)[..., None])[..., 0])
    return unless_known(value, known)


@torch.no_grad()
def nelbo(
    flow_map: FlowMap,
    tokens: Int[Tensor, "b l"],
    law: Law,
    *,
    num_samples: int = 16,
    t_max: float = 0.9,
    known: Bool[Tensor, "b l"] | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    common: bool = False,
    integrand: Integrand = squared_error,
) -> Bound:
    """Monte-Carlo estimate of the bound (14), or with another integrand (15), for each sequence.

    Times are drawn from `law` cut at `t_max`, one in each of `num_samples` equal cells of its distribution function
    (stratified), and weighted by u du/dt over the law's density. If 4 divides `num_samples`, neighbouring cells share
    their noise with opposite signs, which is as unbiased. The remaining path beyond `t_max` is replaced by the
    cross-entropy there, which keeps the bound valid for any t_max.

    Args:
        flow_map: Only its diagonal is called, `num_samples` + 2 times.
        tokens: Ids in [0, V), (B, L).
        law: Law of t; any is unbiased, `pilot` finds a good one.
        num_samples: Draws per sequence, at least 2.
        t_max: Where the path is cut, in (0, 1).
        known: Positions given as clean text; the bound is then conditional on them (and on the length) and sums
            over the others only.
        generator: Source of randomness, on the tokens' device; the global one if None.
        dtype: Of the noise and of the state.
        common: All rows share times and noise: differences between texts are then less noisy than the texts.
        integrand: As in `path_draws`.

    Returns:
        Nats per sequence; divide by the number of scored positions times ln 2 for bits per token. The standard error
        compares neighbouring cells, or pairs of them, hence is an upper estimate in the mean.

    Raises:
        ValueError: num_samples < 2 or t_max outside (0, 1).
    """
    if num_samples < 2 or not 0 < t_max < 1:
        raise ValueError(f"nelbo needs num_samples >= 2 and 0 < t_max < 1, not {num_samples} and {t_max}")
    rows = len(tokens)

    def noise() -> Tensor | Noise:
        return flow_map.random_noise(tokens.shape, generator, dtype, tokens.device, common)

    draws, rest, drawn = [], [], noise()
    mirrored = num_samples % 4 == 0
    for i in range(num_samples):
        place = torch.rand(1 if common else rows, generator=generator, dtype=torch.float64, device=tokens.device)
        place = ((i + place) / num_samples).expand(rows)
        draws.append(
            path_draws(flow_map, tokens, place, law, drawn, t_max=t_max, known=known, integrand=integrand).cpu()
        )
        drawn = -drawn if mirrored and i % 2 == 0 else noise()
    for _ in range(2):  # two draws: the end's noise belongs to the standard error
        rest.append(end_draws(flow_map, tokens, noise(), t_max=t_max, known=known).cpu())
    path, end = torch.stack(draws), torch.stack(rest)
    per_token, sums = path.mean(0) + end.mean(0), path.sum(2)
    independent = sums.unflatten(0, (-1, 2)).mean(1) if mirrored else sums
    variance = stratified_variance(independent) + end.sum(2).var(0) / 2
    return Bound(per_token.sum(1), variance.sqrt(), per_token)


def stratified_variance(draws: Float[Tensor, "n b"]) -> Float[Tensor, "b"]:
    """Variance of each row's mean of one draw per cell, from the spread within pairs of neighbouring cells.

    The means of two neighbours may differ, so it is an upper estimate. From 8 rows on, the trend over cells that rows
    have in common, in proportion to their means, is taken off first; it is no error. Three of an odd number stay
    together.
    """
    rows = draws.shape[1]
    if rows >= 8:
        trend, scale = draws.mean(1, keepdim=True), draws.mean(0) / draws.mean()
        draws = (draws - trend * scale.nan_to_num(0.0)) * (rows / (rows - 1)) ** 0.5
    spread = torch.stack([len(group) * group.var(0) for group in draws.tensor_split(len(draws) // 2)])
    return spread.sum(0) / len(draws) ** 2


@torch.no_grad()
def pilot(
    flow_map: FlowMap,
    tokens: Int[Tensor, "b l"],
    clock: Law,
    *,
    num_samples: int = 16,
    bins: int = 24,
    t_max: float = 0.9,
    known: Bool[Tensor, "b l"] | None = None,
    generator: torch.Generator | None = None,
    integrand: Integrand = squared_error,
) -> Law:
    """The law of t under which a bound from `num_samples` stratified draws varies little.

    One draw varies least if the density follows the root mean square of u times the summed integrand. Stratified draws
    hardly feel how its mean changes with t, since each cell is narrow, and many of them vary least if the density
    follows the noise alone, so with n draws it is sqrt(noise variance + min(1, 2/n)^2 (mean square - noise variance)).
    A tenth stays the clock's, so that rare errors at late times are not starved. The bound is unbiased whatever the
    pilot saw.

    Args:
        flow_map: Only its diagonal is called, 2 `bins` times.
        tokens: A few dozen texts like those to be scored, (B, L).
        clock: Whose unit interval, cut at `t_max`, is divided into bins.
        num_samples: Draws per text that the law is for; 1 for single ones.
        bins: How many.
        t_max: As in `nelbo`.
        known: As in `nelbo`.
        generator: Source of randomness; the global one if None.
        integrand: As in `path_draws`.

    Source: docs/maths.md (b), "Optimal time law"; (f1), "Laws and pilots".
    """
    rows = len(tokens)
    share, strength = min(1.0, 2 / num_samples) ** 2, torch.zeros(bins, dtype=torch.float64)
    for i in range(bins):
        place = (i + torch.rand(rows, generator=generator, dtype=torch.float64, device=tokens.device)) / bins
        noises = (flow_map.random_noise(tokens.shape, generator, device=tokens.device) for _ in range(2))
        pair = torch.stack(
            [
                path_draws(flow_map, tokens, place, clock, noise, t_max=t_max, known=known, integrand=integrand).sum(1)
                for noise in noises
            ]
        )
        noise_variance = pair.var(0).mean()
        rest = (pair.square().mean() - noise_variance).clamp_min(0)
        strength[i] = (noise_variance + share * rest).sqrt().cpu()
    cut = clock.cdf(torch.tensor(t_max, dtype=torch.float64))
    return information_uniform(Law.from_cdf(lambda t: (clock.cdf(t) / cut).clamp_max(1)), strength)
