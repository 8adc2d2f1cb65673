"""From noise to text. One loop, `sample`; a sampler is one `step` from time s to time t.

To add a sampler write a function step(flow_map, state, s, t, generator) -> (state at t, endpoint) and enter it in
SAMPLERS. Times are per position: known positions sit at s = t = 1, where every step is the identity.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from catmaps.flow.flow_map import Endpoint, FlowMap, positionwise
from catmaps.flow.interpolant import (
    AnyState,
    Combination,
    OneHot,
    State,
    advance,
    clamp_known,
    combine,
    renoise,
    step_fraction,
)
from catmaps.flow.noise import Noise, Randomness, Shared, Streams, fresh_noise

Ending = Tensor | Endpoint
"""mu of a step: (B, L, V) where states are held, else made when needed."""
Step = Callable[[FlowMap, AnyState, Tensor, Tensor, Randomness | None], tuple[AnyState, Ending]]
Watch = Callable[[float, Tensor], None]


def _fresh_noise(state: AnyState, generator: Randomness | None) -> Tensor | Noise:
    """Noise for a state, held as the state is."""
    if isinstance(generator, Streams):
        noise = generator.noise(*state.shape[1:])
        return noise.x.to(state.x.dtype) if isinstance(state, State) else noise
    if isinstance(state, State):
        return torch.randn(state.x.shape, generator=generator, dtype=state.x.dtype, device=state.x.device)
    return fresh_noise(generator, state.shape, state.terms[0][0].device)


def categorical(probabilities: Float[Tensor, "b l v"], generator: torch.Generator | None = None) -> Int[Tensor, "b l"]:
    """One draw per position, in fp64: fp32 would never draw events rarer than about 1e-7."""
    shape, device = probabilities.shape[:-1], probabilities.device
    return _at_point(probabilities, torch.rand(shape, generator=generator, dtype=torch.float64, device=device))


def _at_point(probabilities: Tensor, point: Tensor) -> Tensor:
    """The token at each point in [0, 1) of the distribution function."""
    cumulative = probabilities.double().cumsum(-1)
    point = (point * cumulative[..., -1])[..., None]
    # right: a point on an edge belongs to the token above it, never to one of probability 0.
    return torch.searchsorted(cumulative, point, right=True)[..., 0].clamp_max(probabilities.shape[-1] - 1)


def _draw(mu: Ending, generator: Randomness | None) -> Int[Tensor, "b l"]:
    """`categorical` of an endpoint, made or not."""
    if isinstance(generator, Streams):
        point = generator.uniform(mu.shape[1])
    elif isinstance(mu, Tensor):
        return categorical(mu, generator)
    else:
        point = torch.rand(mu.shape[:2], generator=generator, dtype=torch.float64, device=mu.hidden.device)
    if isinstance(mu, Tensor):
        return _at_point(mu, point)
    return positionwise(mu, lambda log_mu, tile: _at_point(log_mu.exp(), tile(point)))


def euler(
    flow_map: FlowMap, state: AnyState, s: Tensor, t: Tensor, generator: Randomness | None
) -> tuple[AnyState, Ending]:
    """One Euler step of the flow: the jump towards mu_{s,s}. Exact in u = t/(1-t); first order."""
    mu = flow_map.endpoint(state, s, s)
    return advance(state, mu, step_fraction(s, t)), mu


def heun(
    flow_map: FlowMap, state: AnyState, s: Tensor, t: Tensor, generator: Randomness | None
) -> tuple[AnyState, Ending]:
    """The trapezoidal rule in u, where the flow is d(x/(1-t))/du = mu: second order, two calls.

    The last step, to u = infinity, is an Euler step.
    """
    mu, gamma = flow_map.endpoint(state, s, s), step_fraction(s, t)
    if bool((t >= 1).all()):
        return advance(state, mu, gamma), mu
    second = flow_map.endpoint(advance(state, mu, gamma), t, t)
    return advance(advance(state, mu, gamma / (2 - gamma)), second, gamma / 2), second


def flow_map_step(
    flow_map: FlowMap, state: AnyState, s: Tensor, t: Tensor, generator: Randomness | None
) -> tuple[AnyState, Ending]:
    """One jump of the map, X_{s,t}."""
    mu = flow_map.endpoint(state, s, t)
    return advance(state, mu, step_fraction(s, t)), mu


def renoising(variance: float) -> Step:
    """Jump to the end, X_{s,1}, then back to t by fresh noise of `variance` times the path's.

    At 1 that is eq. (13) with t' = 1 (multistep consistency sampling), which an exact map makes exact. Less noise
    leaves the path and keeps more of the first guess. Source: docs/maths.md (e).
    """

    def step(
        flow_map: FlowMap, state: AnyState, s: Tensor, t: Tensor, generator: Randomness | None
    ) -> tuple[AnyState, Ending]:
        end = torch.ones_like(t)
        mu = flow_map.endpoint(state, s, end)
        clean = advance(state, mu, step_fraction(s, end))
        return renoise(clean, end, t, _fresh_noise(state, generator), variance), mu

    return step


renoise_step = renoising(1.0)


def localisation(
    flow_map: FlowMap, state: AnyState, s: Tensor, t: Tensor, generator: Randomness | None
) -> tuple[AnyState, Ending]:
    """Ancestral sampling in the localisation coordinate Y = x t / (1 - t)^2, whose clock is the SNR:

        k ~ mu_{s,s}(x),   Y_t = Y_s + D e_k + sqrt(D) noise,   D = SNR_t - SNR_s.

    The last step returns the drawn tokens. Source: docs/maths.md (a), (f1b).
    """
    mu = flow_map.endpoint(state, s, s)
    tokens, noise = _draw(mu, generator), _fresh_noise(state, generator)
    drawn = OneHot(tokens, state.shape[2])
    if bool((t >= 1).all()):
        return advance(state, drawn, (s < 1).to(t.dtype)), drawn.x.to(mu.dtype) if isinstance(mu, Tensor) else mu
    rest_s, rest_t = (1 - s).clamp_min(1e-6), (1 - t).clamp_min(1e-6)
    increment = ((t / rest_t).square() - (s / rest_s).square()).clamp_min(0)
    back, moves = rest_t.square() / t.clamp_min(1e-12), t > s  # x = back Y
    keep = torch.where(moves, back * s / rest_s.square(), 1.0)
    to_token, to_noise = (torch.where(moves, back * part, 0.0) for part in (increment, increment.sqrt()))
    return combine(state, keep, (to_token, drawn), (to_noise, noise)), mu


SAMPLERS: dict[str, Step] = {
    "euler": euler,
    "heun": heun,
    "flow_map": flow_map_step,
    "renoise": renoise_step,
    "localisation": localisation,
}


def renoise_bend(variance: float) -> float:
    """Renoising in N steps goes back to (i / N)^bend of the clock; other samplers stand at i / N of it.

    It always jumps to the end, and its second guess gains little where the first was a guess as well: it comes back
    late. Less noise hides less, and it may go back further. A third was measured for all of the noise and a half for
    half of it (docs/log.md, 2026-11-24 and 2026-11-27); between them the formula is a guess.
    """
    return 1 / (1 + 2 * variance)


def few_step_variance(steps: int) -> float:
    """With which a map renoises in N steps: half of the path's, in more than four 1 - 2 / N.

    Half makes text much likelier in few steps, at -4 to +2% of reverse bits, but every step costs a little variety: so
    what is left out in all does not grow. Half was measured, the rule beyond only here and there (docs/log.md,
    2026-11-27).
    """
    return max(0.5, 1 - 2 / steps)


@torch.inference_mode()
def sample(
    flow_map: FlowMap,
    step: Step,
    times: Float[Tensor, "n"],
    shape: tuple[int, int, int],
    *,
    tokens: Int[Tensor, "b l"] | None = None,
    known: Bool[Tensor, "b l"] | None = None,
    generator: Randomness | None = None,
    watch: Watch | None = None,
    variance: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Int[Tensor, "b l"]:
    """Draws noise and carries it to text.

    Args:
        flow_map: The model.
        step: One of SAMPLERS.
        times: 0 = t_0 < ... < t_N = 1 (`times.grid`): N steps.
        shape: (B, L, V).
        tokens: Given text, (B, L); read where `known`.
        known: Positions held clean at time 1 throughout.
        generator: Source of randomness; the global one if None. With `RowStreams` a text depends on its own row alone.
        watch: Called after every step with (t, endpoint); for pictures of the trajectory. What it sees is made whole.
        variance: Of the first noise; below 1 texts are likelier and less diverse, in a single call too, whose likeliest
            tokens no temperature of the model changes.
        dtype: Of the state; fp32, or fp64 for tests.

    Returns:
        Tokens, (B, L): the likeliest of the last endpoint, which is the state itself at t = 1; given tokens unchanged.

    Raises:
        ValueError: `known` without `tokens`.
    """
    if (known is None) != (tokens is None):
        raise ValueError("sample needs `tokens` and `known` together")
    batch, length, vocab_size = shape
    rows = batch if watch is not None else rows_at_once(flow_map, shape)
    if rows >= batch:
        first = _pure_noise(flow_map, shape, len(times) - 1, generator, dtype, variance)
        return _carry(flow_map, step, times, first, (tokens, known), generator, watch)
    device = generator.device if isinstance(generator, torch.Generator) else None
    shared, done = Shared(generator, batch, device), []
    for start in range(0, batch, rows):
        some = slice(start, min(start + rows, batch))
        given = [None if part is None else part[some] for part in (tokens, known)]
        few, own, streams = (some.stop - start, length, vocab_size), flow_map.rows(some), shared.rows(some)
        first = _pure_noise(own, few, len(times) - 1, streams, dtype, variance)
        done.append(_carry(own, step, times, first, given, streams, None))
    return torch.cat(done)


def rows_at_once(flow_map: FlowMap, shape: tuple[int, int, int]) -> int:
    """How many texts are carried together. Where x is looked at and that of the batch exceeds a tile, so many that
    theirs is held in one, and made once: at least one."""
    batch, length, vocab_size = shape
    if flow_map.denoiser.projects or flow_map.holds(batch, length):
        return batch
    most = max(1, flow_map.denoiser.tile // (length * vocab_size))
    return -(-batch // -(-batch // most))  # of nearly equal number


def _carry(
    flow_map: FlowMap,
    step: Step,
    times: Tensor,
    first: AnyState,
    given: Sequence[Tensor | None],
    generator: Randomness | None,
    watch: Watch | None,
) -> Tensor:
    """`sample` of texts that are carried together from their `first` state; `given` = (tokens, known)."""
    tokens, known = given
    state = clamp_known(first, tokens, known)
    for s, t in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        at = (_times_at(time, state, known) for time in (s, t))
        state, mu = step(flow_map, state, *at, generator)
        state = state.pruned() if isinstance(state, Combination) else state
        if watch is not None:
            seen = clamp_known(State(mu if isinstance(mu, Tensor) else mu.x), tokens, known)
            watch(t, seen.x)
    drawn = state.x.argmax(-1) if isinstance(state, State) else _text(state)
    return drawn if tokens is None or known is None else torch.where(known, tokens, drawn)


UNHELD_STEPS = 8  # a state that is not held is made again from all endpoints so far: the work grows as their square


def _pure_noise(
    flow_map: FlowMap,
    shape: tuple[int, int, int],
    steps: int,
    generator: Randomness | None,
    dtype: torch.dtype,
    variance: float,
) -> AnyState:
    """Where sampling starts: noise, not held if it exceeds a tile and few steps follow, or if only x W is ever seen."""
    spread = variance**0.5
    noise = flow_map.random_noise(shape[:2], generator, dtype)
    if isinstance(noise, Tensor):
        return State(noise * spread)
    if not flow_map.denoiser.projects and steps > UNHELD_STEPS:
        return State(noise.x * spread)
    return Combination(((torch.full(shape[:2], spread, device=noise.sample.device), noise),), shape)


def _text(state: Combination) -> Int[Tensor, "b l"]:
    """The tokens at t = 1, where the endpoint or the draw that came last is all that is left at positions not known."""
    last = state.terms[-1][1]
    assert isinstance(last, OneHot | Endpoint)
    return last.tokens if isinstance(last, OneHot) else last.likeliest()


def _times_at(t: float, state: AnyState, known: Tensor | None) -> Tensor:
    """(B, 1) if no position is known, else (B, L) with 1 at known positions."""
    like = state.x if isinstance(state, State) else state.terms[0][0]
    batch = like.new_full((state.batch_size, 1), t)
    return batch if known is None else torch.where(known, 1.0, batch)
