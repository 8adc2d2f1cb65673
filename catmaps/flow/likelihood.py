"""How likely the base model finds a text: the semi-discrete bound (14).

    -log p(x) <= int_0^umax u sum_l E||e_l - mu_l(x_t)||^2 du  +  sum_l E[-log mu_l(x_tmax)[x_l]],   u = t/(1-t).

The prior term is exactly zero and with the exact posterior the bound is an equality, for every text. It scores the
diagonal mu_{t,t} (sampled ancestrally); no tight bound is known for the deterministic few-step map.

Source: Kingma et al. 2021, arXiv:2107.00630 (VDM); this path: docs/maths.md (f1), eq. (14).
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from catmaps.flow.flow_map import FlowMap
from catmaps.flow.interpolant import interpolate
from catmaps.flow.times import Law


class Bound(NamedTuple):
    """An upper bound on -log p per sequence, nats, and the standard error of its Monte-Carlo mean."""

    nats: Float[Tensor, "b"]
    stderr: Float[Tensor, "b"]


def squared_error(log_mu: Float[Tensor, "b l v"], tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b l"]:
    """||e - mu||^2 per position, without a one-hot: (1 - mu_x)^2 + sum of the other mu_k^2, each term exact near 0."""
    log_right = log_mu.gather(-1, tokens[..., None])
    others = log_mu.exp().scatter(-1, tokens[..., None], 0.0)  # 1 - 2 mu_x + sum mu^2 would cancel
    return torch.expm1(log_right).square()[..., 0] + others.square().sum(-1)


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
) -> Bound:
    """Monte-Carlo estimate of the bound (14) for each sequence.

    Times are drawn from `law` cut at `t_max`, one in each of `num_samples` equal cells of its distribution function
    (stratified), and weighted by u du/dt over the law's density. The remaining path beyond `t_max` is replaced by the
    cross-entropy there, which keeps the bound valid for any t_max.

    Args:
        flow_map: Only its diagonal is called, `num_samples` + 2 times.
        tokens: Ids in [0, V), (B, L).
        law: Law of t; the best is proportional to u times the squared error (`information_uniform`).
        num_samples: Draws per sequence, at least 2.
        t_max: Where the path is cut, in (0, 1).
        known: Positions given as clean text; the bound is then conditional on them (and on the length) and sums
            over the others only.
        generator: Source of randomness, on the tokens' device; the global one if None.
        dtype: Of the noise and of the state.

    Returns:
        Nats per sequence, (B,); divide by the number of scored positions times ln 2 for bits per token. The standard
        error treats the stratified draws as independent, hence is an upper estimate.

    Raises:
        ValueError: num_samples < 2 or t_max outside (0, 1).
    """
    if num_samples < 2 or not 0 < t_max < 1:
        raise ValueError(f"nelbo needs num_samples >= 2 and 0 < t_max < 1, not {num_samples} and {t_max}")
    batch, length = tokens.shape
    scored = torch.ones_like(tokens, dtype=torch.bool) if known is None else ~known
    cut = law.cdf(torch.tensor(t_max, dtype=torch.float64)).item()

    def log_posterior(t: Tensor) -> Tensor:
        times = t[:, None] if known is None else torch.where(known, 1.0, t[:, None])
        shape = (batch, length, flow_map.denoiser.vocab_size)
        noise = torch.randn(shape, generator=generator, dtype=dtype, device=tokens.device)
        return flow_map.log_endpoint(interpolate(tokens, noise, times), times, times)

    draws = torch.empty(num_samples, batch, dtype=torch.float64)
    for i in range(num_samples):
        place = torch.rand(batch, generator=generator, dtype=torch.float64, device=tokens.device)
        q = (i + place) / num_samples * cut
        t = law.quantile(q).clamp_max(t_max)
        rate = t / (1 - t).pow(3)  # u du/dt
        error = (squared_error(log_posterior(t.to(dtype)), tokens) * scored).sum(-1)
        draws[i] = (rate / law.density(t) * cut * error.double()).cpu()
    rest = torch.empty(2, batch, dtype=torch.float64)  # two draws: the end's noise belongs to the standard error
    for i in range(2):
        log_mu = log_posterior(torch.full((batch,), t_max, dtype=dtype, device=tokens.device))
        rest[i] = -(log_mu.gather(-1, tokens[..., None])[..., 0] * scored).sum(-1).double().cpu()
    variance = draws.var(0) / num_samples + rest.var(0) / 2
    return Bound(draws.mean(0) + rest.mean(0), variance.sqrt())
