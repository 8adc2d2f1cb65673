"""Refinement: write anew the tokens of a finished text that fit the others least, with the others clean.

    score_l = log p(x_l | x_t at the other positions)      a token's word from its context, eq. (6) without its evidence

n positions are drawn without replacement in proportion to exp(-focus score); a sampler fills them in. With focus 0 that
is Gibbs sampling of random blocks, which keeps the model's law. With focus > 0 doubtful tokens are tried more often,
which by itself makes texts likelier than the model's; accepting a proposal with probability

    min(1, P(same positions, in this order | new text) / P(... | old text)),                                       (22)

both scored under the same noise, keeps the law again (Metropolis and Hastings). Source: docs/steering.md.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from catmaps.flow.flow_map import FlowMap
from catmaps.flow.interpolant import gaussian, interpolate
from catmaps.flow.samplers import Step, sample


@dataclass(frozen=True, kw_only=True)
class Refine:
    """How texts are refined."""

    rounds: int = 4
    share: float = 0.1
    """Of a text's free positions, at least one, is written anew in each round."""
    focus: float = 1.0
    """0: any positions; large: those that fit least."""
    at: float = 0.7
    """Time at which tokens are scored: the others then are seen through noise (1 - at)."""
    exact: bool = False
    """Accept by (22), for two calls of scoring a round in place of one."""

    def __post_init__(self) -> None:
        if self.rounds < 0 or not 0 < self.share <= 1 or self.focus < 0 or not 0 < self.at < 1:
            raise ValueError("refinement needs rounds >= 0, 0 < share <= 1, focus >= 0 and 0 < at < 1")


def consistency(
    flow_map: FlowMap, tokens: Int[Tensor, "b l"], at: float, noise: Float[Tensor, "b l v"]
) -> Float[Tensor, "b l"]:
    """log p(x_l | x_t at the other positions) of every token, t = `at`: the diagonal's endpoint without the evidence
    t/(1-t)^2 x_l that the token itself brings. One call."""
    time = noise.new_full((len(tokens), 1), at)
    state = interpolate(tokens, noise, time)
    context = flow_map.log_endpoint(state, time, time) - at / (1 - at) ** 2 * state.x
    return context.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


@torch.inference_mode()
def refine(
    flow_map: FlowMap,
    how: Refine,
    step: Step,
    times: Float[Tensor, "n"],
    tokens: Int[Tensor, "b l"],
    *,
    known: Bool[Tensor, "b l"] | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Int[Tensor, "b l"]:
    """Refined texts. A round costs a sampler's calls and one or two of scoring.

    Args:
        flow_map: The model.
        how: Rounds and choice of positions.
        step: One of SAMPLERS; fills positions in.
        times: Its grid.
        tokens: Texts.
        known: Positions that never change.
        generator: Source of randomness; the global one if None.
        dtype: Of states.
    """
    free = torch.ones_like(tokens, dtype=torch.bool) if known is None else ~known
    num = (how.share * free.sum(1)).ceil().long().clamp_min(1).minimum(free.sum(1))
    shape = (len(tokens), tokens.shape[1], flow_map.denoiser.vocab_size)
    for _ in range(how.rounds):
        noise = gaussian(shape, generator, dtype).x
        keys = torch.where(free, -how.focus * consistency(flow_map, tokens, how.at, noise), -torch.inf)
        order = _order(keys, generator)
        chosen = order.argsort(1) < num[:, None]  # rank of every position
        drawn = sample(flow_map, step, times, shape, tokens=tokens, known=~chosen, generator=generator, dtype=dtype)
        if how.exact:
            again = torch.where(free, -how.focus * consistency(flow_map, drawn, how.at, noise), -torch.inf)
            ratio = _log_chance(again, order, num) - _log_chance(keys, order, num)
            point = torch.rand(len(tokens), generator=generator, dtype=torch.float64, device=tokens.device)
            drawn = torch.where((point.log() < ratio)[:, None], drawn, tokens)
        tokens = drawn
    return tokens


def _order(keys: Float[Tensor, "b l"], generator: torch.Generator | None) -> Int[Tensor, "b l"]:
    """Positions in the order in which they are drawn without replacement, with chances ~ exp(key): by Gumbel noise."""
    uniform = torch.rand(keys.shape, generator=generator, dtype=torch.float64, device=keys.device)
    return (keys - (-uniform.clamp_min(1e-300).log()).log()).argsort(1, descending=True)


def _log_chance(keys: Float[Tensor, "b l"], order: Int[Tensor, "b l"], num: Int[Tensor, "b"]) -> Float[Tensor, "b"]:
    """log probability that the first `num` positions of `order` are drawn in this order (Plackett and Luce)."""
    ordered = keys.double().gather(1, order)
    left = ordered.flip(1).logcumsumexp(1).flip(1)
    counted = torch.arange(keys.shape[1], device=keys.device) < num[:, None]
    return torch.where(counted, ordered - left, 0.0).sum(1)
