"""Tilting: texts from p(text) exp(r(text)) for any reward r, by particles that a flow map's look-ahead selects.

Particles move as a sampler's states do. After a look ahead, X_{t,1}(x), a particle weighs

    psi(x_t) / psi(x_s),   psi(x_t) = exp(a_t r(X_{t,1}(x_t))),   psi = exp r(text) at the end,

and where the effective number of a run falls below a share of its particles they are drawn anew by weight. The ratios
telescope to exp r(text): in the limit of many particles the law is the tilted one, whatever the look-ahead; a good one
only saves particles.

With a differentiable reward, localisation drifts: from Y, a step D = SNR_t - SNR_s goes by the law

    q(Y') ~ p(Y' | Y) exp<h, Y' - Y>,   h = grad_Y log psi,                                                       (20)

which is a step of the same kind, with mu_k exp(D h_k) in place of mu_k and D h added, at the weight

    p / q = exp(-<h, Y' - Y>) prod_l exp(D ||h_l||^2 / 2) sum_k mu_{l,k} exp(D h_{l,k}).                            (21)

Source: docs/steering.md.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from catmaps.flow.flow_map import FlowMap
from catmaps.flow.interpolant import State, clamp_known, gaussian, renoise
from catmaps.flow.particles import Particles, Swarm
from catmaps.flow.samplers import categorical

Reward = Callable[[Tensor], Tensor]
"""(B, L) token ids -> (B,), in nats: a text of reward r is wanted exp(r) times as often. Any function will do."""
RelaxedReward = Callable[[Tensor], Tensor]
"""(B, L, V) distributions -> (B,), differentiable."""


@dataclass(frozen=True, kw_only=True)
class Tilt:
    """What is wanted, and how it is sought."""

    reward: Reward
    particles: int = 16
    """Of one run, which gives one text."""
    move: Literal["renoise", "localisation"] = "renoise"
    """Sampler of the particles; its law is what is tilted. Renoising looks ahead for nothing: its jump is the look."""
    noise: float = 1.0
    """Variance of the noise that renoising adds, a share of the path's."""
    lookahead: Literal["map", "diagonal"] = "map"
    """X_{t,1} of a flow map, or the guess mu_{t,t} of a base."""
    trust: float = 1.0
    """a_t = t^trust: how soon look-aheads are believed."""
    threshold: float = 0.5
    """Particles are drawn anew where their effective number is below this share."""
    relaxed: RelaxedReward | None = None
    """The reward as a function of distributions: localisation then drifts along its gradient, (20)."""
    drift: float = 1.0
    """Multiplies h of (20); weights make up for it, whatever it is."""

    def __post_init__(self) -> None:
        if self.particles < 1 or self.trust < 0:
            raise ValueError("a tilt needs at least 1 particle and trust >= 0")
        if self.noise < 0 or (self.noise != 1 and self.move != "renoise"):
            raise ValueError("noise is a variance, at least 0, and only renoising adds it")
        if self.relaxed is not None and self.move != "localisation":
            raise ValueError("only localisation drifts along a gradient: leave `relaxed` out, or move by localisation")


class Given(NamedTuple):
    """Given text of every row, or None twice."""

    tokens: Int[Tensor, "r l"] | None
    known: Bool[Tensor, "r l"] | None

    def at(self, time: float, like: Tensor) -> Float[Tensor, "r _"]:
        """A time for every row, 1 at known positions."""
        rows = like.new_full((len(like), 1), time)
        return rows if self.known is None else torch.where(self.known, 1.0, rows)

    def keep(self, drawn: Int[Tensor, "r l"]) -> Int[Tensor, "r l"]:
        return drawn if self.known is None or self.tokens is None else torch.where(self.known, self.tokens, drawn)


@torch.no_grad()
def tilt(
    flow_map: FlowMap,
    wanted: Tilt,
    times: Float[Tensor, "n"],
    shape: tuple[int, int, int],
    *,
    tokens: Int[Tensor, "b l"] | None = None,
    known: Bool[Tensor, "b l"] | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Particles:
    """Runs B swarms of P particles each from noise to text.

    Args:
        flow_map: The model. A step and particle costs one call; localisation with a map's look-ahead two.
        wanted: The reward, and how it is sought.
        times: 0 = t_0 < ... < t_N = 1 (`times.grid`).
        shape: (B, L, V); B * P texts are held at once.
        tokens: Given text, (B, L), read where `known`; it never changes. Rewards see the whole text.
        known: Positions held clean.
        generator: Source of randomness; the global one if None.
        dtype: Of the state.

    Raises:
        ValueError: `known` without `tokens`.
    """
    if (known is None) != (tokens is None):
        raise ValueError("tilt needs `tokens` and `known` together")
    runs, size = shape[0], wanted.particles
    given = Given(*(None if rows is None else rows.repeat_interleave(size, 0) for rows in (tokens, known)))
    noise = gaussian((runs * size, *shape[1:]), generator, dtype).x
    state, swarm = State(clamp_known(State(noise), *given).x), Swarm(runs, size, noise.device)
    renoising = wanted.move == "renoise"
    for s, t in itertools.pairwise(times.tolist()):
        look = _look(flow_map, wanted, state, (s, t), given)
        # A particle is judged by what its state holds of the guess: renoising shows the guess at level t, localisation
        # what was seen by s, at first nothing. At t = 1 the text itself follows.
        seen = t if renoising else s
        if 0 < seen < 1:
            swarm.weigh(seen**wanted.trust * look.value)
            if (index := swarm.renew(wanted.threshold, generator)) is not None:
                state, look = state[index], look.of(index)  # rows of one run share their given text
        step = partial(_renoise, variance=wanted.noise) if renoising else _localise
        state, log_ratio = step(state, look, given.at(s, noise), given.at(t, noise), generator)
        swarm.correct(log_ratio)
    drawn = given.keep(state.x.argmax(-1))
    rewards = wanted.reward(drawn).double()
    swarm.weigh(rewards)
    return swarm.end(drawn, rewards)


# ---- looking ahead


class _Look(NamedTuple):
    """What a network says of every particle at time s."""

    log_mu: Float[Tensor, "r l v"]
    """Log endpoint that moves it."""
    value: Float[Tensor, "r"]
    """Reward of the look-ahead."""
    push: Float[Tensor, "r l v"] | None
    """h of (20), along Y; in the last step along the endpoint."""

    def of(self, index: Int[Tensor, "r"]) -> "_Look":
        return _Look(self.log_mu[index], self.value[index], None if self.push is None else self.push[index])


def _look(flow_map: FlowMap, wanted: Tilt, state: State, times: tuple[float, float], given: Given) -> _Look:
    s = given.at(times[0], state.x)
    end = torch.ones_like(s) if wanted.lookahead == "map" else s
    if wanted.relaxed is not None:
        return _look_with_gradient(flow_map, wanted, state, times, given)
    ahead = flow_map.log_endpoint(state, s, end)
    value = wanted.reward(given.keep(ahead.argmax(-1))).double()
    twice = wanted.move == "localisation" and wanted.lookahead == "map"
    return _Look(flow_map.log_endpoint(state, s, s) if twice else ahead, value, None)


def _look_with_gradient(
    flow_map: FlowMap, wanted: Tilt, state: State, times: tuple[float, float], given: Given
) -> _Look:
    """Value and gradient of the relaxed reward, which looks at the endpoint itself in place of its likeliest tokens."""
    s, relaxed = given.at(times[0], state.x), wanted.relaxed
    assert relaxed is not None

    def of_endpoint(mu: Tensor) -> Tensor:
        return relaxed(clamp_known(State(mu), *given).x)

    def of_state(x: Tensor) -> Tensor:
        end = torch.ones_like(s) if wanted.lookahead == "map" else s
        return of_endpoint(flow_map.endpoint(State(x), s, end))

    log_mu = flow_map.log_endpoint(state, s, s)
    value, push = _with_gradient(of_state, state.x)
    if times[1] == 1:
        _, push = _with_gradient(of_endpoint, log_mu.exp())
        return _Look(log_mu, value.double(), wanted.drift * push)
    if times[0] == 0:  # Y = 0, whatever the noise
        return _Look(log_mu, value.double(), None)
    scale = wanted.drift * times[0] ** (wanted.trust - 1) * (1 - times[0]) ** 2  # a_s dx/dY
    return _Look(log_mu, value.double(), scale * torch.where((s < 1)[..., None], push, 0.0))


def _with_gradient(function: Callable[[Tensor], Tensor], at: Tensor) -> tuple[Tensor, Tensor]:
    """A value (R,) and the gradient of each at its row."""
    with torch.inference_mode(False), torch.enable_grad():
        at = at.detach().clone().requires_grad_()
        value = function(at)
        (gradient,) = torch.autograd.grad(value.sum(), at)
    return value.detach(), gradient


# ---- moving


def _renoise(
    state: State, look: _Look, s: Tensor, t: Tensor, generator: torch.Generator | None, *, variance: float
) -> tuple[State, Float[Tensor, "r"]]:
    """Jump to the end and back to t, as `samplers.renoising`, from an endpoint that is known."""
    clean = State(torch.where((s < 1)[..., None], look.log_mu.exp().to(state.x.dtype), state.x))
    noise = torch.randn(state.x.shape, generator=generator, dtype=state.x.dtype, device=state.x.device)
    after = State(renoise(clean, torch.ones_like(t), t, noise, variance).x)
    return after, state.x.new_zeros(len(state.x), dtype=torch.float64)


def _localise(
    state: State, look: _Look, s: Tensor, t: Tensor, generator: torch.Generator | None
) -> tuple[State, Float[Tensor, "r"]]:
    """A step of `samplers.localisation`, by (20) if there is a push, and the log of (21).

    The last step draws tokens from mu_k exp(push_k).
    """
    moving = (s < 1)[..., None]
    last = bool((t >= 1).all())
    rest_s, rest_t = (1 - s).clamp_min(1e-6), (1 - t).clamp_min(1e-6)
    size = ((t / rest_t).square() - (s / rest_s).square())[..., None]
    push = torch.zeros_like(look.log_mu) if look.push is None else look.push.to(look.log_mu.dtype)
    tilted = look.log_mu + (push if last else size * push)
    drawn = torch.zeros_like(state.x).scatter_(-1, categorical(tilted.softmax(-1), generator)[..., None], 1.0)
    if last:
        log_ratio = tilted.double().logsumexp(-1) - (push.double() * drawn).sum(-1)
        after = State(torch.where(moving, drawn, state.x))
    else:
        noise = torch.randn(state.x.shape, generator=generator, dtype=state.x.dtype, device=state.x.device)
        move = size * (drawn + push) + size.clamp_min(0).sqrt() * noise
        wide = push.double()
        log_ratio = tilted.double().logsumexp(-1) + (size / 2 * wide.square() - wide * move).sum(-1)
        y = (s / rest_s.square())[..., None] * state.x + move
        after = State(torch.where(moving, (rest_t.square() / t.clamp_min(1e-12))[..., None] * y, state.x))
    log_ratio = torch.where(moving[..., 0], log_ratio, 0.0).sum(1)
    return after, torch.zeros_like(log_ratio) if look.push is None else log_ratio
