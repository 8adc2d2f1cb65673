"""How likely few ancestral steps of the base make a text: the bound (16), and time grids that are good for it.

The sampler `localisation` on a grid 0 = t_0 < ... < t_N = 1 calls the network N times, at t_0 ... t_{N-1}. A step draws
a token k ~ mu(Y_i) and Y_{i+1} = Y_i + D_i e_k + sqrt(D_i) noise, with Y = x t / (1 - t)^2 and D_i = SNR_{i+1} - SNR_i;
the last one returns the tokens drawn. So a step's law is a mixture of V Gaussians, and

    -log p_N(x) <= sum_i sum_l E[-log sum_k mu_{l,k}(Y_i) exp(d_{l,k} - d_{l,x_l})], d = D_i e_x + sqrt(D_i) noise, (16)

where the last step, D = inf, is its cross-entropy. It measures the diagonal: a two-time endpoint keeps (16) valid but
makes it diverge as the map becomes exact, since mu_{0,1} is then one-hot and knows nothing of the text.

Source: docs/maths.md (f1b), eq. (16).
"""

from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from catmaps.flow.flow_map import Endpoint, FlowMap, positionwise
from catmaps.flow.interpolant import root_snr
from catmaps.flow.likelihood import Bound, posterior, unless_known
from catmaps.flow.noise import Noise
from catmaps.flow.times import Law, grid
from catmaps.tiles import Tile, over_tiles


def step_cost(
    log_mu: Float[Tensor, "b l v"],
    tokens: Int[Tensor, "b l"],
    increment: Float[Tensor, "b #l"],
    noise: Float[Tensor, "b l v"],
) -> Float[Tensor, "b l"]:
    """One draw by token of a step's summand in (16); its mean is at most the cross-entropy, which is `increment` = inf.

    Small increments carry little information and much noise, so the noise's first order, whose mean is zero, is taken
    off: with w ~ mu_k exp(mean of d_k - d_x), it is -sqrt(D) (<w, noise> - noise_x).

    Args:
        log_mu: The posterior at the step's start.
        tokens: The text.
        increment: D = SNR_t - SNR_s, positive or infinite.
        noise: Standard normal, independent of the state.
    """
    right, last = tokens[..., None], increment.isinf()[..., None]
    size = torch.where(last, 0.0, increment[..., None]).to(log_mu.dtype)
    swing = size.sqrt() * (noise - noise.gather(-1, right))  # 0 at the token itself
    mean = torch.where(last, -torch.inf, -size).expand_as(log_mu).scatter(-1, right, 0.0)
    weight = (log_mu + mean).softmax(-1)
    return (weight * swing).sum(-1) - (log_mu + mean + swing).logsumexp(-1)


def _cost(
    tokens: Tensor, increment: Float[Tensor, "b 1"], noise: Tensor | Noise, log_mu: Tensor, tile: Tile
) -> Float[Tensor, "_ n"]:
    """`step_cost` of a tile."""
    made = tile(noise) if isinstance(noise, Tensor) else tile(noise).x
    return step_cost(log_mu, tile(tokens), tile(increment), made)


def _increments(times: Tensor) -> Float[Tensor, "n"]:
    """SNR_{i+1} - SNR_i of a grid, fp64, the last one infinite; ValueError if it is no grid."""
    if times.dim() != 1 or len(times) < 2 or times[0] != 0 or times[-1] != 1 or bool((times.diff() <= 0).any()):
        raise ValueError("the finite-step bound needs times 0 = t_0 < ... < t_N = 1")
    return root_snr(times.double()).square().diff()


@torch.no_grad()
def finite_step_bound(
    flow_map: FlowMap,
    tokens: Int[Tensor, "b l"],
    times: Float[Tensor, "n"],
    *,
    num_samples: int = 2,
    known: Bool[Tensor, "b l"] | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    common: bool = False,
) -> Bound:
    """Monte-Carlo estimate of the bound (16) on texts drawn by the sampler `localisation` on the grid `times`.

    Args:
        flow_map: Only its diagonal is called, `num_samples` times at each of the N = len(times) - 1 steps.
        tokens: Ids in [0, V), (B, L).
        times: 0 = t_0 < ... < t_N = 1, as `times.grid` and `optimise_grid` give it.
        num_samples: Draws of every step, at least 2.
        known: Positions given as clean text; the bound is then conditional on them and on the length.
        generator: Source of randomness, on the tokens' device; the global one if None.
        dtype: Of the noise and of the state.
        common: All rows share their noise: differences between texts are then less noisy than the texts.

    Raises:
        ValueError: num_samples < 2, or `times` is not such a grid.
    """
    if num_samples < 2:
        raise ValueError(f"finite_step_bound needs num_samples >= 2, not {num_samples}")
    increments = _increments(times)
    rows = len(tokens)

    def noise() -> Tensor | Noise:
        return flow_map.random_noise(tokens.shape, generator, dtype, tokens.device, common)

    draws = torch.zeros(num_samples, *tokens.shape, dtype=torch.float64)
    start, step = noise(), noise()
    for draw in draws:
        for i, (t, increment) in enumerate(zip(times[:-1].double().tolist(), increments.tolist(), strict=True)):
            at = torch.full((rows,), t, dtype=torch.float64, device=tokens.device)
            endpoint = posterior(flow_map, tokens, start, at, known)
            cost = positionwise(endpoint, partial(_cost, tokens, torch.full_like(at, increment)[:, None], step))
            draw += unless_known(cost, known).cpu()
            # Neighbouring steps share their noise with opposite signs: less variance, and draws stay independent.
            last = i == len(increments) - 1
            start, step = (-start, -step) if i % 2 == 0 and not last else (noise(), noise())
    per_token = draws.mean(0)
    variance = draws.sum(2).var(0) / num_samples
    return Bound(per_token.sum(1), variance.sqrt(), per_token)


@torch.no_grad()
def step_costs(
    flow_map: FlowMap,
    tokens: Int[Tensor, "b l"],
    times: Float[Tensor, "n"],
    *,
    known: Bool[Tensor, "b l"] | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "n n"]:
    """What a step from times[i] to times[j] adds to (16) for these texts, nats per text in the mean; inf where j <= i.

    One network call per time, and the same noise at all of them, so that the table is smooth in both times.

    Args:
        flow_map: Only its diagonal is called.
        tokens: Ids in [0, V), (B, L).
        times: Candidates 0 = t_0 < ... < t_M = 1.
        known: Positions given as clean text.
        generator: Source of randomness; the global one if None.
        dtype: Of the noise and of the state.

    Raises:
        ValueError: `times` is not such a grid.
    """
    _increments(times)
    snr = root_snr(times.double()).square().to(tokens.device)
    start, step = (flow_map.random_noise(tokens.shape, generator, dtype, tokens.device) for _ in range(2))
    costs = torch.full((len(times), len(times)), torch.inf, dtype=torch.float64)
    for i in range(len(times) - 1):
        at = torch.full((len(tokens),), times[i].item(), dtype=torch.float64, device=tokens.device)
        endpoint, increments = posterior(flow_map, tokens, start, at, known), snr[i + 1 :] - snr[i]

        def work(tile: Tile, endpoint: Endpoint = endpoint, increments: Tensor = increments) -> Tensor:
            steps = (increment.expand(len(tokens), 1) for increment in increments)
            return torch.stack([_cost(tokens, step_, step, tile(endpoint).log, tile) for step_ in steps], -1)

        cost = over_tiles(work, endpoint.shape, flow_map.denoiser.tile)
        costs[i, i + 1 :] = torch.stack([unless_known(c, known).sum(1).mean() for c in cost.unbind(-1)]).cpu()
    return costs


def best_grid(costs: Float[Tensor, "n n"], times: Float[Tensor, "n"], steps: int) -> Float[Tensor, "m"]:
    """The grid of `steps` steps among candidate `times` with the least sum of `step_costs`, by dynamic programming.

    Raises:
        ValueError: Fewer than 1 step, or more than the candidates allow.
    """
    last = len(times) - 1
    if not 1 <= steps <= last:
        raise ValueError(f"a grid on {last + 1} candidate times has 1 to {last} steps, not {steps}")
    best = costs[:, last]  # of the rest of the way, from each candidate
    choices: list[Tensor] = []
    for _ in range(steps - 1):
        best, choice = (costs + best[None, :]).min(1)
        choices.append(choice)
    path = [0]
    for choice in reversed(choices):
        path.append(int(choice[path[-1]]))
    return times[[*path, last]]


def optimise_grid(
    flow_map: FlowMap,
    tokens: Int[Tensor, "b l"],
    steps: int,
    clock: Law,
    *,
    candidates: int | None = None,
    known: Bool[Tensor, "b l"] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "m"]:
    """The best grid of `steps` steps for the bound (16) on these texts, by `candidates` network calls.

    Candidates are equally spaced on `clock`; `best_grid` then chooses among all their subsets. A grid that was chosen
    on the very texts it scores flatters them: choose it on others.

    Args:
        flow_map: Only its diagonal is called.
        tokens: A few dozen texts that stand for those to be scored, (B, L).
        steps: N, at least 1.
        clock: Where the candidates lie; the run's law, or the decoding-error clock.
        candidates: How many, at least `steps`; None: max(64, 4 N).
        known: Positions given as clean text.
        generator: Source of randomness; the global one if None.

    Returns:
        Times 0 = t_0 < ... < t_N = 1, for `finite_step_bound` and for the sampler `localisation`.
    """
    times = grid(clock, candidates or max(64, 4 * steps))
    costs = step_costs(flow_map, tokens, times, known=known, generator=generator)
    return best_grid(costs, times, steps)
