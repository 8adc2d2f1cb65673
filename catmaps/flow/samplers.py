"""From noise to text. One loop, `sample`; a sampler is one `step` from time s to time t.

To add a sampler write a function step(flow_map, state, s, t, generator) -> (state at t, endpoint) and enter it in
SAMPLERS. Times are per position: known positions sit at s = t = 1, where every step is the identity.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from catmaps.flow.flow_map import FlowMap
from catmaps.flow.interpolant import State, advance, clamp_known, gaussian, renoise, step_fraction

Step = Callable[[FlowMap, State, Tensor, Tensor, torch.Generator | None], tuple[State, Tensor]]
Watch = Callable[[float, Tensor], None]


def _randn_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)


def categorical(probabilities: Float[Tensor, "b l v"], generator: torch.Generator | None = None) -> Int[Tensor, "b l"]:
    """One draw per position, in fp64: fp32 would never draw events rarer than about 1e-7."""
    cumulative = probabilities.double().cumsum(-1)
    point = torch.rand(probabilities.shape[:-1], generator=generator, dtype=torch.float64, device=cumulative.device)
    point = (point * cumulative[..., -1])[..., None]
    # right: a point on an edge belongs to the token above it, never to one of probability 0.
    return torch.searchsorted(cumulative, point, right=True)[..., 0].clamp_max(probabilities.shape[-1] - 1)


def euler(
    flow_map: FlowMap, state: State, s: Tensor, t: Tensor, generator: torch.Generator | None
) -> tuple[State, Tensor]:
    """One Euler step of the flow: the jump towards mu_{s,s}. Exact in u = t/(1-t); first order."""
    mu = flow_map.endpoint(state, s, s)
    return advance(state, mu, step_fraction(s, t)), mu


def heun(
    flow_map: FlowMap, state: State, s: Tensor, t: Tensor, generator: torch.Generator | None
) -> tuple[State, Tensor]:
    """The trapezoidal rule in u, where the flow is d(x/(1-t))/du = mu: second order, two calls.

    The last step, to u = infinity, is an Euler step.
    """
    mu = flow_map.endpoint(state, s, s)
    ends = bool((t >= 1).all())
    if not ends:
        ahead = advance(state, mu, step_fraction(s, t))
        mu = (mu + flow_map.endpoint(ahead, t, t)) / 2
    return advance(state, mu, step_fraction(s, t)), mu


def flow_map_step(
    flow_map: FlowMap, state: State, s: Tensor, t: Tensor, generator: torch.Generator | None
) -> tuple[State, Tensor]:
    """One jump of the map, X_{s,t}."""
    mu = flow_map.endpoint(state, s, t)
    return advance(state, mu, step_fraction(s, t)), mu


def renoise_step(
    flow_map: FlowMap, state: State, s: Tensor, t: Tensor, generator: torch.Generator | None
) -> tuple[State, Tensor]:
    """Jump to the end, X_{s,1}, then renoise back to t: eq. (13) with t' = 1 (multistep consistency sampling)."""
    end = torch.ones_like(t)
    mu = flow_map.endpoint(state, s, end)
    clean = advance(state, mu, step_fraction(s, end))
    return renoise(clean, end, t, _randn_like(state.x, generator)), mu


def localisation(
    flow_map: FlowMap, state: State, s: Tensor, t: Tensor, generator: torch.Generator | None
) -> tuple[State, Tensor]:
    """Ancestral sampling in the localisation coordinate Y = x t / (1 - t)^2, whose clock is the SNR:

        k ~ mu_{s,s}(x),   Y_t = Y_s + D e_k + sqrt(D) noise,   D = SNR_t - SNR_s.

    The last step returns the drawn tokens. Source: docs/maths.md (a), (f1b).
    """
    mu = flow_map.endpoint(state, s, s)
    drawn = torch.zeros_like(mu).scatter_(-1, categorical(mu, generator)[..., None], 1.0)
    noise = _randn_like(state.x, generator)
    if bool((t >= 1).all()):
        return State(torch.where((s < 1)[..., None], drawn, state.x)), drawn
    rest_s, rest_t = (1 - s).clamp_min(1e-6), (1 - t).clamp_min(1e-6)
    increment = ((t / rest_t).square() - (s / rest_s).square())[..., None]
    y = (s / rest_s.square())[..., None] * state.x + increment * drawn + increment.clamp_min(0).sqrt() * noise
    x = (rest_t.square() / t.clamp_min(1e-12))[..., None] * y
    return State(torch.where((t > s)[..., None], x, state.x)), mu


SAMPLERS: dict[str, Step] = {
    "euler": euler,
    "heun": heun,
    "flow_map": flow_map_step,
    "renoise": renoise_step,
    "localisation": localisation,
}
BENDS = {"renoise": 1 / 3}
"""Times of N steps stand at (i / N)^bend of the clock; 1 where nothing else was measured to be better. Renoising always
jumps to the end, and its second guess gains little where the first was a guess as well: it comes back late."""


@torch.inference_mode()
def sample(
    flow_map: FlowMap,
    step: Step,
    times: Float[Tensor, "n"],
    shape: tuple[int, int, int],
    *,
    tokens: Int[Tensor, "b l"] | None = None,
    known: Bool[Tensor, "b l"] | None = None,
    generator: torch.Generator | None = None,
    watch: Watch | None = None,
    dtype: torch.dtype = torch.float32,
) -> Int[Tensor, "b l"]:
    """Draws noise and carries it to text.

    Args:
        flow_map: The model. Its temperature, which divides the logits, also multiplies the variance of the first noise:
            in a single call the likeliest tokens are the same at any division of the logits.
        step: One of SAMPLERS.
        times: 0 = t_0 < ... < t_N = 1 (`times.grid`): N steps.
        shape: (B, L, V).
        tokens: Given text, (B, L); read where `known`.
        known: Positions held clean at time 1 throughout.
        generator: Source of randomness; the global one if None.
        watch: Called after every step with (t, endpoint); for pictures of the trajectory.
        dtype: Of the state; fp32, or fp64 for tests.

    Returns:
        Tokens, (B, L): the likeliest of the last endpoint, which is the state itself at t = 1; given tokens unchanged.

    Raises:
        ValueError: `known` without `tokens`.
    """
    if (known is None) != (tokens is None):
        raise ValueError("sample needs `tokens` and `known` together")
    first = State(gaussian(shape, generator, dtype).x * flow_map.temperature**0.5)
    state = clamp_known(first, tokens, known)
    for s, t in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        state, mu = step(flow_map, state, _times_at(s, state, known), _times_at(t, state, known), generator)
        if watch is not None:
            watch(t, clamp_known(State(mu), tokens, known).x)
    drawn = state.x.argmax(-1)
    return drawn if tokens is None or known is None else torch.where(known, tokens, drawn)


def _times_at(t: float, state: State, known: Tensor | None) -> Tensor:
    """(B, 1) if no position is known, else (B, L) with 1 at known positions."""
    batch = state.x.new_full((state.batch_size, 1), t)
    return batch if known is None else torch.where(known, 1.0, batch)
